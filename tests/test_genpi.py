"""What the command itself decides: the records that are trained on, the recipe, the seed of A."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import genpi
import lora
from chat import Chat
from loss import pg_sequence, sft_sequence
from model import load_model
from prompt import Prompt
from runs import Record, append_record
from train import Recipe

PROMPT = Prompt("Answer in one word.")
RECORD = Record(0, "Name a tree.", ["Oak."], "I like trees.", "It is one word.")


@pytest.fixture
def chat(checkpoint):
    return Chat(checkpoint, 1024)


def test_a_record_may_fill_the_context_to_its_last_token(chat):
    """The longer sequence of a record is trained on at its length, and left out below it."""
    chat.context = len(pg_sequence(chat, PROMPT, RECORD).ids)
    assert genpi.training_sequences(chat, PROMPT, [RECORD], 0.7) == (
        [sft_sequence(chat, RECORD)], [pg_sequence(chat, PROMPT, RECORD)]
    )  # fmt: skip
    chat.context -= 1
    with pytest.raises(ValueError, match="no record fits"):
        genpi.training_sequences(chat, PROMPT, [RECORD], 0.7)
    assert len(genpi.training_sequences(chat, PROMPT, [RECORD], 1.0)[0]) == 1  # SFT is shorter


LONG = replace(RECORD, reason="so " * 300)
TOO_LONG = replace(RECORD, pseudo_input="x" * 2000)


@pytest.mark.parametrize(
    ("record", "lam", "cause", "cure"),
    [
        (LONG, 0.7, "prompt and reason are too long", "--lam 1"),
        (replace(RECORD, no_reason=True), 0.7, "no room for a reason", "--lam 1"),
        (TOO_LONG, 0.7, "the conversations are too long", "--max-turns"),
        (TOO_LONG, 1.0, "the conversations are too long", "--max-turns"),
        (replace(RECORD, overlong=True), 1.0, "the conversations are too long", "--max-turns"),
    ],
)
def test_no_record_fits(chat, record, lam, cause, cure):
    """The error names what is too long, and a cure that is possible with these flags."""
    with pytest.raises(ValueError, match=f"no record fits.*{cause}.*{cure}.*another --out") as told:
        genpi.training_sequences(chat, PROMPT, [record], lam)
    assert ("--lam" in str(told.value)) == (cure == "--lam 1")


@pytest.mark.parametrize(("lam", "left"), [(0.7, ["a"]), (1.0, ["a", "c"])])
def test_records_that_are_not_whole_are_left_out(chat, lam, left):
    """Overlong conversations are never trained on, those without a reason by SFT alone."""
    whole = replace(RECORD, pseudo_input="a")
    overlong = replace(RECORD, pseudo_input="b", overlong=True)
    unreasoned = replace(RECORD, pseudo_input="c", reason="", no_reason=True)
    sft, _ = genpi.training_sequences(chat, PROMPT, [whole, overlong, unreasoned], lam)
    assert sft == [sft_sequence(chat, replace(RECORD, pseudo_input=x)) for x in left]


@pytest.fixture
def trained(checkpoint, tmp_path, monkeypatch):
    """Flags -> the new adapter's A, and the recipe that training is given."""
    for index in range(3):
        append_record(tmp_path / "data.jsonl", replace(RECORD, index=index))
    given = []
    monkeypatch.setattr(genpi, "train", lambda model, sft, pg, recipe, out: given.append(recipe))

    def call(*flags) -> SimpleNamespace:
        paths = ["--model", str(checkpoint), "--out", str(tmp_path), "--device", "cpu"]
        model, chat = load_model(checkpoint)
        genpi.train_adapter(genpi.parse_flags([*paths, *flags]), PROMPT, model, chat)
        return SimpleNamespace(A=lora.adapter_parameters(model)[0], recipe=given[-1])

    return call


def test_the_seed_decides_the_adapter(trained):
    """A follows --seed, whatever was drawn before."""
    first = trained("--seed", "1").A
    torch.rand(7)
    assert torch.equal(trained("--seed", "1").A, first)
    assert not torch.equal(trained("--seed", "2").A, first)


def test_flags_of_training_reach_it(trained):
    """The recipe is made of the flags."""
    flags = "--lam 0.3 --epochs 2 --batch 4 --lr 0.01 --warmup 0.2 --clip 0.5 --seed 3"
    recipe = Recipe(lam=0.3, epochs=2, batch=4, lr=0.01, warmup=0.2, clip=0.5, seed=3)
    assert trained(*flags.split()).recipe == recipe
