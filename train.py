"""Training: one optimiser step, the loop around it, checkpoints, and several processes.

A step takes a batch of samples, each an SFT and a PG sequence (loss.py), and descends

    L = (1 - lam) * sum PG nats / PG tokens + lam * sum SFT nats / SFT tokens

where the sums run over the whole batch. Micro-batches and processes only share out the sum, so
that neither their size nor their number changes the gradient. Other objectives, with which the
paper compares this one, put other sequences or another cost in their place (objectives.py).

Everything that a step depends on is in its number, the seed and the last checkpoint: the rate, the
order of the samples, the noise of dropout. So a training that was interrupted anywhere and begun
again ends with the same bits (on one CPU).

Left out: sharding the model, mixed precision beyond that of its weights, a loss scale that adapts
(on a float16 base it is constant). Source: GenPI section 4 and C.4, QLoRA (arXiv 2305.14314).
"""

import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import full
import lora
from chat import Chat
from checkpoint import fingerprint
from files import append_row, replacing, write_rows
from loss import (
    Sequence,
    joint_loss,
    sft_sequence,
    token_nll,
)
from model import Llama, load_model
from objectives import conversation_sequence, cost_of, pg_sequence, prepend
from prompt import Prompt
from runs import (
    Record,
    Run,
    hash_seed,
    read_metrics,
)

# in a mean over 40,000 tokens a token's gradient is below 6e-5, where float16 loses digits
LOSS_SCALE = {torch.float16: 4096}


@dataclass(frozen=True)
class Recipe:
    """How the adapter is trained; the defaults are the paper's, or QLoRA's where it is silent."""

    lam: float = 0.7  # weight of SFT; 1 is SFT alone, 0 is PG alone
    objective: str = "genpi"  # or one that the paper compares with (objectives.py)
    prepend_prob: float = 1.0  # of prepend, that a conversation has p in its context
    pg_share: float = 1.0  # of a batch's samples, drawn anew each step, whose PG loss is computed
    epochs: int = 10
    batch: int = 32  # samples of an optimiser step
    lr: float = 1e-4  # peak rate of AdamW
    warmup: float = 0.03  # share of the steps with a rising rate
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    seed: int = 0
    micro_tokens: int = 2048  # padded tokens of a forward pass
    save_every: int = 20  # steps between checkpoints


# -------------------------------------------------------------------------------------- sequences


def training_sequences(
    chat: Chat,
    prompt: Prompt,
    records: list[Record],
    lam: float,
    objective: str = "genpi",
    pg_target: str = "prompt+reason",
) -> tuple[list, list]:
    """The SFT and PG sequences of every record that can be trained on; says how many cannot.

    Raises: ValueError if none can.
    """
    found = list(fitting(chat, prompt, records, lam, objective, pg_target))
    limit = f"the context of {chat.context} tokens"
    if not found:
        whole = [record for record in records if not record.overlong]
        alone = any(len(sft_sequence(chat, record)) <= chat.context for record in whole)
        reasons = not all(record.no_reason for record in whole)
        told = why_none_fits(alone, reasons, lam)
        raise ValueError(f"no record fits {limit}: {told}, with another --out")
    if len(found) < len(records):
        told = f"left out: {len(records) - len(found)} of {len(records)} records do not fit {limit}"
        unasked = sum(record.no_reason for record in records) if lam < 1 else 0
        print(told + (f" or, {unasked} of them, the generator's" if unasked else ""))
    _, sft, pg = zip(*found, strict=True)
    return list(sft), list(pg)


def fitting(
    chat: Chat,
    prompt: Prompt,
    records: list[Record],
    lam: float,
    objective: str = "genpi",
    pg_target: str = "prompt+reason",
) -> Iterator[tuple[Record, Sequence, Sequence]]:
    """The records that can be trained on, each with its SFT and its PG sequence."""
    for record in records:
        if record.overlong:
            continue
        sft = conversation_sequence(chat, prompt, record, objective)
        pg = pg_sequence(chat, prompt, record, pg_target)
        writes = len(pg) <= chat.context and not record.no_reason
        if len(sft) <= chat.context and (lam == 1 or writes):
            yield record, sft, pg


def why_none_fits(alone: bool, reasons: bool, lam: float) -> str:
    """The cause and the cure where no record fits. alone: would one fit with SFT alone? reasons:
    has any record one?
    """
    if alone and lam < 1 and not reasons:
        return "the generator has no room for a reason; give it a longer context, or take --lam 1"
    if alone and lam < 1:
        return "prompt and reason are too long to be written; shorten the prompt, or take --lam 1"
    return "the conversations are too long; lower --max-turns or --max-new-tokens"


# ----------------------------------------------------------------------------------------- a step


def batch_loss(model: Llama, sft: list[Sequence], pg: list[Sequence], lam: float) -> Tensor:
    """L of a batch in nats/token, every sequence by itself and with all its logits. Eq. 4."""

    def mean(sequences: list[Sequence]) -> Tensor:
        pairs = [(torch.tensor([s.ids]), torch.tensor([s.labels])) for s in sequences]
        sums = [token_nll(model(ids), labels) for ids, labels in pairs]
        return sum(nats for nats, _ in sums) / sum(n for _, n in sums)

    return joint_loss(mean(sft), mean(pg), lam)


def train_step(
    model: Llama, optimizer, sft: list[Sequence], pg: list[Sequence], recipe: Recipe, drawn=None
) -> tuple[float, float, float]:
    """One optimiser step on a batch -> mean sft and pg loss (nats/token), gradient norm.

    Same gradient as batch_loss, without holding more than a micro-batch: those of micro-batches,
    and of processes that share the batch, add up. drawn: the sequences of pg that are computed, for
    all of them (None: all); over the draws the gradient has the same mean. Source: GenPI Eq. 4.
    """
    optimizer.zero_grad(set_to_none=True)
    parameters = lora.trainable(model)
    means = torch.zeros(2, device=parameters[0].device)
    scale = LOSS_SCALE.get(model.lm_head.weight.dtype, 1)
    cost = cost_of(recipe.objective)  # for genpi it is loss.batch_nll
    for term, (sequences, computed) in enumerate(((sft, sft), (pg, drawn or pg))):
        n_tokens = sum(sequence.n_targets for sequence in sequences)
        for rows in micro_batches(own_share(computed), recipe.micro_tokens):
            nats = cost(model, rows) * (len(sequences) / len(computed))
            losses = [0.0, 0.0]  # a micro-batch is part of one of the two means
            losses[term] = nats / n_tokens
            (scale * joint_loss(*losses, recipe.lam)).backward()
            means[term] += losses[term].detach()
    add_up(parameters, means)
    for parameter in parameters:
        parameter.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip).item()
    if math.isfinite(norm):
        optimizer.step()
    return *means.tolist(), norm


def micro_batches(sequences: list[Sequence], tokens: int) -> Iterator[list[Sequence]]:
    """Yield parts of the sequences, longest first, of at most `tokens` tokens once padded.

    Like lengths share a micro-batch, so that little is padding; a longer sequence goes alone.
    """
    rest = sorted(sequences, key=len, reverse=True)
    while rest:
        rows = max(1, tokens // len(rest[0]))
        yield rest[:rows]
        rest = rest[rows:]


# ---------------------------------------------------------------------------------------- the loop


def train(
    model: Llama, sft: list[Sequence], pg: list[Sequence], recipe: Recipe, folder: Path
) -> None:
    """Train the adapter on pairs of sequences, from the checkpoint in `folder` if there is one.

    An interrupt costs the steps since the last checkpoint: half a step is never saved. Raises:
    ValueError for a checkpoint that does not fit, and when a loss is not finite.
    """
    rank, _ = team()
    parameters = lora.trainable(model)
    optimizer = torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    order = sample_order(len(sft), recipe.epochs, recipe.seed)
    steps = math.ceil(len(order) / recipe.batch)
    done = load_checkpoint(folder, model, optimizer)
    if rank == 0:
        forget_metrics(folder / "metrics.jsonl", after=done)
    model.train()
    progress = tqdm(
        range(done, steps), f"{'training':<18}", total=steps, initial=done, unit="step",
        dynamic_ncols=True, disable=rank > 0,
    )  # fmt: skip
    for step in progress:
        clock = time.perf_counter()
        samples = order[step * recipe.batch : (step + 1) * recipe.batch]
        sft_batch = [sft[i] for i in samples] if recipe.lam > 0 else []
        pg_batch = [pg[i] for i in samples] if recipe.lam < 1 else []
        if recipe.objective == "prepend":
            sft_batch = prepend(sft_batch, recipe.prepend_prob, recipe.seed, step)
        rate = learning_rate(step, steps, recipe)
        optimizer.param_groups[0]["lr"] = rate
        # a step that is done again drops the same numbers, and every process others
        torch.manual_seed(hash_seed(recipe.seed, "dropout", step, rank))
        drawn = draw_share(pg_batch, recipe, step)
        losses = train_step(model, optimizer, sft_batch, pg_batch, recipe, drawn)
        check_finite(losses, step, recipe, folder)
        if rank > 0:  # the first process keeps the books
            continue
        row = dict(zip(("step", "sft", "pg", "grad_norm"), (step + 1, *losses), strict=True))
        row |= {"lr": rate, "tokens": sum(len(s.ids) for s in sft_batch + drawn)}
        append_row(folder / "metrics.jsonl", row | {"seconds": time.perf_counter() - clock})
        progress.set_postfix(sft=f"{losses[0]:.3f}", pg=f"{losses[1]:.3f}")
        if (step + 1) % recipe.save_every == 0 or step + 1 == steps:
            save_checkpoint(folder, model, optimizer, step + 1)
    optimizer.zero_grad(set_to_none=True)  # what follows needs the memory
    model.eval()


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to 0. Source: SGDR (arXiv 1608.03983) Eq. 5."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def sample_order(n: int, epochs: int, seed: int) -> list[int]:
    """The samples in the order of training: each epoch is a fresh permutation."""
    order = []
    for epoch in range(epochs):
        order += random.Random(f"{seed}-{epoch}").sample(range(n), n)
    return order


def draw_share(sequences: list[Sequence], recipe: Recipe, step: int) -> list[Sequence]:
    """The share of a batch's PG sequences that a step computes; the same in every process."""
    if recipe.pg_share == 1 or not sequences:
        return sequences
    rng = random.Random(hash_seed(recipe.seed, "pg share", step))
    return rng.sample(sequences, max(1, round(recipe.pg_share * len(sequences))))


def check_finite(losses: tuple, step: int, recipe: Recipe, folder: Path) -> None:
    """Raise ValueError, with what to change, if a loss or the gradient is not finite."""
    if not all(map(math.isfinite, losses)):
        sft, pg, norm = losses
        raise ValueError(
            f"step {step + 1}: the loss is {sft:.3g} (SFT), {pg:.3g} (PG), the gradient norm "
            f"{norm:.3g}; the last good checkpoint stays in {folder}; "
            f"lower --lr (now {recipe.lr:g}) or --clip ({recipe.clip:g}), with another --out"
        )


# ----------------------------------------------------------------------------------- checkpoints


def named_state(model: Llama, optimizer) -> dict[str, Tensor]:
    """The adapter and both moments of AdamW by name, as views."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[name] = p.data
            for key in ("exp_avg", "exp_avg_sq"):
                moments = optimizer.state.get(p)  # none before the first step
                state[f"{name}/{key}"] = moments[key] if moments else torch.zeros_like(p)
    return state


def save_checkpoint(folder: Path, model: Llama, optimizer, step: int) -> None:
    """Write checkpoint/state.safetensors: all that a step depends on besides flags and data."""
    path = folder / "checkpoint" / "state.safetensors"
    path.parent.mkdir(exist_ok=True)
    state = named_state(model, optimizer)
    state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    with replacing(path) as beside:
        save_file(state, beside, metadata={"step": str(step)})


def load_checkpoint(folder: Path, model: Llama, optimizer) -> int:
    """Restore adapter and optimiser in place -> the number of steps done, 0 if nothing is saved.

    Raises: ValueError if the file is damaged or of another run.
    """
    path = folder / "checkpoint" / "state.safetensors"
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
            moments = {k: saved[f"{name}/{k}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step


def forget_metrics(path: Path, after: int) -> None:
    """Drop the lines of steps after the checkpoint: they will be done again."""
    if path.exists():
        write_rows(path, [row for row in read_metrics(path) if row["step"] <= after])


# ----------------------------------------------------------------------------------- a finished run


def open_model(run: Run, loaded: tuple[Llama, Chat] | None = None) -> tuple[Llama, Chat]:
    """The base model of a run with the adapter in its folder. loaded: the base, if it is there.

    Raises: ValueError if the base has changed, or the adapter is missing or damaged.
    """
    config = run.folder / (full.CONFIG if run.full else lora.CONFIG)
    if not config.exists():
        told = "has no finished adapter; run genpi.py with the same flags to finish it"
        raise ValueError(f"{run.folder}: {told}")
    folder = base_folder(run)
    model, chat = loaded or load_model(folder, run.device, getattr(torch, run.dtype), run.bits)
    load = full.load_weights if run.full else lora.load_adapter
    try:
        load(model, run.folder)  # its base is told by its hash: places may change
    except ValueError as error:
        cure = f"delete {config}, and genpi.py goes on from its checkpoint"
        raise ValueError(f"{error}; {cure}") from None
    return model.eval(), chat


def base_folder(run: Run) -> Path:
    """The folder of the run's base model. Raises: ValueError if it is gone or has changed."""
    if not run.base.is_dir():
        told = f"the model {run.model} is no more at {run.base}; say where it is with --model"
        raise ValueError(f"{run.folder}: {told}")
    if fingerprint(run.base) != run.model_sha256:
        told = f"{run.base} has changed since {run.folder} was made, or genpi.py has"
        raise ValueError(f"{told}; run genpi.py anew, with another --out")
    return run.base


# ------------------------------------------------------------------------------ several processes


def join_team(device: str) -> None:
    """Meet the other processes if torchrun has started this one; each takes a GPU of its own."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "gloo"
        if device == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the others wait while the first one synthesises
        dist.init_process_group(backend, timeout=timedelta(days=7))


def wait_for_team() -> None:
    """Wait until every process is here; on the CPU, where waiting keeps no GPU busy."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def leave_team() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def team() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) for a process on its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(sequences: list[Sequence]) -> list[Sequence]:
    """What this process computes of a batch: every n-th sequence in order of length."""
    rank, n = team()
    return sorted(sequences, key=len)[rank::n] if n > 1 else sequences


def add_up(parameters: list[torch.nn.Parameter], means: Tensor) -> None:
    """Replace gradients and losses (2,) by their sums over all processes, in one exchange."""
    if team()[1] == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([means, *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    means.copy_(flat[:2])
    for p, part in zip(parameters, flat[2:].split([g.numel() for g in gradients]), strict=True):
        p.grad = part.view_as(p)
