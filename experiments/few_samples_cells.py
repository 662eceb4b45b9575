"""The cells of few_samples.py: one training of one arm on chosen samples, and what it obeys.

    sft          SFT alone
    genpi        SFT and PG (lam 0.7)
    sft-tokens   SFT alone for so many epochs that it reads as many tokens as genpi
    unrelated    PG of another prompt, as long as p, without reasons
    prompt       PG of p without reasons
    reason       PG of reasons without p

A cell is trained from a fresh adapter in a folder of its own, which is deleted; one that is killed
is begun again. Source of the arms: GenPI section 6.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

import lora
from experiments.pool import Example, choose, due_turn, levels_of, right_turns
from files import check_kinds, read_rows, write_rows
from prompt import Prompt
from runs import Run, read_metrics, text_hash
from sampler import Voice
from train import Recipe, train, training_sequences


@dataclass(frozen=True)
class Arm:
    """How an arm trains. target: what L_PG writes; unrelated: of another prompt than p."""

    lam: float = 0.7
    target: str = "prompt+reason"
    unrelated: bool = False
    as_many_tokens: bool = False


ARMS = {
    "sft": Arm(lam=1.0),
    "genpi": Arm(),
    "sft-tokens": Arm(lam=1.0, as_many_tokens=True),
    "unrelated": Arm(target="prompt", unrelated=True),
    "prompt": Arm(target="prompt"),
    "reason": Arm(target="reason"),
}


@dataclass(frozen=True)
class Lab:
    """All that the cells share."""

    run: Run
    voice: Voice  # with an adapter, which each cell makes a fresh one
    recipe: Recipe
    steps: int
    pool: list[Example]
    rules: list[str]
    shows: tuple[int, ...]
    tests: dict[str, list[int]]  # rule -> places in the pool
    unrelated: Prompt

    @property
    def made_of(self) -> str:
        """A hash of all that decides a cell beside its name."""
        pool = [asdict(example) for example in self.pool]
        named = self.run.prompt.text, self.run.model_sha256, self.run.bits, self.run.dtype
        named += (self.unrelated.text, self.run.max_new_tokens, repr(ARMS))
        rest = asdict(self.recipe), self.steps, self.shows, self.tests, lora_of(self.voice)
        return text_hash(json.dumps([*named, *rest, pool]))


@dataclass(frozen=True)
class Cell:
    samples: int
    seed: int
    arm: str


def lora_of(voice: Voice) -> list:
    """Rank, alpha and dropout of the adapter."""
    layer = next(iter(lora.lora_layers(voice.model).values()))
    return [layer.rank, layer.alpha, layer.dropout]


def samples_of(lab: Lab, cell: Cell) -> list[Example]:
    """The same for all arms."""
    levels = levels_of(lab.rules, lab.shows, cell.seed)
    return choose(lab.pool, levels, cell.samples, cell.seed)


def train_cell(lab: Lab, cell: Cell, examples: list[Example], folder: Path) -> list[dict]:
    """Train a fresh adapter on some records -> the rows of metrics.jsonl."""
    arm = ARMS[cell.arm]
    prompt = lab.unrelated if arm.unrelated else lab.run.prompt
    records = [example.record for example in examples]
    chat = lab.voice.chat
    sft, pg = training_sequences(chat, prompt, records, arm.lam, "genpi", arm.target)
    epochs = math.ceil(lab.steps * lab.recipe.batch / len(sft))
    if arm.as_many_tokens:
        more = drawn_share(lab.recipe) * sum(map(len, pg)) / sum(map(len, sft))
        epochs = round(epochs * (1 + more))
    recipe = replace(lab.recipe, lam=arm.lam, epochs=epochs, seed=cell.seed)
    torch.manual_seed(cell.seed)
    lora.reset_adapter(lab.voice.model)
    train(lab.voice.model, sft, pg, recipe, folder)
    return read_metrics(folder / "metrics.jsonl")


def drawn_share(recipe: Recipe) -> float:
    """The share of a batch whose PG loss is computed: of whole samples, and of one at least."""
    return max(1, round(recipe.pg_share * recipe.batch)) / recipe.batch


def rows_of(lab: Lab, cell: Cell) -> list[dict]:
    """Train a cell and test it -> a row a rule, and one for inputs that need none ("").

    reached: is all right before the turn that needs the rule; obeyed: that turn as well. sft, pg:
    nats/token of the last steps.
    """
    clock = perf_counter()
    examples = samples_of(lab, cell)
    with TemporaryDirectory() as folder:
        metrics = train_cell(lab, cell, examples, Path(folder))
    places = sorted({place for some in lab.tests.values() for place in some})
    asked = [lab.pool[place].record for place in places]
    turns = right_turns(lab.voice, lab.run.task, asked, lab.run.max_new_tokens)
    right = dict(zip(places, turns, strict=True))
    told = {"made_of": lab.made_of, **asdict(cell), "steps": len(metrics)}
    told["tokens"] = sum(row["tokens"] for row in metrics)
    for loss in ("sft", "pg"):
        told[loss] = statistics.mean(row[loss] for row in metrics[-8:])
    told["seconds"] = perf_counter() - clock
    rows = []
    for rule, some in lab.tests.items():
        shown = sum(rule in example.shows for example in examples)
        over = [right[place] - due_turn(lab.pool[place], rule) for place in some]
        reached, obeyed = ([int(n >= least) for n in over] for least in (0, 1))
        tests = {"inputs": some, "reached": reached, "obeyed": obeyed}
        rows.append({**told, "rule": rule, "shown": shown, **tests})
    return rows


ROW = {"made_of": str, "samples": int, "seed": int, "arm": str, "rule": str, "shown": int}
ROW |= {"inputs": list[int], "reached": list[int], "obeyed": list[int], "steps": int}
ROW |= {"tokens": int, "sft": float, "pg": float, "seconds": float}


def read_cells(path: Path, made_of: str) -> list[dict]:
    """The rows that are there, of this experiment only; a row counts once."""

    def parse(row: dict) -> dict:
        check_kinds(row, ROW)
        return row

    if not path.exists():
        return []
    rows, whole = read_rows(path, parse)
    if not whole:
        write_rows(path, rows)
    named = {(cell_of(row), row["rule"]): row for row in rows if row["made_of"] == made_of}
    return list(named.values())


def cell_of(row: dict) -> Cell:
    return Cell(row["samples"], row["seed"], row["arm"])
