"""Tables 1 to 5: what a cell is, how it is judged, how it resumes, and what the page says."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import synth
from experiments import cells, tables
from experiments.cells import CELLS, WAYS, cell_flags
from experiments.published import GENPI, TABLES, Row, noise
from experiments.tables import asked_ways, count, markdown, planned, told_row
from model import load_model
from prompt import parse_prompt
from sampler import Voice

ROOT = Path(evaluate.__file__).parent

# ------------------------------------------------------------------------------------- the plan


def test_every_cell_is_in_a_row_and_every_row_in_a_cell():
    """No cell is made for nothing; only the compressors are not there yet."""
    rows = [row for rows in TABLES.values() for row in rows]
    assert {row.cell for row in rows} - {None} == set(CELLS)
    assert all(("LLMLingua" in row.name or "ICAE" in row.name) == (not row.cell) for row in rows)
    assert asked_ways("genpi") == ["teacher", "plain", "adapter"]
    assert asked_ways("prepend") == ["adapter", "prompted"] and asked_ways("sft") == ["adapter"]


def test_cells_share_flags_and_full_ones_no_adapter():
    """Rate, batch, bits and rank are the adapter's; --full has its own."""
    said = {"samples": 8, "lr": 0.01, "rank": 4, "bits": 4, "checkpointing": True}
    shared = ["--samples=8", "--lr=0.01", "--rank=4", "--bits=4", "--checkpointing"]
    assert cell_flags("prompt", said) == [*shared, "--pg-target", "prompt"]
    full = ["--samples=8", "--checkpointing", "--full", "--objective", "kld"]
    assert cell_flags("full-kld", said) == full


def test_all_cells_train_on_the_records_of_their_seed(tmp_path):
    """GenPI's cell makes them, and comes first; the recipes are those of the rows."""
    plan = planned(tmp_path, 2, 34, {"samples": 8})
    assert len(plan) == 2 * len(CELLS)
    for cell in plan:
        genpi = tmp_path / f"seed{cell.seed}/genpi"
        assert cell.args.records == (None if cell.name == "genpi" else genpi)
        assert (cell.args.seed, cell.args.samples, cell.asked["problems"]) == (cell.seed, 8, 34)
    args = {cell.name: cell.args for cell in plan}
    assert args["lam-0.3"].lam == 0.3 and args["sft"].lam == 1 and args["pg"].lam == 0
    assert (args["prepend"].prepend_prob, args["prepend-half"].prepend_prob) == (1, 0.5)
    assert args["full-seqkd+kld"].full and not args["prompt-given-reason"].full
    assert [cell.name for cell in plan].index("genpi") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lam 0.5", ["--lam", "leave it out"]),
        ("--records x", ["--records", "leave it out"]),
        ("--from x", ["--from", "leave it out"]),
        ("--problems 35", ["--problems 35", "34 kinds", "take 102"]),
        ("--epochs many", ["--epochs", "many", "--help"]),
        ("--nonsense 1", ["--nonsense"]),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys, tmp_path):
    """Nothing is begun."""
    assert evaluate.main(["tables", "--out", str(tmp_path / "new"), *flags.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert [word for word in words if word not in told] == []
    assert not (tmp_path / "new").exists()


def test_an_unknown_word_is_told_the_known_ones(capsys):
    assert evaluate.main(["tabels", "--seeds", "1"]) == 2
    told = capsys.readouterr().err
    assert "tabels: no such command; give os, web_browsing, web_shopping, tables" in told


# ------------------------------------------------------------------------------------- the judge


def test_the_prompted_model_solves_problems_and_the_plain_one_none():
    """On the imaginary machine, of each kind one; another seed has other problems."""
    voice = Voice(*load_model(ROOT / "tiny"))
    prompt = parse_prompt((ROOT / "os.txt").read_text())
    cell = SimpleNamespace(seed=5, asked={"problems": 34})
    assert sum(cells.solve(voice, prompt, True, cell)) > 30
    assert sum(cells.solve(voice, prompt, False, cell)) == 0


def test_who_is_asked(monkeypatch, tmp_path):
    """In each way the adapter is on or off, and p in the context or not, as WAYS has it."""
    asked = []
    model = SimpleNamespace(on=True)

    class Off:
        def __init__(self, model):
            self.model = model

        def __enter__(self):
            self.model.on = False

        def __exit__(self, *_):
            self.model.on = True

    def note(voice, run, records, with_prompt):
        asked.append((voice.model.on, with_prompt))
        return [True]

    run = SimpleNamespace(slots=1)
    monkeypatch.setattr(cells.runs, "load_run", lambda folder: run)
    monkeypatch.setattr(cells.runs, "load_records", lambda run: ([], {"synth": 9, "train": 2}))
    monkeypatch.setattr(cells, "open_model", lambda run, loaded: (model, None))
    monkeypatch.setattr(cells, "held_out_records", lambda run, records: records)
    monkeypatch.setattr(cells.lora, "adapter_off", Off)
    monkeypatch.setattr(cells, "agree", note)
    args = SimpleNamespace(out=tmp_path, records=tmp_path)
    cell = cells.Cell(0, "sft", args, {"ways": list(WAYS), "problems": 0})
    cells.judge(cell, tmp_path, None)
    assert asked == list(WAYS.values()) and model.on
    found = cells.outcomes(cell)
    assert found["ways"] == {way: {"closed_loop": [True]} for way in WAYS}
    assert found["seconds"]["synth"] == 0  # of another cell's records


# -------------------------------------------------------------------------------------- the page

FOUND = [  # two seeds: GenPI right on 3 of 4 and 2 of 4; SFT on 1 and 2
    {
        "genpi": {"ways": {"adapter": {"closed_loop": [True, True, True, False]}}},
        "sft": {"ways": {"adapter": {"closed_loop": [True, False, False, False]}}},
    },
    {
        "genpi": {"ways": {"adapter": {"closed_loop": [True, True, False, False]}}},
        "sft": {"ways": {"adapter": {"closed_loop": [True, True, False, False]}}},
    },
]


def test_seeds_are_counted_together_and_compared_input_by_input():
    """3 of 8 less 5 of 8 is -25 points; two inputs differ, both GenPI's: p = 2 / 2^2."""
    told = told_row(Row("SFT alone", (15.97, 12, 35.64), "sft"), FOUND)
    ours = told["ours"]["closed_loop"]
    assert (ours["k"], ours["n"], ours["seeds"]) == (3, 8, [1, 2])
    against = told["against_genpi"]
    assert (against["difference"], against["p"]) == (-0.25, 0.5)
    assert (against["only_ours"], against["only_theirs"]) == (0, 2)
    assert "against_genpi" not in told_row(GENPI, FOUND)


def test_a_page_shows_published_and_ours():
    """Also what is not there yet, and what is not known to us."""
    rows = [GENPI, Row("SFT alone", (15.97, 12, 35.64), "sft"), Row("LLMLingua-2", (0, 0, 0))]
    rows.append(Row("plain", None, "sft"))
    page = markdown("Table", [told_row(row, FOUND) for row in rows]).splitlines()
    assert page[2].endswith("| ours, closed loop | closed loop: minus GenPI, in points |")
    assert page[4] == "| GenPI | 17.36, 14, 44.46 | 5 of 8 (31 to 86 %): 3, 2 |  |"
    assert page[5].startswith(
        "| SFT alone | 15.97, 12, 35.64 | 3 of 8 (14 to 69 %): 1, 2 | -25.0 ("
    )
    assert page[5].endswith("p = 0.5 |")
    assert page[6] == "| LLMLingua-2 | 0, 0, 0 | not yet | not yet |"
    assert page[7].startswith("| plain | not known to us | 3 of 8")


def test_count_of_nothing_is_an_interval_of_everything():
    assert (count([[], []])["low"], count([[], []])["high"]) == (0, 1)


def test_the_papers_own_noise():
    """OS 25 against 23 of 144 could be chance; 0 of 144 could not."""
    rows = {row["name"]: row for row in noise()}
    sft = rows["SFT alone"]["OS"]
    assert (sft["k"], sft["genpi"], sft["n"]) == (23, 25, 144) and sft["p"] > 0.8
    assert rows["PG alone"]["OS"]["p"] < 1e-6
    assert rows["LLMLingua-2, rate 0.9"]["OS"]["k"] == 6 and "GenPI" not in rows


# ----------------------------------------------------------------------------------- the command

FLAGS = """--samples 3 --held-out 1 --epochs 1 --batch 2 --lr 0.01 --max-new-tokens 8
--max-reason-tokens 8 --rank 2 --bits 16 --seeds 1 --device cpu"""


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch):
    """Run evaluate.py tables on the random checkpoint, with more flags."""
    (tmp_path / "prompt.txt").write_text("Answer in one word.\n")
    inputs = ["Count to 3.", "Name a tree.", "Spell cat.", "Say no."]
    monkeypatch.setattr(synth, "more_inputs", lambda *_: list(inputs))
    monkeypatch.setattr(tables, "foreseen", lambda first, some: [1.0] * len(some))

    def call(*flags):
        paths = ["--model", checkpoint, "--prompt", tmp_path / "prompt.txt"]
        paths += ["--out", tmp_path / "out"]
        return evaluate.main(["tables", *FLAGS.split(), *map(str, paths), *flags])

    return call


def test_all_cells_by_one_command_that_resumes(command, tmp_path, monkeypatch, capsys):
    """Killed in the third cell, it goes on there; once all is done, nothing is done again."""
    done = []
    judge = cells.judge

    def cut(cell, *args, **flags):
        done.append(cell.name)
        if len(done) == 3:
            raise KeyboardInterrupt
        judge(cell, *args, **flags)

    monkeypatch.setattr(cells, "judge", cut)
    assert command() == 130
    assert done == list(CELLS)[:3]
    assert command() == 0
    assert done[3:] == list(CELLS)[2:]
    page = capsys.readouterr().out
    assert page == (tmp_path / "out/tables.md").read_text()
    assert [line.split(":")[0] for line in page.splitlines() if line.startswith("### ")] == [
        "### Table 1", "### Table 2", "### Table 3", "### Table 4", "### Table 5",
        "### The grid of lambda", "### The paper's own differences, by Fisher's exact test",
        "### What was run",
    ]  # fmt: skip
    assert "ours, 4 records" in page
    found = json.loads((tmp_path / "out/tables.json").read_text())
    assert found["setting"]["held_out"] == 1 and found["synthesis"]["records"] == 4
    row = found["tables"]["Table 5: what the prompt is worth"][0]
    assert row["ours"]["closed_loop"]["k"] == 1  # the teacher agrees with itself
    assert all(seconds[0]["train"] > 0 for seconds in found["seconds"].values())
    shared = {(tmp_path / f"out/seed0/{cell}/data.jsonl").read_text() for cell in CELLS}
    assert len(shared) == 1
    before = len(done)
    assert command() == 0 and len(done) == before
    assert command("--epochs", "2") == 2
    told = capsys.readouterr().err
    assert "is of other tables: flags" in told and "choose another folder with --out" in told


def test_what_it_will_take(checkpoint, tmp_path, monkeypatch):
    """Only the first cell makes records; a teacher's pass makes a step dearer; --lam 1 cheaper."""
    (tmp_path / "prompt.txt").write_text("Answer in one word. " * 20)
    monkeypatch.setattr(synth, "more_inputs", lambda *_: ["Count to 3.", "Name a tree."])
    said = {"model": str(checkpoint), "prompt": tmp_path / "prompt.txt", "samples": 50}
    said |= {"held_out": 1, "bits": 16, "rank": 2, "max_new_tokens": 8, "max_reason_tokens": 8}
    plan = planned(tmp_path / "out", 1, 0, said)
    seconds = dict(zip(CELLS, cells.foreseen(plan[0], plan), strict=True))
    assert min(seconds.values()) > 0 and not (tmp_path / "out").exists()
    assert seconds["genpi"] > seconds["lam-0.5"] > seconds["sft"]
    assert seconds["full-kld"] > seconds["full-seqkd"]
