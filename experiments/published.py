"""What the paper reports: Tables 1 to 5 and the grid of lambda, row by row.

Of LLaMA-3-8B-Instruct: the success rate on 144 OS tasks and the step success on 100 steps of web
browsing, in %, and the mean reward (times 100) of 200 goals of web shopping. Each row names the
cell that shows ours (cells.py), and in which way it is asked.

Tables 4 and 5 are numbered as in the paper; which of its ablations stand in 1, 2 or 3 is by what
they have in common. A figure that is not known to us is None. Source: GenPI section 6.
"""

from dataclasses import dataclass

from stats import fisher

TASKS = {"OS": 144, "browsing": 100}  # whose figures are shares of so many


@dataclass(frozen=True)
class Row:
    """A method: its name, what was published of it, and which cell shows it, asked in which way."""

    name: str
    published: tuple[float, float, float] | None = None  # OS, browsing, shopping
    cell: str | None = None  # None: not yet
    way: str = "adapter"


GENPI = Row("GenPI", (17.36, 14, 44.46), "genpi")
TEACHER = Row("the model with the prompt", (17.36, 17, 54.16), "genpi", "teacher")
TABLES = {
    "Table 1: GenPI beside other ways to do without the prompt": [
        TEACHER,
        Row("LLMLingua-2, rate 0.9", (4.16, 9, 50.78)),
        Row("LLMLingua-2, rate 0.7", (3.47, 1, 43.69)),
        Row("LLMLingua-2, rate 0.3", (0, 0, 0)),
        Row("ICAE (Mistral-7B; with the prompt 10.41, 13, 11)", (4.16, 0, 1.14)),
        Row("KLD, all weights", (0, 0, 0), "full-kld"),
        Row("SeqKD, all weights", (3.47, 15, 38.79), "full-seqkd"),
        Row("SeqKD + KLD, all weights", (4.86, 15, 40.26), "full-seqkd+kld"),
        GENPI,
    ],
    "Table 2: what the joint loss is made of": [
        GENPI,
        Row("SFT alone", (15.97, 12, 35.64), "sft"),
        Row("PG without the reason", (14.58, 14, 38.41), "prompt"),
        Row("PG without the prompt", (13.19, 13, 32.34), "reason"),
        Row("PG alone", (0, 0, 0), "pg"),
    ],
    "Table 3: other ways to learn the prompt": [
        GENPI,
        Row("P(r given p, x, y)", (14.58, 14, 36.26), "reason-given-prompt"),
        Row("P(p given x, y, r)", (15.27, 13, 35.51), "prompt-given-reason"),
        Row("p always prepended in training", (0, 0, 0), "prepend"),
        Row("p prepended half of the time", (13.19, 12, 31.09), "prepend-half"),
    ],
    "Table 5: what the prompt is worth": [
        TEACHER,
        Row("the model without it", None, "genpi", "plain"),
        Row("fine-tuned with p in its context, asked with p", None, "prepend", "prompted"),
        GENPI,
    ],
    "The grid of lambda": [
        Row("lambda 0.3", None, "lam-0.3"),
        Row("lambda 0.5", None, "lam-0.5"),
        Row("lambda 0.7 (GenPI)", (17.36, 14, 44.46), "genpi"),
    ],
}
SYNTHESIS = {  # Table 4: gold and mean turns; % that hit the limit, lack end token, final action
    "OS interaction (paper)": (3, 2.71, 1.8, 0, 5.2),
    "web browsing (paper)": (1, 1.03, 1.6, 0, 3.9),
    "web shopping (paper)": (4, 3.21, 1.7, 0, 0),
}


def noise() -> list[dict]:
    """The published shares as counts, each against GenPI's: which difference could be chance?

    Fisher's exact test, for it was not published which tasks were solved. A paired test of the same
    counts could tell more apart, or less.
    """
    rows = []
    for row in dict.fromkeys(row for rows in TABLES.values() for row in rows):
        if row.published is None or row.cell == GENPI.cell or "ICAE" in row.name:
            continue  # ICAE has another base model
        told = {"name": row.name}
        for i, (task, n) in enumerate(TASKS.items()):
            k, of_genpi = (
                round(share * n / 100) for share in (row.published[i], GENPI.published[i])
            )
            told[task] = {"k": k, "genpi": of_genpi, "n": n, "p": fisher(k, n, of_genpi, n)}
        rows.append(told)
    return rows
