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

On CUDA three Triton kernels do the unpacking. What they move to and from memory for 16-bit x, in
bytes a weight, beside x, y and the partial sums of y in _tens_kernel:

    up to FEW rows      _few_kernel      codes in, sums in registers                   0.52
    up to TENS rows     _tens_kernel     codes in, tensor cores                        0.52
    more rows, dx       _unpack_kernel   codes in, W out to a scratch, and the         0.52 + 2 + 2
                                         matmul of PyTorch (cuBLAS) reads it

Left out: other block sizes, FP4, a gradient to W, bitsandbytes' file format, several CUDA streams.

Letters: N outputs, K inputs, n = N K weights, M rows of x.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:  # comes with PyTorch's CUDA builds
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a second scale
TILE = 1 << 20  # weights handled at a time on the CPU: 4 MB of float32, which stays in the cache
TINY = 1e-38  # stands in for the scale of an all-zero block

# The most rows of x for the CUDA kernels that never write W; float32 has no tensor cores. NOT YET
# MEASURED: they follow from the instructions a weight in the loops compiled for sm_90 (5.4 for 1
# row, 7.2 for 2, 11 for 4; 6.5 for 16 on tensor cores, 9.7 for 64). Crossings may lie elsewhere.
FEW = 2
TENS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}

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
    if _has_kernels(q.packed.device):
        return _unpack(q, q.packed.new_empty(q.shape, dtype=dtype or q.dtype))
    w = _decode(_blocks(q.packed, BLOCK // 2), _decode_scales(q))
    return w.view(-1)[: prod(q.shape)].view(q.shape).to(dtype or q.dtype)


def _multiply(x: Tensor, q: NF4Weight) -> Tensor:
    """y = x W^T without a gradient: x (..., K) -> (..., N).

    On a CPU a large W is never unpacked as a whole: the first touch of fresh memory costs more than
    the unpacking. For one x and 4096 x 4096 weights tiles of rows took 11 ms, all of W 66 ms.
    """
    if _has_kernels(x.device):
        return _multiply_on_cuda(x, q)
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
    @once_differentiable  # so that autograd cannot keep the scratch for a second derivative
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ _passing_weight(ctx.q, dy.dtype), None


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


# --------------------------------------------------------------------------------------------- CUDA


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and triton is not None


def _multiply_on_cuda(x: Tensor, q: NF4Weight) -> Tensor:
    """y = x W^T by the kernel for this number of rows: x (..., K) -> (..., N)."""
    rows, most = prod(x.shape[:-1]), TENS.get(x.dtype, 0)
    if 0 < rows <= most and q.shape[1] % BLOCK == 0:
        return _few_rows(x, q) if rows <= FEW else _tens_of_rows(x, q)
    return F.linear(x, _passing_weight(q, x.dtype))


_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _passing_weight(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Return W (N, K) for use at once: the next call may overwrite it. Never return or save it.

    On CUDA it lies in a scratch, one for each device and dtype, as large as the largest W so far.
    That is safe while one stream does all the work, as it runs its kernels in order. A CUDA graph
    keeps the addresses it was captured with, so it gets memory of its own from the graph's pool.
    """
    device, n = q.packed.device, prod(q.shape)
    if not _has_kernels(device) or torch.cuda.is_current_stream_capturing():
        return dequantize_nf4(q, dtype)
    flat = _scratch.get((device, dtype))
    if flat is None or flat.numel() < n:
        flat = _scratch[device, dtype] = torch.empty(n, dtype=dtype, device=device)
    return _unpack(q, flat[:n].view(q.shape))


class _Pointers(NamedTuple):
    """What a kernel has to know of a weight: the codes and the two tables they point into."""

    packed: Tensor
    scale_code: Tensor
    scale_max: Tensor
    scale_mean: Tensor
    levels: Tensor
    scale_map: Tensor


def _pointers(q: NF4Weight) -> _Pointers:
    tables = _levels(q.packed.device), _scale_map(q.packed.device)
    return _Pointers(q.packed, q.scale_code, q.scale_max, q.scale_mean, *tables)


def _unpack(q: NF4Weight, w: Tensor) -> Tensor:
    """Fill w (N, K), contiguous and of any floating type, with the weight that q stands for."""
    n = w.numel()
    grid = (triton.cdiv(n, BLOCK * UNPACK_BLOCKS),)
    # a * b + c in one instruction is rounded once, in PyTorch's _decode_scales twice
    sizes = n, q.packed.numel(), UNPACK_BLOCKS
    _unpack_kernel[grid](_pointers(q), w, *sizes, num_warps=1, enable_fp_fusion=False)
    return w


def _few_rows(x: Tensor, q: NF4Weight) -> Tensor:
    """y = x W^T for a few rows, K a multiple of 64: x (..., K) -> (..., N)."""
    n_out, k = q.shape
    x2, y = x.reshape(-1, k).contiguous(), x.new_empty(*x.shape[:-1], n_out)
    rows, chunk = len(x2), min(FEW_CHUNK, triton.next_power_of_2(k))
    _few_kernel[triton.cdiv(n_out, FEW_OUTPUTS),](
        _pointers(q), x2, y, rows, n_out, k, triton.next_power_of_2(rows), FEW_OUTPUTS, chunk,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _tens_of_rows(x: Tensor, q: NF4Weight) -> Tensor:
    """y = x W^T for 1 to 64 rows, K a multiple of 64: x (..., K) -> (..., N)."""
    (n_out, k), blocks = q.shape, q.shape[1] // BLOCK
    x2, tiles = x.reshape(-1, k).contiguous(), triton.cdiv(n_out, TENS_OUTPUTS)
    per_part = max(TENS_BLOCKS, triton.cdiv(blocks, max(1, TENS_PROGRAMS // tiles)))
    rows, parts = len(x2), triton.cdiv(blocks, per_part)
    y = x.new_empty(parts, rows, n_out, dtype=x.dtype if parts == 1 else torch.float32)
    _tens_kernel[tiles, parts](
        _pointers(q), x2, y, rows, n_out, k, max(16, triton.next_power_of_2(rows)), TENS_OUTPUTS,
        per_part, 1 if x.dtype == torch.float32 else 2, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return (y[0] if parts == 1 else y.sum(dim=0).to(x.dtype)).view(*x.shape[:-1], n_out)


# Every program below is one warp: then tl.gather, which looks 16 levels up, is one shuffle between
# its lanes, each of which holds a level; among several warps it would go through shared memory.
UNPACK_BLOCKS = 32  # of 64 weights: 32 bytes of codes for each lane, two loads of 16
FEW_OUTPUTS = 4  # rows of W in a program: that many times is a piece of x used
FEW_CHUNK = 1024  # inputs at a time: 16 bytes of codes for each lane and row of W, one load
TENS_OUTPUTS = 32  # rows of W in a program
TENS_PROGRAMS = 1024  # if N is small, cut K until they are about 8 for each of 132 multiprocessors
TENS_BLOCKS = 4  # but not finer: a part's sums are written and read again, 8 bytes a row and output

if triton is not None:
    _BLOCK, _SCALE_BLOCK = tl.constexpr(BLOCK), tl.constexpr(SCALE_BLOCK)

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
    def _unpack_kernel(q, w_ptr, n, n_bytes, BLOCKS: tl.constexpr):
        """Write w (n,), flat, of any floating type: a program unpacks BLOCKS blocks of 64.

        A lane takes 16 bytes at a time and so has 32 neighbours to write. The last block may be a
        short one, and the last byte half used.
        """
        first = tl.program_id(0).to(tl.int64) * BLOCKS
        block = first + tl.arange(0, BLOCKS)
        at = first * (_BLOCK // 2) + tl.arange(0, BLOCKS * _BLOCK // 2)
        byte = tl.load(q.packed + at, at < n_bytes, other=0)
        level = _lookup(q, tl.reshape(byte, (BLOCKS, _BLOCK // 2)), tl.float32)
        w = level * _scales(q, block, block * _BLOCK < n)[:, None]
        to = first * _BLOCK + tl.arange(0, BLOCKS * _BLOCK)
        w = tl.reshape(w, (BLOCKS * _BLOCK,)).to(w_ptr.dtype.element_ty)
        tl.store(w_ptr + to, w, to < n)

    @triton.jit
    def _eighths(x):
        """Deal (m, w, 2, 2, 2) out to eight (m, w): the one with a number has x[..., its bits]."""
        x0, x1 = tl.split(x)  # by the last bit
        x00, x10 = tl.split(x0)
        x01, x11 = tl.split(x1)
        x000, x100 = tl.split(x00)
        x010, x110 = tl.split(x10)
        x001, x101 = tl.split(x01)
        x011, x111 = tl.split(x11)
        return x000, x001, x010, x011, x100, x101, x110, x111

    @triton.jit(do_not_specialize=["rows"])
    def _few_kernel(
        q, x_ptr, y_ptr, rows, n_out,
        K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """y (rows, n_out) = x (rows, K) W^T for rows <= M: a program does N outputs, all of K.

        Bound by the bytes of W, if the work for a weight is a few instructions. So codes are read
        as words of 8, 4 words a lane, and the j-th code of all the words is looked up at a time:
        it meets the j-th of every 8 inputs. Sums of blocks, not weights, are scaled. Outputs past
        the last repeat the last one and are not stored; inputs past K are zeros.
        """
        word_ptr = q.packed.to(tl.pointer_type(tl.uint32))
        n = tl.program_id(0) * N + tl.arange(0, N)
        m = tl.arange(0, M)[:, None]
        row = tl.minimum(n, n_out - 1).to(tl.int64)[:, None]
        levels = tl.load(q.levels + tl.arange(0, 16))
        total = tl.zeros((M, N, CHUNK // _BLOCK), tl.float32)
        for start in tl.range(0, K, CHUNK, num_stages=2):  # loads the next chunk during this one
            at = start // 8 + tl.arange(0, CHUNK // 8)[None, :]
            word = tl.load(word_ptr + row * (K // 8) + at, at < K // 8, other=0)
            word = tl.reshape(word, (word.numel,))
            k = start + tl.arange(0, CHUNK)[None, :]
            x = tl.load(x_ptr + m * K + k, (m < rows) & (k < K), other=0).to(tl.float32)
            xs = _eighths(tl.reshape(x, (M, CHUNK // 8, 2, 2, 2)))
            part = tl.zeros((M, N, CHUNK // 8), tl.float32)
            for j in tl.static_range(8):  # low byte first, in a byte the high half first
                code = (word >> (8 * (j // 2) + 4 * (1 - j % 2))) & 15
                level = tl.gather(levels, code.to(tl.int32), 0)
                part += tl.reshape(level, (1, N, CHUNK // 8)) * xs[j][:, None, :]
            block = start // _BLOCK + tl.arange(0, CHUNK // _BLOCK)[None, :]
            scale = _scales(q, row * (K // _BLOCK) + block, block < K // _BLOCK)
            part = tl.sum(tl.reshape(part, (M, N, CHUNK // _BLOCK, _BLOCK // 8)), 3)
            total += part * scale[None, :, :]
        y = tl.sum(total, 2).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + m * n_out + n[None, :], y, (m < rows) & (n < n_out)[None, :])

    @triton.jit(do_not_specialize=["rows"])
    def _tens_kernel(
        q, x_ptr, y_ptr, rows, n_out,
        K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """y (parts, rows, n_out) = x (rows, K) W^T for rows <= M on tensor cores.

        A program does N outputs over BLOCKS blocks of 64 inputs; the caller adds up the parts. A
        block's levels are rounded to x's type, which costs what rounding W to it costs, and their
        products summed and then scaled in float32: fewer multiplications than scaling each weight.
        """
        part = tl.program_id(1)
        n = tl.program_id(0) * N + tl.arange(0, N)
        m = tl.arange(0, M)[:, None]
        row = tl.minimum(n, n_out - 1).to(tl.int64)
        y = tl.zeros((M, N), tl.float32)
        for i in tl.range(0, BLOCKS, num_stages=STAGES):  # 2: loads the next block during this one
            b = part * BLOCKS + i
            block = row * (K // _BLOCK) + tl.minimum(b, K // _BLOCK - 1)
            at = block[:, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, :]
            level = _lookup(q, tl.load(q.packed + at), x_ptr.dtype.element_ty)  # (N, 64)
            k = b * _BLOCK + tl.arange(0, _BLOCK)[None, :]
            x = tl.load(x_ptr + m * K + k, (m < rows) & (k < K), other=0)  # (M, 64)
            products = tl.dot(x, tl.trans(level), input_precision="ieee")
            y += products * _scales(q, block, block >= 0)[None, :]
        y_ptr += part * rows * n_out
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + m * n_out + n[None, :], y, (m < rows) & (n < n_out)[None, :])
