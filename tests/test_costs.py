"""What a request costs and when training has paid, by hand."""

from pathlib import Path

import pytest
import torch

import costs
import lora
from chat import Chat
from costs import requests_to_pay
from model import Config, Llama
from prompt import parse_prompt
from quant import NF4Linear, quantize_nf4
from runs import Record
from stats import sign_test

CHAT = Chat(Path(__file__).resolve().parent.parent / "tiny", 2048)
TURNS = ["Act: bash", "The output is 7", "Act: answer(7)"]
RECORD = Record(0, "Count the files.", TURNS, "Use ls.", "It acts.")


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

    monkeypatch.setattr(costs, "time_request", timed)
    prompt = parse_prompt("Say Act: first. " * 40)
    found = costs.break_even(model, CHAT, prompt, [RECORD], spent=10, users=8)
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


def test_a_cached_prompt_is_held_once_for_all_users():
    """8 users of 20 tokens over 100 shared ones hold 100 + 8 * 20 tokens, not 8 * 120."""
    model = Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048))
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    expected = {"kv_bytes": 120 * token, "kv_bytes_in_flight": 260 * token}
    assert costs.kv_bytes(model, shared=100, own=20, users=8) == expected


def test_a_request_is_its_first_token_and_the_others():
    """Rounds of (1, 0.5) and (3, 0.5): 1 or 3 s, then 14 times 0.5 s for a reply of 15 tokens."""
    row = costs.request([(1.0, 0.5), (3.0, 0.5)], reply=15)
    assert row["rounds"] == [8.0, 10.0] and row["seconds_per_request"] == 9.0
    assert (row["seconds_to_first_token"], row["tokens_per_second"]) == (2.0, 2.0)
