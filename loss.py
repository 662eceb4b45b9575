"""The losses of GenPI: the two token sequences of a record, and what the model pays for them.

    L_SFT = - sum_i log P(yT_i | x, yT_<i, env_<=i)      without p in the context      Eq. 2
    L_PG  = - log P(p, r | x, yS_0, yT_0)                the model writes p and r      Eq. 3
    L     = (1 - lam) L_PG + lam L_SFT                   lam = 0.7                     Eq. 4

where env_i is what the environment said before yT_i. Eq. 2 and 3 are token_nll of a sequence, whose
labels say what is a target: the agent's turns, or p and r, each with its end-of-turn token, for the
model must also learn to stop. A text that reached its limit of tokens has no end-of-turn label: its
author never said that it ends there. Here they are sums; train_step divides each, once, by the
target tokens of the whole batch.

Left out: cutting a target. The authors' code stops p and r at 512 tokens, here all that was written
is a target, or the record is left out.

Letters: B rows, T tokens, V vocabulary, D width, N target tokens. Source: GenPI section 4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from chat import Chat
from linear import matmul
from model import Llama
from prompt import Prompt, conversation, student_messages
from runs import Record

IGNORE = -100  # a label that carries no loss
# times a gradient: below 6e-8 a number of float16 is 0. It is made in the forward pass, before the
# scale of train.py arrives, and so has one of its own, which the backward pass takes out again
BOOST = {torch.float16: 1024}
SLICE = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits at a time: 32 MB and 512 MB in float32

# --------------------------------------------------------------------------------------- losses


def next_tokens(labels: Tensor) -> Tensor:
    """Shift labels (B, T) so that place t holds the token that is predicted there. The only shift.

    ids      BOS   How    7   EOT          what the model reads
    labels    -     -     7   EOT          what carries loss: the reply, not the question
    shifted   -     7   EOT    -           logits at "How" predict 7, logits at 7 predict EOT
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of the labelled tokens.

    logits (B, T, V) of the ids, labels (B, T) those ids or IGNORE. Returns (nats, tokens), not
    divided: whoever sums over micro-batches divides once. Source: GenPI Eq. 2 and 3.
    """
    targets = next_tokens(labels)
    is_target = targets != IGNORE
    nats = F.cross_entropy(logits[is_target].float(), targets[is_target], reduction="sum")
    return nats, is_target.sum()


def joint_loss(sft, pg, lam: float):
    """L = (1 - lam) L_PG + lam L_SFT of two mean losses in nats/token. Source: GenPI Eq. 4."""
    return (1 - lam) * pg + lam * sft


# ------------------------------------------------------------------------------------ sequences


@dataclass(frozen=True)
class Sequence:
    """ids and labels of one training text, as long as each other."""

    ids: list[int]
    labels: list[int]  # the id itself where it is a target, else IGNORE

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_targets(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def build_sequence(chat: Chat, messages: list[dict], targets: set[int], cut: bool) -> Sequence:
    """Encode messages; the tokens that the messages numbered in `targets` wrote are labels.

    A message wrote its text and its end-of-turn token, and no header. cut: the last one reached its
    limit of tokens, so its author never said that it ends there, and its end-of-turn is no label.
    """
    ids, owner = chat.encode(messages)
    labels = [i if who in targets else IGNORE for i, who in zip(ids, owner, strict=True)]
    if cut:
        end = max(place for place, label in enumerate(labels) if label != IGNORE)
        labels[end] = IGNORE
    return Sequence(ids, labels)


def turns_sequence(chat: Chat, opening: list[dict], record: Record) -> Sequence:
    """The conversation after `opening`; the agent's turns behind it are the targets."""
    messages = conversation(opening, record.turns)
    agent = set(range(len(opening), len(messages), 2))
    return build_sequence(chat, messages, agent, record.cut_turn)


def sft_sequence(chat: Chat, record: Record) -> Sequence:
    """The conversation without p; every agent turn is a target. Source: GenPI Eq. 2."""
    return turns_sequence(chat, student_messages(record.pseudo_input), record)


def teacher_sequence(chat: Chat, prompt: Prompt, record: Record) -> Sequence:
    """The conversation with p in the context; the agent's turns after p are the targets."""
    return turns_sequence(chat, prompt.teacher(record.pseudo_input), record)


REPLIES = """A user wrote:

{record.pseudo_input}

Without a prompt you replied:

{record.student}

With a prompt you replied:

{record.teacher}

"""
QUESTION = REPLIES + "Write out that prompt, and after it the reason why it changed your reply."
BEFORE_REASON = "\n\nReason:"


def prompt_question(record: Record) -> list[dict]:
    """The question of L_PG: which prompt turned yS_0 into yT_0?"""
    return student_messages(QUESTION.format(record=record))


def pg_messages(prompt: Prompt, record: Record) -> list[dict]:
    """The question and its answer: all of p, then r."""
    answer = f"{prompt.text}{BEFORE_REASON} {record.reason}"
    return conversation(prompt_question(record), [answer])


def pg_sequence(chat: Chat, prompt: Prompt, record: Record) -> Sequence:
    """p and r after x, yS_0 and yT_0; p and r are the target. Source: GenPI Eq. 3."""
    messages = pg_messages(prompt, record)
    return build_sequence(chat, messages, {len(messages) - 1}, record.cut_reason)


# ------------------------------------------------------------------------------------ fast path


def padded(sequences: list[Sequence], device) -> tuple[Tensor, Tensor]:
    """ids and labels (B, T) of some sequences, padded on the right to the longest of them."""
    T = max(len(s.ids) for s in sequences)
    ids = [s.ids + [0] * (T - len(s.ids)) for s in sequences]
    labels = [s.labels + [IGNORE] * (T - len(s.labels)) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def batch_nll(model: Llama, sequences: list[Sequence]) -> Tensor:
    """Nats over the targets of some sequences, which are one forward pass.

    Same as token_nll(model(ids), labels)[0] of what padded gives, without ever holding all logits:
    lm_head is applied where there is a target, a slice at a time.
    """
    x, targets = at_targets(model, sequences)
    return SlicedNLL.apply(x, model.lm_head.weight, targets)


def at_targets(model: Llama, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """What lm_head reads where a target is predicted, (N, D), and the targets (N,), row by row."""
    ids, labels = padded(sequences, model.lm_head.weight.device)
    targets = next_tokens(labels)
    is_target = targets != IGNORE
    return model.hidden(ids, at=is_target), targets[is_target]


class SlicedNLL(torch.autograd.Function):
    """Nats of targets (N,) under the logits x W^T of x (N, D) and lm_head W (V, D).

    Same as the cross-entropy in token_nll, without the logits: a slice knows its gradient

        d nll / d logits = softmax - one-hot,       d nll / d x = (softmax - one-hot) W

    as soon as its loss, so the forward pass keeps this (N, D) and nothing of the size of N V (with
    --full, where W is not frozen, d nll / d W = (softmax - one-hot)^T x as well). The difference is
    taken in float32: near the end of training both are nearly 1. In float16 most of a softmax would
    be 0, so there the gradient is kept BOOST times as large. A second derivative, to which it would
    be a constant, is refused.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, targets: Tensor) -> Tensor:
        nats = torch.zeros((), device=x.device)
        gradient = []
        needs_x, needs_W = ctx.needs_input_grad[:2]
        ctx.dW = torch.zeros_like(W) if needs_W else None
        boost = ctx.boost = BOOST.get(x.dtype, 1)
        rows = max(1, SLICE[x.device.type] // len(W))
        for part, target in zip(x.split(rows), targets.split(rows), strict=True):
            logits = matmul(part, W.T).float()
            most = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, target[:, None]) - most
            exp = logits.sub_(most).exp_()  # in place: the slice is the largest tensor there is
            mass = exp.sum(-1, keepdim=True)
            nats += (mass.log() - chosen).sum()
            if needs_x or needs_W:
                exp.div_(mass / boost)[torch.arange(len(exp), device=x.device), target] -= boost
                error = exp.to(x.dtype)
            if needs_x:
                gradient.append(matmul(error, W))
            if needs_W:
                ctx.dW += matmul(error.T, part)
        ctx.dx = torch.cat(gradient) if gradient else None
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, dnats: Tensor):
        scale = dnats / ctx.boost
        return *(d if d is None else d * scale for d in (ctx.dx, ctx.dW)), None
