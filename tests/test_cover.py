"""Coverage: rules that the samples hardly show get samples that prove to need them."""

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

import cover
from cover import ROUNDS, cover_rules
from files import write_json, write_rows
from prompt import END, TASKS, parse_prompt
from runs import (
    COVER,
    Inputs,
    Record,
    Step,
    append_record,
    covering_records,
    load_records,
    read_inputs,
)
from synth import Plan

PROMPT = parse_prompt("Rule one.\n\nRule two.\n\nRule three.")
PLAN = Plan(PROMPT, replace(TASKS["os"], demos=("demo",)), 9, 9, 9, seed=0)
SAMPLES = [Record(0, "a one", ["Act: finish"]), Record(1, "b one two", ["Act: finish"])]


class Speaker:
    """Agent, environment and generator. The generator lists `items` for each rule, round by round;
    what is asked of it is noted.
    """

    def __init__(self, items, ended=True):
        self.items = {rule: iter(rounds) for rule, rounds in items.items()}
        self.asked = []
        self.ended = ended

    def fits(self, messages, tokens):
        return True

    def speak(self, conversations, sampling, seeds=None):
        for number, messages in enumerate(conversations):
            yield number, self.reply(messages), self.ended

    def reply(self, messages):
        rule = re.search(r"One of its rules is:\n\nRule (\w+)\.", messages[-1]["content"])
        if rule:
            self.asked.append(rule[1])
            found = next(self.items.get(rule[1], iter(())), [])
            return "\n".join(f"{i}. {x}" for i, x in enumerate(found, 2))
        if "numbered list" in messages[-1]["content"]:
            raise AssertionError("nobody asks for other inputs")
        return END if messages[0]["content"].startswith("You play") else "Act: finish"


@pytest.fixture(autouse=True)
def needs_what_it_names(monkeypatch):
    """A record needs the rule whose number it names."""

    def named(voice, task, records, rule, limit):
        word = rule.text.removeprefix("Rule ").rstrip(".")
        return {(i, 0) for i, r in enumerate(records) if word in r.pseudo_input.split()}

    monkeypatch.setattr(cover, "witnesses", named)


def covered(speaker, tmp_path, k, held_out=(), plan=PLAN):
    cover_rules(speaker, speaker, plan, SAMPLES, list(held_out), k, tmp_path)
    return sorted(record.pseudo_input for record in covering_records(tmp_path))


def test_only_rules_that_are_short_are_asked_about(tmp_path):
    """Rule one has two witnesses already; of what is listed for the others the proven ones join."""
    speaker = Speaker({"two": [["x two", "y"]], "three": [["u three", "v three", "w"]]})
    assert covered(speaker, tmp_path, 2) == ["u three", "v three", "x two"]
    assert speaker.asked == ["two", "three"]


def test_what_is_known_already_is_no_new_sample(tmp_path):
    """Not what the samples have, nor what came up in an earlier round or for another rule."""
    speaker = Speaker(
        {"two": [["B one two", "x two"]], "three": [["X  two", "z three"], ["z three"]]}
    )
    assert covered(speaker, tmp_path, 2) == ["x two", "z three"]


def test_what_is_held_out_never_joins(tmp_path):
    """Nor a demonstration: what the report asks about must not have been trained on."""
    speaker = Speaker({"two": [["Kept  two", "x two", "y two"]], "three": [["demo", "z three"]]})
    held_out = [Record(2, "kept two", ["Act: finish"])]
    assert covered(speaker, tmp_path, 2, held_out) == ["x two", "y two", "z three"]


def test_rounds_are_bounded_and_what_stays_short_is_told(tmp_path, capsys):
    """A rule that the generator cannot bring up is asked about ROUNDS times, then told."""
    speaker = Speaker({"two": [["x two"]]})
    assert covered(speaker, tmp_path, 2) == ["x two"]
    assert speaker.asked.count("three") == ROUNDS and speaker.asked.count("two") == 1
    told = "".join(capsys.readouterr())
    assert "0 of 2 samples need the rule: Rule three." in told and "Rule two" not in told


def test_a_list_that_was_cut_ends_in_half_a_message():
    """Which does not join, though it would prove to need the rule."""
    items = {"two": [["x two", "y two and ha"]], "three": [["u three", "v three", "w thr"]]}
    found = cover.cover(Speaker({}), Speaker(items, ended=False), PLAN, SAMPLES, [], 2)
    assert found == ["x two", "u three", "v three"]


def test_the_numbers_of_kept_records_are_not_those_of_cover(tmp_path):
    """With --from the plan keeps records 0 and 1 of the run; cover's records 0 and 1 are made."""
    speaker = Speaker({"two": [["x two"]], "three": [["u three", "v three"]]})
    plan = replace(PLAN, kept=frozenset({0, 1}))
    assert covered(speaker, tmp_path, 2, plan=plan) == ["u three", "v three", "x two"]


def test_a_finished_search_is_not_done_again(tmp_path):
    """The inputs are there, so nobody is asked; the records that are missing are made."""
    speaker = Speaker({"two": [["x two"]], "three": [["u three", "v three"]]})
    first = covered(speaker, tmp_path, 2)
    (tmp_path / COVER / "data.jsonl").unlink()
    assert covered(Speaker({}), tmp_path, 2) == first
    assert sorted(read_inputs(tmp_path / COVER / "inputs.json").inputs) == first


def test_what_coverage_took_is_part_of_the_cost(tmp_path):
    """The search and the records that it adds count as synthesis; else break-even would flatter."""
    folder = tmp_path / COVER
    folder.mkdir()
    write_json(tmp_path / "inputs.json", asdict(Inputs(seconds=2.0, inputs=["a one"])))
    append_record(tmp_path / "data.jsonl", replace(SAMPLES[0], seconds=3.0))
    write_rows(tmp_path / "metrics.jsonl", [asdict(Step(1, 1.0, 1.0, 1.0, 1e-3, 9, 10.0))])
    before = load_records(SimpleNamespace(folder=tmp_path))[1]["synth"]
    write_json(folder / "inputs.json", asdict(Inputs(seconds=7.0, inputs=["x"])))
    append_record(folder / "data.jsonl", Record(0, "x", ["Act: finish"], seconds=11.0))
    assert (before, load_records(SimpleNamespace(folder=tmp_path))[1]["synth"]) == (5.0, 23.0)
