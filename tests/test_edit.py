"""After an edit of the prompt: what still holds is kept, what does not is made anew."""

import json
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import genpi
import synth
from edit import begin_with, unchanged
from model import load_model
from prompt import conversation, parse_prompt
from runs import read_inputs, read_records
from sampler import Voice
from synth import Plan, role_play

ROOT = Path(__file__).resolve().parent.parent
FLAGS = """--samples 3 --held-out 1 --epochs 2 --batch 2 --max-new-tokens 8 --max-reason-tokens 8
--rank 2 --save-every 1"""
INPUTS = ["Count to 3.", "Name a tree.", "Spell cat.", "Say no."]


@pytest.fixture(scope="module")
def voice():
    return Voice(*load_model(ROOT / "tiny", bits=4))


@pytest.fixture(scope="module")
def records():
    return read_records(ROOT / "tests" / "fixtures" / "records.jsonl", mend=False)[:6]


def test_records_hold_while_the_teacher_says_the_same(voice, records):
    """Under its own prompt every record does; another label in the prompt changes all of them."""
    text = (ROOT / "os.txt").read_text(encoding="utf-8")
    assert unchanged(voice, parse_prompt(text), records) == records
    assert unchanged(voice, parse_prompt(text.replace("Act:", "Do:")), records) == []
    marked = [replace(records[0], cut_turn=True), replace(records[1], no_reason=True), records[2]]
    assert unchanged(voice, parse_prompt(text), marked) == [records[2]]


def test_a_record_that_no_longer_fits_does_not_hold(voice, records):
    """Under a longer prompt a conversation may run over the end of the context."""
    prompt = parse_prompt((ROOT / "os.txt").read_text(encoding="utf-8"))
    whole = [conversation(prompt.teacher(r.pseudo_input), r.turns) for r in records]
    sizes = [len(voice.chat.encode(messages)[0]) for messages in whole]
    chat = copy(voice.chat)
    chat.context = sorted(sizes)[2]
    held = unchanged(replace(voice, chat=chat), prompt, records)
    assert held == [r for r, size in zip(records, sizes, strict=True) if size <= chat.context]
    assert 0 < len(held) < len(records)


def test_kept_records_are_told_once(voice, records, tmp_path):
    """The second time the list of them is read, since more records may have been made by then. What
    the earlier run took to make them is not told again as a cost of this one.
    """
    earlier, folder = tmp_path / "earlier", tmp_path / "folder"
    earlier.mkdir()
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "fixtures" / "records.jsonl", earlier / "data.jsonl")
    inputs = [r.pseudo_input for r in read_records(earlier / "data.jsonl")]
    state = {"rounds": 1, "fruitless": 0, "seconds": 600.0, "inputs": inputs}
    (earlier / "inputs.json").write_text(json.dumps(state))
    prompt = parse_prompt((ROOT / "os.txt").read_text(encoding="utf-8"))
    kept = begin_with(earlier, folder, voice, prompt)
    held = read_records(folder / "data.jsonl")
    assert kept == {r.index for r in held} and kept
    assert sum(r.seconds for r in held) == 0 < sum(r.seconds for r in records)
    assert 0 < read_inputs(folder / "inputs.json").seconds < 600
    (folder / "data.jsonl").write_text("")
    assert begin_with(earlier, folder, None, None) == kept


@pytest.fixture
def run(checkpoint, tmp_path, capsys, monkeypatch):
    """Run genpi.py without its report on a prompt, into a folder -> (exit code, stderr)."""
    monkeypatch.setattr(genpi, "report", lambda folder, loaded, before: None)
    monkeypatch.setattr(synth, "more_inputs", lambda *_: list(INPUTS))

    def call(text, name, *flags):
        (tmp_path / "prompt.txt").write_text(text)
        paths = [
            "--model",
            checkpoint,
            "--prompt",
            tmp_path / "prompt.txt",
            "--out",
            tmp_path / name,
        ]
        return genpi.main([*FLAGS.split(), *map(str, (*paths, *flags))]), capsys.readouterr().err

    return call


def test_an_edited_prompt_goes_on_from_an_earlier_run(run, tmp_path):
    """Its inputs and what holds of its records are there, the rest is made of the new prompt, and
    a rate of almost nothing leaves the earlier adapter as it was.
    """
    assert run("Answer in one word.", "a")[0] == 0
    still = ["--from", tmp_path / "a", "--lr", "1e-12"]
    assert run("Answer in two words.", "b", *still)[0] == 0
    old, new = (read_records(tmp_path / name / "data.jsonl") for name in "ab")
    kept = json.loads((tmp_path / "b" / "kept.json").read_text())["kept"]
    assert [r.pseudo_input for r in new] == [r.pseudo_input for r in old]
    assert [new[i] for i in kept] == [replace(old[i], seconds=0.0) for i in kept]
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert all((weights[0][key] - weights[1][key]).abs().max() < 1e-9 for key in weights[0])
    assert any(weight.abs().max() > 1e-6 for key, weight in weights[1].items() if "lora_B" in key)


def test_new_records_are_those_of_the_new_prompt(run, tmp_path, checkpoint):
    """What was not kept is what the teacher says with the new p."""
    plain = "--dtype", "float32"
    assert run("Answer in one word.", "a", *plain)[0] == 0
    assert run("Bark.", "b", "--from", tmp_path / "a", *plain)[0] == 0
    kept = json.loads((tmp_path / "b" / "kept.json").read_text())["kept"]
    made = [r for r in read_records(tmp_path / "b" / "data.jsonl") if r.index not in kept]
    assert made
    again = [replace(r, turns=[]) for r in made]
    task = replace(genpi.TASKS["any"], max_turns=1)
    voice = Voice(*load_model(checkpoint, bits=4))
    role_play(voice, Plan(parse_prompt("Bark."), task, 4, 8, 8, 0), again)
    assert [r.turns for r in again] == [r.turns for r in made]


def test_an_interrupted_edit_goes_on(run, tmp_path, monkeypatch):
    """Stopped in the training and begun again, the adapter is the one of an undisturbed run."""
    assert run("Answer in one word.", "a")[0] == 0
    assert run("Bark.", "b", "--from", tmp_path / "a")[0] == 0
    step = genpi.train.__globals__["train_step"]
    left = iter([step, step])

    def stop(*args):
        taken = next(left, None)
        if taken is None:
            raise KeyboardInterrupt
        return taken(*args)

    monkeypatch.setitem(genpi.train.__globals__, "train_step", stop)
    assert run("Bark.", "c", "--from", tmp_path / "a")[0] == 130
    monkeypatch.setitem(genpi.train.__globals__, "train_step", step)
    assert run("Bark.", "c", "--from", tmp_path / "a")[0] == 0
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "bc"]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


def test_what_goes_on_from_a_run_is_shown(run, tmp_path, monkeypatch):
    """If it has begun, its own records are; else two are made, and none of the earlier run's."""
    shown = []

    def show(folder, *_):
        shown.append((folder, len(read_records(folder / "data.jsonl", mend=False))))

    monkeypatch.setattr(genpi, "show", show)
    assert run("Answer in one word.", "a")[0] == 0
    still = ["--from", tmp_path / "a"]
    assert run("Bark.", "b", *still)[0] == run("Bark.", "b", *still, "--show")[0] == 0
    monkeypatch.setattr(synth, "more_inputs", lambda *_: INPUTS[:2])
    assert run("Bark.", "c", *still, "--show")[0] == 0
    assert shown[0] == (tmp_path / "b", 4)
    assert shown[1][0].name == "c" and shown[1] != (tmp_path / "c", 2) and shown[1][1] == 2


def test_the_kind_of_prompt_is_that_of_the_earlier_run(tmp_path):
    """An edited copy may have any name; one that names a task, or a flag, has its way."""
    (tmp_path / "args.json").write_text('{"task": "os"}')
    flags = ["--from", str(tmp_path), "--prompt"]
    assert genpi.parse_flags([*flags, "edited.txt"]).task == "os"
    assert genpi.parse_flags([*flags, "search.txt"]).task == "search"
    assert genpi.parse_flags([*flags, "edited.txt", "--task", "any"]).task == "any"
    assert genpi.parse_flags(["--prompt", "edited.txt"]).task == "any"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--from", "none"], ["args.json", "--from"]),
        (["--rank", "4"], ["rank 2 (now 4)", "--from"]),
        (["--samples", "1", "--held-out", "2"], ["--held-out 2", "3 samples", "more --samples"]),
        (["--records", "none"], ["--records"]),
    ],
)
def test_a_run_that_nothing_can_go_on_from(run, tmp_path, flags, words):
    """One line that says what does not fit."""
    assert run("Answer in one word.", "a")[0] == 0
    code, told = run("Bark.", "b", "--from", tmp_path / "a", *flags)
    assert code == 2 and told.count("error: ") == 1 and all(word in told for word in words)
