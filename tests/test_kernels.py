"""The Triton kernels of quant.py against float64, on the CPU under Triton's interpreter.

The interpreter departs from a GPU in two ways, which `hardware` puts right: it cuts a float32 to
bfloat16 instead of rounding it, and tl.dot takes the bits of a bfloat16 for an integer.
"""

import os

import numpy as np
import pytest
import torch

import quant
from lora import LoRALinear
from quant import NF4Linear, dequantize_by_definition, nf4_matmul, quantize_nf4

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

SEED = int.from_bytes(os.urandom(4), "big")  # other numbers every time
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [1, 2, 3, 5, 8, 16, 17, 33, 64]
SIZES = [(1, 1, 64), (2, 65, 320), (3, 33, 576), (2, 30, 1536)]


@pytest.fixture(autouse=True)
def hardware(monkeypatch):
    """Make the interpreter round to bfloat16 and multiply bfloat16 as a GPU does."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        data = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(data, tl.bfloat16)

    def bfloat16_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:  # exact: products of two have 16 significant bits
            a, b = (cast(self, t, tl.float32) for t in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "cast_impl", rounding_cast)
    monkeypatch.setattr(builder, "create_dot", bfloat16_dot)
    torch.manual_seed(SEED)


@pytest.fixture
def cuda(monkeypatch):
    """Let nf4_matmul and dequantize_nf4 believe that a CPU tensor is one on a GPU."""
    monkeypatch.setattr(quant, "_has_kernels", lambda device: True)


def exact_weight(q: quant.NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """Levels rounded to dtype, times float32 scales, in float64: (N, K) for K a multiple of 64."""
    code = torch.stack((q.packed >> 4, q.packed & 15), dim=1).view(-1, 64).long()
    level = quant._levels(q.packed.device).to(dtype).double()[code]
    return (level * quant._decode_scales(q).double()[:, None]).view(q.shape)


def assert_is_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Y = x w^T up to the roundings of a sum in float32 by blocks of 64, and the last one.

    A product is rounded once, takes part in at most 64 sums in its block, is scaled (the scale has
    two roundings and the multiplication one) and then in at most K / 64 + 2 sums of blocks.
    """
    x, k = x.double(), x.shape[-1]
    roundings = 1 + 64 + 3 + k / 64 + 2
    limit = roundings * 2.0**-24 * (x.abs() @ w.abs().T)
    limit += torch.finfo(y.dtype).eps / 2 * ((x @ w.T).abs() + limit)
    limit += torch.finfo(y.dtype).smallest_normal
    assert y.shape == limit.shape
    excess = ((y.double() - x @ w.T).abs() / limit).max()
    assert excess <= 1, f"{excess:.3g} times the limit, seed {SEED}"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (37, 53), (100, 33), (2, 64 * 257)])
def test_unpacking_is_the_definition_to_the_bit(shape, dtype):
    """The kernel writes what the definition returns, rounded once, for any type and shape."""
    q = quantize_nf4(torch.randn(shape) * torch.rand(shape[0], 1))
    w = quant._unpack(q, dtype)
    assert torch.equal(w, dequantize_by_definition(q).to(dtype)), f"seed {SEED}"


def test_kernels_write_nothing_beside_their_result(monkeypatch):
    """The memory around y and W stays as it is when rows, outputs and weights fill no tile."""
    around = []

    def fenced(self, *shape, dtype=None, device=None):
        n = torch.Size(shape).numel()
        around.append(torch.full((n + 20000,), 7, dtype=dtype or self.dtype))
        return around[-1][10000:-10000].view(shape)

    q, x = quantize_nf4(torch.randn(37, 64)), torch.randn(17, 64)
    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    for write in (quant._multiply_codes, lambda x, q: quant._unpack(q, x.dtype)):
        around.clear()
        write(x, q)  # the first memory taken is the result, later ones are the interpreter's
        assert around[0].eq(7).sum() == 20000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, n, k", [(rows, 37, 64) for rows in ROWS] + SIZES)
def test_product_for_any_size(rows, n, k, dtype):
    """The kernel computes x W'^T for M, N and K that fill no tile, part or second-level block."""
    q = quantize_nf4(torch.randn(n, k) * torch.rand(n, 1))
    x = torch.randn(rows, k).to(dtype)
    assert_is_product(quant._multiply_codes(x, q), x, exact_weight(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [5, 3, 2, 1])
def test_parts_of_the_inputs_add_up(blocks, dtype, monkeypatch):
    """Five blocks of 64 inputs in 1 part, in 3 + 2, in 2 + 2 + 1 and singly: always the product."""
    monkeypatch.setattr(quant, "PART_BLOCKS", blocks)
    q, x = quantize_nf4(torch.randn(30, 320)), torch.randn(17, 320).to(dtype)
    assert_is_product(quant._multiply_codes(x, q), x, exact_weight(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_levels_costs_no_more_than_rounding_the_weight(dtype):
    """Scaled levels, rounded before, are no farther from W' than W' rounded at the end."""
    q = quantize_nf4(torch.randn(256, 576))
    exact, levels = exact_weight(q, torch.float32), exact_weight(q, dtype)
    w = dequantize_by_definition(q).to(dtype)
    assert (levels - exact).norm() <= (w - exact).norm(), f"seed {SEED}"


def test_rows_and_types_choose_the_kernel(cuda, monkeypatch):
    """Few rows and more; float64, an odd K and no rows at all go to the unpacked weight."""
    calls = []
    few, more = quant._multiply_codes, quant._unpack
    for kernel in (few, more):
        spy = lambda *args, kernel=kernel: calls.append(kernel) or kernel(*args)  # noqa: E731
        monkeypatch.setattr(quant, kernel.__name__, spy)
    monkeypatch.setattr(quant, "MAX_ROWS", {torch.float32: 4})
    q, odd = quantize_nf4(torch.randn(3, 64)), quantize_nf4(torch.randn(3, 40))
    for rows in (1, 4, 5, 0):
        assert nf4_matmul(torch.randn(rows, 64), q).shape == (rows, 3)
    nf4_matmul(torch.randn(1, 64).double(), q)
    nf4_matmul(torch.randn(1, 40), odd)
    assert calls == [few] * 2 + [more] * 4


@pytest.mark.parametrize("shape", [(64,), (2, 1, 64), (3, 2, 64), (2, 40, 64), (0, 64)])
def test_value_and_gradient_for_any_leading_dimensions(cuda, shape):
    """y = x W'^T and dx = dy W' through both kernels, also for an x that is not contiguous."""
    q = quantize_nf4(torch.randn(37, 64))
    w = dequantize_by_definition(q).double()
    x = torch.randn(*shape[:-1], 128)[..., ::2].requires_grad_()
    y = nf4_matmul(x, q)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = x.double() @ w.T, dy.double() @ w
    torch.testing.assert_close((y.double(), dx.double()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 40, 80])
def test_an_adapter_adds_to_what_the_kernels_give(cuda, rows):
    """In place, which autograd allows of no view that a Function returns."""
    layer = LoRALinear(NF4Linear(quantize_nf4(torch.randn(37, 64))), 4, 6, 0.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, rows, 64, requires_grad=True)[1:]
    y, expected = layer(x), layer.by_definition(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    inputs = (x, layer.lora_A, layer.lora_B)
    ours, exact = (torch.autograd.grad(out.sin().sum(), inputs) for out in (y, expected))
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


def test_no_kernels_without_cuda_or_triton(monkeypatch):
    """They are for CUDA devices alone, and only where Triton is installed."""
    assert [quant._has_kernels(torch.device(name)) for name in ("cuda", "cpu")] == [True, False]
    monkeypatch.setattr(quant, "triton", None)
    assert not quant._has_kernels(torch.device("cuda"))
