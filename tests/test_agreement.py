"""Does a model act as the teacher: at first, turn by turn, in the closed loop. By hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lora
from agreement import (
    agreement_by_turn,
    agrees,
    asked_turns,
    closed_loop,
    closed_loop_agreement,
    first_replies,
    held_out_records,
)
from files import kinds
from prompt import TASKS, parse_prompt, student_messages
from runs import Record, Run
from sampler import Sampling

PROMPT = parse_prompt("Say Act: first.\n\nThen act,\n\nand stop.")


class Actor:
    """A voice whose words are given by a function of (adapter on?, the messages it reads)."""

    def __init__(self, words):
        self.words = words
        self.model = torch.nn.Sequential(lora.LoRALinear(torch.nn.Linear(2, 2), 1, 1, 0))
        self.asked = []
        self.samplings = set()

    def fits(self, messages, new_tokens):
        return True

    def speak(self, conversations, sampling, seeds=None):
        self.samplings.add(sampling)
        for number, messages in enumerate(conversations):
            self.asked.append((self.model[0].enabled, messages))
            yield number, self.words(*self.asked[-1]), True


def test_first_replies_are_greedy_and_without_the_prompt():
    """Each input is asked as the student is, once, at temperature 0."""
    actor = Actor(lambda on, said: said[-1]["content"].upper())
    assert first_replies(actor, [Record(0, "a"), Record(1, "b")], 64) == ["A", "B"]
    assert actor.asked == [(True, student_messages("a")), (True, student_messages("b"))]
    assert actor.samplings == {Sampling(64)}


def test_first_replies_are_held_against_the_teacher():
    """What the teacher does agrees, what the student says does not."""
    records = [Record(0, "x", ["Act: answer(7)"], "Use ls.")] * 2
    assert agrees(TASKS["os"], ["Act: answer(7)", "Use ls."], records) == [True, False]


def counted(row):
    return row["k"], row["n"]


def test_three_turns_of_a_conversation_are_asked_about():
    """Of five agent turns the first, third and last; of two both ends; of one that one."""
    numbers = [list(asked_turns(Record(0, "x", ["t"] * n)).values()) for n in (9, 5, 3, 1)]
    assert numbers == [[0, 2, 4], [0, 1, 2], [0, 1], [0]]


def test_a_later_turn_is_asked_after_the_recorded_ones_without_the_prompt():
    """An adapter that always runs a command is right at first and wrong at the end; its base, that
    answers with what the recorded environment said, is right at the end.
    """
    actor = Actor(lambda on, said: "Act: bash\n```bash\nls\n```" if on else "Act: answer(7)")
    turns = ["Act: bash\n```bash\nls\n```", "The output is 7", "Act: answer(7)"]
    record = Record(0, "Count the files.", turns)
    found = agreement_by_turn(actor, TASKS["os"], [record, record], 64)
    assert [counted(found["first"][who]) for who in ("base", "teacher", "adapter")] == [
        (0, 2), (2, 2), (2, 2)
    ]  # fmt: skip
    assert [counted(found["last"][who]) for who in ("base", "teacher", "adapter")] == [
        (2, 2), (2, 2), (0, 2)
    ]  # fmt: skip
    assert counted(found["middle"]["adapter"]) == (0, 0)
    last = actor.asked[-1][1]
    assert [m["content"] for m in last[1:]] == ["Count the files.", *turns[:2]]
    assert all("Act: first" not in m["content"] for _, messages in actor.asked for m in messages)


def test_in_the_closed_loop_the_base_plays_the_environment():
    """The agent reads x without p with the adapter on; the environment answers with it off."""

    def words(on, messages):
        if messages[0]["content"].startswith("You play"):
            return "off: 8" if not on else "on: 9"
        heard = [m["content"] for m in messages[2:] if m["role"] == "user"]
        return f"Act: answer({heard[-1]})" if heard else "Act: bash\n```bash\nls\n```"

    flags = dict.fromkeys(kinds(Run), 64) | {"prompt": PROMPT, "task": TASKS["os"]}
    run = Run(**flags)
    actor = Actor(words)
    (played,) = closed_loop(actor, run, [Record(3, "Count the files.")])
    assert played.turns[1:3] == ["off: 8", "Act: answer(off: 8)"]
    assert all(on or m[0]["content"].startswith("You play") for on, m in actor.asked)
    assert actor.asked[0] == (True, student_messages("Count the files."))


def test_conversations_agree_if_every_action_does():
    """One of two conversations is the same; of 2 + 3 places 2 + 1 are; both give an answer."""
    ours = [Record(0, "x", ["Act: bash\n```bash\nls\n```", "7", "Act: answer(7)"]) for _ in "ab"]
    theirs = [ours[0], Record(1, "x", [*ours[1].turns[:2], "Act: finish", "more?", "Act: finish"])]
    found = closed_loop_agreement(TASKS["os"], ours, theirs)
    assert counted(found["conversations"]) == (1, 2)
    assert found["actions"] == {"k": 3, "n": 5}
    assert counted(found["final_action"]["adapter"]) == (2, 2)


def test_only_held_out_records_that_fit_are_measured():
    """The last records are held out; one that overfills the context is not measured."""
    run = SimpleNamespace(folder="runs/x", samples=2, held_out=2)
    records = [Record(i, f"x{i}", ["a"], overlong=i == 3) for i in range(4)]
    assert held_out_records(run, records) == [records[2]]
    with pytest.raises(ValueError, match="no held-out conversation fits"):
        held_out_records(run, [replace(record, overlong=True) for record in records])
