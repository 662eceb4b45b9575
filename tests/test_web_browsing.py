"""Web browsing: pages cut down and spelled, the tournament of choices, scores, files; no model."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pytest

from benchmarks.web_browsing import OURS, Step, episode, load, question, words_f1
from benchmarks.web_page import ID, candidates_on, prune, spell
from benchmarks.web_ranks import read_ranks
from prompt import parse_demos, parse_prompt

ROOT = Path(__file__).parent.parent


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def shown(html: str, *names: str) -> str:
    """The page that an agent sees around the candidates of these names."""
    page = prune(fromstring(html), list(names))
    return spell(page, {name: number for number, name in enumerate(candidates_on(page, names))})


def play(sample, agent) -> tuple[dict, list[list[str]]]:
    """Let an agent (text -> reply) play an episode -> (its result, what it was shown)."""
    asked = []
    game = episode(sample)
    try:
        said = next(game)
        while True:
            asked.append(said)
            said = game.send(agent(said[-1]))
    except StopIteration as end:
        return end.value, asked


# ------------------------------------------------------------- the message is that of the prompt


def source(page: str) -> str:
    """cleaned_html that is spelled as this page: id=3 becomes the name "3", other names are new.

    What an element says stands in its title; one that says nothing and is empty says something
    that is too long to be shown, else it would not be kept.
    """
    html = ""
    for tag in re.findall(r"<[^>]*>|[^<]+", page):
        found = re.fullmatch(r"<(\w+)((?: [^ /]+)*?)( /)?>", tag)
        if not found:
            word = f"<text {ID}='t{len(html)}'>{escape(tag.strip())}</text>"
            html += tag if tag.startswith("</") else word if tag.strip() else "\n"
            continue
        name = re.search(r"id=(\d+)", found[2])
        says = re.sub(r"id=\d+", "", found[2]).strip() or ("x" * 15 if found[3] else "")
        title = f" title={quoteattr(says)}" if says else ""
        html += f"<{found[1]} {ID}='{name[1] if name else f'n{len(html)}'}'{title}{found[3] or ''}>"
    return html


MESSAGES = [text for role, text in parse_prompt(read("web_browsing.txt")).turns if role == "user"]
MESSAGES += parse_demos(read("demos/web_browsing.txt"))


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_that_of_the_prompt(message):
    """Every page of the prompt and of its demonstrations is one that the benchmark can send."""
    message = message[message.index("'''") :]
    form = r"'''\n(.*)\n'''\n\nTask: (.*)\nPrevious actions:\n(.*)\nWhich.*\n\nA\. .*?\n(.*)"
    page, task, before, choices = re.fullmatch(form, message, re.DOTALL).groups()
    before = () if before == "None" else tuple(before.split("\n"))
    names = [str(number) for number in range(len(choices.split("\n")))]
    step = Step("s", task, before, source(page), (), (), "CLICK")
    assert question(step, fromstring(step.page), names[::-1]) == (message, names)


# ------------------------------------------------------------------------------ pages, by hand


def test_what_surrounds_a_candidate_is_kept():
    """Ancestors without their neighbours, and three neighbours on either side."""
    row = "".join(f'<a {ID}="{i}" title="t{i}"/> ' for i in range(10))
    html = f'<html {ID}="h"> <p {ID}="p" title="far"/> <ul {ID}="u" role="list"> {row}</ul> </html>'
    kept = " ".join(f"<a id=0 t{i} />" if i == 4 else f"<a t{i} />" for i in range(1, 8))
    assert shown(html, "4") == f"<html> <ul list> {kept} </ul> </html>"


def test_a_candidate_keeps_six_levels_and_fifty_elements():
    """What is deeper or later is left out."""
    deep = "".join(f'<b {ID}="{i}" title="l{i}"> ' for i in range(9)) + "</b> " * 9
    opened = " ".join(f"<b l{i}>" for i in range(1, 7))
    assert shown(f"<html> {deep}</html>", "0").startswith(f"<html> <b id=0 l0> {opened} </b>")
    wide = "".join(f'<i {ID}="{i}" title="w"/>' for i in range(60))
    assert shown(f'<html> <p {ID}="p"> {wide} </p> </html>', "p").count("<i w />") == 50


def test_a_wrapper_that_says_nothing_gives_way():
    """It stays if it has a text, a second element, or an attribute; a candidate always stays."""
    a = f'<a {ID}="a" title="go"/>'
    for inner, left in (
        (f'<p {ID}="p"> {a} </p>', "<a id=0 go />"),
        (f'<p {ID}="p"> <p {ID}="q"> {a} </p> <i {ID}="i"/> </p>', "<a id=0 go />"),
        (f'<p {ID}="p"> {a} <i {ID}="i" alt="x"/> </p>', "<p> <a id=0 go /> <i x /> </p>"),
        (f'<p {ID}="p"> <text {ID}="t">Hi</text> {a} </p>', "<p> Hi <a id=0 go /> </p>"),
        (f'<p {ID}="p" role="menu"> {a} </p>', "<p menu> <a id=0 go /> </p>"),
    ):
        assert shown(f"<html> {inner} </html>", "a") == f"<html> {left} </html>"
    wanted = "<html> <p id=0> <a go /> </p> </html>"
    assert shown(f"<html> <p {ID}='p'> {a} </p> </html>", "p") == wanted


def test_the_example_of_the_module():
    """What the head of web_page.py shows."""
    form = f"<input {ID}='i' name='q' type='text' placeholder='City'/><button class='Go' {ID}='b'/>"
    html = f"<html><div {ID}='d'><form {ID}='f'>{form}</form></div></html>"
    spelled = "<form> <input id=0 text q city /> <button go /> </form>"
    assert shown(html, "i") == f"<html> {spelled} </html>"


def test_ids_count_the_candidates_in_the_order_of_the_page():
    """From 0, whatever their order in the question; texts and others have none."""
    html = f"<html> <a {ID}='9'/> <b {ID}='7' alt='b'/> <i {ID}='8'/> </html>"
    assert shown(html, "8", "9") == "<html> <a id=0 /> <b b /> <i id=1 /> </html>"


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"class": "Menu-Icon", "role": "Button", "name": "q", "id": "x"}, "button q menu-icon"),
        ({"alt": "same words", "title": "Same  words"}, "same words"),
        ({"role": "presentation", "type": "hidden", "title": "null", "value": "HTTP://x"}, ""),
        ({"title": "a b c d e f", "value": f"of {'x' * 15} and {'y' * 14}"},
         f"a b c d e of and {'y' * 14}"),
        ({name: f"{name} 2 3 4 5" for name in ("role", "type", "alt", "label", "name")},
         "role 2 3 4 5 type 2 3 4 5 alt 2 3 4 5 label 2 3 4 5"),
        ({"title": 'say "hi" &amp; &lt;'}, 'say "hi" & <'),
    ],
)  # fmt: skip
def test_what_attributes_say(attributes, said):
    """In a fixed order, lower case, five words each and twenty in all, nothing twice or empty."""
    given = " ".join(f"{name}={quoteattr(text)}" for name, text in attributes.items())
    wanted = f"<a id=0 {said} />" if said else "<a id=0 />"
    assert shown(f"<html> <a {ID}='a' {given}/> </html>", "a") == f"<html> {wanted} </html>"


def test_texts_are_cut_after_twenty_words():
    """Quotation marks become spaces, as with the authors; what was escaped twice is read."""
    words = " ".join(f"w{i}" for i in range(30))
    html = f"<html> <p {ID}='p'> <text {ID}='t'>{words}</text> </p> </html>"
    assert shown(html, "p") == f"<html> <p id=0> {' '.join(words.split()[:20])} </p> </html>"
    html = f"<html> <p {ID}='p'> <text>a \"b\" &amp;nbsp; c</text> </p> </html>"
    assert shown(html, "p") == "<html> <p id=0> a b c </p> </html>"


# ----------------------------------------------------------------------------------- the tournament


def step_of(right: int, wrong: int, operation: str = "CLICK") -> Step:
    """A step on a page of links called r0, r1, ... and w0, w1, ..."""
    rights = tuple(f"r{i}" for i in range(right))
    wrongs = tuple(f"w{i}" for i in range(wrong))
    links = "".join(f"<a {ID}='{name}' title='{name}'/> " for name in rights + wrongs)
    return Step("step-1", "Go.", (), f"<html> {links}</html>", rights, wrongs, operation)


def seeker(name: str, action: str = "CLICK", value: str = ""):
    """An agent that chooses the element of this name wherever it is listed."""

    def agent(text: str) -> str:
        found = re.search(rf"^([B-F])\. <a id=\d {name} />", text, re.MULTILINE)
        if not found:
            return "Thought: It is not there.\nAnswer: A."
        return f"Answer: {found[1]}.\nAction: {action}" + (f"\nValue: {value}" if value else "")

    return agent


def test_a_right_choice_wins():
    """Ten elements take two questions of five, and one more if the choice was of the first five."""
    asked = set()
    for right in range(10):
        sample = step_of(10, 0)
        result, dialogues = play(sample, seeker(f"r{right}"))
        assert result["score"] == result["f1"] == 1 and result["element"]
        assert all(
            len(dialogue) == 1 for dialogue in dialogues
        )  # each question is a fresh dialogue
        asked.add(result["questions"])
    assert asked == {2}
    assert play(step_of(1, 9), seeker("w3"))[0]["score"] == 0


def test_a_choice_is_asked_about_again_behind_the_others():
    """Eleven elements: 5 and 5 and 1 with the choice at its end, in which another may win."""
    result, dialogues = play(step_of(1, 10), lambda text: "Answer: B")
    assert result["questions"] == 3
    lists = [
        set(re.findall(r"^[B-F]\. <a id=\d (\w+)", text, re.MULTILINE)) for [text] in dialogues
    ]
    assert [len(names) for names in lists] == [5, 5, 3] and not lists[0] & lists[1]
    assert len(lists[2] & lists[0]) == 1 == len(lists[2] & lists[1])


def test_none_at_the_end_takes_a_choice_back():
    """Six elements: one of five is chosen, then the sixth and it are refused: nothing is chosen."""
    replies = iter(["Answer: B\nAction: CLICK", "Answer: A"])
    result, _ = play(step_of(6, 0), lambda text: next(replies))
    assert (result["score"], result["element"], result["said"]) == (0, False, "")
    replies = iter(["Answer: A", "no answer at all"])
    result, asked = play(step_of(6, 0), lambda text: next(replies))
    assert result["score"] == 0 and len(asked) == 1  # the sixth is alone and is not asked about


@pytest.mark.parametrize("reply", ["Answer: F\nAction: CLICK", "B", "Action: CLICK", ""])
def test_what_is_not_on_the_list_is_none(reply):
    """A letter without an element, or no Answer at all, counts as A."""
    assert play(step_of(2, 0), lambda text: reply)[0]["score"] == 0
    assert play(step_of(2, 0), lambda text: "Answer: C\nAction: CLICK")[0]["score"] == 1


def test_nothing_is_asked_where_nothing_can_be_right():
    """No right element among the ten best, or a single element in all: 0 without a question."""
    for sample in (step_of(0, 9), step_of(1, 0)):
        result, asked = play(sample, seeker("r0"))
        assert result["score"] == result["f1"] == 0 and not result["element"] and asked == []


def test_the_order_of_elements_is_the_steps_own():
    """The same step is asked about in the same order each time, another one in another."""

    def first(sample):
        return play(sample, lambda text: "Answer: A")[1][0]

    sample = step_of(2, 8)
    assert first(sample) == first(sample)
    assert len({first(replace(sample, id=f"step-{i}"))[0] for i in range(5)}) > 1


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    ("said", "wanted", "f1"),
    [
        ("CLICK", "CLICK", 1),
        ("TYPE new york", "TYPE york new", 1),
        ("TYPE york", "TYPE new york", 2 * 2 / (2 + 3)),
        ("SELECT 3", "TYPE 4", 0),
        ("CLICK x", "CLICK", 2 / 3),
        ("", "CLICK", 0),
        ("", "", 1),
    ],
)
def test_f1_is_over_sets_of_words(said, wanted, f1):
    """2 |both| / (|said| + |wanted|)."""
    assert words_f1(said, wanted) == pytest.approx(f1)


def test_a_step_succeeds_if_element_and_operation_are_right():
    """A right element with another value is no success, nor is the operation alone."""
    sample = step_of(1, 4, "TYPE two tickets")
    for name, action, value, element, f1 in (
        ("r0", "TYPE", "two tickets", True, 1),
        ("r0", "TYPE", "tickets", True, 0.8),
        ("r0", "CLICK", "", True, 0),
        ("w1", "TYPE", "two tickets", False, 1),
    ):
        result, _ = play(sample, seeker(name, action, value))
        assert (result["element"], result["f1"]) == (element, pytest.approx(f1))
        assert result["score"] == (element and f1 == 1)

    assert play(step_of(1, 4), seeker("w1"))[0]["ended"] == "another element"


def knowing(step: Step):
    """An agent that knows the step: it looks for its element by how that is spelled."""

    def words(shown: str) -> list[str]:
        return re.sub(r" ?id=\d+", "", shown).split()[:6]  # in which no two of ours are alike

    wanted = words(question(step, fromstring(step.page), list(step.right))[0].split("\nB. ")[1])

    def agent(text: str) -> str:
        operation, _, value = step.operation.partition(" ")
        for letter, shown in re.findall(r"^([B-F])\. (.*)$", text, re.MULTILINE):
            if words(shown) == wanted:
                return f"Answer: {letter}.\nAction: {operation}\nValue: {value}"
        return "Answer: A."

    return agent


def test_our_own_steps_can_all_be_done():
    """Who knows them scores 1; who clicks on the first thing that is offered seldom does."""
    steps = load(OURS)
    assert len(steps) == 14
    assert all(play(step, knowing(step))[0]["score"] == 1 for step in steps)
    first = [play(step, lambda text: "Answer: B.\nAction: CLICK")[0]["score"] for step in steps]
    assert sum(first) < 5


# ------------------------------------------------------------------------------------------- files


def write_tasks(folder: Path, tasks: int = 4, steps: int = 7) -> None:
    """Tasks in two files of Mind2Web's form, and ranks: the elements of a page in their order."""
    made = []
    ranks = {}
    for t in range(tasks):
        actions = []
        for s in range(steps):
            names = [str(100 * s + i) for i in range(12)]
            links = "".join(f"<a {ID}='{name}' title='e{name}'/>\n" for name in names)
            value = {"op": "TYPE", "value": "5 May"} if s % 2 else {"op": "CLICK", "value": ""}
            actions.append({
                "action_uid": f"u{s}", "raw_html": "-", "cleaned_html": f"<html>\n{links}</html>",
                "operation": {"original_op": "HOVER", **value},
                "pos_candidates": [{ID: names[s + 5], "tag": "a"}],  # of step 5 it is the eleventh
                "neg_candidates": [{ID: name} for name in names if name != names[s + 5]],
            })  # fmt: skip
            ranks[f"task{t}_u{s}"] = {name: i for i, name in enumerate(names)}
        made.append({
            "annotation_id": f"task{t}", "confirmed_task": f"Do {t}.", "website": "x",
            "action_reprs": [f"[link]  e{s} -> CLICK" for s in range(steps)], "actions": actions,
        })  # fmt: skip
    for i in (0, 1):
        text = json.dumps(made[i * tasks // 2 :][: tasks // 2])
        (folder / f"train_{i}.json").write_text(text, encoding="utf-8")
    (folder / "scores_all_data.json").write_text(json.dumps({"ranks": ranks, "scores": {}}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    write_tasks(tmp_path / "data")
    return tmp_path / "data"


def test_steps_are_read_with_the_ten_best_elements(folder):
    """All steps of all files; a right one behind the tenth is gone, and so is its chance."""
    found = {step.id: step for step in load(folder, 100)}
    assert len(found) == 4 * 7
    step = found["task2_u4"]
    assert (step.task, step.right, step.operation) == ("Do 2.", ("409",), "CLICK")
    assert step.wrong == tuple(str(400 + i) for i in range(9))
    assert found["task0_u1"].operation == "TYPE 5 May"
    assert found["task0_u5"].right == () and len(found["task0_u5"].wrong) == 10
    assert found["task3_u6"].before == tuple(f"[link]  e{s} -> CLICK" for s in range(1, 6))
    text = question(step, fromstring(step.page), ["409"])[0]
    assert "\nPrevious actions:\n[link] e0 -> CLICK\n[link] e1 -> CLICK\n" in text


def test_the_sample_depends_on_the_seed_alone(folder, tmp_path):
    """Same seed, same steps, however the files are split; with another seed there are others."""
    chosen = load(folder, 6)
    tasks = [task for i in (1, 0) for task in json.loads((folder / f"train_{i}.json").read_bytes())]
    other = tmp_path / "other" / "test_domain"
    other.mkdir(parents=True)
    (other / "all.json").write_text(json.dumps(tasks))
    (folder / "scores_all_data.json").rename(tmp_path / "other" / "scores_all_data.json")
    assert load(other, 6) == load(other.parent, 6) == chosen
    assert load(other, 3) == chosen[:3]
    assert {s.id for s in load(other, 6, seed=1)} != {s.id for s in chosen}


def test_ranks_are_read_from_the_pickle(folder):
    """Numbers of NumPy, as a ranking script leaves them, and dicts of any kind that it uses."""
    chosen = load(folder, 100)
    ranks = json.loads((folder / "scores_all_data.json").read_text())["ranks"]
    (folder / "scores_all_data.json").unlink()
    path = folder / "scores_all_data.pkl"
    for kind in (int, np.int64, np.float32):
        found = {s: {e: kind(i) for e, i in places.items()} for s, places in ranks.items()}
        path.write_bytes(pickle.dumps({"ranks": found, "scores": {"x": np.float32(1)}}))
        assert load(folder, 100) == chosen
    old = pickle.dumps({"ranks": found, "more": np.ones(3)}, protocol=2)  # as NumPy 1 wrote it
    path.write_bytes(old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_ranks(path) == found


def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path):
    """Nothing of it runs; the error names the file and what it asked for."""
    trap = f"cos\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode()  # call os.mkdir with this text
    (folder / "scores_all_data.json").unlink()
    (folder / "scores_all_data.pkl").write_bytes(trap)
    with pytest.raises(ValueError, match=r"scores_all_data.pkl: .*os\.mkdir.*; download"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(trap)
    assert (tmp_path / "ran").exists()  # Python's own reader does run it


def spoil(folder, change):
    """Change the first task of a file in place."""
    path = folder / "train_0.json"
    tasks = json.loads(path.read_text())
    change(tasks[0])
    path.write_text(json.dumps(tasks))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda task: task.pop("confirmed_task"), "task 1: lacks confirmed_task; give a folder"),
        (lambda task: task.update(action_reprs="x"), "task 1: action_reprs = 'x' is not"),
        (lambda task: task["actions"][0].pop("cleaned_html"), "task 1: lacks cleaned_html;"),
        (lambda task: task["actions"][0]["operation"].pop("op"), "task 1: lacks op;"),
        (lambda task: task["actions"][0]["neg_candidates"][2].clear(), f"has no {ID};"),
    ],
)
def test_a_task_that_lacks_something(folder, change, words):
    """One line with the file, the task, what it lacks, and the cure."""
    spoil(folder, change)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load(folder)
    assert str(folder / "train_0.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda task: task["actions"][0].update(cleaned_html="<p>"),
            "task0_u0: cleaned_html is no",
        ),
        (lambda task: task["actions"][0].update(action_uid="z"), "no ranks of step task0_z; ranks"),
        (lambda task: task["actions"][0]["pos_candidates"][0].update({ID: "77"}), "element 77;"),
    ],
)
def test_a_step_that_does_not_fit_its_ranks_or_page(folder, change, words):
    """One line with the step and what is wrong with it."""
    spoil(folder, change)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(folder)


def test_a_folder_of_something_else(folder, tmp_path):
    """No folder, no tasks, no ranks, no JSON, no list: each is told with its cure."""
    ranks = folder / "scores_all_data.json"
    for path, words in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "no scores_all_data.pkl"),
    ):
        with pytest.raises(ValueError, match=words):
            load(path)
    for text, words in (
        ("{}", "not a list in JSON"),
        ("[{", "not a list in JSON"),
        ("[7]", "lacks"),
    ):
        (folder / "train_1.json").write_text(text)
        with pytest.raises(ValueError, match=f"train_1.json: .*{words}.*; give a folder"):
            load(folder)
    for text, words in (("{}", "has no ranks"), ("[", "not JSON")):
        (folder / "train_1.json").write_text("[]")
        ranks.write_text(text)
        with pytest.raises(ValueError, match=f"scores_all_data.json: .*{words}"):
            load(folder)
    for path in folder.glob("train*"):
        path.unlink()
    with pytest.raises(ValueError, match="no JSON file of tasks"):
        load(folder)
    ranks.rename(ranks.with_suffix(".pkl"))
    with pytest.raises(ValueError, match="scores_all_data.pkl: cannot be read"):
        read_ranks(ranks.with_suffix(".pkl"))
