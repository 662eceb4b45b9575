"""The whole command on the embedded model, with a handful of samples: it ends, it can be killed, it
goes on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--samples 8 --held-out 4 --epochs 2 --batch 4 --max-turns 3 --save-every 1".split()


def command(out, *extra):
    return [sys.executable, "genpi.py", *FLAGS, "--out", str(out), *extra]


def run(out, *extra):
    done = subprocess.run(
        command(out, *extra), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nobody disturbed: (folder, what it printed)."""
    out = tmp_path_factory.mktemp("run") / "os"
    return out, run(out)


def test_the_command_reports(finished):
    """One command leaves data, adapter and a report with every promised key, and prints it."""
    out, printed = finished
    report = json.loads((out / "report.json").read_text())
    promised = """model prompt_tokens trainable_params total_params held_out nll gap_closed
        agreement recall break_even seconds""".split()
    assert set(promised) <= set(report)
    assert set(report["nll"]) == {"base", "teacher", "adapter"}
    assert report["nll"]["teacher"] < report["nll"]["base"]  # the prompt helps
    assert report["agreement"]["teacher"]["k"] == report["agreement"]["teacher"]["n"] == 4
    assert sum(row["nll"] for row in report["recall"]["lines"]) > 0
    assert (out / "report.md").read_text().strip() in printed


def test_records_are_complete_and_distinct(finished):
    """data.jsonl has a line for each of the 12 pseudo inputs, with a conversation, yS and r."""
    rows = [json.loads(line) for line in (finished[0] / "data.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(12))
    assert len({row["pseudo_input"] for row in rows}) == 12
    assert all(row["turns"] and row["student"] and row["reason"] for row in rows)
    assert all(len(row["turns"]) % 2 == 1 for row in rows)  # an environment turn is never the last


def test_a_finished_run_is_not_done_again(finished):
    """The same command on a finished run trains nothing and leaves the adapter's bytes alone."""
    out, _ = finished
    before, stamp = adapter(out), (out / "adapter_model.safetensors").stat().st_mtime_ns
    run(out)
    assert adapter(out) == before
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def half_trained(out):
    return (out / "metrics.jsonl").exists() and (out / "checkpoint/state.safetensors").exists()


STAGES = {
    "pseudo inputs": lambda out: (out / "args.json").exists(),
    "role-play": lambda out: (out / "inputs.json").exists(),
    "reasons": lambda out: (out / "data.jsonl").exists(),
    "training": half_trained,
    "evaluation": lambda out: (out / "adapter_config.json").exists(),
}


def test_killed_in_every_stage_it_ends_with_the_same_bits(finished, tmp_path):
    """kill -9 in each stage of one run, the same command again each time: the adapter is the same,
    byte by byte.
    """
    out = tmp_path / "os"
    for stage, reached in STAGES.items():
        process = subprocess.Popen(
            command(out),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not reached(out):
            assert process.poll() is None, f"ended before the stage {stage}"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(out)
    assert adapter(out) == adapter(finished[0])


def test_interrupt_ends_in_one_line(tmp_path):
    """Ctrl-C during the synthesis: exit code 130, one line on how to go on, no traceback."""
    out = tmp_path / "os"
    process = subprocess.Popen(
        command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (out / "inputs.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command goes on from here" in errors
    assert "Traceback" not in errors


def test_interrupt_while_a_progress_bar_is_built(tmp_path):
    """Such a bar lacks what its __del__ reads; still one line, and no traceback of Python's own."""
    program = """
import sys, tqdm.std
def interrupted(*_): raise KeyboardInterrupt
tqdm.std.tqdm._get_free_pos = interrupted
import genpi
sys.exit(genpi.main(sys.argv[1:]))
"""
    argv = [sys.executable, "-c", program, *FLAGS, "--out", str(tmp_path / "os")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "interrupted; the same command goes on from here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plain_prompt_of_another_kind_runs_through(tmp_path):
    """A prompt without markers and with no task is taken as a system message; the stand-in says
    that it is one.
    """
    prompt = tmp_path / "recipes.txt"
    prompt.write_text(
        "You are a cook. Answer every question with a recipe of five steps, and nothing else.\n"
    )
    printed = run(tmp_path / "out", "--prompt", str(prompt))
    assert "stand-in" in printed
    assert (tmp_path / "out" / "report.json").exists()
