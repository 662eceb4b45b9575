"""The report as a picture, report.svg: losses by step, agreement by turn, rules, recall of p.

A panel draws from (0, 0), top left, to (WIDTH, HEIGHT). Left out: any other kind of plot.
"""

import html
import math

WIDTH = 220  # of a plot, in pixels
HEIGHT = 140
GREY = "#57606a"
COLOUR = {"base": "#8c959f", "adapter": "#bc4c00", "sft": "#bc4c00", "pg": "#0969da"}
COLOUR |= {"full": "#0969da", "half": "#8250df"}  # of p (experiments/figures.py)
COLOUR |= {"genpi": "#0969da", "sft-tokens": "#d4a72c", "unrelated": "#8c959f"}  # other objectives
COLOUR |= {"prompt": "#1a7f37", "reason": "#8250df"}


def draw(report: dict, metrics: list[dict], name: str) -> str:
    """Draw the panels for which there is data -> an SVG file. metrics: rows of metrics.jsonl."""
    lines = losses(metrics, report.get("objective", "genpi"))
    panels = [p for p in (lines, agreement(report), exam(report), recall(report)) if p]
    return page(panels, name)


def page(panels: list[str], name: str, legend: dict | None = None, rows: int = 1) -> str:
    """Panels in so many rows, under a name and a legend {colour: text} of all -> an SVG file."""
    a_row = max(1, len(panels) // rows)
    width = 330 * a_row + 10
    names = (width - 60) // 140  # of the legend, in a line
    said = [
        words(60 + 140 * (i % names), 50 + 14 * (i // names), text, COLOUR[who])
        for i, (who, text) in enumerate((legend or {}).items())
    ]
    top = 90 + 14 * -(-len(said) // names)
    groups = [
        f'<g transform="translate({60 + 330 * (i % a_row)},{top + 240 * (i // a_row)})">{p}</g>'
        for i, p in enumerate(panels)
    ]
    size = f'width="{width}" height="{top - 60 + 240 * rows}" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    paper = '<rect width="100%" height="100%" fill="white"/>'  # on a dark page, too
    return "\n".join([head, paper, words(60, 30, name, "#1f2328"), *said, *groups, "</svg>\n"])


def losses(metrics: list[dict], objective: str) -> str:
    """Draw the losses, from 10 to 0.001 in every run; one that is always 0 was not trained."""
    steps = {row["step"]: WIDTH * i / max(1, len(metrics) - 1) for i, row in enumerate(metrics)}
    ends = {step: x for step, x in steps.items() if step in (min(steps), max(steps))}
    names = {key: key.upper() for key in ("sft", "pg") if any(row[key] for row in metrics)}
    if "kld" in objective:  # whose cost stands in the place of L_SFT
        names["sft"] = objective.upper()
    marks = []
    for key in names:
        logs = [math.log10(min(10, max(row[key], 1e-3))) for row in metrics]
        y = [HEIGHT * (1 - log) / 4 for log in logs]
        points = " ".join(f"{x:.1f},{at:.1f}" for x, at in zip(steps.values(), y, strict=True))
        marks.append(f'<polyline points="{points}" fill="none" stroke="{COLOUR[key]}"/>')
        marks.append(mark(ends[max(ends)], [y[-1]] * 3, key))
    decades = {label: HEIGHT * i / 4 for i, label in enumerate((10, 1, 0.1, 0.01, 0.001))}
    return panel(("loss, nats/token", "optimiser step"), names, decades, ends, marks)


def agreement(report: dict) -> str:
    """Draw on how many turns base and adapter act like the teacher, with 95 % intervals."""
    turns = report.get("agreement_by_turn", {})
    places = {turn: WIDTH * (i + 0.5) / len(turns) for i, turn in enumerate(turns)}
    marks = []
    for side, who in ((-14, "base"), (6, "adapter")):
        for turn, row in ((turn, rows[who]) for turn, rows in turns.items() if rows[who]["n"]):
            shares = row["low"], row["k"] / row["n"], row["high"]
            y = [HEIGHT * (1 - share) for share in shares]
            marks.append(mark(places[turn] + side, y, who, f"{row['k']}/{row['n']}"))
    names = {"base": "base", "adapter": "adapter"}
    scale = {"100 %": 0, "50 %": HEIGHT / 2, "0 %": HEIGHT}
    return panel(("acts like the teacher, 95 % interval", "turn"), names, scale, places, marks)


def exam(report: dict) -> str:
    """Draw on how many held-out turns that need a rule the adapter acts right, rule by rule."""
    rules = [row for row in report.get("exam", []) if row["lines"]]  # not what an edit changed
    rows = [row for row in rules if row["obeyed"]["n"]]
    marks = []
    places = {}
    for i, row in enumerate(rows):
        obeyed = row["obeyed"]
        x = places[row["lines"][0]] = WIDTH * (i + 0.5) / len(rows)
        y = [
            HEIGHT * (1 - share)
            for share in (obeyed["low"], obeyed["k"] / obeyed["n"], obeyed["high"])
        ]
        marks.append(mark(x, y, "adapter", f"{obeyed['k']}/{obeyed['n']}"))
    names = {"adapter": f"{len(rows)} of {len(rules)} rules tested"}
    scale = {"100 %": 0, "50 %": HEIGHT / 2, "0 %": HEIGHT}
    return panel(("obeys a rule, 95 % interval", "rule at line"), names, scale, places, marks)


def recall(report: dict) -> str:
    """Draw what each line of p costs the adapter; the dearest is quoted."""
    rows = [row for row in (report.get("recall") or {}).get("lines", []) if "line" in row]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: row["nll"])
    last = max(row["line"] for row in rows)
    marks = []
    for row in sorted(rows, key=lambda row: row["line"]):
        y = HEIGHT * (1 - row["nll"] / (worst["nll"] or 1))
        marks.append(mark(WIDTH * row["line"] / last, [HEIGHT, y, y], "adapter"))
    names = {"adapter": f"line {worst['line']}: {worst['text'].strip()[:36]}"}
    ends = {1: WIDTH / last, last: WIDTH}
    scale = {f"{worst['nll']:.2g}": 0, "0": HEIGHT}
    return panel(("writes p, nats/token", "line of p"), names, scale, ends, marks)


def mark(x: float, y: list[float], who: str, label: str = "") -> str:
    """A vertical line from y[0] to y[2] with a dot at y[1], and the label beside the dot."""
    low, at, high = y
    bar = f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{COLOUR[who]}"/>'
    dot = f'<circle cx="{x:.1f}" cy="{at:.1f}" r="2" fill="{COLOUR[who]}"/>'
    if who == "base":  # what stands right of it is the adapter's
        return bar + dot + words(x - 6, at + 4, label, COLOUR[who], anchor="end")
    return bar + dot + words(x + 6, at + 4, label, COLOUR[who])


def panel(titles: tuple, names: dict, y_ticks: dict, x_ticks: dict, marks: list[str]) -> str:
    """The marks between titles, names {colour: text} and ticks {label: pixel}; "" without marks."""
    said = [words(0, -34, titles[0]), words(WIDTH / 2, HEIGHT + 36, titles[1], anchor="middle")]
    said += [words(50 * i, -16, names[who], COLOUR[who]) for i, who in enumerate(names)]
    said += [words(-10, y + 4, label, anchor="end") for label, y in y_ticks.items()]
    said += [words(x, HEIGHT + 18, label, anchor="middle") for label, x in x_ticks.items()]
    return "\n".join(said + marks) if marks else ""


def words(x: float, y: float, text: object, colour: str = GREY, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"'
    shown = "".join(c if c.isprintable() else "\ufffd" for c in str(text))  # XML lacks some
    return f"<text {place}>{html.escape(shown)}</text>"
