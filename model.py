"""LLaMA: the forward pass, its key/value cache, checkpoint loading, and the chat format.

One block, on x (B, T, D):

    h = x + Wo attention(R(Wq n(x)), R(Wk n(x)), Wv n(x))           n(x) = w * x / rms(x)
    y = h + Wdown (silu(Wgate n(h)) * Wup n(h))
    attention(q, k, v) = softmax(q k^T / sqrt(hd) + causal mask) v
    R turns the pair (x_i, x_{i + hd/2}) at position m by the angle m * theta^(-2i / hd)

The cache keeps the keys and values of earlier tokens, so that a new token costs a pass over itself
only. A prefix that all rows of a batch share is stored, and read, once. Modules bear the names of
Hugging Face's checkpoints: a file loads strictly and with no renaming. What load_model returns is
frozen; only an adapter trains.

A conversation becomes token ids in one of five published chat formats, written down as data below
and tested against the models' own templates. encode() returns with every id the message that wrote
it, so that ids and loss mask cannot drift apart.

Left out: sliding windows, biases, RoPE scalings other than linear and llama3, mixtures of experts,
checkpoints that are quantised already, tool calls, Jinja. Two departures from templates, because an
adapter must mean the same on every day and in every turn: where one asks for today's date (Llama
3.2) its fallback date stands, and where one moves the system text to the last user turn (Mistral
v3) it stays in the first.

Letters: B rows, T new tokens, D width, H heads, K key/value heads, G = H / K, hd head width, S own
keys in sight, P tokens of the shared prefix, L layers, V vocabulary.

Source: LLaMA (arXiv 2302.13971), RoFormer (2104.09864), GQA (2305.13245), and for the shared prefix
Hydragen (2402.05099).
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quant import NF4Linear, quantize_nf4

# ----------------------------------------------------------------------------------------- shape

SUPPORTED = {  # field of config.json: the values that this file can run, first the default
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"]),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
ROPE_TYPES = {  # rope_type: the fields that it needs
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
}


@dataclass(frozen=True)
class Config:
    """The shape of a model, with the field names of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ..., ...}

    @classmethod
    def from_dict(cls, d: dict) -> "Config":
        """Read a parsed config.json.

        Raises: ValueError with the field and the value that are missing or not supported.
        """
        refuse_unsupported(d)
        heads, rope = d["num_attention_heads"], rope_parameters(d)
        derived = {"num_key_value_heads": heads, "head_dim": d["hidden_size"] // heads}
        given = {name: d[name] for name in cls.__dataclass_fields__ if d.get(name) is not None}
        config = cls(**derived | given | rope)
        if heads % config.num_key_value_heads:
            kv_heads = config.num_key_value_heads
            raise ValueError(f"config.json: {kv_heads} key/value heads do not divide {heads} heads")
        return config


def refuse_unsupported(d: dict) -> None:
    """Raise ValueError if a parsed config.json lacks a size or asks for what is left out here."""
    if d.get("architectures") == ["MistralForCausalLM"]:
        d = {"sliding_window": 4096} | d  # what it means if the field is not there
    for field, values in SUPPORTED.items():
        value = d.get(field, values[0])
        if value not in values:
            names = " or ".join(map(str, values))
            raise ValueError(f"config.json: {field} = {value} is not supported, only {names}")
    for field in list(Config.__dataclass_fields__)[:8]:
        optional = field not in list(Config.__dataclass_fields__)[:5] and d.get(field) is None
        if not optional and not (isinstance(d.get(field), int) and d[field] > 0):
            raise ValueError(f"config.json: {field} = {d.get(field)}, a positive integer is needed")
    if d.get("rms_norm_eps") is not None:
        require_positive("rms_norm_eps", d["rms_norm_eps"])


def require_positive(field: str, value) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {field} = {value}, a positive number is needed")


def rope_parameters(d: dict) -> dict:
    """rope_theta and rope_scaling of a config.json, as transformers 4 writes them, or 5.

    Raises: ValueError for a kind or a number that cannot be.
    """
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_scaling = {rope}, an object is needed")
    rope = dict(rope)
    kind = rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope_type = {kind} is not supported, only {[*ROPE_TYPES]}")
    for field in ROPE_TYPES[kind].split():
        if field not in rope:
            raise ValueError(f"config.json: rope_type = {kind} needs {field}, which is not there")
        require_positive(field, rope[field])
    theta = rope.get("rope_theta") or d.get("rope_theta") or Config.rope_theta
    require_positive("rope_theta", theta)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}


# ----------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of B rows; row b holds lengths[b] valid tokens behind the shared prefix.

    k, v     (L, B, K, length, hd), allocated once
    lengths  (B,) int64 on the device
    bound    no row holds more. It lies on the host, so that the keys can be cut without waiting
             for the device; who knows a smaller one may set it
    prefix   a filled cache of one row, which every row sees before its own tokens, or None
    """

    def __init__(self, config: Config, batch: int, length: int, device, dtype, prefix=None):
        assert prefix is None or (len(prefix.lengths) == 1 and prefix.prefix is None)
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        # zeros, not empty: what the mask hides gets weight 0, but 0 * nan would be nan
        self.k = torch.zeros(config.num_hidden_layers, *shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int64)
        self.bound = 0
        self.prefix = prefix

    def advance(self, n: int | list[int]) -> None:
        """Declare valid what a forward pass wrote: n tokens in every row, or n[b] in row b."""
        self.bound += n if isinstance(n, int) else max(n)
        self.lengths += n if isinstance(n, int) else torch.tensor(n, device=self.lengths.device)

    def keep(self, rows: list[int]) -> None:
        """Drop every row but these: the batch shrinks as conversations end."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.k, self.v, self.lengths = self.k[:, index], self.v[:, index], self.lengths[index]

    def put(self, rows: list[int], other: "KVCache") -> None:
        """Overwrite these rows with another cache's: a free slot takes a new conversation."""
        index, n = torch.tensor(rows, device=self.lengths.device), other.bound
        self.k[:, index, :, :n] = other.k[:, :, :, :n]
        self.v[:, index, :, :n] = other.v[:, :, :, :n]
        self.lengths[index] = other.lengths
        self.bound = max(self.bound, other.bound)


# ----------------------------------------------------------------------------------------- model

PREFILL = 2048  # tokens of a prefix that are read in one pass; bounds its attention scores


def rope_frequencies(config: Config) -> Tensor:
    """Radians a position by which each pair of dimensions turns, (hd / 2,).

    Source: RoFormer Eq. 15; `llama3` is the scaling of Llama 3.1's release.
    """
    pair = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32)
    frequency = config.rope_theta ** -(pair / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    slow = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    # llama3: what turns high_freq_factor times or more within the old context stays, what turns
    # low_freq_factor times or less is slowed down, between the two it is interpolated
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * slow


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + hd/2}) of x (B, H, T, hd); sin is signed, see Decoder.rope."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


@dataclass
class Step:
    """What all layers of one forward pass share."""

    cos: Tensor  # (T, hd), or (B, 1, T, hd) with a cache
    sin: Tensor
    cache: KVCache | None = None
    places: tuple[Tensor, Tensor] | None = None  # rows (B, 1) and positions (B, T) in the cache
    mask: Tensor | None = None  # (B, 1, G*T, S) of 0 and -inf; None is plain causal


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, hd) over k, v (B, K, T, hd) -> (B, H, T, hd)."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, step: Step, layer: int) -> Tensor:
    """Write the new k, v into the cache, then attend to all that it holds; shapes as above."""
    cache, (rows, positions) = step.cache, step.places
    keys, values = cache.k[layer], cache.v[layer]  # (B, K, length, hd)
    keys[rows, :, positions] = k.transpose(1, 2)
    values[rows, :, positions] = v.transpose(1, 2)
    if step.mask is None:  # nothing stood before these tokens
        return causal_attention(q, k, v)
    S = step.mask.size(-1)
    keys, values = keys[:, :, :S], values[:, :, :S]
    # the G heads of one key head are G*T queries to the same keys: no key is repeated
    queries = q.reshape(q.size(0), k.size(1), -1, q.size(-1))  # (B, K, G*T, hd)
    if cache.prefix is None:
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=step.mask)
    else:
        y = prefix_attention(queries, keys, values, step.mask, cache.prefix, layer)
    return y.reshape(q.shape)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix: KVCache, layer: int
) -> Tensor:
    """q (B, K, Q, hd) over the shared prefix and, under the mask, own k, v (B, K, S, hd).

    The scores on the prefix are ONE product a key head, (B*Q, hd) @ (hd, P), with the batch folded
    into the queries. Row by row it would be B thin products that each read the P keys again, and
    reading keys is what generation waits for; a copy a row would cost B times the memory. One
    softmax over both parts makes it plain attention.
    """
    B, K, Q, hd = q.shape
    P, S = prefix.bound, k.size(2)
    prefix_k, prefix_v = prefix.k[layer, 0, :, :P], prefix.v[layer, 0, :, :P]  # (K, P, hd)
    q = q * hd**-0.5
    folded = q.transpose(0, 1).reshape(K, B * Q, hd)
    shared = (folded @ prefix_k.transpose(1, 2)).view(K, B, Q, P).transpose(0, 1)
    own = q @ k.transpose(2, 3) + mask  # (B, K, Q, S)
    shared, own = torch.cat((shared, own), -1).softmax(-1).split((P, S), -1)
    folded = shared.transpose(0, 1).reshape(K, B * Q, P) @ prefix_v
    return folded.view(K, B, Q, hd).transpose(0, 1) + own @ v


class RMSNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, T, hd)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        if step.cache is None:
            y = causal_attention(q, k, v)
        else:
            y = cached_attention(q, k, v, step, self.layer)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        h = x + self.self_attn(self.input_layernorm(x), step)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """Embedding, blocks and last norm: all but the projection to the vocabulary."""

    def __init__(self, config: Config):
        super().__init__()
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (..., hd) at positions (...). The first half of sin is negative, which makes
        x cos + roll(x) sin = (x1 cos - x2 sin, x2 cos + x1 sin) three operations."""
        angle = positions[..., None] * self.frequencies  # float32, large positions need its digits
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def step(self, T: int, cache: KVCache | None, dtype: torch.dtype) -> Step:
        """Lay out T new tokens a row: positions, and with a cache their places and the mask."""
        new = torch.arange(T, device=self.frequencies.device)
        if cache is None:
            return Step(*self.rope(new, dtype))
        P, S = cache.prefix.bound if cache.prefix else 0, cache.bound + T
        assert S <= cache.k.size(3), f"{S} tokens in a cache of {cache.k.size(3)}"
        positions = cache.lengths[:, None] + new  # (B, T), counted from the end of the prefix
        rows = torch.arange(len(positions), device=new.device)[:, None]
        mask = None
        if P or S > T:
            ahead = torch.arange(S, device=new.device) > positions[:, None, :, None]
            mask = torch.zeros_like(ahead, dtype=dtype).masked_fill_(ahead, -torch.inf)
            mask = mask.repeat(1, 1, self.groups, 1)  # (B, 1, G*T, S)
        return Step(*self.rope(P + positions[:, None], dtype), cache, (rows, positions), mask)


class Llama(nn.Module):
    """A causal language model: ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: forget what is inside a block and compute it again
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or (N, V) at the N places where the mask at (B, T) is true.

        Without a cache each row is a text from its start, and padding on the right needs no mask:
        nobody looks ahead. With a cache the tokens of row b continue its text at position
        P + lengths[b]. The caller then advances the cache by the number of REAL tokens of each row;
        what padding wrote is never seen, and the next pass overwrites it.
        """
        return self.lm_head(self.hidden(ids, cache, at))

    def hidden(
        self, ids: Tensor, cache: KVCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        """The same without lm_head: what it reads, (B, T, D) or (N, D)."""
        x = self.model.embed_tokens(ids)  # (B, T, D)
        step = self.model.step(ids.size(1), cache, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, step, use_reentrant=False)
            else:
                x = layer(x, step)
        return self.model.norm(x if at is None else x[at])


@torch.no_grad()
def prefill(model: Llama, ids: list[int]) -> KVCache:
    """Read ids into a cache of one row, for use as the prefix of others."""
    embedding = model.model.embed_tokens.weight
    cache = KVCache(model.config, 1, len(ids), embedding.device, embedding.dtype)
    for part in torch.tensor([ids], device=embedding.device).split(PREFILL, dim=1):
        model.hidden(part, cache)
        cache.advance(part.size(1))
    return cache


# --------------------------------------------------------------------------------------- loading

FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja "
    "special_tokens_map.json *.safetensors *.safetensors.index.json"
).split()
IGNORED = ["*/*", "consolidated*"]  # the same weights once more, in another layout


def load_model(
    path_or_id: str | Path, device="cpu", dtype: torch.dtype | None = None, bits: int = 16
) -> tuple[Llama, "Chat"]:
    """Load a checkpoint folder or Hub id, frozen, in evaluation mode.

    dtype: None is bfloat16 on CUDA and float32 elsewhere. bits = 4 turns the linear layers of the
    blocks into NF4 as they arrive, so that the host never holds more than one tensor of the file.

    Raises: ValueError, in one line, for whatever is missing, malformed or not supported.
    """
    if bits not in (4, 16):
        raise ValueError(f"bits = {bits} is not supported, only 4 or 16")
    folder, device = find_folder(str(path_or_id)), torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = Config.from_dict(read_json(folder / "config.json"))
    chat = Chat(folder, config.max_position_embeddings)
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    files, shapes = weight_files(folder), expected_shapes(model)
    check_weights(files, shapes, config.tie_word_embeddings)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in filter(shapes.__contains__, tensors.keys()):
                set_weight(model, name, tensors.get_tensor(name).to(device, dtype, copy=True), bits)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval(), chat


def find_folder(path_or_id: str) -> Path:
    """The folder of a checkpoint; a Hub id is downloaded into Hugging Face's cache first.

    Raises: ValueError, with the cure, for what is neither or cannot be downloaded.
    """
    folder = Path(os.path.expanduser(path_or_id))
    if path_or_id and folder.is_dir():
        return folder
    owner_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id)
    if not owner_name or "--" in path_or_id or ".." in path_or_id:
        raise ValueError(f"{path_or_id}: no such folder, and no Hub id, which is owner/name")
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=FILES, ignore_patterns=IGNORED))
    except GatedRepoError:
        cure = "accept its licence on huggingface.co, then `hf auth login` or set HF_TOKEN"
    except RepositoryNotFoundError:
        cure = "check the name on huggingface.co; if private, `hf auth login` or set HF_TOKEN"
    except Exception as error:  # its text may hold a token or signed address, its type says enough
        cure = f"{type(error).__name__}, check the network or pass a local checkpoint folder"
    raise ValueError(f"{path_or_id}: no folder here, and not downloaded: {cure}")


def read_json(path: Path, optional: bool = False) -> dict:
    """Parse a file that holds a JSON object (else ValueError); {} if optional and not there."""
    if not path.is_file():
        if optional:
            return {}
        raise ValueError(f"{path.parent}: no {path.name}, so this is not a whole checkpoint")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed, or not UTF-8
        raise ValueError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: holds a {type(parsed).__name__}, a JSON object is needed")
    return parsed


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the index names, or the only one; ValueError if one is missing."""
    index = read_json(folder / "model.safetensors.index.json", optional=True).get("weight_map", {})
    if not isinstance(index, dict):
        raise ValueError(f"{folder}: weight_map in model.safetensors.index.json is damaged")
    names = sorted({str(name) for name in index.values()}) or ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            why = "which model.safetensors.index.json names" if index else "the only kind read"
            raise ValueError(f"{folder}: no {name}, {why}; download it again")
    return [folder / name for name in names]


def expected_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the checkpoint must hold."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_weights(files: list[Path], shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Raise ValueError where the files' headers differ from the shapes; no tensor is read yet."""
    found, folder = {}, files[0].parent
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut short ({error}); download it again") from None
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(f"{folder}: the weights lack the tensor {name}")
        if found[name] != shape:
            raise ValueError(f"{folder}: {name} is {found[name]}, config.json says {shape}")
    for name in sorted(found.keys() - shapes.keys()):
        # old files bring the rotary frequencies, some tied ones the embedding once more
        if not (name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")):
            raise ValueError(f"{folder}: unexpected tensor {name}, so this is no plain LLaMA")


def set_weight(model: Llama, name: str, weight: Tensor, bits: int) -> None:
    """Put a frozen weight in its place, as NF4 if bits = 4 and it is a linear layer of a block.

    Raises: ValueError if a number of it is not finite.
    """
    if not weight.isfinite().all():
        raise ValueError(f"{name} is not finite in the checkpoint; download it again")
    path = name.removesuffix(".weight")
    module = model.get_submodule(path)
    if bits == 4 and isinstance(module, nn.Linear) and module is not model.lm_head:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear(quantize_nf4(weight)))
    else:
        module.weight = nn.Parameter(weight, requires_grad=False)


# ------------------------------------------------------------------------------------------ chat

ROLES = ("system", "user", "assistant")
CUT = None  # between two texts that are tokenised apart
Piece = tuple[str | int | None, int]  # text, control token or CUT; the message that wrote it or -1


class Turn(NamedTuple):
    """How a message stands in a conversation."""

    header: str  # before it, nobody's words
    written: str  # what its author writes, end of turn included; {} is the content
    footer: str = ""  # behind it, nobody's words


@dataclass(frozen=True)
class Format:
    """A chat format. Control tokens of the vocabulary become one id wherever its strings name them,
    <bos> and <eos> stand for the two that every checkpoint names itself; the rest is text."""

    name: str
    turns: dict[str, Turn]  # if "system" is not there, that text goes into the first user turn
    begin: str = ""
    trimmed: tuple[str, ...] = ()  # roles whose content loses the white space around it
    system: str | None = None  # the system text of a conversation without one
    preamble: str = ""  # opens every system text
    fold: tuple[str, str] = ("", "\n\n")  # around a system text in the first user turn


def each_role(header: str, written: str, footer: str = "") -> dict[str, Turn]:
    return {role: Turn(header.replace("ROLE", role), written, footer) for role in ROLES}


def llama3(template: str) -> Format:
    """Llama 3. From 3.1 on there always is a system turn, and it opens with two dates."""
    system, dates = None, ""
    if "Cutting Knowledge Date" in template:
        system, dates = "", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    turns = each_role("<|start_header_id|>ROLE<|end_header_id|>\n\n", "{}<|eot_id|>")
    return Format("llama-3", turns, "<bos>", ROLES, system, dates)


def chatml(template: str) -> Format:
    """ChatML, with the default system text that some templates spell out."""
    default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]*)<\|im_end\|>", template)
    turns = each_role("<|im_start|>ROLE\n", "{}<|im_end|>", "\n")
    begin = "<bos>" if "bos_token" in template else ""
    return Format("chatml", turns, begin, system=default and default[1])


def zephyr(template: str) -> Format:
    return Format("zephyr", each_role("<|ROLE|>\n", "{}<eos>", "\n"))


def llama2(template: str) -> Format:
    turns = {"user": Turn("<bos>[INST] ", "{}", " [/INST]"), "assistant": Turn("", " {} <eos>")}
    fold = ("<<SYS>>\n", "\n<</SYS>>\n\n")
    return Format("llama-2", turns, trimmed=("user", "assistant"), fold=fold)


def mistral(template: str) -> Format:
    """Mistral. Its releases differ in white space, which is read off the template (v3 if none)."""
    header = re.search(r"""['"]( ?\[INST\] ?)['"]""", template)
    footer = re.search(r"""['"]( ?\[/INST\])['"]""", template)
    reply = re.search(r"""(['"] ['"] \+ )?message\[.content.\](\|trim)? \+ eos_token""", template)
    user = Turn(header[1] if header else "[INST] ", "{}", footer[1] if footer else "[/INST]")
    assistant = Turn("", "{}<eos>" if reply and not reply[1] else " {}<eos>")
    trimmed = ("assistant",) if reply and reply[2] else ()
    return Format("mistral", {"user": user, "assistant": assistant}, "<bos>", trimmed)


FORMATS = (  # a format, and its marks in the template (in the vocabulary, if there is no template)
    (llama3, "<|start_header_id|>"),
    (chatml, "<|im_start|>"),
    (zephyr, "<|user|> <|assistant|> eos_token"),
    (llama2, "[INST] <<SYS>>"),
    (mistral, "[INST]"),
)


class Chat:
    """Tokenizer and chat format of a checkpoint.

    tokenizer  a tokenizers.Tokenizer, to which the names of control tokens are text like any other
    control    name -> id of the control tokens
    format     name of the chat format; style is the format itself
    bos        id of the begin-of-text token, None in a format without one
    stops      ids that end a reply
    context    how many tokens the model can read
    """

    def __init__(self, folder: str | Path, context: int):
        folder, self.context = Path(folder), context
        parsed = read_json(folder / "tokenizer.json")
        settings = read_json(folder / "special_tokens_map.json", optional=True)
        settings |= read_json(folder / "tokenizer_config.json", optional=True)
        try:
            self.control = control_tokens(parsed, settings)
        except (KeyError, TypeError, AttributeError):
            told = f"{folder / 'tokenizer.json'}: added_tokens are damaged; download it again"
            raise ValueError(told) from None
        self.space, self.spaced = take_space(parsed)
        self.tokenizer = build_tokenizer(parsed, folder)
        self.names = re.compile(f"({'|'.join(map(re.escape, self.control))})")
        self.style = recognise(read_template(folder, settings), self.control, folder)
        self.format = self.style.name
        opening = self.style.begin + self.style.turns["user"].header
        self.bos = self.control["<bos>"] if "<bos>" in opening else None
        written = self.split(self.style.turns["assistant"].written, -1)
        self.stops = {what for what, _ in written if isinstance(what, int)}
        eos = read_json(folder / "generation_config.json", optional=True).get("eos_token_id") or []
        self.stops.update(eos if isinstance(eos, list) else [eos])

    def encode(self, messages: list[dict], reply: bool = False) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation and, for each, the index of the message that wrote it.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...]. A message wrote
        its content and its end of turn; headers have owner -1. reply = True adds the header after
        which the assistant writes.

        Raises: ValueError for roles, or an order of roles, that the format does not know.
        """
        check_roles([message["role"] for message in messages], "system" in self.style.turns)
        pairs, fresh = [], True  # fresh: the next text comes first, or after a control token
        pieces = self.pieces(messages, reply)
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece[0], str)):
            if is_text:
                pairs += self.encode_run(list(group), fresh, first=not pairs)
            else:
                controls = [piece for piece in group if piece[0] is not CUT]
                pairs, fresh = pairs + controls, bool(controls)
        return [i for i, _ in pairs], [who for _, who in pairs]

    def tokens(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return [i for i, _ in self.encode_run([(text, -1)], fresh=True, first=True)]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pieces(self, messages: list[dict], reply: bool) -> Iterator[Piece]:
        """Yield a conversation as it stands before tokenisation."""
        style, turns = self.style, list(enumerate(messages))
        before = [(style.preamble, -1)]
        if messages[0]["role"] == "system" and "system" not in style.turns:
            _, system = turns.pop(0)
            before = [(style.fold[0], -1), (system["content"], 0), (style.fold[1], -1)]
        elif messages[0]["role"] != "system" and style.system is not None:
            turns.insert(0, (-1, {"role": "system", "content": style.system}))
        yield from self.split(style.begin, -1)
        for index, message in turns:
            yield from self.turn(message, index, before)
            before = []
        if reply:
            yield from self.split(style.turns["assistant"].header, -1)

    def turn(self, message: dict, index: int, before: list[Piece]) -> Iterator[Piece]:
        """Yield the pieces of one message, with texts that open its content."""
        role, content = message["role"], message["content"]
        header, written, footer = self.style.turns[role]
        start, end = written.split("{}")
        if role in self.style.trimmed:
            # templates strip a user turn as a whole, where a folded system text shields the left
            folded = role == "user" and len(before) > 1
            content = content.rstrip() if folded else content.strip()
        yield from self.split(header, -1)
        if role == "assistant":
            yield CUT, -1  # as at generation, where the header is given and the reply is not
        yield from self.split(start, index)
        yield from (*before, (content, index))
        yield from self.split(end, index)
        yield from self.split(footer, -1)

    def split(self, text: str, who: int) -> Iterator[Piece]:
        """Yield the texts and control tokens in a string of the format."""
        for part in filter(None, self.names.split(text)):
            yield self.control.get(part, part), who

    def encode_run(self, run: list[Piece], fresh: bool, first: bool) -> list[tuple[int, int]]:
        """Tokenise texts as ONE; a token's owner is that of its last letter."""
        text = "".join(part for part, _ in run)
        space = self.leading_space(text, first) if fresh and text else ""
        owners = [-1] * len(space) + [who for part, who in run for _ in part]
        encoding = self.tokenizer.encode(space + text, add_special_tokens=False)
        ends = (end for _, end in encoding.offsets)
        return [(i, owners[end - 1]) for i, end in zip(encoding.ids, ends, strict=True)]

    def leading_space(self, text: str, first: bool) -> str:
        """The space that belongs before a text, by the rule that take_space found."""
        if self.spaced == "first" and not first:
            return ""
        if self.spaced != "every" and text.startswith((" ", self.space)):
            return ""
        return self.space


def check_roles(roles: list[str], any_order: bool) -> None:
    """Raise ValueError unless there are roles, all known, and alternating where it matters."""
    unknown = set(roles) - set(ROLES)
    if unknown or not roles:
        raise ValueError(
            f"roles {roles}: at least one is needed, and only {', '.join(ROLES)} exist"
        )
    turns = roles[roles[0] == "system" :]
    alternating = (["user", "assistant"] * len(roles))[: len(turns)]
    if not any_order and (not turns or turns != alternating):
        raise ValueError(f"roles {roles}: this format needs [system] user assistant user ...")


def control_tokens(parsed: dict, settings: dict) -> dict[str, int]:
    """Name -> id of the control tokens of a parsed tokenizer.json, with <bos> and <eos>."""
    added = parsed.get("added_tokens") or []
    for token in added:  # some fine-tuned models do not flag what they added
        token["special"] |= bool(re.fullmatch(r"<\|\w+\|>", token["content"]))
    control = {token["content"]: token["id"] for token in added if token["special"]}
    for slot, usual in (("bos", "<|begin_of_text|>"), ("eos", "</s>")):
        name = settings.get(f"{slot}_token") or usual
        name = name["content"] if isinstance(name, dict) else name
        if name in control:
            control[f"<{slot}>"] = control[name]
    return control


def take_space(parsed: dict) -> tuple[str, str]:
    """Take the rule that puts a space before text out of a parsed tokenizer.json, and return it.

    SentencePiece's kind of tokenizer reads "hello" as " hello" where a text begins. A reply whose
    header was tokenised apart must not gain a space, so we add it ourselves: always ("every"),
    where no space is yet ("missing"), or that only at the start of a conversation ("first").
    """
    space, rule = "", "every"
    for slot, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        outer = parsed.get(slot) or {}
        for part in outer.get(inner, [outer]):
            if part.get("type") == "Prepend":
                space, part["prepend"] = part["prepend"], ""
            elif part.get("type") == "Metaspace":
                scheme, part["prepend_scheme"] = part.get("prepend_scheme", "always"), "never"
                if scheme != "never":
                    space, rule = part["replacement"], {"first": "first"}.get(scheme, "missing")
            elif part.get("type") == "ByteLevel" and part["add_prefix_space"]:
                space, rule, part["add_prefix_space"] = " ", "missing", False
    return space, rule


def build_tokenizer(parsed: dict, folder: Path) -> Tokenizer:
    """Build a tokenizer that neither adds control tokens nor finds them in text."""
    parsed = parsed | {"truncation": None, "padding": None}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(parsed))
    except Exception as error:  # tokenizers has no narrower type
        raise ValueError(f"{folder}: damaged tokenizer.json ({error}); download it again") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_template(folder: Path, settings: dict) -> str:
    """The Jinja chat template of a checkpoint, "" if it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8; download it again") from None
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several with names
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    return template


def recognise(template: str, control: dict[str, int], folder: Path) -> Format:
    """The format of a template, or of a vocabulary if there is no template.

    Raises: ValueError for a format that is not known, or whose control tokens are not there.
    """
    marked = template or " ".join(control)
    known = (make for make, marks in FORMATS if all(mark in marked for mark in marks.split()))
    make = next(known, None)
    if make is None:
        names = ", ".join(make("").name for make, _ in FORMATS)
        raise ValueError(f"{folder}: the chat format is none of those known: {names}")
    style = make(template)
    strings = style.begin + "".join("".join(turn) for turn in style.turns.values())
    for name in re.findall(r"<bos>|<eos>|<\|\w+\|>", strings):
        if name not in control and name.strip("<|>") not in ROLES:  # Zephyr's headers are text
            raise ValueError(f"{folder}: the tokenizer lacks {name}, which {style.name} chats need")
    return style
