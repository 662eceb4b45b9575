"""The Triton kernels of quant.py against float64, on the CPU under Triton's interpreter.

The interpreter departs from a GPU in two ways, both of which `hardware` puts right: it cuts a
float32 down to bfloat16 where every GPU rounds it, and tl.dot takes the bits of a bfloat16 for an
integer. How fast the kernels are, only a GPU can tell.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import quant
from quant import NF4Linear, dequantize_nf4, nf4_matmul, quantize_nf4

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

SEED = int.from_bytes(os.urandom(4), "big")  # other numbers every time
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [1, 2, 3, 5, 8, 16, 17, 33, 64]
SHAPES = [(1, 64), (65, 320), (33, 576), (30, 1536)]
KERNELS = [quant._few_rows, quant._tens_of_rows]


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
    monkeypatch.setattr(quant, "_scratch", {})
    torch.manual_seed(SEED)


@pytest.fixture
def cuda(monkeypatch):
    """Let nf4_matmul and dequantize_nf4 believe that a CPU tensor is one on a GPU."""
    monkeypatch.setattr(quant, "_has_kernels", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


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


# ------------------------------------------------------------------------------------- each kernel


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (37, 53), (100, 33), (2, 64 * 257)])
def test_unpacking_is_that_of_pytorch_to_the_bit(shape, dtype):
    """The kernel writes what the PyTorch path returns, in every type and for any shape."""
    q = quantize_nf4(torch.randn(shape) * torch.rand(shape[0], 1))
    w = quant._unpack(q, torch.full(shape, torch.nan, dtype=dtype))
    assert torch.equal(w, dequantize_nf4(q, dtype)), f"seed {SEED}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_product_for_any_number_of_rows(kernel, rows, dtype):
    """Both kernels compute x W'^T, whatever the rows are padded to; N is odd."""
    q = quantize_nf4(torch.randn(37, 64))
    x = torch.randn(rows, 64).to(dtype)
    levels = torch.float32 if kernel is quant._few_rows else dtype
    assert_is_product(kernel(x, q), x, exact_weight(q, levels))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_for_any_shape(kernel, shape, dtype):
    """Both kernels compute x W'^T for N and K that fill no tile, chunk or second-level block."""
    q = quantize_nf4(torch.randn(shape) * torch.rand(shape[0], 1))
    x = torch.randn(2, shape[1]).to(dtype)
    levels = torch.float32 if kernel is quant._few_rows else dtype
    assert_is_product(kernel(x, q), x, exact_weight(q, levels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 2, 3])
def test_parts_of_the_inputs_add_up(programs, dtype, monkeypatch):
    """Five blocks of 64 inputs in 1 part, in 3 + 2 and in 2 + 2 + 1: the sum is the product."""
    monkeypatch.setattr(quant, "TENS_PROGRAMS", programs)
    q, x = quantize_nf4(torch.randn(30, 320)), torch.randn(17, 320).to(dtype)
    assert_is_product(quant._tens_of_rows(x, q), x, exact_weight(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_levels_costs_no_more_than_rounding_the_weight(dtype):
    """_tens_of_rows is as near to the product in float64 as a matmul with W' rounded to dtype."""
    q, x = quantize_nf4(torch.randn(64, 576)), torch.randn(32, 576).to(dtype)
    exact = x.double() @ exact_weight(q, torch.float64).T
    rounded = x.double() @ dequantize_nf4(q, dtype).double().T
    error = (quant._tens_of_rows(x, q).double() - exact).square().mean().sqrt()
    last = torch.finfo(dtype).eps * exact.square().mean().sqrt()  # rounding of y itself
    assert error <= 1.5 * (rounded - exact).square().mean().sqrt() + last, f"seed {SEED}"


# ---------------------------------------------------------------------------- nf4_matmul with them


def test_rows_and_types_choose_the_kernel(cuda, monkeypatch):
    """Few rows, tens, more; float64, an odd K and no rows at all go to the unpacked weight."""
    calls = []
    few, tens, more = quant._few_rows, quant._tens_of_rows, quant._passing_weight
    for kernel in (few, tens, more):
        spy = lambda *args, kernel=kernel: calls.append(kernel) or kernel(*args)  # noqa: E731
        monkeypatch.setattr(quant, kernel.__name__, spy)
    monkeypatch.setattr(quant, "TENS", {torch.float32: 4})
    q, odd = quantize_nf4(torch.randn(3, 64)), quantize_nf4(torch.randn(3, 40))
    for rows in (1, 2, 3, 4, 5, 0):
        assert nf4_matmul(torch.randn(rows, 64), q).shape == (rows, 3)
    nf4_matmul(torch.randn(1, 64).double(), q)
    nf4_matmul(torch.randn(1, 40), odd)
    assert calls == [few] * 2 + [tens] * 2 + [more] * 4


@pytest.mark.parametrize("shape", [(64,), (2, 1, 64), (3, 2, 64), (2, 40, 64), (0, 64)])
def test_value_and_gradient_for_any_leading_dimensions(cuda, shape):
    """y = x W'^T and dx = dy W' through each kernel, also for an x that is not contiguous."""
    q = quantize_nf4(torch.randn(37, 64))
    w = exact_weight(q, torch.float32)
    x = torch.randn(*shape[:-1], 128)[..., ::2].requires_grad_()
    y = nf4_matmul(x, q)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y.double(), x.double() @ w.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), dy.double() @ w, rtol=1e-5, atol=1e-5)


def test_layers_share_the_scratch_without_harm(cuda, monkeypatch):
    """Two layers leave one scratch of the larger size; values and gradients are each layer's own.

    The first call is in inference mode, whose tensors could not take part in training.
    """
    monkeypatch.setattr(quant, "TENS", {})
    a, b = (NF4Linear(quantize_nf4(torch.randn(n, 40))) for n in (24, 40))
    wa, wb = (dequantize_nf4(layer.nf4) for layer in (a, b))
    kept = wa.clone(), wb.clone()
    x = torch.randn(6, 40, requires_grad=True)
    with torch.inference_mode():
        a(x)
    ya, yb = a(x), b(x)
    da, db = torch.randn_like(ya), torch.randn_like(yb)
    torch.autograd.backward((ya, yb), (da, db))
    torch.testing.assert_close(ya, F.linear(x, wa))
    torch.testing.assert_close(yb, F.linear(x, wb))
    torch.testing.assert_close(x.grad, da @ wa + db @ wb)
    assert torch.equal(wa, kept[0]) and torch.equal(wb, kept[1])  # not views of the scratch
    assert [t.numel() for t in quant._scratch.values()] == [40 * 40]


def test_a_graph_under_capture_leaves_the_scratch_alone(cuda, monkeypatch):
    """While a CUDA graph is recorded the unpacked weight is memory of its own."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q = quantize_nf4(torch.randn(3, 5))
    assert torch.equal(quant._passing_weight(q, torch.float32), dequantize_nf4(q))
    assert not quant._scratch


def test_a_second_derivative_is_refused(cuda):
    """Autograd may not keep the scratch: differentiating dx is an error."""
    x = torch.randn(1, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(nf4_matmul(x, quantize_nf4(torch.randn(3, 64))).square().sum(), x,
                                create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_no_kernels_without_cuda_or_triton(monkeypatch):
    """They are for CUDA devices alone, and only where Triton is installed."""
    cuda, cpu = SimpleNamespace(type="cuda"), torch.device("cpu")
    assert quant._has_kernels(cuda) and not quant._has_kernels(cpu)
    monkeypatch.setattr(quant, "triton", None)
    assert not quant._has_kernels(cuda)
