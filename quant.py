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

On a CPU that saves no time, only memory; so where memory is plenty W stays unpacked (keep_dense).
On CUDA two Triton kernels do the unpacking. What they move to and from memory for 16-bit x, in
bytes a weight, beside x, y and the partial sums of y:

    up to MAX_ROWS rows    _multiply_kernel    codes in, tensor cores                 0.52
    more rows, dx          _unpack_kernel      codes in, W out, and PyTorch's         0.52 + 2 + 2
                                               matmul (cuBLAS) reads it

Left out: other block sizes, FP4, a gradient to W, bitsandbytes' file format.

Letters: N outputs, K inputs, n = N K weights, M rows of x.
"""

import os
from collections import namedtuple
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear import linear, matmul

try:  # comes with PyTorch's CUDA builds
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a second scale
TILE = 1 << 20  # weights handled at a time on the CPU: 4 MB of float32, which stays in the cache
DENSE_SHARE = 1 / 4  # of a machine's memory, which unpacked weights may take beside their codes
TINY = 1e-38  # stands in for the scale of an all-zero block

# The most rows of x for the kernel that never writes W; float32 has no tensor cores. NOT MEASURED:
# they follow from the instructions a weight in the loop compiled for sm_90 (6.5 for 16 rows, 9.7
# for 64). The crossing to the other kernel may lie elsewhere.
MAX_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}

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


@torch.no_grad()
def quantize_nf4(w: Tensor) -> NF4Weight:
    """Quantise a weight (N, K) of any floating type on the device where it lies.

    Raises: ValueError when a weight is inf or nan. Source: QLoRA §3.
    """
    packed = []
    scales = []
    for tile in w.reshape(-1).split(TILE):  # temporaries of a tile, not of the matrix
        code, tile_scale = _encode(_blocks(tile.float(), BLOCK), _levels(w.device))
        high, low = code.view(-1, 2).unbind(dim=1)
        packed.append((high << 4 | low)[: (tile.numel() + 1) // 2])
        scales.append(tile_scale)
    scale = torch.cat(scales)
    if not scale.isfinite().all():
        raise ValueError("a weight is inf or nan, NF4 takes finite numbers: check the checkpoint")
    mean = scale.mean()
    scale_code, scale_max = _encode(_blocks(scale - mean, SCALE_BLOCK), _scale_map(w.device))
    codes = scale_code.view(-1)[: len(scale)]
    return NF4Weight(torch.cat(packed), codes, scale_max, mean, tuple(w.shape), w.dtype)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """Cut (m,) into (ceil(m / size), size), the last block filled with zeros."""
    short = -flat.numel() % size
    return (F.pad(flat, (0, short)) if short else flat).view(-1, size)


def _encode(block: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Find argmin_j |block / scale - table_j| -> indices (m, size) uint8, scales (m,).

    The scale of a block is its largest |number|. In a sorted table entry j is the nearest to what
    lies between the middles j - 1 and j.
    """
    scale = block.abs().amax(dim=1)
    unit = block * (1 / scale.clamp(min=TINY))[:, None]  # in [-1, 1]
    middle = (table[:-1] + table[1:]) / 2
    return torch.bucketize(unit, middle, out_int32=True).to(torch.uint8), scale


def _decode_scales(q: NF4Weight) -> Tensor:
    """Undo the second quantisation -> the float32 scale of every block, (ceil(n / 64),)."""
    unit = _scale_map(q.scale_code.device).index_select(0, q.scale_code.int())
    scale = _blocks(unit, SCALE_BLOCK) * q.scale_max[:, None] + q.scale_mean
    return scale.view(-1)[: len(q.scale_code)]


def dequantize_by_definition(q: NF4Weight) -> Tensor:
    """Return the weight (N, K) that q stands for, in float32: a code's level times its scale."""
    codes = torch.stack((q.packed >> 4, q.packed & 15), dim=1).view(-1)
    code = codes[: prod(q.shape)].int()  # (n,); half of the last byte may be left over
    block = torch.arange(len(code), device=code.device) // BLOCK  # (n,)
    return (_levels(code.device)[code] * _decode_scales(q)[block]).view(q.shape)


def nf4_matmul_by_definition(x: Tensor, q: NF4Weight) -> Tensor:
    """Multiply x (..., K) by the transpose of a quantised W (N, K) -> (..., N), in x's dtype."""
    return F.linear(x, dequantize_by_definition(q).to(x.dtype))


# ------------------------------------------------------------------------- the same, fast, anywhere


@cache
def _pairs(device: torch.device) -> Tensor:
    """Pair the levels of every byte in one int64, (256,): twice as fast to fetch as rows of two."""
    byte = torch.arange(256, device=device)
    high_low = torch.stack((byte >> 4, byte & 15), dim=1)  # (256, 2)
    return _levels(device)[high_low].view(torch.int64).view(-1)


def _decode(packed: Tensor, scale: Tensor) -> Tensor:
    """Unpack bytes (m, 32) and scale each block by (m,) -> (m, 64) float32."""
    pairs = _pairs(packed.device).index_select(0, packed.view(-1).int())
    return pairs.view(torch.float32).view(-1, BLOCK).mul_(scale[:, None])


def dequantize_nf4(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight (N, K) that q stands for, rounded once to dtype (default: its old one).

    Same as dequantize_by_definition to the bit, without taking bytes apart.
    """
    if _has_kernels(q.packed.device):
        return _unpack(q, dtype or q.dtype)
    w = _decode(_blocks(q.packed, BLOCK // 2), _decode_scales(q))
    return w.view(-1)[: prod(q.shape)].view(q.shape).to(dtype or q.dtype)


def _multiply(x: Tensor, q: NF4Weight) -> Tensor:
    """Same as nf4_matmul_by_definition of rows x (M, K), without its gradient, by the best way.

    Never a view, for what a Function returns as one cannot be changed in place, as LoRA does.
    """
    n_out, k = q.shape
    whole = k % BLOCK == 0  # no block reaches from one row of W into the next
    if whole and _has_kernels(x.device) and 0 < len(x) <= MAX_ROWS.get(x.dtype, 0):
        return _multiply_codes(x, q)
    if whole and x.device.type == "cpu" and n_out * k > TILE:
        return _multiply_tiles(x, q)
    return matmul(x, dequantize_nf4(q, x.dtype).T)


def _multiply_tiles(x: Tensor, q: NF4Weight) -> Tensor:
    """Same as nf4_matmul_by_definition, without all of W: a few of its rows at a time.

    The first touch of fresh memory costs more than the unpacking: for one x and 4096 x 4096 weights
    tiles of rows took 11 ms, all of W 66 ms.
    """
    n_out, k = q.shape
    packed = q.packed.view(n_out, -1).split(TILE // k)  # K / 2 bytes a row
    scale = _decode_scales(q).view(n_out, -1).split(TILE // k)  # K / 64 scales a row
    tiles = (_decode(p, s.reshape(-1)).view(-1, k) for p, s in zip(packed, scale, strict=True))
    return torch.cat([linear(x, w.to(x.dtype)) for w in tiles], dim=-1)


class _NF4Matmul(torch.autograd.Function):
    """Same as nf4_matmul_by_definition, without keeping W for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, q: NF4Weight) -> Tensor:
        ctx.q = q
        return _multiply(x, q)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return matmul(dy, dequantize_nf4(ctx.q, dy.dtype)), None


def nf4_matmul(x: Tensor, q: NF4Weight) -> Tensor:
    """Multiply x (..., K) by the transpose of a quantised W (N, K) -> (..., N), in x's dtype."""
    rows = x.reshape(prod(x.shape[:-1]), x.size(-1))
    return _NF4Matmul.apply(rows, q).view(*x.shape[:-1], q.shape[0])


class NF4Linear(nn.Module):
    """A frozen linear layer on an NF4Weight and maybe a plain bias (N,): x (..., K) -> (..., N).

    dense: the weight (N, K) that the codes stand for, where keep_dense has put it, or None.
    """

    def __init__(self, q: NF4Weight, bias: nn.Parameter | None = None):
        super().__init__()
        self.bias = bias
        self.dense: Tensor | None = None
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
        if self.dense is not None and self.dense.dtype == x.dtype:
            return linear(x, self.dense, self.bias)
        y = nf4_matmul(x, self.nf4)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn, recurse: bool = True):
        """Follow .to(device), but not .to(dtype) or .half(): rounded scales would be other ones."""
        exact = self.scale_max, self.scale_mean
        super()._apply(fn, recurse)
        self.scale_max, self.scale_mean = (t.to(self.packed.device) for t in exact)
        self.dense = None
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.dense = None  # it was that of other codes


def keep_dense(model: nn.Module) -> None:
    """On a CPU, keep beside the codes what they stand for, if that takes a part of its memory only.

    Same as without it, but W is not unpacked anew for every product, which is most of the time of
    one with a few rows. The limit is one of the machine, not of what is free just now, so that the
    same run is computed in the same way again.
    """
    layers = [m for m in model.modules() if isinstance(m, NF4Linear) and not m.packed.is_cuda]
    size = sum(m.out_features * m.in_features * m.dtype.itemsize for m in layers)
    if size <= DENSE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        for layer in layers:
            layer.dense = dequantize_nf4(layer.nf4)


# -------------------------------------------------------------------------------- the same, on CUDA


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and triton is not None


# What a kernel has to know of a weight: the codes and the two tables they point into.
_Pointers = namedtuple("_Pointers", "packed scale_code scale_max scale_mean levels scale_map")


def _pointers(q: NF4Weight) -> _Pointers:
    tables = (_levels(q.packed.device), _scale_map(q.packed.device))
    return _Pointers(q.packed, q.scale_code, q.scale_max, q.scale_mean, *tables)


def _unpack(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Same as dequantize_by_definition, rounded once to any floating type."""
    w = q.packed.new_empty(*q.shape, dtype=dtype)
    grid = (triton.cdiv(w.numel(), BLOCK * UNPACK_BLOCKS),)
    sizes = (w.numel(), q.packed.numel())
    # a * b + c in one instruction is rounded once, in PyTorch's _decode_scales twice
    _unpack_kernel[grid](_pointers(q), w, *sizes, num_warps=1, enable_fp_fusion=False)
    return w


def _multiply_codes(x: Tensor, q: NF4Weight) -> Tensor:
    """Same as nf4_matmul_by_definition for 1 to 64 rows x (M, K), K a multiple of 64, without W."""
    n_out, k = q.shape
    x = x.contiguous()
    tiles = triton.cdiv(n_out, OUTPUTS)
    cuts = max(1, PROGRAMS // tiles)  # of K
    per_part = max(PART_BLOCKS, triton.cdiv(k // BLOCK, cuts))
    parts = triton.cdiv(k // BLOCK, per_part)
    shape = (len(x), n_out)
    y = x.new_empty(*shape) if parts == 1 else x.new_empty(parts, *shape, dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(len(x)))  # tensor cores take 16 rows at a time
    sizes = (len(x), n_out, k, padded, per_part)
    _multiply_kernel[tiles, parts](_pointers(q), x, y, *sizes, num_warps=1)
    return y if parts == 1 else y.sum(dim=0).to(x.dtype)


# Every program below is one warp: then tl.gather, which looks 16 levels up, is one shuffle between
# its lanes, each of which holds a level; among several warps it would go through shared memory.
UNPACK_BLOCKS = 32  # of 64 weights: 32 bytes of codes for each lane, two loads of 16
OUTPUTS = 32  # rows of W in a program of _multiply_kernel
PROGRAMS = 1024  # if N is small, cut K until they are about 8 for each of 132 multiprocessors
PART_BLOCKS = 4  # but not finer: a part's sums are written and read again, 8 bytes a row and output

if triton is not None:
    _BLOCK = tl.constexpr(BLOCK)
    _BYTES = tl.constexpr(BLOCK // 2)  # of the codes of a block
    _SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
    _UNPACK_BLOCKS = tl.constexpr(UNPACK_BLOCKS)
    _OUTPUTS = tl.constexpr(OUTPUTS)

    @triton.jit
    def _scales(q, block, there):
        """Undo the second quantisation for the blocks with these numbers, where `there` is set."""
        code = tl.load(q.scale_code + block, there, other=0)
        most = tl.load(q.scale_max + block // _SCALE_BLOCK, there, other=0)
        return tl.load(q.scale_map + code) * most + tl.load(q.scale_mean)

    @triton.jit
    def _lookup(q, byte, dtype: tl.constexpr):
        """Turn bytes (m, 32) into the levels (m, 64) that they stand for, not yet scaled."""
        levels = tl.load(q.levels + tl.arange(0, 16)).to(dtype)
        code = tl.reshape(tl.join(byte >> 4, byte & 15), (byte.numel * 2,))  # earlier in high half
        return tl.reshape(tl.gather(levels, code.to(tl.int32), 0), (byte.shape[0], _BLOCK))

    @triton.jit
    def _unpack_kernel(q, w_ptr, n, n_bytes):
        """Write w (n,), flat, of any floating type: a program unpacks UNPACK_BLOCKS blocks of 64.

        A lane takes 16 bytes at a time: 32 neighbours to write. The last block may be a short one.
        """
        first = tl.program_id(0).to(tl.int64) * _UNPACK_BLOCKS
        block = first + tl.arange(0, _UNPACK_BLOCKS)
        at = first * _BYTES + tl.arange(0, _UNPACK_BLOCKS * _BYTES)
        byte = tl.load(q.packed + at, at < n_bytes, other=0)
        level = _lookup(q, tl.reshape(byte, (_UNPACK_BLOCKS, _BYTES)), tl.float32)
        w = level * _scales(q, block, block * _BLOCK < n)[:, None]
        to = first * _BLOCK + tl.arange(0, _UNPACK_BLOCKS * _BLOCK)
        flat = tl.reshape(w, (_UNPACK_BLOCKS * _BLOCK,)).to(w_ptr.dtype.element_ty)
        tl.store(w_ptr + to, flat, to < n)

    @triton.jit(do_not_specialize=["rows"])
    def _multiply_kernel(
        q, x_ptr, y_ptr, rows, n_out, K: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr
    ):
        """y (parts, rows, n_out) = x (rows, K) W^T for rows <= M on tensor cores.

        A program does OUTPUTS outputs over BLOCKS blocks of 64 inputs; the caller adds up the
        parts. Levels are rounded to x's type, which costs what rounding W to it costs; the sum over
        a block is then scaled in float32, which is less work than scaling each weight. Outputs past
        the last repeat the last one and are not stored; inputs past K are zeros.
        """
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        stages: tl.constexpr = 1 if dtype == tl.float32 else 2  # 2: loads the next during this one
        part = tl.program_id(1)
        n = tl.program_id(0) * _OUTPUTS + tl.arange(0, _OUTPUTS)
        m = tl.arange(0, M)[:, None]
        row = tl.minimum(n, n_out - 1).to(tl.int64)
        y = tl.zeros((M, _OUTPUTS), tl.float32)
        for i in tl.range(0, BLOCKS, num_stages=stages):
            b = part * BLOCKS + i
            block = row * (K // _BLOCK) + tl.minimum(b, K // _BLOCK - 1)
            at = block[:, None] * _BYTES + tl.arange(0, _BYTES)[None, :]
            level = _lookup(q, tl.load(q.packed + at), dtype)  # (OUTPUTS, 64)
            k = b * _BLOCK + tl.arange(0, _BLOCK)[None, :]
            x = tl.load(x_ptr + m * K + k, (m < rows) & (k < K), other=0)  # (M, 64)
            products = tl.dot(x, tl.trans(level), input_precision="ieee")
            y += products * _scales(q, block, block >= 0)[None, :]
        to = y_ptr + part * rows * n_out + m * n_out + n[None, :]
        tl.store(to, y.to(y_ptr.dtype.element_ty), (m < rows) & (n < n_out)[None, :])
