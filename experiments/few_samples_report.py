"""What the cells of few_samples.py say: a reading in sentences, a table, a picture.

Two arms are compared on the same inputs after trainings on the same samples. The interval is over
seeds and rules, p over seeds (stats.clustered_difference). A null result is a result.
"""

from collections import defaultdict
from pathlib import Path

import picture
from files import UNSEEN, write_text
from picture import COLOUR, HEIGHT, WIDTH, mark, panel
from stats import clustered_difference, interval, wilson

NAMES = {
    "genpi": "GenPI", "sft": "SFT alone", "sft-tokens": "SFT, as many tokens",
    "unrelated": "PG, unrelated prompt", "prompt": "PG, prompt alone", "reason": "PG, reason alone",
}  # fmt: skip
BASE = "sft"  # what the other arms are compared with

Pairs = dict[tuple, tuple[int, int, int]]


def levels_in(rows: list[dict]) -> list[int]:
    """How many samples showed a rule, of all rows about one."""
    return sorted({row["shown"] for row in rows if row["rule"]})


def at(rows: list[dict], arm: str, level: int | None, samples: int | None = None) -> list[dict]:
    """The rows of an arm about rules that so many samples showed. level None: of inputs that need
    no rule; samples None: of all sizes.
    """
    return [
        row
        for row in rows
        if row["arm"] == arm
        and (not row["rule"] if level is None else row["rule"] and row["shown"] == level)
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
    """k of n inputs on which a rule is obeyed."""
    return wilson(sum(sum(row["obeyed"]) for row in rows), sum(len(row["obeyed"]) for row in rows))


def gap(pairs: Pairs) -> str:
    """A paired difference in words."""
    found = clustered_difference(pairs)
    difference, low, high = (f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{difference} points (95 %: {low} to {high}), p = {found['p']:.3f}"


# ---------------------------------------------------------------------------------------- reading


def reading(rows: list[dict]) -> str:
    """A sentence a level: GenPI against SFT alone, over all sizes."""
    told = []
    for level in [*levels_in(rows), None]:
        ours, theirs = (at(rows, arm, level) for arm in ("genpi", BASE))
        pairs = paired(ours, theirs)
        if not pairs:
            continue
        p = clustered_difference(pairs)["p"]
        k, j, n = (sum(counted[i] for counted in pairs.values()) for i in range(3))
        whom = "inputs that need no rule" if level is None else f"rules that {shown_by(level)}"
        said = "told apart" if p < 0.05 else "not told apart"
        told.append(
            f"* {whom}: GenPI acts as the teacher on {k} of {n}, SFT alone on {j}: "
            f"{gap(pairs)}: {said}"
        )
    seeds = len({row["seed"] for row in rows})
    told.append(
        f"\n{seeds} {'seed' if seeds == 1 else 'seeds'}; p is exact over seeds and cannot be below "
        f"{min(1, 2 / 2**seeds):.3f} with so many"
    )
    return "\n".join(told)


def shown_by(level: int) -> str:
    if level == 0:
        return "no sample shows"
    return "1 sample shows" if level == 1 else f"{level} samples show"


def table(rows: list[dict]) -> str:
    """Every size, level and arm: k of n, and the difference to SFT alone."""
    lines = ["| samples | of which show the rule | arm | obeyed | against SFT alone |"]
    lines.append("|---|---|---|---|---|")
    arms = [arm for arm in NAMES if any(row["arm"] == arm for row in rows)]
    for samples in sorted({row["samples"] for row in rows}):
        for level in [*levels_in(rows), None]:
            for arm in arms:
                some = at(rows, arm, level, samples)
                pairs = paired(some, at(rows, BASE, level, samples)) if arm != BASE else {}
                if share(some)["n"]:
                    shown = "(inputs that need none)" if level is None else level
                    cells = samples, shown, NAMES[arm], interval(share(some))
                    lines.append(
                        f"| {' | '.join(map(str, cells))} | {gap(pairs) if pairs else ''} |"
                    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- picture


def draw(rows: list[dict], name: str) -> str:
    """A panel a size: the share of inputs on which a rule is obeyed, by the samples that show it,
    an arm a line -> an SVG file.
    """
    sizes = sorted({row["samples"] for row in rows})
    arms = [arm for arm in NAMES if any(row["arm"] == arm for row in rows)]
    panels = [draw_size([row for row in rows if row["samples"] == n], n, arms) for n in sizes]
    legend = {arm: NAMES[arm] for arm in arms}
    return picture.page([panel for panel in panels if panel], name, legend)


def draw_size(rows: list[dict], samples: int, arms: list[str]) -> str:
    """The arms of one size, beside each other at each level, with 95 % intervals."""
    levels = levels_in(rows)
    places = {level: WIDTH * (i + 0.5) / len(levels) for i, level in enumerate(levels)}
    marks = []
    for side, arm in enumerate(arms):
        points = []
        for level in levels:
            row = share(at(rows, arm, level))
            if row["n"]:
                x = places[level] + 5 * (side - (len(arms) - 1) / 2)
                y = [HEIGHT * (1 - s) for s in (row["low"], row["k"] / row["n"], row["high"])]
                marks.append(mark(x, y, arm))
                points.append(f"{x:.1f},{y[1]:.1f}")
        line = f'points="{" ".join(points)}" fill="none" stroke="{COLOUR[arm]}"'
        marks.append(f"<polyline {line}/>")
    scale = {"100 %": 0, "50 %": HEIGHT / 2, "0 %": HEIGHT}
    titles = f"obeys a rule, {samples} samples", "of which show the rule"
    return panel(titles, {}, scale, places, marks)


def write_report(rows: list[dict], folder: Path, name: str) -> None:
    """Print the reading; write it with the table and the picture into report.md and report.svg."""
    said = f"# few samples: {name}\n\n{reading(rows)}\n\n{table(rows)}\n".translate(UNSEEN)
    write_text(folder / "report.md", said)
    write_text(folder / "report.svg", draw(rows, f"few samples: {name}").translate(UNSEEN))
    print(f"\n{said}")
