"""The files of a run folder: how text, tables, JSON and JSON lines are written, read and checked.

Whatever is replaced is written beside and then renamed, so that no reader and no crash sees half a
file. What is appended may end in half a line, which read_rows drops. A folder may have come by
mail: no link in it is written through, and what it says is checked for its kind before it is used.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin

from tqdm import tqdm

AGAIN = "delete it, and genpi.py makes it again"
CONTROLS = [i for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"]
UNSEEN = {i: f"\\x{i:02x}" for i in CONTROLS}  # for str.translate: they steer a terminal


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


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Rows of cells as a table in Markdown."""
    heads = list(heads)
    head, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows))
    return "\n".join([head, "|---" * len(heads) + "|", *lines])


def kinds(dataclass: type) -> dict[str, type]:
    """The fields of a dataclass and what their annotations say."""
    return {field.name: field.type for field in fields(dataclass)}


def fits(value: object, kind: type) -> bool:
    """Is a value of JSON what an annotation says? A number is finite, and none is negative here."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(part, *get_args(kind)) for part in value)
    if kind is int or kind is float:
        whole = type(value) is int  # a bool is none
        return (whole or kind is type(value)) and 0 <= value < 2**53
    if kind is str:  # half a surrogate pair, which JSON can spell, is no text
        return isinstance(value, str) and value == value.encode(errors="replace").decode()
    return isinstance(value, kind)


def check_kinds(found: dict, needed: dict[str, type]) -> None:
    """Raise ValueError for a field that is not there, or holds what its kind does not allow."""
    for name, kind in needed.items():
        if name not in found:
            raise ValueError(f"lacks {name}")
        if not fits(found[name], kind):
            wanted = kind.__name__ if get_origin(kind) is None else kind
            raise ValueError(f"{name} = {found[name]!r:.40} is not a proper {wanted}")


def read_json(
    path: Path, cure: str = AGAIN, needed: dict[str, type] | None = None, absent: dict | None = None
) -> dict:
    """The JSON object in a file. needed: its fields and their kinds; absent: values of fields that
    it may lack.

    Raises: ValueError if the file is missing or damaged, or a field is missing or of another kind.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {cure}") from None
    except (ValueError, RecursionError) as error:  # malformed, or not UTF-8
        raise ValueError(f"{path}: not JSON ({error}); {cure}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; {cure}")
    found = (absent or {}) | found
    try:
        check_kinds(found, needed or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {cure}") from None
    return found


def no_link(name: str, flags: int) -> int:
    """An opener for what is written in place: a link in a folder may lead to any file."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{name} is a link; put the file in its place") from None


def append_row(path: Path, row: dict) -> None:
    """Add a line to a JSONL file; it is on the disk when this returns."""
    with open(path, "a", encoding="utf-8", opener=no_link) as file:
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
    """The text of a user's file, the same whichever line ends and byte order marks it has.

    Raises: ValueError if the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        told = f"{path}: {error.strerror}, so there is no {what}; give the path of a text file"
        raise ValueError(told) from None
    except UnicodeDecodeError as error:
        told = f"{path}: byte {error.start} is not UTF-8; save the {what} file as UTF-8 text"
        raise ValueError(told) from None
    if "\0" in text:
        place = text.index("\0")
        raise ValueError(f"{path}: has a NUL byte at {place}, so it is no text; give a text file")
    text = re.sub("\r\n?", "\n", text.replace("\ufeff", ""))
    if not text.strip():
        raise ValueError(f"{path}: the {what} file is empty; write the {what} into it")
    return text
