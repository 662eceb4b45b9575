"""What a request costs with p, with a cached p and with the adapter, and when training has paid.

    time     to the first token, a later token, and the whole reply, in seconds
    memory   bytes of keys and values, of one request and with many in flight
    pays     after how many requests the seconds saved exceed the seconds spent

All ways are timed on the same weights, in turn: those of the training, and dense ones with the
adapter merged, since what is won by leaving NF4 is not won by the adapter.

Left out: many requests computed together, and the CUDA graph that synthesis uses. One request at a
time, in a plain loop.
"""

import math
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import lora
from chat import Chat
from files import markdown_table
from model import KVCache, Llama, prefill
from prompt import Prompt, student_messages
from runs import Record
from stats import sign_test

REPEATS = 9  # rounds, with a request a way ...
DECODED = 32  # ... of so many tokens each
USERS = 32  # requests in flight whose memory is told
RIVALS = ("full_prompt", "cached_prompt")


def time_request(
    model: Llama, ids: list[int], prefix: KVCache | None = None
) -> tuple[float, float]:
    """Seconds to the first token, and seconds a later token, of one greedy request."""
    return time_turn(model, KVCache(model, 1, len(ids) + DECODED, prefix), ids, DECODED)


@torch.no_grad()
def time_turn(model: Llama, cache: KVCache, ids: list[int], n: int) -> tuple[float, float]:
    """The same of ids that are read behind what the cache holds, and n tokens that are written.

    The cache then holds them all.
    """
    device = model.lm_head.weight.device
    own = torch.tensor([ids], device=device)
    last = torch.zeros_like(own, dtype=torch.bool)
    last[0, -1] = True
    start = now(device)
    token = model(own, cache, at=last).argmax(-1)
    cache.advance(len(ids))
    first = now(device)
    for _ in range(n):
        token = model(token.view(1, 1), cache)[0].argmax(-1)
        cache.advance(1)
    return first - start, (now(device) - first) / n


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def processor() -> str:
    """On what is timed: what this machine calls its processor, threads, version of PyTorch."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or one that names none
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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


# -------------------------------------------------------------------------------------- the page


def markdown(report: dict) -> str:
    """What a request costs in each way on each kind of weights, and when the training has paid."""
    paid = report["break_even"]
    seconds = report["seconds"]
    told = [f"spent {seconds['synth']:.0f} s on synthesis and {seconds['train']:.0f} s on training"]
    for name, weights in (("trained", "the trained weights"), ("dense", "dense weights")):
        rows = dict(paid[name])
        after = rows.pop("pays_after_requests")
        head = [f"one request, {weights}", "to first token", "tokens/s", "whole reply", "KV cache"]
        lines = [request_cells(way, row) for way, row in rows.items()]
        told.append(markdown_table([*head, f"at {paid['users']} users"], lines))
        verdicts = [f"* against the {way.replace('_', ' ')}: {pays(n)}" for way, n in after.items()]
        told.append("\n".join([f"does it pay on {weights}?", *verdicts]))
    return "\n\n".join(told)


def pays(requests: int | str) -> str:
    return f"after {requests:,} requests" if isinstance(requests, int) else requests


def request_cells(way: str, row: dict) -> list[str]:
    first = f"{1e3 * row['seconds_to_first_token']:.1f} ms", f"{row['tokens_per_second']:.0f}"
    whole = f"{1e3 * row['seconds_per_request']:.0f} ms"
    memory = f"{row['kv_bytes'] / 2**20:.2f} MiB", f"{row['kv_bytes_in_flight'] / 2**20:.1f} MiB"
    return [way.replace("_", " "), *first, whole, *memory]
