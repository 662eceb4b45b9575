"""How much of the prompt was internalised, and does it pay?

    python evaluate.py --run runs/os

prints the report of a finished run and writes report.json and report.md. Everything is measured on
the held-out pseudo inputs, which training never saw, with one set of weights: the adapter is
switched on and off.

    nll          nats/token of the teacher's turns: base without p, base with p (the teacher),
                 adapter without p
    gap_closed   (base - adapter) / (base - teacher); 1 means that p is no longer missed
    agreement    on how many inputs the greedy first reply takes the teacher's action, with a
                 Wilson interval
    recall       how much of p the adapter writes down when asked, and the lines it knows worst
    break_even   seconds and bytes of a request for the full prompt, a cached prompt, the adapter,
                 the merged adapter, and after how many requests the training has paid; one
                 request at a time in a plain loop, without the CUDA graph that synthesis uses

Leaves out: a judge model; the measures are those that need nobody's opinion.
"""

import argparse
import json
import math
import statistics
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path

import torch
import torch.nn.functional as F

import lora
from genpi import (
    IGNORE,
    Sequence,
    build_sequence,
    guarded,
    load_run,
    micro_batches,
    next_tokens,
    pg_sequence,
    prompt_question,
    read_metrics,
    read_object,
    sequence_nll,
    sft_sequence,
    split_records,
    task_of,
)
from model import Chat, KVCache, Llama, prefill
from synth import (
    Prompt,
    Record,
    Task,
    conversation,
    generate,
    quality,
    read_records,
    replace_text,
    student_messages,
)

RECALLED = 4  # held-out records from which the prompt is asked back
REPEATS, DECODED = 5, 32  # break-even: median of REPEATS requests, DECODED tokens each

# ------------------------------------------------------------------------------------ measures


def wilson(k: int, n: int, z: float = 1.96) -> dict:
    """k of n with the 95 % interval of the share. Source: Wilson 1927."""
    if n == 0:
        return {"k": 0, "n": 0, "low": 0.0, "high": 1.0}
    p, d = k / n, 1 + z * z / n
    centre, half = (
        (p + z * z / (2 * n)) / d,
        z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    return {"k": k, "n": n, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def teacher_sequence(chat: Chat, prompt: Prompt, record: Record) -> Sequence:
    """The conversation with p in the context; the agent's turns after p are the targets."""
    opening = prompt.teacher(record.pseudo_input)
    messages = conversation(opening, record.turns)
    return build_sequence(chat, messages, set(range(len(opening), len(messages), 2)))


@torch.no_grad()
def mean_nll(model: Llama, sequences: list[Sequence], tokens: int) -> float:
    """nats/token over all targets."""
    device = next(model.parameters()).device
    nats = sum(
        sequence_nll(model, *batch).item() for batch in micro_batches(sequences, tokens, device)
    )
    return nats / sum(label != IGNORE for s in sequences for label in s.labels)


def gap_closed(nll: dict[str, float]) -> float | None:
    """(base - adapter) / (base - teacher); None if p did not help the teacher either."""
    gap = nll["base"] - nll["teacher"]
    return (nll["base"] - nll["adapter"]) / gap if gap > 0 else None


def same_action(task: Task, ours: str, teachers: str) -> bool:
    """Does a reply take the teacher's action? Where the teacher took none, only the same text
    counts.
    """
    action = task.action(teachers)
    return ours == teachers if action is None else task.action(ours) == action


def agreement(
    model: Llama, chat: Chat, task: Task, records: list[Record], limit: int, slots: int | None
) -> dict:
    """k of n first replies that take the teacher's action: without p, the model and the adapter."""
    asked = [student_messages(r.pseudo_input) for r in records]
    adapted = generate(model, chat, asked, limit, slots=slots)
    counts = {
        "base": [r.student for r in records],
        "teacher": [r.teacher for r in records],
        "adapter": adapted,
    }
    return {
        who: wilson(
            sum(same_action(task, t, r.teacher) for t, r in zip(texts, records, strict=True)),
            len(records),
        )
        for who, texts in counts.items()
    }


def matched_ratio(wanted: list[int], said: list[int]) -> float:
    """Share of the wanted tokens that stand in what was said, in the same order."""
    blocks = SequenceMatcher(None, wanted, said, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(1, len(wanted))


def recall(model: Llama, chat: Chat, prompt: Prompt, records: list[Record], slots) -> dict:
    """Ask for p as in training -> matched-token ratio, and each line's NLL (nats/token), worst
    first.
    """
    wanted = chat.tokens(prompt.text)
    asked = [prompt_question(r.pseudo_input, r.student, r.teacher) for r in records]
    room = chat.context - max(len(chat.encode(q, reply=True)[0]) for q in asked)
    said = generate(model, chat, asked, min(room, len(wanted) + 64), slots=slots)
    ratios = [matched_ratio(wanted, chat.tokens(text.split("\n\nReason:")[0])) for text in said]
    rows = [line_nll(model, chat, prompt, r) for r in records]
    lines = [
        (line, statistics.mean(column))
        for line, column in zip(prompt_lines(prompt), zip(*rows, strict=True), strict=True)
    ]
    worst = sorted(lines, key=lambda pair: -pair[1])
    return {
        "ratio": statistics.mean(ratios),
        "lines": [{"text": t, "nll": nll} for t, nll in worst if t.strip()],
    }


def prompt_lines(prompt: Prompt) -> list[str]:
    return prompt.text.splitlines(keepends=True)


@torch.no_grad()
def line_nll(model: Llama, chat: Chat, prompt: Prompt, record: Record) -> list[float]:
    """nats/token of each line of p in one PG sequence."""
    sequence = pg_sequence(chat, prompt, record)
    ids = torch.tensor([sequence.ids], device=next(model.parameters()).device)
    targets = next_tokens(torch.tensor([sequence.labels], device=ids.device))
    at = targets != IGNORE
    nats = F.cross_entropy(model(ids, at=at).float(), targets[at], reduction="none").tolist()
    ends = []  # the token counts of p's first 1, 2, ... lines: the line borders among the targets
    text = ""
    for line in prompt_lines(prompt):
        text += line
        ends.append(len(chat.tokens(text)))
    starts = [0, *ends[:-1]]
    return [sum(nats[a:b]) / max(1, b - a) for a, b in zip(starts, ends, strict=True)]


# ---------------------------------------------------------------------------------- break-even


@torch.no_grad()
def time_request(
    model: Llama, ids: list[int], prefix: KVCache | None = None
) -> tuple[float, float]:
    """Seconds to the first token, and seconds a later token, of one greedy request. Medians of
    REPEATS.
    """
    device, dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    own = torch.tensor([ids], device=device)
    last = torch.zeros_like(own, dtype=torch.bool)
    last[0, -1] = True
    first, later = [], []
    for _ in range(REPEATS + 1):  # the first request warms up
        cache = KVCache(model.config, 1, len(ids) + DECODED, device, dtype, prefix)
        wait()
        clock = time.perf_counter()
        token = model(own, cache, at=last).argmax(-1)
        cache.advance(len(ids))
        wait()
        first.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        for _ in range(DECODED):
            token = model(token.view(1, 1), cache)[0].argmax(-1)
            cache.advance(1)
        wait()
        later.append((time.perf_counter() - clock) / DECODED)
    return statistics.median(first[1:]), statistics.median(later[1:])


def break_even(
    model: Llama, chat: Chat, prompt: Prompt, records: list[Record], spent: float
) -> dict:
    """Measure the four ways to serve a first reply to a typical input. Merges the adapter into the
    model.

    spent: seconds of synthesis and training. The reply has the mean length of the teacher's turns.
    """
    x = sorted((r.pseudo_input for r in records), key=len)[len(records) // 2]
    full = chat.encode(prompt.teacher(x), reply=True)[0]
    bare = chat.encode(student_messages(x), reply=True)[0]
    other = chat.encode(prompt.teacher("\n"), reply=True)[0]  # parts from any x at x's first token
    shared = next(i for i, (a, b) in enumerate(zip(full, other, strict=False)) if a != b)
    reply = statistics.mean(len(chat.tokens(t)) + 1 for r in records for t in r.turns[::2])
    with lora.adapter_off(model):
        times = {"full_prompt": (time_request(model, full), len(full))}
        times["prefix_cached"] = (
            time_request(model, full[shared:], prefill(model, full[:shared])),
            len(full) - shared,
        )
    times["adapter"] = (time_request(model, bare), len(bare))
    times["merged"] = (time_request(lora.merge(model), bare), len(bare))
    c, size = model.config, model.model.embed_tokens.weight.dtype.itemsize
    token_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    rows = {
        name: {
            "seconds_to_first_token": first, "tokens_per_second": 1 / later,
            "kv_bytes": round(token_bytes * (tokens + reply)),
            "seconds_per_request": first + (reply - 1) * later,
        }
        for name, ((first, later), tokens) in times.items()
    }  # fmt: skip
    best = min(("adapter", "merged"), key=lambda name: rows[name]["seconds_per_request"])
    pays = {
        rival: requests_to_pay(spent, rows[rival], rows[best])
        for rival in ("full_prompt", "prefix_cached")
    }
    return {
        "reply_tokens": reply,
        "cost_seconds": spent,
        "served_as": best,
        **rows,
        "pays_after_requests": pays,
    }


def requests_to_pay(spent: float, rival: dict, ours: dict) -> int | str:
    """Requests until the seconds saved exceed the seconds spent."""
    saved = rival["seconds_per_request"] - ours["seconds_per_request"]
    return math.ceil(spent / saved) if saved > 0 else "never: use prefix caching"


# -------------------------------------------------------------------------------------- report


def count_parameters(model: Llama) -> tuple[int, int]:
    """(trainable, total) parameters; an NF4 weight counts as the numbers it stands for."""
    trainable = sum(p.numel() for p in lora.adapter_parameters(model))
    layers = lora.lora_layers(model).values()
    linear = sum(layer.in_features * layer.out_features for layer in layers)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return trainable, trainable + linear + sum(
        p.numel() for p in model.parameters() if id(p) not in inside
    )


def seconds_spent(folder: Path, records: list[Record]) -> dict:
    """Seconds of synthesis and of training; what an interruption lost is not counted."""
    inputs = read_object(folder / "inputs.json", ("seconds", "inputs"))
    if len(records) < len(inputs["inputs"]):
        raise ValueError(
            f"{folder}: {len(records)} of {len(inputs['inputs'])} records are there; "
            "genpi.py with the same flags makes the others"
        )
    return {
        "synth": inputs["seconds"] + sum(r.seconds for r in records),
        "train": sum(row["seconds"] for row in read_metrics(folder / "metrics.jsonl")),
    }


def evaluate_run(folder: Path, device: str | None) -> dict:
    """Measure everything -> the content of report.json. Raises ValueError for an unfinished run."""
    clock = time.perf_counter()
    args, prompt, model, chat = load_run(folder, device)
    everything = read_records(folder / "data.jsonl")
    training, held_out = split_records(everything, args.samples, args.held_out)
    held_out = [r for r in held_out if r.turns and not r.overlong]
    if not held_out:
        raise ValueError(
            f"{folder}: no held-out record fits the context; make more with --held-out"
        )
    task, seconds = task_of(args), seconds_spent(folder, everything)
    trainable, total = count_parameters(model)
    bare = [sft_sequence(chat, r) for r in held_out]
    tokens = args.micro_tokens or 4096  # nothing is kept for a backward pass, so this fits anywhere
    nll = {"adapter": mean_nll(model, bare, tokens)}
    with lora.adapter_off(model):
        nll["base"] = mean_nll(model, bare, tokens)
        prompted = [teacher_sequence(chat, prompt, r) for r in held_out]
        nll["teacher"] = mean_nll(model, prompted, tokens)
    agree = agreement(model, chat, task, held_out, args.max_new_tokens, args.slots)
    asked = [r for r in held_out if len(pg_sequence(chat, prompt, r).ids) <= chat.context]
    recited = recall(model, chat, prompt, asked[:RECALLED], args.slots) if asked else None
    spent = seconds["synth"] + seconds["train"]
    paid = break_even(model, chat, prompt, held_out, spent)  # last: it merges the adapter
    return {
        "model": args.model, "prompt_tokens": len(chat.tokens(prompt.text)), "lam": args.lam,
        "trainable_params": trainable, "total_params": total,
        "samples": len(training), "held_out": len(held_out),
        "nll": nll, "gap_closed": gap_closed(nll),
        "agreement": agree, "recall": recited, "break_even": paid,
        "synthesis": quality(everything, args.max_turns),
        "seconds": {**seconds, "evaluate": time.perf_counter() - clock},
    }  # fmt: skip


def markdown(report: dict, name: str) -> str:
    """The report as one page: a table a question."""
    nll, agree = report["nll"], report["agreement"]
    whom = ("base", "teacher", "adapter")
    share = 100 * report["trainable_params"] / report["total_params"]
    return f"""# {name}: {report["prompt_tokens"]} prompt tokens in {report["trainable_params"]:,} \
parameters ({share:.1f} %)

{report["held_out"]} held-out pseudo inputs; trained on {report["samples"]}, lam {report["lam"]:g}

| | base, no prompt | teacher, prompt | adapter, no prompt |
|---|---|---|---|
| nll (nats/token) | {" | ".join(f"{nll[who]:.3f}" for who in whom)} |
| agreement (95 %) | {" | ".join(interval(agree[who]) for who in whom)} |

{internalised(report)}

{costs(report)}
"""


def internalised(report: dict) -> str:
    """How much of the gap is closed and of p is known; says so where there is no answer."""
    closed, known = report["gap_closed"], report["recall"]
    gap = "no gap to close: the prompt does not help" if closed is None else f"{closed:.3f}"
    if known is None:
        return f"gap closed {gap}; recall of the prompt not asked: it does not fit the context"
    rows = [f"| `{row['text'].strip()[:70]}` | {row['nll']:.3f} |" for row in known["lines"][:3]]
    return f"""gap closed {gap}; recall of the prompt {known["ratio"]:.3f} (whoever has the \
adapter can read the prompt)

| least known lines of the prompt | nats/token |
|---|---|
{chr(10).join(rows)}"""


def costs(report: dict) -> str:
    """What a request costs in each of the four ways, and when the training has paid."""
    paid, seconds = report["break_even"], report["seconds"]
    ways = ("full_prompt", "prefix_cached", "adapter", "merged")
    after = {
        rival: f"after {n:,} requests" if isinstance(n, int) else n
        for rival, n in paid["pays_after_requests"].items()
    }
    return f"""| one request | to first token | tokens/s | KV cache | whole reply |
|---|---|---|---|---|
{chr(10).join(request_line(way, paid[way]) for way in ways)}

spent {seconds["synth"]:.0f} s on synthesis and {seconds["train"]:.0f} s on training; against the
full prompt it pays {after["full_prompt"]}, against a cached prompt {after["prefix_cached"]}"""


def interval(row: dict) -> str:
    return f"{row['k']} of {row['n']} ({100 * row['low']:.0f} to {100 * row['high']:.0f} %)"


def request_line(way: str, row: dict) -> str:
    first, whole = 1e3 * row["seconds_to_first_token"], 1e3 * row["seconds_per_request"]
    cells = f"{first:.1f} ms | {row['tokens_per_second']:.0f} | {row['kv_bytes'] / 2**20:.2f} MiB"
    return f"| {way.replace('_', ' ')} | {cells} | {whole:.0f} ms |"


def report_run(args) -> None:
    """Make the report, write it into the run folder and print it."""
    report = evaluate_run(args.run, args.device)
    page = markdown(report, args.run.name)
    try:
        whole = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        replace_text(args.run / "report.json", whole)
        replace_text(args.run / "report.md", page)
    except OSError as error:
        raise ValueError(f"{args.run}: {error}; free some space and run it again") from None
    print(f"\n{page}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Report on a finished run.")
    parser.add_argument("--run", type=Path, required=True, help="run folder of genpi.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the run's own")
    return guarded(report_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
