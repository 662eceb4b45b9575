"""Which elements of a page a small model held to be worth choosing: Mind2Web's file of ranks.

    {"ranks": {step: {element: place from 0 on}}, "scores": ...}     step = task id _ action id

The file is a pickle, scores_all_data.pkl, and a pickle can run any code. Hence it is read by a
reader that knows containers and numbers alone, and whatever else a file names is refused. A
scores_all_data.json with the same content does as well.
"""

import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np

from files import read_json

NAME = "scores_all_data"
CURE = f"download {NAME}.pkl of Mind2Web again"

NUMPY = {
    "scalar": np.float32(0).__reduce__()[0],  # makes a number of a dtype and bytes
    "_reconstruct": np.zeros(1).__reduce__()[0],  # makes an empty array, which bytes then fill
}


def latin1(text: str, name: str) -> bytes:
    """How an old pickle spells the bytes of a number."""
    return text.encode("latin1")


KNOWN = {
    ("_codecs", "encode"): latin1,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    **{("builtins", kind.__name__): kind for kind in (dict, list, set, int, float)},
    **{("numpy", kind.__name__): kind for kind in (np.dtype, np.ndarray)},
    **{("numpy.core.multiarray", name): make for name, make in NUMPY.items()},
    **{("numpy._core.multiarray", name): make for name, make in NUMPY.items()},
}


class Reader(pickle.Unpickler):
    """A reader of pickles that makes containers and numbers, and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no number")
        return KNOWN[module, name]


def find_ranks(folder: Path) -> Path:
    """The file of ranks, in a folder or beside it. Raises: ValueError if there is none."""
    for place in (folder, folder.resolve().parent):
        for ending in (".json", ".pkl"):
            if (path := place / (NAME + ending)).is_file():
                return path
    raise ValueError(f"{folder}: no {NAME}.pkl in it or beside it; download it with Mind2Web")


def read_ranks(path: Path) -> dict[str, dict]:
    """step -> element -> place. Raises: ValueError if the file is damaged or another."""
    found = read_json(path, CURE) if path.suffix == ".json" else read_pickle(path)
    ranks = found.get("ranks") if isinstance(found, dict) else None
    if not isinstance(ranks, dict):
        raise ValueError(f"{path}: has no ranks; {CURE}")
    return ranks


def read_pickle(path: Path) -> object:
    """What a pickle holds, if that is containers and numbers. Raises: ValueError if it is not."""
    try:
        with open(path, "rb") as file:
            return Reader(file).load()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {CURE}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: cannot be read ({error}); {CURE}") from None
