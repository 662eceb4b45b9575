"""The exam of several runs in one table: which rules were lost, which won back, over seeds.

    python evaluate.py rules runs/covered-0 runs/covered-1 runs/covered-2

The runs are of the same prompt and have their reports. Where each of them was examined beside an
earlier adapter (--from, or evaluate.py --before), what was gained and lost since is added up, with
the sign test over these turns: of one training, many turns, so p says whether these adapters
differ, not whether the next training would.

Left out: runs of different prompts.
"""

from pathlib import Path

from exam import short
from files import markdown_table, read_json
from flags import Flags
from stats import interval, sign_test, wilson


def exam_rows(folder: Path) -> list[dict]:
    """The exam of a run's report. Raises: ValueError if it has none."""
    cure = f"make it with evaluate.py --run {folder}"
    rows = read_json(folder / "report.json", cure).get("exam")
    if not rows:
        raise ValueError(f"{folder / 'report.json'} has no exam; {cure}")
    return rows


def together(exams: list[list[dict]]) -> list[dict]:
    """A row a rule: k and n, gained and lost of all runs added up, and how many samples of each run
    show the rule. Raises: ValueError if the rules differ.
    """
    if any([row["rule"] for row in rows] != [row["rule"] for row in exams[0]] for rows in exams):
        raise ValueError("the runs have not the same rules; give runs of one prompt")
    found = []
    for rows in zip(*exams, strict=True):
        row = {"rule": rows[0]["rule"], "shown_by": [each["shown_by"] for each in rows]}
        for name in ("obeyed", "before"):
            if all(name in each for each in rows):
                row[name] = wilson(*(sum(each[name][part] for each in rows) for part in "kn"))
        if "before" in row:
            row |= {part: sum(each[part] for each in rows) for part in ("gained", "lost")}
        found.append(row)
    return found


def markdown(rows: list[dict]) -> str:
    both = all("before" in row for row in rows)
    heads = ["rule of the prompt", "shown by samples", "obeyed without the prompt"]
    heads += ["by the earlier adapters", "gained, lost", "p"] * both
    table = []
    for row in rows:
        table.append([short(row["rule"]), ", ".join(map(str, row["shown_by"]))])
        tested = row["obeyed"]["n"] > 0
        table[-1].append(interval(row["obeyed"]) if tested else "untested")
        if both:
            table[-1].append(interval(row["before"]) if tested else "untested")
            gained, lost = row["gained"], row["lost"]
            p = f"{sign_test(gained, lost):.3f}" if gained + lost else ""
            table[-1] += [f"{gained}, {lost}" if tested else "", p]
    return markdown_table(heads, table)


def command(argv: list[str]) -> None:
    """evaluate.py rules RUN [RUN ...]"""
    parser = Flags(prog="evaluate.py rules", description="The exam of several runs in one table.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs of one prompt")
    args = parser.parse_args(argv[1:])
    print(markdown(together([exam_rows(folder) for folder in args.runs])))
