"""--full: every weight is trained, the base stays at hand, and a plain checkpoint comes out."""

import pytest
import torch
from test_objectives import CHAT, PROMPT, RECORD, SHORT, twins

import evaluate
import full
import genpi
import lora
import runs
import synth
import train as room
from loss import pg_sequence, sft_sequence
from model import Config, Llama, load_model
from objectives import batch_kl, token_kl
from train import Recipe, batch_loss, train_step

IDS = torch.tensor([[5, 6, 7, 8]])


def free_model(tied: bool = False) -> Llama:
    """A random LLaMA all of whose weights are free and no longer its base's."""
    torch.manual_seed(0)
    model = Llama(Config(1792, 32, 48, 1, 2, 2, 16, 2048, tie_word_embeddings=tied))
    full.free_weights(model.requires_grad_(False))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


@torch.no_grad()
def test_adapter_off_gives_the_base():
    """Within the block, also a nested one, the logits are the base's; after it, or an error, the
    trained ones.
    """
    torch.manual_seed(0)
    base = Llama(Config(1792, 32, 48, 1, 2, 2, 16, 2048))(IDS)
    model = free_model()
    trained = model(IDS)
    assert not torch.equal(base, trained)
    with pytest.raises(KeyError), lora.adapter_off(model):
        with lora.adapter_off(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), base)
        raise KeyError
    assert torch.equal(model(IDS), trained)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_has_the_gradient_of_every_weight(tied):
    """Of embedding and lm_head too, that of the joint loss, each a mean over its target tokens."""
    model = free_model(tied)
    records = [RECORD, SHORT]
    sft = [sft_sequence(CHAT, record) for record in records]
    pg = [pg_sequence(CHAT, PROMPT, record) for record in records]
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(batch_loss(model, sft, pg, 0.7), parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    train_step(model, optimizer, sft, pg, Recipe(clip=1e9, micro_tokens=1))
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, dict(zip(names, expected, strict=True)), rtol=1e-3, atol=1e-6)


def test_kld_is_taught_by_the_frozen_base():
    """The teacher's lm_head is the base's as well, and nothing flows into the base."""
    model = free_model()
    some = twins(RECORD)
    places = [
        [t - 1 for t, label in enumerate(s.labels) if label >= 0]
        for s in (some[0], some[0].prompted)
    ]
    with torch.no_grad(), lora.adapter_off(model):
        taught = model(torch.tensor([some[0].prompted.ids]))[0, places[1]]
    by_hand = token_kl(taught, model(torch.tensor([some[0].ids]))[0, places[0]])
    parameters = list(model.parameters())
    found = batch_kl(model, some)
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4) and by_hand > 0.01
    expected = list(torch.autograd.grad(by_hand, parameters))
    torch.testing.assert_close(
        list(torch.autograd.grad(found, parameters)), expected, rtol=1e-3, atol=1e-6
    )


# ------------------------------------------------------------------------------------ the command

FLAGS = """--samples 3 --held-out 1 --epochs 2 --batch 2 --lr 0.01 --max-new-tokens 8
--max-reason-tokens 8 --save-every 1 --full --device cpu"""


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch):
    """Run genpi.py --full on the random checkpoint without the report, with more flags."""
    (tmp_path / "prompt.txt").write_text("Answer in one word.\n")
    inputs = ["Count to 3.", "Name a tree.", "Spell cat.", "Say no."]
    monkeypatch.setattr(synth, "more_inputs", lambda *_: list(inputs))
    monkeypatch.setattr(genpi, "report", lambda *_, **__: None)

    def call(out, *flags):
        paths = ["--model", checkpoint, "--prompt", tmp_path / "prompt.txt", "--out", out]
        return genpi.main([*FLAGS.split(), *map(str, paths), *flags])

    return call


def test_the_result_is_a_checkpoint_beside_its_base(command, checkpoint, tmp_path):
    """load_model opens the run folder; open_model gives the same, and the base with adapter_off.
    Every weight has moved.
    """
    out = tmp_path / "run"
    assert command(out, "--objective", "seqkd+kld", "--dtype", "float32") == 0
    base, _ = load_model(checkpoint)
    plain, _ = load_model(out)
    pairs = zip(plain.parameters(), base.parameters(), strict=True)
    assert not any(torch.equal(*pair) for pair in pairs)
    model, _ = room.open_model(runs.load_run(out, "cpu"))
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
        with lora.adapter_off(model):
            assert torch.equal(model(IDS), base(IDS))


def test_the_report_counts_all_weights(command, tmp_path):
    """The random checkpoint has 25,952."""
    out = tmp_path / "run"
    assert command(out) == 0
    found = evaluate.measure(runs.load_run(out, "cpu"), None, 1)
    assert found["trainable_params"] == found["total_params"] == 25_952
    assert found["trained"] == "lam 0.7, all weights" and found["samples"] == 3


def test_a_power_cut_changes_nothing(command, tmp_path, monkeypatch):
    """A run that is cut off and begun again ends with the same bytes."""
    assert command(tmp_path / "whole") == 0
    append = room.append_row

    def cut(path, row):
        append(path, row)
        if row["step"] == 2:
            monkeypatch.setattr(room, "append_row", append)
            raise ValueError("power cut")

    monkeypatch.setattr(room, "append_row", cut)
    assert command(tmp_path / "cut") == 2
    assert command(tmp_path / "cut") == 0
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_defaults():
    """The paper's batch of 64 and rate of 1e-5, unless a flag says otherwise; 16 bits."""
    args = genpi.parse_flags(["--full", "--model", "x"])
    assert (args.bits, args.batch, args.lr) == (16, 64, 1e-5)
    args = genpi.parse_flags("--full --model x --batch 4 --lr 0.1".split())
    assert (args.bits, args.batch, args.lr) == (16, 4, 0.1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--bits 4", ["--full", "--bits 4", "give --bits 16"]),
        ("--rank 8", ["--rank 8", "--full", "leave one out"]),
        ("--dropout 0", ["--dropout 0", "--full"]),
        ("--from x", ["--from x", "--full"]),
    ],
)
def test_what_full_cannot_do(flags, words, capsys):
    """One line names the flag and the cure."""
    assert genpi.main(["--full", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert [word for word in words if word not in told] == []


def test_damaged_weights_are_told_in_a_line(command, tmp_path):
    """Before the model is changed."""
    out = tmp_path / "run"
    assert command(out) == 0
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:9000])
    with pytest.raises(ValueError, match="cut short.*config.json.*goes on from its checkpoint"):
        room.open_model(runs.load_run(out, "cpu"))
