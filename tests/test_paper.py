"""The list: what the paper fixes, one assertion a fact, beside the section that fixes it.

GenPI is arXiv 2411.15927; "code" is that of its authors, where the paper is silent; "ours" is what
this repository adds. To be read against the paper from top to bottom: method, synthesis, settings,
quality of the synthesis, measures. How each part works is proved in the test file of its room.

Left out: results, which a large model and the benchmarks decide.
"""

import math
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import agreement
import evaluate
import genpi
import lora
import runs
import train
from chat import Chat
from files import read_json, write_json
from loss import IGNORE, Sequence, pg_messages, pg_sequence, sft_sequence
from model import Config, Llama
from prompt import ASSISTANT, END, START, TASKS, conversation, message, parse_prompt
from quant import NF4Linear
from runs import Record, append_record
from sampler import Sampling, Voice
from synth import Plan, quality, synthesise, synthesise_wave
from train import Recipe, train_step

PROMPT = parse_prompt(
    "<USER>:\nRules.\n<AGENT>:\nYes.\n<USER>:\nOld problem.\n<AGENT>:\nAct: finish\n<USER>:\n"
    "Solve: {user_input}"
)
DEMOS = tuple(f"Demonstration {number}." for number in range(5))
COMMAND = "Act: bash\n\n```bash\nls\n```"
SEEN = "a b c"
ANSWER = "Act: answer(3)"
X = "Count the files."
BARE = [message("system", ASSISTANT), message("user", X)]  # x without p
RECORD = Record(0, X, [COMMAND, SEEN, ANSWER], "Use ls.", "It acts.")

CHAT = Chat(Path(__file__).resolve().parent.parent / "tiny", 2048)
EOT = "<|eot_id|>"
SPEAKERS = ("agent", "environment", "student")


def targets(sequence: Sequence) -> str:
    """The text of the labelled tokens, with the control tokens written out."""
    labelled = [label for label in sequence.labels if label != IGNORE]
    return CHAT.tokenizer.decode(labelled, skip_special_tokens=False)


def base_model() -> Llama:
    torch.manual_seed(0)
    return Llama(Config(1792, 32, 48, 2, 2, 2, 16, 2048)).eval()


def adapted_model() -> Llama:
    """The same base with an adapter that changes it."""
    model = lora.add_lora(base_model())
    for parameter in lora.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def nats(model: Llama, sequence: Sequence) -> torch.Tensor:
    """-log P of each target, by hand: the token at place t from the logits at t - 1."""
    log_p = model(torch.tensor([sequence.ids]))[0].log_softmax(-1)
    places = [t for t, label in enumerate(sequence.labels) if label != IGNORE]
    return torch.stack([-log_p[t - 1, sequence.ids[t]] for t in places])


# ---------------------------------------------------------------------------- method: section 4


def test_eq_2_targets():
    """Eq. 2: every agent turn yT_i and its end is a target, no x, no env_i, no header (code)."""
    assert targets(sft_sequence(CHAT, RECORD)) == f"{COMMAND}{EOT}{ANSWER}{EOT}"


def test_eq_2_context():
    """Eq. 2: SFT reads x, yT_<i and env_<=i in this order, and no p. System message: ours."""
    assert sft_sequence(CHAT, RECORD).ids == CHAT.encode(conversation(BARE, RECORD.turns))[0]


def test_eq_3_targets():
    """Eq. 3: the target is p, then r, then its end: P(p, r | ...), not the other order."""
    assert targets(pg_sequence(CHAT, PROMPT, RECORD)) == f"{PROMPT.text}\n\nReason: It acts.{EOT}"


def test_eq_3_context():
    """Eq. 3: the question shows x, yS_0 and yT_0, no later turn and no p, to a plain assistant."""
    system, question, _ = pg_messages(PROMPT, RECORD)
    assert system == message("system", ASSISTANT) and question["role"] == "user"
    places = [question["content"].index(part) for part in (X, "Use ls.", COMMAND)]
    assert places == sorted(places)
    assert not any(part in question["content"] for part in (ANSWER, SEEN, "Rules."))


def test_eq_3_is_uncut():
    """Eq. 3 has all of p and r as its target. The code cuts them at 512 tokens, here nothing is."""
    long = parse_prompt("\n".join(f"Rule {i}." for i in range(900)))
    record = replace(RECORD, reason=" ".join(["So it is."] * 400))
    sequence = pg_sequence(CHAT, long, record)
    assert sequence.n_targets > 4096
    assert targets(sequence) == f"{long.text}\n\nReason: {record.reason}{EOT}"


def test_a_cut_text_is_not_taught_as_an_ending():
    """Ours: a last turn or reason that hit its limit of tokens has no end-of-turn target."""
    cut = replace(RECORD, cut_turn=True, cut_reason=True)
    assert targets(sft_sequence(CHAT, cut)) == f"{COMMAND}{EOT}{ANSWER}"
    assert targets(pg_sequence(CHAT, PROMPT, cut)).endswith("Reason: It acts.")


def test_eq_4():
    """Eq. 4: a step descends (1 - lam) L_PG + lam L_SFT at lam 0.7, each a mean over all targets
    of the batch, however it is cut into micro-batches (ours).
    """
    model = adapted_model()
    parameters = lora.adapter_parameters(model)
    records = [RECORD, replace(RECORD, turns=[ANSWER], reason="So it is. " * 9)]
    sft = [sft_sequence(CHAT, record) for record in records]
    pg = [pg_sequence(CHAT, PROMPT, record) for record in records]
    sft_mean = torch.cat([nats(model, sequence) for sequence in sft]).mean()
    pg_mean = torch.cat([nats(model, sequence) for sequence in pg]).mean()
    expected = torch.autograd.grad(0.3 * pg_mean + 0.7 * sft_mean, parameters)
    optimizer = torch.optim.SGD(parameters, 0.0)
    train_step(model, optimizer, sft, pg, Recipe(clip=1e9, micro_tokens=1))
    torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------- synthesis: section 5, A.1 and A.3


class Scribe:
    """A voice that answers a last message by script (None: any other), and notes what was asked."""

    def __init__(self, **says: dict[str | None, str]):
        self.says = says
        self.asked = defaultdict(list)  # speaker -> messages
        self.samplings = defaultdict(set)

    def fits(self, messages, max_new_tokens):
        return True

    def speak(self, conversations, sampling, seeds=None):
        for number, messages in enumerate(conversations):
            speaker = who_speaks(messages)
            self.asked[speaker].append(messages)
            self.samplings[speaker].add(sampling)
            says = self.says[speaker]
            yield number, says.get(messages[-1]["content"], says[None]), True


def who_speaks(messages: list[dict]) -> str:
    """Tell by what it reads whose turn it is."""
    last = messages[-1]["content"]
    if messages[0]["content"] != ASSISTANT:
        return "environment"
    if "Rules." in last:
        return "reason" if "Use ls." in last else "inputs"
    return "agent" if len(messages) > 2 else "student"


def plan_of(name: str) -> Plan:
    return Plan(PROMPT, replace(TASKS[name], demos=DEMOS), 2, 2048, 512, seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Two inputs, each with a command and an answer: records, and what both models were asked."""
    agent = {SEEN: ANSWER, None: COMMAND}
    environment = {ANSWER: END, None: SEEN}
    voice = Scribe(agent=agent, environment=environment, student={None: "Use ls."})
    listed = f"6. {X}\n7. Name the owner."
    generator = Scribe(inputs={None: listed}, reason={None: "It acts."})
    records = synthesise(voice, generator, plan_of("os"), tmp_path_factory.mktemp("synthesis"))
    return SimpleNamespace(records=records, voice=voice, generator=generator)


def test_who_says_what(made):
    """Section 5: one greedy model is agent, environment and student; a generator does the rest."""
    assert made.voice.samplings == dict.fromkeys(SPEAKERS, {Sampling(2048, temperature=0)})
    assert set(made.generator.asked) == {"inputs", "reason"}


def test_inputs_are_sampled(made):
    """A.1: pseudo inputs are drawn at temperature 1.0 with a nucleus of 0.9."""
    assert {(s.temperature, s.top_p) for s in made.generator.samplings["inputs"]} == {(1.0, 0.9)}


def test_inputs_come_from_the_prompt_and_demonstrations(made):
    """Section 5: the generator of inputs is shown p and five demonstrations."""
    question = made.generator.asked["inputs"][0][-1]["content"]
    assert PROMPT.text in question and all(demo in question for demo in DEMOS)
    assert [record.pseudo_input for record in made.records] == [X, "Name the owner."]


def test_the_teacher_reads_the_prompt_then_x(made):
    """Section 5: yT is what the model says to x with p before it, worked examples and all."""
    first, _, later, _ = made.voice.asked["agent"]
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    said = (ASSISTANT, "Rules.", "Yes.", "Old problem.", "Act: finish", f"Solve: {X}")
    assert first == [message(*turn) for turn in zip(roles, said, strict=True)]
    assert later == [*first, message("assistant", COMMAND), message("user", SEEN)]


def test_the_environment_reads_the_roles_swapped(made):
    """Section 5, A.3: whom it plays and the end token; p's worked examples with user and assistant
    swapped; x as its own message. The end token behind an example and START are ours.
    """
    system, *view = made.voice.asked["environment"][2]
    assert TASKS["os"].environment in system["content"] and END in system["content"]
    said = ("Old problem.", "Act: finish", END, START, f"Solve: {X}", COMMAND, SEEN, ANSWER)
    assert [m["content"] for m in view[-8:]] == list(said)
    assert [m["role"] for m in view[-8:]] == ["assistant", "user"] * 4


def test_role_play_ends_with_the_end_token(made):
    """Section 5: agent and environment alternate until the end token, which is not kept."""
    assert made.records[0].turns == [COMMAND, SEEN, ANSWER]


def test_the_student_reads_x_alone(made):
    """Section 5: yS is one reply of the same model to x without p."""
    assert made.voice.asked["student"][0] == BARE
    assert len(made.voice.asked["student"]) == 2 and made.records[0].student == "Use ls."


def test_reasons_are_sampled(made):
    """A.1: a reason has temperature 0.7, a nucleus of 0.9 and at most 512 tokens."""
    assert made.generator.samplings["reason"] == {Sampling(512, temperature=0.7, top_p=0.9)}


def test_reasons_come_from_all_that_was_said(made):
    """A.1: about five sentences on why, given p, yS (to x) should become yT, in this order."""
    question = made.generator.asked["reason"][0][-1]["content"]
    places = [question.index(part) for part in (PROMPT.text, X, "Use ls.", COMMAND)]
    assert places == sorted(places) and "five sentences" in question
    assert ANSWER not in question and made.records[0].reason == "It acts."


def played(name: str, agent: str, environment: str) -> Record:
    """The record of a conversation in which both say always the same."""
    says = {"agent": agent, "environment": environment, "student": "Use ls.", "reason": "So."}
    voice = Scribe(**{speaker: {None: said} for speaker, said in says.items()})
    return list(synthesise_wave(voice, voice, plan_of(name), [Record(0, X)]))[0]


@pytest.mark.parametrize(("name", "turns"), [("os", 10), ("web_browsing", 2), ("web_shopping", 5)])
def test_turn_limits(name, turns):
    """A.3: at most 10 agent turns in OS, 2 in browsing, 5 in shopping; the agent's is the last."""
    assert played(name, "Hm.", "More?").turns == ["Hm.", "More?"] * (turns - 1) + ["Hm."]


# ----------------------------------------------------------------- settings: C.4 and the code


@pytest.fixture(scope="module")
def default(checkpoint, tmp_path_factory) -> SimpleNamespace:
    """What the command without a setting hands to synthesis and training, and its run folder."""
    folder = tmp_path_factory.mktemp("default")
    model = Path(shutil.copytree(checkpoint, folder / "model"))
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"max_position_embeddings": 16384})
    (folder / "os.txt").write_text(PROMPT.text)
    found = SimpleNamespace(out=folder / "run")

    def note_plan(voice, generator, plan, out):
        found.plan = plan
        for i in range(6):
            append_record(out / "data.jsonl", replace(RECORD, index=i, pseudo_input=f"x{i}"))
        return runs.read_records(out / "data.jsonl")

    def note_training(model, sft, pg, recipe, out):
        found.model, found.sft, found.pg, found.recipe = model, sft, pg, recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genpi, "synthesise", note_plan)
        patch.setattr(genpi, "train", note_training)
        patch.setattr(genpi, "report", lambda *args, before: None)
        paths = ["--model", model, "--prompt", folder / "os.txt", "--out", found.out]
        assert genpi.main([*map(str, paths), "--device", "cpu"]) == 0
    return found


def test_plan(default):
    """C.4: 1,000 inputs (100 more: ours). Code: at most 2,048 tokens a reply, 512 a reason."""
    plan = default.plan
    assert (plan.n_inputs, plan.max_new_tokens, plan.max_reason_tokens) == (1100, 2048, 512)


def test_recipe(default):
    """C.4: lam 0.7, 10 epochs, batch 32, rate 1e-4. Code: 3 % warm-up, clip 1.0, no decay."""
    r = default.recipe
    assert (r.lam, r.epochs, r.batch, r.lr) == (0.7, 10, 32, 1e-4)
    assert (r.warmup, r.clip, r.weight_decay, r.pg_share) == (0.03, 1.0, 0.0, 1.0)


def test_adapter(default):
    """C.4: rank 16. Code: alpha 32, dropout 0.05, on all seven linear layers of each block, whose
    weights are NF4 with double quantisation (scales of 8 bits).
    """
    seven = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    layers = lora.lora_layers(default.model)
    assert sorted(name.rpartition(".")[2] for name in layers) == sorted(seven)  # of its one block
    assert {(len(a.lora_A), a.alpha, a.dropout) for a in layers.values()} == {(16, 32.0, 0.05)}
    assert {type(a.base) for a in layers.values()} == {NF4Linear}
    assert {a.base.nf4.scale_code.dtype for a in layers.values()} == {torch.uint8}


def test_share_of_the_parameters():
    """C.4: the adapter is about 0.5 % of LLaMA-3-8B."""
    with torch.device("meta"):
        model = lora.add_lora(Llama(Config(128256, 4096, 14336, 32, 32, 8, 128)))
    added = sum(p.numel() for p in lora.adapter_parameters(model))
    assert round(100 * added / sum(p.numel() for p in model.parameters()), 1) == 0.5


def test_training_reads_what_was_synthesised(default):
    """Section 4: a sample is the SFT and the PG sequence of a record. Held-out ones are the last,
    and no part of the training (ours).
    """
    chat = Chat(default.out.parent / "model", 16384)
    records = runs.read_records(default.out / "data.jsonl")[:4]  # a third of six is held out
    assert default.sft == [sft_sequence(chat, record) for record in records]
    assert default.pg == [pg_sequence(chat, PROMPT, record) for record in records]


def test_the_loop(tmp_path, monkeypatch):
    """C.4 and code: AdamW; 10 epochs of batches of 32; the rate rises for 3 % of the steps, then
    falls as a cosine to 0; dropout while training, none afterwards.
    """
    seen = []
    rates = []

    def note_step(model, optimizer, sft, pg, recipe, drawn):
        seen.append((type(optimizer), len(sft), sft == pg == drawn, model.training))
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(train, "train_step", note_step)
    model = adapted_model()
    sequences = [Sequence([i], [i]) for i in range(320)]  # stand for both of a sample
    train.train(model, sequences, sequences, Recipe(), tmp_path)
    assert seen == [(torch.optim.AdamW, 32, True, True)] * 100 and not model.training
    cosine = [(1 + math.cos(math.pi * step / 97)) / 2 for step in range(97)]
    assert rates == pytest.approx([1e-4 * share for share in (1 / 3, 2 / 3, 1, *cosine)])


# ------------------------------------------------------------- quality of the synthesis: Table 4


@pytest.mark.parametrize(
    ("agent", "environment", "faults"),
    [
        (ANSWER, END, set()),
        (COMMAND, SEEN, {"hit_limit", "no_final_action"}),
        (ANSWER, SEEN, {"no_end_token"}),  # and ends all the same: ours
        (COMMAND, END, {"no_final_action"}),
    ],
)
def test_table_4_faults(agent, environment, faults):
    """Table 4: the turn limit was hit; no end token after a final action; no final action."""
    record = played("os", agent, environment)
    table = quality([record, Record(1, X, [ANSWER])], TASKS["os"])
    assert {fault for fault, share in table.items() if share == 0.5} == faults


def test_table_4_final_actions():
    """Table 4: final is an end in OS, a choice in browsing, any search or click in shopping."""
    final = {"os": "Act: finish", "web_browsing": "Answer: A.", "web_shopping": "Action: click[a]"}
    other = {"os": COMMAND, "web_browsing": "Answer: B", "web_shopping": "I buy it."}
    assert all(TASKS[name].has_final_action(text) for name, text in final.items())
    assert not any(TASKS[name].has_final_action(text) for name, text in other.items())


def test_table_4_turns():
    """Table 4: gold solutions take 3, 1 and 4 turns; mean turns are the agent's."""
    gold = {name: task.gold_turns for name, task in TASKS.items() if task.gold_turns}
    assert gold == {"os": 3, "web_browsing": 1, "web_shopping": 4}
    assert quality([RECORD, Record(1, X, [ANSWER])], TASKS["os"])["mean_turns"] == 1.5


# --------------------------------------------------------------------------------- measures: ours


def test_nll():
    """base: without p, adapter off; teacher: with p, adapter off; adapter: without p, on. All are
    nats/token of the teacher's turns.
    """
    off = base_model()
    on = adapted_model()
    run = SimpleNamespace(prompt=PROMPT, micro_tokens=2048)
    bare = sft_sequence(CHAT, RECORD)
    prompted = evaluate.loss.teacher_sequence(CHAT, PROMPT, RECORD)
    assert prompted.ids == CHAT.encode(conversation(PROMPT.teacher(X), RECORD.turns))[0]
    assert targets(prompted) == targets(bare)
    by_hand = {"base": (off, bare), "teacher": (off, prompted), "adapter": (on, bare)}
    with torch.no_grad():
        expected = {name: nats(*pair).mean().item() for name, pair in by_hand.items()}
    assert evaluate.nll_of_three(on, CHAT, run, [RECORD]) == pytest.approx(expected, rel=1e-4)


def test_gap_closed():
    """gap_closed = (base - adapter) / (base - teacher)."""
    assert evaluate.gap_closed({"base": 3.0, "teacher": 1.0, "adapter": 1.5}) == 0.75


def test_agreement():
    """k of n greedy turns without p take the teacher's action, whatever the thought, with Wilson's
    95 % interval: of the base (adapter off), the teacher (n of n) and the adapter. The first, the
    middle and the last turn, after the recorded ones before it.
    """
    voice = Scribe(student={None: f"Think: I see.\n\n{ANSWER}"}, agent={None: "Hm."})
    voice.model = torch.nn.Module()
    records = [Record(0, X, [ANSWER])] * 10 + [RECORD]
    found = agreement.agreement_by_turn(voice, TASKS["os"], records, 2048)
    assert voice.asked["student"] == [BARE] * 22
    assert voice.asked["agent"] == [conversation(BARE, RECORD.turns[:2])] * 2
    assert voice.samplings["student"] == {Sampling(2048)}
    first = {"teacher": 11, "adapter": 10, "base": 10}
    assert {who: row["k"] for who, row in found["first"].items()} == first
    assert [found[turn]["adapter"]["n"] for turn in found] == [11, 0, 1]
    assert found["first"]["teacher"]["low"] == pytest.approx(0.7412, abs=1e-4)  # n / (n + 1.96^2)


def test_recall(monkeypatch):
    """Asked as in training, without p: the share of p's tokens that come back in order, and the
    nats/token of each line of p, worst first.
    """
    asked = []

    def recite_half(voice, conversations, sampling):
        asked.append((conversations, sampling.temperature))
        return [CHAT.decode(CHAT.tokens(PROMPT.text)[:20])]

    monkeypatch.setattr(evaluate, "say", recite_half)
    found = evaluate.recall(Voice(base_model(), CHAT), PROMPT, [RECORD])
    assert asked == [([pg_messages(PROMPT, RECORD)[:-1]], 0.0)]
    assert found["ratio"] == pytest.approx(20 / len(CHAT.tokens(PROMPT.text)))
    lines = [row["nll"] for row in found["lines"]]
    assert lines == sorted(lines, reverse=True) and len(lines) == len(PROMPT.text.splitlines())


def test_measures_drop_nothing_out(default):
    """What is measured, or chats, is the finished adapter on the base of the run, in evaluation."""
    model, _ = train.open_model(runs.load_run(default.out, "cpu"))
    assert not any(module.training for module in model.modules()) and lora.lora_layers(model)
