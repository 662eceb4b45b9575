"""The arithmetic of --dry-run, by hand, and that it writes nothing."""

import re
from dataclasses import replace

import pytest

import genpi
from forecast import duration, forecast
from train import Recipe

LENGTHS = {"model": 100, "generator": 50, "sft": 200, "pg": 800}
RATES = {"model": 10, "generator": 5, "training": 40}
RECIPE = Recipe(epochs=10, batch=32)


def test_time_is_tokens_over_rate():
    """1,100 records of 100 tokens at 10 tokens/s take 11,000 s; 10 epochs of 1,000 pairs of 1,000
    tokens at 40 tokens/s take 250,000 s, in 313 steps of 32.
    """
    found = forecast(LENGTHS, RATES, (1000, 100), RECIPE)
    assert found["tokens"] == {"model": 110_000, "generator": 55_000, "training": 10_000_000}
    assert found["seconds"] == {"model": 11_000, "generator": 11_000, "training": 250_000}
    assert (found["steps"], found["records"]) == (313, 1100)


@pytest.mark.parametrize(
    ("change", "tokens"),
    [({"lam": 1}, 200), ({"lam": 0}, 800), ({"pg_share": 0.25}, 400), ({"epochs": 5}, 500)],
)
def test_only_what_is_computed_counts(change, tokens):
    """SFT alone, PG alone, a quarter of PG, half the epochs: so many tokens a sample and epoch."""
    found = forecast(LENGTHS, RATES, (1000, 100), replace(RECIPE, **change))
    assert found["tokens"]["training"] == tokens * 1000 * 10


def test_a_server_is_not_timed():
    """The tokens of a server's part are told, its time is not."""
    found = forecast(LENGTHS, RATES | {"generator": None}, (1000, 100), RECIPE)
    assert found["tokens"]["generator"] == 55_000 and "generator" not in found["seconds"]


def test_minutes_become_hours():
    """Up to an hour and a half in minutes."""
    assert [duration(90), duration(5400)] == ["1.5 minutes", "1.5 hours"]


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    """The embedded model is timed; the run folder is not made, and the page has all three rows."""
    monkeypatch.chdir(tmp_path)
    assert genpi.main(["--dry-run", "--slots", "4"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "242 records, 96 steps of 8 samples" in printed
    rows = re.findall(r"^\| (\w[^|]*) \| ([\d,]+) \| ([\d,]+) \|", printed, re.MULTILINE)
    assert len(rows) == 3 and all(int(n.replace(",", "")) > 0 for row in rows for n in row[1:])
