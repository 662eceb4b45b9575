"""All weights in place of an adapter: --full, the full fine-tuning that the paper compares with.

The model still has two sets of weights, the base's and those that are trained; lora.adapter_off
puts the base's in place, so that all that asks base and adapter asks these two in the same way.

They are trained in float32: a step of 1e-5 is lost in the 8 significant bits of a bfloat16. With
the gradient and both moments of AdamW that is 16 bytes a weight, beside the base's own. What comes
out is a plain checkpoint in the run folder.

Left out: sharding, NF4, going on from an earlier run. Source: GenPI C.4 (batch 64, rate 1e-5).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from checkpoint import check_weights, weight_files

CONFIG = "config.json"  # the last file of the checkpoint that is written
OF_AN_ADAPTER = ("rank", "alpha", "dropout", "earlier")


def free_weights(model: nn.Module) -> None:
    """Make every weight trainable, in float32, and keep the base's."""
    keep_base(model)
    for p in model.parameters():
        p.data = p.data.to(torch.float32, copy=True)
        p.requires_grad = True


def keep_base(model: nn.Module) -> None:
    """Note the weights that the model has now as its base's."""
    model.base_weights = {name: p.data for name, p in model.named_parameters()}


@contextmanager
def base_back(model: nn.Module) -> Iterator[None]:
    """Put the base's weights in place for a block, if all weights were trained; then put them back.

    The base's are taken off the model meanwhile, so that a block inside changes nothing.
    """
    other = vars(model).pop("base_weights", {})

    def swap():
        for name, weight in other.items():
            p = model.get_parameter(name)
            p.data, other[name] = weight, p.data

    swap()
    try:
        yield
    finally:
        swap()
        if other:
            model.base_weights = other


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a base model the trained weights in a run folder; its own are kept as the base's.

    Raises: ValueError, before the model is changed, if the file is damaged or does not fit.
    """
    named = dict(model.named_parameters())
    files = weight_files(folder)
    check_weights(files, {name: tuple(p.shape) for name, p in named.items()})
    if not hasattr(model, "base_weights"):
        keep_base(model)
    with safe_open(files[0], framework="pt") as tensors:
        for name, p in named.items():
            p.data = tensors.get_tensor(name).to(model.base_weights[name])


def check_flags(bits: int, said: dict) -> None:
    """Raise ValueError for what --full cannot do. said: the flags that are given."""
    if bits == 4:
        raise ValueError("--full trains all weights, which --bits 4 freezes in NF4; give --bits 16")
    for name in OF_AN_ADAPTER:
        if name in said:
            flag = "--from" if name == "earlier" else f"--{name}"
            raise ValueError(
                f"{flag} {said[name]} is of an adapter, --full has none; leave one out"
            )
