"""If only 0, 1, 2 or 4 of the samples show a rule of p, does GenPI obey it better than SFT alone?

    python tiny/gold.py --out gold.jsonl
    python evaluate.py few-samples --run runs/os --pool gold.jsonl --dry-run       what it will take
    python evaluate.py few-samples --run runs/os --pool gold.jsonl

SFT shows what to do, prompt generation says why. So where hardly a sample shows a rule, the words
of p that L_PG teaches should help most. The run gives prompt, base model, recipe, and the pool of
records (pool.py) of which the samples of a cell are chosen. A cell is one training:

    samples   16, 64, 192 of them
    seed      of the choice, the adapter and the order; it also says how many samples show each rule
    arm       SFT alone, GenPI, and four that tell what of GenPI does it (few_samples_cells.py)

All arms of a seed train on the same samples and are asked the same held-out inputs. A finished cell
is a line a rule in cells.jsonl, so a command that was killed goes on, and one with more seeds has
less to do. A line counts for what it was made of, told by a hash.

Left out: another rate, or another size of adapter, for each arm.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from chat import Chat
from experiments.few_samples_cells import (
    ARMS,
    Cell,
    Lab,
    cell_of,
    drawn_share,
    read_cells,
    rows_of,
    samples_of,
)
from experiments.few_samples_report import write_report
from experiments.pool import (
    Example,
    counts,
    levels_of,
    pool_of_run,
    questions_of,
    rare_rules,
    read_pool,
    write_pool,
)
from files import append_row, read_json, read_text
from flags import WHOLE, Flags, device_flag, number
from model import load_model
from objectives import pg_sequence
from prompt import Prompt
from runs import ANEW, HERE, LATER, Run, load_run, locked, read_metrics
from sampler import Voice
from train import Recipe, base_folder, training_sequences

SAMPLES = (16, 64, 192)
SHOWS = (0, 1, 2, 4)

# ------------------------------------------------------------------------------------------- plan


def plan(lab: Lab, cells: list[Cell], done: list[dict]) -> Iterator[str]:
    """What will be done and how long it will take, in lines. Raises: ValueError for what cannot."""
    missing = missing_cells(lab, cells, done)
    n_train = sum(not example.held_out for example in lab.pool)
    told = f"the pool has {n_train} records to train on and {len(lab.pool) - n_train} held out"
    yield f"{told}; they show (training, held out)"
    for rule in sorted({rule for example in lab.pool for rule in example.shows}):
        studied = "" if rule in lab.rules else " (not studied: not rare, or too rare)"
        yield "  {:>4} {:>4}  {}{}".format(*counts(lab.pool, rule), line_of(rule), studied)
    wanted = met = 0
    for samples, seed in sorted({(cell.samples, cell.seed) for cell in cells}):
        levels = levels_of(lab.rules, lab.shows, seed)
        chosen = samples_of(lab, Cell(samples, seed, ""))
        met += sum(sum(r in e.shows for e in chosen) == n for r, n in levels.items())
        wanted += len(levels)
    yield f"{met} of {wanted} rules are shown by just as many samples as they should"
    told = f"{len(cells)} trainings of {lab.steps} steps or more, {len(cells) - len(missing)} done"
    asked = len({place for some in lab.tests.values() for place in some})
    yield f"{told}; after each, {asked} conversations are played"
    yield estimate(lab, missing, done)


def missing_cells(lab: Lab, cells: list[Cell], done: list[dict]) -> list[Cell]:
    """Those of which a row is not there."""
    there = {(cell_of(row), row["rule"]) for row in done}
    return [cell for cell in cells if not all((cell, rule) in there for rule in lab.tests)]


def estimate(lab: Lab, missing: list[Cell], done: list[dict]) -> str:
    """How long the missing cells will take: by those that are done, or by the run's training."""
    if not missing:
        return "nothing is left to do"
    if done:
        hours = len(missing) * sum(row["seconds"] for row in done) / len(done) / 3600
        return f"about {hours:.1f} hours more, by those that are done"
    chat = lab.voice.chat
    records = [example.record for example in lab.pool if not example.held_out]
    tokens = 0.0
    for cell in missing:
        arm = ARMS["genpi" if ARMS[cell.arm].as_many_tokens else cell.arm]
        sft, pg = training_sequences(
            chat, lab.run.prompt, records[:8], ARMS["genpi"].lam, "genpi", arm.target
        )
        a_sample = sum(map(len, sft)) + (arm.lam < 1) * drawn_share(lab.recipe) * sum(map(len, pg))
        tokens += lab.steps * lab.recipe.batch * a_sample / len(sft)
    told = f"about {tokens / 1e6:.1f} million tokens of training"
    path = lab.run.folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    if not rows:
        return told
    rate = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    hours = tokens / rate / 3600
    return (
        f"{told}; at the {rate:,.0f} a second of {lab.run.folder} {hours:.1f} hours, and the tests"
    )


def setting(lab: Lab) -> str:
    """What all cells have in common, in a line."""
    n_train = sum(not example.held_out for example in lab.pool)
    recipe = lab.recipe
    return (
        f"samples of {n_train} records; {len(lab.rules)} rules; batches of {recipe.batch}, rate "
        f"{recipe.lr:g}, L_PG of {recipe.pg_share:g} of the samples, {lab.steps} steps or more. A "
        "rule is obeyed if a conversation without the prompt takes the teacher's actions up to and "
        "with the turn that needs it, while the environment says what is recorded"
    )


def line_of(rule: str) -> str:
    return " ".join(rule.split())[:70]


# ---------------------------------------------------------------------------------------- command


def open_lab(args, out: Path, run: Run) -> Lab:
    """Load the base, make or read the pool, and find the rules that can be studied."""
    model, chat = load_model(base_folder(run), run.device, getattr(torch, run.dtype), run.bits)
    voice = Voice(model, chat, run.slots)
    path = args.pool or out / "pool.jsonl"
    if not args.pool and not path.exists():
        tqdm.write(f"looking through the records of {run.folder} for what shows a rule")
        write_pool(path, pool_of_run(run, voice))
    pool = read_pool(path)
    told = {rule for example in pool for rule in example.shows}
    if strange := sorted(rule for rule in told if rule not in run.prompt.text):
        raise ValueError(f"{path}: no rule of {run.folder}'s prompt is {line_of(strange[0])!r}")
    pool = [example for example in pool if example.held_out or fits(chat, run, example)]
    rules = rare_rules(pool, max(args.shows), run.prompt.text)
    if not rules:
        raise ValueError(
            f"{path}: no rule is needed by a held-out record and shown by {max(args.shows)} of the "
            "others or more, but at most half; give a run with --cover, or lower --shows"
        )
    flags = LATER | read_json(run.folder / "args.json", ANEW)
    lora.add_lora(model, flags["rank"], flags["alpha"], flags["dropout"])
    recipe = Recipe(**{field.name: flags[field.name] for field in fields(Recipe)})
    share = args.pg_share or recipe.pg_share
    recipe = replace(recipe, objective="genpi", pg_share=share, save_every=args.steps)
    other = unrelated_prompt(read_text(args.unrelated, "prompt"), run.prompt, chat)
    tests = questions_of(pool, rules, args.tested)
    return Lab(run, voice, recipe, args.steps, pool, rules, tuple(args.shows), tests, other)


def fits(chat: Chat, run: Run, example: Example) -> bool:
    """Could every arm train on a record?"""
    return len(pg_sequence(chat, run.prompt, example.record, "prompt+reason")) <= chat.context


def unrelated_prompt(text: str, prompt: Prompt, chat: Chat) -> Prompt:
    """A text as long as p, in tokens: cut, or told again from its beginning."""
    wanted = len(chat.tokens(prompt.text))
    while len(chat.tokens(text)) < wanted:
        text += "\n\n" + text
    return Prompt(chat.decode(chat.tokens(text)[:wanted]))


def parse_flags(argv: list[str]):
    parser = Flags(prog="evaluate.py few-samples", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of genpi.py: prompt, model, recipe")
    add("--pool", type=Path, help="records and the rules they show; None: those of the run")
    add("--out", type=Path, help="folder of the results; None: few-samples/ in the run's")
    add("--samples", type=WHOLE, nargs="+", default=SAMPLES, help="sizes of a training")
    add("--shows", type=number(int, 0), nargs="+", default=SHOWS, help="samples that show a rule")
    add("--seeds", type=number(int, 1, 16), default=8, help="best a multiple of the --shows")
    add("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="ways to train")
    add("--steps", type=WHOLE, default=60, help="optimiser steps of a training")
    add(
        "--pg-share",
        type=number(float, 1e-6, 1),
        metavar="S",
        help="as genpi.py's; None: the run's",
    )
    add("--tested", type=WHOLE, default=16, help="held-out inputs a rule, at most")
    add("--unrelated", type=Path, default=HERE / "web_shopping.txt", help="the other prompt")
    add("--dry-run", action="store_true", help="print the plan and end")
    add("--device", type=device_flag, choices=("cpu", "cuda"), help="by default the run's own")
    add("--model", help="folder or Hub id of the base model, if it is no more where it was")
    return parser.parse_args(argv)


def command(argv: list[str]) -> None:
    """evaluate.py few-samples ..."""
    args = parse_flags(argv[1:])
    run = load_run(args.run, args.device, args.model)
    out = args.out or run.folder / "few-samples"
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        lab = open_lab(args, out, run)
        made_of = lab.made_of
        path = out / "cells.jsonl"
        done = read_cells(path, made_of)
        arms = dict.fromkeys(args.arms)
        sizes = sorted(set(args.samples))
        cells = [Cell(n, seed, arm) for seed in range(args.seeds) for n in sizes for arm in arms]
        print("\n".join(plan(lab, cells, done)))
        if args.dry_run:
            return
        there = {(cell_of(row), row["rule"]) for row in done}
        for cell in tqdm(missing_cells(lab, cells, done), "few-samples", unit="cell"):
            for row in rows_of(lab, cell):
                if (cell, row["rule"]) not in there:
                    append_row(path, row)
        rows = [row for row in read_cells(path, made_of) if cell_of(row) in cells]
        write_report(rows, out, run.folder.name, setting(lab))
