"""linear is F.linear to the last digits of float32, with its gradients, by whichever library."""

from contextlib import nullcontext
from math import prod

import pytest
import torch
import torch.nn.functional as F

import linear as module
from linear import (
    LEAST_PARTED,
    LEAST_PRODUCTS,
    Linear,
    add_linear_,
    linear,
    matmul,
    no_onednn,
    onednn,
    onednn_rounds,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return (found.double() - exact).norm().item() / max(exact.norm().item(), 1e-9)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (1,), (2,), (2, 3), (130,)])
@pytest.mark.parametrize("K, N", [(16, 24), (600, 900)], ids=["small", "large"])
def test_a_product_keeps_the_digits_of_float32(rows, K, N):
    """On whatever processor this runs: rounded to bfloat16 the error would be 2e-3."""
    x, W, b = draw(*rows, K), draw(N, K), draw(N)
    exact = x.double() @ W.double().T
    y = linear(x, W, b)
    assert y.shape == exact.shape
    assert error(y, exact + b) < 2e-6
    assert error(matmul(x.reshape(prod(rows), K), W.T), exact.view(prod(rows), N)) < 2e-6


@pytest.mark.parametrize("N", [496, 500], ids=["in_parts", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(600,), (1, 1, 600)])
def test_one_row_of_a_large_weight_and_its_gradients(shape, dtype, N):
    """N is a multiple of PARTS or not; both factors and the bias are given their gradients."""
    assert N * 600 >= LEAST_PARTED
    x, W, b = draw(*shape).to(dtype), draw(N, 600).to(dtype), draw(N).to(dtype)
    x, W, b = (t.requires_grad_() for t in (x, W, b))
    exact = x.double() @ W.double().T + b
    y = linear(x, W, b)
    assert y.shape == exact.shape and y.dtype == dtype
    digits = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert error(y, exact) < digits
    dy = draw(1, N).to(dtype).view_as(y)
    ours = torch.autograd.grad(y, (x, W, b), dy)
    for found, wanted in zip(ours, torch.autograd.grad(exact, (x, W, b), dy.double()), strict=True):
        assert error(found, wanted.double()) < digits


def test_which_way_a_row_goes(monkeypatch):
    """float32 in parts, if W is large and lies row by row; bfloat16 not to oneDNN."""
    W, x = draw(512, 640), draw(1, 640).requires_grad_()
    for weight, parts in ((W, True), (W[:, :64], False), (W.T.contiguous().T, False)):
        graph = [linear(x[:, : weight.size(1)], weight).grad_fn]
        names = [node.name() for node in graph]
        while graph:
            graph = [child for node in graph for child, _ in node.next_functions if child]
            names += [node.name() for node in graph]
        assert any("Bmm" in name for name in names) == parts
    seen = []
    monkeypatch.setattr(F, "linear", lambda *_: seen.append(torch.backends.mkldnn.enabled))
    linear(x.bfloat16(), W.bfloat16())
    linear(x.double(), W.double())
    assert seen == [False, True]


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_product_is_added_in_place(rows, base):
    """In the type of y, or one in float32 to whatever y is, with the gradients of both."""
    for dtype in {base, torch.float32}:
        y, x, W = draw(rows, 40).to(base), draw(rows, 16).to(dtype), draw(40, 16).to(dtype)
        y, x = y.requires_grad_(), x.requires_grad_()
        exact = y.double() + x.double() @ W.double().T
        place = y.clone()
        found = add_linear_(place, x, W)
        assert found.data_ptr() == place.data_ptr() and found.dtype == base
        digits = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[base]
        assert error(found, exact) < digits
        found.sum().backward()
        assert torch.equal(y.grad, torch.ones_like(y))
        assert error(x.grad, W.double().sum(0).expand(rows, -1)) < digits


@pytest.mark.parametrize("needs", ["x", "W", "xWb"])
def test_gradients_are_those_of_F_linear(needs, monkeypatch):
    """Also where this processor would not take the way by oneDNN."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "onednn", nullcontext)
    x, W, b = draw(3, 50, 300), draw(190, 300), draw(190)
    assert x.numel() * len(W) >= LEAST_PRODUCTS
    found = []
    for product in (linear, F.linear):
        tensors = {"x": x.clone(), "W": W.clone(), "b": b.clone()}
        for name in needs:
            tensors[name].requires_grad_()
        product(*tensors.values()).sin().sum().backward()
        found.append([tensors[name].grad for name in needs])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_many_rows_of_other_types_go_to_pytorch(dtype):
    """bfloat16 and float64 are F.linear's to the bit."""
    x, W = draw(200, 200).to(dtype), draw(200, 200).to(dtype)
    assert torch.equal(linear(x, W), F.linear(x, W))
    assert torch.equal(matmul(x, W), x @ W)


def test_many_rows_of_float16_are_multiplied_in_float32():
    """They are rounded once, as one row's sum is, and have the gradient of the product."""
    x, W, b = draw(9, 700).half(), draw(40, 700).half(), draw(40).half()
    exact = x.double() @ W.double().T + b
    assert error(linear(x[:1], W, b), exact[:1]) < 5e-4
    y = linear(x.requires_grad_(), W, b)
    assert torch.equal(y, F.linear(x.float(), W.float()).half() + b)
    assert error(y, exact) < 5e-4
    y.sum().backward()
    assert error(x.grad, W.double().sum(0).expand(9, -1)) < 1e-3
    assert torch.equal(matmul(x.detach(), W.T), (x.float() @ W.float().T).half())


def test_a_layer_loads_and_computes_like_nn_linear():
    """Its parameters bear the same names."""
    theirs = torch.nn.Linear(600, 500)
    ours = Linear(600, 500)
    ours.load_state_dict(theirs.state_dict())
    x = draw(4, 600)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_the_settings_are_put_back():
    """Also by what goes wrong inside."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError), onednn():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        draw(2, 3) @ draw(2, 3)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError), no_onednn():
        assert not torch.backends.mkldnn.enabled
        draw(2, 3) @ draw(2, 3)
    assert torch.backends.mkldnn.enabled


def test_what_rounds_is_found_out(monkeypatch):
    """A processor that multiplies with 8 bits does not pass for exact."""
    real = torch.Tensor.__matmul__
    rounded = lambda a, b: real(a.bfloat16(), b.bfloat16()).float()  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert onednn_rounds.__wrapped__()
