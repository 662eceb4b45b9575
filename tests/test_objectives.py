"""What the paper compares GenPI with: each objective by hand, on three words or a small LLaMA."""

from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from test_loss import LargestTensor, target_text

import attention
import genpi
import lora
import loss
import objectives
import runs
import show
import synth
import train as room
from chat import Chat
from loss import IGNORE, batch_nll, pg_sequence, sft_sequence, teacher_sequence
from model import Config, Llama
from objectives import (
    SlicedKL,
    Twin,
    batch_kl,
    batch_nll_and_kl,
    check_flags,
    conversation_sequence,
    in_words,
    prepend,
    token_kl,
)
from prompt import Prompt
from runs import Record, read_metrics
from train import Recipe, train, train_step, training_sequences

CHAT = Chat(Path(__file__).resolve().parent.parent / "tiny", 2048)
PROMPT = Prompt("Say Act: first.")
RECORD = Record(0, "Count the files.", ["Act: bash", "It is 7", "Act: answer(7)"], "Use ls.", "So.")
SHORT = Record(1, "Name a tree.", ["Oak."], "I like trees.", "It is one word, since p says so.")
RECIPE = Recipe(lr=1e-2, epochs=4, batch=2, seed=3, micro_tokens=300, save_every=3)
END = "<|eot_id|>"


def small_model() -> Llama:
    """A random LLaMA of one layer with a LoRA adapter that changes it."""
    torch.manual_seed(0)
    model = Llama(Config(1792, 32, 48, 1, 2, 2, 16, 2048))
    lora.add_lora(model, rank=4, alpha=8, dropout=0.0)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model


def twins(*records: Record) -> list[Twin]:
    return [conversation_sequence(CHAT, PROMPT, record, "kld") for record in records]


def gradient(model: Llama, cost: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(cost, lora.adapter_parameters(model))
    return torch.cat([each.flatten() for each in found])


# -------------------------------------------------------------------------------- kld, by hand

P = torch.tensor([1 / 2, 1 / 4, 1 / 4])
Q = torch.tensor([1 / 8, 1 / 8, 3 / 4])


def test_kl_by_hand():
    """KL(P || Q) = 1/2 log 4 + 1/4 log 2 - 1/4 log 3, where the teacher is P; two places add up."""
    by_hand = log(4) / 2 + log(2) / 4 - log(3) / 4
    assert token_kl(P.log()[None], Q.log()[None]).item() == pytest.approx(by_hand)
    assert token_kl(P.log().expand(2, 3), Q.log().expand(2, 3)).item() == pytest.approx(2 * by_hand)


def test_kl_is_forward():
    """With the roles changed it is 3/4 log 3 - 1/8 log 4 - 1/8 log 2: another number."""
    other = 3 * log(3) / 4 - log(4) / 8 - log(2) / 8
    assert token_kl(Q.log()[None], P.log()[None]).item() == pytest.approx(other)
    assert other != pytest.approx(log(4) / 2 + log(2) / 4 - log(3) / 4)


def test_kl_to_a_teacher_that_is_sure_is_its_nll():
    """If P(b) = 1 then KL(P || Q) = - log Q(b) = log 8."""
    sure = torch.tensor([[-1e4, 0.0, -1e4]])
    assert token_kl(sure, Q.log()[None]).item() == pytest.approx(log(8))


def test_kl_of_equals_is_zero_and_its_gradient_is_q_minus_p():
    """KL(P || P) = 0; d KL / d logits = Q - P, and logits may be shifted by a constant."""
    assert token_kl(P.log()[None] + 5, P.log()[None]).item() == pytest.approx(0, abs=1e-6)
    logits = Q.log()[None].requires_grad_()
    token_kl(P.log()[None], logits).backward()
    torch.testing.assert_close(logits.grad[0], Q - P)


@pytest.mark.parametrize("needs", ["x", "W", "xW"])
@pytest.mark.parametrize("at_a_time", [1, 2, 5, 100])
def test_slices_give_the_kl_and_gradient_of_all_logits(monkeypatch, at_a_time, needs):
    """SlicedKL(x, W, taught, U) is token_kl(taught U^T, x W^T), however many rows at a time."""
    torch.manual_seed(0)
    W, U = 3 * torch.randn(2, 11, 6)
    taught = torch.randn(9, 6)
    tensors = {"x": torch.full((9, 6), 0.5).cumsum(0), "W": W}
    given = [tensors[name].requires_grad_() for name in needs]
    monkeypatch.setitem(loss.SLICE, "cpu", 3 * 11 * at_a_time)
    whole = token_kl(taught @ U.T, tensors["x"] @ W.T)
    sliced = SlicedKL.apply(tensors["x"], W, taught, U)
    expected, found = (torch.autograd.grad(3 * nats, given) for nats in (whole, sliced))
    assert expected[0].abs().max() > 1
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def kl_by_hand(model: Llama, record: Record) -> torch.Tensor:
    """sum_t sum_v P(v) (log P(v) - log Q(v)): P of the base behind p, Q of the adapter without."""
    bare = sft_sequence(CHAT, record)
    prompted = teacher_sequence(CHAT, PROMPT, record)
    log_q = model(torch.tensor([bare.ids]))[0].log_softmax(-1)
    with torch.no_grad(), lora.adapter_off(model):
        log_p = model(torch.tensor([prompted.ids]))[0].log_softmax(-1)
    places = [[t for t, label in enumerate(s.labels) if label != IGNORE] for s in (bare, prompted)]
    nats = 0.0
    for t, u in zip(*places, strict=True):
        assert bare.ids[t] == prompted.ids[u]
        nats += (log_p[u - 1].exp() * (log_p[u - 1] - log_q[t - 1])).sum()
    return nats


def test_kld_of_two_conversations():
    """Place by place: what the base says behind p, at the token that the adapter is asked for."""
    model = small_model()
    by_hand = kl_by_hand(model, RECORD) + kl_by_hand(model, SHORT)
    found = batch_kl(model, twins(RECORD, SHORT))
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4) and by_hand > 0.01
    expected = gradient(model, by_hand)
    torch.testing.assert_close(gradient(model, found), expected, rtol=1e-3, atol=1e-5)
    assert all(layer.enabled for layer in lora.lora_layers(model).values())


def test_kld_without_adapter_or_prompt_is_zero():
    """An adapter that changes nothing, taught by the base without p, has nothing to learn."""
    model = small_model()
    for layer in lora.lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_B)
    bare = sft_sequence(CHAT, RECORD)
    assert batch_kl(model, [Twin(bare.ids, bare.labels, bare)]).item() == pytest.approx(0, abs=1e-5)
    assert batch_kl(model, twins(RECORD)).item() > 1e-4


def test_seqkd_and_kld_are_a_sum():
    """seqkd+kld is -log P of yT plus kld, in value and in gradient."""
    model = small_model()
    some = twins(RECORD, SHORT)
    both = batch_nll_and_kl(model, some)
    apart = batch_nll(model, some) + batch_kl(model, some)
    assert both.item() == pytest.approx(apart.item(), rel=1e-6)
    expected = gradient(model, apart)
    torch.testing.assert_close(gradient(model, both), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 10_000])
@pytest.mark.parametrize("objective", ["kld", "seqkd+kld"])
def test_a_step_descends_the_mean_over_all_target_tokens(objective, tokens):
    """Nats of the batch over its target tokens, in any micro-batch; that is logged as well."""
    model = small_model()
    some = twins(RECORD, SHORT)
    nats = kl_by_hand(model, RECORD) + kl_by_hand(model, SHORT)
    if objective == "seqkd+kld":
        nats = nats + batch_nll(model, some)
    mean = nats / sum(twin.n_targets for twin in some)
    expected = gradient(model, mean)
    recipe = Recipe(lam=1.0, objective=objective, clip=1e9, micro_tokens=tokens)
    optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
    losses = train_step(model, optimizer, some, [], recipe)
    found = torch.cat([p.grad.flatten() for p in lora.adapter_parameters(model)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert losses[:2] == pytest.approx((mean.item(), 0), rel=1e-4)


def test_kld_never_holds_more_than_a_slice(monkeypatch):
    """No tensor of the forward or backward pass has the size of target tokens x vocabulary."""
    monkeypatch.setattr(attention, "CHUNK", 16)  # whose scores are another matter
    model = small_model()
    record = replace(SHORT, turns=["yes " * 400])
    monkeypatch.setitem(loss.SLICE, "cpu", 24 * 1792)
    some = twins(record)
    weights = 1792 * 32  # lm_head and embedding
    with LargestTensor() as largest:
        batch_kl(model, some).backward()
    assert some[0].n_targets > 400 and largest.numbers == weights


# ------------------------------------------------------------------------- sft, pg and seqkd


def trained(folder: Path, **changes) -> torch.Tensor:
    """The adapter after two steps on two records."""
    folder.mkdir()
    recipe = replace(RECIPE, epochs=2, **changes)
    model = small_model()
    pairs = training_sequences(CHAT, PROMPT, [RECORD, SHORT], recipe.lam, recipe.objective)
    train(model, *pairs, recipe, folder)
    return torch.cat([p.detach().flatten() for p in lora.adapter_parameters(model)])


def test_names_of_both_ends_of_lam(tmp_path):
    """seqkd is sft is --lam 1, and pg is --lam 0, to the bit; kld is something else."""
    sft = trained(tmp_path / "a", objective="genpi", lam=1.0)
    assert torch.equal(trained(tmp_path / "b", objective="sft", lam=1.0), sft)
    assert torch.equal(trained(tmp_path / "c", objective="seqkd", lam=1.0), sft)
    assert not torch.equal(trained(tmp_path / "d", objective="kld", lam=1.0), sft)
    pg = trained(tmp_path / "e", objective="genpi", lam=0.0)
    assert torch.equal(trained(tmp_path / "f", objective="pg", lam=0.0), pg)


# ----------------------------------------------------------------------------- what L_PG writes


@pytest.mark.parametrize(
    ("target", "written", "read"),
    [
        ("prompt+reason", "Say Act: first.\n\nReason: So.", []),
        ("prompt", "Say Act: first.", []),
        ("reason", "So.", []),
        ("reason-given-prompt", "So.", ["Say Act: first."]),
        ("prompt-given-reason", "Say Act: first.", ["So."]),
    ],
)
def test_what_pg_writes_and_what_it_reads(target, written, read):
    """The answer with its end is the target; x, yS_0, yT_0 and what is given stand before it."""
    sequence = objectives.pg_sequence(CHAT, PROMPT, RECORD, target)
    assert target_text(sequence) == f"{written}{END}"
    question = objectives.pg_messages(PROMPT, RECORD, target)[1]["content"]
    places = [question.index(part) for part in ("Count the files.", "Use ls.", "Act: bash", *read)]
    assert places == sorted(places)
    assert [part for part in ("Say Act: first.", "So.", "It is 7") if part in question] == read


def test_the_default_is_equation_3():
    """prompt+reason is the sequence of loss.py."""
    expected = pg_sequence(CHAT, PROMPT, RECORD)
    assert objectives.pg_sequence(CHAT, PROMPT, RECORD, "prompt+reason") == expected


@pytest.mark.parametrize("target", runs.PG_TARGETS)
def test_a_cut_reason_has_no_ending_but_a_prompt_has(target):
    """Where r comes last and was cut, its end of turn is no target; p is always whole."""
    sequence = objectives.pg_sequence(CHAT, PROMPT, replace(RECORD, cut_reason=True), target)
    assert target_text(sequence).endswith(END) == (target in ("prompt", "prompt-given-reason"))


def test_braces_in_a_text_stay():
    """p and r may hold what looks like a place of the question."""
    prompt = Prompt("Write {r} and {record.index}.")
    sequence = objectives.pg_sequence(CHAT, prompt, RECORD, "prompt-given-reason")
    assert target_text(sequence) == f"Write {{r}} and {{record.index}}.{END}"


# ------------------------------------------------------------------------------------- prepend


def test_prepend_has_p_in_the_context_with_its_probability():
    """1: always, 0: never, 1/2: 400 +- 60 of 800 draws; what is trained is in both cases yT."""
    some = twins(RECORD, SHORT)
    both = [teacher_sequence(CHAT, PROMPT, r) for r in (RECORD, SHORT)]
    bare = [sft_sequence(CHAT, r) for r in (RECORD, SHORT)]
    assert prepend(some, 1.0, 0, 0) == both and prepend(some, 0.0, 0, 0) == bare
    drawn = [prepend(some, 0.5, 0, step) for step in range(400)]
    with_p = [[each == whole for each, whole in zip(s, both, strict=True)] for s in drawn]
    assert 340 < sum(map(sum, with_p)) < 460
    assert {tuple(each) for each in with_p} == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_p_always_prepended_is_fine_tuning_with_p():
    """The cost is - sum_t log P(y_t | p, x, y_<t), of the adapter itself and token by token."""
    model = small_model()
    prompted = teacher_sequence(CHAT, PROMPT, RECORD)
    log_p = model(torch.tensor([prompted.ids]))[0].log_softmax(-1)
    places = [t for t, label in enumerate(prompted.labels) if label != IGNORE]
    by_hand = -sum(log_p[t - 1, prompted.ids[t]] for t in places)
    found = objectives.cost_of("prepend")(model, prepend(twins(RECORD), 1.0, 0, 0))
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert target_text(prompted).count(END) == 2  # both turns of the agent


def test_prepend_draws_the_same_again():
    """Seed and number of the step decide the draw, whatever was drawn before."""
    some = twins(*[RECORD, SHORT] * 20)
    assert prepend(some, 0.5, 0, 7) == prepend(some, 0.5, 0, 7)
    assert prepend(some, 0.5, 0, 7) != prepend(some, 0.5, 0, 8)
    assert prepend(some, 0.5, 0, 7) != prepend(some, 0.5, 1, 7)


RECORDS = [replace(SHORT, index=i, pseudo_input=f"Name tree {i}.") for i in range(5)]


def batches(folder: Path, monkeypatch, objective: str, stop_at: int = 0) -> list[list]:
    """The SFT batch that train() gives to train_step in each step; nothing is done with it.

    stop_at: pull the plug in that step.
    """
    seen = []

    def note(model, optimizer, sft, pg, recipe, drawn):
        if len(seen) + 1 == stop_at:
            raise SystemError("power cut")
        seen.append(sft)
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(room, "train_step", note)
    folder.mkdir(exist_ok=True)
    recipe = replace(RECIPE, objective=objective, lam=1.0, prepend_prob=0.5)
    pairs = training_sequences(CHAT, PROMPT, RECORDS, 1.0, objective)
    try:
        train(small_model(), *pairs, recipe, folder)
    except SystemError:
        pass
    return seen


def test_a_resumed_training_prepends_the_same(tmp_path, monkeypatch):
    """After a power cut in step 8 the steps from the checkpoint at 6 on have the same batches."""
    whole = batches(tmp_path / "whole", monkeypatch, "prepend")
    batches(tmp_path / "cut", monkeypatch, "prepend", stop_at=8)
    rest = batches(tmp_path / "cut", monkeypatch, "prepend")
    assert len(whole) == 10 and rest == whole[6:]


def test_all_objectives_see_the_same_batches(tmp_path, monkeypatch):
    """On the same records the samples come in the same order, whatever is done with them."""

    def inputs(objective):
        steps = batches(tmp_path / objective, monkeypatch, objective)
        texts = [[CHAT.decode(s.ids) for s in batch] for batch in steps]
        return [[[f"tree {i}." in text for i in range(5)] for text in batch] for batch in texts]

    expected = inputs("genpi")
    assert len(expected) == 10
    assert all(inputs(objective) == expected for objective in runs.OBJECTIVES[1:])


# --------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("objective", ["prepend", "kld", "seqkd+kld"])
def test_a_conversation_that_does_not_fit_with_p_is_left_out(objective, capsys):
    """The context must hold the conversation with p; without it SFT trains on both."""
    prompt = Prompt("Say Act: first. " * 9)
    long = replace(SHORT, pseudo_input="Name a tree. " * 9)
    chat = Chat(Path(genpi.__file__).parent / "tiny", 2048)
    chat.context = len(teacher_sequence(chat, prompt, long)) - 1
    sft, _ = training_sequences(chat, prompt, [RECORD, long], 1.0, objective)
    assert [twin.bare for twin in sft] == [sft_sequence(chat, RECORD)]
    assert "left out: 1 of 2 records do not fit the context" in capsys.readouterr().out
    assert len(training_sequences(chat, prompt, [RECORD, long], 1.0, "sft")[0]) == 2


# ----------------------------------------------------------------------------- command and flags


def test_two_objectives_on_the_same_records(checkpoint, tmp_path, monkeypatch, capsys):
    """--records hands them on; the choice is in args.json, and the folder takes no other."""
    monkeypatch.setattr(genpi, "report", lambda *_, before: None)
    monkeypatch.setattr(synth, "more_inputs", lambda *_: ["Count to 3.", "Name a tree.", "Say no."])
    (tmp_path / "p.txt").write_text("Answer in one word.\n")
    flags = f"""--samples 2 --held-out 1 --epochs 1 --batch 2 --max-new-tokens 4 --rank 2
    --max-reason-tokens 4 --device cpu --model {checkpoint} --prompt {tmp_path / "p.txt"}""".split()
    first, second = tmp_path / "genpi", tmp_path / "kld"
    other = [*flags, "--out", str(second), "--records", str(first), "--objective"]
    assert genpi.main([*flags, "--out", str(first)]) == 0
    assert genpi.main([*other, "seqkd+kld"]) == 0
    assert (first / "data.jsonl").read_bytes() == (second / "data.jsonl").read_bytes()
    run = runs.load_run(second, "cpu")
    assert (run.objective, run.lam, run.pg_target) == ("seqkd+kld", 1.0, "prompt+reason")
    names = [name for name, _ in show.sequences(run, CHAT, RECORD)]
    assert names[:2] == ["seqkd+kld, of the adapter", "seqkd+kld, of its teacher"]
    row = read_metrics(second / "metrics.jsonl")[0]
    assert row["sft"] > 0 and row["pg"] == 0
    capsys.readouterr()
    assert genpi.main([*other, "kld"]) == 2
    told = capsys.readouterr().err
    assert "objective seqkd+kld (now kld)" in told and "--out" in told


@pytest.mark.parametrize(
    ("flags", "lam"),
    [("", 0.7), ("--lam 0.3", 0.3), ("--objective pg", 0), ("--objective kld --lam 1", 1)]
    + [(f"--objective {name}", 1) for name in ("sft", "prepend", "seqkd", "seqkd+kld")],
)
def test_an_objective_has_its_lam(flags, lam):
    """All but genpi fix the weight of L_SFT; the recipe has both."""
    args = genpi.parse_flags(flags.split())
    recipe = genpi.open_recipe(args)
    assert recipe.lam == lam and recipe.objective == args.objective


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--objective kdl", ["kdl", "seqkd+kld"]),
        ("--objective sft --lam 0.5", ["--lam 0.5", "1 of --objective sft", "leave it out"]),
        ("--objective pg --lam 1", ["--lam 1", "0 of --objective pg", "leave it out"]),
        ("--objective sft --pg-target prompt", ["--pg-target prompt", "--objective sft"]),
        ("--objective kld --pg-target reason", ["--pg-target reason", "--objective kld"]),
        ("--lam 1 --pg-target prompt", ["--pg-target prompt", "--lam 1", "leave it out"]),
        ("--pg-target all", ["all", "prompt+reason"]),
        ("--prepend-prob 0.5", ["--prepend-prob 0.5", "--objective prepend", "genpi"]),
        ("--objective sft --prepend-prob 1", ["--prepend-prob 1", "--objective prepend"]),
        ("--objective prepend --prepend-prob 2", ["2", "0 to 1"]),
    ],
)
def test_what_makes_no_sense_together(flags, words, capsys):
    """One line names the flag, the limit and the cure."""
    assert genpi.main(flags.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert [word for word in words if word not in told] == []


def test_flags_that_fit():
    """What is computed may be chosen, and a default is no contradiction."""
    check_flags("genpi", 0.7, {"pg_target": "reason"})
    check_flags("pg", 0.0, {"pg_target": "prompt"})
    check_flags("prepend", 1.0, {"prepend_prob": 0.5})


def test_an_older_folder_is_of_genpi():
    """A folder whose flags know no objective goes on as genpi, and with no other objective."""
    now = vars(genpi.parse_flags(["--dtype", "float32"])) | {"generator": None}
    before = {name: value for name, value in now.items() if name not in runs.LATER}
    assert len(before) < len(now) and runs.changed_flags(now, before) == []
    other = now | {"objective": "kld", "lam": 1.0}
    assert runs.changed_flags(other, before) == ["lam 0.7 (now 1.0)", "objective genpi (now kld)"]


def test_what_the_report_says():
    """The head line names what was descended, as before where nothing else was chosen."""
    plain = ("prompt+reason", 1.0)
    assert in_words("genpi", 0.7, *plain) == "lam 0.7"
    assert in_words("genpi", 0.7, "prompt", 1.0) == "lam 0.7, L_PG writes prompt"
    assert in_words("seqkd+kld", 1.0, *plain) == "objective seqkd+kld"
    expected = "objective prepend (probability 0.5)"
    assert in_words("prepend", 1.0, "prompt+reason", 0.5) == expected
