"""The measures of the report, by hand."""

import math
from pathlib import Path

import pytest
import torch

import evaluate
from chat import Chat
from evaluate import (
    gap_closed,
    internalised,
    line_nll,
    matched_ratio,
    mean_nll,
)
from loss import IGNORE, Sequence, pg_sequence, teacher_sequence, token_nll
from model import Config, Llama
from prompt import parse_prompt
from runs import Record
from sampler import Voice

TINY = Path(__file__).resolve().parent.parent / "tiny"
CHAT = Chat(TINY, 2048)
PROMPT = parse_prompt("Say Act: first.\n\nThen act,\n\nand stop.")
TURNS = ["Act: bash", "The output is 7", "Act: answer(7)"]
RECORD = Record(0, "Count the files.", TURNS, "Use ls.", "It acts.")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048)).eval()


def test_matched_ratio_counts_tokens_in_order():
    """Of 1 2 3 4, the reply 1 9 3 4 has three; another order or nothing at all has fewer."""
    assert matched_ratio([1, 2, 3, 4], [1, 9, 3, 4]) == 3 / 4
    assert matched_ratio([1, 2, 3, 4], [3, 4, 1, 2]) == 2 / 4
    assert matched_ratio([1, 2], []) == 0 and matched_ratio([1, 2], [0, 1, 2, 3]) == 1


def test_gap_closed_is_the_share_of_what_the_prompt_brings():
    """Half way from base 2 to teacher 1 is 0.5; a prompt that brings nothing leaves no gap."""
    assert gap_closed({"base": 2.0, "teacher": 1.0, "adapter": 1.5}) == 0.5
    assert gap_closed({"base": 2.0, "teacher": 1.0, "adapter": 2.5}) == -0.5
    assert gap_closed({"base": 1.0, "teacher": 1.0, "adapter": 0.5}) is None
    assert gap_closed({"base": 1.0, "teacher": 1.5, "adapter": 0.5}) is None


def test_the_report_says_where_there_is_no_answer():
    """Without a gap or without room for the question the page says so."""
    page = internalised({"gap_closed": None, "recall": None})
    assert "does not help" in page and "does not fit the context" in page


def nll_by_hand(model, sequence: Sequence) -> list[float]:
    """-log P of every labelled token, in order."""
    with torch.no_grad():
        logp = model(torch.tensor([sequence.ids]))[0].log_softmax(-1)
    labels = enumerate(sequence.labels)
    return [-logp[t - 1, label].item() for t, label in labels if label != IGNORE]


def test_mean_nll_weighs_every_target_token_alike(model):
    """The mean over sequences of different lengths is over tokens, in any micro-batch."""
    sequences = [pg_sequence(CHAT, PROMPT, RECORD), teacher_sequence(CHAT, PROMPT, RECORD)]
    nats = [nll for s in sequences for nll in nll_by_hand(model, s)]
    for tokens in (1, 10_000):
        assert mean_nll(model, sequences, tokens) == pytest.approx(sum(nats) / len(nats), rel=1e-4)


def test_the_teacher_reads_the_prompt_and_answers_for_its_turns():
    """p stands before x in the teacher's sequence; only the agent's turns are targets."""
    sequence = teacher_sequence(CHAT, PROMPT, RECORD)
    text = CHAT.tokenizer.decode(sequence.ids, skip_special_tokens=False)
    assert text.index("Say Act: first.") < text.index("Count the files.")
    targets = CHAT.decode([label for label in sequence.labels if label != IGNORE])
    assert targets == "Act: bashAct: answer(7)"


def test_lines_make_up_the_loss_of_the_prompt(model):
    """NLL of a line times its tokens, summed, is that of p's tokens in the PG sequence."""
    sequence = pg_sequence(CHAT, PROMPT, RECORD)
    by_token, n = nll_by_hand(model, sequence), len(CHAT.tokens(PROMPT.text))
    lines = PROMPT.text.splitlines(keepends=True)
    borders = [len(CHAT.tokens("".join(lines[:i]))) for i in range(len(lines) + 1)]
    sizes = [b - a for a, b in zip(borders, borders[1:], strict=False)]
    found = line_nll(model, CHAT, PROMPT, RECORD)
    assert len(found) == len(lines) == 5
    assert sum(nll * size for nll, size in zip(found, sizes, strict=True)) == pytest.approx(
        sum(by_token[:n]), rel=1e-4
    )
    nats, tokens = token_nll(model(torch.tensor([sequence.ids])), torch.tensor([sequence.labels]))
    assert tokens == len(by_token) and nats.item() == pytest.approx(sum(by_token), rel=1e-4)


def test_recall_is_the_mean_ratio_and_the_worst_line_comes_first(model, monkeypatch):
    """A reply that recites p has ratio 1, half of p has half; blank lines are not listed."""
    whole, half = PROMPT.text, CHAT.decode(CHAT.tokens(PROMPT.text)[:7])
    said = [f"{whole}\n\nReason: so.", half]
    monkeypatch.setattr(evaluate, "say", lambda *args: said)
    found = evaluate.recall(Voice(model, CHAT), PROMPT, [RECORD, RECORD])
    share = matched_ratio(CHAT.tokens(whole), CHAT.tokens(half))
    assert found["ratio"] == pytest.approx((1 + share) / 2) and 0 < share < 1
    nats = [row["nll"] for row in found["lines"]]
    assert nats == sorted(nats, reverse=True) and len(nats) == 3
    assert all(math.isfinite(nll) and nll > 0 for nll in nats)


def test_a_prompt_may_speak_of_reasons_itself(model, monkeypatch):
    """What follows the word in p is recited, too."""
    prompt = parse_prompt("Act.\n\nReason: none.\n\nStop.")
    monkeypatch.setattr(evaluate, "say", lambda *args: [f"{prompt.text}\n\nReason: so."])
    assert evaluate.recall(Voice(model, CHAT), prompt, [RECORD])["ratio"] == 1
