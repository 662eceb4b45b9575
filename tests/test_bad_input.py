"""What a user can get wrong, and what can break under a run: one line on stderr that names the
thing and the cure, exit code 2, and nothing lost.
"""

import errno
import io
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import costs
import evaluate
import genpi
import runs
import synth
import talk
import train
from files import read_text
from model import load_model

FLAGS = """--samples 3 --held-out 1 --epochs 2 --batch 2 --max-new-tokens 8 --max-reason-tokens 8
--rank 2 --save-every 1"""
INPUTS = ["Count to 3.", "Name a tree.", "Spell cat.", "Say no."]
CONTEXT = 1024  # of the random checkpoint, which reads a byte a token
SECRET = "hf_TheTokenThatNobodyMayRead"


def no_report(folder, loaded, before) -> None:
    """Stands for evaluate.report, which takes longer than all the rest."""


def list_inputs(patch: pytest.MonkeyPatch, inputs=INPUTS) -> None:
    """Have the generator list these pseudo inputs, since random weights write none."""
    patch.setattr(synth, "more_inputs", lambda *_: list(inputs))


def command(checkpoint: Path, prompt: Path, out: Path, *flags) -> list[str]:
    paths = ["--model", checkpoint, "--prompt", prompt, "--out", out]
    return [*FLAGS.split(), *map(str, paths), *map(str, flags)]


def adapter(out: Path) -> dict[str, bytes]:
    weights = load_file(out / "adapter_model.safetensors")
    return {name: weight.numpy().tobytes() for name, weight in weights.items()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A finished run that nobody disturbed, without its report."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompt.txt").write_text("Answer in one word.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genpi, "report", no_report)
        list_inputs(patch)
        out = folder / "run"
        assert genpi.main(command(checkpoint, folder / "prompt.txt", out)) == 0
    return out


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The folder of a run whose pseudo inputs are given."""
    list_inputs(monkeypatch)
    return tmp_path / "run"


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "again")


@pytest.fixture
def run(checkpoint, tmp_path, capsys, monkeypatch):
    """Run genpi.py with a one-line prompt and more flags -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(genpi, "report", no_report)
    (tmp_path / "prompt.txt").write_text("Answer in one word.\n")

    def call(*flags, main=genpi.main):
        whole = command(checkpoint, tmp_path / "prompt.txt", tmp_path / "run", *flags)
        code = main(whole if main is genpi.main else [str(flag) for flag in flags])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def report(run, monkeypatch):
    """Run evaluate.py on a folder, with short measurements -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(costs, "REPEATS", 1)
    monkeypatch.setattr(costs, "DECODED", 2)
    return lambda folder: run("--run", folder, main=evaluate.main)


def complaint(ended, *words) -> str:
    """The only line on stderr beside progress bars; it is an error, with these words."""
    code, _, stderr = ended
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+%\|.*\|\s+\d+/\d+ \[[^]]*\]$", line)]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, stderr)
    assert [word for word in words if str(word) not in lines[0]] == [], lines[0]
    return lines[0]


def raises(error):
    def call(*args, **kwargs):
        raise error

    return call


# ----------------------------------------------------------------------------------- prompt file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty", "write the prompt"]),
        (b"\xef\xbb\xbf \r\n\t", ["is empty", "write the prompt"]),
        (b"\x89PNG\r\n\x1a\n\0\0", ["byte 0", "UTF-8", "save"]),
        (b"caf\xe9", ["byte 3", "UTF-8", "save"]),
        ("Hi".encode("utf-16"), ["byte 0", "UTF-8", "save"]),
        (b"abc\0def", ["NUL byte at 3", "give a text file"]),
        (b"<AGENT>:\nHi\n<USER>:\n", ["turn 1", "<AGENT>:", "must alternate"]),
        (b"<USER>:\nA\n<USER>:\nB", ["turn 2", "<USER>:", "must alternate"]),
        (b"<USER>:\nA\n<AGENT>:\nB\n", ["last turn", "<AGENT>:", "end with an open <USER>:"]),
        (b"Hi\n<USER>:\nA", ["before the first <USER>:", "begin the file with <USER>:"]),
        (b"<USER>:\n<AGENT>:\n<USER>:\n{user_input}", ["nothing but", "write what they say"]),
    ],
)
def test_a_file_that_is_no_prompt(run, tmp_path, content, words):
    """An empty, binary or unbalanced prompt file is named, with what is wrong and what to do."""
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    complaint(run("--prompt", path), path, *words)
    assert not (tmp_path / "run" / "args.json").exists()


@pytest.mark.parametrize("flag", ["--prompt", "--demos", "--inputs"])
@pytest.mark.parametrize("path", ["none.txt", ".", "prompt.txt/below", "n" * 300])
def test_a_path_that_is_no_file(run, out, tmp_path, flag, path):
    """A missing file, a folder, a path below a file: the cure is another path."""
    told = complaint(run(flag, tmp_path / path), tmp_path / path, "give the path of a text file")
    assert "--out" not in told


def test_a_prompt_longer_than_the_context(run, tmp_path):
    """The error counts the prompt's tokens and the context's."""
    (tmp_path / "long.txt").write_text("x" * 2000)
    complaint(run("--prompt", tmp_path / "long.txt"), " 20", CONTEXT, "shorten")


def test_turns_longer_than_the_context(run):
    """When --max-new-tokens alone fills the context, the cure is to lower it."""
    complaint(run("--max-new-tokens", 5000), "--max-new-tokens 5000", CONTEXT, "lower")


@pytest.mark.parametrize(("lam", "left_out"), [(0.7, True), (1, False)])
def test_a_record_whose_reason_does_not_fit_is_left_out(run, tmp_path, monkeypatch, lam, left_out):
    """An input too long for the reason's question costs a record; with SFT alone not even it."""
    (tmp_path / "prompt-300.txt").write_text("x" * 300)
    list_inputs(monkeypatch, ["y" * 420, *INPUTS[1:]])
    code, stdout, _ = run("--prompt", tmp_path / "prompt-300.txt", "--lam", lam)
    assert code == 0 and ("left out: 1 of 3" in stdout) == left_out


def test_line_ends_and_marks_of_windows_change_nothing(tmp_path):
    """A prompt with CR LF or with a byte order mark is the same prompt."""
    texts = []
    for content in (b"One.\nTwo.\n", b"One.\r\nTwo.\r\n", b"\xef\xbb\xbfOne.\nTwo.\n"):
        (tmp_path / "p.txt").write_bytes(content)
        texts.append(read_text(tmp_path / "p.txt", "prompt"))
    assert texts == ["One.\nTwo.\n"] * 3


def test_paths_with_spaces_and_other_alphabets(run, out, checkpoint, tmp_path):
    """Model, prompt and run folder may be called anything."""
    odd = tmp_path / "a b' ü 中 🙂"
    odd.mkdir()
    (odd / "p 1.txt").write_text("Réponds 🙂 <|eot_id|>", encoding="utf-8")
    shutil.copytree(checkpoint, odd / "model")
    ended = run("--model", odd / "model", "--prompt", odd / "p 1.txt", f"--out={odd / '-run'}")
    assert ended[0] == 0, ended[2]


def test_a_path_in_bytes_that_are_no_text(run, out, tmp_path):
    """A prompt file may have a name in Latin-1."""
    path = tmp_path / "caf\udce9.txt"
    path.write_text("Answer in one word.\n")
    assert run("--prompt", path)[0] == 0


def test_a_flag_in_bytes_that_are_no_text(run, out):
    """What the shell's bytes cannot mean does not end the run in a traceback."""
    assert run("--environment", "a \udcff shell", "--max-turns", 2)[0] in (0, 2)


def test_a_terminal_that_cannot_show_a_letter(run, out, tmp_path, monkeypatch):
    """An ASCII terminal loses the letter, not the run."""
    (tmp_path / "ü.txt").write_text("Réponds.", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert run("--prompt", tmp_path / "ü.txt")[0] == 0


# ------------------------------------------------------------------------------------------ flags


LIMITS = {
    **dict.fromkeys(["--samples 0", "--samples -3", "--held-out 0", "--slots 0"], "1 to"),
    **dict.fromkeys(["--max-turns 0", "--batch 0", "--rank 0"], "1 to"),
    **dict.fromkeys(["--micro-tokens 0", "--save-every 0", "--max-new-tokens 0"], "1 to"),
    **dict.fromkeys(["--slots 9999999999", "--samples 9999999999"], "1 to 1000000000"),
    **dict.fromkeys(["--lam 1.5", "--lam -0.1", "--lam nan", "--warmup 2"], "0 to 1"),
    "--weight-decay nan": "0 to 1",
    **dict.fromkeys(["--lr 1e+38", "--lr inf"], "1e-12 to 1"),
    **dict.fromkeys(["--lr 0", "--clip 0", "--alpha nan"], "1e-12 to"),
    "--dropout 1": "0 to 0.99",
    "--epochs 0": "1 to 10000",
    "--rank 17": "16",  # the narrowest layer of the random checkpoint
    "--seed 99999999999999999999": "0 to",
}


@pytest.mark.parametrize("flag", LIMITS)
def test_flags_out_of_range(run, out, flag):
    """The error names flag, value and limit, before anything is synthesised."""
    complaint(run(*flag.split()), *flag.removeprefix("--").split(), LIMITS[flag])
    assert not (out / "data.jsonl").exists()


@pytest.mark.parametrize("flags", ["--nonsense", "--bits 8", "--device tpu", "--samples 1.5"])
def test_flags_that_argparse_refuses(run, flags):
    """An unknown flag or value is one line with exit code 2, too."""
    complaint(run(*flags.split()), *flags.split(), "--help")


@pytest.mark.parametrize("flags", ["--rank 17", "--generator nosuch", "--demos nosuch"])
def test_a_corrected_command_goes_on_in_the_same_folder(run, out, flags):
    """A refused command leaves nothing behind that refuses the corrected one."""
    complaint(run(*flags.split()), flags.split()[1])
    assert run()[0] == 0


def test_other_demonstrations_need_another_folder(run, out, tmp_path):
    """The same words as two demos or as one of two lines are two experiments."""
    demos = tmp_path / "demos.txt"
    demos.write_text("Count to 3.\nName a tree.\n")
    assert run("--demos", demos)[0] == 0
    demos.write_text("Count to 3.\nName a tree.\n---\n")
    complaint(run("--demos", demos), "demos_sha256", "--out")


def test_other_inputs_need_another_folder(run, out, tmp_path):
    """Real first messages are told by their hash: gone, or others, is another experiment."""
    inputs = tmp_path / "log.txt"
    inputs.write_text("Count to 3.\nName a tree.\n")
    assert run("--inputs", inputs)[0] == 0
    moved = inputs.rename(tmp_path / "moved.txt")
    assert run("--inputs", moved)[0] == 0
    complaint(run(), "inputs_sha256", "--out")
    moved.write_text("Count to 3.\nName a bird.\n")
    complaint(run("--inputs", moved), "inputs_sha256", "--out")


@pytest.mark.parametrize(("text", "words"), [("", "empty"), ("one\nOne \n", "1 distinct")])
def test_inputs_that_are_too_few(run, out, tmp_path, text, words):
    """One line that says how many there are, and the mended file goes on in the same folder."""
    inputs = tmp_path / "log.txt"
    inputs.write_text(text)
    complaint(run("--inputs", inputs), inputs, words)
    inputs.write_text("one\ntwo\n")
    assert run("--inputs", inputs)[0] == 0


def test_the_demonstrations_of_a_task_need_no_flag(run, out):
    """A task brings its own: to name their file changes nothing, and `any` has none."""
    file = Path(genpi.__file__).parent / "demos" / "os.txt"
    assert run("--task", "os")[0] == 0
    assert run("--task", "os", "--demos", file)[0] == 0
    assert genpi.read_demos(genpi.parse_flags(["--task", "any"])) == ()


def test_cuda_asked_for_and_absent(run, again, monkeypatch):
    """--device cuda without a CUDA device says which device there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--device cuda", "no CUDA device", "--device cpu"]
    complaint(run("--device", "cuda"), *words)
    complaint(run("--run", again, "--device", "cuda", main=evaluate.main), *words)


def test_a_run_folder_made_with_other_flags(run, again, tmp_path):
    """Old and new value are named, the cure is another --out, and the folder stays as it is."""
    before = files(again)
    complaint(run("--out", again, "--lam", 0.5), "lam 0.7 (now 0.5)", again, "--out")
    (tmp_path / "edited.txt").write_text("Answer in two words.\n")
    complaint(run("--out", again, "--prompt", tmp_path / "edited.txt"), "prompt", again, "--out")
    assert files(again) == before


# ------------------------------------------------------------------------------------- checkpoint


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path: Path, size: int) -> None:
    """Keep the first bytes of a file, or all but some."""
    path.write_bytes(path.read_bytes()[:size])


def nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors")


LINEAR = {"rope_type": "linear"}
INDEX, JINJA = "model.safetensors.index.json", "chat_template.jinja"
DAMAGE = {  # what is done to a checkpoint, and the words that the error needs
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
    "weights cut": (lambda f: cut(f / "model.safetensors", 9000), ["cut short", "download"]),
    "header cut": (lambda f: cut(f / "model.safetensors", 30), ["cut short", "download"]),
    "weights empty": (lambda f: cut(f / "model.safetensors", 0), ["cut short", "download"]),
    "other shapes": (lambda f: edit(f, hidden_size=64), ["(260, 32)", "(260, 64)", "embed_tokens"]),
    "other layers": (lambda f: edit(f, num_hidden_layers=2), ["is not there", "layers.1"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json: No such file"]),
    "tokenizer cut": (lambda f: cut(f / "tokenizer.json", 900), ["tokenizer.json", "download"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json: No such file"]),
    "config cut": (lambda f: cut(f / "config.json", 50), ["config.json", "download"]),
    "other family": (lambda f: edit(f, architectures=["GPT2"]), ["GPT2", "LlamaForCausalLM"]),
    "no heads": (lambda f: edit(f, num_attention_heads=0), ["num_attention_heads", "0"]),
    "no key heads": (lambda f: edit(f, num_key_value_heads=0), ["num_key_value_heads", "0"]),
    "no width": (lambda f: edit(f, hidden_size=-32), ["hidden_size", "-32"]),
    "no number": (lambda f: edit(f, max_position_embeddings="x"), ["max_position_embeddings", "x"]),
    "rope list": (lambda f: edit(f, rope_scaling=[1]), ["rope_scaling", "[1]"]),
    "rope word": (lambda f: edit(f, rope_theta="x"), ["rope_theta", "x"]),
    "rope sign": (lambda f: edit(f, rope_theta=-1.0), ["rope_theta", "-1.0"]),
    "rope factor": (lambda f: edit(f, rope_scaling=LINEAR | {"factor": "x"}), ["factor", "x"]),
    "norm word": (lambda f: edit(f, rms_norm_eps="x"), ["rms_norm_eps", "x"]),
    "odd token": (lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [{"id": 1}]}'),
                  ["tokenizer.json", "download"]),
    "index list": (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), [INDEX, "weight_map"]),
    "index number": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), [INDEX]),
    "binary template": (lambda f: (f / JINJA).write_bytes(b"\xff"), [JINJA]),
    "not a number": (nan, ["not finite"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(run, out, checkpoint, tmp_path, damage):
    """A checkpoint that cannot be read says which file or field is to blame."""
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    change, words = DAMAGE[damage]
    change(folder)
    complaint(run("--model", folder), *words)


@pytest.mark.parametrize("name", ["nosuch", "~nosuch/x", "a/b/c", "", "owner/na--me", "/etc/hosts"])
def test_a_model_that_is_neither_folder_nor_hub_id(run, name):
    """The error says what a model's name looks like, and needs no network for it."""
    complaint(run("--model", name), f" {name}:", "owner/name")


HUB = {
    "unknown": (hub.RepositoryNotFoundError(SECRET, response=MagicMock()), "check the name"),
    "gated": (hub.GatedRepoError(SECRET, response=MagicMock()), "accept its licence"),
    "refused": (hub.HfHubHTTPError(SECRET, response=MagicMock()), "check the network"),
    "no network": (hub.LocalEntryNotFoundError(SECRET), "check the network"),
    "offline": (hub.OfflineModeIsEnabled(SECRET), "check the network"),
    "cut off": (type("ReadTimeout", (Exception,), {})(SECRET), "check the network"),
    "bad token": (UnicodeEncodeError("ascii", SECRET + "é", 28, 29, SECRET), "check the network"),
}


@pytest.mark.parametrize("case", HUB)
def test_a_hub_that_does_not_deliver(run, monkeypatch, case):
    """A Hub id that cannot be had is one line with the cure; what the Hub said, with the token, is
    not repeated.
    """
    error, cure = HUB[case]
    monkeypatch.setattr("checkpoint.snapshot_download", raises(error))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    ended = run("--model", "someone/model")
    complaint(ended, "someone/model", cure)
    assert SECRET not in ended[1] + ended[2]


# ------------------------------------------------------------------------------------- what breaks


@pytest.mark.parametrize("path", ["prompt.txt", "prompt.txt/below"])
def test_an_out_that_is_no_folder(run, tmp_path, path):
    """--out at or below a regular file: another --out is the cure."""
    complaint(run("--out", tmp_path / path), tmp_path / path, "another --out")


FULL = OSError(errno.ENOSPC, "No space left on device")
DISK_FULL = {
    "args.json": (Path, "write_text", FULL),
    "data.jsonl": (runs.os, "fsync", FULL),
    "checkpoint": (train, "save_file", SafetensorError("I/O error: No space left on device")),
    "adapter": (genpi.lora, "save_file", SafetensorError("I/O error: No space left on device")),
}


@pytest.mark.parametrize("where", DISK_FULL)
def test_a_full_disk(run, out, finished, monkeypatch, where):
    """A full disk names the folder and the cure; the same command later ends as if undisturbed."""
    with monkeypatch.context() as patch:
        place, name, error = DISK_FULL[where]
        patch.setattr(place, name, raises(error))
        complaint(run(), out, "No space left", "free some space")
    assert run()[0] == 0 and adapter(out) == adapter(finished)


@pytest.mark.parametrize(
    "give_up",
    [raises(torch.OutOfMemoryError("CUDA\nout\nof memory")), raises(MemoryError()),
     lambda *args: torch.empty(2**60)],
    ids=["cuda", "python", "cpu"],
)  # fmt: skip
def test_out_of_memory(run, out, monkeypatch, give_up):
    """Too little memory on any device names the flags that need less."""
    monkeypatch.setattr(train, "train_step", give_up)
    complaint(run(), "out of", "memory", "--micro-tokens", "--checkpointing")


def test_a_loss_that_is_not_a_number(run, out, monkeypatch):
    """A NaN stops the training at its step, keeps the last checkpoint and says what to lower."""
    real, losses = train.train_step, []

    def step(*args):
        losses.append(real(*args))
        return losses[-1] if len(losses) < 3 else (math.nan, 1.0, 1.0)

    monkeypatch.setattr(train, "train_step", step)
    complaint(run(), "step 3", "nan", "checkpoint", "--lr")
    assert not (out / "adapter_config.json").exists()
    with safe_open(out / "checkpoint" / "state.safetensors", "pt") as file:
        assert file.metadata() == {"step": "2"}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "place",
    [(torch.optim.AdamW, "step"), (synth, "append_record"), (train, "save_file")],
    ids=["update", "record", "checkpoint"],
)
def test_an_interrupt_at_an_odd_moment(run, out, finished, monkeypatch, place, after):
    """Ctrl-C around an update or a write is one line; the same command ends in the same bits."""
    real = getattr(*place)

    def interrupted(*args, **kwargs):
        done = real(*args, **kwargs) if after else None
        signal.raise_signal(signal.SIGINT)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        code, _, stderr = run()
    assert code == 130 and "the same command goes on" in stderr
    assert run()[0] == 0 and adapter(out) == adapter(finished)


def test_a_generator_that_writes_no_list(run, tmp_path, monkeypatch):
    """Random weights write no list: the cures are --demos and --generator, in another --out."""
    monkeypatch.setattr(synth, "LIST_ITEMS", 1)
    complaint(run(), "no numbered list", "5 rounds", "--demos", "--generator", "--out")


def test_a_single_pseudo_input(run, monkeypatch):
    """One input cannot be trained on and held out at once; the error says so."""
    list_inputs(monkeypatch, INPUTS[:1])
    complaint(run(), "1 pseudo input", "--demos", "--generator")


def test_a_report_that_fails(run, out, monkeypatch):
    """A report that cannot be made ends the command with its line; the adapter is there."""
    monkeypatch.setattr(genpi, "report", raises(ValueError("no held-out record fits")))
    complaint(run(), "no held-out record fits")
    assert (out / "adapter_config.json").exists()


def test_an_out_that_begins_with_a_dash(run, report, tmp_path, monkeypatch):
    """Whatever --out is called, the run is made and reported on."""
    monkeypatch.chdir(tmp_path)
    list_inputs(monkeypatch)
    monkeypatch.setattr(genpi, "report", evaluate.report)
    assert run("--out=-run")[0] == 0 and Path("-run", "report.md").exists()
    assert Path("-run", "report.svg").read_text().startswith("<svg")


def test_the_report_of_the_command_is_that_of_the_files(run, report, out, monkeypatch):
    """genpi.py reports on the model that it holds; evaluate.py, which loads all anew, finds the
    same.
    """
    monkeypatch.setattr(genpi, "report", evaluate.report)
    assert run()[0] == 0
    held = json.loads((out / "report.json").read_text())
    assert report(out)[0] == 0
    loaded = json.loads((out / "report.json").read_text())
    timed = ("break_even", "seconds")
    assert [key for key in held if held[key] != loaded[key] and key not in timed] == []


def test_a_full_disk_under_a_finished_run(run, again, monkeypatch):
    """A write that fails half-way leaves every file of a finished run whole."""

    def write_half(path, text, **how):
        path.write_bytes(text[: len(text) // 2].encode())
        raise FULL

    before = files(again)
    monkeypatch.setattr(Path, "write_text", write_half)
    complaint(run("--out", again), again, "No space left")
    assert {name: content for name, content in files(again).items() if name in before} == before


def test_a_full_disk_at_the_report(report, again, monkeypatch):
    """A report that cannot be written names its folder and the cure, too."""
    monkeypatch.setattr(evaluate, "write_json", raises(FULL))
    complaint(report(again), again, "No space left", "free some space")


# -------------------------------------------------------------------------------- damaged run files


def unfinish(folder: Path) -> Path:
    """Take the adapter out of a run folder, so that its last checkpoint is needed."""
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    return folder


def records(folder: Path) -> list[dict]:
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted([json.loads(line) | {"seconds": 0} for line in lines], key=lambda r: r["index"])


def test_a_last_record_cut_short(run, again, finished):
    """A half-written last line is dropped with a warning, and its record made again."""
    cut(again / "data.jsonl", -10)
    code, stdout, stderr = run("--out", unfinish(again))
    assert code == 0 and "last line is corrupt" in stdout + stderr
    assert records(again) == records(finished) and adapter(again) == adapter(finished)


def test_a_last_record_without_its_line_end(run, again, finished):
    """A record whose line end an editor took is whole: it stays, and is not made again."""
    cut(again / "data.jsonl", -1)
    code, stdout, stderr = run("--out", unfinish(again))
    assert code == 0 and "corrupt" not in stdout + stderr
    assert files(again)["data.jsonl"].count(b"\n") == len(INPUTS)
    assert records(again) == records(finished) and adapter(again) == adapter(finished)


CORRUPT = ["", "{", "[1]", "null", '{"index": 1}']
CORRUPT += ['{"index": "x", "pseudo_input": "a"}', '{"index": 1, "pseudo_input": 5}']


@pytest.mark.parametrize("line", CORRUPT)
def test_a_corrupt_record_in_the_middle(run, again, line):
    """The error names file and line, and the data stay as they are."""
    lines = (again / "data.jsonl").read_text(encoding="utf-8").splitlines()
    (again / "data.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    before = files(again)["data.jsonl"]
    complaint(run("--out", again), again / "data.jsonl", "line 2", "delete that line")
    assert files(again)["data.jsonl"] == before


def test_a_record_that_is_there_twice(run, again, finished):
    """Of two records of one pseudo input, as two processes in one folder wrote them, the first
    counts; that is said once, and the file then holds each once.
    """
    rows = records(again)
    later = rows[1] | {"reason": "Another."}
    lines = [json.dumps(row) + "\n" for row in (*rows[:2], later, *rows[2:])]
    (again / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    code, stdout, stderr = run("--out", again)
    assert code == 0 and (stdout + stderr).count("1 lines hold a record once more") == 1
    assert records(again) == records(finished)


def test_runs_that_hold_out_other_inputs_are_not_compared(run, again, tmp_path):
    """Two runs are compared on the same held-out records, or not at all."""
    other = shutil.copytree(again, tmp_path / "other")
    code, stdout, _ = run("--run", again, "--against", other, main=evaluate.main)
    assert code == 0 and "not told apart" in stdout and "+0.0 points" in stdout
    for path in (other / "data.jsonl", other / "inputs.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(INPUTS[-1], "Say yes."), encoding="utf-8")
    ended = run("--run", again, "--against", other, main=evaluate.main)
    complaint(ended, again, other, "same records")


def test_a_report_on_missing_records(report, again):
    """With a record missing, trained and held-out ones would be mixed up: no report."""
    lines = (again / "data.jsonl").read_text(encoding="utf-8").splitlines(True)
    (again / "data.jsonl").write_text("".join(lines[:-1]))
    complaint(report(again), again, "3 of 4", "genpi.py")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"model": "x"}'])
@pytest.mark.parametrize("name", ["args.json", "inputs.json"])
def test_a_damaged_json_file(run, report, again, name, content):
    """genpi.py and evaluate.py both name the file."""
    (again / name).write_bytes(content)
    complaint(report(again), again / name)
    complaint(run("--out", again), again)


def test_a_flag_that_the_run_folder_lacks(report, again):
    """An args.json with a flag missing, as an older version wrote it, is named."""
    args = json.loads((again / "args.json").read_text())
    del args["held_out"]
    (again / "args.json").write_text(json.dumps(args))
    complaint(report(again), again / "args.json")


@pytest.mark.parametrize("task", ["foo", None, []])
def test_a_task_that_does_not_exist(report, again, task):
    """An args.json of another program's is named, too."""
    args = json.loads((again / "args.json").read_text()) | {"task": task}
    (again / "args.json").write_text(json.dumps(args))
    complaint(report(again), again / "args.json", "task")


@pytest.mark.parametrize("size", [0, 20, -20])
def test_a_training_state_cut_short(run, again, size):
    """A checkpoint that cannot be read is named; without it the training begins anew."""
    state = unfinish(again) / "checkpoint" / "state.safetensors"
    cut(state, size)
    complaint(run("--out", again), state, "delete")
    state.unlink()
    assert run("--out", again)[0] == 0


@pytest.mark.parametrize("names", [["other"], None], ids=["other names", "other shapes"])
@pytest.mark.parametrize("metadata", [None, {"step": "x"}, {"step": "1"}])
def test_a_training_state_of_something_else(run, again, names, metadata):
    """A checkpoint with other tensors or no step is named, too."""
    state = unfinish(again) / "checkpoint" / "state.safetensors"
    save_file({name: torch.zeros(3, 3) for name in names or load_file(state)}, state, metadata)
    complaint(run("--out", again), state, "delete")


def test_a_last_line_of_metrics_cut_short(run, report, again, finished):
    """A half-written last line of metrics.jsonl stops neither training nor report."""
    cut(again / "metrics.jsonl", -10)
    assert report(again)[0] == 0
    assert run("--out", unfinish(again))[0] == 0 and adapter(again) == adapter(finished)


@pytest.mark.parametrize("lost", [slice(0, None), slice(0, 1)], ids=["all", "the first"])
def test_lines_of_metrics_that_are_gone(report, again, lost):
    """What training took is not known from a part of metrics.jsonl."""
    path = again / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    del lines[lost]
    path.write_text("".join(lines))
    complaint(report(again), path, "not every step", "trains anew")


@pytest.mark.parametrize("line", ["{", "[]", "{}", "\xff"])
def test_a_corrupt_line_of_metrics(run, report, again, line):
    """Another corrupt line of metrics.jsonl is named."""
    path = again / "metrics.jsonl"
    path.write_bytes(line.encode("latin-1") + b"\n" + path.read_bytes())
    complaint(report(again), path, "line 1", "delete that line")
    complaint(run("--out", unfinish(again)), path, "line 1", "delete that line")


@pytest.mark.parametrize("name", ["inputs.json", "prompt.txt", "adapter_model.safetensors"])
def test_a_report_without_a_file(report, again, name):
    """A run folder that lacks a file says which, and that genpi.py makes it again."""
    (again / name).unlink()
    complaint(report(again), name, "genpi.py")


def test_a_report_on_other_weights(run, report, out, checkpoint, tmp_path):
    """An adapter is not measured on weights that are not those it was trained on."""
    base = shutil.copytree(checkpoint, tmp_path / "base")
    assert run("--model", base)[0] == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, base / "model.safetensors")
    complaint(report(out), base, "changed")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter(report, again, name):
    """An adapter that cannot be read says how to have it saved again."""
    cut(again / name, 50)
    complaint(report(again), again, "delete")


@pytest.mark.parametrize("flag", ["--chat", "--run"])
@pytest.mark.parametrize("folder", ["nosuch", ".", "prompt.txt"])
def test_a_folder_that_is_no_run(run, tmp_path, flag, folder):
    """--chat and --run on anything but a run folder say what to give."""
    program = genpi.main if flag == "--chat" else evaluate.main
    ended = run(flag, tmp_path / folder, main=program)
    complaint(ended, tmp_path / folder, "no run folder", "--out of an earlier run")


@pytest.mark.parametrize("flag", ["--chat", "--run"])
def test_an_unfinished_run(run, again, flag):
    """--chat and --run on an unfinished run say how to finish it."""
    program = genpi.main if flag == "--chat" else evaluate.main
    complaint(run(flag, unfinish(again), main=program), again, "no finished adapter", "same flags")


def test_a_folder_for_the_merged_model(run, again, checkpoint):
    """--merge writes a checkpoint that loads; where a model or a run lies it is refused."""
    ended = run("--run", again, "--merge", checkpoint, main=evaluate.main)
    complaint(ended, checkpoint, "choose another folder")
    before = files(again)
    complaint(run("--run", again, "--merge", again, main=evaluate.main), again, "another folder")
    assert files(again) == before
    merged = again / "merged"
    code, stdout, _ = run("--run", again, "--merge", merged, main=evaluate.main)
    assert code == 0 and str(merged) in stdout
    load_model(merged, "cpu", bits=16)
    ended = run("--run", again, "--merge", merged, main=evaluate.main)
    complaint(ended, merged, "config.json", "another folder")


def test_an_earlier_run_that_is_none(run, report, again, tmp_path):
    """--before is looked at before anything is measured, what --from says before it is used."""
    ended = run("--run", again, "--before", tmp_path, main=evaluate.main)
    complaint(ended, tmp_path, "--before")
    args = again / "args.json"
    args.write_text(args.read_text().replace('"samples": 3', '"samples": "3"'))
    complaint(run("--out", tmp_path / "new", "--from", again), args, "samples", "--from")


# ------------------------------------------------------------------------------------------- chat


def say_to(run, folder, monkeypatch, *lines):
    """Say some lines to a finished run -> (exit code, stdout, stderr)."""
    said = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    return run("--chat", folder)


def test_chat_with_a_full_context(run, again, monkeypatch):
    """A message too long for the context is told how to go on, and the chat does."""
    code, stdout, _ = say_to(run, again, monkeypatch, "x" * CONTEXT, "/new", "Hi.", "/quit")
    assert code == 0 and re.search(f"context of {CONTEXT}.*/new", stdout)


def test_chat_with_bytes_that_are_no_text(run, again, monkeypatch):
    """What a terminal could not decode does not end the chat."""
    assert say_to(run, again, monkeypatch, "h\udcffi", "/quit")[0] == 0


def test_chat_reads_a_message_of_several_lines(again, monkeypatch):
    """Lines between two of three quotes are one message, inner spaces kept; a path is no command,
    and what begins with a slash can be said.
    """
    heard = []

    def reply(voice, messages, limit):
        heard.append(messages[-1]["content"])
        return "ok"

    monkeypatch.setattr(talk, "say_aloud", reply)
    said = iter(['"""', "The output is:", "", "  7  ", '"""  ', "/etc is full.", "//quit", "/quit"])
    monkeypatch.setattr("builtins.input", lambda ask: next(said))
    talk.talk(again, "cpu")
    assert heard == ["The output is:\n\n  7", "/etc is full.", "/quit"]
