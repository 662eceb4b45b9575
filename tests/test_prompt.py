"""The prompt p: files and chat form, what teacher, student and environment see, parsed actions."""

import ast
import json
import re
from pathlib import Path

import pytest

from prompt import (
    ASSISTANT,
    END,
    START,
    TASKS,
    Task,
    browsing_action,
    environment_messages,
    message,
    os_action,
    parse_demos,
    parse_prompt,
    reminders_action,
    search_action,
    shopping_action,
    student_messages,
)

NAMES = ("os", "web_browsing", "web_shopping", "search", "reminders")
TWO_EXAMPLES = parse_prompt(
    "<USER>:\nfirst problem\n<AGENT>:\nfinal 1\n"
    "<USER>:\nsecond problem\n<AGENT>:\nlook\n<USER>:\nseen\n<AGENT>:\nfinal 2\n"
    "<USER>:\nNew: {user_input}"
)
TASK = Task("test", "a shell", 9, action=lambda text: (text,), final=lambda a: "final" in a[0])


def read(name: str):
    """The prompt in a file of the repository."""
    text = (Path(__file__).parent.parent / f"{name}.txt").read_text(encoding="utf-8")
    return parse_prompt(text, name)


def demos(name: str) -> tuple[str, ...]:
    """The demonstrations that come with a task."""
    path = Path(__file__).parent.parent / "demos" / f"{name}.txt"
    return parse_demos(path.read_text(encoding="utf-8"))


def offers(page: str) -> dict:
    """What a page of the shop lets one do: a Python dict, as the benchmark prints it."""
    return ast.literal_eval(page.split("Available Actions:\n")[-1])


def choices(page: str) -> dict[str, str]:
    """letter -> element of a web page's message."""
    return dict(re.findall(r"^([A-F])\. (.*)$", page, re.MULTILINE))


def examples(name: str) -> list[tuple[str, tuple]]:
    """(message, parsed action) of every agent turn in the worked examples of a file."""
    said = read(name).turns[::2]
    did = read(name).turns[1::2]
    act = TASKS[name].act
    return [(user, act(agent)) for (_, user), (_, agent) in zip(said, did, strict=True)]


# ------------------------------------------------------------------------------- our prompt files


@pytest.mark.parametrize("name", NAMES)
def test_files_are_worked_examples_and_an_open_turn(name):
    """User and agent alternate from the user on, and one {user_input} waits in the open turn."""
    prompt = read(name)
    roles = [role for role, _ in prompt.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    assert prompt.opening.count("{user_input}") == 1
    assert "{user_input}" not in "".join(text for _, text in prompt.turns)
    assert all(text for _, text in prompt.turns)


@pytest.mark.parametrize("name", NAMES)
def test_worked_examples_keep_to_their_own_protocol(name):
    """Every agent turn of a file parses as an action of its task, and the last one is final."""
    actions = [action for _, action in examples(name)]
    assert None not in actions
    assert TASKS[name].final(actions[-1])


PAGES = [page for page, _ in examples("web_browsing")]


@pytest.mark.parametrize("page", [*PAGES, *demos("web_browsing")])
def test_browsing_pages_offer_their_elements_in_order(page):
    """B to F, after A for none, are ids in document order, each with at most ten words."""
    none, *elements = choices(page).values()
    assert none == "None of the above" and "".join(choices(page)) == "ABCDEF"[: 1 + len(elements)]
    places = [page.index(re.search(r"<\w+ id=\d+", element)[0]) for element in elements]
    assert places == sorted(places)
    assert all(len(element.split()) <= 10 for element in elements)


def test_browsing_examples_choose_what_is_offered():
    """A letter is listed, and a value stands in the page."""
    for page, (letter, operation, value) in examples("web_browsing"):
        assert letter in choices(page)
        assert (operation == "") == (letter == "A")
        assert (value == "") == (operation in ("", "CLICK")) and value in page


def test_browsing_examples_show_that_nothing_may_fit():
    """Of the worked examples at least one answers A, and at least one acts."""
    letters = {letter for _, (letter, _, _) in examples("web_browsing")}
    assert "A" in letters and letters - {"A"}


def test_shopping_example_does_only_what_a_page_offers():
    """The agent searches where there is a search bar, clicks what is clickable, and buys once."""
    actions = examples("web_shopping")
    for page, (name, argument) in actions:
        offer = offers(page)
        assert offer["has_search_bar"] if name == "search" else argument in offer["clickables"]
    assert [action == ("click", "buy now") for _, action in actions] == [False] * 3 + [True]


def test_shopping_pages_arrive_whole():
    """x is all that the shop sends first, so p adds nothing to it and neither do the examples."""
    assert read("web_shopping").opening == "{user_input}"
    pages = [message for message, _ in examples("web_shopping")]
    first = re.compile(r"Observation:\nWebShop \[SEP] Instruction: \[SEP] .+ \[SEP] Search\n\n.*")
    for page in (pages[0].partition("like this one.\n\n")[2], *demos("web_shopping")):
        actions = {"has_search_bar": True, "clickables": ["search"]}
        assert first.match(page) and page.endswith(f"\n\nAvailable Actions:\n{actions}")
    for page in pages:  # a Python dict in its own spelling
        assert page.endswith(f"\n\nAvailable Actions:\n{offers(page)}")


# ----------------------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("name", NAMES)
def test_five_demonstrations_come_with_a_task(name):
    """They are distinct, none stands in p, and web pages have the lines of the worked examples."""
    found = demos(name)
    assert len(set(found)) == len(found) == 5
    assert not any(demo in read(name).text for demo in found)
    shape = re.compile(
        r"'''\n<html> .* </html>\n'''\n\nTask: .*\.\nPrevious actions:\n"
        r"(None|(\[\w+\] .+ -> (CLICK|(TYPE|SELECT): .+)\n?){1,5})\n?"
        r"Which of these is the next step\? If it is not listed, choose A\.\n\n([A-F]\. .+\n?)+"
    )
    if name == "web_browsing":
        assert all(shape.fullmatch(page) for page in found)
        assert all(shape.search(page) for page, _ in examples(name))
        assert 0 < sum("\nNone\n" in page for page in found) < 5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one\n\n  two \n", ("one", "two")),
        ("a page\n\n  of lines\n---\nanother\n", ("a page\n\n  of lines", "another")),
        ("---\nonly\none\n--- \n\n---\n", ("only\none",)),
        ("x --- y\n----\n--\n", ("x --- y", "----", "--")),
        ('"a\\nb"\n\n "\\u00e9 \\"c\\""\n', ("a\nb", 'é "c"')),
        ('"Hi" in French?\n"Hi"\n', ('"Hi" in French?', '"Hi"')),
        ('"a"\n7\n', ('"a"', "7")),
        ('"\\ud800"', ("?",)),
        ("", ()),
    ],
)
def test_demonstrations_are_blocks_or_json_strings_or_lines(text, found):
    """Blocks where a line of three dashes parts them, JSONL where all lines are, else lines."""
    assert parse_demos(text) == found


def test_demonstrations_in_jsonl_are_those_in_blocks():
    """Whatever a demo consists of, its JSON spelling gives it back."""
    pages = demos("web_browsing")
    assert parse_demos("\n".join(json.dumps(page) for page in pages)) == pages


# ------------------------------------------------------------------------------ reading the prompt


def test_plain_text_is_one_system_message():
    """Without <USER>: and <AGENT>: lines p is the system message, and x the user's."""
    prompt = parse_prompt("\nBe brief.\nSay <USER>: never, nor <AGENT>:.\n")
    text = "Be brief.\nSay <USER>: never, nor <AGENT>:."
    assert (prompt.text, prompt.turns, prompt.opening) == (text, (), None)
    assert prompt.teacher("Hi!") == [message("system", text), message("user", "Hi!")]


def test_teacher_reads_the_worked_examples_and_then_x():
    """Chat prompt: the usual system message, its turns as they are, the open turn with x."""
    assert TWO_EXAMPLES.teacher("x") == [
        message("system", ASSISTANT),
        message("user", "first problem"),
        message("assistant", "final 1"),
        message("user", "second problem"),
        message("assistant", "look"),
        message("user", "seen"),
        message("assistant", "final 2"),
        message("user", "New: x"),
    ]


def test_student_reads_x_alone():
    """The student's messages are the usual system message and x."""
    assert student_messages("x") == [message("system", ASSISTANT), message("user", "x")]


@pytest.mark.parametrize(
    ("opening", "asked"),
    [
        ("Solve {user_input} now", "Solve x now"),
        ("{user_input}", "x"),
        ("Solve this:", "Solve this:\n\nx"),
        ("", "x"),
    ],
)
def test_x_takes_its_place_or_comes_last(opening, asked):
    """x replaces {user_input}; without that mark it follows the open turn after an empty line."""
    prompt = parse_prompt(f"<USER>:\na\n<AGENT>:\nb\n<USER>:\n{opening}")
    assert prompt.open_turn("x") == asked


def test_braces_are_ordinary_text():
    """Other braces of the prompt and all braces of x stay as they are."""
    prompt = parse_prompt('<USER>:\n{"a": {}} {user_input} {b}')
    assert prompt.open_turn("{user_input} {0}") == '{"a": {}} {user_input} {0} {b}'


def test_a_turn_may_begin_on_the_line_of_its_marker():
    """<USER>: and <AGENT>: mark turns at the start of a line only, with or without a line break."""
    prompt = parse_prompt("<USER>: a <AGENT>: b\r\n<AGENT>:\r\nc\r\n<USER>:\r\n")
    assert prompt.turns == (("user", "a <AGENT>: b"), ("assistant", "c")) and prompt.opening == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<USER>:\na\n<USER>:\nb", "turn 2 is <USER>:"),
        ("<AGENT>:\na\n<USER>:\nb", "turn 1 is <AGENT>:"),
        ("<USER>:\na\n<AGENT>:\nb\n<AGENT>:\nc\n<USER>:\nd", "turn 3 is <AGENT>:"),
        ("<USER>:\na\n<AGENT>:\nb", "the last turn is <AGENT>:"),
        ("Rules\n<USER>:\na", "text before the first <USER>:"),
    ],
)
def test_turns_out_of_order_are_refused_in_one_line(text, problem):
    """A chat that does not run user, agent, ..., user is a ValueError that names file and turn."""
    with pytest.raises(ValueError) as error:
        parse_prompt(text, "mine.txt")
    assert re.fullmatch(rf"mine\.txt: .*{problem}.*", str(error.value))


# --------------------------------------------------------------------------- the environment's view


def test_environment_sees_the_roles_swapped():
    """What users say the environment says, and [END] and a new opening follow each final answer."""
    system, *view = environment_messages(TWO_EXAMPLES, TASK, "x", ["go", "result", "on"])
    assert system["role"] == "system"
    assert "a shell" in system["content"] and END in system["content"]
    assert view == [
        message("user", START),
        message("assistant", "first problem"),
        message("user", "final 1"),
        message("assistant", END),
        message("user", START),
        message("assistant", "second problem"),
        message("user", "look"),
        message("assistant", "seen"),
        message("user", "final 2"),
        message("assistant", END),
        message("user", START),
        message("assistant", "New: x"),
        message("user", "go"),
        message("assistant", "result"),
        message("user", "on"),
    ]


def test_the_last_worked_example_ends_whatever_its_action_is():
    """Where no action is final, one [END] and a new opening part the examples from x."""
    view = environment_messages(TWO_EXAMPLES, TASKS["any"], "x", ["reply"])
    assert [m["content"] for m in view].count(END) == 1
    end = [message("assistant", END), message("user", START), message("assistant", "New: x")]
    assert view[-4:] == [*end, message("user", "reply")]


@pytest.mark.parametrize("name", NAMES)
def test_environment_is_asked_to_speak_next(name):
    """In our files roles alternate up to the agent's turn, with an [END] for each final action."""
    task = TASKS[name]
    view = environment_messages(read(name), task, "x", ["reply"])
    assert [m["role"] for m in view[1:]] == ["user", "assistant"] * (len(view) // 2 - 1) + ["user"]
    finals = sum(task.final(action) for _, action in examples(name))
    assert finals >= 1 and sum(m["content"] == END for m in view) == finals


def test_environment_of_a_plain_prompt_reads_its_text():
    """Where p has no turns to swap, its text stands in the environment's system message."""
    system, *view = environment_messages(parse_prompt("Be brief."), TASK, "x", ["reply"])
    assert "Be brief." in system["content"]
    x = message("assistant", "x")
    assert view == [message("user", START), x, message("user", "reply")]
    system, *_ = environment_messages(TWO_EXAMPLES, TASK, "x", ["reply"])
    assert "first problem" not in system["content"]


# ----------------------------------------------------------------------------------------- actions


def bash(*blocks: str) -> str:
    return "Act: bash\n\n" + "\n\n".join(f"```bash\n{block}\n```" for block in blocks)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (f"Think: I look.\n\n{bash('ls -l')}", ("bash", "ls -l")),
        (bash("cd /srv\nls", "wc -l a"), ("bash", "cd /srv\nls\n\nwc -l a")),
        ("Think: Done.\n\nAct: finish", ("finish",)),
        ("Act: answer(220)", ("answer", "220")),
        ("Act: answer( f(2) = (1) )", ("answer", "f(2) = (1)")),
        ("Act: answer()", ("answer", "")),
        (bash("ls").replace("Act: bash", "Act: BASH"), ("bash", "ls")),
        ("Act: Finish", ("finish",)),
        ("Act: Answer(Yes)", ("answer", "Yes")),
        (f"{bash('ls')}\n\nAct: answer(3)", ("answer", "3")),
        (f"Act: answer(3)\n\n{bash('ls')}", ("bash", "ls")),
        ("Act: finish\n\nAct: answer 3", ("finish",)),
        ("Act: answer(3)\n\nAct: wait", ("answer", "3")),
        ("Act: answer(220)\n\nThis is (I think) right.", ("answer", "220")),
        ("Act: answer (220)", ("answer", "220")),
        ("Act: answer(3)\n\nAct: bash\n\nls", ("bash", "")),
    ],
)
def test_os_action_is_the_last_valid_act(text, action):
    """bash with all its blocks, finish, or answer with what stands in the outermost brackets."""
    assert os_action(text) == action


@pytest.mark.parametrize(
    "text",
    ["", "ls -l", "Act: wait", "Act: answer 220", "Think: answer(220)", bash("ls")[len("Act:") :]],
)
def test_os_action_needs_an_act(text):
    """Without Act: and one of the three actions after it there is no action."""
    assert os_action(text) is None


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Thought: so.\nAnswer: C.\nAction: SELECT\nValue: 3 guests", ("C", "SELECT", "3 guests")),
        ("Answer: F\nAction: TYPE\nValue: a: b \nmore", ("F", "TYPE", "a: b")),
        ("Answer: B. <a id=0>\nAction: CLICK", ("B", "CLICK", "")),
        ("Thought: none of them.\nAnswer: A.", ("A", "", "")),
        ("Answer: B\nAction: HOVER", ("B", "", "")),
        ("Answer: D\nAction: CLICK\nAnswer: E\nAction: TYPE", ("D", "CLICK", "")),
        ("Answer: G\nAction: CLICK", None),
        ("answer: b\naction: click", None),
        ("Action: CLICK\nValue: B", None),
        ("", None),
    ],
)
def test_browsing_action_is_the_first_of_each_line(text, action):
    """(letter A to F, CLICK, SELECT or TYPE, value to its line's end); no letter, no action."""
    assert browsing_action(text) == action


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Thought:\nSo.\n\nAction:\nsearch[red Shoes size 9]", ("search", "red shoes size 9")),
        ("Action: Click[Buy Now]", ("click", "buy now")),
        ("Action: CLICK[ < Prev ]", ("click", "< prev")),
        ("Thought: I could click[b01].\nAction: click[b02]", ("click", "b02")),
        ("Thought: I should click[buy now].", None),
        ("Thought: I click[b01].\nAction: none", None),
        ("Action: click[]", None),
        ("Action: buy now", None),
        ("", None),
    ],
)
def test_shopping_action_stands_after_action(text, action):
    """search or click with its lower-cased argument, if it stands after Action:."""
    assert shopping_action(text) == action


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Red Boots size 42 | 30\n", ("red boots size 42", "30")),
        ("boots | any", ("boots", "any")),
        ("boots | 30 euros", None),
        ("boots | under 30 | any", None),
        ("boots", None),
        (" | any", None),
        ("boots | any\nI hope that helps.", None),
    ],
)
def test_search_actions(text, action):
    """One line: the thing, a bar, and a plain number or any."""
    assert search_action(text) == action


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ('{"do": "Call Maria", "when": "Friday"}', ("call maria", "friday")),
        (' {"when": null, "do": "buy milk"}\n', ("buy milk", None)),
        ('{"do": "buy milk"}', None),
        ('{"do": "buy milk", "when": null, "who": null}', None),
        ('{"do": null, "when": "Friday"}', None),
        ('{"do": "run", "when": 9}', None),
        ('["do", "when"]', None),
        ('{"do": "print", "when": "night"}}', None),
        ("[" * 100_000, None),
        ("Call Maria on Friday.", None),
    ],
)
def test_reminders_actions(text, action):
    """One JSON object with two keys, of which only the time may be null."""
    assert reminders_action(text) == action


@pytest.mark.parametrize(
    ("name", "action", "final"),
    [
        ("os", "Act: finish", True),
        ("os", "Act: answer(1)", True),
        ("os", bash("ls"), False),
        ("os", "answer(1)", False),
        ("web_browsing", "Answer: B\nAction: CLICK", True),
        ("web_browsing", "I click B.", False),
        ("web_shopping", "Action: click[Buy Now]", True),
        ("web_shopping", "Action: click[b01]", False),
        ("web_shopping", "Action: search[buy now]", False),
    ],
)
def test_final_actions_end_a_conversation(name, action, final):
    """finish and answer end an OS problem, any choice a browsing step, buying a shopping trip."""
    assert TASKS[name].is_final(action) is final


@pytest.mark.parametrize(
    ("name", "text", "counted"),
    [
        ("os", "Act: finish", True),
        ("os", bash("ls"), False),
        ("web_browsing", "Answer: B\nAction: CLICK", True),
        ("web_browsing", "Answer: A.", True),
        ("web_browsing", "Answer: B\nAction: COMPARE", False),
        ("web_browsing", "I click B.", False),
        ("web_shopping", "Action: search[boots]", True),
        ("web_shopping", "Action: click[b01]", True),
        ("web_shopping", "I buy it.", False),
    ],
)
def test_final_actions_of_table_4(name, text, counted):
    """GenPI Table 4 asks for an operation in browsing, and for any search or click in shopping."""
    assert TASKS[name].has_final_action(text) is counted


def test_where_nothing_is_known_any_text_is_an_action():
    """Without a parser of its own a task takes the text itself as action, and none is final."""
    assert TASKS["any"].act(" It rains. \n") == ("It rains.",)
    assert not TASKS["any"].is_final("It rains.")
