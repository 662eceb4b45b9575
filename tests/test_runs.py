"""The run folder: its records, whether its files belong together, and who may work in it."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from files import write_json, write_rows
from runs import (
    FLAGS,
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
    flags = {name: kind(1) for name, kind in FLAGS.items()} | {"prompt_sha256": text_hash("Rules.")}
    flags |= {"task": "os", "environment": "my shell", "max_turns": 3}
    write_json(tmp_path / "args.json", flags)
    (tmp_path / "prompt.txt").write_text("Rules.")
    run = load_run(tmp_path, "cpu")
    assert (run.task.name, run.task.environment, run.task.max_turns) == ("os", "my shell", 3)
    assert run.prompt.text == "Rules."
