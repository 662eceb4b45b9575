"""The run folder: its records, whether its files belong together, and who may work in it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint as checkpoints
import costs
import evaluate
import genpi
import runs
import synth
from files import kinds, write_json, write_rows
from lora import COMPARED, READ
from runs import (
    FLAGS,
    LATER,
    Inputs,
    Record,
    Step,
    append_record,
    hash_seed,
    load_records,
    load_run,
    read_records,
    split_records,
    text_hash,
)

# --------------------------------------------------------------------------------------- records


def test_records_survive_the_file(tmp_path):
    """What is appended is read back equal, in order of index, line ends inside texts included."""
    path = tmp_path / "data.jsonl"
    records = [Record(1, "é\nx", ["a", "b\n", "c"], "s", "r", seconds=0.5), Record(0, "y")]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records[::-1]


@pytest.mark.parametrize("end", ['{"index": 2, "pseu', '{"index": 2}\n', "\x00\x00\n"])
def test_a_corrupt_last_line_is_dropped(tmp_path, end):
    """A last line that a crash cut short is dropped, and the file is whole again."""
    path = tmp_path / "data.jsonl"
    append_record(path, Record(0, "x"))
    whole = path.read_bytes()
    path.write_bytes(whole + end.encode())
    assert [record.index for record in read_records(path)] == [0]
    assert path.read_bytes() == whole


def test_a_corrupt_middle_line_is_an_error_with_its_number(tmp_path):
    """Damage that no crash explains is not repaired silently."""
    path = tmp_path / "data.jsonl"
    for i in range(3):
        append_record(path, Record(i, "x"))
    lines = path.read_text().splitlines(True)
    path.write_text(lines[0] + "{broken\n" + lines[2])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("there", "samples", "held_out", "expected"),
    [(10, 6, 4, (6, 4)), (10, 3, 4, (3, 4)), (9, 6, 4, (6, 3)), (2, 6, 4, (1, 1))],
)
def test_split_takes_what_is_asked_and_the_last_are_held_out(there, samples, held_out, expected):
    """Never more than --samples for training; with too few records a third at most is held out."""
    records = [Record(i, f"x{i}") for i in range(there)]
    training, held = split_records(records, samples, held_out)
    assert (len(training), len(held)) == expected
    assert training == records[: len(training)]
    assert held == records[-len(held) :]


# -------------------------------------------------------------------------------- seeds and runs


def test_a_seed_depends_on_each_part():
    """Parts that spell the same together are not the same, and nothing else counts."""
    assert hash_seed(1, 11) != hash_seed(11, 1)
    assert hash_seed(5, "reason", 2) == hash_seed(5, "reason", 2) != hash_seed(5, "inputs", 2)


def test_a_run_costs_all_that_was_waited_for(tmp_path):
    """Synthesis takes the seconds of the inputs and of each record, training those of each step."""
    write_json(tmp_path / "inputs.json", asdict(Inputs(1, 0, 2.0, ["x", "x"])))
    for index, seconds in enumerate((3.0, 4.0)):
        append_record(tmp_path / "data.jsonl", Record(index, "x", ["a"], seconds=seconds))
    rows = [asdict(Step(step, 1.0, 1.0, 1.0, 1e-3, 9, 10.0)) for step in (1, 2)]
    write_rows(tmp_path / "metrics.jsonl", rows)
    _, seconds = load_records(SimpleNamespace(folder=tmp_path))
    assert seconds == {"synth": 9.0, "train": 20.0}


def test_a_run_keeps_its_own_environment_and_turn_limit(tmp_path):
    """What the flags said goes before what the task says."""
    flags = {name: kind(1) for name, kind in FLAGS.items()} | LATER
    flags |= {"prompt_sha256": text_hash("Rules.")}
    flags |= {"task": "os", "environment": "my shell", "max_turns": 3}
    write_json(tmp_path / "args.json", flags)
    (tmp_path / "prompt.txt").write_text("Rules.")
    run = load_run(tmp_path, "cpu")
    assert (run.task.name, run.task.environment, run.task.max_turns) == ("os", "my shell", 3)
    assert run.prompt.text == "Rules."


# ------------------------------------------------------------------------------- a run on its disk


SIZES = """--samples 2 --held-out 1 --epochs 1 --batch 2 --max-new-tokens 4 --max-reason-tokens 4
--rank 2 --device cpu"""
INPUTS = ["Count to 3.", "Name a tree.", "Spell cat."]


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A finished run without its report: its folder, and the flags that go on in it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "p.txt").write_text("Answer in one word.\n")
    flags = [*SIZES.split(), "--model", str(checkpoint), "--prompt", str(folder / "p.txt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genpi, "report", lambda *_, before: None)
        patch.setattr(synth, "more_inputs", lambda *_: INPUTS)
        assert genpi.main([*flags, "--out", str(folder / "run")]) == 0
    return folder / "run", flags


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished[0], tmp_path / "again")


@pytest.fixture
def open_as(finished, monkeypatch, capsys):
    """Open a run folder in one of four ways -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(costs, "REPEATS", 1)
    monkeypatch.setattr(costs, "DECODED", 2)
    monkeypatch.setattr(genpi, "report", lambda *_, before: None)
    monkeypatch.setattr(synth, "more_inputs", lambda *_: INPUTS)
    monkeypatch.setattr("builtins.input", lambda ask: "/quit")
    programs = {
        "report": lambda folder: evaluate.main(["--run", folder]),
        "chat": lambda folder, *flags: genpi.main(["--chat", folder, *flags]),
        "show": lambda folder, *flags: genpi.main(["--show", folder, *flags]),
        "go on": lambda folder, *flags: genpi.main([*finished[1], "--out", folder, *flags]),
    }

    def call(way, folder, *flags):
        code = programs[way](str(folder), *map(str, flags))
        return code, *capsys.readouterr()

    return call


WAYS = ("report", "chat", "show", "go on")


def complaint(ended, *words) -> str:
    """The only line on stderr beside progress bars; it is an error, with these words."""
    code, _, stderr = ended
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and "%|" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, stderr)
    assert [word for word in words if str(word) not in lines[0]] == [], lines[0]
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("name", ["prompt.txt", "inputs.json", "data.jsonl"])
def test_a_folder_that_is_somebody_elses(open_as, tmp_path, name):
    """Files of these names in a folder that is no run are left as they are."""
    (tmp_path / name).write_text("mine")
    complaint(open_as("go on", tmp_path), tmp_path, name, "no args.json", "--out", "--records")
    assert contents(tmp_path) == {name: b"mine"}


def test_a_run_on_the_records_of_another(open_as, again, tmp_path, monkeypatch):
    """--records begins with the other's records; what is there is not made again."""
    monkeypatch.setattr(synth, "synthesise_wave", lambda *_: pytest.fail("made again"))
    assert open_as("go on", tmp_path / "b", "--lam", 1, "--records", again)[0] == 0
    for name in ("inputs.json", "data.jsonl"):
        assert (tmp_path / "b" / name).read_bytes() == (again / name).read_bytes()
    assert open_as("go on", tmp_path / "b", "--lam", 1)[0] == 0  # --records is no part of the run


@pytest.mark.parametrize("flag", [("--max-turns", 2), ("--environment", "a bot"), ("--task", "os")])
def test_records_of_something_else_are_not_taken(open_as, again, tmp_path, flag):
    """What the records depend on is named with both its values, and no folder is made."""
    told = complaint(open_as("go on", tmp_path / "b", "--records", again, *flag), again)
    assert flag[0].removeprefix("--").replace("-", "_") in told
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_that_was_changed(open_as, again, way):
    """The prompt in the folder is the one that the run was made with, or it is named."""
    (again / "prompt.txt").write_text("Answer in two words.\n")
    complaint(open_as(way, again), again / "prompt.txt", "not the prompt", "delete it")


@pytest.mark.parametrize("way", ["report", "show", "go on"])
def test_records_of_other_inputs(open_as, again, way):
    """A record belongs to the pseudo input with its index; both files are named."""
    text = (again / "inputs.json").read_text()
    (again / "inputs.json").write_text(text.replace(INPUTS[1], "Name a fish."))
    complaint(open_as(way, again), "record 1", again / "data.jsonl", again / "inputs.json")


@pytest.mark.parametrize("way", ["report", "chat", "show"])
def test_who_reads_a_run_changes_nothing(open_as, again, way):
    """Half a last line, and a link where a file would be written beside, stay as they are."""
    target = again.parent / "yours.txt"
    target.write_text("yours")
    with (again / "data.jsonl").open("a") as file:
        file.write('{"index": 3, "pseu')
    (again / "data.jsonl.new").symlink_to(target)
    before = contents(again)
    assert open_as(way, again)[0] == 0
    after = contents(again)
    assert {name: after[name] for name in before} == before and target.read_text() == "yours"


def test_a_report_without_its_metrics(open_as, again):
    """What training took is not known without metrics.jsonl: it is named with a cure that works."""
    (again / "metrics.jsonl").unlink()
    told = complaint(open_as("report", again), again / "metrics.jsonl", "trains anew")
    assert "adapter_config.json and checkpoint/" in told
    (again / "adapter_config.json").unlink()
    shutil.rmtree(again / "checkpoint")
    assert open_as("go on", again)[0] == 0 and open_as("report", again)[0] == 0


def test_a_text_cannot_steer_the_terminal(open_as, again):
    """Escape codes, also those of one byte, of a prompt are shown by their names in the report."""
    text = "Answer \x1b[2J\x9b2J in one word."
    (again / "prompt.txt").write_text(text)
    args = json.loads((again / "args.json").read_text()) | {"prompt_sha256": text_hash(text)}
    (again / "args.json").write_text(json.dumps(args))
    code, page, _ = open_as("report", again)
    written = page + (again / "report.md").read_text() + (again / "report.svg").read_text()
    assert code == 0 and "Answer \\x1b[2J\\x9b2J" in page
    assert not set(written) & {"\x1b", "\x9b"}


@pytest.mark.parametrize(
    "command", ["genpi.py --help", "evaluate.py --help", "evaluate.py --merge"]
)
def test_a_reader_that_has_seen_enough(again, command):
    """`| head` ends a command without a word."""
    program, flag = command.split()
    flags = [flag, again / "merged", "--run", again] if flag == "--merge" else [flag]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, program, *flags]
    plain = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, cwd=runs.HERE, env=plain, **pipes) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


# ----------------------------------------------------------------------------------------- the lock


HOLD = """
import runs, sys, pathlib
with runs.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_in_one_folder(open_as, again):
    """The second is told who holds the folder; who only reads it is not kept out, and with the
    first process its hold is gone, even if it was killed.
    """
    command = [sys.executable, "-c", HOLD, again]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(genpi.__file__).parent, **pipes) as first:
        assert first.stdout.readline() == b"held\n"
        complaint(open_as("go on", again), again, f"process {first.pid} on ", "--out")
        assert open_as("show", again)[0] == 0
        first.kill()
    assert open_as("go on", again)[0] == 0


def test_a_lock_that_is_a_link(open_as, again, tmp_path):
    """The lock is not written through a link."""
    (tmp_path / "target").write_text("not yours")
    (again / "lock").unlink()
    (again / "lock").symlink_to(tmp_path / "target")
    complaint(open_as("go on", again), again / "lock", "is a link")
    assert (tmp_path / "target").read_text() == "not yours"


# ---------------------------------------------------------------------------------- the base model


@pytest.fixture
def moved(checkpoint, again, tmp_path):
    """A finished run whose base was in another place: (run folder, where the base is now)."""
    args = json.loads((again / "args.json").read_text())
    args |= {"model": "models/mine", "model_path": str(tmp_path / "gone")}
    (again / "args.json").write_text(json.dumps(args))
    return again, checkpoint


@pytest.mark.parametrize("way", ["report", "chat", "show"])
def test_a_base_that_has_moved(open_as, moved, monkeypatch, way):
    """A model that was a folder is not asked of the Hub, whoever owns that name there."""
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    told = complaint(open_as(way, moved[0]), "models/mine", "is no more at", "--model")
    assert "gone" in told


@pytest.mark.parametrize("way", ["chat", "show"])
def test_a_base_is_given_anew(open_as, moved, checkpoint, tmp_path, way):
    """--model says where the base is now; another one is refused by its hash."""
    assert open_as(way, moved[0], "--model", checkpoint)[0] == 0
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    complaint(open_as(way, moved[0], "--model", other), other, "has changed")


def test_a_report_on_a_base_given_anew(open_as, moved, checkpoint, capsys):
    """evaluate.py takes --model, too."""
    assert evaluate.main(["--run", str(moved[0]), "--model", str(checkpoint)]) == 0


def test_a_base_of_the_hub_is_taken_from_the_cache(open_as, moved, monkeypatch):
    """An id as --model of a run folder is looked up on this machine alone."""
    asked = []

    def cached(name, local_files_only, **_):
        asked.append((name, local_files_only))
        raise FileNotFoundError(name)

    monkeypatch.setattr(checkpoints, "snapshot_download", cached)
    complaint(open_as("chat", moved[0], "--model", "owner/name"), "owner/name", "no download")
    assert asked == [("owner/name", True)]


def test_the_embedded_model_is_known_by_its_name(tmp_path, monkeypatch):
    """Its place is that of the clone, wherever a run was made."""
    args = genpi.parse_flags([])
    folder = genpi.base_folder(args)
    assert (args.model, args.model_path, folder) == ("tiny", "tiny", runs.HERE / "tiny")
    given = genpi.parse_flags(["--model", str(folder)])
    assert genpi.base_folder(given) == folder and given.model_path == "tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # somebody's own
    given = genpi.parse_flags(["--model", "tiny"])
    assert genpi.base_folder(given) == tmp_path / "tiny" == Path(given.model_path)


# ------------------------------------------------------------------------------ damaged run folders


DEEP = "[" * 100_000
WHOLE = ["", "null", "5", "[]", "{}", DEEP, "\udcff", '{"a":']  # one is no UTF-8
VALUES = ['"abc"', '"\\ud800"', "null", "true", "[]", "[5]", '{"a": 1}', DEEP]
VALUES += ["1e400", "NaN", "1" + 30 * "0", str(2**52), "-1", "0"]
FIELDS = {
    "args.json": FLAGS,
    "inputs.json": kinds(Inputs),
    "data.jsonl": kinds(Record),
    "metrics.jsonl": kinds(Step),
    "adapter_config.json": COMPARED | READ,
}


def damaged(name: str, text: str) -> list[str]:
    """The text of a file, damaged: as a whole, without each field, with each field of a kind that
    it cannot be. Of JSON lines the first is damaged.
    """
    first, *rest = text.split("\n") if name.endswith("jsonl") else [text]
    row = json.loads(first)
    found = list(WHOLE)
    for field in FIELDS[name]:
        found.append(json.dumps({key: row[key] for key in row if key != field}))
        spelt = {key: json.dumps(row[key]) for key in row}
        for value in VALUES:
            pairs = (f'"{key}": {value if key == field else spelt[key]}' for key in spelt)
            found.append("{" + ", ".join(pairs) + "}")
    return ["\n".join([line, *rest]) for line in found]


@pytest.mark.parametrize("name", FIELDS)
def test_a_damaged_folder_is_one_line(open_as, again, name):
    """However a file of a run folder is damaged: it works, or one line says what is wrong."""
    whole = contents(again)
    for number, text in enumerate(damaged(name, whole[name].decode())):
        for way in WAYS if number < len(WHOLE) else WAYS[number % 4 :: 4]:
            (again / name).write_bytes(text.encode(errors="surrogateescape"))
            ended = open_as(way, again)
            assert "Traceback" not in ended[2]
            if ended[0] != 0:
                complaint(ended)
            for path, content in whole.items():
                (again / path).write_bytes(content)


@pytest.mark.parametrize("way", ["report", "chat"])
@pytest.mark.parametrize(
    "spoil",
    [lambda t: t * torch.nan, torch.Tensor.bool, torch.Tensor.cfloat, torch.Tensor.int],
    ids=["nan", "bool", "complex", "int"],
)
def test_an_adapter_of_no_finite_numbers(open_as, again, way, spoil):
    """A spoilt tensor of an adapter is named, and does not become part of a model."""
    path = again / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    save_file(tensors | {name: spoil(tensors[name])}, path)
    complaint(open_as(way, again), name, "no finite numbers")
