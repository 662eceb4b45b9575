"""A run folder: what a run is made of, and whether its files belong together.

    args.json           every flag as parsed, versions, seed, hashes of prompt and model
    prompt.txt          the prompt, as it was read
    inputs.json         the pseudo inputs, and where their sampling goes on
    data.jsonl          one Record a pseudo input, appended as it is finished
    cover/              inputs.json and data.jsonl of the samples that --cover adds (cover.py)
    metrics.jsonl       one line an optimiser step
    checkpoint/         all that training needs to go on (train.py)
    adapter_*           the adapter in PEFT's format (lora.py)
    report.json, .md, .svg    the result (evaluate.py, picture.py)
    lock                who works in it: genpi.py while it runs; who only reads needs no lock

A folder may come from another machine, or from somebody else. So nothing that it names is loaded or
downloaded unless a hash says that it is what the run was made with, a prompt or a record that does
not belong is named, and who reads a run writes nothing but a report.
"""

import fcntl
import hashlib
import os
import platform
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import safetensors
import tokenizers
import torch
from tqdm import tqdm

from checkpoint import find_folder
from files import (
    AGAIN,
    append_row,
    check_kinds,
    kinds,
    no_link,
    read_json,
    read_rows,
    read_text,
    write_json,
    write_rows,
    write_text,
)
from prompt import TASKS, Prompt, Task, parse_prompt

COVER = "cover"
SAME_KIND = (  # what a run and the one that it goes on from after an edit of the prompt share
    "task", "environment", "max_turns", "model_sha256", "chat_format", "rank", "alpha",
)  # fmt: skip
OBJECTIVES = ("genpi", "sft", "pg", "prepend", "seqkd", "kld", "seqkd+kld")
PG_TARGETS = ("prompt+reason", "prompt", "reason", "reason-given-prompt", "prompt-given-reason")
LATER = {  # flags that a folder of an earlier version lacks, and what it did
    "objective": "genpi", "pg_target": "prompt+reason", "prepend_prob": 1.0, "dtype": "float32",
    "full": False,
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
HERE = Path(__file__).resolve().parent
ELSEWHERE = "choose another folder with --out"
ANEW = "make the run anew, with another --out"
NOT_COMPARED = {  # they change no experiment, or (on a GPU) only its rounding and dropout noise
    "out", "chat", "show", "record", "dry_run", "records", "concurrency", "timeout", "device",
    "slots", "micro_tokens", "checkpointing", "save_every",
}  # fmt: skip
MADE_OF = (  # what the records of a run depend on, so that another run may train on them
    "prompt_sha256", "task", "environment", "max_turns", "demos_sha256", "inputs_sha256",
    "model_sha256", "chat_format",
)  # fmt: skip

# --------------------------------------------------------------------------------------- records


@dataclass
class Record:
    """One pseudo input and all that was made of it: a line of data.jsonl.

    turns: agent and environment texts in turn; the first and the last are the agent's. The first
    three flags are rows of GenPI Table 4. overlong: the conversation did not fit the context, and
    is not trained on. no_reason: the question for the reason did not fit. cut_turn, cut_reason: the
    last turn, or the reason, reached its limit of tokens, so that its end is no ending.
    """

    index: int
    pseudo_input: str
    turns: list[str] = field(default_factory=list)
    student: str = ""
    reason: str = ""
    hit_limit: bool = False
    no_end_token: bool = False
    no_final_action: bool = False
    overlong: bool = False
    no_reason: bool = False
    cut_turn: bool = False
    cut_reason: bool = False
    seconds: float = 0.0

    @property
    def teacher(self) -> str:
        """yT_0, the teacher's first output."""
        return self.turns[0]


@dataclass
class Inputs:
    """The pseudo inputs so far, and where their sampling goes on: inputs.json."""

    rounds: int = 0
    fruitless: int = 0  # rounds in a row that brought nothing new
    seconds: float = 0.0
    inputs: list[str] = field(default_factory=list)


def read_inputs(path: Path) -> Inputs:
    """Raises: ValueError if the file is missing or damaged."""
    found = read_json(path, AGAIN, kinds(Inputs))
    return Inputs(**{name: found[name] for name in kinds(Inputs)})


@dataclass
class Step:
    """An optimiser step: a line of metrics.jsonl. sft, pg: losses in nats/token.

    Where the objective has another cost than -log P, as kld, sft is that cost.
    """

    step: int
    sft: float
    pg: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


def read_records(path: Path, mend: bool = True) -> list[Record]:
    """The records of data.jsonl in order of index, the first of each; the file then holds these.

    mend: False leaves the file as it is, for another process may be at work on it, or it may be
    somebody else's. Raises: ValueError naming a line that is corrupt.
    """
    seen: dict[int, Record] = {}

    def parse(row: dict) -> int:
        record = Record(**row)
        check_kinds(vars(record), kinds(Record))
        seen.setdefault(record.index, record)
        return record.index

    if not path.exists():
        return []
    indices, whole = read_rows(path, parse)
    if twice := len(indices) - len(seen):
        tqdm.write(f"{path}: {twice} lines hold a record once more; the first of each counts")
    if mend and (twice or not whole):
        write_rows(path, [asdict(record) for record in seen.values()])
    return [seen[index] for index in sorted(seen)]


def check_inputs_of(records: list[Record], inputs: list[str], folder: Path) -> None:
    """Raise ValueError for a record that is not of the pseudo input with its index, or is empty."""
    for record in records:
        if not record.turns and not record.overlong:
            told = f"record {record.index} of {folder / 'data.jsonl'} has no turn"
            raise ValueError(f"{told}; delete its line, and genpi.py makes it again")
        if record.pseudo_input not in inputs[record.index : record.index + 1]:
            told = f"record {record.index} of {folder / 'data.jsonl'} is of another pseudo input"
            cure = "put back the one that was changed, or delete data.jsonl"
            raise ValueError(f"{told} than {folder / 'inputs.json'} has there; {cure}")


def append_record(path: Path, record: Record) -> None:
    append_row(path, asdict(record))


def split_records(
    records: list[Record], samples: int, held_out: int
) -> tuple[list[Record], list[Record]]:
    """Training records, and held-out ones, which are the last; a third at most if there are few."""
    n = held_out
    if len(records) < samples + held_out:
        n = min(held_out, max(1, len(records) // 3))
    return records[:-n][:samples], records[-n:]


def covering_records(folder: Path) -> list[Record]:
    """The samples of a run that --cover has added, none without it."""
    return read_records(folder / COVER / "data.jsonl", mend=False)


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, but a last one cut short; ValueError names a corrupt one."""

    def parse(row: dict) -> dict:
        check_kinds(row, kinds(Step))
        return row

    return read_rows(path, parse)[0]


def hash_seed(*parts) -> int:
    """A seed that depends on all parts and on nothing else (not on the order of work)."""
    return random.Random("-".join(map(str, parts))).getrandbits(40)


# ---------------------------------------------------------------------------------------- folder


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def open_run(args, prompt: Prompt, known: dict) -> Iterator[None]:
    """Make the run folder of these flags, or go on in it, and hold it for the block.

    known: what tells things apart better than the name by which a flag calls them: hashes, the
    chat format. Raises: ValueError if the folder is none of ours, was made with other flags, or
    another process works in it.
    """
    flags = told_flags(args, known)
    path = args.out / "args.json"
    refuse_foreign(args.out)
    takes = args.records and not (args.out / "inputs.json").exists()
    taken = read_made(args.records, flags) if takes else {}
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        if path.exists() and (changed := changed_flags(flags, read_json(path, ELSEWHERE))):
            told = ", ".join(changed)
            raise ValueError(f"{args.out} was made with other flags: {told}; {ELSEWHERE}")
        if (args.out / "prompt.txt").exists():
            read_prompt(args.out, known["prompt_sha256"])
        modules = (torch, safetensors, tokenizers)
        versions = {module.__name__: module.__version__ for module in modules}
        versions["python"] = platform.python_version()
        write_json(path, {**flags, "versions": versions})
        for name, text in {"prompt.txt": prompt.text, **taken}.items():
            if not (args.out / name).exists():
                write_text(args.out / name, text)
        yield


def told_flags(args, known: dict) -> dict:
    """The flags as args.json has them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | known


def refuse_foreign(folder: Path) -> None:
    """Raise ValueError if a folder that is no run holds files that a run would replace."""
    found = [n for n in ("prompt.txt", "inputs.json", "data.jsonl") if (folder / n).exists()]
    if found and not (folder / "args.json").exists():
        told = f"{folder} holds {found[0]} and is no run folder (it has no args.json)"
        raise ValueError(f"{told}; {ELSEWHERE}, or take the records of a run with --records")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for the block; a process that dies lets go of it, however it dies.

    Raises: ValueError that says who holds it.
    """
    with open(folder / "lock", "a+", opener=no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            told = f"{folder}: process {file.read(80).strip()} works here"
            raise ValueError(f"{told}; wait for its end, or {ELSEWHERE}") from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        print(f"{os.getpid()} on {platform.node()}", file=file, flush=True)
        yield


def read_made(folder: Path, flags: dict) -> dict[str, str]:
    """The files of a run's records, by name. Raises ValueError if they are not made of `flags`."""
    before = read_json(folder / "args.json", "give the --out of an earlier run as --records")
    if changed := told_apart(MADE_OF, flags, before):
        told = f"the records of {folder} are of another run: {', '.join(changed)}"
        raise ValueError(f"{told}; give its flags, or no --records")
    inputs = read_inputs(folder / "inputs.json").inputs
    check_inputs_of(read_records(folder / "data.jsonl", mend=False), inputs, folder)
    names = [name for name in ("data.jsonl", "inputs.json") if (folder / name).exists()]
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def check_earlier(folder: Path, flags: dict) -> None:
    """Raise ValueError if the adapter of a run is not finished, or does not fit these flags."""
    needed = {"samples": int, "held_out": int}
    before = read_json(folder / "args.json", "give the --out of an earlier run as --from", needed)
    if changed := told_apart(SAME_KIND, flags, before):
        told = f"{folder} is a run of another kind: {', '.join(changed)}"
        raise ValueError(f"{told}; give its flags, or no --from")
    if not (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} has no finished adapter; finish it, or give no --from")
    inputs = read_inputs(folder / "inputs.json").inputs
    sizes = flags["samples"], flags["held_out"]
    learnt, _ = split_records(inputs, before["samples"], before["held_out"])
    _, asked = split_records(range(max(len(inputs), sum(sizes))), *sizes)
    if asked[0] < len(learnt):
        told = f"--held-out {sizes[1]} reaches into the {len(learnt)} samples of {folder}"
        raise ValueError(f"{told}, which its adapter knows; give fewer, or more --samples")


def told_apart(names: Iterable[str], flags: dict, before: dict) -> list[str]:
    """Those of some flags that differ, with both values, in words."""
    changed = [name for name in names if flags.get(name) != before.get(name)]
    return [f"{name} {before.get(name)} (now {flags.get(name)})" for name in changed]


def changed_flags(flags: dict, before: dict) -> list[str]:
    """What tells two experiments apart, in words."""
    named = {"prompt", "model", "model_path", "demos", "inputs", "generator"}  # places may change
    free = NOT_COMPARED | (named if flags["generator"] else named - {"generator"})
    return told_apart([name for name in flags if name not in free], flags, LATER | before)


def has_records(args, known: dict) -> bool:
    """Would these flags go on in a folder that has a record?"""
    path = args.out / "args.json"
    if not path.exists():
        return False
    flags = told_flags(args, known)
    before = read_json(path, ELSEWHERE)
    flags["generator_model"] = flags["generator_model"] or before.get("generator_model")
    begun = not changed_flags(flags, before)
    return begun and bool(read_records(args.out / "data.jsonl", mend=False))


@dataclass(frozen=True)
class Run:
    """A run folder. All fields but folder, prompt and task are flags of its args.json."""

    folder: Path
    prompt: Prompt
    task: Task  # with the environment and the turn limit of the run
    model: str  # as it was given
    model_path: str  # the folder that it was; of the embedded model its name beside this file
    model_sha256: str
    bits: int
    dtype: str
    device: str
    samples: int
    held_out: int
    max_new_tokens: int
    lam: float
    objective: str
    pg_target: str
    prepend_prob: float
    full: bool
    slots: int
    micro_tokens: int

    @property
    def base(self) -> Path:
        """Where its base model should be."""
        return HERE / self.model_path


FLAGS = {name: kind for name, kind in kinds(Run).items() if name not in ("folder", "prompt")}
FLAGS |= {"task": str, "environment": str, "max_turns": int, "prompt_sha256": str}


def load_records(run: Run) -> tuple[list[Record], dict]:
    """All records of a run, and the seconds that they and the training took.

    What an interruption lost is not counted. Raises: ValueError if records or metrics are missing.
    """
    made = read_inputs(run.folder / "inputs.json")
    records = read_records(run.folder / "data.jsonl", mend=False)
    check_inputs_of(records, made.inputs, run.folder)
    if len(records) < len(made.inputs):
        told = f"{len(records)} of {len(made.inputs)} records are there"
        raise ValueError(f"{run.folder}: {told}; genpi.py with the same flags makes the others")
    metrics = run.folder / "metrics.jsonl"
    steps = [row["step"] for row in read_metrics(metrics)] if metrics.exists() else []
    if not steps or steps != list(range(1, len(steps) + 1)):
        cure = "delete adapter_config.json and checkpoint/, and genpi.py trains anew"
        raise ValueError(f"{metrics} is missing, or not every step is in it; {cure}")
    synth = made.seconds + sum(record.seconds for record in records)
    if (run.folder / COVER / "inputs.json").exists():
        synth += read_inputs(run.folder / COVER / "inputs.json").seconds
        synth += sum(record.seconds for record in covering_records(run.folder))
    return records, {"synth": synth, "train": sum(row["seconds"] for row in read_metrics(metrics))}


def load_run(folder: Path, device: str | None = None, model: str | None = None) -> Run:
    """Open a run folder, by default for its own device, or the CPU where there is none like that.

    model: folder or Hub id of its base, if that is no more where it was; nothing is downloaded.
    Raises: ValueError if it is no run folder, or its files are damaged or do not belong together.
    """
    path = folder / "args.json"
    if not path.exists():
        told = "no args.json, so it is no run folder; give the --out of an earlier run"
        raise ValueError(f"{folder}: {told}")
    args = read_json(path, ANEW, FLAGS, LATER)
    names = {"task": TASKS, "objective": OBJECTIVES, "pg_target": PG_TARGETS, "dtype": DTYPES}
    for flag, known in names.items():
        if args[flag] not in known:
            raise ValueError(f"{path}: no {flag} is called {args[flag]}; {ANEW}")
    if zero := [name for name, kind in FLAGS.items() if kind is int and args[name] == 0]:
        raise ValueError(f"{path}: {zero[0]} = 0 is too little; {ANEW}")
    here = "cuda" if torch.cuda.is_available() and args["device"] == "cuda" else "cpu"
    args["device"] = device or here
    if model:
        args["model_path"] = str(find_folder(model, download=False).resolve())
    prompt = read_prompt(folder, args["prompt_sha256"])
    said = {"environment": args["environment"], "max_turns": args["max_turns"]}
    args["task"] = replace(TASKS[args["task"]], **said)
    of_run = {name: args[name] for name in kinds(Run) if name in FLAGS}
    return Run(folder, prompt, **of_run)


def read_prompt(folder: Path, sha256: str) -> Prompt:
    """The prompt of a run folder. Raises: ValueError if the run was made with another."""
    path = folder / "prompt.txt"
    if not path.exists():
        raise ValueError(f"{path} is missing; genpi.py makes it again")
    prompt = parse_prompt(read_text(path, "prompt"), str(path))
    if text_hash(prompt.text) != sha256:
        raise ValueError(f"{path} is not the prompt that the run was made with; {AGAIN}")
    return prompt
