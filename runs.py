"""A run folder: what a run is made of, and how its files are written, read and checked.

    args.json           every flag as parsed, versions, seed, hashes of prompt and model
    prompt.txt          the prompt, as it was read
    inputs.json         the pseudo inputs, and where their sampling goes on
    data.jsonl          one Record a pseudo input, appended as it is finished
    metrics.jsonl       one line an optimiser step
    checkpoint/         all that training needs to go on (train.py)
    adapter_*           the adapter in PEFT's format (lora.py)
    report.json, .md, .svg    the result (evaluate.py, picture.py)

Whatever is replaced is written beside and then renamed, so that no reader and no crash sees half a
file. What is appended may end in half a line, which is dropped and made again. Every mistake of a
user is a ValueError of one line that names the value and the cure; exit_code prints it.

Left out: locks. Two processes must not work in one folder, save under torchrun.
"""

import hashlib
import json
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import safetensors
import tokenizers
import torch
from tqdm import tqdm

from prompt import TASKS, Prompt, Task, parse_prompt

AGAIN = "delete it, and genpi.py makes it again"
NOT_COMPARED = {  # they change no experiment, or (on a GPU) only its rounding and dropout noise
    "out", "chat", "show", "record", "dry_run", "concurrency", "timeout", "device", "slots",
    "micro_tokens", "checkpointing", "save_every",
}  # fmt: skip

# ----------------------------------------------------------------------------------------- files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a fresh file beside `path`, which takes its place if the block ends without an error."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)  # what a crash left; if it is a link, its target stays as it is
    beside.touch(exist_ok=False)
    mode = beside.stat().st_mode
    try:
        yield beside
        beside.chmod(mode)  # safetensors writes for the owner alone, a server may be another user
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        # half a surrogate pair, as in a path that is no UTF-8, becomes JSON's escape for it
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, cure: str = AGAIN, keys: tuple[str, ...] = ()) -> dict:
    """The JSON object in a file. Raises ValueError if it is missing, damaged or lacks a key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {cure}") from None
    except (ValueError, RecursionError) as error:  # malformed, or not UTF-8
        raise ValueError(f"{path}: not JSON ({error}); {cure}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; {cure}")
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; {cure}")
    return found


def append_row(path: Path, row: dict) -> None:
    """Add a line to a JSONL file; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path, parse: Callable[[dict], object]) -> tuple[list, bool]:
    """The parsed lines of a JSONL file, and whether another can be appended to it as it is.

    A last line that does not parse, as a crash leaves it, is left out with a warning. Raises:
    ValueError naming any other line that is corrupt.
    """
    lines = path.read_bytes().split(b"\n")
    whole = not lines[-1]  # a line end, and nothing behind it
    lines = lines[:-1] if whole else lines
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                told = f"{path} line {number} is corrupt; delete that line to have it made again"
                raise ValueError(told) from None
            tqdm.write(f"{path}: the last line is corrupt; it is dropped and made again")
            whole = False
    return rows, whole


def read_text(path: Path, what: str) -> str:
    """The text of a user's file. Raises ValueError if it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        told = f"{path}: {error.strerror}, so there is no {what}; give the path of a text file"
        raise ValueError(told) from None
    except UnicodeDecodeError as error:
        told = f"{path}: byte {error.start} is not UTF-8; save the {what} file as UTF-8 text"
        raise ValueError(told) from None
    if "\0" in text:
        place = text.index("\0")
        raise ValueError(f"{path}: has a NUL byte at {place}, so it is no text; give a text file")
    if not text.strip():
        raise ValueError(f"{path}: the {what} file is empty; write the {what} into it")
    return text.replace("\r\n", "\n")


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


def read_records(path: Path, mend: bool = True) -> list[Record]:
    """The records of data.jsonl in order of index; a damaged last line is dropped from the file.

    mend: False leaves the file as it is, for another process may be at work on it.
    Raises: ValueError naming a line that is corrupt or holds a record once more.
    """
    seen: dict[int, Record] = {}

    def parse(row: dict) -> None:
        record = Record(**row)
        texts = [record.pseudo_input, record.student, record.reason, *record.turns]
        strange = not isinstance(record.index, int) or not all(isinstance(t, str) for t in texts)
        if strange or record.index in seen:
            raise ValueError(row)
        seen[record.index] = record

    if path.exists() and not read_rows(path, parse)[1] and mend:
        write_rows(path, [asdict(record) for record in seen.values()])
    return [seen[index] for index in sorted(seen)]


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


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, but a last one cut short; ValueError names a corrupt one."""

    def parse(row: dict) -> dict:
        return {**row, "step": int(row["step"]), "seconds": float(row["seconds"])}

    return read_rows(path, parse)[0] if path.exists() else []


def hash_seed(*parts) -> int:
    """A seed that depends on all parts and on nothing else (not on the order of work)."""
    return random.Random("-".join(map(str, parts))).getrandbits(40)


# ---------------------------------------------------------------------------------------- folder


def fingerprint(folder: Path) -> str:
    """A hash that tells checkpoints apart: names, sizes, first and last MiB of every file."""
    digest = hashlib.sha256()
    for pattern in ("*.json", "*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(0, path.stat().st_size - 2**20))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_run(args, prompt: Prompt, known: dict) -> None:
    """Make the run folder of these flags, or go on in it.

    known: what tells things apart better than the name by which a flag calls them: hashes, the
    chat format. Raises: ValueError if the folder was made with other flags.
    """
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | known
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "args.json"
    if path.exists() and (changed := changed_flags(flags, read_json(path))):
        cure = "choose another folder with --out"
        raise ValueError(f"{args.out} was made with other flags: {', '.join(changed)}; {cure}")
    versions = {module.__name__: module.__version__ for module in (torch, safetensors, tokenizers)}
    versions["python"] = platform.python_version()
    write_text(args.out / "prompt.txt", prompt.text)
    write_json(path, {**flags, "versions": versions})


def changed_flags(flags: dict, before: dict) -> list[str]:
    """What tells two experiments apart: each flag with both its values, in words."""
    named = {"prompt", "model", "demos", "generator"}  # their hashes are there: places may change
    free = NOT_COMPARED | (named if flags["generator"] else named - {"generator"})
    changed = [k for k in flags if k not in free and flags[k] != before.get(k)]
    return [f"{k} {before.get(k)} (now {flags[k]})" for k in changed]


def has_records(args, known: dict) -> bool:
    """Would these flags go on in a folder that has a record?"""
    path = args.out / "args.json"
    begun = path.exists() and not changed_flags(vars(args) | known, read_json(path))
    return begun and bool(read_records(args.out / "data.jsonl", mend=False))


@dataclass(frozen=True)
class Run:
    """A run folder. All fields but folder, prompt and task are flags of its args.json."""

    folder: Path
    prompt: Prompt
    task: Task  # with the environment and the turn limit of the run
    model: str
    model_sha256: str
    bits: int
    device: str
    samples: int
    held_out: int
    max_new_tokens: int
    lam: float
    slots: int
    micro_tokens: int


def load_records(run: Run) -> tuple[list[Record], dict]:
    """All records of a run, and the seconds that they and the training took.

    What an interruption lost is not counted. Raises: ValueError if records are missing.
    """
    inputs = read_json(run.folder / "inputs.json", AGAIN, ("seconds", "inputs"))
    records = read_records(run.folder / "data.jsonl")
    if len(records) < len(inputs["inputs"]):
        told = f"{len(records)} of {len(inputs['inputs'])} records are there"
        raise ValueError(f"{run.folder}: {told}; genpi.py with the same flags makes the others")
    synth = inputs["seconds"] + sum(record.seconds for record in records)
    train = sum(row["seconds"] for row in read_metrics(run.folder / "metrics.jsonl"))
    return records, {"synth": synth, "train": train}


def load_run(folder: Path, device: str | None = None) -> Run:
    """Open a run folder, by default for its own device, or the CPU where there is none like that.

    Raises: ValueError if it is no run folder, or its files are damaged.
    """
    if not (folder / "args.json").exists():
        told = "no args.json, so it is no run folder; give the --out of an earlier run"
        raise ValueError(f"{folder}: {told}")
    flags = {field.name for field in fields(Run)} - {"folder", "prompt", "task"}
    args = read_json(folder / "args.json", AGAIN, (*flags, "task", "environment", "max_turns"))
    if not (folder / "prompt.txt").exists():
        raise ValueError(f"{folder / 'prompt.txt'} is missing; genpi.py makes it again")
    if args["task"] not in list(TASKS):
        raise ValueError(f"{folder / 'args.json'}: no task is called {args['task']}; {AGAIN}")
    prompt = parse_prompt(read_text(folder / "prompt.txt", "prompt"))
    said = {"environment": args["environment"], "max_turns": args["max_turns"]}
    task = replace(TASKS[args["task"]], **said)
    if device or not torch.cuda.is_available():
        args["device"] = device or "cpu"
    for flag, default in (("slots", 64), ("micro_tokens", 2048)):  # once they were chosen later
        args[flag] = args[flag] or default
    return Run(folder, prompt, task, **{flag: args[flag] for flag in flags})


# ------------------------------------------------------------------------- mistakes, in one line


def exit_code(work: Callable, *args) -> int:
    """Do the work -> exit code. A mistake, or too small a machine, is one line, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows a ?
    try:
        work(*args)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = "out of memory; lower --micro-tokens or --slots, or add --checkpointing"
    except OSError as error:
        told = f"{error}; free some space or choose another folder"
    except ValueError as error:
        told = " ".join(str(error).split())
    print(f"error: {told}", file=sys.stderr)
    return 2


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also on a CPU, where PyTorch has no error of its own for it, and beneath a failed capture."""
    if error is None:
        return False
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "DefaultCPUAllocator" in str(error) or is_out_of_memory(error.__context__)
