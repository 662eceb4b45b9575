"""Few samples that show a rule: the cells, which go on where they were killed, and their report."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_pool import some_pool

import evaluate
import experiments.few_samples as few_samples
import experiments.pool as pool
import genpi
import synth
from experiments.few_samples_cells import ARMS, Cell, read_cells
from experiments.few_samples_report import (
    draw,
    paired,
    reading,
    share,
    table,
    trainings,
    verdict,
)
from experiments.pool import write_pool
from stats import wilson

# ------------------------------------------------------------------------------------- the report


def cell_row(arm, seed, rule, shown, obeyed, samples=16):
    places = list(range(len(obeyed)))
    return {"samples": samples, "seed": seed, "arm": arm, "rule": rule, "shown": shown,
            "inputs": places, "reached": [1] * len(obeyed), "obeyed": obeyed}  # fmt: skip


def test_arms_are_paired_by_seed_size_and_rule():
    """Of two sizes that both arms have the inputs add up; a row without a twin is left out."""
    ours = [cell_row("genpi", 0, "a", 1, [1, 1], n) for n in (16, 64)]
    ours.append(cell_row("genpi", 1, "a", 1, [1, 1]))
    theirs = [cell_row("sft", 0, "a", 1, [0, 1], n) for n in (16, 64)]
    assert paired(ours, theirs) == {(0, "a"): (4, 2, 4)}


def report_rows():
    rows = []
    for seed in range(6):
        for rule in "ab":
            rows.append(cell_row("genpi", seed, rule, 1, [1, 1, 1, 0]))
            rows.append(cell_row("sft", seed, rule, 1, [1, 0, 0, 0]))
            rows.append(cell_row("genpi", seed, rule, 0, [0, 0]))
            rows.append(cell_row("sft", seed, rule, 0, [0, 0]))
        rows += [cell_row(arm, seed, "", 0, [1]) for arm in ("genpi", "sft")]
    return rows


def test_the_reading_begins_with_the_question():
    """GenPI is right on 36 of 48 where SFT is on 12, in each of six seeds: p = 2 / 2^6. Where no
    sample shows a rule no seed differs, and the page says that nothing can be told.
    """
    said = reading(report_rows()).splitlines()
    assert "rules that 1 or 2 samples show: GenPI acts as the teacher on 36 of 48" in said[0]
    assert said[0].endswith("+50.0 points (95 %: +50.0 to +50.0), p = 0.031: told apart")
    assert said[1] == said[0].replace("**the question**", "of 16 samples")
    assert "no sample shows: GenPI acts as the teacher on 0 of 24, SFT alone on 0" in said[2]
    assert said[2].endswith("p = 1.000: cannot be told by the 0 seeds that differ")
    assert "1 sample shows: GenPI acts as the teacher on 36 of 48, SFT alone on 12" in said[3]
    assert "need no rule: GenPI acts as the teacher on 6 of 6, SFT alone on 6" in said[4]
    assert "6 seeds" in said[-1]


def test_what_tells_more_is_asked_of_the_arms_that_are_there():
    """PG of p against PG of another prompt, on the rules that few samples show."""
    rows = [cell_row("prompt", seed, "a", 2, [1, 1]) for seed in range(6)]
    rows += [cell_row("unrelated", seed, "a", 2, [1, 0]) for seed in range(6)]
    first = reading(rows).splitlines()[0]
    assert "the words of p" in first and "PG, unrelated prompt on 6" in first and "+50.0" in first


def test_told_apart_is_what_both_tell_apart():
    """p counts seeds, the interval rules too: an effect on one rule of many is no effect of all."""
    found = {"p": 0.01, "low": -0.1, "high": 0.3, "differ": 8}
    assert verdict(found) == "not told apart" and verdict(found | {"low": 0.1}) == "told apart"
    assert verdict(found | {"low": 0.1, "p": 0.06}) == "not told apart"
    assert verdict(found | {"differ": 5}) == "cannot be told by the 5 seeds that differ"


def test_a_share_is_uncertain_by_seeds_and_rules():
    """Two seeds of two rules: 32 inputs, but not 32 trials. Of none right the interval is that of
    four.
    """
    rows = [cell_row("sft", s, r, 1, [int(r == "a")] * 8) for s in (0, 1) for r in "ab"]
    found = share(rows)
    assert (found["k"], found["n"], found["low"], found["high"]) == (16, 32, 0, 1)
    none = share([row for row in rows if row["rule"] == "b"])
    assert (none["k"], none["n"]) == (0, 16) and none["high"] == wilson(0, 2)["high"]


def test_tables_and_picture_have_every_level():
    """Three levels of two arms; a dot each but for the inputs that need no rule. Of the inputs that
    were right so far more are obeyed.
    """
    rows = report_rows()
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 3 * 2 and all(line.count("|") == 7 for line in lines)
    assert draw(rows, "os").count("<circle") == 4
    rows[0]["reached"] = [1, 1, 1, 0]
    assert "| 36 of 48 | 36 of 47 |" in table(rows)
    took = trainings([row | {"steps": 6, "tokens": 70, "sft": 0.5, "pg": 0.0} for row in rows])
    assert took.splitlines()[2:] == [
        "| 16 | GenPI | 6 | 70 | 0.5000 |  |", "| 16 | SFT alone | 6 | 70 | 0.5000 |  |"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ the command

FLAGS = """--samples 2 --held-out 1 --epochs 1 --batch 2 --max-new-tokens 8 --max-reason-tokens 8
--rank 2"""
PROMPT = "Answer.\n\nBark.\n\nCount."


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """A run of a random model, and a pool of records that show "Bark." or "Count."."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "p.txt").write_text(PROMPT)
    flags = ["--model", checkpoint, "--prompt", folder / "p.txt", "--out", folder / "run"]
    flags += ["--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genpi, "report", lambda *args, **named: None)
        patch.setattr(synth, "more_inputs", lambda *_: ["One.", "Two.", "Three."])
        assert genpi.main([*FLAGS.split(), *map(str, flags)]) == 0
    write_pool(folder / "pool.jsonl", some_pool(2, 6, 1, ("Bark.", "Count.")))
    return folder


def call(run, out, *flags):
    paths = ["--run", run / "run", "--pool", run / "pool.jsonl", "--out", out]
    few = "--samples 4 --shows 0 2 --seeds 2 --steps 1 --unrelated".split()
    return evaluate.main([*map(str, ["few-samples", *paths, *few, run / "p.txt", *flags])])


def test_the_command_writes_all_arms_and_goes_on(run, tmp_path, monkeypatch, capsys):
    """Killed in the fourth cell it keeps three; the second time it makes the others and no more,
    and ends with what an undisturbed command has.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(run, whole) == 0
    rows = read_rows(whole)
    assert len(rows) == 2 * len(ARMS) * 3
    assert (whole / "report.svg").exists() and "GenPI" in (whole / "report.md").read_text()
    assert {row["shown"] for row in rows if row["rule"]} == {0, 2}
    made = few_samples.rows_of
    left = iter([made] * 3)

    def killed(lab, cell):
        return next(left, stop)(lab, cell)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(few_samples, "rows_of", killed)
    assert call(run, cut) == 130 and len(read_rows(cut)) == 9
    monkeypatch.setattr(few_samples, "rows_of", made)
    assert call(run, cut) == 0
    assert [timeless(row) for row in read_rows(cut)] == [timeless(row) for row in rows]
    monkeypatch.setattr(few_samples, "rows_of", stop)
    assert call(run, cut) == 0  # nothing is left to do
    assert "nothing is left to do" in capsys.readouterr().out


def read_rows(out):
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def timeless(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_arms_differ_in_what_they_read(run, tmp_path):
    """SFT alone takes one step; with as many tokens as GenPI it takes more, and all of PG's arms
    read the question too.
    """
    assert call(run, tmp_path, "--seeds", "1") == 0
    rows = {row["arm"]: row for row in read_rows(tmp_path)}
    assert rows["sft"]["tokens"] < min(rows[arm]["tokens"] for arm in ARMS if arm != "sft")
    assert rows["sft-tokens"]["steps"] > rows["sft"]["steps"] == rows["genpi"]["steps"]
    assert abs(rows["sft-tokens"]["tokens"] / rows["genpi"]["tokens"] - 1) < 0.2
    assert abs(rows["unrelated"]["tokens"] / rows["prompt"]["tokens"] - 1) < 0.05


def test_a_dry_run_prints_the_plan_and_trains_nothing(run, tmp_path, capsys):
    """Counts of the pool, of the cells, and what they will take."""
    assert call(run, tmp_path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "10 records to train on and 2 held out" in said and "12 trainings" in said
    assert "million tokens" in said and not (tmp_path / "cells.jsonl").exists()


def test_rows_of_another_experiment_do_not_count(tmp_path):
    """The hash of what they are made of is another."""
    row = cell_row("sft", 0, "a", 1, [1]) | {
        "made_of": "x",
        "steps": 1,
        "tokens": 1,
        "sft": 0.5,
        "pg": 0.0,
        "seconds": 1.0,
    }
    (tmp_path / "cells.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    assert len(read_cells(tmp_path / "cells.jsonl", "x")) == 1
    assert read_cells(tmp_path / "cells.jsonl", "y") == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", "99"], ["99 samples", "6 that show no rule"]),
        (["--shows", "7"], ["no rule", "7"]),
        (["--arms", "dpo"], ["dpo"]),
        (["--pool", "none.jsonl"], ["none.jsonl", "--pool"]),
        (["--seeds", "99"], ["99", "1 to 16"]),
    ],
)
def test_mistakes_are_told_in_one_line(run, tmp_path, capsys, flags, words):
    """Before anything is trained."""
    assert call(run, tmp_path, *flags) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and all(word in said for word in words)
    assert not (tmp_path / "cells.jsonl").exists()


def test_a_pool_of_another_prompt(run, tmp_path, capsys):
    """Its rules do not stand in the run's prompt."""
    write_pool(tmp_path / "pool.jsonl", some_pool())
    (tmp_path / "pool.jsonl").write_text(
        (tmp_path / "pool.jsonl").read_text().replace('"a"', '"Z"')
    )
    assert call(run, tmp_path / "out", "--pool", str(tmp_path / "pool.jsonl")) == 2
    assert "'Z'" in capsys.readouterr().err


def test_the_pool_of_a_run_is_what_the_exam_finds(run, tmp_path, monkeypatch):
    """The last of its witnesses in a record; samples first, then what is held out."""

    def named(voice, task, records, rule, limit):
        return {(i, 0) for i, r in enumerate(records) if rule.text == "Bark." and i > 1}

    monkeypatch.setattr(pool, "witnesses", named)
    opened = few_samples.load_run(run / "run")
    found = pool.pool_of_run(opened, SimpleNamespace())
    assert [(e.held_out, e.shows) for e in found] == [
        (False, {}), (False, {}), (True, {"Bark.": 0})
    ]  # fmt: skip


def test_cells_name_themselves():
    """A cell is its size, seed and arm."""
    assert few_samples.cell_of(cell_row("sft", 3, "a", 1, [1])) == Cell(16, 3, "sft")


def test_the_cells_compute_in_the_type_of_the_run(run, tmp_path, monkeypatch):
    """Of a run in bfloat16 the base is opened in bfloat16, and its cells are told apart."""
    args = json.loads((run / "run" / "args.json").read_text())
    shutil.copytree(run / "run", tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text(json.dumps(args | {"dtype": "bfloat16"}))
    shutil.copy(run / "pool.jsonl", tmp_path)
    labs = []
    monkeypatch.setattr(few_samples, "plan", lambda lab, *_: labs.append(lab) or ())
    for folder in (run, tmp_path):
        flags = f"--run {folder}/run --pool {folder}/pool.jsonl --out {tmp_path}/{len(labs)}"
        few = f"--shows 0 2 --unrelated {run}/p.txt --dry-run"
        assert evaluate.main(["few-samples", *flags.split(), *few.split()]) == 0
    kinds = [lab.voice.model.model.embed_tokens.weight.dtype for lab in labs]
    assert kinds == [torch.float32, torch.bfloat16]
    assert labs[0].made_of != labs[1].made_of
