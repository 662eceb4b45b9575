"""A record is shown as it is trained: every token of both sequences, and the mask it has there."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import genpi
import runs
import show
import synth
from chat import Chat
from checkpoint import fingerprint
from files import write_json, write_rows
from loss import IGNORE
from prompt import parse_prompt
from runs import Record

TINY = Path(genpi.__file__).parent / "tiny"
TURNS = ["Act: ls ü", "a\nb", "Act: answer(2)"]
RECORD = Record(0, "How many?", TURNS, student="Try ls.", reason="It acts.")
FITTING = Record(1, "x", ["y"], student="s", reason="r")
PROMPT = "Write one action.\n\nEnd with answer.\n"


@pytest.fixture(scope="module")
def chat():
    return Chat(TINY, 2048)


@pytest.fixture
def folder(tmp_path):
    """A run on the embedded model with three records, of which the last is held out."""
    records = [RECORD, FITTING, Record(2, "z", ["w"], student="s", reason="r")]
    return make_run(tmp_path / "run", records)


def make_run(out, records):
    args = genpi.parse_flags(["--samples", "2", "--held-out", "1", "--out", str(out)])
    args.max_new_tokens = 128
    prompt = parse_prompt(PROMPT)
    known = {"model_sha256": fingerprint(TINY), "prompt_sha256": runs.text_hash(prompt.text)}
    with runs.open_run(args, prompt, known):
        pass
    state = {"rounds": 1, "fruitless": 0, "seconds": 0.0}
    write_json(out / "inputs.json", state | {"inputs": [r.pseudo_input for r in records]})
    write_rows(out / "data.jsonl", [asdict(record) for record in records])
    return out


def call(capsys, *flags):
    code = genpi.main([str(flag) for flag in flags])
    return code, *capsys.readouterr()


def parts_in_marks(text):
    return [part.partition("⟧")[0] for part in text.split("⟦")[1:]]


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_marked_is_what_carries_loss(folder, chat, cut):
    """For both sequences the texts with loss, encoded again, are the labels of the training, and
    all texts together are the whole sequence.
    """
    record = Record(**asdict(RECORD) | {"cut_turn": cut, "cut_reason": cut})
    for _, sequence in show.sequences(runs.load_run(folder), chat, record):
        spans = list(show.spans(chat, sequence))
        whole = chat.tokenizer.decode(sequence.ids, skip_special_tokens=False)
        assert "".join(text for text, _ in spans) == whole
        labels = [label for label in sequence.labels if label != IGNORE]
        marked = "".join(text for text, has_loss in spans if has_loss)
        pieces = chat.split(marked, 0)
        again = [[p] if isinstance(p, int) else chat.tokens(p) for p, _ in pieces]
        assert sum(again, []) == labels


def test_the_page_of_a_record(folder, capsys):
    """Where there is no terminal: the parts by their names, and marks around the targets."""
    code, page, _ = call(capsys, "--show", folder)
    assert code == 0
    parts, sft, pg = page.partition("SFT (Eq")[0], *page.split("tokens, ")[1:]
    names = ["pseudo input x", "agent yT_0", "environment env_1", "agent yT_1"]
    names += ["student output yS", "reason r"]
    assert [line for line in parts.splitlines() if line in names] == names
    assert "faults" not in parts and "run, record 0: trained on" in parts
    assert parts_in_marks(sft) == [f"{TURNS[0]}<|eot_id|>", f"{TURNS[2]}<|eot_id|>"]
    assert parts_in_marks(pg) == [f"{PROMPT.strip()}\n\nReason: It acts.<|eot_id|>"]
    assert "Eq. 2, weight 0.7" in page and "Eq. 3, weight 0.3" in page


def test_numbers_of_tokens(folder, chat, capsys):
    """The head line of a sequence counts its tokens and its targets."""
    page = call(capsys, "--show", folder)[1]
    for _, sequence in show.sequences(runs.load_run(folder), chat, RECORD):
        assert f"{len(sequence.ids)} tokens, {sequence.n_targets} with loss" in page


def test_a_cut_turn_is_not_taught_to_end(tmp_path, capsys):
    """The fault is named, and the end of turn stands outside the marks."""
    cut = Record(**asdict(RECORD) | {"cut_turn": True})
    page = call(capsys, "--show", make_run(tmp_path / "cut", [cut, FITTING]))[1]
    assert "faults\n    cut_turn\n" in page
    assert "⟦Act: answer(2)⟧<|eot_id|>" in page


def test_on_a_terminal_in_colour(folder, capsys, monkeypatch):
    """On a terminal bold and dim take the place of the marks, unless NO_COLOR is set."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(show.sys, "stdout", TerminalLike(sys.stdout))
    page = call(capsys, "--show", folder)[1]
    assert "\033[1;32mAct: answer(2)<|eot_id|>\033[0m" in page and "⟦" not in page
    monkeypatch.setenv("NO_COLOR", "1")
    page = call(capsys, "--show", folder)[1]
    assert "⟦Act: answer(2)<|eot_id|>⟧" in page and "\033" not in page


class TerminalLike:
    """A stream that says it is a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return True


def test_a_text_cannot_steer_the_terminal(tmp_path, capsys):
    """An escape code in a record is shown as its name."""
    record = Record(0, "clear \033[2J", ["y"], student="s", reason="r")
    page = call(capsys, "--show", make_run(tmp_path / "run", [record, FITTING]))[1]
    assert "\033" not in page and page.count("clear \\x1b[2J") == 3


OVERLONG = Record(0, "long", [], overlong=True)
UNEXPLAINED = Record(1, "x", ["y"], student="s", no_reason=True)
TOO_LONG = Record(2, "x" * 9999, ["y"], student="s", reason="r")


def test_the_first_that_is_trained_on(tmp_path, capsys):
    """By default records that the training leaves out are passed over; by number each is shown,
    with what becomes of it.
    """
    records = [OVERLONG, UNEXPLAINED, TOO_LONG, Record(3, "good", ["y"], "s", "r"), FITTING]
    records = [Record(**asdict(r) | {"index": i}) for i, r in enumerate(records)]
    out = make_run(tmp_path / "run", records)
    args = json.loads((out / "args.json").read_text()) | {"samples": 4}
    (out / "args.json").write_text(json.dumps(args))
    assert "record 3: trained on" in call(capsys, "--show", out)[1]
    for number, told in enumerate(["left out", "left out", "do not fit the context", "trained on"]):
        assert told in call(capsys, "--show", out, "--record", number)[1].splitlines()[0]
    assert "held out" in call(capsys, "--show", out, "--record", 4)[1].splitlines()[0]


def test_no_such_record(folder, capsys):
    """One line names the numbers that there are."""
    code, page, told = call(capsys, "--show", folder, "--record", 9)
    assert (code, page) == (2, "")
    assert told == f"error: {folder}: no record 9; choose one of 0 to 2\n"


def test_record_alone(capsys):
    """--record without --show is a mistake."""
    assert call(capsys, "--record", 1) == (2, "", "error: --record 1 needs --show; add it\n")


def test_no_record_yet(folder, capsys):
    """A run that is still at its pseudo inputs has nothing to show."""
    (folder / "data.jsonl").unlink()
    code, _, told = call(capsys, "--show", folder)
    assert code == 2 and "no finished record yet" in told and told.count("\n") == 1


def test_another_model_under_the_same_name(folder, capsys):
    """Another tokenizer would show other tokens than were trained on."""
    args = json.loads((folder / "args.json").read_text()) | {"model_sha256": "other"}
    (folder / "args.json").write_text(json.dumps(args))
    code, _, told = call(capsys, "--show", folder)
    assert code == 2 and "has changed since" in told


def test_a_run_at_work_is_left_alone(folder, capsys):
    """Half a last line, as a process at work leaves it for a moment, is not cut off."""
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"index": 3, "pseu')
    before = (folder / "data.jsonl").read_bytes()
    assert call(capsys, "--show", folder)[0] == 0
    assert (folder / "data.jsonl").read_bytes() == before


def test_a_reader_that_has_seen_enough(folder):
    """`--show RUN | head` ends without a word."""
    args = [sys.executable, "genpi.py", "--show", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(args, cwd=TINY.parent, **pipes) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.fixture
def flags(checkpoint, tmp_path, monkeypatch):
    """The flags of a run with a random model, whose list of pseudo inputs is given."""
    (tmp_path / "mine.txt").write_text("Answer in one word.\n")
    monkeypatch.setattr(synth, "more_inputs", lambda *_: ["Count to 3.", "Name a tree."])
    paths = {"--model": checkpoint, "--prompt": tmp_path / "mine.txt", "--out": tmp_path / "run"}
    limits = "--samples 1 --held-out 1 --max-new-tokens 8 --max-reason-tokens 8 --lam 0.5"
    return [*limits.split(), *(part for pair in paths.items() for part in pair)]


def test_a_run_not_begun(flags, tmp_path, capsys):
    """The flags of a run show what it would train on, and its folder is not made."""
    code, page, _ = call(capsys, *flags, "--show")
    assert code == 0
    assert page.startswith("run, record 0: trained on\n\npseudo input x\n    Count to 3.\n")
    assert "SFT (Eq. 2, weight 0.5)" in page and "⟦Answer in one word." in page
    assert not (tmp_path / "run").exists()


def test_a_run_begun_with_the_same_flags(flags, tmp_path, capsys, monkeypatch):
    """If the run of these flags has a record, that is shown and no model speaks; with other flags
    one is made, and the run's folder stays as it is.
    """
    monkeypatch.setattr(genpi, "train_adapter", lambda *_: None)
    monkeypatch.setattr(genpi.lora, "save_adapter", lambda *_, **__: None)
    monkeypatch.setattr(genpi, "report", lambda *_, before: None)
    assert call(capsys, *flags)[0] == 0
    for path in (tmp_path / "run" / "data.jsonl", tmp_path / "run" / "inputs.json"):
        path.write_text(path.read_text().replace("Count to 3.", "Count to 4."))
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    assert "Count to 4." in call(capsys, *flags, "--show")[1]
    assert "Count to 3." in call(capsys, *flags, "--seed", 1, "--show")[1]
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before
