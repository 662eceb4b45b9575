"""The entries of a large JSON list, one after the other: a file of gigabytes needs little memory.

Left out: lists of bare numbers, which could be cut in two where a block of the file ends.
"""

import json
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 22  # characters read at a time
SPACE = " \t\r\n"


def json_items(path: Path, cure: str) -> Iterator[object]:
    """Yield the entries of the JSON list in a file; same as `yield from json.load(file)`.

    Raises: ValueError, with the cure, if the file cannot be read or holds no list.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from entries(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {cure}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a list in JSON ({error}); {cure}") from None


def entries(file) -> Iterator[object]:
    """The entries of a list in an open file. Raises: JSONDecodeError where it is none."""
    decoder = json.JSONDecoder()
    text = file.read(BLOCK).lstrip(SPACE)
    if not text.startswith("["):
        raise json.JSONDecodeError("no [", text, 0)
    place = 1
    while True:
        while text[place : place + 1] in (*SPACE, ","):
            place += 1
        if text[place : place + 1] == "]":
            return
        try:
            entry, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            more = file.read(max(BLOCK, len(text) - place))  # as much again: few attempts an entry
            if not more:
                raise
            text = text[place:] + more
            place = 0
            continue
        yield entry
