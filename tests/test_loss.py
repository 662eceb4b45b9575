"""The losses, on a vocabulary of three words and by hand.

A model says of the next word: a with probability 1/2, b with 1/4, c with 1/4. Then -log P is log 2
for an a and log 4 for a b or a c, whatever stood before.
"""

from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attention
import loss
from chat import Chat
from loss import (
    BOOST,
    IGNORE,
    Sequence,
    SlicedNLL,
    batch_nll,
    joint_loss,
    next_tokens,
    padded,
    pg_sequence,
    sft_sequence,
    token_nll,
)
from model import Config, Llama
from prompt import Prompt, message
from runs import Record
from train import micro_batches

A, B, C = 0, 1, 2
P = torch.tensor([1 / 2, 1 / 4, 1 / 4])


def logits(rows: int, columns: int) -> torch.Tensor:
    """The same prediction P everywhere: (rows, columns, 3)."""
    return P.log().expand(rows, columns, 3).clone()


def test_nll_is_the_sum_of_minus_log_p():
    """-log P(a b a) = log 2 + log 4 + log 2, of three tokens; the first word is not predicted."""
    nats, tokens = token_nll(logits(1, 4), torch.tensor([[C, A, B, A]]))
    assert nats.item() == pytest.approx(log(2) + log(4) + log(2))
    assert tokens == 3


def test_logits_predict_the_next_word_not_their_own():
    """If place t is sure of one word, the loss compares it with the label at t + 1."""
    sure = torch.full((1, 3, 3), -100.0)
    for place, word in enumerate([B, C, A]):
        sure[0, place, word] = 100.0
    right, _ = token_nll(sure, torch.tensor([[A, B, C]]))  # place 0 says b, and b stands at place 1
    wrong, _ = token_nll(sure, torch.tensor([[B, C, A]]))  # what each place says of itself
    assert right.item() == pytest.approx(0)
    assert wrong.item() == pytest.approx(2 * 200)


def test_only_labelled_words_carry_loss():
    """A question (IGNORE) costs nothing, its reply does: -log P(b) = log 4, of one token."""
    nats, tokens = token_nll(logits(1, 4), torch.tensor([[IGNORE, IGNORE, IGNORE, B]]))
    assert nats.item() == pytest.approx(log(4))
    assert tokens == 1


def test_logits_under_ignored_labels_do_not_matter():
    """Changing a prediction that no label asks for leaves the loss as it was."""
    labels = torch.tensor([[IGNORE, A, IGNORE, B]])
    changed = logits(1, 4)
    changed[0, 1] = torch.tensor([5.0, -3.0, 9.0])  # predicts place 2, which is ignored
    changed[0, 3] = torch.tensor([5.0, -3.0, 9.0])  # predicts beyond the end
    assert torch.equal(token_nll(changed, labels)[0], token_nll(logits(1, 4), labels)[0])


def test_shift_moves_labels_one_place_left():
    """The picture in next_tokens: the label of place t + 1 stands at t, the last place has none."""
    shifted = next_tokens(torch.tensor([[IGNORE, IGNORE, B, C]]))
    assert shifted.tolist() == [[IGNORE, B, C, IGNORE]]


def test_padding_adds_nothing():
    """A row padded on the right with IGNORE has the loss of the row alone."""
    alone = token_nll(logits(1, 3), torch.tensor([[IGNORE, A, B]]))
    padded = token_nll(logits(1, 6), torch.tensor([[IGNORE, A, B, IGNORE, IGNORE, IGNORE]]))
    assert alone[0].item() == pytest.approx(padded[0].item())
    assert alone[1] == padded[1] == 2


@pytest.mark.parametrize("tokens", [1, 3, 6, 100])
def test_micro_batches_add_up_to_the_batch(tokens):
    """However a batch is cut, nats and tokens add up to 2 log 2 + 2 log 4 of four tokens."""
    rows = [[IGNORE, A], [IGNORE, A, B], [IGNORE, IGNORE, C]]
    sequences = [Sequence([0 if w == IGNORE else w for w in row], row) for row in rows]
    parts = [
        token_nll(logits(*ids.shape), labels)
        for ids, labels in (padded(rows, "cpu") for rows in micro_batches(sequences, tokens))
    ]
    assert sum(nats.item() for nats, _ in parts) == pytest.approx(2 * log(2) + 2 * log(4))
    assert sum(n.item() for _, n in parts) == 4


def test_no_micro_batch_is_larger_than_allowed():
    """Padded size stays within the limit unless one sequence exceeds it; no row is lost."""
    sequences = [Sequence([0] * n, [0] * n) for n in (2, 9, 3, 3, 5, 1)]
    shapes = [tuple(padded(rows, "cpu")[0].shape) for rows in micro_batches(sequences, 8)]
    assert shapes == [(1, 9), (1, 5), (2, 3), (2, 2)]


def test_gradient_is_softmax_minus_one_hot():
    """d nats / d logits = softmax - one-hot at a labelled place and 0 elsewhere."""
    z = logits(1, 3).requires_grad_()
    token_nll(z, torch.tensor([[IGNORE, IGNORE, B]]))[0].backward()
    one_hot = torch.tensor([0.0, 1.0, 0.0])
    expected = torch.stack([torch.zeros(3), P - one_hot, torch.zeros(3)])
    torch.testing.assert_close(z.grad[0], expected)


@pytest.mark.parametrize("needs", ["x", "W", "xW"])
@pytest.mark.parametrize("at_a_time", [1, 2, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_of_the_logits_give_the_loss_and_gradient_of_them_all(
    monkeypatch, at_a_time, dtype, needs
):
    """SlicedNLL(x, W) is token_nll(x W^T) in value and gradient, 1, 2, 5 or all rows at a time."""
    torch.manual_seed(0)
    W, labels = 3 * torch.randn(11, 6, dtype=dtype), torch.randint(11, (2, 9))
    labels[0, :4] = labels[1, -3:] = IGNORE
    monkeypatch.setitem(loss.SLICE, "cpu", 11 * at_a_time)
    tensors = {"x": torch.full((2, 9, 6), 0.5, dtype=dtype).cumsum(1), "W": W}
    given = [tensors[name].requires_grad_() for name in needs]
    whole, n = token_nll(tensors["x"] @ W.T, labels)
    targets = next_tokens(labels)
    at = targets != IGNORE
    sliced = SlicedNLL.apply(tensors["x"][at], W, targets[at])
    expected, found = (torch.autograd.grad(3 * nats, given) for nats in (whole, sliced))
    assert n == 10 and expected[0].abs().max() > 1
    torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_slices_keep_the_gradient_of_a_sure_model_in_bfloat16():
    """Below 0.02 nats/token, where softmax and one-hot nearly cancel, dx is right to 5 %."""
    torch.manual_seed(0)
    W, targets = torch.randn(500, 64).bfloat16(), torch.arange(20)
    x = (0.25 * W[:20] + 0.01 * torch.randn(20, 64)).bfloat16().requires_grad_()
    nats = SlicedNLL.apply(x, W, targets)
    nats.backward()
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact @ W.double().T, targets, reduction="sum").backward()
    assert 0.0005 < nats.item() / 20 < 0.02
    assert (x.grad.double() - exact.grad).norm() < 0.05 * exact.grad.norm()


@pytest.mark.parametrize("boost", [BOOST[torch.float16], 1])
def test_slices_keep_the_tail_of_a_softmax_in_float16(boost, monkeypatch):
    """65,535 words of 2e-8 each are 0 in float16, but not together: dx is right to 1 %."""
    monkeypatch.setitem(BOOST, torch.float16, boost)
    torch.manual_seed(0)
    W = (1 + 0.1 * torch.randn(2**16, 8)).half()
    W[0, 0] = 18
    x = torch.eye(8)[:1].half().requires_grad_()
    SlicedNLL.apply(x, W, torch.tensor([0])).backward()
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact @ W.double().T, torch.tensor([0])).backward()
    error = (x.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert (error < 0.01) == (boost > 1), error


def test_the_loss_that_trains_is_token_nll():
    """batch_nll is token_nll of all logits, in value and in gradient: same shift, same mask."""
    torch.manual_seed(0)
    model = Llama(Config(9, 16, 24, 1, 2, 1, 8)).double()
    ids, labels = torch.randint(9, (2, 2, 7)).unbind()
    labels[0, :3] = labels[1, 5:] = IGNORE
    sequences = [Sequence(*pair) for pair in zip(ids.tolist(), labels.tolist(), strict=True)]
    found = []
    for nats in (token_nll(model(ids), labels)[0], batch_nll(model, sequences)):
        weight = model.model.layers[0].mlp.up_proj.weight
        found.append((nats, torch.autograd.grad(nats, weight)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_slices_survive_logits_that_overflow_exp():
    """-log softmax(200, 0, -200) of the second is 200 nats, with gradient (1, -1, 0) W."""
    x, W = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [0.0], [-1.0]])
    nats = SlicedNLL.apply(x, W, torch.tensor([1]))
    nats.backward()
    assert nats.item() == 200 and x.grad.item() == 1


def test_lam_weighs_the_two_losses():
    """L = (1 - lam) L_PG + lam L_SFT: GenPI Eq. 4, at the paper's 0.7 and at both ends."""
    sft, pg = 2.0, 10.0
    assert joint_loss(sft, pg, 0.7) == pytest.approx(0.7 * 2 + 0.3 * 10)
    assert joint_loss(sft, pg, 1) == sft
    assert joint_loss(sft, pg, 0) == pg


def test_lam_one_gives_pg_no_gradient():
    """At lam = 1 the prompt-generation loss does not move the model, at lam = 0 SFT does not."""
    sft, pg = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    joint_loss(sft, pg, 1).backward()
    assert (sft.grad, pg.grad) == (1, 0)
    sft.grad = pg.grad = None
    joint_loss(sft, pg, 0).backward()
    assert (sft.grad, pg.grad) == (0, 1)


# ----------------------------------------------------------------------------------- sequences

CHAT = Chat(Path(__file__).resolve().parent.parent / "tiny", 2048)
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


def test_a_text_that_reached_its_limit_has_no_ending():
    """Where the last turn, or the reason, was cut, its end-of-turn is read but is no target."""
    sft = sft_sequence(CHAT, replace(RECORD, cut_turn=True))
    pg = pg_sequence(CHAT, PROMPT, replace(RECORD, cut_reason=True))
    assert target_text(sft) == f"Act: bash{END}Act: answer(7)"
    assert target_text(pg) == f"{PROMPT.text}\n\nReason: {RECORD.reason}"
    assert sft.ids == sft_sequence(CHAT, RECORD).ids


def test_labels_are_ids():
    """A label is the id at its own place: shifting is the loss's business."""
    for sequence in (sft_sequence(CHAT, RECORD), pg_sequence(CHAT, PROMPT, RECORD)):
        assert all(
            label in (IGNORE, i) for i, label in zip(sequence.ids, sequence.labels, strict=True)
        )


def test_special_strings_in_a_record_stay_text():
    """An input that spells out a control token does not end its turn: targets stay the agent's."""
    record = Record(0, f"Say {END} now", ["Act: finish"], "No.", "So.")
    assert target_text(sft_sequence(CHAT, record)) == f"Act: finish{END}"
    assert message("user", record.pseudo_input)["content"] in CHAT.decode(
        sft_sequence(CHAT, record).ids
    )


# --------------------------------------------------------------------------------------- memory


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
    monkeypatch.setattr(attention, "CHUNK", 16)  # whose scores are another matter
    torch.manual_seed(0)
    model = Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048))
    sequence, vocabulary = pg_sequence(CHAT, Prompt("yes " * 400), RECORD), 1792
    tokens = sequence.n_targets
    for slice_ in (8 * vocabulary, 64 * vocabulary):
        monkeypatch.setitem(loss.SLICE, "cpu", slice_)
        with LargestTensor() as largest:
            batch_nll(model, [sequence]).backward()
        weights = vocabulary * 32  # lm_head and embedding
        assert max(slice_, weights) <= largest.numbers <= max(slice_, weights, 64 * tokens)
        assert largest.numbers < tokens * vocabulary / 4
