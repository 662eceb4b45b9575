"""LoRA: the formula and its gradients, on and off, PEFT's files, and merging."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import linear as products
import quant
from lora import (
    TARGETS,
    LoRALinear,
    adapter_off,
    adapter_parameters,
    add_lora,
    drop,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    save_dense,
)
from model import load_model
from quant import NF4Linear, dequantize_nf4, quantize_nf4

FIXTURES = Path(__file__).parent / "fixtures" / "lora"
EXPECTED = load_file(FIXTURES / "expected.safetensors")
IDS = EXPECTED["ids"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def base_model(bits: int = 16, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The two-layer LLaMA of the fixtures."""
    return load_model(str(FIXTURES / "base"), dtype=dtype, bits=bits)[0]


def random_adapter(model: nn.Module, rank: int = 4, dropout: float = 0.0) -> nn.Module:
    """The model with LoRA layers that do change it."""
    add_lora(model, rank, 6, dropout)
    for p in adapter_parameters(model):
        nn.init.normal_(p, std=0.2)
    return model


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


# ------------------------------------------------------------------------ the formula, on one layer


def one_layer(dropout: float = 0.0) -> tuple[LoRALinear, torch.Tensor]:
    """A layer of 5 -> 3 with rank 2, alpha 6 and random A, B; and four inputs."""
    layer = LoRALinear(nn.Linear(5, 3, bias=False).requires_grad_(False), 2, 6, dropout)
    nn.init.normal_(layer.lora_B)
    return layer, torch.randn(4, 5)


def test_output_is_wx_plus_scaled_bax():
    """y = W x + alpha / r * B (A x)."""
    layer, x = one_layer()
    w, a, b = layer.base.weight, layer.lora_A, layer.lora_B
    by_hand = torch.stack([w @ row + 6 / 2 * (b @ (a @ row)) for row in x])
    torch.testing.assert_close(layer(x), by_hand)


@pytest.mark.parametrize("base", ["plain", "NF4"])
def test_forward_is_the_definition(base):
    """Without dropout y and the gradients to x, A and B are the definition's, for batches too."""
    plain = nn.Linear(64, 24, bias=False).requires_grad_(False)
    linear = plain if base == "plain" else NF4Linear(quantize_nf4(plain.weight))
    layer = LoRALinear(linear, 4, 6, 0.0)
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(2, 3, 64, requires_grad=True), torch.randn(2, 3, 24)
    y, expected = layer(x), layer.by_definition(x)
    torch.testing.assert_close(y, expected)
    inputs = (x, layer.lora_A, layer.lora_B)
    gradients, wanted = (torch.autograd.grad(out, inputs, dy) for out in (y, expected))
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("tile", [1 << 18, quant.TILE], ids=["tiles", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_definition_of_large_weights_that_stay_packed(dtype, tile, rows, monkeypatch):
    """Where oneDNN would multiply as well: what NF4 gives is no view, and is added to in place."""
    monkeypatch.setattr(quant, "TILE", tile)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "onednn", nullcontext)
    layer = LoRALinear(NF4Linear(quantize_nf4(torch.randn(1024, 640) / 25)), 4, 6, 0.0)
    nn.init.normal_(layer.lora_B, std=0.2)
    x, dy = torch.randn(rows, 640, dtype=dtype, requires_grad=True), torch.randn(rows, 1024)
    y, expected = layer(x), layer.by_definition(x)
    digits = 1e-5 if dtype == torch.float32 else 3e-2
    assert (y - expected).norm() < digits * expected.norm()
    inputs = (x, layer.lora_A, layer.lora_B)
    ours, exact = (torch.autograd.grad(out, inputs, dy.to(dtype)) for out in (y, expected))
    for found, wanted in zip(ours, exact, strict=True):
        assert (found.float() - wanted.float()).norm() < digits * wanted.float().norm()


@pytest.mark.parametrize("base", ["plain", "NF4"])
def test_a_bias_is_kept(base):
    """On a layer with a bias y = W x + b + alpha / r * B A x, before merging and after."""
    plain = nn.Linear(64, 24).requires_grad_(False)
    if base == "NF4":
        q = quantize_nf4(plain.weight)
        plain.weight.copy_(dequantize_nf4(q))
    linear = plain if base == "plain" else NF4Linear(q, plain.bias)
    model = add_lora(nn.ModuleDict({"q_proj": linear}), 4, 6, 0.0)
    layer = model["q_proj"]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64)
    expected = x @ plain.weight.T + plain.bias + 6 / 4 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.by_definition(x), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "q_proj.lora_A", "q_proj.lora_B"
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(merge(model)["q_proj"](x), expected)
    assert model["q_proj"].bias is plain.bias


def test_gradients_follow_the_hand_formula():
    """With s = alpha / r and G = dL/dy: dB = s G^T (x A^T), dA = s (G B)^T x, nothing for W."""
    layer, x = one_layer()
    g, s = torch.randn(4, 3), 6 / 2
    layer(x).backward(g)
    torch.testing.assert_close(layer.lora_B.grad, s * g.T @ (x @ layer.lora_A.T))
    torch.testing.assert_close(layer.lora_A.grad, s * (g @ layer.lora_B).T @ x)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99])
def test_dropout_zeroes_independently_and_keeps_the_mean(p):
    """A share p is 0, at every place and whatever the neighbours; the rest / (1 - p) averages 1.

    Over n numbers a share may miss by 5 standard errors.
    """
    n = 400_000
    kept, share = drop(torch.ones(n), p)
    gone, error = kept == 0, 5 * (p * (1 - p) / n) ** 0.5
    assert set(kept.unique().tolist()) <= {0.0, 1.0} and abs(gone.double().mean() - p) <= error
    assert abs((kept / share).double().mean() - 1) <= error / (1 - p) + 1e-6
    for quarter in gone.view(4, -1):
        assert abs(quarter.double().mean() - p) <= 2 * error
    for step in (1, 2, 3, 20):  # pairs are independent too
        assert abs((gone[step:] & gone[:-step]).double().mean() - p * p) <= error


def test_dropout_can_reach_the_first_and_the_last_number():
    """Over 4,000 draws on three numbers each is 0 in half of them, within 5 standard errors."""
    gone = torch.stack([drop(torch.ones(3), 0.5)[0] == 0 for _ in range(4000)]).double().mean(0)
    assert (gone - 0.5).abs().max() < 5 * 0.5 / 4000**0.5


def test_dropout_follows_the_seed_and_passes_its_mask_to_the_gradient():
    """The same seed gives the same zeros, another one others; d kept / dx is 0 where x was cut."""
    x = torch.randn(50, 33, requires_grad=True)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        kept, _ = drop(x, 0.3)
        masks.append(kept != 0)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(gradient, masks[2].float())


def test_dropout_touches_only_the_input_of_the_adapter_in_training():
    """In training y = W x + s B A dropout(x) with the unharmed W x; in evaluation no dropout."""
    layer, x = one_layer(dropout=0.5)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    kept, share = drop(x, 0.5)
    assert (kept == 0).any()
    low = kept / share @ layer.lora_A.T
    torch.testing.assert_close(y, x @ layer.base.weight.T + 3 * low @ layer.lora_B.T)
    clear = layer.base(x) + 3 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer.eval()(x), clear)


def test_initial_values_are_those_of_peft():
    """B = 0, and A fills (-1 / sqrt K, 1 / sqrt K) evenly: its variance is 1 / (3 K)."""
    layer = LoRALinear(nn.Linear(400, 300, bias=False), 64, 64, 0.0)
    assert layer.lora_B.eq(0).all()
    assert layer.lora_A.abs().max() <= 400**-0.5
    torch.testing.assert_close(layer.lora_A.var().item(), 1 / (3 * 400), rtol=0.03, atol=0)


# ----------------------------------------------------------------------------- a model with adapter


def test_all_seven_linear_layers_of_each_block_are_adapted_and_no_other():
    """Two blocks have 14 LoRA layers; embedding, norms and lm_head have none."""
    layers = lora_layers(add_lora(base_model(), 4, 8, 0.0))
    assert len(layers) == 2 * 7
    assert {name.rpartition(".")[2] for name in layers} == set(TARGETS)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_new_adapter_changes_nothing(bits):
    """B = 0: the logits are those of the base to the bit."""
    before = logits(base_model(bits))
    assert torch.equal(logits(add_lora(base_model(bits), 4, 8, 0.0)), before)


@pytest.mark.parametrize("bits", [16, 4])
def test_training_moves_the_adapter_and_leaves_the_base(bits):
    """A step gives gradients and new values to A and B; every tensor of the base stays equal."""
    model = random_adapter(base_model(bits))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = adapter_parameters(model)
    model(IDS).logsumexp(-1).sum().backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert trained == moved and len(moved) == len(parameters) == 2 * 14
    assert all(name.endswith(("lora_A", "lora_B")) for name in moved)


def test_off_is_the_base_to_the_bit_and_nests():
    """Inside adapter_off the logits are the base's; only leaving the outer block restores it."""
    before, model = logits(base_model()), random_adapter(base_model())
    adapted = logits(model)
    assert not torch.equal(adapted, before)
    with adapter_off(model):
        with adapter_off(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)


def test_an_exception_inside_off_restores_the_adapter():
    """A block that raises leaves every layer enabled again."""
    model = random_adapter(base_model())
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert all(layer.enabled for layer in lora_layers(model).values())


def test_the_adapter_of_a_bfloat16_base_is_float32():
    """A and B stay float32, their gradients too, while the logits are bfloat16."""
    model = random_adapter(base_model(dtype=torch.bfloat16))
    out = model(IDS)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert {p.grad.dtype for p in adapter_parameters(model)} == {torch.float32}


@pytest.mark.parametrize(
    ("rank", "dropout", "message"),
    [
        (0, 0.0, r"^rank 0 is outside 1\.\.16, the smaller side of .*k_proj: lower it$"),
        (17, 0.0, r"^rank 17 is outside 1\.\.16, the smaller side of .*k_proj: lower it$"),
        (4, 1.0, r"^dropout 1\.0 is outside \[0, 1\)"),
        (4, -0.1, r"^dropout -0\.1 is outside \[0, 1\)"),
    ],
)
def test_values_that_cannot_work_are_refused(rank, dropout, message):
    """Rank outside 1..smaller side and dropout outside [0, 1) are errors, and change no layer."""
    model = base_model()
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, 8, dropout)
    assert not lora_layers(model)


# ------------------------------------------------------------------------------------- PEFT's files


@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_logits_are_those_of_peft(writer):
    """transformers + PEFT with our file gives our logits; the file PEFT writes gives them too."""
    model = base_model()
    torch.testing.assert_close(logits(model), EXPECTED["base_logits"], rtol=0, atol=1e-4)
    load_adapter(model, FIXTURES / writer)
    torch.testing.assert_close(logits(model), EXPECTED["logits"], rtol=0, atol=1e-4)
    assert (EXPECTED["logits"] - EXPECTED["base_logits"]).abs().max() > 0.1


def test_a_saved_adapter_has_pefts_names_and_config(tmp_path):
    """Our file has the tensor names of PEFT's, and our config says what PEFT's says."""
    model = base_model()
    load_adapter(model, FIXTURES / "peft")
    save_adapter(model, tmp_path, base_model="base")
    folders = tmp_path, FIXTURES / "peft"
    ours, pefts = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[key], pefts[key]) for key in ours)
    ours, pefts = config_of(tmp_path), config_of(FIXTURES / "peft")
    pefts["target_modules"].sort()  # a set, to PEFT
    assert ours == {key: pefts[key] for key in ours}


@pytest.mark.parametrize("fresh", [True, False])
def test_loading_restores_what_was_saved(tmp_path, fresh):
    """Into a base or over another adapter of the same shape: the logits are the saved ones."""
    model = random_adapter(base_model())
    save_adapter(model, tmp_path)
    other = base_model() if fresh else random_adapter(base_model())
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_a_loaded_model_still_does_not_drop_out():
    """LoRA layers added to a model in evaluation mode are in evaluation mode."""
    model = base_model()
    load_adapter(model, FIXTURES / "ours")
    assert next(iter(lora_layers(model).values())).dropout == 0.1
    assert torch.equal(logits(model), logits(model))


def test_the_name_is_in_the_file_and_tells_contents_apart(tmp_path):
    """Same content, same default name; one changed number, another name; an own name is kept."""
    model = random_adapter(base_model())
    first, again = save_adapter(model, tmp_path / "a"), save_adapter(model, tmp_path / "b")
    adapter_parameters(model)[0].data[0, 0] += 1
    changed = save_adapter(model, tmp_path / "c")
    assert first == again != changed
    assert save_adapter(model, tmp_path / "d", name="mine") == "mine"
    assert load_adapter(base_model(), tmp_path / "d") == "mine"
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"name": first}


def test_a_failed_save_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    """When writing breaks off half way, the folder still loads as before."""
    model = random_adapter(base_model())
    save_adapter(model, tmp_path)
    before = logits(model)

    def break_off(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lora.save_file", break_off)
    nn.init.normal_(adapter_parameters(model)[1])
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path)
    other = base_model()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), before) and len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------- adapters that do not fit


def edited(folder: Path, **changes) -> Path:
    """A copy of our fixture whose config is changed."""
    shutil.copytree(FIXTURES / "ours", folder)
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "llama-8b"}, "belongs to llama-8b, the base model is base"),
        ({"r": 8}, r"lora_A.weight is \(4, 48\) in the file, \(8, 48\) in the model"),
        ({"target_modules": ["q_proj"]}, r"is \(4, 48\) in the file, None in the model"),
        ({"target_modules": ["q_proj", "lm_head"]}, "in the file, None in the model"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"target_modules": "all-linear"}, "'all-linear' is not a proper list"),
        ({"peft_type": "IA3"}, "peft_type IA3 is no LORA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, changes, message):
    """Another base, rank, target or kind is one line that says so; the model stays as it was."""
    model = base_model()
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, edited(tmp_path / "adapter", **changes), base_model="base")
    assert "\n" not in str(error.value) and not lora_layers(model)


def test_an_adapter_that_differs_from_the_models_layers_is_refused():
    """Rank, alpha and targets of existing LoRA layers are compared; all differences are told."""
    model = add_lora(base_model(), 2, 4, 0.0, targets=("q_proj", "v_proj"))
    told = "r is 4 .* 2 in the model; lora_alpha is 6 .* 4 in the model; target_modules is"
    with pytest.raises(ValueError, match=told):
        load_adapter(model, FIXTURES / "ours")


def test_damaged_files_are_refused(tmp_path):
    """A missing folder, a file cut off at any tenth, and broken JSON are errors of one line."""
    with pytest.raises(ValueError, match="^no whole adapter in .*nowhere"):
        load_adapter(base_model(), tmp_path / "nowhere")
    file = edited(tmp_path / "adapter") / "adapter_model.safetensors"
    whole = file.read_bytes()
    for tenth in range(10):
        file.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ValueError, match="^no whole adapter in") as error:
            load_adapter(base_model(), tmp_path / "adapter")
        assert "\n" not in str(error.value)
    file.write_bytes(whole)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="^no whole adapter in"):
        load_adapter(base_model(), tmp_path / "adapter")


# ------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("bits", [16, 4])
def test_merged_equals_unmerged(bits):
    """W + alpha / r * B A in plain layers gives the logits of W x + alpha / r * B A x to 1e-5."""
    model = random_adapter(base_model(bits))
    before = logits(model)
    assert merge(model) is model
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert not any(isinstance(m, LoRALinear | NF4Linear) for m in model.modules())


def test_merging_twice_is_merging_once():
    """A second merge changes no weight."""
    model = merge(random_adapter(base_model()))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    after = merge(model).state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_merging_an_nf4_model_without_adapter_restores_its_weights():
    """NF4 layers become plain layers that hold the dequantised weight in the compute dtype."""
    model = merge(base_model(4, torch.bfloat16))
    weight = base_model(16, torch.bfloat16).model.layers[0].mlp.up_proj.weight
    merged = model.model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16 and not torch.equal(merged, weight)
    assert torch.equal(merged, dequantize_nf4(quantize_nf4(weight)))


@pytest.mark.parametrize("bits", [16, 4])
def test_a_merged_checkpoint_is_a_plain_one(tmp_path, bits):
    """The folder has the tensors of the source and loads with no adapter to the same logits."""
    model = random_adapter(base_model(bits))
    before = logits(model)
    save_dense(model, tmp_path, FIXTURES / "base")
    names = [load_file(f / "model.safetensors").keys() for f in (tmp_path, FIXTURES / "base")]
    assert names[0] == names[1] and "lm_head.weight" not in names[0]
    loaded = load_model(str(tmp_path))[0]
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-5)


def test_a_merged_bfloat16_checkpoint_says_so(tmp_path):
    """The dtype in config.json is that of the tensors in the file."""
    model = random_adapter(base_model(dtype=torch.bfloat16))
    save_dense(model, tmp_path, FIXTURES / "base")
    weights = load_file(tmp_path / "model.safetensors").values()
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("source", ["nowhere", FIXTURES / "ours"])
def test_merging_into_a_folder_needs_a_source(tmp_path, source):
    """Without the base's folder nothing is merged and nothing is written."""
    model = random_adapter(base_model())
    with pytest.raises(ValueError, match="has no config.json: give the base checkpoint's folder$"):
        save_dense(model, tmp_path / "out", source)
    assert lora_layers(model) and not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_merged_into_itself(tmp_path):
    """The base's own folder is refused as the place of the merged model, and stays as it is."""
    base = shutil.copytree(FIXTURES / "base", tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the base checkpoint itself: choose another folder$"):
        save_dense(random_adapter(base_model()), base, tmp_path / "base" / ".." / "base")
    assert (base / "model.safetensors").read_bytes() == before
