"""What the cells of few_samples.py say: a reading in sentences, tables, a picture.

Two arms are compared on the same inputs after trainings on the same samples. One question was asked
before anything was trained: does GenPI obey the rules that one or two samples show (FEW) better
than SFT alone? The other comparisons tell what of it does so; of these many a p below 0.05 may be
chance. The interval of a difference is over seeds and rules, so also for other rules; p is over
seeds, for these rules and inputs (stats.clustered_difference). Told apart is what both tell apart.

A null result is a result.
"""

import statistics
from collections import defaultdict
from pathlib import Path

import picture
from files import UNSEEN, markdown_table, write_text
from picture import COLOUR, HEIGHT, WIDTH, mark, panel
from stats import clustered_difference, wilson

NAMES = {
    "genpi": "GenPI", "sft": "SFT alone", "sft-tokens": "SFT, as many tokens",
    "unrelated": "PG, unrelated prompt", "prompt": "PG, prompt alone", "reason": "PG, reason alone",
}  # fmt: skip
BASE = "sft"  # what the table compares with
FEW = (1, 2)  # samples that show a rule
CONTRASTS = (  # ours, theirs, what differs between them
    ("genpi", "sft-tokens", "not only more tokens"),
    ("prompt", "unrelated", "the words of p, not those of any prompt"),
    ("genpi", "prompt", "the reasons beside p"),
    ("genpi", "reason", "p beside the reasons"),
)

Pairs = dict[tuple, tuple[int, int, int]]


def levels_in(rows: list[dict]) -> list[int]:
    """How many samples showed a rule, of all rows about one."""
    return sorted({row["shown"] for row in rows if row["rule"]})


def sizes_in(rows: list[dict]) -> list[int]:
    return sorted({row["samples"] for row in rows})


def at(rows: list[dict], arm: str, levels: tuple, samples: int | None = None) -> list[dict]:
    """The rows of an arm about rules that so many samples showed. levels: (None,) is of inputs that
    need no rule; samples None: of all sizes.
    """
    return [
        row
        for row in rows
        if row["arm"] == arm
        and (row["shown"] if row["rule"] else None) in levels
        and samples in (None, row["samples"])
    ]


def paired(ours: list[dict], theirs: list[dict]) -> Pairs:
    """(seed, rule) -> how many inputs ours gets right, and theirs, of how many; sizes added up."""
    other = {(row["samples"], row["seed"], row["rule"]): row for row in theirs}
    found: dict[tuple, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in ours:
        twin = other.get((row["samples"], row["seed"], row["rule"]))
        if twin:
            counted = sum(row["obeyed"]), sum(twin["obeyed"]), len(row["obeyed"])
            for i, n in enumerate(counted):
                found[row["seed"], row["rule"]][i] += n
    return {key: tuple(counted) for key, counted in found.items() if counted[2]}


def share(rows: list[dict]) -> dict:
    """k of n inputs on which a rule is obeyed; the interval is over seeds and rules, and at 0 and n
    as if each rule of a seed had been asked about once.
    """
    nothing = [row | {"obeyed": [0] * len(row["obeyed"])} for row in rows]
    pairs = paired(rows, nothing)
    k, _, n = map(sum, zip(*pairs.values(), strict=True)) if pairs else (0, 0, 0)
    if k in (0, n):
        return wilson(len(pairs) * bool(k), len(pairs)) | {"k": k, "n": n}
    found = clustered_difference(pairs)
    return {"k": k, "n": n, "low": found["low"], "high": found["high"]}


def points(found: dict) -> str:
    """A difference and its interval."""
    difference, low, high = (f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{difference} points (95 %: {low} to {high})"


# ---------------------------------------------------------------------------------------- reading


def reading(rows: list[dict]) -> str:
    """The question, what tells more about it, and GenPI against SFT alone by size and by level."""
    both = ("genpi", BASE)
    told = [sentence(rows, "**the question**", *both, FEW)]
    told += [sentence(rows, what, ours, theirs, FEW) for ours, theirs, what in CONTRASTS]
    for n in sizes_in(rows):
        some = [row for row in rows if row["samples"] == n]
        told.append(sentence(some, f"of {n} samples", *both, FEW))
    told += [sentence(rows, "by level", *both, (level,)) for level in [*levels_in(rows), None]]
    told = [f"* {text}" for text in told if text]
    seeds = len({row["seed"] for row in rows})
    told.append(f"\n{seeds} {'seed' if seeds == 1 else 'seeds'}; p is exact over those that differ")
    return "\n".join(told)


def sentence(rows: list[dict], what: str, ours: str, theirs: str, levels: tuple) -> str:
    """Two arms on the rules that so many samples show; nothing if there is no pair."""
    pairs = paired(at(rows, ours, levels), at(rows, theirs, levels))
    if not pairs:
        return ""
    found = clustered_difference(pairs)
    k, j, n = (sum(counted[i] for counted in pairs.values()) for i in range(3))
    whom = "inputs that need no rule" if levels == (None,) else f"rules that {shown_by(levels)}"
    both = f"{NAMES[ours]} acts as the teacher on {k} of {n}, {NAMES[theirs]} on {j}"
    return f"{what}: {whom}: {both}: {points(found)}, p = {found['p']:.3f}: {verdict(found)}"


def verdict(found: dict) -> str:
    """In words; found: of clustered_difference."""
    if 2 / 2 ** found["differ"] > 0.05:
        return f"cannot be told by the {found['differ']} seeds that differ"
    apart = found["p"] < 0.05 and (found["low"] > 0 or found["high"] < 0)
    return "told apart" if apart else "not told apart"


def shown_by(levels: tuple) -> str:
    if levels in ((0,), (1,)):
        return "no sample shows" if levels == (0,) else "1 sample shows"
    return f"{' or '.join(map(str, levels))} samples show"


def table(rows: list[dict]) -> str:
    """Every size, level and arm: k of n, of those inputs in which all was right before the rule was
    due, and the difference to SFT alone.
    """
    lines = []
    for samples in sizes_in(rows):
        for level in [*levels_in(rows), None]:
            for arm in arms_in(rows):
                some = at(rows, arm, (level,), samples)
                pairs = paired(some, at(rows, BASE, (level,), samples))
                k, reached = (sum(sum(row[key]) for row in some) for key in ("obeyed", "reached"))
                n = sum(len(row["obeyed"]) for row in some)
                if n:
                    shown = "(inputs that need none)" if level is None else level
                    gap = points(clustered_difference(pairs)) if arm != BASE and pairs else ""
                    counts = f"{k} of {n}", f"{k} of {reached}"
                    lines.append([samples, shown, NAMES[arm], *counts, gap])
    head = ["samples", "of which show the rule", "arm", "obeyed", "of those that got so far"]
    return markdown_table([*head, "against SFT alone"], lines)


def trainings(rows: list[dict]) -> str:
    """Every size and arm: what a training took, and where its losses ended; means of the seeds."""
    lines = []
    for samples in sizes_in(rows):
        for arm in arms_in(rows):
            some = [row for row in rows if (row["samples"], row["arm"]) == (samples, arm)]
            keys = ("steps", "tokens", "sft", "pg")
            steps, tokens, sft, pg = (statistics.mean(row[key] for row in some) for key in keys)
            took = f"{steps:.0f}", f"{tokens:,.0f}", f"{sft:.4f}", f"{pg:.4f}" if pg else ""
            lines.append([samples, NAMES[arm], *took])
    head = ["samples", "arm", "steps", "tokens", "SFT, nats/token", "PG, nats/token"]
    return markdown_table(head, lines)


def arms_in(rows: list[dict]) -> list[str]:
    return [arm for arm in NAMES if any(row["arm"] == arm for row in rows)]


# ---------------------------------------------------------------------------------------- picture


def draw(rows: list[dict], name: str) -> str:
    """A panel a size: the share of inputs on which a rule is obeyed, by the samples that show it,
    an arm a line -> an SVG file.
    """
    arms = arms_in(rows)
    panels = [
        draw_size([row for row in rows if row["samples"] == n], n, arms) for n in sizes_in(rows)
    ]
    legend = {arm: NAMES[arm] for arm in arms}
    return picture.page([panel for panel in panels if panel], name, legend)


def draw_size(rows: list[dict], samples: int, arms: list[str]) -> str:
    """The arms of one size, beside each other at each level, with 95 % intervals."""
    levels = levels_in(rows)
    places = {level: WIDTH * (i + 0.5) / len(levels) for i, level in enumerate(levels)}
    marks = []
    for side, arm in enumerate(arms):
        line = []
        for level in levels:
            row = share(at(rows, arm, (level,)))
            if row["n"]:
                x = places[level] + 5 * (side - (len(arms) - 1) / 2)
                y = [HEIGHT * (1 - s) for s in (row["low"], row["k"] / row["n"], row["high"])]
                marks.append(mark(x, y, arm))
                line.append(f"{x:.1f},{y[1]:.1f}")
        drawn = f'points="{" ".join(line)}" fill="none" stroke="{COLOUR[arm]}"'
        marks.append(f"<polyline {drawn}/>")
    scale = {"100 %": 0, "50 %": HEIGHT / 2, "0 %": HEIGHT}
    titles = f"obeys a rule, {samples} samples", "of which show the rule"
    return panel(titles, {}, scale, places, marks)


def write_report(rows: list[dict], folder: Path, name: str, setting: str) -> None:
    """Print the reading; write it with the tables and the picture into report.md and report.svg."""
    parts = [f"# few samples: {name}", setting, reading(rows), table(rows), trainings(rows)]
    said = "\n\n".join(parts).translate(UNSEEN) + "\n"
    write_text(folder / "report.md", said)
    write_text(folder / "report.svg", draw(rows, f"few samples: {name}").translate(UNSEEN))
    print(f"\n{said}")
