"""The flags of genpi.py: their limits, the paper's values as defaults, and what follows from which.

The embedded model has a preset of its own, and so has --full. What a flag may be is in flags.py.
"""

import argparse
from pathlib import Path

import torch

import full
import runs
from files import read_json
from flags import SHARE, WHOLE, Flags, device_flag, generator_flag, number, utf8
from linear import has_amx
from model import default_dtype
from objectives import LAMS, check_flags
from prompt import TASKS
from runs import ELSEWHERE, HERE
from synth import WAVE
from train import Recipe

# The embedded model is 4,000 times smaller than the paper's: a higher rate, and less of all else.
EMBEDDED = {
    "samples": 192, "held_out": 50, "epochs": 4, "batch": 8, "lr": 3e-3, "pg_share": 1 / 8,
    "max_new_tokens": 128, "max_reason_tokens": 400,
}  # fmt: skip
FULL = {"bits": 16, "batch": 64, "lr": 1e-5}  # the paper's: twice the batch, a tenth of the rate
EMBEDDED_FULL = {"bits": 16, "batch": 16, "lr": 3e-4}


# fmt: off
def build_parser() -> Flags:
    """All flags, each with its limits, and with the paper's values as defaults."""
    parser = Flags(
        prog="genpi.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Move a long prompt into a LoRA adapter (GenPI, arXiv 2411.15927).",
    )
    add = parser.add_argument_group("what to internalise").add_argument
    add("--prompt", type=Path, default=HERE / "os.txt", help="the prompt file (UTF-8)")
    add("--task", choices=sorted(TASKS), help="kind of prompt; None: by the file's name, or any; "
        "with --from that run's")
    add("--environment", type=utf8, help="whom the agent talks to; None: the task's")
    add("--demos", type=Path, help="file of first user messages as examples: one a line, or "
        "parted by lines of ---, or JSON strings, one a line; None: the task's")
    add("--inputs", type=Path, help="file of real first messages, written like --demos, that take "
        "the place of invented ones; they are shuffled and split")
    add("--out", type=Path, help="run folder; None: runs/NAME of the prompt file")
    add("--records", type=Path, metavar="RUN", help="begin with the pseudo inputs and records of "
        "this run, which must be of the same prompt, task, demos and model")
    add("--from", type=Path, metavar="RUN", dest="earlier", help="after an edit of p: begin with "
        "the adapter of this run, its inputs, and its records that still hold")
    add("--chat", type=Path, metavar="RUN", help="talk to the model of a finished run instead")
    add("--show", type=Path, metavar="RUN", nargs="?", const=True, help="print a record as it is "
        "trained instead: of this run, or else of the run of the other flags")
    add("--dry-run", action="store_true", help="print what the run would take: hours, memory")
    add("--record", type=number(int, 0), help="number of the record; None: the first trained on")
    add = parser.add_argument_group("models").add_argument
    add("--model", type=utf8, help="folder or Hub id; None: tiny/, with a preset of its own")
    add("--generator", type=generator_flag, help="folder, Hub id or URL (http://HOST:PORT/v1) of "
        "the writer of inputs and reasons; None: --model")
    add("--bits", type=int, choices=(4, 16), default=4, help="4: NF4 (QLoRA); 16: not quantised")
    add("--dtype", choices=("auto", *runs.DTYPES), default="auto", help="of weights and "
        "activations; auto: as the run was begun, or else bfloat16 on CUDA and on a CPU that has a "
        "unit for it (AMX), float32 on others")
    add("--device", type=device_flag, choices=("cpu", "cuda"), help="None: cuda if there is one")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of everything that is drawn")
    add = parser.add_argument_group(
        "a server as --generator", "any with OpenAI's chat completions; OPENAI_API_KEY is its key",
    ).add_argument
    add("--generator-model", type=utf8, metavar="NAME",
        help="what the server calls it; None: its first model")
    add("--concurrency", type=WHOLE, default=16, help=f"requests in flight; {WAVE} at most help")
    add("--timeout", type=number(float, 0.1, 86400), default=300.0, help="seconds for an answer")
    add = parser.add_argument_group("synthesis (GenPI section 5)").add_argument
    add("--samples", type=WHOLE, default=1000, help="pseudo inputs to train on")
    add("--held-out", type=WHOLE, default=100, help="more of them, for the report")
    add("--cover", type=WHOLE, metavar="K", help="ask for more samples until each rule of p "
        "has K that need it; None: none are added")
    add("--max-turns", type=WHOLE, help="agent turns of a conversation; None: the task's (any: 1)")
    add("--max-new-tokens", type=WHOLE, help="limit of one turn; None: 2,048, or a "
        "quarter of the context")
    add("--max-reason-tokens", type=WHOLE, default=512, help="limit of a reason")
    add("--slots", type=WHOLE, default=64, help="conversations sampled at a time")
    training_flags(parser)
    return parser


def training_flags(parser: Flags) -> None:
    add = parser.add_argument_group("training (GenPI section 4 and C.4, QLoRA)").add_argument
    add("--lam", type=SHARE, default=Recipe.lam, help="weight of SFT; 1: SFT alone, 0: PG alone")
    add("--objective", choices=runs.OBJECTIVES, default=Recipe.objective,
        help="or one that the paper compares with; all but genpi have a lam of their own")
    add("--pg-target", choices=runs.PG_TARGETS, default="prompt+reason",
        help="what L_PG writes, given what")
    add("--prepend-prob", type=SHARE, default=Recipe.prepend_prob, metavar="Q",
        help="of --objective prepend: how often p is in the context")
    add("--pg-share", type=number(float, 1e-6, 1), default=Recipe.pg_share, metavar="S",
        help="share of a batch whose PG loss is computed: the same on average, for less")
    add("--epochs", type=number(int, 1, 10_000), default=Recipe.epochs,
        help="passes over the samples")
    add("--batch", type=WHOLE, default=Recipe.batch, help="samples of an optimiser step")
    add("--lr", type=number(float, 1e-12, 1), default=Recipe.lr, help="peak rate of AdamW")
    add("--warmup", type=SHARE, default=Recipe.warmup, help="share of steps with a rising rate")
    add("--weight-decay", type=SHARE, default=Recipe.weight_decay, help="of AdamW")
    add("--clip", type=number(float, 1e-12, 1e12), default=Recipe.clip, help="of the gradient norm")
    add("--full", action="store_true", help="train all weights, no adapter; by default with "
        "--bits 16, twice the batch and a tenth of the rate")
    add("--rank", type=WHOLE, default=16, help="rank of the adapter")
    add("--alpha", type=number(float, 1e-12, 1e12), default=32.0, help="scale is alpha / rank")
    add("--dropout", type=number(float, 0, 0.99), default=0.05, help="on the adapter's input")
    add = parser.add_argument_group("memory and safety").add_argument
    add("--micro-tokens", type=WHOLE, default=Recipe.micro_tokens,
        help="padded tokens of a forward pass")
    add("--checkpointing", action="store_true", help="recompute activations to save memory")
    add("--save-every", type=WHOLE, default=Recipe.save_every, help="steps between checkpoints")
# fmt: on


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; without --model the embedded model's preset gives the defaults."""
    parser = build_parser()
    parser.set_defaults(model_path=None)
    args = parser.parse_args(argv)
    opened = args.chat or isinstance(args.show, Path)  # that run knows its model and device
    if args.model is None and not opened:
        parser.set_defaults(model="tiny", model_path="tiny", **EMBEDDED)
    if args.full:
        parser.set_defaults(**(EMBEDDED_FULL if args.model is None else FULL))
    parser.set_defaults(lam=LAMS.get(args.objective, Recipe.lam))
    args = parser.parse_args(argv)
    check_flags(args.objective, args.lam, parser.said(argv))
    if args.full:
        full.check_flags(args.bits, parser.said(argv))
    args.task = args.task or guess_task(args)
    args.environment = args.environment or TASKS[args.task].environment
    args.max_turns = args.max_turns or TASKS[args.task].max_turns
    args.out = args.out or Path("runs") / args.prompt.stem
    if not opened:
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        args.dtype = settled_dtype(args)
    if not args.chat and args.generator_model and "://" not in (args.generator or ""):
        needs = "needs the URL of a server as --generator"
        raise ValueError(f"--generator-model {args.generator_model} {needs}")
    if args.earlier and args.records:
        raise ValueError("--from brings records of its own; give no --records")
    if args.record is not None and not args.show:
        raise ValueError(f"--record {args.record} needs --show; add it")
    return args


def guess_task(args) -> str:
    """By the name of the prompt file, or else the task of the run that --from names."""
    said = args.earlier and args.earlier / "args.json"
    earlier = read_json(said, ELSEWHERE).get("task") if said and said.exists() else None
    known = list(TASKS)  # where any value of JSON can be looked for
    return next((task for task in (args.prompt.stem, earlier) if task in known), "any")


def settled_dtype(args) -> str:
    """--dtype, where auto is what the run was begun with, or else what this device computes well.

    Raises: ValueError if the folder of the run is damaged.
    """
    path = args.out / "args.json"
    if args.dtype != "auto":
        return args.dtype
    if not path.exists():
        if args.device == "cpu" and has_amx():
            return "bfloat16"
        return str(default_dtype(torch.device(args.device))).removeprefix("torch.")
    begun = read_json(path, runs.ELSEWHERE, {"dtype": str}, runs.LATER)["dtype"]
    if begun not in runs.DTYPES:
        raise ValueError(f"{path}: no dtype is called {begun}; {runs.ELSEWHERE}")
    return begun
