"""How much of the prompt was internalised, and does it pay?

    python evaluate.py --run runs/os                             the report of a finished run
    python evaluate.py --run runs/os --against runs/os-sft       do two adapters differ?

The first prints the report and writes report.json and report.md. Everything is measured on the
held-out pseudo inputs, which training never saw. All but the costs is measured with one set of
weights: the adapter is switched on and off.

    nll          nats/token of the teacher's turns: base without p, base with p (the teacher),
                 adapter without p
    gap_closed   (base - adapter) / (base - teacher); 1 means that p is no longer missed
    agreement    on how many inputs the greedy first reply takes the teacher's action, with a
                 Wilson interval
    recall       how much of p the adapter writes down when asked, and the lines it knows worst
    break_even   seconds and bytes of a request for the full prompt, a cached prompt and the
                 adapter, all on the same weights: those of the training, and dense ones with the
                 adapter merged; after how many requests the training has paid, on either. One
                 request at a time in a plain loop, without the CUDA graph that synthesis uses

Left out: a judge model; the measures are those that need nobody's opinion.
"""

import argparse
import math
import os
import statistics
import sys
import time
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

import lora
import loss
import picture
import runs
from chat import Chat
from model import KVCache, Llama, prefill
from prompt import Prompt, Task, student_messages
from runs import Record, Run
from sampler import Sampling, Voice, say
from synth import quality
from train import micro_batches, open_model

RECALLED = 4  # held-out records from which the prompt is asked back
REPEATS = 9  # break-even: rounds, with a request a way ...
DECODED = 32  # ... of so many tokens each
USERS = 32  # requests in flight whose memory is told
RIVALS = ("full_prompt", "cached_prompt")

# ------------------------------------------------------------------------------------ measures


def wilson(k: int, n: int, z: float = 1.96) -> dict:
    """k of n with the 95 % interval of the share. Source: Wilson 1927."""
    if n == 0:
        return {"k": 0, "n": 0, "low": 0.0, "high": 1.0}
    p = k / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"k": k, "n": n, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


@torch.no_grad()
def mean_nll(model: Llama, sequences: list[loss.Sequence], tokens: int) -> float:
    """nats/token over all targets."""
    device = next(model.parameters()).device
    batches = micro_batches(sequences, tokens, device)
    nats = sum(loss.sequence_nll(model, ids, labels).item() for ids, labels in batches)
    return nats / sum(sequence.n_targets for sequence in sequences)


def nll_of_three(model: Llama, chat: Chat, run: Run, records: list[Record]) -> dict:
    """nats/token of the teacher's turns: base without p, base with p, adapter without p."""
    tokens = run.micro_tokens
    bare = [loss.sft_sequence(chat, record) for record in records]
    prompted = [loss.teacher_sequence(chat, run.prompt, record) for record in records]
    adapter = mean_nll(model, bare, tokens)
    with lora.adapter_off(model):
        base = mean_nll(model, bare, tokens)
        teacher = mean_nll(model, prompted, tokens)
    return {"base": base, "teacher": teacher, "adapter": adapter}


def sign_test(wins: int, losses: int) -> float:
    """The chance of a split at least as uneven if a fair coin decided each: exact, two-sided."""
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def gap_closed(nll: dict[str, float]) -> float | None:
    """(base - adapter) / (base - teacher); None if p did not help the teacher either."""
    gap = nll["base"] - nll["teacher"]
    return (nll["base"] - nll["adapter"]) / gap if gap > 0 else None


def same_action(task: Task, ours: str, teachers: str) -> bool:
    """Does a reply take the teacher's action, or say the same where the teacher took none?"""
    action = task.act(teachers)
    return ours == teachers if action is None else task.act(ours) == action


def agrees(task: Task, texts: list[str], records: list[Record]) -> list[bool]:
    """For each first reply, whether it takes the teacher's action."""
    return [same_action(task, t, r.teacher) for t, r in zip(texts, records, strict=True)]


def first_replies(voice: Voice, records: list[Record], limit: int) -> list[str]:
    """What a voice says to the inputs of these records without p, greedily."""
    asked = [student_messages(record.pseudo_input) for record in records]
    return say(voice, asked, Sampling(limit))


def agreement(voice: Voice, task: Task, records: list[Record], limit: int) -> dict:
    """k of n first replies that take the teacher's action: without p, the model and the adapter.

    The teacher agrees with itself by construction; its row is there for its interval.
    """
    replies = {
        "base": [record.student for record in records],
        "teacher": [record.teacher for record in records],
        "adapter": first_replies(voice, records, limit),
    }
    same = {who: agrees(task, texts, records) for who, texts in replies.items()}
    return {who: wilson(sum(found), len(found)) for who, found in same.items()}


def matched_ratio(wanted: list[int], said: list[int]) -> float:
    """Share of the wanted tokens that stand in what was said, in the same order."""
    blocks = SequenceMatcher(None, wanted, said, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(1, len(wanted))


def recall(voice: Voice, prompt: Prompt, records: list[Record]) -> dict:
    """Ask for p as in training -> matched-token ratio, and each line's nats/token, worst first."""
    chat = voice.chat
    wanted = chat.tokens(prompt.text)
    asked = [loss.prompt_question(record) for record in records]
    room = chat.context - max(len(chat.encode(question, reply=True)[0]) for question in asked)
    said = say(voice, asked, Sampling(min(room, len(wanted) + 64)))
    recited = [chat.tokens(text.split(loss.BEFORE_REASON)[0]) for text in said]
    ratios = [matched_ratio(wanted, tokens) for tokens in recited]
    rows = [line_nll(voice.model, chat, prompt, record) for record in records]
    means = map(statistics.mean, zip(*rows, strict=True))  # of a line over the records
    pairs = zip(prompt.text.splitlines(True), means, strict=True)
    lines = [{"text": line, "nll": nll} for line, nll in pairs if line.strip()]
    return {"ratio": statistics.mean(ratios), "lines": sorted(lines, key=lambda row: -row["nll"])}


@torch.no_grad()
def line_nll(model: Llama, chat: Chat, prompt: Prompt, record: Record) -> list[float]:
    """nats/token of each line of p in one PG sequence."""
    sequence = loss.pg_sequence(chat, prompt, record)
    device = next(model.parameters()).device
    targets = loss.next_tokens(torch.tensor([sequence.labels], device=device))
    asked = targets != loss.IGNORE
    logits = model(torch.tensor([sequence.ids], device=device), at=asked).float()
    nats = F.cross_entropy(logits, targets[asked], reduction="none").tolist()
    ends = [len(chat.tokens(text)) for text in accumulate(prompt.text.splitlines(True))]
    return [sum(nats[a:b]) / max(1, b - a) for a, b in pairwise([0, *ends])]


# ---------------------------------------------------------------------------------- break-even


@torch.no_grad()
def time_request(
    model: Llama, ids: list[int], prefix: KVCache | None = None
) -> tuple[float, float]:
    """Seconds to the first token, and seconds a later token, of one greedy request."""
    device = model.lm_head.weight.device
    own = torch.tensor([ids], device=device)
    last = torch.zeros_like(own, dtype=torch.bool)
    last[0, -1] = True
    cache = KVCache(model, 1, len(ids) + DECODED, prefix)
    start = now(device)
    token = model(own, cache, at=last).argmax(-1)
    cache.advance(len(ids))
    first = now(device)
    for _ in range(DECODED):
        token = model(token.view(1, 1), cache)[0].argmax(-1)
        cache.advance(1)
    return first - start, (now(device) - first) / DECODED


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def break_even(
    model: Llama, chat: Chat, prompt: Prompt, records: list[Record], spent: float, users: int
) -> dict:
    """Time the ways to serve a first reply to an input of median length. Merges the adapter.

    On two sets of weights, each with a verdict of its own, since what is won by leaving NF4 is not
    won by the adapter: "trained", those of the training, and "dense", those that servers run.
    spent: seconds of synthesis and training. A reply has the mean length of the teacher's turns.
    """
    x = sorted((record.pseudo_input for record in records), key=len)[len(records) // 2]
    full = chat.encode(prompt.teacher(x), reply=True)[0]
    bare = chat.encode(student_messages(x), reply=True)[0]
    other = chat.encode(prompt.teacher("\n"), reply=True)[0]  # parts from any x at x's first token
    shared = len(os.path.commonprefix([full, other]))
    reply = statistics.mean(len(chat.tokens(t)) + 1 for r in records for t in r.turns[::2])
    found = {"reply_tokens": reply, "cost_seconds": spent, "users": users}
    sizes = ((0, len(full)), (shared, len(full) - shared), (0, len(bare)))  # tokens held and own
    for weights, ours in (("trained", "adapter"), ("dense", "merged")):
        if ours == "merged":
            lora.merge(model)
        timed = time_in_turn(model, full, shared, bare)
        rows = {}
        for way, times, (held, own) in zip((*RIVALS, ours), timed, sizes, strict=True):
            rows[way] = request(times, reply) | kv_bytes(model, held, own + reply, users)
        pays = {rival: requests_to_pay(spent, rows[rival], rows[ours]) for rival in RIVALS}
        found[weights] = {**rows, "pays_after_requests": pays}
    return found


def time_in_turn(model: Llama, full: list[int], shared: int, bare: list[int]) -> list[tuple]:
    """Time three ways in turn, so that a slow minute is slow for all -> REPEATS times of each.

    The whole prompted request; its end behind a cache of the first `shared` tokens; and, with the
    adapter, the bare one. Once the adapter is merged the speed of all is still that of the weights.
    """
    rounds = []
    with lora.adapter_off(model):
        prefix = prefill(model, full[:shared])
    for _ in range(REPEATS + 1):
        with lora.adapter_off(model):
            prompted = time_request(model, full), time_request(model, full[shared:], prefix)
        rounds.append((*prompted, time_request(model, bare)))
    return list(zip(*rounds[1:], strict=True))  # the first round warms up


def request(rounds: list[tuple[float, float]], reply: float) -> dict:
    """What a request costs whose reply has so many tokens: medians, and the whole in each round."""
    whole = [first + (reply - 1) * later for first, later in rounds]
    return {
        "seconds_to_first_token": statistics.median(first for first, _ in rounds),
        "tokens_per_second": 1 / statistics.median(later for _, later in rounds),
        "seconds_per_request": statistics.median(whole),
        "rounds": whole,
    }


def kv_bytes(model: Llama, shared: int, own: float, users: int) -> dict:
    """Bytes of keys and values for so many tokens, alone and with `users` requests in flight."""
    token = 2 * KVCache(model, 1, 1).k.nbytes  # keys and values of one token
    alone = round(token * (shared + own))
    return {"kv_bytes": alone, "kv_bytes_in_flight": round(token * (shared + users * own))}


def requests_to_pay(spent: float, rival: dict, ours: dict) -> int | str:
    """Requests until the seconds saved exceed the seconds spent.

    They are compared round by round, and there is no verdict where a sign test finds none.
    """
    saved = [theirs - own for theirs, own in zip(rival["rounds"], ours["rounds"], strict=True)]
    faster = sum(seconds > 0 for seconds in saved)
    slower = len(saved) - faster
    if sign_test(faster, slower) >= 0.05:
        return f"no verdict: faster in {faster} of {len(saved)} rounds"
    if faster < slower:
        return "never: use prefix caching"
    return math.ceil(spent / statistics.median(saved))


# -------------------------------------------------------------------------------------- report


def held_out_records(run: Run, records: list[Record]) -> list[Record]:
    """The held-out records that can be measured. Raises: ValueError if there are none."""
    _, held_out = runs.split_records(records, run.samples, run.held_out)
    held_out = [record for record in held_out if not record.overlong]
    if not held_out:
        told = "no held-out record fits the context; make more with --held-out"
        raise ValueError(f"{run.folder}: {told}")
    return held_out


def measure(run: Run, loaded: tuple[Llama, Chat] | None, users: int) -> dict:
    """Measure everything -> the content of report.json. Raises ValueError for an unfinished run."""
    clock = time.perf_counter()
    model, chat = open_model(run, loaded)
    records, seconds = runs.load_records(run)
    held_out = held_out_records(run, records)
    training, _ = runs.split_records(records, run.samples, run.held_out)
    prompt = run.prompt
    voice = Voice(model, chat, run.slots)
    trainable = sum(p.numel() for p in lora.adapter_parameters(model))
    with torch.device("meta"):  # an NF4 weight counts as the numbers that it stands for
        base = sum(p.numel() for p in Llama(model.config).parameters())
    nll = nll_of_three(model, chat, run, held_out)
    agree = agreement(voice, run.task, held_out, run.max_new_tokens)
    asked = [r for r in held_out if len(loss.pg_sequence(chat, prompt, r).ids) <= chat.context]
    recited = recall(voice, prompt, asked[:RECALLED]) if asked else None
    spent = seconds["synth"] + seconds["train"]
    paid = break_even(model, chat, prompt, held_out, spent, users)  # last: it merges the adapter
    return {
        "model": run.model, "prompt_tokens": len(chat.tokens(prompt.text)), "lam": run.lam,
        "trainable_params": trainable, "total_params": trainable + base,
        "samples": len(training), "held_out": len(held_out),
        "nll": nll, "gap_closed": gap_closed(nll),
        "agreement": agree, "recall": recited, "break_even": paid,
        "synthesis": quality(records, run.task),
        "seconds": {**seconds, "evaluate": time.perf_counter() - clock},
    }  # fmt: skip


def markdown(report: dict, name: str) -> str:
    """The report as one page: a table a question."""
    nll = report["nll"]
    agree = report["agreement"]
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
    closed = report["gap_closed"]
    known = report["recall"]
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
    """What a request costs in each way on each kind of weights, and when the training has paid."""
    paid = report["break_even"]
    seconds = report["seconds"]
    told = [f"spent {seconds['synth']:.0f} s on synthesis and {seconds['train']:.0f} s on training"]
    for name, weights in (("trained", "the trained weights"), ("dense", "dense weights")):
        rows = dict(paid[name])
        after = rows.pop("pays_after_requests")
        head = f"one request, {weights} | to first token | tokens/s | whole reply"
        lines = [f"| {head} | KV cache | at {paid['users']} users |", "|---" * 6 + "|"]
        told.append("\n".join(lines + [request_line(way, row) for way, row in rows.items()]))
        verdicts = [f"* against the {way.replace('_', ' ')}: {pays(n)}" for way, n in after.items()]
        told.append("\n".join([f"does it pay on {weights}?", *verdicts]))
    return "\n\n".join(told)


def pays(requests: int | str) -> str:
    return f"after {requests:,} requests" if isinstance(requests, int) else requests


def interval(row: dict) -> str:
    return f"{row['k']} of {row['n']} ({100 * row['low']:.0f} to {100 * row['high']:.0f} %)"


def request_line(way: str, row: dict) -> str:
    first = f"{1e3 * row['seconds_to_first_token']:.1f} ms | {row['tokens_per_second']:.0f}"
    whole = f"{1e3 * row['seconds_per_request']:.0f} ms"
    memory = f"{row['kv_bytes'] / 2**20:.2f} | {row['kv_bytes_in_flight'] / 2**20:.1f} MiB"
    return f"| {way.replace('_', ' ')} | {first} | {whole} | {memory} |"


def report(
    folder: Path, loaded: tuple[Llama, Chat] | None, device: str | None = None, users: int = USERS
) -> None:
    """Make the report of a finished run, write it into its folder and print it."""
    run = runs.load_run(folder, device)
    found = measure(run, loaded, users)
    page = markdown(found, folder.name)
    try:
        runs.write_json(folder / "report.json", found)
        runs.write_text(folder / "report.md", page)
        rows = runs.read_metrics(folder / "metrics.jsonl")
        runs.write_text(folder / "report.svg", picture.draw(found, rows, folder.name))
    except OSError as error:
        raise ValueError(f"{folder}: {error}; free some space and run it again") from None
    print(f"\n{page}")


# ------------------------------------------------------------------------------------ two runs


def compare(folder: Path, against: Path, device: str | None) -> None:
    """Print how two adapters differ on the same held-out inputs, in one sentence.

    Raises: ValueError if the runs do not hold out the same inputs, with the same teacher.
    """
    asked = []
    same = []
    for run in (runs.load_run(folder, device), runs.load_run(against, device)):
        model, chat = open_model(run)
        records = held_out_records(run, runs.load_records(run)[0])
        replies = first_replies(Voice(model, chat, run.slots), records, run.max_new_tokens)
        asked.append([(record.pseudo_input, record.teacher) for record in records])
        same.append(agrees(run.task, replies, records))
    if asked[0] != asked[1]:
        told = "do not hold out the same records; copy inputs.json and data.jsonl from one"
        raise ValueError(f"{folder} and {against} {told} before training the other")
    found = paired_difference(*same)
    counts = [f"{sum(each)} of {len(each)}" for each in same]
    low, gap, high = (f"{100 * found[key]:+.1f}" for key in ("low", "difference", "high"))
    print(
        f"{folder} takes the teacher's action on {counts[0]} held-out inputs, {against} on "
        f"{counts[1]}: {gap} points (95 %: {low} to {high}); {found['only_ours']} only the first, "
        f"{found['only_theirs']} only the second, exact McNemar p = {found['p']:.2f}: "
        f"{'told apart' if found['p'] < 0.05 else 'not told apart'}"
    )


def paired_difference(ours: list[bool], theirs: list[bool]) -> dict:
    """Compare outcomes on the same inputs: difference of the shares, its bootstrap interval, and p.

    p is that of the exact McNemar test, which is the sign test of the inputs that differ. The
    interval is of 10,000 resamples of the inputs.
    """
    gaps = torch.tensor(ours).double() - torch.tensor(theirs).double()
    only_ours = int((gaps > 0).sum())
    only_theirs = int((gaps < 0).sum())
    draw = torch.Generator().manual_seed(0)
    resamples = torch.randint(len(gaps), (10_000, len(gaps)), generator=draw)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = gaps[resamples].mean(1).quantile(ends).tolist()
    found = {"difference": gaps.mean().item(), "low": low, "high": high}
    found |= {"only_ours": only_ours, "only_theirs": only_theirs}
    return found | {"p": sign_test(only_ours, only_theirs)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Report on a finished run.")
    parser.add_argument("--run", type=Path, required=True, help="run folder of genpi.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the run's own")
    parser.add_argument("--against", type=Path, metavar="RUN", help="compare with this run instead")
    parser.add_argument("--users", type=int, default=USERS, help="requests in flight at a time")
    args = parser.parse_args(argv)
    if args.against:
        return runs.exit_code(compare, args.run, args.against, args.device)
    return runs.exit_code(report, args.run, None, args.device, args.users)


if __name__ == "__main__":
    sys.exit(main())
