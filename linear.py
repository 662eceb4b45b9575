"""y = x W^T + b, the product to which most of the time goes, on a CPU in the faster way.

Many rows: PyTorch hands a float32 product on a CPU to Intel's MKL, which on an AMD processor uses
half the width of its vector units. oneDNN, which multiplies PyTorch's bfloat16, uses all of it:
products of some size take half of the time. PyTorch asks it for a float32 product only if the
factors may be rounded to bfloat16. Rounded they are where the processor has a unit for it (AMX),
and nowhere else; so that is tried, once, and where digits are lost float32 stays with MKL.

One row: it takes as long as W takes to come from memory. MKL reads W with one thread, so float32
goes to it in parts; oneDNN reads bfloat16 at half the speed of PyTorch's own kernel. Either way
takes 0.4 of the time.

float16: PyTorch's own kernel again, which takes as long for each of many rows; those are multiplied
in float32.

All this is measured on two cores of an EPYC with AVX-512 (tests/BENCH.md), and nowhere else.

The two switches, of oneDNN, are the process's: two threads that multiply at a time can leave them
as the other found them. Left out: autocast, torch.func.

Letters: M rows, K inputs, N outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
HALF_ROWS = 4  # the most that are multiplied in float16
PARTS = 16  # of W for one row: so many threads can have work; it divides every usual N
LEAST_PARTED = 1 << 16  # numbers of W; one so small is in the cache, where the parts gain nothing
LEAST_PRODUCTS = 1 << 23  # M K N from which oneDNN pays: a call costs 12 us more, a new M compiles
LEAST_WEIGHTS = 1 << 18  # K N from which it pays for any M: most of the time W is being read


class Linear(nn.Linear):
    """nn.Linear, with its product by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Same as F.linear: x (..., K), W (N, K), bias (N,) -> (..., N)."""
    if x.device.type != "cpu":
        return F.linear(x, W, bias)
    M = prod(x.shape[:-1])
    if M == 1:
        y = one_row(x, W)
    elif half_is_slow(x.dtype, M) or onednn_pays(x, W):
        y = _Product.apply(x.reshape(M, x.size(-1)), W).view(*x.shape[:-1], len(W))
    else:
        return F.linear(x, W, bias)
    return y if bias is None else y + bias


def one_row(x: Tensor, W: Tensor) -> Tensor:
    """x W^T of a single row x (..., K), in the time that it takes to read W."""
    parts = W.numel() >= LEAST_PARTED and len(W) % PARTS == 0 and W.is_contiguous()
    if parts and x.dtype == torch.float32:
        column = x.reshape(1, -1).T  # (K, 1); x.reshape(-1, 1) takes MKL four times as long
        y = torch.bmm(W.unflatten(0, (PARTS, -1)), column.expand(PARTS, -1, -1))
        return y.view(*x.shape[:-1], len(W))
    if x.dtype == torch.bfloat16:
        with no_onednn():
            return F.linear(x, W)
    return F.linear(x, W)


def add_linear_(y: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """y += x W^T in place -> y, for x (M, K) and W (N, K) of a type, y (M, N) of any."""
    if x.dtype != y.dtype or (x.dtype == torch.float16 and x.device.type == "cpu"):
        return y.add_(linear(x, W))
    return y.addmm_(x, W.T)


class _Product(torch.autograd.Function):
    """x (M, K) W^T, and the gradients: dx = dy W, dW = dy^T x."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        return matmul(x, W.T)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, W = ctx.saved_tensors
        dx = matmul(dy, W) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else matmul(dy.T, x)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Same as a @ b for matrices (M, K) and (K, N), without a gradient."""
    if a.device.type == "cpu" and half_is_slow(a.dtype, len(a)):
        return matmul(a.float(), b.float()).half()
    if not onednn_pays(a, b.T):
        return a @ b
    with onednn():
        return a @ b


def half_is_slow(dtype: torch.dtype, M: int) -> bool:
    """Are these so many rows of float16 that they are multiplied in float32?"""
    return dtype == torch.float16 and M > HALF_ROWS


def onednn_pays(x: Tensor, W: Tensor) -> bool:
    """Is x W^T a product that oneDNN does faster than MKL, and as exactly?"""
    large = x.numel() * W.size(0) >= LEAST_PRODUCTS or W.numel() >= LEAST_WEIGHTS
    return large and x.dtype == torch.float32 and x.device.type == "cpu" and onednn_is_faster()


def onednn_is_faster() -> bool:
    """Is it worth asking oneDNN on this processor? Without AVX-512 PyTorch does not."""
    return AVX512 and not onednn_rounds()


def has_amx() -> bool:
    """Has this processor a unit that multiplies bfloat16?"""
    return AVX512 and onednn_rounds()


@cache
def onednn_rounds() -> bool:
    """Does oneDNN, where it may, lose the digits of float32 that bfloat16 has not?"""
    W = torch.full((512, 512), 1 + 2**-10)  # rounded to bfloat16 it is 1
    exact = 512 * W[0, 0] ** 2
    with onednn():
        return not all(torch.allclose(W[:rows] @ W, exact, rtol=1e-5) for rows in (1, 64, 512))


@contextmanager
def onednn() -> Iterator[None]:
    """Inside a `with` block PyTorch gives oneDNN its float32 products on a CPU."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@contextmanager
def no_onednn() -> Iterator[None]:
    """Inside a `with` block PyTorch multiplies on a CPU by itself or by MKL."""
    setting = torch.backends.mkldnn
    before = setting.enabled
    setting.enabled = False
    try:
        yield
    finally:
        setting.enabled = before
