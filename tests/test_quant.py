"""NF4: the levels, the codes, the bits, the error, and the matmul with its gradient."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quant
from quant import (
    LEVELS,
    NF4Linear,
    dequantize_by_definition,
    dequantize_nf4,
    nf4_matmul,
    nf4_matmul_by_definition,
    quantize_nf4,
)

BITSANDBYTES = load_file(Path(__file__).parent / "fixtures" / "nf4.safetensors")
SHAPES = [(1, 1), (3, 5), (37, 53), (64, 64), (100, 33), (65, 64 * 5), (2, 64 * 257)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def codes(q: quant.NF4Weight) -> torch.Tensor:
    """The 4-bit indices in the order of the weights, one a number."""
    both = torch.stack((q.packed >> 4, q.packed & 15), dim=1).view(-1)
    return both[: q.shape[0] * q.shape[1]].long()


def block_scales(w: torch.Tensor) -> torch.Tensor:
    """max |w| of the block of 64 that a weight belongs to, for every weight."""
    blocks = [b.abs().max().expand(b.numel()) for b in w.view(-1).split(64)]
    return torch.cat(blocks).view(w.shape)


# -------------------------------------------------------------------------- the levels and the map


def test_levels_are_the_normal_quantiles_of_qlora():
    """8 steps of probability above 1/2, 7 below it, divided by the quantile of the outermost."""
    tail = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(0.5, tail, 9, dtype=torch.float64))
    below = torch.special.ndtri(torch.linspace(0.5, tail, 8, dtype=torch.float64))
    expected = torch.cat((-below[1:].flip(0), above)) / above[-1]
    torch.testing.assert_close(torch.tensor(LEVELS).double(), expected, rtol=0, atol=1e-6)


def test_levels_beat_even_steps_on_normal_weights():
    """On normal weights NF4's squared error is 10% or more below that of 16 even levels."""
    w = torch.randn(256, 256)
    scale, even = block_scales(w), torch.linspace(-1, 1, 16)
    evenly = even[((w / scale)[..., None] - even).abs().argmin(dim=-1)] * scale
    nf4 = dequantize_nf4(quantize_nf4(w))
    assert (nf4 - w).square().mean() < 0.9 * (evenly - w).square().mean()


def test_scale_map_has_seven_decades_of_doubling_resolution():
    """The 8-bit map: zero, one, and 2^i midpoints of even steps in decade i, on both sides."""
    table = quant._scale_map(torch.device("cpu"))
    assert len(table) == 256 and table.diff().gt(0).all()
    positive = table[(table > 0) & (table < 1)]
    assert torch.equal(positive, -table[table < 0].flip(0))
    for i in range(7):
        high = 10.0 ** (i - 6)
        decade = positive[(positive > high / 10) & (positive < high)]
        step = 0.9 * high / 2**i
        expected = high / 10 + step * (torch.arange(2**i) + 0.5)
        torch.testing.assert_close(decade, expected, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------- codes and errors


@pytest.mark.parametrize("name", ["normal", "heavy", "ragged"])
def test_codes_and_scales_are_those_of_bitsandbytes(name):
    """Packed codes, both levels of scales and the restored weight are bitsandbytes' to the bit."""
    w = BITSANDBYTES[f"{name}.weight"].float()
    q = quantize_nf4(w)
    for field in ("packed", "scale_code", "scale_max", "scale_mean"):
        assert torch.equal(getattr(q, field), BITSANDBYTES[f"{name}.{field}"]), field
    assert torch.equal(dequantize_nf4(q), BITSANDBYTES[f"{name}.restored"])
    first_level = block_scales(w).view(-1)[::64]
    assert torch.equal(first_level, BITSANDBYTES[f"{name}.scale"])


@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_gets_its_nearest_level(shape):
    """No other level is nearer to w / max |w| than the chosen one, in float64, for any shape."""
    w = torch.randn(shape)
    unit = w.double() / block_scales(w).double()
    distance = (unit.view(-1, 1) - torch.tensor(LEVELS).double()).abs()
    chosen = distance.gather(1, codes(quantize_nf4(w))[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(dim=1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_half_a_gap_of_levels_plus_half_a_gap_of_scales(shape):
    """|w' - w| <= gap / 2 * a + gap' / 2 * b, with the widest gaps of the levels and of the map."""
    w = torch.randn(shape)
    q = quantize_nf4(w)
    gap = torch.tensor(LEVELS).diff().max()
    gap_of_scales = quant._scale_map(torch.device("cpu")).diff().max()
    limit = gap / 2 * block_scales(w) + gap_of_scales / 2 * q.scale_max.max() + 1e-6
    restored = dequantize_nf4(q)
    assert restored.shape == w.shape and (restored - w).abs().le(limit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_is_the_definition_to_the_bit(shape, dtype):
    """Looking bytes up gives level times scale of each weight, rounded once, for any shape."""
    q = quantize_nf4(torch.randn(shape))
    assert torch.equal(dequantize_nf4(q, dtype), dequantize_by_definition(q).to(dtype))


def test_quantising_twice_is_quantising_once():
    """A restored weight gets the codes it was restored from."""
    q = quantize_nf4(torch.randn(96, 80))
    assert torch.equal(quantize_nf4(dequantize_nf4(q)).packed, q.packed)


def test_zeros_stay_zeros():
    """Zero weights, alone or as a block among others, come back as exact zeros."""
    w = torch.randn(8, 64)
    w[3] = 0
    assert dequantize_nf4(quantize_nf4(w))[3].eq(0).all()
    assert dequantize_nf4(quantize_nf4(torch.zeros(5, 7))).eq(0).all()


def test_tiles_leave_no_seams(monkeypatch):
    """Quantising and multiplying in tiles of 256 weights gives what the whole matrix gives."""
    w, x = torch.randn(37, 128), torch.randn(3, 128)
    whole = quantize_nf4(w)
    y = nf4_matmul(x, whole)
    monkeypatch.setattr(quant, "TILE", 256)
    assert torch.equal(quantize_nf4(w).packed, whole.packed)
    torch.testing.assert_close(nf4_matmul(x, whole), y, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(bad):
    """An infinite or undefined weight is a ValueError of one line."""
    w = torch.zeros(4, 64)
    w[2, 3] = bad
    with pytest.raises(ValueError, match=r"^a weight is inf or nan.*checkpoint$"):
        quantize_nf4(w)


# ------------------------------------------------------------------------------------------- memory


def test_a_weight_takes_4_127_bits():
    """4 + 8/64 + 32/(64*256) = 4.127 bits a weight, measured on the buffers that a layer holds."""
    layer = NF4Linear(quantize_nf4(torch.randn(512, 1024)))
    total_bytes = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    mean = 4  # bytes, once a matrix
    bits = 8 * (total_bytes - mean) / (512 * 1024)
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) and round(bits, 3) == 4.127


def test_nothing_unpacked_lives_between_forward_and_backward():
    """After a forward pass autograd has saved no tensor, and only W itself has the size of W."""
    w, saved = torch.randn(131, 448), []
    x, q = torch.randn(2, 448, requires_grad=True), quantize_nf4(w)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = nf4_matmul(x, q)
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    assert y.grad_fn is not None and not saved
    assert sum(t.numel() == w.numel() for t in tensors) == 1


# ------------------------------------------------------------------------------ matmul and gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (37, 53), (24, 64), (65, 320)])
def test_matmul_and_its_gradient_are_those_of_the_definition(shape, dtype, monkeypatch):
    """y and dx are those of x W'^T, in the dtype of x, for whole weights and in tiles of 1,000."""
    monkeypatch.setattr(quant, "TILE", 1024)
    n_out, k = shape
    q = quantize_nf4(torch.randn(n_out, k))
    x = torch.randn(2, 3, k, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 3, n_out, dtype=dtype)
    fast, plain = nf4_matmul(x, q), nf4_matmul_by_definition(x, q)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, plain)
    dx, expected = (torch.autograd.grad(y, x, dy) for y in (fast, plain))
    torch.testing.assert_close(dx, expected)


def test_gradient_is_that_of_finite_differences():
    """Autograd's dx agrees with (f(x + e) - f(x - e)) / 2e in float64, and its own gradient too."""
    q = quantize_nf4(torch.randn(5, 12))
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nf4_matmul(x, q), x)
    assert torch.autograd.gradgradcheck(lambda x: nf4_matmul(x, q), x)


def test_the_layer_is_frozen():
    """NF4Linear has no parameter, and its output needs a gradient only if its input does."""
    layer = NF4Linear(quantize_nf4(torch.randn(16, 64)))
    assert not list(layer.parameters()) and (layer.in_features, layer.out_features) == (64, 16)
    assert not layer(torch.randn(1, 64)).requires_grad
    assert layer(torch.randn(1, 64, requires_grad=True)).requires_grad


def test_casting_the_layer_keeps_its_weight():
    """.to(bfloat16) and .half() leave the scales, and so the weight, as they are."""
    q = quantize_nf4(torch.randn(16, 64))
    layer = NF4Linear(q).to(torch.bfloat16).half()
    assert torch.equal(dequantize_nf4(layer.nf4), dequantize_nf4(q))


def test_the_layer_survives_its_state_dict():
    """A layer loaded from another's state dict computes the same."""
    a, b = (NF4Linear(quantize_nf4(torch.randn(16, 64))) for _ in range(2))
    x = torch.randn(2, 64)
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
