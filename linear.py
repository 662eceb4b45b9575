"""y = x W^T + b, the product to which most of the time goes, on a CPU in the faster way.

PyTorch hands a float32 product on a CPU to Intel's MKL, which on an AMD processor uses half the
width of its vector units. oneDNN, which multiplies PyTorch's bfloat16, uses all of it: products of
some size take 0.45 of the time (two cores of an EPYC with AVX-512, tests/BENCH.md).

PyTorch asks oneDNN for a float32 product only if the factors may be rounded to bfloat16. Rounded
they are where the processor has a unit for it (AMX), and nowhere else; so that is tried, once, and
where digits are lost float32 stays with MKL.

float16 is the fastest type for one row, but what multiplies it there takes as long for each of many
rows; those are multiplied in float32.

Letters: M rows, K inputs, N outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
HALF_ROWS = 4  # the most that are multiplied in float16
# oneDNN pays from so many M K N, since a call costs it some 12 microseconds more, and a new M its
# compilation; or of a weight from so many K N, which it reads faster from memory, for any M
LEAST_PRODUCTS = 1 << 23
LEAST_WEIGHTS = 1 << 19


class Linear(nn.Linear):
    """nn.Linear, with its product by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Same as F.linear: x (..., K), W (N, K), bias (N,) -> (..., N)."""
    if x.dtype == torch.float16 and x.device.type == "cpu" and x.numel() > HALF_ROWS * x.size(-1):
        return linear(x.float(), W.float(), None if bias is None else bias.float()).half()
    if not onednn_pays(x, W):
        return F.linear(x, W, bias)
    y = _Product.apply(x.reshape(-1, x.size(-1)), W).view(*x.shape[:-1], len(W))
    return y if bias is None else y + bias


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
    if not onednn_pays(a, b.T):
        return a @ b
    with onednn():
        return a @ b


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
