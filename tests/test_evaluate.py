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
    gap_closed,
    held_out_records,
    internalised,
    line_nll,
    matched_ratio,
    mean_nll,
    paired_difference,
    requests_to_pay,
    same_action,
    sign_test,
    wilson,
)
from loss import IGNORE, Sequence, pg_sequence, teacher_sequence, token_nll
from model import Config, Llama
from prompt import TASKS, parse_prompt
from quant import NF4Linear, quantize_nf4
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


def test_wilson_is_the_interval_of_the_textbook():
    """The ends p solve (p - k/n)^2 = z^2 p (1 - p) / n; 47 of 50 is 84 to 98 %."""
    for k, n in ((47, 50), (0, 50), (50, 50), (1, 3)):
        row = wilson(k, n)
        for p in (row["low"], row["high"]):
            assert (p - k / n) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)
    assert [round(100 * wilson(47, 50)[end]) for end in ("low", "high")] == [84, 98]
    assert wilson(0, 0)["high"] == 1


def test_matched_ratio_counts_tokens_in_order():
    """Of 1 2 3 4, the reply 1 9 3 4 has three; another order or nothing at all has fewer."""
    assert matched_ratio([1, 2, 3, 4], [1, 9, 3, 4]) == 3 / 4
    assert matched_ratio([1, 2, 3, 4], [3, 4, 1, 2]) == 2 / 4
    assert matched_ratio([1, 2], []) == 0 and matched_ratio([1, 2], [0, 1, 2, 3]) == 1


def test_an_action_is_the_same_whatever_the_thought():
    """Replies agree if their parsed actions do; where the teacher took none, if the texts do."""
    os_task, any_task = TASKS["os"], TASKS["any"]
    assert same_action(os_task, "Think: a\n\nAct: answer(7)", "Think: b\n\nAct: answer(7)")
    assert not same_action(os_task, "Act: answer(8)", "Act: answer(7)")
    assert same_action(os_task, "Hello.", "Hello.") and not same_action(os_task, "Hi.", "Hello.")
    assert same_action(any_task, "yes", "yes") and not same_action(any_task, "yes", "no")


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


def test_requests_pay_once_they_saved_what_was_spent():
    """10 s spent, 0.4 s saved a request: after 25. Nothing saved: never."""
    slow, fast = {"rounds": [0.5] * 9}, {"rounds": [0.1] * 9}
    assert requests_to_pay(10, slow, fast) == 25
    assert requests_to_pay(10, fast, slow) == requests_to_pay(10, fast, fast)
    assert requests_to_pay(10, fast, slow) == "never: use prefix caching"


def test_rounds_that_disagree_give_no_verdict():
    """Faster in 8 of 9 rounds is told apart (p = 20 / 512), in 7 of 9 it is not (p = 92 / 512)."""
    rival = {"rounds": [0.5] * 9}
    eight, seven = ({"rounds": [0.4] * n + [0.6] * (9 - n)} for n in (8, 7))
    assert sign_test(8, 1) == pytest.approx(20 / 512) and sign_test(2, 7) == pytest.approx(92 / 512)
    assert requests_to_pay(10, rival, eight) in (100, 101)  # 0.5 - 0.4 is a little below 0.1
    assert requests_to_pay(10, rival, seven) == "no verdict: faster in 7 of 9 rounds"


def test_two_runs_are_compared_input_by_input():
    """3 inputs only ours, 1 only theirs, of 10: +20 points; p = 2 (1 + 4) / 2^4, by hand."""
    ours = [True] * 8 + [False] * 2
    theirs = [True] * 5 + [False] * 3 + [True, False]
    found = paired_difference(ours, theirs)
    assert found["difference"] == pytest.approx(0.2)
    assert (found["only_ours"], found["only_theirs"]) == (3, 1)
    assert found["p"] == pytest.approx(2 * (1 + 4) / 16)
    assert found["low"] < 0.2 < found["high"]
    turned = paired_difference(theirs, ours)
    assert turned["p"] == found["p"] and turned["difference"] == pytest.approx(-0.2)


def test_a_difference_of_many_pairs_can_be_told():
    """10 inputs only ours and none theirs: p = 2 / 2^10, and the interval leaves 0 out."""
    found = paired_difference([True] * 40, [True] * 30 + [False] * 10)
    assert found["p"] == pytest.approx(2 / 1024) and found["low"] > 0
    same = paired_difference([True, False] * 9, [True, False] * 9)
    assert (same["p"], same["low"], same["high"]) == (1, 0, 0)


def test_ways_are_compared_on_the_same_weights(monkeypatch):
    """Dense weights thrice as fast as NF4 say nothing for the adapter: it pays only where a prompt
    on the same weights is slower, and never where it is not.
    """
    torch.manual_seed(0)
    model = Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048)).eval()
    for layer in model.model.layers:
        for parent, name in ((layer.mlp, "up_proj"), (layer.self_attn, "q_proj")):
            weight = quantize_nf4(getattr(parent, name).weight)
            setattr(parent, name, NF4Linear(weight))
    lora.add_lora(model, 2, 4, 0.0)

    def timed(model, ids, prefix=None):
        packed = any(isinstance(m, NF4Linear) for m in model.modules())
        later = 0.03 if packed else 0.01
        return later * (2 if len(ids) > 100 else 1), later  # only the full prompt is slower to read

    monkeypatch.setattr(evaluate, "time_request", timed)
    prompt = parse_prompt("Say Act: first. " * 40)
    found = evaluate.break_even(model, CHAT, prompt, [RECORD], spent=10, users=8)
    for name, saved in (("trained", 0.03), ("dense", 0.01)):
        pays = found[name]["pays_after_requests"]
        assert pays["full_prompt"] == pytest.approx(10 / saved, abs=1)
        assert pays["cached_prompt"] == "never: use prefix caching"
    assert set(found["trained"]) - {"pays_after_requests"} == {
        "full_prompt", "cached_prompt", "adapter"
    }  # fmt: skip
    assert set(found["dense"]) - {"pays_after_requests"} == {
        "full_prompt", "cached_prompt", "merged"
    }  # fmt: skip


def test_a_cached_prompt_is_held_once_for_all_users(model):
    """8 users of 20 tokens over 100 shared ones hold 100 + 8 * 20 tokens, not 8 * 120."""
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    expected = {"kv_bytes": 120 * token, "kv_bytes_in_flight": 260 * token}
    assert evaluate.kv_bytes(model, shared=100, own=20, users=8) == expected


def test_a_request_is_its_first_token_and_the_others():
    """Rounds of (1, 0.5) and (3, 0.5): 1 or 3 s, then 14 times 0.5 s for a reply of 15 tokens."""
    row = evaluate.request([(1.0, 0.5), (3.0, 0.5)], reply=15)
    assert row["rounds"] == [8.0, 10.0] and row["seconds_per_request"] == 9.0
    assert (row["seconds_to_first_token"], row["tokens_per_second"]) == (2.0, 2.0)


def test_only_held_out_records_that_fit_are_measured():
    """The last records are held out; one that overfills the context is not measured."""
    run = SimpleNamespace(folder="runs/x", samples=2, held_out=2)
    records = [Record(i, f"x{i}", ["a"], overlong=i == 3) for i in range(4)]
    assert held_out_records(run, records) == [records[2]]
    with pytest.raises(ValueError, match="no held-out record fits"):
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
