"""LLaMA: the forward pass, its key/value cache, and checkpoint loading.

One block, on x (B, T, D):

    h = x + Wo attention(R(Wq n(x)), R(Wk n(x)), Wv n(x))           n(x) = w * x / rms(x)
    y = h + Wdown (silu(Wgate n(h)) * Wup n(h))
    attention(q, k, v) = softmax(q k^T / sqrt(hd) + causal mask) v
    R turns the pair (x_i, x_{i + hd/2}) at position m by the angle m * theta^(-2i / hd)

The cache keeps the keys and values of earlier tokens, so that a new token costs a pass over itself
only. A prefix that all rows of a batch share is stored, and read, once. Modules bear the names of
Hugging Face's checkpoints: a file loads strictly and with no renaming. What load_model returns is
frozen; only an adapter trains.

Two families differ from LLaMA in one thing each: Qwen2 adds a bias to q, k and v, and Qwen3 divides
q and k by their rms, head by head, before R.

Left out: sliding windows, other biases, RoPE scalings other than linear and llama3, mixtures of
experts, checkpoints that are quantised already.

Letters: B rows, T new tokens, D width, H heads, K key/value heads, G = H / K, hd head width, S own
keys in sight, P tokens of the shared prefix, L layers, V vocabulary.

Source: LLaMA (arXiv 2302.13971), RoFormer (2104.09864), GQA (2305.13245), and for the shared prefix
Hydragen (2402.05099).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from attention import causal_attention, prefix_attention
from chat import Chat
from checkpoint import CURE, check_config, check_weights, find_folder, set_fields, weight_files
from files import read_json
from linear import Linear
from quant import NF4Linear, keep_dense, quantize_nf4

# ------------------------------------------------------------------------------------------ shape


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
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ..., ...}

    @classmethod
    def from_dict(cls, d: dict) -> "Config":
        """Read a parsed config.json. Raises: ValueError for a field missing or not supported."""
        fields = set_fields(d)
        check_config(fields)
        heads = fields["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": fields["hidden_size"] // heads}
        known = derived | fields
        return cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})


# ------------------------------------------------------------------------- attention with a cache


@dataclass
class Layout:
    """Where the tokens of one forward pass stand: what all layers share."""

    cos: Tensor  # (T, hd), or (B, 1, T, hd) with a cache
    sin: Tensor
    cache: "KVCache | None" = None
    rows: Tensor | None = None  # (B, 1) and
    positions: Tensor | None = None  # (B, T): places of the new tokens in the cache
    mask: Tensor | None = None  # (B, 1, G*T, S) of 0 and -inf; None is plain causal


def cached_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int) -> Tensor:
    """Write the new k, v (B, K, T, hd) into the cache, then attend to all that it holds.

    Same as attention_by_definition over each row's whole text, without its earlier keys and values
    being computed again.
    """
    cache = layout.cache
    cache.k[layer][layout.rows, :, layout.positions] = k.transpose(1, 2)
    cache.v[layer][layout.rows, :, layout.positions] = v.transpose(1, 2)
    if layout.mask is None:  # nothing stood before these tokens
        return causal_attention(q, k, v)
    S = layout.mask.size(-1)
    keys = cache.k[layer, :, :, :S]  # (B, K, S, hd)
    values = cache.v[layer, :, :, :S]
    # the G heads of one key head are G*T queries to the same keys: no key is repeated
    queries = q.reshape(q.size(0), k.size(1), -1, q.size(-1))  # (B, K, G*T, hd)
    if cache.prefix is None:
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=layout.mask)
    else:
        P = cache.prefix.bound
        shared = (cache.prefix.k[layer, 0, :, :P], cache.prefix.v[layer, 0, :, :P])
        y = prefix_attention(queries, keys, values, layout.mask, *shared)
    return y.reshape(q.shape)


# ------------------------------------------------------------------------------------------ model


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
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * slow


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + hd/2}) of x (B, H, T, hd); sin is signed, see Decoder.rope.

    Same as cat(x1 cos - x2 sin, x2 cos + x1 sin) of the halves x1 and x2, in three operations.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_width, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, config.qkv_bias)
        self.o_proj = Linear(q_width, config.hidden_size, bias=False)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        q = rotate(self.q_norm(self.heads(self.q_proj(x))), layout.cos, layout.sin)
        k = rotate(self.k_norm(self.heads(self.k_proj(x))), layout.cos, layout.sin)
        v = self.heads(self.v_proj(x))
        cached = layout.cache is not None
        y = cached_attention(q, k, v, layout, self.layer) if cached else causal_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, T, hd)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        h = x + self.self_attn(self.input_layernorm(x), layout)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """Embedding, blocks and last norm: all but the projection to the vocabulary."""

    def __init__(self, config: Config):
        super().__init__()
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """Follow .to(device), but not .to(dtype): large positions need the digits of float32."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)
        return self

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (..., hd) at positions (...). The first half of sin is negative, which makes
        x cos + roll(x) sin = (x1 cos - x2 sin, x2 cos + x1 sin) three operations."""
        angle = positions[..., None] * self.frequencies
        cos = angle.cos().to(dtype)
        sin = angle.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def lay_out(self, T: int, cache: "KVCache | None", dtype: torch.dtype) -> Layout:
        """Place T new tokens a row: their angles, and with a cache their places and the mask."""
        new = torch.arange(T, device=self.frequencies.device)
        if cache is None:
            return Layout(*self.rope(new, dtype))
        P = cache.prefix.bound if cache.prefix else 0
        S = cache.bound + T
        assert S <= cache.k.size(3), f"{S} tokens in a cache of {cache.k.size(3)}"
        positions = cache.lengths[:, None] + new  # (B, T), counted from the end of the prefix
        rows = torch.arange(len(positions), device=new.device)[:, None]
        mask = None
        if P or S > T:
            ahead = torch.arange(S, device=new.device) > positions[:, None, :, None]
            mask = torch.zeros_like(ahead, dtype=dtype).masked_fill_(ahead, -torch.inf)
            mask = mask.repeat(1, 1, self.groups, 1)  # (B, 1, G*T, S)
        return Layout(*self.rope(P + positions[:, None], dtype), cache, rows, positions, mask)


class Llama(nn.Module):
    """A causal language model: ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: forget what is inside a block and compute it again
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, ids: Tensor, cache: "KVCache | None" = None, at: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or (N, V) at the N places where the mask at (B, T) is true.

        Without a cache each row is a text from its start, and padding on the right needs no mask:
        nobody looks ahead. With a cache the tokens of row b continue its text at position
        P + lengths[b]. The caller then advances the cache by the number of REAL tokens of each row;
        what padding wrote is never seen, and the next pass overwrites it.
        """
        return self.lm_head(self.hidden(ids, cache, at))

    def hidden(
        self, ids: Tensor, cache: "KVCache | None" = None, at: Tensor | None = None
    ) -> Tensor:
        """The same without lm_head: what it reads, (B, T, D) or (N, D)."""
        x = self.model.embed_tokens(ids)  # (B, T, D)
        layout = self.model.lay_out(ids.size(1), cache, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = recompute(layer, x, layout, use_reentrant=False)
            else:
                x = layer(x, layout)
        return self.model.norm(x if at is None else x[at])


# ------------------------------------------------------------------------------------------ cache

PREFILL = 2048  # tokens of a prefix that are read in one pass; bounds its attention scores


class KVCache:
    """Keys and values of B rows; row b holds lengths[b] valid tokens behind the shared prefix.

    k, v     (L, B, K, length, hd), allocated once
    lengths  (B,) int64 on the device
    bound    no row holds more. It lies on the host, so that the keys can be cut without waiting
             for the device; who knows a smaller one may set it
    prefix   a filled cache of one row, which every row sees before its own tokens, or None
    """

    def __init__(self, model: Llama, batch: int, length: int, prefix: "KVCache | None" = None):
        assert prefix is None or (len(prefix.lengths) == 1 and prefix.prefix is None)
        c = model.config
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim)
        # zeros, not empty: what the mask hides gets weight 0, but 0 * nan would be nan
        self.k = model.model.embed_tokens.weight.new_zeros(shape)  # its device and type
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(batch, device=self.k.device, dtype=torch.int64)
        self.bound = 0
        self.prefix = prefix

    def advance(self, n: int | list[int]) -> None:
        """Declare valid what a forward pass wrote: n tokens in every row, or n[b] in row b."""
        self.bound += n if isinstance(n, int) else max(n)
        self.lengths += n if isinstance(n, int) else torch.tensor(n, device=self.lengths.device)

    def keep(self, rows: list[int]) -> None:
        """Drop every row but these: the batch shrinks as conversations end."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.k = self.k[:, index]
        self.v = self.v[:, index]
        self.lengths = self.lengths[index]

    def put(self, rows: list[int], other: "KVCache") -> None:
        """Overwrite these rows with another cache's: a free slot takes a new conversation."""
        index = torch.tensor(rows, device=self.lengths.device)
        n = other.bound
        self.k[:, index, :, :n] = other.k[:, :, :, :n]
        self.v[:, index, :, :n] = other.v[:, :, :, :n]
        self.lengths[index] = other.lengths
        self.bound = max(self.bound, other.bound)


@torch.no_grad()
def prefill(model: Llama, ids: list[int]) -> KVCache:
    """Read ids into a cache of one row, for use as the prefix of others."""
    cache = KVCache(model, 1, len(ids))
    for part in torch.tensor([ids], device=cache.k.device).split(PREFILL, dim=1):
        model.hidden(part, cache)
        cache.advance(part.size(1))
    return cache


# --------------------------------------------------------------------------------------- loading


def load_model(
    path_or_id: str | Path, device="cpu", dtype: torch.dtype | None = None, bits: int = 16
) -> tuple[Llama, Chat]:
    """Load a checkpoint folder or Hub id, frozen, in evaluation mode.

    dtype: None is what default_dtype says. bits = 4 turns the linear layers of the
    blocks into NF4 as they arrive, so that the host never holds more than one tensor of the file;
    a CPU with room for it then keeps them unpacked, too (quant.keep_dense).

    Raises: ValueError, in one line, for whatever is missing, malformed or not supported.
    """
    if bits not in (4, 16):
        raise ValueError(f"bits = {bits} is not supported, only 4 or 16")
    folder = find_folder(str(path_or_id))
    device = torch.device(device)
    dtype = dtype or default_dtype(device)
    config, chat = read_shape(folder)
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    files = weight_files(folder)
    needed = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied: listed once
    check_weights(files, needed)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in filter(needed.__contains__, tensors.keys()):
                weight = tensors.get_tensor(name).to(device, dtype, copy=True)
                set_weight(model, name, weight, bits)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model = model.to(device).eval()
    if bits == 4:
        keep_dense(model)
    return model, chat


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 off CUDA; on it bfloat16, or float16 on a GPU that has no bfloat16 (T4, V100)."""
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def read_shape(folder: Path) -> tuple[Config, Chat]:
    """All of a checkpoint but its weights. Raises: ValueError as load_model does."""
    config = Config.from_dict(read_json(folder / "config.json", CURE))
    return config, Chat(folder, config.max_position_embeddings)


def set_weight(model: Llama, name: str, weight: Tensor, bits: int) -> None:
    """Put a frozen weight or bias in its place; the matrices of blocks as NF4 if bits = 4.

    Raises: ValueError if a number of it is not finite.
    """
    if not weight.isfinite().all():
        raise ValueError(f"{name} is not finite in the checkpoint; {CURE}")
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    matrix = kind == "weight" and isinstance(module, nn.Linear)
    if bits == 4 and matrix and module is not model.lm_head:
        model.set_submodule(path, NF4Linear(quantize_nf4(weight), module.bias))
    else:
        setattr(module, kind, nn.Parameter(weight, requires_grad=False))
