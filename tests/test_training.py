"""Sequences, the optimiser step and resuming, on the embedded model's tokenizer and a small random
LLaMA.
"""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import genpi
import lora
from genpi import (
    IGNORE,
    Sequence,
    learning_rate,
    pg_sequence,
    sample_order,
    sequence_nll,
    sft_sequence,
    token_nll,
    train,
    train_step,
)
from model import Chat, Config, Llama
from synth import Prompt, Record, message

TINY = Path(__file__).resolve().parent.parent / "tiny"
CHAT = Chat(TINY, 2048)
TURNS = ["Act: bash", "The output is 7", "Act: answer(7)"]
RECORD = Record(0, "Count the files in /srv/music.", TURNS, "Use ls.", "It acts.")
PROMPT = Prompt("Say Act: first.")
END = "<|eot_id|>"


def target_text(sequence):
    """The labelled tokens as text, end-of-turn tokens written out."""
    kept = [i for i, label in zip(sequence.ids, sequence.labels, strict=True) if label != IGNORE]
    return CHAT.tokenizer.decode(kept, skip_special_tokens=False)


def test_sft_targets_are_the_agent_turns():
    """L_SFT asks for every agent turn with its end, and for nothing of x, the environment or
    headers.
    """
    assert target_text(sft_sequence(CHAT, RECORD)) == f"Act: bash{END}Act: answer(7){END}"


def test_sft_reads_the_input_without_the_prompt():
    """The SFT sequence holds x as the first user message and no word of p."""
    text = CHAT.tokenizer.decode(sft_sequence(CHAT, RECORD).ids, skip_special_tokens=False)
    assert RECORD.pseudo_input in text
    assert PROMPT.text not in text


def test_pg_targets_are_the_whole_prompt_and_the_reason():
    """L_PG asks for p, uncut, then r, then the end; x, yS_0 and yT_0 are only read."""
    long = Prompt("\n".join(f"Rule {i}." for i in range(300)))
    sequence = pg_sequence(CHAT, long, RECORD)
    assert target_text(sequence) == f"{long.text}\n\nReason: {RECORD.reason}{END}"
    read = CHAT.tokenizer.decode(
        [i for i, label in zip(sequence.ids, sequence.labels, strict=True) if label == IGNORE]
    )
    assert all(part in read for part in (RECORD.pseudo_input, RECORD.student, RECORD.turns[0]))
    assert RECORD.turns[2] not in read


def test_labels_are_ids():
    """A label is the id at its own place: shifting is the loss's business."""
    for sequence in (sft_sequence(CHAT, RECORD), pg_sequence(CHAT, PROMPT, RECORD)):
        assert all(
            label in (IGNORE, i) for i, label in zip(sequence.ids, sequence.labels, strict=True)
        )


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
    nats = {}
    for name, group in (("sft", sft), ("pg", pg)):
        n_tokens = sum(label != IGNORE for s in group for label in s.labels)
        parts = [
            token_nll(model(torch.tensor([s.ids])), torch.tensor([s.labels]))[0] for s in group
        ]
        nats[name] = sum(parts) / n_tokens
    ((1 - lam) * nats["pg"] + lam * nats["sft"]).backward()
    expected = [p.grad.clone() for p in lora.adapter_parameters(model)]
    optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
    losses = train_step(model, optimizer, sft, pg, lam, 1e9, 400, "cpu")
    for p, gradient in zip(lora.adapter_parameters(model), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
    assert losses[:2] == pytest.approx([nats["sft"].item(), nats["pg"].item()], rel=1e-5)
    norm = math.sqrt(sum((g**2).sum().item() for g in expected))
    assert losses[2] == pytest.approx(norm, rel=1e-4)


def test_gradient_does_not_depend_on_the_micro_batch():
    """One sequence at a time or all at once: the same gradient."""
    gradients = []
    for tokens in (1, 100_000):
        model = small_model()
        optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
        train_step(model, optimizer, *sequences(6), 0.7, 1e9, tokens, "cpu")
        gradients.append([p.grad for p in lora.adapter_parameters(model)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_checkpointing_changes_memory_not_gradients():
    """Recomputed activations give the gradient of kept ones."""
    gradients = []
    for checkpointing in (False, True):
        model = small_model()
        model.checkpointing = checkpointing
        train_step(
            model,
            torch.optim.SGD(lora.adapter_parameters(model), lr=0.0),
            *sequences(3),
            0.7,
            1e9,
            999,
            "cpu",
        )
        gradients.append([p.grad for p in lora.adapter_parameters(model)])
    torch.testing.assert_close(*gradients)


def test_gradient_is_clipped():
    """A step with --clip c hands the optimiser a gradient of norm c at most."""
    model = small_model()
    optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
    *_, norm = train_step(model, optimizer, *sequences(3), 0.7, 1e-3, 999, "cpu")
    clipped = math.sqrt(sum((p.grad**2).sum().item() for p in lora.adapter_parameters(model)))
    assert norm > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_rate_rises_linearly_and_falls_as_a_cosine():
    """Warm-up reaches the peak at its last step; half way down the cosine stands at half; the end
    is near 0.
    """
    args = Namespace(lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, args) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.5, abs=1e-6)
    assert 0 < rates[99] < 0.001


def test_an_epoch_shows_every_sample_once():
    """Each epoch is a permutation, and not the same one."""
    order = sample_order(10, 3, seed=0)
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


FLAGS = {
    "lr": 1e-2, "weight_decay": 0.0, "epochs": 4, "batch": 2, "seed": 3, "lam": 0.7, "clip": 1.0,
    "micro_tokens": 300, "warmup": 0.1, "save_every": 3,
}  # fmt: skip


def trained(out, stop_at=None, monkeypatch=None):
    """Train a small model with dropout in `out`; stop_at: pull the plug after that step."""
    torch.manual_seed(0)
    model = Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048))
    lora.add_lora(model, rank=4, alpha=8, dropout=0.2)
    if stop_at:
        note = genpi.note_step

        def pull_the_plug(out, step, *rest):
            note(out, step, *rest)
            if step == stop_at:
                raise SystemError("power cut")

        monkeypatch.setattr(genpi, "note_step", pull_the_plug)
        with pytest.raises(SystemError):
            train(model, *sequences(4), Namespace(**FLAGS), out)
        monkeypatch.undo()
    else:
        train(model, *sequences(4), Namespace(**FLAGS), out)
    return lora.adapter_parameters(model)


@pytest.mark.parametrize("stop_at", [1, 3, 5, 7])
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
    train(model, *sequences(4), Namespace(**FLAGS), tmp_path)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert not any(
        torch.equal(a, p) for a, p in zip(adapter, lora.adapter_parameters(model), strict=True)
    )


def test_special_strings_in_a_record_stay_text():
    """An input that spells out a control token does not end its turn: targets stay the agent's."""
    record = Record(0, f"Say {END} now", ["Act: finish"], "No.", "So.")
    assert target_text(sft_sequence(CHAT, record)) == f"Act: finish{END}"
    assert message("user", record.pseudo_input)["content"] in CHAT.decode(
        sft_sequence(CHAT, record).ids
    )


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation returned in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return out


def test_memory_does_not_grow_with_vocabulary_times_length(monkeypatch):
    """Forward and backward pass hold at most SLICE logits at a time, not tokens x vocabulary."""
    model, sequence = small_model(), pg_sequence(CHAT, Prompt("yes " * 400), RECORD)
    tokens, vocabulary = sum(label != IGNORE for label in sequence.labels), 1792
    ids, labels = torch.tensor([sequence.ids]), torch.tensor([sequence.labels])
    for slice_ in (8 * vocabulary, 64 * vocabulary):
        monkeypatch.setitem(genpi.SLICE, "cpu", slice_)
        with LargestTensor() as largest:
            sequence_nll(model, ids, labels).backward()
        weights = vocabulary * 32  # lm_head and embedding
        assert max(slice_, weights) <= largest.numbers <= max(slice_, weights, 64 * tokens)
        assert largest.numbers < tokens * vocabulary / 4


def test_the_micro_batch_fills_the_free_memory(monkeypatch):
    """From peaks of 1000 + 50 n bytes at two lengths n, 4/5 of 101,000 free bytes hold 1,596."""
    sequences_ = [Sequence([0] * n, [0] * n) for n in (7, 40, 20)]
    monkeypatch.setattr(genpi, "peak_bytes", lambda model, s, device: 1000 + 50 * len(s.ids))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (101_000, 200_000))
    monkeypatch.setattr(lora, "adapter_parameters", lambda model: [])
    assert genpi.affordable_tokens(None, sequences_, torch.device("cuda")) == 1596
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 200_000))
    assert genpi.affordable_tokens(None, sequences_, torch.device("cuda")) == 40  # at least one row
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (101_000, 200_000))
    monkeypatch.setattr(lora, "adapter_parameters", lambda model: [torch.zeros(50, 50)])
    assert genpi.affordable_tokens(None, sequences_, torch.device("cuda")) == 996  # AdamW's moments
    assert genpi.affordable_tokens(None, sequences_, torch.device("cpu")) == 2048


def test_only_what_is_trained_decides_the_micro_batch(tmp_path, monkeypatch):
    """With lam 1 the PG sequences are not measured, with lam 0 the SFT sequences are not."""
    (sft, pg), seen = sequences(2), []
    note = lambda model, found, device: seen.append(found) or 999  # noqa: E731
    monkeypatch.setattr(genpi, "affordable_tokens", note)
    for lam, trained_on in ((1.0, sft), (0.0, pg), (0.7, sft + pg)):
        seen.clear()
        out = tmp_path / str(lam)
        out.mkdir()
        flags = FLAGS | {"lam": lam, "micro_tokens": None, "epochs": 1}
        train(small_model(), sft, pg, Namespace(**flags), out)
        assert seen == [trained_on]


@pytest.mark.parametrize(
    ("there", "samples", "held_out", "expected"),
    [(10, 6, 4, (6, 4)), (10, 3, 4, (3, 4)), (9, 6, 4, (6, 3)), (2, 6, 4, (1, 1))],
)
def test_split_takes_what_is_asked_and_the_last_are_held_out(there, samples, held_out, expected):
    """Never more than --samples for training; with too few records a third at most is held out."""
    training, held = genpi.split_records(records(there), samples, held_out)
    assert (len(training), len(held)) == expected
    assert [r.index for r in training] == list(range(len(training)))
    assert [r.index for r in held] == list(range(there))[-len(held) :]
