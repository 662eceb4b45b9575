"""Generative Prompt Internalization: move a long prompt p into a small LoRA adapter.

    python genpi.py --prompt os.txt

synthesises pseudo inputs, conversations, student outputs and reasons (synth.py), trains an adapter
on an NF4-quantised base with the joint loss below, and reports how much was internalised
(evaluate.py).

    L_SFT = - sum_i log P(yT_i | x, yT_<i, env_<=i)      without p in the context      GenPI Eq. 2
    L_PG  = - log P(p, r | x, yS_0, yT_0)                the model writes p and r      GenPI Eq. 3
    L     = (1 - lam) L_PG + lam L_SFT                                                 GenPI Eq. 4

Departures from the paper, each with its reason:
  * each term is a mean over all target tokens of the 32 samples, not over micro-batches, so that
    the gradient does not depend on how the batch is cut up;
  * a target is never cut: the authors' code stops L_PG at 512 tokens, which loses most of a long p
    and all of r. A record that does not fit the context is left out and counted;
  * without --demos a prompt that has none of its own is shown the inputs found so far
    (Self-Instruct);
  * a conversation that ends with a final action ends even if the environment forgets to say [END];
  * every step seeds its own dropout, so that an interrupted run ends with the same bits as an
    uninterrupted one;
  * the environment is opened by a user turn ("Start a new conversation."), since most chat formats
    cannot begin with the assistant.

Letters: B batch, T tokens, V vocabulary, D width, N target tokens.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import safetensors
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import lora
from model import Chat, Llama, find_folder, load_model
from synth import (
    ASSISTANT,
    TASKS,
    Prompt,
    Record,
    Server,
    Task,
    Voice,
    append_record,
    conversation,
    hash_seed,
    message,
    parse_prompt,
    pseudo_inputs,
    quality,
    read_records,
    replace_text,
    stream,
    student_messages,
    synthesise,
)

HERE = Path(__file__).resolve().parent
IGNORE = -100  # a label that carries no loss
SLICE = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits at a time: 32 MB and 512 MB in float32
WAVE = 64  # records that are synthesised together; an interrupted wave is begun again

# --------------------------------------------------------------------------------------- losses


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Shift labels (B, T) so that place t holds the token that is predicted there. The only shift.

    ids      BOS   How    7   EOT          what the model reads
    labels    -     -     7   EOT          what carries loss: the reply, not the question
    shifted   -     7   EOT    -           logits at "How" predict 7, logits at 7 predict EOT
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the negative log-likelihood of the labelled tokens.

    logits (B, T, V) of the ids, labels (B, T) those ids or IGNORE. Returns (nats, tokens), not
    divided: whoever sums over micro-batches divides once. Source: GenPI Eq. 2 and 3.
    """
    targets = next_tokens(labels)
    at = targets != IGNORE
    return F.cross_entropy(logits[at].float(), targets[at], reduction="sum"), at.sum()


def joint_loss(sft, pg, lam: float):
    """L = (1 - lam) L_PG + lam L_SFT of two mean losses in nats/token. Source: GenPI Eq. 4."""
    return (1 - lam) * pg + lam * sft


# ------------------------------------------------------------------------------------ sequences

PROMPT_QUESTION = """A user wrote:

{x}

Without a prompt you replied:

{student}

With a prompt you replied:

{teacher}

Write out that prompt, and after it the reason why it changed your reply."""


@dataclass(frozen=True)
class Sequence:
    """ids and labels of one training text, as long as each other."""

    ids: list[int]
    labels: list[int]


def build_sequence(chat: Chat, messages: list[dict], targets: set[int]) -> Sequence:
    """Encode messages; the tokens written by the messages in `targets` are labels, all others
    IGNORE.

    A target's tokens are its text and its end-of-turn token: the model must also learn to stop.
    """
    ids, owner = chat.encode(messages)
    return Sequence(
        ids, [i if who in targets else IGNORE for i, who in zip(ids, owner, strict=True)]
    )


def sft_sequence(chat: Chat, record: Record) -> Sequence:
    """The conversation without p; every agent turn is a target. Source: GenPI Eq. 2."""
    messages = conversation(student_messages(record.pseudo_input), record.turns)
    return build_sequence(
        chat, messages, {i for i, m in enumerate(messages) if m["role"] == "assistant"}
    )


def prompt_question(x: str, student: str, teacher: str) -> list[dict]:
    """The question of L_PG: which prompt turned yS_0 into yT_0?"""
    text = PROMPT_QUESTION.format(x=x, student=student, teacher=teacher)
    return [message("system", ASSISTANT), message("user", text)]


def pg_messages(prompt: Prompt, x: str, student: str, teacher: str, reason: str) -> list[dict]:
    """The question and its answer: all of p, then r."""
    return [
        *prompt_question(x, student, teacher),
        message("assistant", f"{prompt.text}\n\nReason: {reason}"),
    ]


def pg_sequence(chat: Chat, prompt: Prompt, record: Record) -> Sequence:
    """p and r after x, yS_0 and yT_0; p and r are the target. Source: GenPI Eq. 3."""
    messages = pg_messages(
        prompt, record.pseudo_input, record.student, record.teacher, record.reason
    )
    return build_sequence(chat, messages, {len(messages) - 1})


def micro_batches(sequences: list[Sequence], tokens: int, device) -> Iterator[tuple]:
    """Yield (ids, labels) (B, T), right-padded, of at most `tokens` padded tokens, longest first.

    Like lengths share a micro-batch, so that little is padding; a longer sequence goes alone.
    """
    rest = sorted(sequences, key=lambda s: len(s.ids), reverse=True)
    while rest:
        T = len(rest[0].ids)
        group, rest = rest[: max(1, tokens // T)], rest[max(1, tokens // T) :]
        ids = [s.ids + [0] * (T - len(s.ids)) for s in group]
        labels = [s.labels + [IGNORE] * (T - len(s.labels)) for s in group]
        yield torch.tensor(ids, device=device), torch.tensor(labels, device=device)


# ------------------------------------------------------------------------------------- training


class SlicedNLL(torch.autograd.Function):
    """token_nll of the logits x W^T, which exist only for a slice of the targets at a time.

    x (N, D) in front of a frozen lm_head W (V, D), targets (N,) -> nats. A slice knows its gradient

        d nll / d logits = softmax - one-hot,       d nll / d x = (softmax - one-hot) W

    as soon as its loss, so the forward pass keeps this (N, D) and nothing of the size of V. The
    difference is taken in float32: near the end of training both are nearly 1.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, W: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nats, gradient = torch.zeros((), device=x.device), []
        rows = max(1, SLICE[x.device.type] // len(W))
        for part, target in zip(x.split(rows), targets.split(rows), strict=True):
            logits = F.linear(part, W).float()
            most = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, target[:, None]) - most
            exp = logits.sub_(most).exp_()  # in place: the slice is the largest tensor there is
            mass = exp.sum(-1, keepdim=True)
            nats += (mass.log() - chosen).sum()
            if ctx.needs_input_grad[0]:
                exp.div_(mass)[torch.arange(len(exp), device=x.device), target] -= 1
                gradient.append(exp.to(x.dtype) @ W)
        ctx.gradient = torch.cat(gradient) if gradient else None
        return nats

    @staticmethod
    def backward(ctx, dnats: torch.Tensor):
        return ctx.gradient * dnats, None, None


def sequence_nll(model: Llama, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats over the targets of a micro-batch: token_nll(model(ids), labels)[0] in less memory."""
    targets = next_tokens(labels)
    at = targets != IGNORE
    return SlicedNLL.apply(model.hidden(ids, at=at), model.lm_head.weight, targets[at])


def train_step(
    model, optimizer, sft, pg, lam, clip, micro_tokens, device
) -> tuple[float, float, float]:
    """One optimiser step on lists of Sequence -> mean sft and pg loss (nats/token), gradient norm.

    The gradients of micro-batches, and of processes that share the batch, add up to that of
    joint_loss(sum sft / N_sft, sum pg / N_pg). Source: GenPI Eq. 4.
    """
    optimizer.zero_grad(set_to_none=True)
    means, parameters = torch.zeros(2, device=device), lora.adapter_parameters(model)
    for term, sequences in enumerate((sft, pg)):
        n_tokens = sum(label != IGNORE for s in sequences for label in s.labels)
        for ids, labels in micro_batches(own_share(sequences), micro_tokens, device):
            losses = [0.0, 0.0]  # a micro-batch is part of one of the two means
            losses[term] = sequence_nll(model, ids, labels) / n_tokens
            joint_loss(*losses, lam).backward()
            means[term] += losses[term].detach()
    add_up(parameters, means)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    if math.isfinite(norm):
        optimizer.step()
    return *means.tolist(), norm


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then a cosine to 0. Source: GenPI §4, SGDR (arXiv 1608.03983) Eq. 5."""
    warm = max(1, round(args.warmup * steps))
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def sample_order(n: int, epochs: int, seed: int) -> list[int]:
    """The samples in the order of training: each epoch is a fresh permutation."""
    order = []
    for epoch in range(epochs):
        order += random.Random(f"{seed}-{epoch}").sample(range(n), n)
    return order


def affordable_tokens(model: Llama, sequences: list[Sequence], device) -> int:
    """Padded tokens of a micro-batch that fills 4/5 of the free memory; 2,048 on a CPU.

    Peak memory is a line in the tokens. Two points of it are measured, on the longest sequence and
    on its first half, for what a token takes depends on shape, data type and checkpointing.
    """
    if device.type != "cuda":
        return 2048  # SmolLM2-135M's shape, two cores: half was 11 % slower, twice 19 %
    torch.cuda.empty_cache()
    longest = max(sequences, key=lambda s: len(s.ids))
    half = Sequence(*(part[: len(part) // 2] for part in (longest.ids, longest.labels)))
    peak_bytes(model, half, device)  # workspaces and tables that are made once
    (few, low), (many, high) = ((len(s.ids), peak_bytes(model, s, device)) for s in (half, longest))
    a_token = max(1, (high - low) / (many - few))
    fixed = max(0, high - a_token * many)
    fixed += 12 * sum(p.numel() for p in lora.adapter_parameters(model))  # AdamW's, and add_up's
    free, _ = torch.cuda.mem_get_info(device)
    found = max(len(longest.ids), int((0.8 * free - fixed) / a_token))
    print(f"--micro-tokens {found}: a token takes {a_token / 2**20:.2f} MiB")
    return found


def peak_bytes(model: Llama, sequence: Sequence, device) -> int:
    """CUDA memory that the passes over one sequence take beyond what is allocated already."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ids, labels = (torch.tensor([part], device=device) for part in (sequence.ids, sequence.labels))
    sequence_nll(model, ids, labels).backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(device) - before


def train(model: Llama, sft: list[Sequence], pg: list[Sequence], args, out: Path) -> None:
    """Train the adapter on pairs of sequences, from the checkpoint in `out` if there is one.

    An interrupt costs the steps since the last checkpoint: half a step is never saved. Raises:
    ValueError for a checkpoint that does not fit, and when a loss is not finite.
    """
    device, (rank, _) = next(model.parameters()).device, team()
    parameters = lora.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    order = sample_order(len(sft), args.epochs, args.seed)
    steps = math.ceil(len(order) / args.batch)
    done = load_checkpoint(out, model, optimizer)
    if rank == 0:
        keep_metrics(out / "metrics.jsonl", done)
    model.train()
    used = (sft if args.lam > 0 else []) + (pg if args.lam < 1 else [])
    micro_tokens = args.micro_tokens or affordable_tokens(model, used, device)
    progress = tqdm(
        range(done, steps), f"{'training':<18}", total=steps, initial=done, unit="step",
        ncols=100, disable=rank > 0,
    )  # fmt: skip
    for step in progress:
        clock, batch = time.perf_counter(), order[step * args.batch : (step + 1) * args.batch]
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args)
        torch.manual_seed(hash_seed(args.seed, "dropout", step, rank))  # a step's noise is its own
        terms = [sft[i] for i in batch if args.lam > 0], [pg[i] for i in batch if args.lam < 1]
        losses = train_step(model, optimizer, *terms, args.lam, args.clip, micro_tokens, device)
        check_finite(losses, step, args, out)
        if rank > 0:  # the first process keeps the books
            continue
        note_step(out, step, losses, optimizer, terms, time.perf_counter() - clock)
        progress.set_postfix(sft=f"{losses[0]:.3f}", pg=f"{losses[1]:.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_checkpoint(out, model, optimizer, step + 1)
    model.eval()


def check_finite(losses, step: int, args, out: Path) -> None:
    """Raise ValueError, with what to change, if a loss or the gradient is not finite."""
    if not all(map(math.isfinite, losses)):
        raise ValueError(
            f"step {step + 1}: the loss is {losses[0]:.3g} (SFT), {losses[1]:.3g} (PG), "
            f"the gradient norm {losses[2]:.3g}; the last good checkpoint stays in {out}; "
            f"lower --lr (now {args.lr:g}) or --clip ({args.clip:g}), with another --out"
        )


def note_step(out: Path, step: int, losses, optimizer, terms, seconds: float) -> None:
    """Append a line to metrics.jsonl: losses in nats/token, tokens read, seconds."""
    sft, pg, norm = losses
    rate = optimizer.param_groups[0]["lr"]
    tokens = sum(len(s.ids) for sequences in terms for s in sequences)
    row = {"step": step + 1, "sft": sft, "pg": pg, "lr": rate, "grad_norm": norm}
    row |= {"tokens": tokens, "seconds": seconds}
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def keep_metrics(path: Path, steps: int) -> None:
    """Drop the lines of steps after the checkpoint: they will be done again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= steps]
        replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, but a last one cut short; ValueError names a corrupt one."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(True), 1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                rows.append({"step": int(row["step"]), "seconds": float(row["seconds"]), **row})
            except (ValueError, TypeError, KeyError):
                told = f"{path} line {number} is corrupt; delete that line"
                raise ValueError(told) from None
    return rows


def named_state(model: Llama, optimizer) -> dict[str, torch.Tensor]:
    """Adapter and both moments of AdamW by name, as views."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[name] = p.data
            moments = optimizer.state.get(p) or {
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            state |= {f"{name}/{key}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
    return state


def save_checkpoint(out: Path, model: Llama, optimizer, step: int) -> None:
    """Write checkpoint/state.safetensors: all that a step depends on besides the flags and the
    data.

    The schedule, the order of the data and the dropout noise are functions of the step and the
    seed.
    """
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    state = {
        name: t.detach().cpu().contiguous() for name, t in named_state(model, optimizer).items()
    }
    save_file(state, folder / "state.new", metadata={"step": str(step)})
    os.replace(folder / "state.new", folder / "state.safetensors")


def load_checkpoint(out: Path, model: Llama, optimizer) -> int:
    """Restore adapter and optimiser in place -> the number of steps done, 0 if nothing is saved.

    Raises: ValueError if the file is damaged or of another run.
    """
    path = out / "checkpoint" / "state.safetensors"
    if not path.exists():
        return 0
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
        saved = load_file(path)
        shapes = {name: t.shape for name, t in named_state(model, optimizer).items()}
        if shapes != {name: t.shape for name, t in saved.items()}:
            raise ValueError(path)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError):
        told = f"{path} is no checkpoint of this run; delete it, and the training begins anew"
        raise ValueError(told) from None
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(saved[name])
            moments = {
                key: saved[f"{name}/{key}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step


# ------------------------------------------------------------------------- several processes


def join_team(device: str) -> None:
    """Meet the other processes if torchrun has started this one; each takes a GPU of its own."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "gloo"
        if device == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the others wait while the first one synthesises
        dist.init_process_group(backend, timeout=timedelta(days=7))


def team() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) for a process on its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(sequences: list[Sequence]) -> list[Sequence]:
    """What this process computes of a batch: every n-th sequence in order of length."""
    rank, n = team()
    return sorted(sequences, key=lambda s: len(s.ids))[rank::n] if n > 1 else sequences


def add_up(parameters: list[torch.nn.Parameter], means: torch.Tensor) -> None:
    """Replace gradients and losses (2,) by their sums over all processes, in one exchange."""
    if team()[1] == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([means, *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    means.copy_(flat[:2])
    for p, part in zip(parameters, flat[2:].split([g.numel() for g in gradients]), strict=True):
        p.grad = part.view_as(p)


# ---------------------------------------------------------------------------------------- flags

PAPER = {
    "samples": 1000,
    "held_out": 100,
    "epochs": 10,
    "batch": 32,
    "lr": 1e-4,
    "max_new_tokens": 512,
}
# The embedded model is 4,000 times smaller than the paper's: a higher rate, and less of all else.
EMBEDDED = {
    "samples": 192, "held_out": 50, "epochs": 4, "batch": 8, "lr": 3e-3, "max_new_tokens": 128,
}  # fmt: skip


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """All flags, with the paper's values as defaults."""
    parser = argparse.ArgumentParser(
        prog="genpi.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Move a long prompt into a LoRA adapter (GenPI, arXiv 2411.15927).",
    )
    add = parser.add_argument_group("what to internalise").add_argument
    add("--prompt", type=Path, default=HERE / "os.txt", help="the prompt file (UTF-8)")
    add("--task", choices=sorted(TASKS), help="kind of prompt; None: by the file's name, or any")
    add("--environment", help="whom the agent talks to, in a few words; None: the task's")
    add("--demos", type=Path, help="file of first user messages as examples, one a line")
    add("--out", type=Path, help="run folder; None: runs/NAME of the prompt file")
    add("--chat", type=Path, metavar="RUN", help="talk to the model of a finished run instead")
    add = parser.add_argument_group("models").add_argument
    add("--model", help="folder or Hub id; None: the embedded model in tiny/, with its preset")
    add("--generator", help="folder, Hub id or URL (http://HOST:PORT/v1) of the writer of inputs "
        "and reasons; None: --model")
    add("--bits", type=int, choices=(4, 16), default=4, help="4: NF4 (QLoRA); 16: not quantised")
    add("--device", choices=("cpu", "cuda"), help="None: cuda if there is one")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    server_flags(parser)
    synthesis_flags(parser)
    training_flags(parser)
    return parser


def server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "a server as --generator", "any with OpenAI's chat completions; OPENAI_API_KEY is its key",
    ).add_argument
    add("--generator-model", metavar="NAME", help="what the server calls it; None: its first model")
    add("--concurrency", type=int, default=16, help=f"requests in flight; up to {WAVE} are of use")
    add("--timeout", type=float, default=300.0, help="seconds that one request may take")


def synthesis_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("synthesis (GenPI section 3)").add_argument
    add("--samples", type=int, default=PAPER["samples"], help="pseudo inputs to train on")
    add("--held-out", type=int, default=PAPER["held_out"], help="more of them, for the report")
    add("--max-turns", type=int, help="agent turns of a conversation; None: the task's (any: 1)")
    add("--max-new-tokens", type=int, default=PAPER["max_new_tokens"],
        help="limit of one turn and of a reason")
    add("--slots", type=int, help="conversations sampled at a time; None: what fits")


def training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training (GenPI section 4, QLoRA)").add_argument
    add("--lam", type=float, default=0.7, help="weight of SFT; 1: SFT alone, 0: PG alone")
    add("--epochs", type=int, default=PAPER["epochs"], help="passes over the samples")
    add("--batch", type=int, default=PAPER["batch"], help="samples of an optimiser step")
    add("--lr", type=float, default=PAPER["lr"], help="peak learning rate of AdamW")
    add("--warmup", type=float, default=0.03, help="share of the steps with a rising rate")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--rank", type=int, default=16, help="rank of the adapter")
    add("--alpha", type=float, default=32.0, help="the adapter is scaled by alpha / rank")
    add("--dropout", type=float, default=0.05, help="on the adapter's input")
    add = parser.add_argument_group("memory and safety").add_argument
    add("--micro-tokens", type=int, help="padded tokens of a forward pass; None: what fits")
    add("--checkpointing", action="store_true", help="recompute activations to save memory")
    add("--save-every", type=int, default=20, help="optimiser steps between checkpoints")
# fmt: on


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the flags; without --model the embedded model's preset gives the defaults."""
    parser = build_parser()
    if parser.parse_args(argv).model is None:
        parser.set_defaults(model=str(HERE / "tiny"), **EMBEDDED)
    args = parser.parse_args(argv)
    args.task = args.task or (args.prompt.stem if args.prompt.stem in TASKS else "any")
    args.out = args.out or Path("runs") / args.prompt.stem
    check_device(args.device)
    if args.chat:
        return args  # the run knows the rest
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.environment = args.environment or TASKS[args.task].environment
    args.max_turns = TASKS[args.task].max_turns if args.max_turns is None else args.max_turns
    check_flags(args)
    return args


def check_flags(args) -> None:
    """Raise ValueError for the first flag out of range, naming value and limit."""
    for name, value in vars(args).items():
        # what a terminal sends as other bytes arrives as lone surrogates
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            told = f"--{name.replace('_', '-')} {value!r} is not UTF-8"
            raise ValueError(f"{told}; set the terminal to UTF-8, or use plain letters")
    whole = "samples held_out max_turns max_new_tokens epochs batch rank save_every concurrency"
    optional = [name for name in ("slots", "micro_tokens") if getattr(args, name) is not None]
    for name in whole.split() + optional:
        if getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)} is too small; "
                "it must be at least 1"
            )
    ranges = {"lam": (0, 1), "warmup": (0, 1), "dropout": (0, 0.99), "weight_decay": (0, 1)}
    ranges |= {"lr": (0, 1), "seed": (0, 2**32), "timeout": (0.1, 86400), "epochs": (1, 10_000)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {getattr(args, name)} is out of range; it must lie in {low} to {high}"
            )
    for name in ("lr", "clip", "alpha"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(
                f"--{name} {getattr(args, name):g} is out of range; it must be positive and finite"
            )
    check_generator(args.generator or "", args.generator_model)


def check_device(device: str | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but PyTorch sees no CUDA device; "
            "use --device cpu or install a CUDA build of torch"
        )


# host, port and path: a password or a query would be printed, and saved with the run
HOST = r"[\w-]+(?:\.[\w-]+)*|\[[\da-f:]+\]"
SERVER = re.compile(rf"https?://(?:{HOST})(?::(\d{{1,5}}))?(?:/[\w.~-]+)+/?", re.ASCII)


def check_generator(generator: str, name: str | None) -> None:
    """Raise ValueError if the URL in --generator is no server's, or a name comes without one."""
    if "://" in generator:
        found = SERVER.fullmatch(generator)
        if not found or not 0 < int(found[1] or 80) < 2**16:
            shown = "(not shown)" if set(generator) & set("@?#") else generator
            raise ValueError(
                f"--generator {shown}: not the URL of a server; give host, port and path, like "
                "http://localhost:8000/v1, and a key as OPENAI_API_KEY in the environment"
            )
    elif name is not None:
        raise ValueError(f"--generator-model {name} needs the URL of a server as --generator")


def read_text(path: Path, what: str) -> str:
    """The text of a user's file. Raises ValueError if it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such {what} file; give the path of a text file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; save the {what} file as UTF-8 text"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{path}: has a NUL byte at {text.index(chr(0))}, so it is no text; give a text file"
        )
    if not text.strip():
        raise ValueError(f"{path}: the {what} file is empty; write the {what} into it")
    return text.replace("\r\n", "\n")


# ----------------------------------------------------------------------------------- run folder

FREE = {  # these change no experiment, or (on a GPU) only its rounding and the dropout noise
    "out", "chat", "concurrency", "timeout", "device", "slots", "micro_tokens", "checkpointing",
    "save_every",
}  # fmt: skip


def fingerprint(folder: Path) -> str:
    """A hash that tells checkpoints apart: names, sizes, first and last MiB of every file."""
    digest = hashlib.sha256()
    for pattern in ("*.json", "*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(0, path.stat().st_size - 2**20))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def read_object(path: Path, keys: tuple[str, ...] = ()) -> dict:
    """The JSON object in a file of a run folder. Raises ValueError if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; genpi.py with the same flags makes it again"
        ) from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise ValueError(f"{path} is damaged; delete it, and genpi.py makes it again")
    return found


def open_run(args, prompt: Prompt, chat: Chat, demos: tuple[str, ...]) -> None:
    """Make the run folder, or check that it was made with the same flags (ValueError if not)."""
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    flags["prompt_sha256"] = hashlib.sha256(prompt.text.encode()).hexdigest()[:16]
    flags["model_sha256"] = fingerprint(find_folder(args.model))
    flags["chat_format"] = chat.format
    flags["demos_sha256"] = hashlib.sha256("\n".join(demos).encode()).hexdigest()[:16]
    if args.generator and not args.generator_model:
        flags["generator_sha256"] = fingerprint(find_folder(args.generator))
    # known by something better than their place: a hash, or the name that a server gives its model
    named = {"prompt", "model", "demos"} | ({"generator"} if args.generator else set())
    path = args.out / "args.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = read_object(path)
        changed = [k for k in flags if k not in FREE | named and flags[k] != before.get(k)]
        if changed:
            told = ", ".join(f"{k} {before.get(k)} (now {flags[k]})" for k in changed)
            raise ValueError(
                f"{args.out} was made with other flags: {told}; choose another folder with --out"
            )
    versions = {module.__name__: module.__version__ for module in (torch, safetensors, tokenizers)}
    versions["python"] = platform.python_version()
    replace_text(args.out / "prompt.txt", prompt.text)
    replace_text(path, json.dumps({**flags, "versions": versions}, indent=2) + "\n")


# --------------------------------------------------------------------------------------- stages


def task_of(args) -> Task:
    return replace(TASKS[args.task], environment=args.environment)


def read_demos(args) -> tuple[str, ...]:
    """First user messages that show the generator what is wanted: --demos, or the task's."""
    lines = read_text(args.demos, "demos").splitlines() if args.demos else TASKS[args.task].demos
    return tuple(line.strip() for line in lines if line.strip())


def make_records(
    args, prompt: Prompt, demos: tuple[str, ...], voice: Voice, generator: Voice | Server
) -> list[Record]:
    """Pseudo inputs, then wave after wave of records; what is on disk is not made again.

    Raises: ValueError if there are too few inputs to train on, or a file on disk is damaged.
    """
    task, path = task_of(args), args.out / "inputs.json"
    state = {"rounds": 0, "fruitless": 0, "seconds": 0.0, "inputs": []}
    if path.exists():
        state = read_object(path, tuple(state))

    def save(state: dict) -> None:
        replace_text(path, json.dumps(state, indent=1, ensure_ascii=False) + "\n")

    wanted = args.samples + args.held_out
    inputs = pseudo_inputs(generator, prompt, demos, wanted, args.seed, state, save)
    if len(inputs) < 2:
        raise ValueError(
            f"{args.out}: 1 pseudo input cannot be trained on and held out at once; "
            "give other --demos or a stronger --generator, with another --out"
        )
    data = args.out / "data.jsonl"
    have = {r.index for r in read_records(data)}
    for first in range(0, len(inputs), WAVE):
        wave = [Record(i, inputs[i]) for i in range(first, min(first + WAVE, len(inputs)))]
        if isinstance(generator, Server):  # its answers are paid for, and no batch is like another
            wave = [r for r in wave if r.index not in have]
        if all(r.index in have for r in wave):
            continue
        for record in synthesise(voice, generator, prompt, task, wave, args.max_turns, args.seed):
            if record.index not in have:
                append_record(data, record)
    return read_records(data)


def split_records(
    records: list[Record], samples: int, held_out: int
) -> tuple[list[Record], list[Record]]:
    """Training records and held-out ones, which are the last; a third at most if there are few."""
    n = min(held_out, max(1, len(records) // 3)) if len(records) < samples + held_out else held_out
    return records[:-n][:samples], records[-n:]


def training_sequences(
    chat: Chat, prompt: Prompt, records: list[Record], lam: float
) -> tuple[list, list]:
    """The SFT and PG sequences of every record that fits the context; says how many do not.

    Raises: ValueError if none does.
    """
    pairs = [
        (sft_sequence(chat, r), pg_sequence(chat, prompt, r))
        for r in records
        if r.turns and not r.overlong
    ]
    kept = [
        (sft, pg)
        for sft, pg in pairs
        if max(len(sft.ids), len(pg.ids) if lam < 1 else 0) <= chat.context
    ]
    if len(kept) < len(records):
        print(
            f"left out: {len(records) - len(kept)} of {len(records)} records "
            f"do not fit the context of {chat.context} tokens"
        )
    if not kept:
        longest = max((max(len(s.ids), len(p.ids)) for s, p in pairs), default=0)
        raise ValueError(
            f"no record fits the context of {chat.context} tokens (the longest takes {longest}); "
            "shorten the prompt, lower --max-turns, or drop prompt generation with --lam 1"
        )
    return [sft for sft, _ in kept], [pg for _, pg in kept]


def check_prompt_fits(chat: Chat, prompt: Prompt, args) -> None:
    """Raise ValueError if p leaves no room for a turn."""
    tokens = len(chat.encode(prompt.teacher(""), reply=True)[0])
    room = chat.context - args.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens} fills the context of {chat.context}; lower it"
        )
    if tokens >= room:
        raise ValueError(
            f"the prompt has {tokens} tokens, but the context of {chat.context} less "
            f"--max-new-tokens {args.max_new_tokens} leaves {room}; "
            "shorten it or take a model with a longer context"
        )


def run(args) -> None:
    """Synthesise, train, save; then hand over to evaluate.py, which prints the report."""
    join_team(args.device)
    prompt = parse_prompt(read_text(args.prompt, "prompt"), str(args.prompt))
    model, chat = load_model(args.model, args.device, bits=args.bits)
    check_prompt_fits(chat, prompt, args)
    lora.check_rank(model, args.rank)
    if team()[0] == 0:
        synthesise_all(args, prompt, model, chat)
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # a barrier on the CPU, where waiting keeps no GPU busy
    records = read_records(args.out / "data.jsonl")
    if not records:
        raise ValueError(f"{args.out}: no records; every process must see this folder")
    if not (args.out / lora.CONFIG).exists():  # the last file that save_adapter writes
        torch.manual_seed(args.seed)  # A of every LoRA layer
        lora.add_lora(model, args.rank, args.alpha, args.dropout)
        model.checkpointing = args.checkpointing
        training, _ = split_records(records, args.samples, args.held_out)
        train(model, *training_sequences(chat, prompt, training, args.lam), args, args.out)
        if team()[0] == 0:
            lora.save_adapter(model, args.out, base_model=args.model)


def synthesise_all(args, prompt: Prompt, model: Llama, chat: Chat) -> None:
    """Everything up to the last record of data.jsonl."""
    demos, voice = read_demos(args), Voice(model, chat, args.max_new_tokens, args.slots)
    generator = open_generator(args, voice)
    open_run(args, prompt, chat, demos)  # all that can be wrong with the flags is known by now
    announce(args, chat, prompt)
    records = make_records(args, prompt, demos, voice, generator)
    print_quality(quality(records, args.max_turns))


def open_generator(args, voice: Voice) -> Voice | Server:
    """Who writes inputs and reasons: the model itself, another one, or a server.

    A server's model is args.generator_model, which is set here if no flag did: to what the run
    began with, so that it goes on with that, or else to the first that is served.
    """
    if not args.generator:
        return voice
    if "://" not in args.generator:
        loaded = load_model(args.generator, args.device, bits=args.bits)
        return Voice(*loaded, args.max_new_tokens, args.slots)
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds what no HTTP header can; set it to the key alone")
    limits = args.max_new_tokens, args.concurrency, args.timeout
    server = Server(args.generator.rstrip("/"), "", *limits, key)
    if args.generator_model is None and (args.out / "args.json").exists():
        args.generator_model = read_object(args.out / "args.json").get("generator_model")
    try:
        args.generator_model = args.generator_model or server.ask("models", first_name, tries=3)
    except ValueError as error:
        raise ValueError(f"{error}; or name the model with --generator-model") from None
    return replace(server, model=args.generator_model)


def first_name(content: bytes) -> str:
    """The first of a server's list of models."""
    return str(json.loads(content)["data"][0]["id"])


def announce(args, chat: Chat, prompt: Prompt) -> None:
    """Say what is done with what, and what to expect of the embedded model."""
    tokens = len(chat.tokens(prompt.text))
    print(f"{args.prompt}: {tokens} tokens, task {args.task}; model {args.model}; run {args.out}")
    if args.generator:
        writer = f"{args.generator_model} at " if args.generator_model else ""
        print(f"pseudo inputs and reasons are written by {writer}{args.generator}")
    if args.model == str(HERE / "tiny"):
        alone = "" if args.task == "os" else " and nothing else: expect no sense of this prompt"
        print(
            "The embedded model is a stand-in of 2.1M parameters that knows agents at a Linux shell"
            f"{alone}. For a real one give --model."
        )


def print_quality(table: dict) -> None:
    """Print what GenPI Table 4 reports, in one line."""
    flags = ("hit_limit", "no_end_token", "no_final_action", "overlong")
    shares = ", ".join(f"{flag.replace('_', ' ')} {100 * table[flag]:.1f} %" for flag in flags)
    turns = f"{table['mean_turns']:.2f} of at most {table['max_turns']} turns"
    print(f"synthesis (GenPI Table 4): {table['records']} records, {turns}; {shares}")


def load_run(folder: Path, device: str | None = None):
    """Open a finished run -> (flags, Prompt, model with adapter, Chat), else ValueError."""
    path = folder / "args.json"
    if not path.exists():
        raise ValueError(
            f"{folder}: no args.json, so it is no run folder; give the --out of an earlier run"
        )
    flags = vars(build_parser().parse_args([]))
    args = argparse.Namespace(**read_object(path, ("model_sha256", *flags)))
    if not (folder / lora.CONFIG).exists():
        raise ValueError(
            f"{folder}: has no finished adapter; run genpi.py with the same flags to finish it"
        )
    if device or (args.device == "cuda" and not torch.cuda.is_available()):
        args.device = device or "cpu"
    if not (folder / "prompt.txt").exists():
        raise ValueError(f"{folder / 'prompt.txt'} is missing; genpi.py makes it again")
    prompt = parse_prompt((folder / "prompt.txt").read_text(encoding="utf-8"))
    if fingerprint(find_folder(args.model)) != args.model_sha256:
        raise ValueError(f"{args.model} has changed since {folder} was made; run genpi.py anew")
    model, chat = load_model(args.model, args.device, bits=args.bits)
    try:
        lora.load_adapter(model, folder, base_model=args.model)
    except ValueError as error:
        told = f"{error}; delete {folder / lora.CONFIG}, and genpi.py goes on from its checkpoint"
        raise ValueError(told) from None
    return args, prompt, model.eval(), chat


HELP = """Talk to the internalised model. /base: the plain model; /prompt: the plain model with \
the prompt; /adapter: back; /new: forget the conversation; /quit."""


def talk(folder: Path, device: str | None) -> None:
    """A conversation on the terminal with the adapter, the plain model, or the prompted one."""
    args, prompt, model, chat = load_run(folder, device)
    print(HELP)
    mode, turns = "adapter", []
    while True:
        try:
            said = input(f"\n{mode}> ").encode(errors="replace").decode().strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said in ("/base", "/prompt", "/adapter", "/new"):
            mode, turns = mode if said == "/new" else said[1:], []  # a mode begins anew
        elif said.startswith("/"):
            print(HELP)
        elif said:
            turns.append(said)
            opening = prompt.teacher if mode == "prompt" else student_messages
            messages = conversation(opening(turns[0]), turns[1:])
            try:
                reply = say_aloud(model, chat, messages, args.max_new_tokens, mode == "adapter")
                turns.append(reply)
            except ValueError as error:
                turns.pop()
                print(f"{error}; or begin another with /new")


def say_aloud(model: Llama, chat: Chat, messages: list[dict], limit: int, adapted: bool) -> str:
    """Print the reply as it is written, and return it."""
    said = ""
    with nullcontext() if adapted else lora.adapter_off(model):
        for piece in stream(model, chat, messages, limit):
            print(piece, end="", flush=True)
            said += piece
    print()
    return said.strip()


def guarded(work, *args) -> int:
    """Run work -> exit code. A mistake, or too small a machine, is one line, not a traceback."""
    for stream_ in (sys.stdout, sys.stderr):
        if hasattr(stream_, "reconfigure"):
            stream_.reconfigure(errors="replace")  # a terminal that lacks a letter shows a ?
    try:
        return work(*args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = "out of memory; lower --micro-tokens or --slots, or add --checkpointing"
    except OSError as error:
        told = f"{error}; free some space or choose another folder"
    except ValueError as error:
        told = " ".join(str(error).split())
    print(f"error: {told}", file=sys.stderr)
    return 2


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also on a CPU, where PyTorch has no error of its own for it, and beneath a failed capture."""
    if error is None:
        return False
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "DefaultCPUAllocator" in str(error) or is_out_of_memory(error.__context__)


def main(argv: list[str] | None = None) -> int:
    return guarded(start, argv)


def start(argv: list[str] | None) -> int:
    """Talk to a run, or make one and report on it -> exit code."""
    args = parse_flags(argv)
    if args.chat:
        return talk(args.chat, args.device)
    try:
        run(args)
    except (OSError, safetensors.SafetensorError) as error:
        told = f"{args.out}: {error}; free some space or choose another --out"
        raise ValueError(told) from None
    first = team()[0] == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return 0
    if args.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # the model of run() is gone, its memory would stay reserved
    return report_on(args)


def report_on(args) -> int:
    """Start evaluate.py, the very command that repeats the report -> exit code."""
    command = [sys.executable, HERE / "evaluate.py", f"--run={args.out}", "--device", args.device]
    # Ctrl-C reaches both processes: this one answers, and run() ends the other, even while it is
    # still importing
    done = subprocess.run([str(word) for word in command], preexec_fn=ignore_interrupts)
    return done.returncode if done.returncode >= 0 else 2  # below 0: ended by a signal


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
