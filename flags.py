"""What a flag may be: types for argparse, each with its limits, whose complaints are one line."""

import argparse
import math
import re

import torch


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


WHOLE = number(int, 1)
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
