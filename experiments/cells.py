"""A cell of a table: one training on records that all cells of its seed share, and who is asked.

    OUT/seed0/genpi        the run that makes the records of seed 0, and trains GenPI on them
    OUT/seed0/CELL         the same records, another objective (--records)
    .../outcomes.json      input by input, whether a way was right: what the tables are made of

Every cell is a run folder of genpi.py, made by the same code with the flags in CELLS; in the place
of the report it is judged here. It goes on after a crash as genpi.py does, and one that has its
outcomes is not done again. Who is asked:

    teacher     the base with p           plain       the base without
    adapter     what was trained, without p
    prompted    what was trained, with p in its context

Right means, input by input:

    closed_loop    all actions of a held-out conversation are the recorded teacher's
    solved         a problem is solved on the imaginary machine of tiny/, which knows the answers;
                   of the embedded model with a prompt of the kind `os` alone

The base of --full is not quantised (16 bits), that of the adapters is (NF4), as in the paper; all
are held against the turns that the latter has recorded.

Left out: real environments (benchmarks/).
"""

import random
import statistics
import sys
import time
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import forecast
import genpi
import lora
import runs
from agreement import closed_loop, held_out_records, same_conversation
from chat import Chat
from costs import processor
from files import read_json, write_json
from full import OF_AN_ADAPTER
from model import Llama
from prompt import Prompt, student_messages
from runs import Record, Run
from sampler import Voice
from train import open_model, training_sequences

CELLS = {  # cell: its flags
    "genpi": "",
    "full-kld": "--full --objective kld",
    "full-seqkd": "--full --objective seqkd",
    "full-seqkd+kld": "--full --objective seqkd+kld",
    "sft": "--objective sft",
    "pg": "--objective pg",
    "prompt": "--pg-target prompt",
    "reason": "--pg-target reason",
    "reason-given-prompt": "--pg-target reason-given-prompt",
    "prompt-given-reason": "--pg-target prompt-given-reason",
    "prepend": "--objective prepend",
    "prepend-half": "--objective prepend --prepend-prob 0.5",
    "lam-0.3": "--lam 0.3",
    "lam-0.5": "--lam 0.5",
}
WAYS = {  # who is asked: is the adapter on, is p in the context
    "teacher": (False, True),
    "plain": (False, False),
    "adapter": (True, False),
    "prompted": (True, True),
}
OF_A_CELL = (  # flags that tell one cell from another, or are of no use in one
    "out", "records", "earlier", "seed", "objective", "lam", "pg_target", "prepend_prob", "full",
    "chat", "show", "record", "dry_run", "cover",
)  # fmt: skip
OF_ADAPTERS = ("bits", "batch", "lr", *OF_AN_ADAPTER)  # --full has its own


def check_shared(said: dict) -> None:
    """Raise ValueError for a flag that not all cells can share. said: the flags that are given."""
    for name in OF_A_CELL:
        if name in said:
            flag = "--from" if name == "earlier" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} differs from cell to cell of the tables; leave it out")


def cell_flags(cell: str, said: dict) -> list[str]:
    """What a cell gives genpi.py besides folder, seed and records; --full no adapter's flags."""
    own = CELLS[cell].split()
    shared = []
    for name, value in said.items():
        if "--full" in own and name in OF_ADAPTERS:
            continue
        flag = f"--{name.replace('_', '-')}"
        shared.append(flag if value is True else f"{flag}={value}")
    return shared + own


@dataclass(frozen=True)
class Cell:
    """A cell of one seed. asked: all that its outcomes depend on."""

    seed: int
    name: str
    args: Namespace
    asked: dict


def plan_cell(out: Path, seed: int, name: str, said: dict, ways: list[str], problems: int) -> Cell:
    """A cell with its flags. said: those that all cells share; ways: those in which it is asked.

    Raises: ValueError if there is no such number of problems.
    """
    folder = out / f"seed{seed}"
    flags = cell_flags(name, said)
    own = [f"--out={folder / name}", f"--seed={seed}"]
    if name != "genpi":
        own.append(f"--records={folder / 'genpi'}")
    args = genpi.parse_flags(flags + own)
    prompt = runs.text_hash(genpi.read_prompt(args).text)
    asked = {"flags": flags, "prompt_sha256": prompt, "ways": ways, "problems": 0}
    if answers_known(args):
        kinds = len(imaginary_machine().world.KINDS)
        if problems % kinds:
            told = f"--problems {problems} is no multiple of the {kinds} kinds"
            raise ValueError(f"{told}; take {3 * kinds}")
        asked["problems"] = problems
    return Cell(seed, name, args, asked)


# -------------------------------------------------------------------------------------- one cell


def outcomes(cell: Cell) -> dict | None:
    """What a finished cell found, None if it is not finished.

    Raises: ValueError if it was asked something else.
    """
    path = cell.args.out / "outcomes.json"
    if not path.exists():
        return None
    kinds = {"asked": dict, "ways": dict, "seconds": dict, "machine": str}
    found = read_json(path, "delete it, and the same command makes it again", kinds)
    if changed := runs.told_apart(cell.asked, cell.asked, found["asked"]):
        told = f"{cell.args.out} is of other tables: {', '.join(changed)}"
        raise ValueError(f"{told}; choose another folder with --out")
    return found


def do_cell(cell: Cell) -> None:
    """Make, train and judge a cell, from where it was left."""
    with redirect_stdout(sys.stderr):  # the tables are alone on stdout
        genpi.internalise(cell.args, partial(judge, cell))


def judge(cell: Cell, folder: Path, loaded: tuple[Llama, Chat], **_) -> None:
    """Ask a trained cell in all its ways, and write its outcomes."""
    clock = time.perf_counter()
    run = runs.load_run(folder)
    model, chat = open_model(run, loaded)
    records, seconds = runs.load_records(run)
    voice = Voice(model, chat, run.slots)
    found = {way: {} for way in cell.asked["ways"]}
    for way, right in found.items():
        adapted, with_prompt = WAYS[way]
        with nullcontext() if adapted else lora.adapter_off(model):
            right["closed_loop"] = agree(voice, run, held_out_records(run, records), with_prompt)
            if cell.asked["problems"]:
                right["solved"] = solve(voice, run.prompt, with_prompt, cell)
    seconds["judge"] = time.perf_counter() - clock
    if cell.args.records:
        seconds["synth"] = 0.0  # they were made in another cell
    told = {"asked": cell.asked, "ways": found, "seconds": seconds, "machine": processor()}
    write_json(folder / "outcomes.json", told)


def agree(voice: Voice, run: Run, records: list[Record], with_prompt: bool) -> list[bool]:
    """In which conversations all actions are the recorded teacher's."""
    opening = run.prompt.teacher if with_prompt else student_messages
    played = closed_loop(voice, run, records, opening)
    pairs = zip(played, records, strict=True)
    return [all(same_conversation(run.task, *pair)) for pair in pairs]


def answers_known(args: Namespace) -> bool:
    return (args.model_path, args.task) == ("tiny", "os")


def solve(voice: Voice, prompt: Prompt, with_prompt: bool, cell: Cell) -> list[bool]:
    """Which problems the agent solves on the imaginary machine, told as in tiny/measure.py."""
    machine = imaginary_machine()
    rng = random.Random(f"measure-{cell.seed}")
    problems = machine.balanced(cell.asked["problems"], rng, surprising=True)
    rules = [rule for rule in machine.OS_RULES if rule.line in prompt.text]
    cases = [(problem, prompt, machine.OS, rules) for problem in problems]
    rates = machine.Rates()
    machine.judge(rates, "agent", cases, machine.converse(voice, cases, with_prompt))
    return [passed for _, passed, _ in rates["agent: solved"]]


def imaginary_machine():
    """tiny/measure.py, a script beside the embedded model."""
    folder = str(runs.HERE / "tiny")
    if folder not in sys.path:
        sys.path.append(folder)
    import measure

    return measure


# ------------------------------------------------------------------------------ what it will take


def foreseen(first: Cell, cells: list[Cell]) -> list[float]:
    """Seconds that each of some cells will take. first: one that makes records.

    Two records are made and a step of GenPI is timed; other objectives are told by their tokens, of
    which those that only a teacher reads cost a third. A synthesis takes longer than at full rate.
    """
    args = first.args
    prompt = genpi.read_prompt(args)
    model, chat = genpi.open_base(args, genpi.base_folder(args))
    genpi.fit_turn(args, chat, prompt)
    with genpi.two_records(args, prompt, model, chat) as folder:
        records = runs.read_records(folder / "data.jsonl")
    writing = forecast.sampling_rate(Voice(model, chat, args.slots), prompt, records)
    genpi.add_adapter(args, model)
    pairs = training_sequences(chat, prompt, records, args.lam)
    rates = {"model": writing, "generator": writing}
    rates["training"] = forecast.training_rate(model, *pairs, genpi.open_recipe(args))
    lengths = forecast.text_lengths(chat, records)
    found = []
    for cell in cells:
        args = cell.args
        recipe = genpi.open_recipe(args)
        pairs = training_sequences(chat, prompt, records, args.lam, args.objective, args.pg_target)
        read = lengths | forecast.sequence_lengths(*pairs, recipe)
        if "kld" in args.objective:
            read["sft"] += statistics.mean(len(twin.prompted) for twin in pairs[0]) / 3
        took = forecast.forecast(read, rates, (args.samples, args.held_out), recipe)["seconds"]
        making = 0 if args.records else took["model"] + took["generator"]
        asked = len(cell.asked["ways"]) * (args.held_out + cell.asked["problems"])
        found.append(making + took["training"] + asked * lengths["model"] / writing)
    return found
