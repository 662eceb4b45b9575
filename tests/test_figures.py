"""Figures 3 and 4: counts from a shape are those of a running model; turns by hand; the command."""

import json
import xml.etree.ElementTree as xml

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import lora
from experiments.figures import (
    SHAPES,
    counts,
    fitting,
    in_percent,
    medians,
    reading,
    saved,
    talks,
    time_talk,
    way_name,
)  # fmt: skip
from experiments.macs import Talk, pass_macs, talk_macs, turn_macs
from model import Config, KVCache, Llama, prefill

SMALL = Config(60, 32, 48, 2, 4, 2, 16)
IDS = torch.arange(50)[None]
LAST = torch.arange(50)[None] == 49
TALK = Talk(prompt=20, read=5, written=3)


def small_model() -> Llama:
    torch.manual_seed(0)
    return Llama(SMALL).eval().requires_grad_(False)


def flops(work) -> int:
    """What PyTorch counts; the fused attention of a CPU is unknown to it, so it is taken apart."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        work()
    return counter.get_total_flops()


def test_a_pass_is_counted_as_pytorch_counts_it():
    """Two FLOPs a MAC: of a text with all its logits; of its end behind a cache; of one token."""
    model = small_model()
    assert flops(lambda: model(IDS)) == 2 * pass_macs(SMALL, 50, 0, logits=50)
    prefix = prefill(model, list(range(40)))
    cache = KVCache(model, 1, 51, prefix)
    assert flops(lambda: model(IDS, cache, LAST)) == 2 * pass_macs(SMALL, 50, 40)
    cache.advance(50)
    assert flops(lambda: model(IDS[:, :1], cache)) == 2 * pass_macs(SMALL, 1, 90)


def test_an_adapter_that_is_not_merged_is_counted(monkeypatch):
    """R (inputs + outputs) more in each linear map."""
    model = small_model()
    lora.add_lora(model, 3, 6, 0.0)
    monkeypatch.setattr(lora.LoRALinear, "forward", lora.LoRALinear.by_definition)
    assert flops(lambda: model(IDS)) == 2 * pass_macs(SMALL, 50, 0, logits=50, rank=3)


@pytest.mark.parametrize("way", talks(TALK).items(), ids=lambda way: way_name(*way[0]))
def test_a_conversation_is_counted_as_it_runs(way):
    """Each way to hold p and history, turn after turn, through the code that is timed."""
    _, talk = way
    model = small_model()
    filling = talk.prompt if talk.cached_prompt else 0  # the cache of p is filled beforehand
    found = flops(lambda: time_talk(model, talk))
    assert found == 2 * (talk_macs(SMALL, talk) + pass_macs(SMALL, filling, 0, logits=0))


def test_what_a_turn_reads():
    """p of 20 tokens, 5 read and 3 written a turn: (new, cached) by hand."""
    by_hand = {
        ("full", False, True): [(25, 0), (5, 28), (5, 36)],
        ("full", True, True): [(5, 20), (5, 28), (5, 36)],
        ("full", False, False): [(25, 0), (33, 0), (41, 0)],
        ("full", True, False): [(5, 20), (13, 20), (21, 20)],
        ("half", True, True): [(5, 10), (5, 18), (5, 26)],
        ("adapter", False, True): [(5, 0), (5, 8), (5, 16)],
        ("adapter", False, False): [(5, 0), (13, 0), (21, 0)],
    }
    ways = talks(TALK)
    assert {key: [ways[key].passes(turn) for turn in range(3)] for key in by_hand} == by_hand
    assert len(ways) == 10


def test_a_turn_is_one_pass_and_one_for_each_token():
    """5 tokens behind 28, then one behind 33, 34 and 35."""
    passes = [(5, 28), (1, 33), (1, 34), (1, 35)]
    assert turn_macs(SMALL, TALK, 1) == sum(pass_macs(SMALL, *each) for each in passes)


@pytest.mark.parametrize(
    ("name", "parameters"), [("Llama 3 8B", 8_030_261_248), ("Llama 3.2 1B", 1_235_814_400)]
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = Llama(SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_39_percent_are_the_pass_of_the_prompt():
    """8B: about 39 % if p is read, 4.4 % if it is cached, and the page says with which turns."""
    config, talk = SHAPES["Llama 3 8B"], Talk(1285, 370, 60)
    rows = counts(config, talk)
    assert saved(rows, "full", False, True) == pytest.approx(0.39, abs=0.005)
    assert saved(rows, "full", True, True) == pytest.approx(0.044, abs=0.001)
    fit = fitting(config, talk, 0.39)
    shares = [saved(counts(config, Talk(1285, n, 60)), "full", False, True) for n in (fit - 1, fit)]
    assert shares[0] > 0.39 >= shares[1]
    assert f"at {fit} tokens read a turn" in reading(config, talk)
    assert "tokens read a turn" not in reading(config, Talk(3, 370, 60))  # 39 % of nothing


def test_rounds_are_told_by_their_median_and_extremes():
    """The adapter takes 1 s, p 2, 4 and 10 s: it saves 50, 75 and 90 %."""
    rounds = [
        {("adapter", False, True): [1.0], ("full", False, True): [x]} for x in (2.0, 10.0, 4.0)
    ]
    assert medians(rounds)["full", False, True] == [4.0]
    assert in_percent(rounds, ("full", False, True)) == "75.0 % (50.0 to 90.0)"
    assert in_percent(rounds[:1], ("full", False, True)) == "50.0 %"
    assert in_percent(rounds, ("adapter", False, True)) == ""


def test_the_command_writes_tables_and_a_picture(checkpoint, tmp_path, capsys):
    """Three counts and a measurement, ten ways each; the SVG has two rows of panels."""
    flags = f"figures --model {checkpoint} --out {tmp_path}/new --prompt-tokens 30 --read 4"
    assert evaluate.main([*flags.split(), *"--written 2 --turns 3 --rounds 2".split()]) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "new/figures.md").read_text()
    assert page.count("| full prompt cached, history read again |") == 4
    found = json.loads((tmp_path / "new/figures.json").read_text())["costs"]
    assert list(found) == ["random", "Llama 3.2 1B", "Llama 3 8B", "random, measured"]
    assert {len(rows) for each in found.values() for rows in each["rounds"]} == {10}
    assert [len(each["rounds"]) for each in found.values()] == [1, 1, 1, 2]
    measured = found["random, measured"]["rounds"][1].values()
    assert all(len(turns) == 3 and min(turns) > 0 for turns in measured)
    picture = xml.parse(tmp_path / "new/figures.svg").getroot()
    places = [g.get("transform") for g in picture.iter("{http://www.w3.org/2000/svg}g")]
    assert len(places) == 8 and places[4] == "translate(60,330)"


def test_counts_alone(checkpoint, tmp_path, capsys):
    """--rounds 0 measures nothing, and three panels stand in a row."""
    flags = f"figures --model {checkpoint} --out {tmp_path} --rounds 0"
    assert evaluate.main(flags.split()) == 0
    assert "measured" not in capsys.readouterr().out
    assert evaluate.main([*flags.split(), "--read", "0"]) == 2
    assert "--read: 0 is out of range" in capsys.readouterr().err
