"""NF4 with double quantisation: a frozen weight in 4.127 bits, and the matmul that trains past it.

QLoRA (arXiv 2305.14314, section 3). A weight W (N, K) is read as one flat row of n = N K numbers
and cut into blocks of 64. With a = max |w| over its block, a number is stored as the index of the
nearest of 16 levels:

    c = argmin_j |w / a - level_j|,           w ~ level_c * a

The levels are quantiles of N(0, 1), since trained weights look normal: zero, 7 negative and 8
positive ones, so that all of them are in use. A float32 scale a would cost half a bit a weight, so
the scales are quantised too (section 3, "double quantization"): less their mean m, in blocks of 256
with b = max |a - m|, to the nearest of 256 values of a dynamic 8-bit map:

    d = argmin_j |(a - m) / b - map_j|,       a ~ map_d * b + m

Memory, in bits a weight (each matrix adds one float32 for m; the last block may be a short one):

    packed        uint8     c, two to a byte, the earlier in the high half     4
    scale_code    uint8     d, one for 64 weights                              8 / 64     = 0.125
    scale_max     float32   b, one for 64 * 256 weights                        32 / 16384 = 0.002
                                                                                            4.127

Codes, scales and packing are those of bitsandbytes. The matmul unpacks W once in the forward pass
and once more in the backward pass; in between only the codes exist:

    y = x W^T,        dx = dy W,        nothing for W

Left out: other block sizes, FP4, a gradient to W, bitsandbytes' file format.

Letters: N outputs, K inputs, n = N K weights.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a second scale
TILE = 1 << 20  # weights handled at a time on the CPU: 4 MB of float32, which stays in the cache
TINY = 1e-38  # stands in for the scale of an all-zero block

# With tail = 1 - (1/30 + 1/32) / 2 = 0.9677083, the positive levels are the normal quantiles of 8
# even steps of probability from 1/2 to the tail, the negative ones those of 7 steps, mirrored; all
# are divided by the quantile of the tail itself.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4Weight:
    """A quantised weight (N, K), laid out as the head of this file says."""

    packed: Tensor  # (ceil(n / 2),) uint8
    scale_code: Tensor  # (ceil(n / 64),) uint8
    scale_max: Tensor  # (ceil(n / 64 / 256),) float32
    scale_mean: Tensor  # () float32
    shape: tuple[int, int]  # (N, K)
    dtype: torch.dtype  # what the weight was stored in before


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)  # (16,)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return both levels of every byte, (256,): two float32 side by side in one int64.

    To the look-up an entry is one number, which is twice as fast as fetching rows of two.
    """
    byte = torch.arange(256, device=device)
    high_low = torch.stack((byte >> 4, byte & 15), dim=1)  # (256, 2)
    return _levels(device)[high_low].view(torch.int64).view(-1)


@cache
def _scale_map(device: torch.device) -> Tensor:
    """Return the dynamic 8-bit map, (256,), sorted in [-1, 1].

    Seven decades up to 1 on either side; each has twice the values of the one below it, midpoints
    of even steps. Zero and one complete it. Source: 8-bit Optimizers (arXiv 2110.02861).
    """
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)  # (2^i,) in 10^(i-7)..10^(i-6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """Cut (m,) into (ceil(m / size), size), the last block filled with zeros."""
    short = -flat.numel() % size
    return (F.pad(flat, (0, short)) if short else flat).view(-1, size)


def _encode(block: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Round blocks (m, size) to a sorted table -> indices (m, size) uint8, scales (m,)."""
    scale = block.abs().amax(dim=1)
    unit = block * (1 / scale.clamp(min=TINY))[:, None]  # in [-1, 1]
    middle = (table[:-1] + table[1:]) / 2  # x lies nearest to entry j between middles j-1 and j
    return torch.bucketize(unit, middle, out_int32=True).to(torch.uint8), scale


@torch.no_grad()
def quantize_nf4(w: Tensor) -> NF4Weight:
    """Quantise a weight (N, K) of any floating type on the device where it lies.

    Raises: ValueError when a weight is inf or nan. Source: QLoRA §3.
    """
    bytes_, scales = [], []
    for tile in w.reshape(-1).split(TILE):  # temporaries of a tile, not of the matrix
        code, scale = _encode(_blocks(tile.float(), BLOCK), _levels(w.device))
        high, low = code.view(-1, 2).unbind(dim=1)
        bytes_.append((high << 4 | low)[: (tile.numel() + 1) // 2])
        scales.append(scale)
    scale = torch.cat(scales)
    if not scale.isfinite().all():
        raise ValueError("a weight is inf or nan, NF4 takes finite numbers: check the checkpoint")
    mean = scale.mean()
    code, most = _encode(_blocks(scale - mean, SCALE_BLOCK), _scale_map(w.device))
    code = code.view(-1)[: scale.numel()]
    return NF4Weight(torch.cat(bytes_), code, most, mean, tuple(w.shape), w.dtype)


def _decode_scales(q: NF4Weight) -> Tensor:
    """Undo the second quantisation -> the float32 scale of every block, (ceil(n / 64),)."""
    value = _scale_map(q.scale_code.device).index_select(0, q.scale_code.int())
    value = _blocks(value, SCALE_BLOCK) * q.scale_max[:, None] + q.scale_mean
    return value.view(-1)[: q.scale_code.numel()]


def _decode(packed: Tensor, scale: Tensor) -> Tensor:
    """Unpack bytes (m, 32) and scale each block by (m,) -> (m, 64) float32."""
    pairs = _pairs(packed.device).index_select(0, packed.view(-1).int())
    return pairs.view(torch.float32).view(-1, BLOCK).mul_(scale[:, None])


def dequantize_nf4(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight (N, K) that q stands for, rounded once to dtype (default: its old one)."""
    w = _decode(_blocks(q.packed, BLOCK // 2), _decode_scales(q))
    return w.view(-1)[: prod(q.shape)].view(q.shape).to(dtype or q.dtype)


def _multiply(x: Tensor, q: NF4Weight) -> Tensor:
    """y = x W^T without a gradient: x (..., K) -> (..., N).

    On a CPU a large W is never unpacked as a whole: the first touch of fresh memory costs more than
    the unpacking. For one x and 4096 x 4096 weights tiles of rows took 11 ms, all of W 66 ms.
    """
    (n_out, k), rows = q.shape, TILE // q.shape[1]
    if x.device.type != "cpu" or n_out <= rows or k % BLOCK:
        return F.linear(x, dequantize_nf4(q, x.dtype))
    packed = q.packed.view(n_out, -1).split(rows)  # K / 2 bytes a row
    scale = _decode_scales(q).view(n_out, -1).split(rows)  # K / 64 scales a row
    tiles = (_decode(p, s.reshape(-1)).view(-1, k) for p, s in zip(packed, scale, strict=True))
    return torch.cat([F.linear(x, w.to(x.dtype)) for w in tiles], dim=-1)


class _NF4Matmul(torch.autograd.Function):
    """y = x W^T that keeps q, not W, for its backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, q: NF4Weight) -> Tensor:
        ctx.q = q
        return _multiply(x, q)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ dequantize_nf4(ctx.q, dy.dtype), None


def nf4_matmul(x: Tensor, q: NF4Weight) -> Tensor:
    """Multiply x (..., K) by the transpose of a quantised W (N, K) -> (..., N), in x's dtype."""
    return _NF4Matmul.apply(x, q)


class NF4Linear(nn.Module):
    """A frozen linear layer without bias on an NF4Weight: x (..., K) -> (..., N)."""

    def __init__(self, q: NF4Weight):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.dtype = q.dtype
        for name in ("packed", "scale_code", "scale_max", "scale_mean"):
            self.register_buffer(name, getattr(q, name))

    @property
    def nf4(self) -> NF4Weight:
        """The weight in the form that nf4_matmul and dequantize_nf4 take."""
        buffers = self.packed, self.scale_code, self.scale_max, self.scale_mean
        return NF4Weight(*buffers, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nf4_matmul(x, self.nf4)

    def _apply(self, fn, recurse: bool = True):
        """Follow .to(device), but not .to(dtype) or .half(): rounded scales would be other ones."""
        exact = self.scale_max, self.scale_mean
        super()._apply(fn, recurse)
        self.scale_max, self.scale_mean = (t.to(self.packed.device) for t in exact)
        return self
