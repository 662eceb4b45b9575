"""The optimiser step, the loop around it, and resuming, on a small random LLaMA."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

import lora
import train as room
from chat import Chat
from loss import joint_loss, pg_sequence, sft_sequence, token_nll
from model import Config, Llama
from prompt import Prompt
from runs import Record
from train import (
    Recipe,
    batch_loss,
    draw_share,
    learning_rate,
    sample_order,
    train,
    train_step,
)

CHAT = Chat(Path(__file__).resolve().parent.parent / "tiny", 2048)
PROMPT = Prompt("Say Act: first.")
RECIPE = Recipe(
    lr=1e-2, epochs=4, batch=2, seed=3, clip=1.0, micro_tokens=300, warmup=0.1, save_every=3
)
FREE = replace(RECIPE, clip=1e9)  # nothing is clipped


def small_model(seed=0):
    """A random LLaMA of two layers with a LoRA adapter whose B is not zero."""
    torch.manual_seed(seed)
    model = Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048))
    lora.add_lora(model, rank=4, alpha=8, dropout=0.0)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def records(n):
    words = ["music", "plan", "notes on the garden", "a", "all of the books of the school"]
    return [
        Record(
            i,
            f"Count {words[i % 5]} {i}.",
            [f"Act: bash {i}"] * (1 + 2 * (i % 2)),
            "No.",
            "So " * (i + 1),
        )
        for i in range(n)
    ]


def sequences(n):
    return [sft_sequence(CHAT, r) for r in records(n)], [
        pg_sequence(CHAT, PROMPT, r) for r in records(n)
    ]


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_step_has_the_gradient_of_the_joint_loss(lam):
    """One step's gradient is that of (1 - lam) PG + lam SFT, each a mean over all its target
    tokens.
    """
    model, (sft, pg) = small_model(), sequences(5)
    means = [batch_loss(model, sft, pg, only) for only in (1.0, 0.0)]
    batch_loss(model, sft, pg, lam).backward()
    expected = [p.grad.clone() for p in lora.adapter_parameters(model)]
    optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
    losses = train_step(model, optimizer, sft, pg, replace(FREE, lam=lam, micro_tokens=400))
    for p, gradient in zip(lora.adapter_parameters(model), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
    assert losses[:2] == pytest.approx([mean.item() for mean in means], rel=1e-5)
    norm = math.sqrt(sum((g**2).sum().item() for g in expected))
    assert losses[2] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("scale", [room.LOSS_SCALE[torch.float16], 1])
def test_a_float16_base_gives_the_gradient_of_float32(scale, monkeypatch):
    """Within 1 % thanks to the loss scale; without it what is small is lost.

    The small weight stands for a batch of 42,000 target tokens instead of 42.
    """
    monkeypatch.setitem(room.LOSS_SCALE, torch.float16, scale)
    sft, _ = sequences(5)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        model = small_model()
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.half().to(dtype)  # the same numbers
        parameters = lora.adapter_parameters(model)
        assert {p.dtype for p in parameters} == {torch.float32}
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        train_step(model, optimizer, sft, [], replace(FREE, lam=0.001))
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    half, whole = gradients
    error = (half - whole).norm() / whole.norm()
    assert half.dtype == torch.float32 and (error < 0.01) == (scale > 1), error


def test_the_loss_of_a_batch_weighs_every_target_token_alike():
    """L divides the nats of all sequences of a kind by all their targets: no mean of means."""
    model, (sft, pg) = small_model(), sequences(3)
    means = []
    for group in (sft, pg):
        pairs = [(torch.tensor([s.ids]), torch.tensor([s.labels])) for s in group]
        nats = [token_nll(model(ids), labels)[0].item() for ids, labels in pairs]
        means.append(sum(nats) / sum(s.n_targets for s in group))
    assert batch_loss(model, sft, pg, 0.7).item() == pytest.approx(joint_loss(*means, 0.7))


def test_gradient_does_not_depend_on_the_micro_batch():
    """One sequence at a time or all at once: the same gradient."""
    gradients = []
    for tokens in (1, 100_000):
        model = small_model()
        optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
        train_step(model, optimizer, *sequences(6), replace(FREE, micro_tokens=tokens))
        gradients.append([p.grad for p in lora.adapter_parameters(model)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_a_share_of_the_pg_sequences_has_the_gradient_of_them_all_on_average():
    """The mean over all six pairs of four samples is loss and gradient of the four, exactly, though
    the samples differ in their target tokens.
    """
    sft, pg = sequences(4)

    def step(drawn):
        model = small_model()
        optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
        losses = train_step(model, optimizer, sft, pg, FREE, drawn)
        return losses[1], torch.cat([p.grad.flatten() for p in lora.adapter_parameters(model)])

    pairs = [step(list(pair)) for pair in combinations(pg, 2)]
    loss, gradient = step(None)
    assert len({s.n_targets for s in pg}) > 1
    assert sum(each for each, _ in pairs) / 6 == pytest.approx(loss, rel=1e-5)
    mean = torch.stack([each for _, each in pairs]).mean(0)
    torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-7)


def test_a_share_is_drawn_anew_each_step_and_the_same_again():
    """A quarter of 8 is 2 samples, never none; over 400 steps each comes 100 times or so."""
    quarter = replace(RECIPE, pg_share=0.25)
    drawn = [draw_share(list(range(8)), quarter, step) for step in range(400)]
    assert all(len(set(some)) == 2 for some in drawn)
    assert all(70 < sum(i in some for some in drawn) < 130 for i in range(8))
    assert draw_share(list(range(8)), quarter, 7) == drawn[7]
    assert len(draw_share([1, 2], replace(RECIPE, pg_share=0.01), 0)) == 1
    assert draw_share([1, 2], RECIPE, 0) == [1, 2] and draw_share([], quarter, 0) == []


def test_checkpointing_changes_memory_not_gradients():
    """Recomputed activations give the gradient of kept ones."""
    gradients = []
    for checkpointing in (False, True):
        model = small_model()
        model.checkpointing = checkpointing
        optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
        train_step(model, optimizer, *sequences(3), FREE)
        gradients.append([p.grad for p in lora.adapter_parameters(model)])
    torch.testing.assert_close(*gradients)


def test_gradient_is_clipped():
    """A step with --clip c hands the optimiser a gradient of norm c at most."""
    model = small_model()
    optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
    *_, norm = train_step(model, optimizer, *sequences(3), replace(RECIPE, clip=1e-3))
    clipped = math.sqrt(sum((p.grad**2).sum().item() for p in lora.adapter_parameters(model)))
    assert norm > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_rate_rises_linearly_and_falls_as_a_cosine():
    """Warm-up reaches the peak at its last step; half way down the cosine stands at half; the end
    is near 0.
    """
    recipe = Recipe(lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.5, abs=1e-6)
    assert 0 < rates[99] < 0.001


def test_an_epoch_shows_every_sample_once():
    """Each epoch is a permutation, and not the same one."""
    order = sample_order(10, 3, seed=0)
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_last_batch_may_be_short(tmp_path, monkeypatch):
    """Five samples in batches of two are three steps: none is left out."""
    sizes = []

    def note_sizes(model, optimizer, sft, pg, recipe, drawn):
        sizes.append((len(sft), len(pg)))
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(room, "train_step", note_sizes)
    train(small_model(), *sequences(5), replace(RECIPE, epochs=1), tmp_path)
    assert sizes == [(2, 2), (2, 2), (1, 1)]


def test_every_step_drops_other_numbers(tmp_path, monkeypatch):
    """What a step draws for its dropout no other step of the run draws."""
    draws = []

    def note_draw(*args):
        draws.append(torch.rand(1).item())
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(room, "train_step", note_draw)
    train(small_model(), *sequences(4), RECIPE, tmp_path)
    assert len(set(draws)) == len(draws) == 8


def trained(out, stop_at=None, monkeypatch=None):
    """Train a small model with dropout in `out`; stop_at: pull the plug after that step."""
    torch.manual_seed(0)
    model = Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048))
    lora.add_lora(model, rank=4, alpha=8, dropout=0.2)
    if stop_at:
        append = room.append_row

        def pull_the_plug(path, row):
            append(path, row)
            if row["step"] == stop_at:
                raise SystemError("power cut")

        monkeypatch.setattr(room, "append_row", pull_the_plug)
        with pytest.raises(SystemError):
            train(model, *sequences(4), RECIPE, out)
        monkeypatch.undo()
    else:
        train(model, *sequences(4), RECIPE, out)
    return lora.adapter_parameters(model)


@pytest.mark.parametrize("stop_at", [2, 4, 6, 8])
def test_resumed_training_ends_with_the_same_bits(tmp_path, monkeypatch, stop_at):
    """A run that loses power after a step and is started again ends with the same bits."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "broken", stop_at, monkeypatch)
    broken = trained(tmp_path / "broken")
    assert all(torch.equal(a, b) for a, b in zip(whole, broken, strict=True))
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 9))


def test_training_lowers_both_losses(tmp_path):
    """Eight steps on four samples bring both losses down."""
    trained(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["sft"] < rows[0]["sft"]
    assert rows[-1]["pg"] < rows[0]["pg"]


def test_the_base_is_frozen(tmp_path):
    """Training moves the adapter and not one weight of the base."""
    model = small_model()
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    adapter = [p.clone() for p in lora.adapter_parameters(model)]
    train(model, *sequences(4), RECIPE, tmp_path)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert not any(
        torch.equal(a, p) for a, p in zip(adapter, lora.adapter_parameters(model), strict=True)
    )
