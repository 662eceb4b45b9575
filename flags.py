"""The command line: what a flag may be, and how a mistake is told, which is in one line.

Every mistake of a user is a ValueError that names the value, the limit and the cure.
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable

import torch

from files import UNSEEN


class Flags(argparse.ArgumentParser):
    """A parser whose complaints are one line like all others."""

    def error(self, message: str):
        raise ValueError(f"{message.removeprefix('argument ')}; see --help")

    def said(self, argv: list[str] | None) -> dict:
        """The flags that argv gives, without those that have their defaults."""
        unsaid = object()
        blank = argparse.Namespace(**dict.fromkeys(vars(self.parse_args(argv)), unsaid))
        found = vars(self.parse_args(argv, blank))
        return {name: value for name, value in found.items() if value is not unsaid}


def number(kind: type, low: float, high: float = math.inf):
    """The argparse type of numbers from `low` to `high`, both included."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


WHOLE = number(int, 1, 10**9)
SEED = number(int, 0, 2**32)
SHARE = number(float, 0, 1)


def utf8(text: str) -> str:
    """The argparse type of texts: bytes that are none arrive as lone surrogates."""
    text.encode()
    return text


def device_flag(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        cure = "use --device cpu or install a CUDA build of torch"
        raise argparse.ArgumentTypeError(f"PyTorch sees no CUDA device for --device cuda; {cure}")
    return name


# host, port and path: a password or a query would be printed, and saved with the run
HOST = r"[\w-]+(?:\.[\w-]+)*|\[[\da-f:]+\]"
URL = re.compile(rf"https?://(?:{HOST})(?::(\d{{1,5}}))?(?:/[\w.~-]+)+/?", re.ASCII)


def generator_flag(name: str) -> str:
    """The argparse type of --generator: a folder, a Hub id, or the URL of a server."""
    found = URL.fullmatch(utf8(name))
    if "://" in name and not (found and 0 < int(found[1] or 80) < 2**16):
        shown = "(not shown)" if set(name) & set("@?#") else name
        cure = "give one like http://localhost:8000/v1, and a key as OPENAI_API_KEY"
        raise argparse.ArgumentTypeError(f"{shown}: not the URL of a server; {cure}")
    return name


# ------------------------------------------------------------------------- mistakes, in one line


def exit_code(work: Callable, *args) -> int:
    """Do the work -> exit code. A mistake, or too small a machine, is one line, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows a ?
    try:
        try:
            work(*args)
        finally:
            sys.stdout.flush()  # where a closed pipe is known, and not as Python ends
        return 0
    except KeyboardInterrupt:
        # a progress bar that is half built fails as Python ends, which tells the user nothing
        sys.unraisablehook = lambda unraisable: None
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `head` or `less` has seen enough, and Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # as a shell says it
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = "out of memory; lower --micro-tokens or --slots, or add --checkpointing"
    except OSError as error:
        told = f"{error}; free some space or choose another folder"
    except ValueError as error:
        told = " ".join(str(error).split())
    if os.environ.get("RANK", "0") != "0":  # most likely the first process says the same, and
        time.sleep(3)  # torchrun ends this one before it speaks
    print(f"error: {told.translate(UNSEEN)}", file=sys.stderr)
    return 2


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also on a CPU, where PyTorch has no error of its own for it, and beneath a failed capture."""
    if error is None:
        return False
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "DefaultCPUAllocator" in str(error) or is_out_of_memory(error.__context__)
