"""Figures 3 and 4 of the paper: what five turns cost, with p, with half of it, and without.

    python evaluate.py figures                counts of three shapes, seconds of the embedded model
    python evaluate.py figures --rounds 0     the counts alone, which need no weights

    MACs       counted from the shapes of the embedded model, Llama 3.2 1B and Llama 3 8B (macs.py)
    seconds    measured on --model, turn by turn, on dense weights

of a conversation of five turns behind a prompt of 1,285 tokens, as the paper's web shopping. Each
is told with p read in the conversation or held in a cache; and with the keys and values of earlier
turns kept, or read again in every turn. The adapter is merged: it costs what no prompt costs. A
conversation may be longer than the context of --model: its words are drawn, and time is time.

The lengths of the paper's turns are not known to us. Ours are near those with which its 39 % come
out if p is read; the page tells which these are.

Left out: memory (costs.py); many conversations at a time. Source: GenPI section 6.
"""

import statistics
from bisect import bisect_left
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

import costs
import picture
from checkpoint import find_folder
from experiments.macs import Talk, linear_maps, pass_macs, talk_macs, turn_macs
from files import markdown_table, write_json, write_text
from flags import WHOLE, Flags, device_flag, number
from model import Config, KVCache, Llama, load_model, prefill, read_shape
from picture import COLOUR, HEIGHT, WIDTH
from runs import HERE

SHAPES = {
    "Llama 3.2 1B": Config(128_256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True),
    "Llama 3 8B": Config(128_256, 4096, 14_336, 32, 32, 8, 128),
}
PUBLISHED = 0.39  # of MACs and FLOPs that the adapter saves
PROMPTS = {"full": 1.0, "half": 0.5, "adapter": 0.0}  # the share of p that is there
HISTORIES = {True: "history cached", False: "history read again"}


def talks(talk: Talk) -> dict[tuple[str, bool, bool], Talk]:
    """(share of p by name, is p cached, is history) -> the conversation; without p once each."""
    found = {}
    for history, who, cached in product(HISTORIES, PROMPTS, (False, True)):
        if PROMPTS[who] or not cached:
            prompt = round(PROMPTS[who] * talk.prompt)
            way = replace(talk, prompt=prompt, cached_prompt=cached, cached_history=history)
            found[who, cached, history] = way
    return found


def saved(rows: dict, who: str, cached: bool, history: bool) -> float:
    """The share of a conversation's cost that the adapter saves. rows: way -> cost of each turn."""
    return 1 - sum(rows["adapter", False, history]) / sum(rows[who, cached, history])


def counts(config: Config, talk: Talk) -> dict[tuple, list[int]]:
    """way -> MACs of each turn."""
    ways = talks(talk).items()
    return {key: [turn_macs(config, way, turn) for turn in range(way.turns)] for key, way in ways}


# ------------------------------------------------------------------------------------------ time


def time_talk(model: Llama, talk: Talk) -> list[float]:
    """Seconds of each turn. The tokens are drawn, for time does not depend on what they say."""
    draw = torch.Generator().manual_seed(0)
    whole = talk.prompt + talk.turns * (talk.read + talk.written)
    ids = torch.randint(model.config.vocab_size, (whole,), generator=draw).tolist()
    held = talk.prompt if talk.cached_prompt else 0
    prefix = prefill(model, ids[:held]) if held else None
    cache = None
    seconds = []
    for turn in range(talk.turns):
        new, _ = talk.passes(turn)
        if cache is None or not talk.cached_history:
            cache = KVCache(model, 1, whole - held, prefix)
        first, later = costs.time_turn(model, cache, ids[:new], talk.written)
        seconds.append(first + talk.written * later)
    return seconds


def latencies(model: Llama, talk: Talk, rounds: int) -> list[dict[tuple, list[float]]]:
    """way -> seconds of each turn, of rounds in which all ways take turns."""
    ways = talks(talk)
    found = [{key: time_talk(model, way) for key, way in ways.items()} for _ in range(rounds + 1)]
    return found[1:]  # the first round warms up


def medians(rounds: list[dict]) -> dict[tuple, list[float]]:
    """way -> the median of each turn over the rounds."""
    each = {key: zip(*(rows[key] for rows in rounds), strict=True) for key in rounds[0]}
    return {key: [statistics.median(turn) for turn in turns] for key, turns in each.items()}


# ------------------------------------------------------------------------------------------- page


def scaled(rows: dict, unit: str) -> tuple[float, str]:
    """What to divide by, and the unit then, so that the largest value has few digits."""
    if unit == "s":
        return 1e-3, "ms"
    largest = max(max(row) for row in rows.values())
    return next((10.0**e, f"{name}MACs") for e, name in ((12, "T"), (9, "G"), (6, "M"), (0, ""))
                if largest >= 10**e)  # fmt: skip


def table(name: str, rounds: list[dict], unit: str) -> str:
    """A row a way: each turn, all turns, and the share of it that the adapter saves."""
    rows = medians(rounds)
    by, unit = scaled(rows, unit)
    turns = len(rows["adapter", False, True])
    head = [f"{name}, {unit}", *(f"turn {turn + 1}" for turn in range(turns)), "all"]
    cells = [
        [way_name(*key), *(f"{x / by:.3g}" for x in (*row, sum(row))), in_percent(rounds, key)]
        for key, row in rows.items()
    ]
    return markdown_table([*head, "the adapter saves"], cells)


def in_percent(rounds: list[dict], key: tuple) -> str:
    """What the adapter saves of a way; of several rounds their median, smallest and largest."""
    if key[0] == "adapter":
        return ""
    each = [100 * saved(rows, *key) for rows in rounds]
    spread = f" ({min(each):.1f} to {max(each):.1f})" if len(each) > 1 else ""
    return f"{statistics.median(each):.1f} %{spread}"


def way_name(who: str, cached: bool, history: bool) -> str:
    prompt = {"full": "full prompt", "half": "half of it", "adapter": "adapter"}[who]
    held = "" if who == "adapter" else " cached" if cached else " read"
    return f"{prompt}{held}, {HISTORIES[history]}"


def fitting(config: Config, talk: Talk, share: float) -> int:
    """Tokens read a turn with which the adapter saves this share, if p is read and history kept."""

    def loss(read: int) -> float:
        way = replace(talk, read=read, cached_prompt=False, cached_history=True)
        return talk_macs(config, replace(way, prompt=0)) / talk_macs(config, way)

    return bisect_left(range(1, 100_000), 1 - share, key=loss) + 1


def reading(config: Config, talk: Talk) -> str:
    """Why the paper's 39 % are not what is saved where p lies in a cache."""
    rows = counts(config, talk)
    linear = config.num_hidden_layers * sum(a * b for a, b in linear_maps(config))
    token = pass_macs(config, 1, talk.prompt, logits=0)
    seen = token - pass_macs(config, 1, 0, logits=0)
    read, held = (100 * saved(rows, "full", cached, True) for cached in (False, True))
    fit = fitting(config, talk, PUBLISHED)
    at = f"; it would be {100 * PUBLISHED:.0f} % at {fit} tokens read a turn" if fit > 1 else ""
    return f"""The paper's {100 * PUBLISHED:.0f} %, beside the counts of the 8B shape. With p read \
in the conversation and history kept, the adapter saves {read:.1f} %{at}. That is the pass of p \
itself through the linear maps, {linear / 1e9:.2f} GMACs a token. With p in a cache there is no \
such pass, and what is left is to attend to its {talk.prompt:,} tokens, {100 * seen / token:.1f} % \
of what a token costs: the adapter saves {held:.1f} %."""


def lines(name: str, rounds: list[dict], unit: str, history: bool) -> str:
    """A panel: cost by turn, dashed where p is cached."""
    rows = medians(rounds)
    by, unit = scaled(rows, unit)
    rows = {key: row for key, row in rows.items() if key[2] == history}
    top = max(max(row) for row in rows.values())
    marks = []
    for (who, cached, _), row in rows.items():
        x = [WIDTH * (i + 0.5) / len(row) for i in range(len(row))]
        y = [HEIGHT * (1 - value / top) for value in row]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        dashed = ' stroke-dasharray="4 3"' if cached else ""
        marks.append(f'<polyline points="{points}" fill="none" stroke="{COLOUR[who]}"{dashed}/>')
    places = {turn + 1: at for turn, at in enumerate(x)}
    titles = f"{name}, {unit}, {HISTORIES[history]}", "turn (dashed: p is cached)"
    return picture.panel(titles, dict(zip(PROMPTS, PROMPTS, strict=True)),
                         {f"{top / by:.3g}": 0, "0": HEIGHT}, places, marks)  # fmt: skip


# ---------------------------------------------------------------------------------------- command


def command(argv: list[str]) -> None:
    """Count, measure, and write figures.md, figures.json and figures.svg."""
    parser = Flags(prog="evaluate.py figures", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/figures"), help="folder of the figures")
    add("--prompt-tokens", type=WHOLE, default=1285, help="of p; the paper's web shopping")
    add("--read", type=WHOLE, default=370, help="tokens that arrive in a turn")
    add("--written", type=WHOLE, default=60, help="tokens that are written in a turn")
    add("--turns", type=WHOLE, default=5)
    add("--model", default=str(HERE / "tiny"), help="folder or Hub id, whose seconds are measured")
    add("--device", type=device_flag, choices=("cpu", "cuda"), default="cpu")
    add("--rounds", type=number(int, 0), default=5, help="of the measurement; 0: none")
    args = parser.parse_args(argv[1:])
    talk = Talk(args.prompt_tokens, args.read, args.written, args.turns)
    folder = find_folder(args.model)
    name = "embedded" if folder.resolve() == HERE / "tiny" else folder.name
    shapes = {name: read_shape(folder)[0], **SHAPES}
    plots = [(each, [counts(config, talk)], "MACs") for each, config in shapes.items()]
    if args.rounds:
        model, _ = load_model(folder, args.device)
        plots.append((f"{name}, measured", latencies(model, talk, args.rounds), "s"))
    print(write(args.out, talk, plots, args.rounds))


def write(out: Path, talk: Talk, plots: list[tuple[str, list, str]], rounds: int) -> str:
    """Write the three files -> the page. plots: name, rounds of way -> cost of each turn, unit."""
    out.mkdir(parents=True, exist_ok=True)
    head = f"""# What {talk.turns} turns cost

A prompt of {talk.prompt:,} tokens; {talk.read} tokens are read and {talk.written} written a turn; \
a MAC is two FLOPs"""
    if rounds:
        told = f"{rounds} rounds on {costs.processor()}"
        head += f"; times are medians of {told}, what is saved with its extremes"
    parts = [head, *(table(*plot) for plot in plots), reading(SHAPES["Llama 3 8B"], talk)]
    told = "\n\n".join(parts)
    write_text(out / "figures.md", told + "\n")
    values = {
        name: {
            "unit": unit,
            "rounds": [{way_name(*key): rows[key] for key in rows} for rows in each],
        }
        for name, each, unit in plots
    }
    write_json(out / "figures.json", {"talk": vars(talk), "rounds": rounds, "costs": values})
    panels = [lines(*plot, history) for history in HISTORIES for plot in plots]
    title = f"what a turn costs behind a prompt of {talk.prompt:,} tokens"
    write_text(out / "figures.svg", picture.page(panels, title, rows=len(HISTORIES)))
    return told
