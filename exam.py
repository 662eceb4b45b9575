"""The exam: which rules of the prompt does the adapter obey, and which did it lose?

    a rule       a paragraph of p, an item of a list in it, or a worked example
    a witness    an agent turn of a record whose action changes once the rule is taken out of p: the
                 teacher, with all else of p, then acts otherwise. So the rule matters there, and
                 nobody had to judge or to label it
    obeyed       of the held-out witnesses those on which the adapter, without p, takes the action
                 of the teacher with all of p

A rule without a witness is untested: no input shows what it is for. One that few samples show may
be lost, however well the adapter recites its lines: to recite is not to obey. A turn that changes
whatever is taken out, FRAGILE rules of p or more, tells of none of them and does not count.

A second adapter may sit the exam too. The rows then say on how many witnesses only the new one is
right (gained), on how many only the old one (lost). If that one was trained on an earlier text of
p, one more row is about the edit: its witnesses are the turns in which the teacher acts otherwise
under the old text.

Left out: rules that only act together (without one the other still does its work, so neither has
witnesses); what a rule changes in the words of a turn but not in its action; whether the teacher
acts otherwise for the rule's sake, or since a weak model stumbles over any change of its prompt.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from files import markdown_table, read_text
from lora import adapter_of, adapter_off
from prompt import MARKER, Prompt, Task, conversation, parse_prompt, student_messages
from runs import Record
from sampler import Sampling, Voice, is_greedy, say
from stats import interval, wilson

Opening = Callable[[str], list[dict]]
ITEM = re.compile(r"[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S")  # how an item of a list begins
FRAGILE = 5  # rules; an action hangs on the few that ask for it and for its form
LOOKED_AT = 64  # samples; what they show tells of all, and the exam does not grow with the training
EDIT = "what the edit of the prompt changed"

# ----------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """A part of p, where it stands, and p without it."""

    text: str
    lines: range  # of the prompt's text, from 1
    without: Prompt


def rules_of(prompt: Prompt, task: Task) -> list[Rule]:
    """The rules of p in their order. What cannot be left out alone (the place of x) is none."""
    rules = []
    for start, end in rule_spans(prompt, task):
        text = prompt.text[start:end]
        rest = f"{prompt.text[:start].rstrip()}\n\n{prompt.text[end:].lstrip()}"
        if rest.strip():
            first = 1 + prompt.text.count("\n", 0, start)
            lines = range(first, first + 1 + text.rstrip().count("\n"))
            rules.append(Rule(text.strip(), lines, parse_prompt(rest)))
    return rules


def rule_spans(prompt: Prompt, task: Task) -> Iterator[tuple[int, int]]:
    """Where in the text the rules stand: (start, end) in letters.

    The first worked example begins in the turn of the instructions. What stands of it there goes
    with it, and the marker behind it, so that the instructions open the next example.
    """
    text = prompt.text
    if prompt.opening is None:
        yield from blocks(text, 0, len(text))
        return
    marks = list(MARKER.finditer(text))
    told = blocks(text, marks[0].end(), marks[1].start() if len(marks) > 1 else len(text))
    if not prompt.turns:
        yield from (span for span in told if "{user_input}" not in text[slice(*span)])
        return
    wish = first_wish([text[slice(*span)] for span in told], prompt)
    yield from told[:wish]
    begin = first = told[wish][0] if told else marks[0].end()
    for turn, (role, said) in enumerate(prompt.turns):
        ends = task.is_final(said) or not any(task.is_final(each) for _, each in prompt.turns)
        if role == "assistant" and (ends or turn == len(prompt.turns) - 1):
            after = marks[turn + 1]  # the user turn after this example
            yield begin, after.end() if begin == first else after.start()
            begin = after.start()


def first_wish(told: list[str], prompt: Prompt) -> int:
    """Which paragraph of the first user turn begins the first worked example.

    The last whose first line begins a later user turn, too, as where each shows a page; the last of
    all where none does.
    """
    heads = {said.split("\n")[0] for role, said in prompt.turns[1:] if role == "user"}
    alike = [i for i, paragraph in enumerate(told) if paragraph.split("\n")[0] in heads]
    return alike[-1] if alike else len(told) - 1


def blocks(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Paragraphs and items of lists between two places, as (start, end).

    A blank line parts paragraphs, but not inside a fence; one that ends in a colon goes with the
    paragraph that it announces, while the items of an announced list are rules of their own.
    """
    found: list[list[int]] = []
    fenced = False
    gap = True
    place = start
    for line in text[start:end].splitlines(True):
        blank = not line.strip() and not fenced
        item = ITEM.match(line) and not fenced
        announced = found and text[slice(*found[-1])].rstrip().endswith(":")
        if not blank and (item or (gap and not announced)):
            found.append([place, place])
        if not blank:
            found[-1][1] = place + len(line)
        if line.lstrip().startswith("```"):
            fenced = not fenced
        gap = blank
        place += len(line)
    return [(first, last) for first, last in found]


# ------------------------------------------------------------------------------------- witnesses


Turn = tuple[int, int]  # place of a record in a list, and number of an agent turn in it


def same_action(task: Task, ours: str, teachers: str) -> bool:
    """Does a reply take the teacher's action, or say the same where the teacher took none?"""
    action = task.act(teachers)
    return ours == teachers if action is None else task.act(ours) == action


def act_otherwise(
    voice: Voice, task: Task, records: list[Record], read: Opening, turns: set[Turn], limit: int
) -> set[Turn]:
    """Those of some agent turns in which the model, after the same turns before, acts otherwise.

    read: x -> what stands before the conversation.
    """
    order = sorted(turns)
    asked = [
        conversation(read(records[i].pseudo_input), records[i].turns[: 2 * n]) for i, n in order
    ]
    said = say(voice, asked, Sampling(limit))
    return {
        (i, n)
        for (i, n), text in zip(order, said, strict=True)
        if not same_action(task, text, records[i].turns[2 * n])
    }


def greedy_turns(voice: Voice, prompt: Prompt, records: list[Record]) -> list[list[bool]]:
    """For each agent turn of each record: is it what the model says there with p?"""
    whole = [conversation(prompt.teacher(r.pseudo_input), r.turns) for r in records]
    spoken = [
        list(range(len(messages) - len(record.turns), len(messages), 2))
        for messages, record in zip(whole, records, strict=True)
    ]
    return is_greedy(voice, whole, spoken)


def witnesses(voice: Voice, task: Task, records: list[Record], rule: Rule, limit: int) -> set[Turn]:
    """The agent turns in which the model acts otherwise once the rule is gone.

    By definition all of them are written anew. Most come out as they were, which one pass over a
    recorded conversation shows; so only the others are written.
    """
    same = greedy_turns(voice, rule.without, records)
    changed = {(i, n) for i, turns in enumerate(same) for n, still in enumerate(turns) if not still}
    return act_otherwise(voice, task, records, rule.without.teacher, changed, limit)


def steady(found: list[set[Turn]]) -> list[set[Turn]]:
    """The witnesses of each rule, without the fragile turns. found: of all rules of p."""
    rules = Counter(turn for some in found for turn in some)
    return [{turn for turn in some if rules[turn] < FRAGILE} for some in found]


# ----------------------------------------------------------------------------------------- exam


def examine(
    voice: Voice,
    prompt: Prompt,
    task: Task,
    held_out: list[Record],
    shown: list[Record],
    limit: int,
    before: Path | None = None,
) -> list[dict]:
    """A row a rule: its text and lines, its witnesses, and how many of them the adapter obeys.

    voice: its model has the adapter, which is switched off while it is the teacher. shown: records
    that were trained on; LOOKED_AT of them at most, evenly spaced, are looked at. limit: tokens of
    a turn. before: the run folder of another adapter, which is examined too.
    """
    rules = rules_of(prompt, task)
    every = max(1, math.ceil(len(shown) / LOOKED_AT))
    shown = shown[::every]
    records = held_out + shown
    with adapter_off(voice.model):
        found = steady([witnesses(voice, task, records, rule, limit) for rule in rules])
        if before and (edit := edit_of(prompt, before)):
            rules.append(edit)
            found.append(witnesses(voice, task, records, edit, limit))
    tested = {turn for some in found for turn in some if turn[0] < len(held_out)}
    wrong = act_otherwise(voice, task, held_out, student_messages, tested, limit)
    if before:
        with adapter_of(voice.model, before):
            earlier = act_otherwise(voice, task, held_out, student_messages, tested, limit)
    rows = []
    for rule, some in zip(rules, found, strict=True):
        own = some & tested
        row = {"rule": rule.text, "lines": [rule.lines[0], rule.lines[-1]] if rule.lines else []}
        row["shown_by"] = len({i for i, _ in some if i >= len(held_out)})
        row["looked_at"] = len(shown)
        row["obeyed"] = wilson(len(own - wrong), len(own))
        if before:
            row["before"] = wilson(len(own - earlier), len(own))
            row["gained"] = len(own & earlier - wrong)
            row["lost"] = len(own & wrong - earlier)
        rows.append(row)
    return rows


def edit_of(prompt: Prompt, before: Path) -> Rule | None:
    """The edit of p since an earlier run, as a rule: without it p is the text of that run."""
    path = before / "prompt.txt"
    old = parse_prompt(read_text(path, "prompt"), str(path))
    return Rule(EDIT, range(0), old) if old.text != prompt.text else None


def markdown(report: dict) -> str:
    """The exam as a table, a rule a row, in the order of the prompt."""
    recited = report["recall"]["lines"] if report["recall"] else []
    nll = {row["line"]: row["nll"] for row in recited}
    both = bool(report["exam"]) and "before" in report["exam"][0]
    heads = ["rule of the prompt", "shown by samples", "obeyed without the prompt"]
    heads += ["by the earlier adapter", "gained, lost"] * both + ["nats/token"]
    table = []
    for row in report["exam"]:
        first, last = row["lines"] or (1, 0)
        lines = [nll[line] for line in range(first, last + 1) if line in nll]
        table.append([short(row["rule"]), f"{row['shown_by']} of {row['looked_at']}"])
        table[-1] += [interval(row["obeyed"]) if row["obeyed"]["n"] else "untested"]
        if both:
            tested = interval(row["before"]), f"{row['gained']}, {row['lost']}"
            table[-1] += tested if row["before"]["n"] else ("untested", "")
        table[-1] += [f"{statistics.mean(lines):.3f}" if lines else ""]
    return f"""{markdown_table(heads, table)}

(a turn counts for a rule if the teacher acts otherwise in it once the rule is taken out of the \
prompt, but not if that is so for {FRAGILE} rules or more; the last column says how well the rule \
is recited, which is not to obey it)"""


def short(rule: str) -> str:
    """The beginning of a rule, as code in a table."""
    return f"`{' '.join(rule.replace('`', ' ').split())[:60]}`"
