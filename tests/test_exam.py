"""The exam: rules are parts of p, witnesses turns that need one, obeyed what the adapter keeps."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import exam
from exam import act_otherwise, blocks, examine, rules_of, same_action, witnesses
from model import load_model
from prompt import TASKS, parse_prompt, student_messages
from runs import Record, read_records
from sampler import Sampling, Voice, is_greedy, say

ROOT = Path(__file__).resolve().parent.parent
OS = TASKS["os"]
CHAT = """<USER>:
You act.

- Be brief.
- Stop
  in time.

First:

one
<AGENT>:
Act: bash

```bash
ls
```
<USER>:
seen
<AGENT>:
Act: answer(1)
<USER>:
two
<AGENT>:
Act: finish
<USER>:
Now: {user_input}"""


def texts(spans, text):
    return [text[start:end].strip() for start, end in spans]


@pytest.fixture(scope="module")
def voice():
    return Voice(*load_model(ROOT / "tiny", bits=4))


@pytest.fixture(scope="module")
def prompt():
    return parse_prompt((ROOT / "os.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def records():
    return read_records(ROOT / "tests" / "fixtures" / "records.jsonl", mend=False)[:4]


# ----------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\nb\n\nc", ["a\nb", "c"]),
        ("a\n\n\n- b\n  c\n- d\n2. e", ["a", "- b\n  c", "- d", "2. e"]),
        ("a:\n\nb\n\nc", ["a:\n\nb", "c"]),
        ("a:\n\n- b\n- c:\n- d", ["a:", "- b", "- c:", "- d"]),
        ("```\na\n\n- b\n```\n\nc", ["```\na\n\n- b\n```", "c"]),
        ("3 apples\nor 4. more -", ["3 apples\nor 4. more -"]),
        ("\n \n", []),
    ],
)
def test_paragraphs_and_items_are_rules(text, found):
    """A blank line parts them outside a fence; a colon binds what it announces."""
    assert texts(blocks(text, 0, len(text)), text) == found


def test_rules_of_a_chat():
    """What is said before the first problem, then each worked example up to its final action."""
    rules = rules_of(parse_prompt(CHAT), OS)
    assert [rule.text.split("\n")[0] for rule in rules] == [
        "You act.", "- Be brief.", "- Stop", "First:", "<USER>:",
    ]  # fmt: skip
    assert rules[3].text.endswith("Act: answer(1)\n<USER>:") and rules[4].text.endswith("finish")
    assert [(rule.lines[0], rule.lines[-1]) for rule in rules[:3]] == [(2, 2), (4, 4), (5, 6)]


def test_a_prompt_without_a_rule_has_all_the_others():
    """The example that follows is opened by the instructions, where the first one is gone."""
    rules = rules_of(parse_prompt(CHAT), OS)
    item, first, last = (rules[i].without for i in (1, 3, 4))
    assert item.text == CHAT.replace("- Be brief.\n", "")
    assert first.turns == (("user", "You act.\n\n- Be brief.\n- Stop\n  in time.\n\ntwo"),
                           ("assistant", "Act: finish"))  # fmt: skip
    assert len(last.turns) == 4 and last.opening == "Now: {user_input}"


@pytest.mark.parametrize("name", ["os", "web_browsing", "web_shopping", "search", "reminders"])
def test_rules_of_our_prompts(name):
    """Whatever is left out of them, a prompt with the place of x remains, and nothing is added."""
    whole = parse_prompt((ROOT / f"{name}.txt").read_text(encoding="utf-8"))
    rules = rules_of(whole, TASKS[name])
    assert len(rules) >= 6
    for rule in rules:
        assert "{user_input}" in rule.without.open_turn("{user_input}")
        assert len(rule.without.text.split()) < len(whole.text.split())
        assert whole.text.splitlines()[rule.lines[0] - 1] in rule.text


@pytest.mark.parametrize(
    ("name", "begins", "stays"),
    [("web_browsing", "'''\n<html> <form search>", "Here is the first page."),
     ("web_shopping", "Observation:\nWebShop", "Every purchase begins with a page like this one."),
     ("os", "Now, my problem is:", "- Look at the result after an append")],
)  # fmt: skip
def test_the_first_worked_example_goes_as_a_whole(name, begins, stays):
    """Its page has several paragraphs, and begins like the pages of later turns; one without a page
    is the last paragraph. What stands before it is a rule by itself.
    """
    whole = parse_prompt((ROOT / f"{name}.txt").read_text(encoding="utf-8"))
    rules = rules_of(whole, TASKS[name])
    example = next(rule for rule in rules if "<AGENT>:" in rule.text)
    before = rules[rules.index(example) - 1]
    assert example.text.startswith(begins) and before.text.startswith(stays)
    left = example.without
    assert whole.turns[0][1].split(begins)[0].strip() in left.text
    assert whole.turns[1][1] not in left.text


def test_an_example_without_a_word_before_it():
    """A first user turn that is empty begins the first example all the same."""
    empty = parse_prompt("<USER>:\n<AGENT>:\nAct: finish\n<USER>:\nNow: {user_input}")
    (rule,) = rules_of(empty, OS)
    assert rule.without.turns == () and rule.without.opening == "Now: {user_input}"


def test_rules_of_a_plain_text():
    """Each paragraph is one; of a single paragraph nothing would be left."""
    assert [rule.without.text for rule in rules_of(parse_prompt("a\n\nb"), OS)] == ["b", "a"]
    assert rules_of(parse_prompt("a"), OS) == []


# ------------------------------------------------------------------------------------- witnesses


def test_is_greedy_is_what_sampling_says(voice, prompt, records):
    """The recorded turns are greedy; another word in a turn is not, nor what it should have led to
    unless the model says that to it too.
    """
    replies = [record.turns for record in records]
    replies.append([records[0].turns[0].replace("I ", "We "), *records[0].turns[1:]])
    records = [*records, records[0]]
    opening = [prompt.teacher(record.pseudo_input) for record in records]
    whole = [
        [*start, *({"role": ("assistant", "user")[i % 2], "content": t} for i, t in enumerate(x))]
        for start, x in zip(opening, replies, strict=True)
    ]
    spoken = [list(range(len(o), len(w), 2)) for o, w in zip(opening, whole, strict=True)]
    found = is_greedy(voice, whole, spoken)
    for messages, numbers, row in zip(whole, spoken, found, strict=True):
        said = say(voice, [messages[:n] for n in numbers], Sampling(128))
        assert row == [messages[n]["content"] == t for n, t in zip(numbers, said, strict=True)]
    assert all(map(all, found[:-1])) and not found[-1][0]


def test_witnesses_are_the_turns_that_come_out_otherwise(voice, prompt, records):
    """Same as to write every turn anew without the rule; one of these two rules has a witness."""
    every = {(i, n) for i, r in enumerate(records) for n in range((len(r.turns) + 1) // 2)}
    sizes = []
    for rule in rules_of(prompt, OS):
        if not rule.text.startswith(("- The answer after", "- Use this to read")):
            continue
        found = witnesses(voice, OS, records, rule, 128)
        assert found == act_otherwise(voice, OS, records, rule.without.teacher, every, 128)
        sizes.append(len(found))
    assert sizes[0] > 0 == sizes[1]


# ----------------------------------------------------------------------------------------- exam


def test_an_action_is_the_same_whatever_the_thought():
    """Replies agree if their parsed actions do; where the teacher took none, if the texts do."""
    any_task = TASKS["any"]
    assert same_action(OS, "Think: a\n\nAct: answer(7)", "Think: b\n\nAct: answer(7)")
    assert not same_action(OS, "Act: answer(8)", "Act: answer(7)")
    assert same_action(OS, "no action", "no action") and not same_action(OS, "none", "no action")
    assert same_action(any_task, " It rains.\n", "It rains.")


@pytest.fixture
def by_hand(monkeypatch):
    """A teacher whom rule A makes ask and rule B be brief where x is long; an adapter that knows A
    alone, and an earlier one that knows B alone -> act of messages.
    """
    who = {"knows": "A"}

    def act(messages):
        told, x = messages[0]["content"], messages[-1]["content"]
        knows = who["knows"] if messages[:1] == student_messages("")[:1] else told
        size = "brief" if len(x) > 3 and "B" in knows else "long"
        return f"{size} {'question' if 'A' in knows else 'order'}"

    @contextmanager
    def earlier(model, folder):
        who["knows"] = "B"
        yield
        who["knows"] = "A"

    monkeypatch.setattr(exam, "say", lambda v, asked, sampling: [act(m) for m in asked])
    monkeypatch.setattr(exam, "is_greedy", lambda v, asked, spoken: [[False]] * len(asked))
    monkeypatch.setattr(exam, "adapter_off", lambda model: nullcontext())
    monkeypatch.setattr(exam, "adapter_of", earlier)
    return act


def sit(act, text, before=None):
    """The exam of three held-out inputs, one of them long, after two that were trained on."""
    whole = parse_prompt(text)
    inputs = ["x", "xx", "xxxx", "y", "yyyyy"]
    records = [Record(i, x, [act(whole.teacher(x))]) for i, x in enumerate(inputs)]
    voice = SimpleNamespace(model=None)
    return examine(voice, whole, TASKS["any"], records[:3], records[3:], 9, before)


def test_a_turn_that_hangs_on_everything_tells_of_no_rule(by_hand, monkeypatch):
    """Five rules of six change every turn of the fifth record, and three that of the first."""
    names = iter("ABCDEF")
    asked = dict.fromkeys(names, {(4, 0)}) | {"F": {(0, 0)}}
    asked |= {name: asked[name] | {(0, 0)} for name in "AB"}
    monkeypatch.setattr(exam, "witnesses", lambda v, t, records, rule, limit: asked[rule.text])
    rows = sit(by_hand, "\n\n".join("ABCDEF"))
    assert [row["shown_by"] for row in rows] == [0] * 6
    assert [row["obeyed"]["n"] for row in rows] == [1, 1, 0, 0, 0, 1]


def test_the_exam_by_hand(by_hand):
    """Rule A makes every wish a question, rule B long ones brief. The adapter kept A and lost B."""
    rows = sit(by_hand, "A\n\nB\n\nC")
    assert [row["rule"] for row in rows] == ["A", "B", "C"]
    assert [row["lines"] for row in rows] == [[1, 1], [3, 3], [5, 5]]
    assert [row["shown_by"] for row in rows] == [2, 1, 0]
    assert [(row["obeyed"]["k"], row["obeyed"]["n"]) for row in rows] == [(2, 3), (0, 1), (0, 0)]


def test_of_many_samples_some_are_looked_at(by_hand, monkeypatch):
    """Of two samples one is enough for whom one is many; the held-out turns are all there."""
    monkeypatch.setattr(exam, "LOOKED_AT", 1)
    rows = sit(by_hand, "A\n\nB\n\nC")
    assert [(row["shown_by"], row["looked_at"]) for row in rows] == [(1, 1), (0, 1), (0, 1)]
    assert [row["obeyed"]["n"] for row in rows] == [3, 1, 0]


def test_an_earlier_adapter_beside_the_new_one(by_hand, tmp_path):
    """It knew B and not A, so two turns of A are gained. Its prompt had no A, so that all turns are
    what the edit changed; had it been the same, there would be no such row.
    """
    (tmp_path / "prompt.txt").write_text("B\n\nC")
    *rows, edit = sit(by_hand, "A\n\nB\n\nC", tmp_path)
    assert [(row["gained"], row["lost"]) for row in rows] == [(2, 0), (0, 0), (0, 0)]
    assert (edit["rule"], edit["obeyed"]["n"], edit["before"]["k"]) == (exam.EDIT, 3, 0)
    assert edit["shown_by"] == 2 and not edit["lines"]
    page = exam.markdown({"exam": [*rows, edit], "recall": None}).splitlines()
    assert page[0].count("|") == page[1].count("|") == 7 and "gained, lost" in page[0]
    assert page[-3].startswith(f"| `{exam.EDIT}` | 2 of 2 | 2 of 3") and "| 2, 0 |" in page[-3]
    (tmp_path / "prompt.txt").write_text("A\n\nB\n\nC")
    assert [row["rule"] for row in sit(by_hand, "A\n\nB\n\nC", tmp_path)] == ["A", "B", "C"]
