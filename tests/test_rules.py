"""The exam of several runs in one table; gold records, whose rules are known by definition."""

import json
import sys
from pathlib import Path

import pytest

import evaluate
from experiments.rules import together
from prompt import TASKS

ROOT = Path(__file__).resolve().parent.parent
OS = TASKS["os"]


def row(rule, shown, k, n, before=None):
    found = {
        "rule": rule,
        "lines": [1, 1],
        "shown_by": shown,
        "looked_at": 8,
        "obeyed": {"k": k, "n": n},
    }
    if before is not None:
        found |= {"before": {"k": before, "n": n}, "gained": k - before, "lost": 0}
    return found


def write(tmp_path, *exams):
    folders = [tmp_path / str(i) for i in range(len(exams))]
    for folder, rows in zip(folders, exams, strict=True):
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({"exam": rows}))
    return [str(folder) for folder in folders]


def test_runs_add_up(tmp_path, capsys):
    """5 of 6 and 6 of 6 are 11 of 12, before 1 and 0; ten gained and none lost: p = 2 / 2^10."""
    exams = [
        [row("a", 5, 5, 6, 1), row("b", 0, 0, 0, 0)],
        [row("a", 7, 6, 6, 0), row("b", 1, 0, 0, 0)],
    ]
    assert evaluate.main(["rules", *write(tmp_path, *exams)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:3] == ["`a`", "5, 7"]
    assert cells[3].startswith("11 of 12") and cells[4].startswith("1 of 12")
    assert cells[5:7] == ["10, 0", "0.002"]
    assert "| 0, 1 | untested | untested |" in lines[3]


def test_without_an_earlier_adapter_there_is_nothing_gained(tmp_path, capsys):
    """If one run lacks it, none is shown beside it."""
    exams = [[row("a", 5, 5, 6, 1)], [row("a", 7, 6, 6)]]
    assert evaluate.main(["rules", *write(tmp_path, *exams)]) == 0
    assert "earlier" not in capsys.readouterr().out
    assert "gained" not in together(exams)[0]


@pytest.mark.parametrize(
    ("exams", "words"),
    [([[row("a", 0, 0, 1)], [row("b", 0, 0, 1)]], "not the same rules"), ([[]], "no exam")],
)
def test_reports_that_do_not_go_together(tmp_path, capsys, exams, words):
    """One line names what is missing."""
    assert evaluate.main(["rules", *write(tmp_path, *exams)]) == 2
    assert words in capsys.readouterr().err


def test_a_word_that_is_no_command(capsys):
    """The commands that there are, are named."""
    assert evaluate.main(["rule"]) == 2
    said = capsys.readouterr().err
    assert "rule: no such command" in said and "few-samples" in said


# ------------------------------------------------------------------------------------ gold records


@pytest.fixture(scope="module")
def gold():
    """The module tiny/gold.py, whose neighbours have names of their own."""
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "tiny"))
    try:
        import gold

        yield gold
    finally:
        sys.path[:] = path
        for name in ("gold", "world", "rules", "corpus"):
            sys.modules.pop(name, None)


def test_gold_records_show_what_they_say(gold):
    """Enough of each rule, and of none; no wish twice; the turns take the actions of `obey`, and
    what an error asks for is the last turn.
    """
    pool = gold.gold(2, 3, 1, seed=0)
    for held_out, n, plain in ((False, 2, 3), (True, 1, 1)):
        some = [e for e in pool if e.held_out == held_out]
        assert all(sum(rule.line in e.shows for e in some) >= n for rule in gold.OS_RULES)
        assert sum(not e.shows for e in some) >= plain
    assert len({e.record.pseudo_input for e in pool}) == len(pool)
    assert all(OS.act(turn) for e in pool for turn in e.record.turns[::2])
    assert all(OS.is_final(e.record.turns[-1]) for e in pool)
    (error,) = [rule for rule in gold.OS_RULES if rule.family == "end"]
    for e in pool:
        if error.line in e.shows:
            assert e.record.turns[-1].endswith(f"answer({error.value})")
            assert 2 * e.shows[error.line] + 1 == len(e.record.turns)


def test_a_rule_is_absent_once_its_line_is_gone(gold):
    """os.txt without a line lacks its value; nor does its worked example obey it any more."""
    from corpus import os_prompt

    for rule in gold.OS_RULES:
        assert rule.value in os_prompt().text
        assert rule.value not in os_prompt(rule).text


def test_a_rule_is_needed_where_the_actions_part(gold):
    """The check after a change is the second turn of a problem of one command."""
    after = next(rule for rule in gold.OS_RULES if rule.family == "after")
    pool = [e for e in gold.gold(3, 0, 0, seed=1) if after.line in e.shows]
    assert pool
    for e in pool:
        need = e.shows[after.line]
        checks = [f"{after.value} /" in turn for turn in e.record.turns[::2]]
        assert checks.index(True) == need
