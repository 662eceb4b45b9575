"""Speed and memory beside the usual stack: transformers + peft, on a GPU with bitsandbytes.

    python tests/bench.py step continuations               on a CPU (a quarter of an hour)
    python tests/bench.py --device cuda nf4 unpack decode step            on a GPU
    python tests/bench.py step continuations --alone --config llama1b     ours alone, another shape
    python tests/bench.py step chat nucleus --dtype bfloat16              in another type
    python tests/bench.py grows                            ours alone: how the cost grows
    python tests/bench.py first --rounds 1                 the first command, and what came out
    python tests/bench.py packing --run runs/os            no clock: how much of a batch is padding

step            one optimiser step of SFT + PG, LoRA of rank 16: real tokens a second, peak memory
continuations   64 rows write 64 tokens each after a prompt of 500 tokens that all share
nucleus         16 rows at temperature 1 and nucleus 0.9, beside the same rows written greedily
chat            1 row writes 64 tokens: dense weights, as those of a merged adapter; with one
                beside them; NF4 unpacked once; NF4 unpacked for every product
decode          1 row and 64 rows write 128 tokens each
nf4             y = x W^T with an NF4 weight, 1 and 8 rows
unpack          W from its NF4 codes, in bfloat16
first           python genpi.py --prompt os.txt, whole
packing         padded tokens for a real one over a training, which bounds what packing could win
grows           time and memory against samples, prompt, vocabulary, rows and model, of the embedded
                model's shape: seconds of one processor, which other work on it does not change much

On a CPU the shape is SmolLM2-135M's in float32 (--dtype: another type, of both sides), on a GPU
Llama-3-8B's in NF4. The weights are random, for speed does not depend on them, and lie in a
checkpoint that both sides load with their own from_pretrained or load_model. The batch is real:
records of `python genpi.py --prompt os.txt` (fixtures/records.jsonl), on a GPU with a prompt made
1,400 tokens long.

Ours and the peer's take turns, --rounds times, each in a process of its own, since peak memory
belongs to a process. Printed are medians (smallest to largest); --out takes all values as JSON.
The peer gets what favours it: our micro-batches, so no more padding than ours, fused attention, and
the loss and the cache of its own library. Both must find the same loss. The seconds of writing
include those of reading the prompt.

Needs beyond requirements.txt: transformers and peft; bitsandbytes on a GPU.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_work import CONFIGS, checkpoint_of  # and so the modules of the repository

from runs import DTYPES

WORK = Path(__file__).with_name("bench_work.py")
MATRICES = ((4096, 4096), (14336, 4096), (4096, 14336))

# --------------------------------------------------------------------------------------- the races


def races(figure: str, cuda: bool, config: str | None) -> list[dict]:
    """What is measured for a figure: settings for bench_work.py, a name for each."""
    small = {"name": figure, "work": figure, "config": "smol", "bits": 16, "micro_tokens": 2048}
    shape = {**small, "config": "llama3", "bits": 4, "micro_tokens": 4096} if cuda else small
    shape |= {"config": config or shape["config"]}
    if figure == "step":
        return [shape | {"records": 32 if cuda else 4, "checkpointing": cuda}]
    if figure == "continuations":
        return [shape | {"work": "generation", "rows": 64, "shared": 500, "new": 64}]
    if figure == "decode":
        settings = {"work": "generation", "shared": 100, "new": 128}
        return [shape | settings | {"name": f"decode, rows {n}", "rows": n} for n in (1, 64)]
    if figure == "nucleus":
        settings = {"work": "generation", "rows": 16, "shared": 500, "new": 64}
        return [shape | settings | {"sides": ("nucleus", "greedy")}]
    if figure == "chat":
        settings = shape | {"work": "generation", "rows": 1, "shared": 100, "new": 64}
        nf4 = {"bits": 4, "name": "chat, NF4", "sides": ("unpacked", "packed")}
        dense = {"name": "chat, dense", "sides": ("merged", "adapter")}
        return [settings | dense, settings | nf4]
    if figure in ("first", "packing"):
        return [{"name": figure, "work": figure, "alone": True}]
    if figure == "nf4":
        cases = [(n, k, rows) for n, k in MATRICES for rows in (1, 8)]
        name = "nf4 {} x {}, rows {}"
        return [{"work": "nf4", "name": name.format(*case), "matrix": case} for case in cases]
    if figure == "unpack":
        name = "unpack {} x {}"
        return [{"work": "nf4", "name": name.format(*m), "matrix": (*m, 0)} for m in MATRICES]
    base = shape | {"alone": True, "records": 2, "times": 1, "rows": 16, "part": "step"}
    base |= {"config": config or "tiny", "threads": 1}
    vary = [{"records": n} for n in (2, 4, 8, 16, 32)] + [{"times": n} for n in (1, 2, 4)]
    vary += [{"vocabulary": n} for n in (12288, 24576, 49152, 98304)]
    write = [{"rows": n} for n in (1, 4, 16, 64)] + [{"times": n} for n in (1, 2, 4)]
    vary += [{**v, "part": "write"} for v in write]
    if not config:
        vary += [
            {"config": n, "part": part} for n in ("tiny", "smol") for part in ("step", "write")
        ]
    names = ["{} {}".format(*next(iter(v.items()))) for v in vary]
    found = [base | v for v in vary]
    return [s | {"name": f"{s['part']}, {n}"} for s, n in zip(found, names, strict=True)]


def measure(settings: dict) -> dict:
    """Run bench_work.py -> what it printed last."""
    command = [sys.executable, str(WORK), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{settings['name']}, {settings['who']}: failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def race(settings: dict, rounds: int, found: dict) -> None:
    """Fill found[name] = {who: [results]} in turn, and print a line."""
    sides = settings.get("sides", ("ours", "peer"))
    if settings["alone"]:
        sides = sides[:1]
    rows = found[settings["name"]] = {who: [] for who in sides}
    for _ in range(rounds):
        for who in sides:
            rows[who].append(measure(settings | {"who": who}))
    one = rows[sides[0]][0]
    key = next(iter(one))
    for who in sides:
        print(f"{settings['name']:<28} {who:<5} {key} {spread([r[key] for r in rows[who]])}")
    if "loss" in one:
        losses = [rows[who][0]["loss"] for who in sides]
        print(f"{'':<28} loss (SFT, PG)", *losses)
        if any(abs(a / b - 1) > 0.005 for a, b in zip(losses[0], losses[-1], strict=True)):
            sys.exit("the two sides do not compute the same loss")
    if len(sides) == 2:
        ratio = [a[key] / b[key] for a, b in zip(*rows.values(), strict=True)]
        ratio = [1 / r for r in ratio] if key == "microseconds" else ratio
        print(f"{'':<28} times as fast {spread(ratio)}")
    if "peak_bytes" in one:
        peaks = {who: [r["peak_bytes"] / 2**30 for r in rows[who]] for who in sides}
        print(f"{'':<28} peak GiB {', '.join(f'{w} {spread(p)}' for w, p in peaks.items())}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    figures = ("step", "continuations", "nucleus", "chat", "decode", "nf4", "unpack", "first")
    figures += ("packing", "grows")
    parser = argparse.ArgumentParser(description="Speed and memory beside the usual stack.")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(figures))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--config", choices=sorted(CONFIGS), help="another shape than the device's")
    parser.add_argument("--dtype", choices=DTYPES, help="of both sides; float32, on CUDA bfloat16")
    parser.add_argument("--run", help="run folder whose records are counted by packing")
    parser.add_argument("--micro-tokens", type=int, help="padded tokens of a forward pass")
    parser.add_argument("--alone", action="store_true", help="ours without the peer")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    if not args.figures or not set(args.figures) <= set(figures):
        parser.error(f"figures are {', '.join(figures)}")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    found: dict = {"machine": [processor(), gpu], "torch": torch.__version__}
    found |= {"date": time.strftime("%Y-%m-%d"), "threads": args.threads, "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as scratch:
        for figure in args.figures:
            for settings in races(figure, args.device == "cuda", args.config):
                plain = {"device": args.device, "threads": args.threads, "dtype": args.dtype}
                settings = plain | {"run": args.run} | settings
                settings["alone"] = args.alone or settings.get("alone", False)
                settings |= {"micro_tokens": args.micro_tokens} if args.micro_tokens else {}
                if "config" in settings:
                    settings["folder"] = str(checkpoint_of(settings, Path(scratch)))
                race(settings, args.rounds, found)
                args.out.write_text(json.dumps(found, indent=1) + "\n")


def processor() -> str:
    """Its name, and whether it multiplies bfloat16 in a unit of its own."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    amx = any("amx_bf16" in line for line in lines)
    return f"{(names or [platform.processor()])[0]}{', AMX' if amx else ''}"


if __name__ == "__main__":
    main()
