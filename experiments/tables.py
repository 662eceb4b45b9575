"""Tables 1 to 5 of the paper and its grid of lambda: the published figures, and ours beside them.

    python evaluate.py tables                       os.txt on the embedded model, three seeds
    python evaluate.py tables --prompt mine.txt --model FOLDER --samples 500 --out runs/mine-tables

All flags of genpi.py that cells can share are passed on to each of them. The command goes on after
a crash, does no finished cell again, and ends with tables.md and tables.json in --out.

A table has a row a method, as the paper's. Ours are counts of inputs that are right in the sense of
cells.py, over all seeds, with the Wilson interval of 95 %, which is one of inputs, and the count of
each seed. The difference to GenPI is that of the last of our columns, input by input, with its
bootstrap interval and the p of the exact McNemar test.

Left out: LLMLingua-2 and ICAE, which are other architectures; the benchmarks themselves
(benchmarks/). Source: GenPI section 6.
"""

import sys
import time
from pathlib import Path

import runs
from arguments import build_parser
from experiments.cells import (
    CELLS,
    WAYS,
    Cell,
    check_shared,
    do_cell,
    foreseen,
    outcomes,
    plan_cell,
)  # fmt: skip
from experiments.published import GENPI, SYNTHESIS, TABLES, TASKS, Row, noise
from files import markdown_table, write_json, write_text
from flags import WHOLE, Flags
from forecast import duration
from stats import interval, paired_difference, wilson
from synth import FAULTS, quality

# ------------------------------------------------------------------------------------ one table


def asked_ways(cell: str) -> list[str]:
    """In which ways the tables ask a cell, in the order of WAYS."""
    rows = [row for rows in TABLES.values() for row in rows]
    return [way for way in WAYS if any((row.cell, row.way) == (cell, way) for row in rows)]


def pooled(found: list[dict], cell: str, way: str) -> dict[str, list[list[bool]]]:
    """measure -> its outcomes in each seed. found: cell -> outcomes, of each seed."""
    seeds = [cells[cell]["ways"][way] for cells in found]
    return {measure: [seed[measure] for seed in seeds] for measure in seeds[0]}


def count(seeds: list[list[bool]]) -> dict:
    """All seeds together with the Wilson interval, and k of each seed."""
    right = sum(seeds, [])
    return wilson(sum(right), len(right)) | {"seeds": [sum(seed) for seed in seeds]}


def told_row(row: Row, found: list[dict]) -> dict:
    """A row of a table as it is written to tables.json."""
    told = {"name": row.name, "published": row.published, "cell": row.cell, "way": row.way}
    if row.cell is None:
        return told
    ours = pooled(found, row.cell, row.way)
    told["ours"] = {measure: count(seeds) for measure, seeds in ours.items()}
    if (row.cell, row.way) != (GENPI.cell, GENPI.way):
        measure = list(ours)[-1]
        genpi_right = pooled(found, GENPI.cell, GENPI.way)[measure]
        told["against_genpi"] = paired_difference(sum(ours[measure], []), sum(genpi_right, []))
    return told


def markdown(title: str, rows: list[dict]) -> str:
    """A table of the paper as Markdown."""
    measures = list(next(row["ours"] for row in rows if row["cell"]))
    names = [measure.replace("_", " ") for measure in measures]
    head = ["", "paper: OS, browsing, shopping", *(f"ours, {name}" for name in names)]
    head.append(f"{names[-1]}: minus GenPI, in points")
    table = []
    for row in rows:
        published = ", ".join(f"{x:g}" for x in row["published"] or ()) or "not known to us"
        if row["cell"] is None:
            cells = ["not yet"] * (len(measures) + 1)
        else:
            cells = [in_words(row["ours"][measure]) for measure in measures]
            cells.append(difference(row.get("against_genpi")))
        table.append([row["name"], published, *cells])
    return f"### {title}\n\n" + markdown_table(head, table)


def in_words(row: dict) -> str:
    return f"{interval(row)}: {', '.join(map(str, row['seeds']))}"


def difference(found: dict | None) -> str:
    if found is None:
        return ""
    gap, low, high = (f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{gap} ({low} to {high}), p = {found['p']:.2g}"


# ---------------------------------------------------------------------------------------- Table 4


def synthesis(out: Path, seeds: int) -> dict:
    """Table 4 of the records of all seeds, trained on and held out."""
    made = [runs.load_run(out / f"seed{seed}" / "genpi") for seed in range(seeds)]
    records = sum((runs.load_records(run)[0] for run in made), [])
    return quality(records, made[0].task)


def synthesis_markdown(ours: dict) -> str:
    head = ["", "gold turns", "mean turns", *(fault.replace("_", " ") for fault in FAULTS[:3])]
    table = []
    for name, (gold, mean, *shares) in SYNTHESIS.items():
        table.append([name, gold, mean, *(f"{share:g} %" for share in shares)])
    n = ours["records"]
    faults = [interval(wilson(round(ours[fault] * n), n)) for fault in FAULTS[:3]]
    gold = f"{ours['gold_turns']:g}" if ours["gold_turns"] else "not known"
    table.append([f"ours, {n} records", gold, f"{ours['mean_turns']:.2f}", *faults])
    return "### Table 4: the synthesis\n\n" + markdown_table(head, table)


# ---------------------------------------------------------------------------------------- the page


def write_page(out: Path, found: list[dict], args) -> str:
    """Write tables.json and tables.md -> the latter. found: cell -> outcomes, of each seed.

    args: the flags of any cell.
    """
    tables = {title: [told_row(row, found) for row in rows] for title, rows in TABLES.items()}
    seconds = {name: [cells[name]["seconds"] for cells in found] for name in CELLS}
    names = ("model", "samples", "held_out", "epochs", "batch", "lr", "pg_share")
    setting = {name: getattr(args, name) for name in names}
    setting |= {"prompt": args.prompt.name, "seeds": len(found)}
    machines = {cell["machine"] for cells in found for cell in cells.values()}
    setting |= {"flags": found[0][GENPI.cell]["asked"]["flags"], "machines": sorted(machines)}
    whole = {"setting": setting, "tables": tables, "synthesis": synthesis(out, len(found))}
    whole |= {"noise": noise(), "seconds": seconds}
    pages = [markdown(title, rows) for title, rows in tables.items()]
    parts = [heading(setting, seconds), *pages[:3], synthesis_markdown(whole["synthesis"])]
    parts += [*pages[3:], noise_markdown(whole["noise"]), times_markdown(seconds)]
    told = "\n\n".join(parts)
    write_json(out / "tables.json", whole)
    write_text(out / "tables.md", told + "\n")
    return told


def heading(setting: dict, seconds: dict[str, list[dict]]) -> str:
    """What was run on which machine, in how long."""
    total = sum(sum(row.values()) for seeds in seconds.values() for row in seeds)
    told = " and ".join(setting["machines"])
    flags = f"; flags: {' '.join(setting['flags'])}" if setting["flags"] else ""
    return f"""# The paper's tables: {setting["prompt"]} on {setting["model"]}

Seeds: {setting["seeds"]}, each with {setting["samples"]} samples, {setting["epochs"]} epochs, \
{setting["held_out"]} held-out inputs; batches of {setting["batch"]} and a rate of \
{setting["lr"]:g}, but for --full, which has its own; L_PG of {setting["pg_share"]:g} of the \
samples; {duration(total)} in all on {told}{flags}

Behind a colon stand the counts of the seeds. Intervals and p are over inputs, so of these very \
adapters: they do not say what another training by the same method would bring."""


def noise_markdown(rows: list[dict]) -> str:
    def cell(row: dict, n: int) -> str:
        return f"{row['k']} against {row['genpi']} of {n}, p = {row['p']:.2g}"

    head = ["published, against GenPI's", "OS", "browsing"]
    table = [[row["name"], *(cell(row[task], n) for task, n in TASKS.items())] for row in rows]
    told = "### The paper's own differences, by Fisher's exact test"
    return f"{told}\n\n{markdown_table(head, table)}"


def times_markdown(seconds: dict[str, list[dict]]) -> str:
    """What was run, and how long it took: mean seconds over the seeds."""
    parts = ("synth", "train", "judge")
    table = []
    for cell, seeds in seconds.items():
        means = [f"{sum(row[part] for row in seeds) / len(seeds):.0f} s" for part in parts]
        flags = f"`{CELLS[cell]}`" if CELLS[cell] else ""
        table.append([cell, flags, *means])
    head = ["cell", "flags", "synthesis", "training", "judging"]
    return "### What was run: seconds a seed\n\n" + markdown_table(head, table)


# ------------------------------------------------------------------------------------- the command


def command(argv: list[str]) -> None:
    """Make every cell that is missing, then the tables."""
    parser = Flags(
        prog="evaluate.py tables",
        allow_abbrev=False,
        description=__doc__.split("\n")[0],
        epilog="All other flags are genpi.py's, and go to every cell.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/tables"), help="folder of all cells")
    add("--seeds", type=WHOLE, default=3, help="each makes records of its own")
    add("--problems", type=WHOLE, default=102, help="on the imaginary machine, a seed")
    own, rest = parser.parse_known_args(argv[1:])
    said = build_parser().said(rest)
    plan = planned(own.out, own.seeds, own.problems, said)
    make(plan)
    found = [
        {cell.name: outcomes(cell) for cell in plan if cell.seed == n} for n in range(own.seeds)
    ]
    print(write_page(own.out, found, plan[0].args))


def planned(out: Path, seeds: int, problems: int, said: dict) -> list[Cell]:
    """All cells, seed by seed, GenPI's first. said: the flags of genpi.py that all share.

    Raises: ValueError for a flag that they cannot share.
    """
    check_shared(said)
    names = [(seed, name) for seed in range(seeds) for name in CELLS]
    return [plan_cell(out, seed, name, said, asked_ways(name), problems) for seed, name in names]


def make(plan: list[Cell]) -> None:
    """Make what is missing of some cells, and say how long it will take."""
    missing = [cell for cell in plan if outcomes(cell) is None]
    seconds = foreseen(plan[0], missing) if missing else []
    told = f"{len(plan)} cells, {len(missing)} of them to be made: {', '.join(CELLS)} a seed"
    print(f"{told}; about {duration(sum(seconds))}", file=sys.stderr)
    clock = time.perf_counter()
    for i, cell in enumerate(missing, 1):
        do_cell(cell)
        slower = (time.perf_counter() - clock) / sum(seconds[:i])
        left = duration(slower * sum(seconds[i:]))
        told = (
            f"seed{cell.seed}/{cell.name} is done, {len(missing) - i} cells are left: about {left}"
        )
        print(told, file=sys.stderr)
