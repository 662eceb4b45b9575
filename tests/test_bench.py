"""bench.py: figures are measured by a command; what it counts is counted right."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench
import bench_work
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("figure", ["chat", "nucleus", "grows"])
def test_a_figure_is_measured(figure, tmp_path):
    """A worker of its smallest case, on the embedded model's shape, finds a time and a peak."""
    settings = bench.races(figure, cuda=False, config="tiny")[-1]
    settings |= {"device": "cpu", "threads": 1, "dtype": "bfloat16", "new": 2, "times": 1}
    settings["folder"] = str(bench_work.checkpoint_of(settings, tmp_path))
    for who in settings.get("sides", ["ours"]):
        found = bench.measure(settings | {"who": who})
        assert len(found) == 2 and all(value > 0 for value in found.values())


def test_padding_is_counted(monkeypatch):
    """Two records of 30 and 10 tokens in one micro-batch of 60: 1.5 computed for each real one."""

    monkeypatch.setattr(bench_work, "read_records", lambda *_, mend: [row(30), row(10)] * 16)
    monkeypatch.setattr(bench_work, "sft_sequence", lambda chat, r: [0] * r.n)
    monkeypatch.setattr(bench_work, "pg_sequence", lambda chat, p, r: [0] * 20)
    monkeypatch.setattr(bench_work, "sample_order", lambda n, *_: list(range(n)))
    found = bench_work.packing(SimpleNamespace(run=None))
    # in 32 samples, all of L_PG: 16 * (30 + 10) + 32 * 20 real ones, 32 * (30 + 20) computed
    expected = 32 * (30 + 20) / (16 * 40 + 32 * 20)
    assert found["paper_computed_for_a_real_token"] == pytest.approx(expected)


def row(n):
    return SimpleNamespace(n=n, overlong=False, no_reason=False)


def test_an_unknown_figure_is_refused():
    """The command names the figures that it knows."""
    command = [sys.executable, str(ROOT / "tests" / "bench.py"), "speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "grows" in done.stderr and "Traceback" not in done.stderr


def test_results_are_json(tmp_path):
    """--out holds machine, date, type and every value."""
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "bench.py"), "packing", "--rounds", "1"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert {"machine", "torch", "date", "dtype"} < set(found)
    (counted,) = found["packing"]["ours"]
    assert 1 <= counted["paper_computed_for_a_real_token"] < 1.2
