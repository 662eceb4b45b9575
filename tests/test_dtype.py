"""--dtype: what a run computes in, kept by its folder, the same bytes in the same type."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import arguments
import genpi
import runs
import synth
import talk
import train
from lora import add_lora
from loss import Sequence
from model import load_model
from sampler import Sampling, Voice, say
from train import Recipe, batch_loss, train_step

SIZES = """--samples 2 --held-out 1 --epochs 2 --batch 2 --max-new-tokens 4 --max-reason-tokens 4
--rank 2 --device cpu"""
INPUTS = ["Count to 3.", "Name a tree.", "Spell cat."]


@pytest.fixture
def go(checkpoint, tmp_path, monkeypatch):
    """Run genpi.py without its report in a folder of this name -> (exit code, folder)."""
    (tmp_path / "p.txt").write_text("Answer in one word.\n")
    monkeypatch.setattr(genpi, "report", lambda *_, before: None)
    monkeypatch.setattr(synth, "more_inputs", lambda *_: INPUTS)
    flags = [*SIZES.split(), "--model", str(checkpoint), "--prompt", str(tmp_path / "p.txt")]

    def call(name, *more):
        return genpi.main([*flags, "--out", str(tmp_path / name), *more]), tmp_path / name

    return call


def begun(folder):
    return json.loads((folder / "args.json").read_text())["dtype"]


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", runs.DTYPES)
def test_the_same_type_gives_the_same_bytes(go, dtype):
    """Two runs in one type end with one adapter, in float32 whatever the type; another type's is
    another.
    """
    one, two, other = (
        go(name, "--dtype", each)[1]
        for name, each in (
            ("one", dtype),
            ("two", dtype),
            ("other", "bfloat16" if dtype == "float32" else "float32"),
        )
    )
    assert adapter(one) == adapter(two) != adapter(other)
    weights = load_file(one / "adapter_model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_a_run_goes_on_in_its_own_type(go, monkeypatch):
    """Interrupted and begun again without the flag, it ends with the bytes of an undisturbed one;
    the model of an opened run is of that type.
    """
    _, whole = go("whole", "--dtype", "bfloat16")
    saved = train.save_checkpoint

    def interrupted(*args):
        saved(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", interrupted)
        code, part = go("part", "--dtype", "bfloat16", "--save-every", "1")
    assert code == 130 and not (part / "adapter_config.json").exists()
    assert go("part", "--save-every", "1") == (0, part)
    assert begun(part) == "bfloat16" and adapter(part) == adapter(whole)
    model, _ = train.open_model(runs.load_run(part))
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("amx, dtype", [(False, "float32"), (True, "bfloat16")])
def test_auto_asks_the_processor(go, amx, dtype, monkeypatch):
    """bfloat16 where a unit for it multiplies; --dtype float32 still has its way there."""
    monkeypatch.setattr(arguments, "has_amx", lambda: amx)
    assert begun(go("auto")[1]) == dtype
    assert begun(go("said", "--dtype", "float32")[1]) == "float32"


@pytest.mark.parametrize("flags, dtype", [([], "bfloat16"), (["--dtype", "float16"], "float16")])
def test_a_talk_may_be_in_another_type(go, flags, dtype, monkeypatch):
    """Without the flag it is in the run's own."""
    _, folder = go("run", "--dtype", "bfloat16")
    opened = []
    monkeypatch.setattr(talk, "open_model", lambda run: opened.append(run.dtype) or (None, None))
    monkeypatch.setattr(talk, "read_message", lambda ask: "/quit")
    assert genpi.main(["--chat", str(folder), *flags]) == 0
    assert opened == [dtype] and begun(folder) == "bfloat16"


def test_a_contradiction_is_one_line(go, capsys):
    """A run begun in one type refuses another, and says which is which."""
    _, folder = go("run", "--dtype", "bfloat16")
    before = adapter(folder)
    capsys.readouterr()
    assert go("run", "--dtype", "float32")[0] == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(told) == 1 and "dtype bfloat16 (now float32)" in told[0] and "--out" in told[0]
    assert adapter(folder) == before and begun(folder) == "bfloat16"


def test_a_folder_of_an_earlier_version_is_float32(go, tmp_path):
    """A folder whose flags know no type goes on in float32, to the same bytes."""
    _, folder = go("run", "--dtype", "float32")
    before = adapter(folder)
    args = json.loads((folder / "args.json").read_text())
    del args["dtype"]
    (folder / "args.json").write_text(json.dumps(args))
    assert runs.load_run(folder).dtype == "float32"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint")
    (folder / "metrics.jsonl").unlink()
    assert go("run")[0] == 0 and adapter(folder) == before
    assert go("run", "--dtype", "bfloat16")[0] == 2


@pytest.mark.parametrize("value", ["double", 5, None])
def test_a_damaged_type_is_named(go, capsys, value):
    """A type that no flag allows is one line, wherever the folder is opened."""
    _, folder = go("run")
    args = json.loads((folder / "args.json").read_text()) | {"dtype": value}
    (folder / "args.json").write_text(json.dumps(args))
    capsys.readouterr()
    assert go("run")[0] == 2
    told = capsys.readouterr().err
    assert "dtype" in told and str(folder) in told and "Traceback" not in told
    with pytest.raises(ValueError, match="dtype"):
        runs.load_run(folder)


# ----------------------------------------------------------------------- unpacked beside the codes


def test_unpacked_weights_compute_the_same(checkpoint):
    """The same reply and, to rounding, the same loss and gradient as by unpacking for each product;
    in a model that is moved or loaded anew the codes alone count.
    """
    sequences = [Sequence(list(range(4, 40)), list(range(4, 40)))]
    found = []
    for dense in (True, False):
        model, chat = load_model(checkpoint, bits=4)
        layers = [m for m in model.modules() if hasattr(m, "dense")]
        assert len(layers) == 7 and all(layer.dense is not None for layer in layers)
        if not dense:
            model.float()  # to the type that it has: a move
            assert all(layer.dense is None for layer in layers)
        reply = say(Voice(model, chat), [[{"role": "user", "content": "Hello"}]], Sampling(8))
        torch.manual_seed(0)
        add_lora(model, 2, 4, 0.0)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.data.normal_()
        loss = batch_loss(model, sequences, sequences, 0.5)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((reply, loss.detach(), gradients))
    (said, loss, gradients), (expected, true_loss, true_gradients) = found
    assert said == expected
    torch.testing.assert_close(loss, true_loss)
    torch.testing.assert_close(gradients, true_gradients)


def test_too_large_a_model_stays_packed(checkpoint, monkeypatch):
    """Beyond its share of the machine's memory nothing is unpacked."""
    monkeypatch.setattr("quant.DENSE_SHARE", 0)
    model, _ = load_model(checkpoint, bits=4)
    assert all(m.dense is None for m in model.modules() if hasattr(m, "dense"))


def test_other_codes_are_other_weights(checkpoint):
    """A state dict that is loaded replaces what was unpacked, too."""
    model, _ = load_model(checkpoint, bits=4)
    layer = model.model.layers[0].mlp.up_proj
    other = model.model.layers[0].mlp.gate_proj
    x = torch.randn(2, layer.in_features)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))


def test_a_step_in_bfloat16_is_nearly_that_in_float32(checkpoint):
    """Losses and gradients of one step differ by the rounding of bfloat16 (8 bits), not by more;
    weights and activations are bfloat16, the adapter and its gradients float32.
    """
    sequences = [Sequence(list(range(4, 100)), list(range(4, 100)))]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_model(checkpoint, dtype=dtype, bits=4)
        torch.manual_seed(0)
        add_lora(model, 4, 8, 0.0).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        still = torch.optim.SGD(parameters, lr=0.0)
        sft, pg, _ = train_step(model, still, sequences, sequences, Recipe(lam=0.5, clip=1e9))
        assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters}
        assert {p.grad.dtype for p in parameters} == {torch.float32}
        found.append((sft, pg, torch.cat([p.grad.flatten() for p in parameters])))
    (sft, pg, gradient), (sft_half, pg_half, gradient_half) = found
    assert sft_half == pytest.approx(sft, rel=0.01) and pg_half == pytest.approx(pg, rel=0.01)
    assert (gradient - gradient_half).norm() < 0.05 * gradient.norm()
    assert sft_half != sft
