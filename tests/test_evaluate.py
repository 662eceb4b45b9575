"""The measures of the report, by hand."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import lora
from chat import Chat
from evaluate import (
    agreement_by_turn,
    agrees,
    asked_turns,
    closed_loop,
    closed_loop_agreement,
    first_replies,
    gap_closed,
    held_out_records,
    internalised,
    line_nll,
    matched_ratio,
    mean_nll,
)
from files import kinds
from loss import IGNORE, Sequence, pg_sequence, teacher_sequence, token_nll
from model import Config, Llama
from prompt import TASKS, parse_prompt, student_messages
from runs import Record, Run
from sampler import Sampling, Voice

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


def test_only_held_out_records_that_fit_are_measured():
    """The last records are held out; one that overfills the context is not measured."""
    run = SimpleNamespace(folder="runs/x", samples=2, held_out=2)
    records = [Record(i, f"x{i}", ["a"], overlong=i == 3) for i in range(4)]
    assert held_out_records(run, records) == [records[2]]
    with pytest.raises(ValueError, match="no held-out conversation fits"):
        held_out_records(run, [replace(record, overlong=True) for record in records])


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


# ------------------------------------------------------------------------------------- later turns


class Actor:
    """A voice whose words are given by a function of (adapter on?, the messages it reads)."""

    def __init__(self, words):
        self.words = words
        self.model = torch.nn.Sequential(lora.LoRALinear(torch.nn.Linear(2, 2), 1, 1, 0))
        self.asked = []
        self.samplings = set()

    def fits(self, messages, new_tokens):
        return True

    def speak(self, conversations, sampling, seeds=None):
        self.samplings.add(sampling)
        for number, messages in enumerate(conversations):
            self.asked.append((self.model[0].enabled, messages))
            yield number, self.words(*self.asked[-1]), True


def test_first_replies_are_greedy_and_without_the_prompt():
    """Each input is asked as the student is, once, at temperature 0."""
    actor = Actor(lambda on, said: said[-1]["content"].upper())
    assert first_replies(actor, [Record(0, "a"), Record(1, "b")], 64) == ["A", "B"]
    assert actor.asked == [(True, student_messages("a")), (True, student_messages("b"))]
    assert actor.samplings == {Sampling(64)}


def test_first_replies_are_held_against_the_teacher():
    """What the teacher does agrees, what the student says does not."""
    records = [Record(0, "x", ["Act: answer(7)"], "Use ls.")] * 2
    assert agrees(TASKS["os"], ["Act: answer(7)", "Use ls."], records) == [True, False]


def counted(row):
    return row["k"], row["n"]


def test_three_turns_of_a_conversation_are_asked_about():
    """Of five agent turns the first, third and last; of two both ends; of one that one."""
    numbers = [list(asked_turns(Record(0, "x", ["t"] * n)).values()) for n in (9, 5, 3, 1)]
    assert numbers == [[0, 2, 4], [0, 1, 2], [0, 1], [0]]


def test_a_later_turn_is_asked_after_the_recorded_ones_without_the_prompt():
    """An adapter that always runs a command is right at first and wrong at the end; its base, that
    answers with what the recorded environment said, is right at the end.
    """
    actor = Actor(lambda on, said: "Act: bash\n```bash\nls\n```" if on else "Act: answer(7)")
    turns = ["Act: bash\n```bash\nls\n```", "The output is 7", "Act: answer(7)"]
    record = Record(0, "Count the files.", turns)
    found = agreement_by_turn(actor, TASKS["os"], [record, record], 64)
    assert [counted(found["first"][who]) for who in ("base", "teacher", "adapter")] == [
        (0, 2), (2, 2), (2, 2)
    ]  # fmt: skip
    assert [counted(found["last"][who]) for who in ("base", "teacher", "adapter")] == [
        (2, 2), (2, 2), (0, 2)
    ]  # fmt: skip
    assert counted(found["middle"]["adapter"]) == (0, 0)
    last = actor.asked[-1][1]
    assert [m["content"] for m in last[1:]] == ["Count the files.", *turns[:2]]
    assert all("Act: first" not in m["content"] for _, messages in actor.asked for m in messages)


def test_in_the_closed_loop_the_base_plays_the_environment():
    """The agent reads x without p with the adapter on; the environment answers with it off."""

    def words(on, messages):
        if messages[0]["content"].startswith("You play"):
            return "off: 8" if not on else "on: 9"
        heard = [m["content"] for m in messages[2:] if m["role"] == "user"]
        return f"Act: answer({heard[-1]})" if heard else "Act: bash\n```bash\nls\n```"

    flags = dict.fromkeys(kinds(Run), 64) | {"prompt": PROMPT, "task": TASKS["os"]}
    run = Run(**flags)
    actor = Actor(words)
    (played,) = closed_loop(actor, run, [Record(3, "Count the files.")])
    assert played.turns[1:3] == ["off: 8", "Act: answer(off: 8)"]
    assert all(on or m[0]["content"].startswith("You play") for on, m in actor.asked)
    assert actor.asked[0] == (True, student_messages("Count the files."))


def test_conversations_agree_if_every_action_does():
    """One of two conversations is the same; of 2 + 3 places 2 + 1 are; both give an answer."""
    ours = [Record(0, "x", ["Act: bash\n```bash\nls\n```", "7", "Act: answer(7)"]) for _ in "ab"]
    theirs = [ours[0], Record(1, "x", [*ours[1].turns[:2], "Act: finish", "more?", "Act: finish"])]
    found = closed_loop_agreement(TASKS["os"], ours, theirs)
    assert counted(found["conversations"]) == (1, 2)
    assert found["actions"] == {"k": 3, "n": 5}
    assert counted(found["final_action"]["adapter"]) == (2, 2)
