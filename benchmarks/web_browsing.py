"""Web browsing: the next step on a recorded web page, chosen among ten elements of it.

    python evaluate.py web_browsing --run runs/web_browsing                14 steps of our own
    python evaluate.py web_browsing --run runs/web_browsing --data PATH    Mind2Web's, from a folder

A sample is one step of one recorded task of Mind2Web: the page, the steps before, and the elements
that a small ranking model placed first to tenth. The agent reads five elements at a time, in a
fresh dialogue each, and chooses one or none; a chosen one is asked about again behind the others,
so that the last choice wins. Measured over 100 steps are

    element    is the chosen element a right one?
    f1         F1 of the words of "OPERATION value" against the recorded ones
    score      step success: element, and f1 = 1

A step whose right elements the ranking model placed behind the tenth scores 0, as in AgentBench.
Its own 100 steps exist in a docker image only, so these are others: a sample that depends on the
seed alone, whatever the files are called and however they are split. Elements that the cleaned page
lacks are left out.

Source: Mind2Web (2306.06070) section 3; AgentBench (2308.03688), web browsing, commit 41e6807.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from random import Random
from xml.etree import ElementTree

from tqdm import tqdm

from benchmarks.driver import Episode, Sample
from benchmarks.items import json_items
from benchmarks.web_page import ID, candidates_on, prune, spell
from benchmarks.web_ranks import find_ranks, read_ranks
from files import check_kinds
from flags import SEED, WHOLE
from prompt import browsing_action
from runs import text_hash

REPLY_TOKENS = 512
MEASURES = ("element", "f1")
BEST = 10  # elements, of the ranking model
OFFERED = 5  # elements of a question
BEFORE = 5  # steps that the agent is told
SHOWN = 10  # words of an element in the list of choices
LETTERS = "BCDEF"  # of the elements; A is none of them
OURS = Path(__file__).parent / "data/web_browsing"
CURE = "give a folder of Mind2Web's JSON files, such as test_domain of its test.zip"
OTHER = "ranks and tasks must be of the same data set"

OF_TASK = {
    "annotation_id": str,
    "confirmed_task": str,
    "action_reprs": list[str],
    "actions": list[dict],
}
OF_ACTION = {
    "action_uid": str,
    "cleaned_html": str,
    "operation": dict,
    "pos_candidates": list[dict],
    "neg_candidates": list[dict],
}

QUESTION = """'''
{page}
'''

Task: {task}
Previous actions:
{before}
Which of these is the next step? If it is not listed, choose A.

A. None of the above
{choices}"""


@dataclass(frozen=True)
class Step:
    """A sample. Elements are named by the page's backend_node_id."""

    id: str
    task: str
    before: tuple[str, ...]  # the steps before, the last one last
    page: str  # cleaned_html
    right: tuple[str, ...]  # elements
    wrong: tuple[str, ...]  # elements
    operation: str  # "CLICK", "SELECT value" or "TYPE value"


# ----------------------------------------------------------------------------------------- loading


def load(path: Path, n: int = 100, seed: int = 0) -> list[Step]:
    """A sample of n steps of a folder of Mind2Web's files, or all if there are fewer.

    Raises: ValueError naming a file that is missing or no good.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; {CURE}")
    scores = find_ranks(path)
    files = sorted(file for file in path.rglob("*.json") if file.stem != scores.stem)
    if not files:
        raise ValueError(f"{path}: no JSON file of tasks in it; {CURE}")

    def drawn(step: Step) -> bytes:
        return hashlib.sha256(f"{seed} {step.id}".encode()).digest()

    read = tqdm(files, "pages", unit=" files", leave=False, disable=None)
    steps = heapq.nsmallest(n, (step for file in read for step in steps_of(file)), key=drawn)
    ranks = read_ranks(scores)
    for step in steps:
        if not isinstance(ranks.get(step.id), dict):
            raise ValueError(f"{scores}: has no ranks of step {step.id}; {OTHER}")
    return [with_best(step, ranks[step.id]) for step in steps]


def steps_of(file: Path) -> Iterator[Step]:
    """All steps of a file."""
    for number, task in enumerate(json_items(file, CURE), 1):
        try:
            check_kinds(task if isinstance(task, dict) else {}, OF_TASK)
            yield from steps_of_task(task)
        except ValueError as error:
            raise ValueError(f"{file}: task {number}: {error}; {CURE}") from None


def steps_of_task(task: dict) -> Iterator[Step]:
    """The steps of a task, each with those before it."""
    for number, action in enumerate(task["actions"]):
        check_kinds(action, OF_ACTION)
        check_kinds(action["operation"], {"op": str, "value": str})
        operation = action["operation"]["op"]
        if operation != "CLICK":
            operation += f" {action['operation']['value']}"
        yield Step(
            id=f"{task['annotation_id']}_{action['action_uid']}",
            task=task["confirmed_task"],
            before=tuple(task["action_reprs"][:number][-BEFORE:]),
            page=action["cleaned_html"],
            right=names_of(action["pos_candidates"]),
            wrong=names_of(action["neg_candidates"]),
            operation=operation,
        )


def names_of(elements: list[dict]) -> tuple[str, ...]:
    """The names of candidates. Raises: ValueError if one has none."""
    names = tuple(element.get(ID) for element in elements)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"a candidate has no {ID}")
    return names


def with_best(step: Step, ranks: dict) -> Step:
    """The step with no other elements than the ten best that its page has.

    Raises: ValueError if an element has no rank or the page cannot be read.
    """
    named = {*step.right, *step.wrong}
    if unknown := {name for name in named if not isinstance(ranks.get(name), Real)}:
        raise ValueError(f"step {step.id}: no rank of element {min(unknown)}; {OTHER}")
    best = [name for name in named if ranks[name] < BEST]
    here = candidates_on(read_page(step), best)
    right = tuple(name for name in step.right if name in here)
    wrong = tuple(name for name in step.wrong if name in here)
    return replace(step, right=right, wrong=wrong)


def read_page(step: Step) -> ElementTree.Element:
    """The page of a step. Raises: ValueError if it is no XML."""
    try:
        return ElementTree.fromstring(step.page)
    except ElementTree.ParseError as error:
        raise ValueError(f"step {step.id}: cleaned_html is no XML ({error}); {CURE}") from None


# ------------------------------------------------------------------------------------ the question


def question(step: Step, page: ElementTree.Element, group: list[str]) -> tuple[str, list[str]]:
    """What the agent reads about a few elements, and these in the order of the choices B, C, ..."""
    around = prune(page, group)
    elements = candidates_on(around, group)
    numbers = {name: number for number, name in enumerate(elements)}
    shown = [" ".join(spell(node, numbers).split()[:SHOWN]) for node in elements.values()]
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, shown, strict=False)]
    before = [" ".join(text.split()) for text in step.before] or ["None"]
    asked = QUESTION.format(
        page=spell(around, numbers),
        task=step.task.strip(),
        before="\n".join(before),
        choices="\n".join(lines),
    )
    return asked, list(elements)


# ----------------------------------------------------------------------------------------- scoring


def words_f1(said: str, wanted: str) -> float:
    """F1 of two sets of words; 1 if both are empty."""
    ours = set(said.split())
    theirs = set(wanted.split())
    if not ours and not theirs:
        return 1.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def graded(step: Step, chosen: str | None, said: str, asked: int) -> dict:
    """The score of a step and what explains it. said: the operation and its value."""
    element = chosen in step.right
    f1 = words_f1(said, step.operation) if step.right else 0.0
    if element:
        ended = "right" if f1 == 1 else "another operation"
    elif not step.right:
        ended = "no right element among the ten"
    else:
        ended = "another element" if chosen else "none chosen"
    known = {"questions": asked, "said": said, "wanted": step.operation}
    return {"score": float(ended == "right"), "ended": ended, "element": element, "f1": f1, **known}


# ----------------------------------------------------------------------------------------- episode


def episode(step: Step) -> Episode:
    """One step: yields each question as a dialogue of its own, is sent the reply, returns a score.

    Without a right element nothing is asked. The order of the elements is drawn by the step's id.
    """
    page = read_page(step)
    waiting = [*step.right, *step.wrong] if step.right else []
    Random(step.id).shuffle(waiting)
    chosen = None
    said = ""
    asked = 0
    while len(waiting) > 1:
        text, offered = question(step, page, waiting[:OFFERED])
        reply = yield [text]
        asked += 1
        waiting = waiting[OFFERED:]
        letter, *action = browsing_action(reply) or ("A",)
        place = LETTERS.find(letter)
        if 0 <= place < len(offered):
            chosen = offered[place]
            said = " ".join(action).strip()
            waiting.append(chosen)
    if not waiting:  # the last word was that none of them is right
        chosen = None
        said = ""
    return graded(step, chosen, said, asked)


# --------------------------------------------------------------------------------- command


def add_flags(add: Callable) -> None:
    add("--data", type=Path, default=OURS, help="folder of Mind2Web's files and ranks")
    add("--samples", type=WHOLE, default=100, help="steps to draw")
    add("--seed", type=SEED, default=0, help="of which steps are drawn")


def samples(args) -> list[Sample]:
    """Steps of the pages at --data."""
    steps = load(args.data, args.samples, args.seed)
    print(f"{len(steps)} steps of recorded pages, drawn with seed {args.seed}")
    return [
        Sample(step.id, text_hash(json.dumps(asdict(step))), partial(episode, step))
        for step in steps
    ]
