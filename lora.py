"""LoRA: the small trainable adapter into which the prompt is internalised.

LoRA (arXiv 2106.09685, section 4.1), on all seven linear layers of a block as in QLoRA. The weight
W (N, K) is frozen, plain or NF4, and gets a correction of rank R:

    y = W x + alpha / R * B A dropout(x),     A (R, K) ~ kaiming uniform,     B (N, R) = 0

so that an untrained adapter changes nothing. Since the correction is a sum it can be switched off
(one set of weights serves as teacher and as student) or folded in: W + alpha / R * B A.

An adapter is a folder in the format of Hugging Face PEFT, which PEFT and vLLM load as it is:

    adapter_model.safetensors    base_model.model.<module>.lora_A.weight and ...lora_B.weight in
                                 float32; the metadata hold the adapter's own name
    adapter_config.json          rank, alpha, dropout, target modules, base model

Left out: LoRA on embeddings and norms, DoRA, rsLoRA, ranks that differ between layers, several
adapters at a time. Nothing here knows the model's class: layers are found by their names.

Letters: N outputs, K inputs, R rank.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from files import read_json, replacing, write_json
from full import base_back
from linear import Linear, add_linear_, linear
from quant import NF4Linear, dequantize_nf4

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's wrappers around the model, part of every name in the file
COMPARED = {"r": int, "lora_alpha": float, "target_modules": list[str]}  # by load_adapter
READ = {"lora_dropout": float, "peft_type": str}
FIXED = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
               "modules_to_save", "lora_bias")  # fmt: skip
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
          "special_tokens_map.json", "chat_template.json", "chat_template.jinja")  # fmt: skip


class LoRALinear(nn.Module):
    """A frozen linear layer plus its low-rank correction: x (..., K) -> (..., N)."""

    def __init__(self, base: nn.Linear | NF4Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.enabled = True
        device = next(iter(base.state_dict().values())).device
        # float32 on any base: steps of 1e-4 are lost in the 8 significant bits of a bfloat16
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=device))
        self.reset()

    def reset(self) -> None:
        """Draw A anew, and set B to 0: the layer is its base again."""
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)  # U(-1/sqrt K, 1/sqrt K), as in PEFT
        nn.init.zeros_(self.lora_B)

    def by_definition(self, x: Tensor) -> Tensor:
        """y = W x + alpha / R * B A dropout(x)."""
        kept = F.dropout(x, self.dropout, self.training)
        low = F.linear(kept, self.lora_A.to(x.dtype))  # (..., R)
        return self.base(x) + self.alpha / self.rank * F.linear(low, self.lora_B.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Same as by_definition, with B A x added in place to W x; W x alone if not enabled."""
        if not self.enabled:
            return self.base(x)
        rows = x.reshape(-1, self.in_features)
        kept, share = drop(rows, self.dropout) if self.training else (rows, 1.0)
        scale = self.alpha / self.rank / share
        # what is cast is the lesser: a single row of x, or A and B
        dtype = self.lora_A.dtype if len(rows) == 1 else x.dtype
        low = linear(kept.to(dtype), self.lora_A.to(dtype)) * scale  # (rows, R)
        y = add_linear_(self.base(rows), low, self.lora_B.to(dtype))
        return y.view(*x.shape[:-1], self.out_features)


def drop(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Set each number of x to 0 with probability p -> x, and the factor that its mean has lost.

    Same as F.dropout, without a draw for each number, which on a CPU takes as long as a matmul with
    576 x 576 weights. The distances between the zeros are drawn, by the inverse of the geometric
    distribution: at p = 0.05 that is one draw for 20 numbers.
    """
    if x.device.type != "cpu" or p == 0:
        return F.dropout(x, p), 1.0
    n = x.numel()
    enough = int(n * p + 10 * (n * p * (1 - p)) ** 0.5 + 20)  # zeros, by ten standard deviations
    distance = torch.rand(enough).neg_().log1p_().div_(math.log1p(-p)).long() + 1
    place = distance.cumsum(0) - 1
    return x.flatten().index_fill(0, place[place < n], 0).view(x.shape), 1 - p


def add_lora(
    model: nn.Module, rank: int = 16, alpha: float = 32, dropout: float = 0.05, targets=TARGETS
) -> nn.Module:
    """Freeze the model, put LoRA around each linear layer whose name ends in a target, return it.

    A is drawn from torch's global random state. Raises: ValueError for values that cannot work.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: take one as load_model returns it")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is outside [0, 1): the paper's code takes 0.05")
    check_rank(model, rank, targets)
    model.requires_grad_(False)
    for name, layer in _target_layers(model, targets).items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout).train(layer.training))
    return model


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Make the model its own base inside a `with` block; afterwards each layer is as it was."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        with base_back(model):
            yield
    finally:
        for layer in layers:
            layer.enabled = True


def reset_adapter(model: nn.Module) -> None:
    """Make the adapter a fresh one, the same as add_lora's from the same random state."""
    for layer in lora_layers(model).values():
        layer.reset()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """List the LoRA layers by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List A and B of every LoRA layer: all that is trained."""
    return list(_adapter(model).values())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """List what is trained: A and B of every LoRA layer, or with --full all weights."""
    return adapter_parameters(model) or list(model.parameters())


def _adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B by its name in the file."""
    named = model.named_parameters()
    return {f"{PREFIX}{n}.weight": p for n, p in named if n.endswith(("lora_A", "lora_B"))}


def _target_layers(model: nn.Module, targets: Collection[str]) -> dict[str, nn.Module]:
    kinds = (nn.Linear, NF4Linear, LoRALinear)
    named = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in targets}
    return {n: m for n, m in named.items() if isinstance(m, kinds)}


def check_rank(model: nn.Module, rank: int, targets=TARGETS) -> None:
    """Raise ValueError if no layer is a target, or one is too small for the rank."""
    layers = _target_layers(model, targets).items()
    if not layers:
        raise ValueError(f"the model has no linear layer named {targets}: pass a LLaMA-like model")
    side, name = min((min(m.in_features, m.out_features), name) for name, m in layers)
    if not 1 <= rank <= side:
        raise ValueError(f"rank {rank} is outside 1..{side}, the smaller side of {name}: lower it")


# ------------------------------------------------------------------------------------------- merge


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Make every LoRA and NF4 layer a plain nn.Linear with the adapter folded in; return the model.

    In place, and doing it twice changes nothing.
    """
    for name, layer in reversed(list(model.named_modules())):  # a layer's base before the layer
        if isinstance(layer, NF4Linear):
            plain = Linear(layer.in_features, layer.out_features, device="meta")
            plain.weight = nn.Parameter(dequantize_nf4(layer.nf4), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
        elif isinstance(layer, LoRALinear):
            weight = layer.base.weight
            delta = layer.alpha / layer.rank * layer.lora_B @ layer.lora_A  # (N, K)
            weight.copy_(weight.float() + delta)  # added in float32, rounded once
            model.set_submodule(name, layer.base)
    return model


def save_dense(model: nn.Module, folder: str | Path, source: str | Path) -> None:
    """Write a model as a plain checkpoint, its adapter and NF4 layers merged if it has any.

    source: the base's own folder, whose config and tokenizer files go with it. Raises: ValueError,
    before the model is changed, when source is no checkpoint or is folder.
    """
    folder = Path(folder)
    source = Path(source)
    config = _source_config(folder, source)
    merge(model)
    folder.mkdir(parents=True, exist_ok=True)
    # A shared parameter is listed once, so a tied lm_head is left out, as its format asks for.
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    for name in COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    with replacing(folder / "model.safetensors") as beside:
        save_file(weights, beside, {"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    dtypes = dict.fromkeys(config.keys() & {"torch_dtype", "dtype"}, dtype)
    write_json(folder / "config.json", config | dtypes)


def _source_config(folder: Path, source: Path) -> dict:
    if not (file := source / "config.json").is_file():
        raise ValueError(f"source {source} has no config.json: give the base checkpoint's folder")
    if folder.resolve() == source.resolve():
        raise ValueError(f"folder {folder} is the base checkpoint itself: choose another folder")
    return read_json(file, "give the base checkpoint's folder")


# ------------------------------------------------------------------------------------ save and load


def save_adapter(
    model: nn.Module, folder: str | Path, base_model: str | None = None, name: str | None = None
) -> str:
    """Write the adapter in PEFT's format and return its name.

    `base_model` is the path or id of the checkpoint that it belongs to. The default name is made
    from a hash of the content: two adapters behind one server never share it.
    """
    weights = {key: p.detach().float().cpu().contiguous() for key, p in _adapter(model).items()}
    if not weights:
        raise ValueError("the model has no LoRA layers to save: call add_lora first")
    config = _settings(model) | {"base_model_name_or_path": base_model} | FIXED
    name = name or _content_name(config, weights)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as beside:
        save_file(weights, beside, {"name": name})  # of several entries the order would be random
    write_json(folder / CONFIG, config)
    return name


def _settings(model: nn.Module) -> dict:
    """What decides an adapter's effect in training beside its weights, named as in the file."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "lora_dropout": first.dropout,
    }


def _content_name(config: dict, weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].numpy().tobytes())
    return f"genpi-{digest.hexdigest()[:12]}"


def load_adapter(model: nn.Module, folder: str | Path, base_model: str | None = None) -> str:
    """Load an adapter of ours or PEFT's, adding LoRA layers where there are none; return its name.

    Raises: ValueError, before the model is changed, for files that are missing or damaged and for
    an adapter of another base model (if one is given), rank, alpha, target or shape.
    """
    config, weights, name = _read(Path(folder))
    if misfits := _misfits(model, config, weights, base_model):
        raise ValueError(f"the adapter in {folder} does not fit: {'; '.join(misfits)}")
    if not lora_layers(model):
        settings = ("r", "lora_alpha", "lora_dropout", "target_modules")
        add_lora(model, *(config[name] for name in settings))
    with torch.no_grad():
        for key, parameter in _adapter(model).items():
            parameter.copy_(weights[key])
    return name


@contextmanager
def adapter_of(model: nn.Module, folder: str | Path) -> Iterator[None]:
    """Give the model another adapter inside a `with` block; afterwards it has its own again.

    Raises: ValueError as load_adapter does, and if the model has none.
    """
    if not lora_layers(model):
        raise ValueError(f"no place for the adapter of {folder}: the model has none of its own")
    own = {key: parameter.detach().clone() for key, parameter in _adapter(model).items()}
    load_adapter(model, folder)
    try:
        yield
    finally:
        with torch.no_grad():
            for key, parameter in _adapter(model).items():
                parameter.copy_(own[key])


def _read(folder: Path) -> tuple[dict, dict[str, Tensor], str]:
    """Read a folder -> config, weights by their names in the file, name of the adapter."""
    try:
        config = read_json(folder / CONFIG, "an adapter needs it", COMPARED | READ)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}
            name = (file.metadata() or {}).get("name", folder.name)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no whole adapter in {folder} ({reason}): save it again") from None
    if config["peft_type"] != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {config['peft_type']} is no LORA")
    for key, weight in weights.items():
        if not (weight.is_floating_point() and torch.isfinite(weight.float()).all()):
            raise ValueError(f"{folder / WEIGHTS}: {key} ({weight.dtype}) holds no finite numbers")
    return config | {"target_modules": sorted(config["target_modules"])}, weights, name


def _misfits(
    model: nn.Module, config: dict, weights: dict[str, Tensor], base_model: str | None
) -> list[str]:
    """Say in words where adapter and model differ; nothing when they fit."""
    told = [f"{key} is not supported" for key in UNSUPPORTED if config.get(key)]
    base = config.get("base_model_name_or_path")
    if base and base_model and Path(base).resolve() != Path(base_model).resolve():
        told.append(f"it belongs to {base}, the base model is {base_model}")
    ours = _settings(model) if lora_layers(model) else config  # a bare model takes any settings
    in_file = {key: config[key] for key in COMPARED}
    in_model = {key: ours[key] for key in COMPARED}
    in_file |= {key: tuple(weight.shape) for key, weight in weights.items()}
    for name, layer in _target_layers(model, ours["target_modules"]).items():
        in_model[f"{PREFIX}{name}.lora_A.weight"] = (ours["r"], layer.in_features)
        in_model[f"{PREFIX}{name}.lora_B.weight"] = (layer.out_features, ours["r"])
    differing = [key for key in in_file | in_model if in_file.get(key) != in_model.get(key)]
    for key in differing[:3]:  # of hundreds, if the rank is another
        told.append(f"{key} is {in_file.get(key)} in the file, {in_model.get(key)} in the model")
    return told
