"""What the paper compares GenPI with, on the same records: --objective and --pg-target.

    genpi       (1 - lam) L_PG + lam L_SFT                       the method, Eq. 4 (loss.py)
    sft         L_SFT: lam = 1
    pg          L_PG: lam = 0
    prepend     L_SFT with p in the context, each time with probability --prepend-prob
    seqkd       - sum_t log adapter(y_t | x, y_<t)
    kld         sum_t KL( base(. | p, x, y_<t) || adapter(. | x, y_<t) )
    seqkd+kld   their sum

where t runs over the tokens of the agent's turns in the recorded conversation y. All but genpi and
pg leave L_PG out. Where it is computed, it may write something else than in Eq. 3:

    prompt+reason          - log P(p, r | x, yS_0, yT_0)      Eq. 3
    prompt                 - log P(p | x, yS_0, yT_0)         no reason
    reason                 - log P(r | x, yS_0, yT_0)         no prompt
    reason-given-prompt    - log P(r | p, x, yS_0, yT_0)      p stands in the question
    prompt-given-reason    - log P(p | x, yS_0, yT_0, r)      r stands in the question

Trained with p always prepended, and asked with p too, a model is the one that the paper calls
fine-tuned with the prompt (Table 5; evaluate.py tables).

Sequence-level distillation takes the likeliest text for all that the teacher could say. Here that
is the greedy yT, so that seqkd is sft, to the bit; what tells the paper's rows of that name apart
is that all weights are trained (--full). The teacher of kld is the base, of the same weights with
the adapter off, so it costs a forward pass with p, and no memory for a second model.

Left out: a temperature, KL in the other direction, other weights of the sum than 1 and 1, texts
that are sampled anew in each step.

Letters: N target tokens, D width, V vocabulary. Source: GenPI section 6; Kim & Rush (arXiv
1606.07947) for seqkd and the sum, Snell et al. (2209.15189) for kld with a prompted teacher.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import loss
from chat import Chat
from linear import matmul
from lora import adapter_off
from loss import (
    BOOST,
    IGNORE,
    REPLIES,
    Sequence,
    SlicedNLL,
    at_targets,
    batch_nll,
    build_sequence,
    sft_sequence,
    teacher_sequence,
)
from model import Llama
from prompt import Prompt, conversation, student_messages
from runs import Record, hash_seed

LAMS = {"sft": 1.0, "pg": 0.0, "prepend": 1.0, "seqkd": 1.0, "kld": 1.0, "seqkd+kld": 1.0}
TWINS = ("prepend", "kld", "seqkd+kld")  # they need the conversation with p, too

# ----------------------------------------------------------------------------- what L_PG writes

WRITES = {  # --pg-target: how the question of L_PG ends, and what the model then writes
    "prompt": ("Write out that prompt.", "{p}"),
    "reason": ("Write the reason why that prompt changed your reply.", "{r}"),
    "reason-given-prompt": (
        "That prompt was:\n\n{p}\n\nWrite the reason why it changed your reply.",
        "{r}",
    ),
    "prompt-given-reason": (
        "It changed your reply for this reason:\n\n{r}\n\nWrite out that prompt.",
        "{p}",
    ),
}


def pg_messages(prompt: Prompt, record: Record, target: str) -> list[dict]:
    """The question of L_PG and its answer; of Eq. 3 those of loss.py."""
    if target not in WRITES:
        return loss.pg_messages(prompt, record)
    ask, answer = (text.format(p=prompt.text, r=record.reason) for text in WRITES[target])
    question = REPLIES.format(record=record) + ask
    return conversation(student_messages(question), [answer])


def pg_sequence(chat: Chat, prompt: Prompt, record: Record, target: str) -> Sequence:
    """The question, and the answer as the target; of Eq. 3 that of loss.py. GenPI Table 3."""
    if target not in WRITES:
        return loss.pg_sequence(chat, prompt, record)
    messages = pg_messages(prompt, record, target)
    cut = record.cut_reason and messages[-1]["content"].endswith(record.reason)
    return build_sequence(chat, messages, {len(messages) - 1}, cut)


def recalled(lam: float, target: str) -> str:
    """The --pg-target whose question asks for p as in training; Eq. 3 where none does."""
    return target if lam < 1 and target in ("prompt", "prompt-given-reason") else "prompt+reason"


# ------------------------------------------------------------------------- p in the conversation


@dataclass(frozen=True)
class Twin(Sequence):
    """A conversation without p, and the same one with p in its context.

    The targets are the same tokens in the same order. As long as the longer of the two.
    """

    prompted: Sequence

    @property
    def bare(self) -> Sequence:
        return Sequence(self.ids, self.labels)

    def __len__(self) -> int:
        return max(len(self.ids), len(self.prompted.ids))


def conversation_sequence(
    chat: Chat, prompt: Prompt, record: Record, objective: str
) -> Sequence | Twin:
    """What an objective learns of a record's conversation."""
    bare = sft_sequence(chat, record)
    if objective not in TWINS:
        return bare
    prompted = teacher_sequence(chat, prompt, record)
    assert target_ids(bare) == target_ids(prompted)
    return Twin(bare.ids, bare.labels, prompted)


def target_ids(sequence: Sequence) -> list[int]:
    return [label for label in sequence.labels if label != IGNORE]


def prepend(batch: list[Twin], probability: float, seed: int, step: int) -> list[Sequence]:
    """Each conversation of a batch with p in its context, with this probability, or without.

    Drawn anew for each sample and step, and the same when a step is done again.
    """
    rng = random.Random(hash_seed(seed, "prepend", step))
    return [twin.prompted if rng.random() < probability else twin.bare for twin in batch]


# ---------------------------------------------------------------------------------- distillation


def token_kl(taught: Tensor, logits: Tensor) -> Tensor:
    """Sum KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)) over places, in nats.

    taught, logits (N, V): those of the teacher's P and of the adapter's Q. Forward KL: Q must be
    large wherever P is.
    """
    log_p = taught.float().log_softmax(-1)
    log_q = logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


class SlicedKL(torch.autograd.Function):
    """KL of taught U^T to x W^T: taught and x (N, D), teacher's and adapter's lm_head U, W (V, D).

    Same as token_kl of these logits, without ever holding more of them than a slice:

        d KL / d logits = Q - P,       d KL / d x = (Q - P) W

    as in loss.SlicedNLL, where the teacher is sure of one token. Three tensors of the size of the
    logits are alive at a time, so a slice is a third as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, taught: Tensor, U: Tensor) -> Tensor:
        nats = torch.zeros((), device=x.device)
        gradient = []
        needs_x, needs_W = ctx.needs_input_grad[:2]
        ctx.dW = torch.zeros_like(W) if needs_W else None
        boost = ctx.boost = BOOST.get(x.dtype, 1)
        rows = max(1, loss.SLICE[x.device.type] // (3 * len(W)))
        for part, seen in zip(x.split(rows), taught.split(rows), strict=True):
            log_q = matmul(part, W.T).float().log_softmax(-1)
            log_p = matmul(seen, U.T).float().log_softmax(-1)
            p = log_p.exp()
            nats += log_p.sub_(log_q).mul_(p).sum()
            if needs_x or needs_W:
                error = log_q.exp_().sub_(p).mul_(boost).to(x.dtype)
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
        return *(d if d is None else d * scale for d in (ctx.dx, ctx.dW)), None, None


def lesson(model: Llama, twins: list[Twin]) -> tuple[Tensor, Tensor]:
    """The teacher's states (N, D) at the targets, with p in its context, and its lm_head."""
    with torch.no_grad(), adapter_off(model):
        taught, _ = at_targets(model, [twin.prompted for twin in twins])
        return taught, model.lm_head.weight.detach()


def batch_kl(model: Llama, twins: list[Twin]) -> Tensor:
    """sum_t KL( base(. | p, x, y_<t) || adapter(. | x, y_<t) ) of some conversations, in nats."""
    taught = lesson(model, twins)
    x, _ = at_targets(model, twins)
    return SlicedKL.apply(x, model.lm_head.weight, *taught)


def batch_nll_and_kl(model: Llama, twins: list[Twin]) -> Tensor:
    """batch_nll + batch_kl, of one pass of the adapter."""
    taught = lesson(model, twins)
    x, targets = at_targets(model, twins)
    W = model.lm_head.weight
    return SlicedNLL.apply(x, W, targets) + SlicedKL.apply(x, W, *taught)


def cost_of(objective: str) -> Callable[[Llama, list[Sequence]], Tensor]:
    """What a batch costs under an objective, in nats: a function of the model and the sequences."""
    return {"kld": batch_kl, "seqkd+kld": batch_nll_and_kl}.get(objective, batch_nll)


# -------------------------------------------------------------------------------------- in words


def check_flags(objective: str, lam: float, said: dict) -> None:
    """Raise ValueError for a flag that this objective knows nothing of. said: flags that are given.

    lam: the weight of L_SFT, by the objective or by its flag.
    """
    if lam != LAMS.get(objective, lam):
        told = f"--lam {lam:g} is not the {LAMS[objective]:g} of --objective {objective}"
        raise ValueError(f"{told}; leave it out, or take --objective genpi")
    if "pg_target" in said and lam == 1:
        told = f"--pg-target {said['pg_target']}: nothing is written"
        by = "--lam 1" if objective == "genpi" else f"--objective {objective}"
        raise ValueError(f"{told} with {by}; leave it out, or take --objective genpi or pg")
    if "prepend_prob" in said and objective != "prepend":
        told = f"--prepend-prob {said['prepend_prob']:g} needs --objective prepend"
        raise ValueError(f"{told}, not {objective}")


def in_words(
    objective: str, lam: float, target: str, probability: float, full: bool = False
) -> str:
    """What was descended, for the head of a report."""
    told = f"lam {lam:g}" if objective == "genpi" else f"objective {objective}"
    if objective == "prepend":
        told += f" (probability {probability:g})"
    if lam < 1 and target in WRITES:
        told += f", L_PG writes {target}"
    return f"{told}, all weights" if full else told
