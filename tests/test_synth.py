"""The stages of the synthesis, with scripted speakers in place of a model."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import synth
from prompt import END, TASKS, parse_demos, parse_prompt
from runs import Record, append_record
from sampler import Sampling
from synth import (
    FRUITLESS_ROUNDS,
    Plan,
    distinct,
    given_inputs,
    inputs_messages,
    more_inputs,
    parse_list,
    pseudo_inputs,
    quality,
    reasons,
    role_play,
    say_next,
    synthesise,
    synthesise_wave,
)

OS = TASKS["os"]
PROMPT = parse_prompt("<USER>:\nRules. {user_input}")
ROOT = Path(__file__).parent.parent
LIST = "Act: bash\n\n```bash\nls\n```"


def plan_of(n_inputs=3, max_turns=10, demos=(), seed=0):
    return Plan(PROMPT, replace(OS, max_turns=max_turns, demos=demos), n_inputs, 9, 9, seed)


class Script:
    """A voice that answers by functions of the messages: agent and student by one, environment.

    Whom it plays it tells from what it reads, as a model would; a reason is "because x". room: the
    letters of its context; limit: the letters after which a reply is cut.
    """

    def __init__(self, agent, environment, room=10**9, limit=10**9):
        self.agent = agent
        self.environment = environment
        self.room = room
        self.limit = limit
        self.asked = []  # all conversations
        self.calls = []  # how many there were in each call

    def fits(self, messages, max_new_tokens):
        return sum(len(m["content"]) for m in messages) + max_new_tokens <= self.room

    def speak(self, conversations, sampling, seeds=None):
        self.asked += conversations
        self.calls.append(len(conversations))
        for number, messages in enumerate(conversations):
            text = self.reply(messages)
            yield number, text[: self.limit], len(text) <= self.limit

    def reply(self, messages):
        if messages[0]["content"].startswith("You play"):
            return self.environment(messages)
        asked = re.search(r"was asked:\n\n(.*)\n", messages[-1]["content"])
        return f"because {asked[1]}" if asked else self.agent(messages)


def played(agent, environment, max_turns, **script):
    """The record of one conversation between the two."""
    record = Record(0, "q")
    role_play(Script(agent, environment, **script), plan_of(max_turns=max_turns), [record])
    return record


def count(messages, role):
    return sum(m["role"] == role for m in messages)


# ------------------------------------------------------------------------------------- role-play


def test_agent_and_environment_take_turns_until_the_end_token():
    """Two actions and an answer: the environment speaks between them, and its [END] is not kept."""
    agent = lambda m: LIST if count(m, "assistant") < 2 else "Act: answer(7)"  # noqa: E731
    environment = lambda m: END if "answer" in m[-1]["content"] else "The output: 7"  # noqa: E731
    record = played(agent, environment, 10)
    assert record.turns == [LIST, "The output: 7", LIST, "The output: 7", "Act: answer(7)"]
    assert not (record.hit_limit or record.no_end_token or record.no_final_action)


def test_the_turn_limit_ends_a_conversation():
    """An agent that never finishes has max_turns turns; the last environment turn is dropped."""
    record = played(lambda m: LIST, lambda m: "more", 3)
    assert record.turns == [LIST, "more", LIST, "more", LIST]
    assert record.hit_limit and record.no_final_action and not record.no_end_token


def test_a_huge_turn_limit_costs_nothing(monkeypatch):
    """Once all conversations have ended, no further turn is gone through."""
    asked = []
    monkeypatch.setattr(synth, "say_next", lambda *args: asked.append(args) or say_next(*args))
    played(lambda m: "Act: finish", lambda m: END, max_turns=10**6)
    assert len(asked) == 2  # the agent's turn and the environment's


@pytest.mark.parametrize("max_turns", [10, 2])
def test_a_final_action_ends_a_conversation_without_end_token(max_turns):
    """If the environment forgets [END] after a final action, the record says so and stops there."""
    agent = lambda m: "Act: finish" if count(m, "assistant") else LIST  # noqa: E731
    record = played(agent, lambda m: "what else?", max_turns)
    assert record.turns == [LIST, "what else?", "Act: finish"]
    assert record.no_end_token and not record.hit_limit and not record.no_final_action


def test_an_early_end_token_leaves_no_final_action():
    """[END] after a mere command ends the conversation, which then lacks its final action."""
    record = played(lambda m: LIST, lambda m: END, 10)
    assert record.turns == [LIST]
    assert record.no_final_action and not record.hit_limit


def test_single_turns_need_no_environment():
    """With max_turns 1 the environment is never asked."""
    record = played(lambda m: LIST, lambda m: pytest.fail("the environment was asked"), 1)
    assert record.turns == [LIST]


def test_a_conversation_that_fills_the_context_is_marked():
    """A turn that may not fit is not taken; the record ends with the agent and is overlong."""
    record = played(lambda m: LIST, lambda m: "x" * 400, 10, room=900)
    assert record.overlong
    assert len(record.turns) % 2 == 1


def test_the_environment_sees_the_roles_swapped():
    """To the environment x is its own message and the agent's turn the user's."""
    script = Script(lambda m: "Act: finish", lambda m: END)
    role_play(script, plan_of(max_turns=2), [Record(0, "my x")])
    view = script.asked[1]
    assert [m["role"] for m in view] == ["system", "user", "assistant", "user"]
    assert "my x" in view[2]["content"] and view[3]["content"] == "Act: finish"


def test_conversations_advance_together():
    """Ten conversations of two turns take two calls to the agent, not twenty."""
    script = Script(lambda m: LIST, lambda m: "out")
    role_play(script, plan_of(max_turns=2), [Record(i, f"x{i}") for i in range(10)])
    assert script.calls == [10, 10, 10, 10]  # agent, environment, agent, environment


def test_a_turn_that_reached_its_limit_ends_the_conversation():
    """A cut agent turn is the last one and is marked; the environment is not asked to answer it."""
    agent = lambda m: LIST + "!" * 50 * count(m, "assistant")  # noqa: E731
    record = played(agent, lambda m: "output", 10, limit=len(LIST) + 9)
    assert record.cut_turn and record.turns == [LIST, "output", LIST + "!" * 9]
    assert not record.hit_limit and record.no_final_action
    assert not played(lambda m: "Act: finish", lambda m: END, 10, limit=11).cut_turn


# ---------------------------------------------------------------------------------- pseudo inputs


def test_lists_are_parsed_item_by_item():
    """Numbers in ., ) or bold; an item may have several lines and numbers of its own."""
    text = 'Sure!\n6. First\n7) "Second"\n**8.** Third:\n1. apples\n2. pears\n\n9. Fourth'
    items = ["First", "Second", "Third:\n1. apples\n2. pears", "Fourth"]
    assert parse_list(text, first=6) == items


def test_a_list_may_begin_at_one():
    """A model that starts to count again is understood, and text without a list gives nothing."""
    assert parse_list("1. a\n2. b", first=6) == ["a", "b"]
    assert parse_list("There are 3. things I like", first=6) == []


@pytest.mark.parametrize("name", ["os", "web_browsing", "web_shopping"])
def test_a_list_gives_the_demonstrations_back(name):
    """Numbered as the generator is shown them, whole pages are read as they were written."""
    demos = demos_of(name)
    text = inputs_messages(PROMPT, list(demos), 9)[-1]["content"]
    listed = text.partition("one message an item.\n\n")[2].partition("\n\nContinue")[0]
    assert tuple(parse_list(listed, first=1)) == demos


def demos_of(name):
    """The demonstrations that come with a task."""
    return parse_demos((ROOT / "demos" / f"{name}.txt").read_text(encoding="utf-8"))


class Lists:
    """A generator that writes the same list in answer to all, to its end or cut at the limit."""

    def __init__(self, text, ended=True):
        self.text = text
        self.ended = ended

    def fits(self, messages, max_new_tokens):
        return True

    def speak(self, conversations, sampling, seeds):
        self.asked = [messages[-1]["content"] for messages in conversations]
        self.sampling = sampling
        for number in range(len(conversations)):
            yield number, self.text, self.ended


def test_a_list_cut_at_the_limit_loses_its_last_item():
    """What ends by itself is kept whole; of what was cut, the last item may be half of one."""
    text = "3. Name a tree.\n4. Spell c"
    for ended, items in ((True, ["Name a tree.", "Spell c"]), (False, ["Name a tree."])):
        assert more_inputs(Lists(text, ended), plan_of(demos=("A", "B")), [], 9, 0) == items


def test_the_demonstrations_are_shown_or_else_what_was_found():
    """Every list goes on with the task's demonstrations, or with five of the inputs so far."""
    generator = Lists("")
    more_inputs(generator, plan_of(demos=("A", "B")), ["c"], 25, 0)
    assert len(generator.asked) == 3 and all("1. A\n2. B\n" in text for text in generator.asked)
    assert (generator.sampling.temperature, generator.sampling.top_p) == (1.0, 0.9)
    more_inputs(generator, plan_of(), [f"found {i}" for i in range(9)], 25, 0)
    assert [text.count("found") for text in generator.asked] == [5, 5, 5]


class Pages:
    """A generator with a context of so many tokens, each of three letters.

    It writes as many items as it is asked for, each the same page with a number of its own.
    """

    def __init__(self, context, page):
        self.chat = SimpleNamespace(context=context)
        self.page = page
        self.asked = []  # (items, tokens) of each list

    def fits(self, messages, max_new_tokens):
        return self.read(messages) + max_new_tokens <= self.chat.context

    def read(self, messages):
        return sum(len(m["content"]) for m in messages) // 3

    def speak(self, conversations, sampling, seeds):
        for number, messages in enumerate(conversations):
            room = min(sampling.max_new_tokens, self.chat.context - self.read(messages))
            assert room > 0, "the question fills the context"
            n = int(re.search(r"list with (\d+) new", messages[-1]["content"])[1])
            self.asked.append((n, sampling.max_new_tokens))
            first = 1 + len(re.findall(r"^\d+\. ", messages[-1]["content"], re.MULTILINE))
            text = "\n".join(f"{first + i}. {number}.{i} {self.page}" for i in range(n))
            yield number, text[: 3 * room], len(text) <= 3 * room


def web_plan(name="web_browsing", demos=None):
    """The plan of a web task's own prompt, with the demos that come with it or with others."""
    prompt = parse_prompt((ROOT / f"{name}.txt").read_text(encoding="utf-8"))
    task = replace(TASKS[name], demos=demos_of(name) if demos is None else demos)
    return Plan(prompt, task, 6, 9, 9, 0)


def test_whole_web_pages_fit_a_small_context():
    """With a context of 4,096 tokens lists have fewer items, and each item is a whole page."""
    page = "'''\n<html>" + "<a id=0> Home </a>" * 120 + "</html>\n'''\n\nTask: Go home.\n\nB. Home"
    generator = Pages(4096, page)
    found = more_inputs(generator, web_plan(), [], 6, 0)
    assert len(found) >= 1 and {x.partition(" ")[2] for x in found} == {page}
    assert all(n < 10 and tokens > 640 for n, tokens in generator.asked)


@pytest.mark.parametrize(
    ("letters", "items", "tokens"),
    [(0, 10, 640), (129, 10, 640), (400, 10, 2000), (2000, 8, 8000), (40_000, 1, 8192)],
)
def test_the_room_of_a_list_follows_the_demonstrations(letters, items, tokens):
    """Ten items of 64 tokens; longer demos have half a token a letter, and 8,192 a list at most."""
    generator = Pages(10**6, "page")
    more_inputs(generator, plan_of(demos=("x" * letters,) * 5), [], 1, 0)
    assert generator.asked == [(items, tokens)]


def test_without_demonstrations_the_inputs_found_tell_the_length():
    """At first there is nothing to go by; then the mean of what was found counts."""
    generator = Pages(10**6, "page")
    more_inputs(generator, plan_of(), [], 1, 0)
    more_inputs(generator, plan_of(), ["x" * 300, "x" * 500], 1, 0)
    assert generator.asked == [(10, 640), (10, 2000)]


def test_demonstrations_that_fill_the_context_are_an_error():
    """No room for one item is one line with numbers and cure; inputs found so far give way."""
    demos = tuple(f"{i}" * 900 for i in range(5))
    with pytest.raises(ValueError, match=r"\A.* 450 tokens.* 2000; .*--demos.*\Z"):
        more_inputs(Pages(2000, "page"), plan_of(demos=demos), [], 6, 0)
    generator = Pages(2000, "page")
    assert len(more_inputs(generator, plan_of(), list(demos), 6, 0)) == 6


def scripted(monkeypatch, *rounds):
    """Let round i of more_inputs bring rounds[i], and nothing after the last -> the seeds used."""
    left = iter(rounds)
    seeds = []

    def more(generator, plan, known, n, seed):
        found = next(left, [])
        if found is KeyboardInterrupt:
            raise found
        seeds.append(seed)
        return found

    monkeypatch.setattr(synth, "more_inputs", more)
    return seeds


def test_inputs_are_distinct_and_no_demonstrations(monkeypatch, tmp_path):
    """Copies, also in other letters or spaces, and the demonstrations themselves are dropped."""
    scripted(monkeypatch, ["a", "A ", "demo"], ["a  b", "A b", "c"])
    found = pseudo_inputs(None, plan_of(3, demos=("Demo",)), tmp_path / "inputs.json")
    assert found == ["a", "a  b", "c"]


def test_fruitless_rounds_are_bounded(monkeypatch, tmp_path):
    """After FRUITLESS_ROUNDS rounds that bring nothing new we go on with what there is."""
    path = tmp_path / "inputs.json"
    seeds = scripted(monkeypatch, ["a"], ["a"], ["b"])
    for _ in range(2):  # the second time nothing is asked
        assert pseudo_inputs(None, plan_of(9), path) == ["a", "b"]
        assert len(seeds) == json.loads(path.read_text())["rounds"] == 3 + FRUITLESS_ROUNDS


def test_given_inputs_take_the_place_of_invented_ones(tmp_path):
    """Without a generator: distinct ones as they are, as many as planned, shuffled by the seed."""
    given = distinct(["Is it raining?", " b\n c", "is it  RAINING?", *"defghij"])
    assert given == ("Is it raining?", " b\n c", *"defghij")
    orders = []
    for seed in (0, 0, 1):
        plan = replace(plan_of(9, seed=seed), given=given)
        orders.append(given_inputs(plan, tmp_path / f"{len(orders)}.json"))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(given) != orders[0]
    few = given_inputs(replace(plan_of(4), given=given), tmp_path / "few.json")
    assert few == orders[0][:4] == json.loads((tmp_path / "few.json").read_text())["inputs"]
    path = tmp_path / "0.json"  # begun with the records of a run of another seed
    assert given_inputs(replace(plan_of(9, seed=7), given=given), path) == orders[0]


def test_given_inputs_are_what_the_records_are_made_of(tmp_path):
    """Nobody is asked for a list, and the last of the shuffled messages are held out."""
    voice = Script(agent=lambda m: "Act: finish", environment=lambda m: END)
    plan = replace(plan_of(3), given=("a", "b", "c"))
    records = synthesise(voice, voice, plan, tmp_path)
    assert sorted(record.pseudo_input for record in records) == ["a", "b", "c"]
    assert not any("numbered list" in m[-1]["content"] for m in voice.asked)


@pytest.mark.parametrize("found", [[], ["a"]], ids=["none", "one"])
def test_too_few_inputs_are_an_error(monkeypatch, tmp_path, found):
    """Without a list, or with one input alone, the run stops with a line that names the cure."""
    scripted(monkeypatch, found)
    with pytest.raises(ValueError, match=r"\A.*--demos.*\Z"):
        pseudo_inputs(None, plan_of(9), tmp_path / "inputs.json")


def test_inputs_go_on_where_they_stopped(monkeypatch, tmp_path):
    """A round's seed depends on its number, so that after a crash comes what would have come."""
    whole = scripted(monkeypatch, ["a"], ["b"], ["c"], ["d"])
    pseudo_inputs(None, plan_of(4, seed=5), tmp_path / "whole.json")
    path = tmp_path / "inputs.json"
    first = scripted(monkeypatch, ["a"], ["b"], KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        pseudo_inputs(None, plan_of(4, seed=5), path)
    assert json.loads(path.read_text())["inputs"] == ["a", "b"]
    second = scripted(monkeypatch, ["c"], ["d"])
    assert pseudo_inputs(None, plan_of(4, seed=5), path) == ["a", "b", "c", "d"]
    assert first + second == whole and len(set(whole)) == 4


# ------------------------------------------------------------------------------------ all stages


def speaker(**script):
    """As student it says Use ls., as agent Act: finish, as environment [END]."""
    agent = lambda m: "Act: finish" if "Rules" in m[1]["content"] else "Use ls."  # noqa: E731
    return Script(agent, lambda m: END, **script)


def test_a_wave_yields_whole_records():
    """Every record of a wave comes back with its conversation, yS and r, as its reason is done."""
    voice = speaker()
    wave = [Record(i, f"x{i}") for i in range(3)]
    done = synthesise_wave(voice, voice, plan_of(max_turns=2), wave)
    first = next(done)
    assert (first.index, wave[0].reason, wave[1].reason) == (0, "because x0", "")
    assert [record.index for record in done] == [1, 2]
    made = [(record.turns, record.student, record.reason) for record in wave]
    assert made == [(["Act: finish"], "Use ls.", f"because x{i}") for i in range(3)]


def test_a_reason_that_does_not_fit_is_not_asked_for():
    """A record whose question is too long for the generator is marked, and the others go on."""
    generator = speaker(room=600)
    wave = [Record(0, "x"), Record(1, "y" * 600), Record(2, "z")]
    done = list(synthesise_wave(speaker(), generator, plan_of(max_turns=2), wave))
    assert sorted(record.index for record in done) == [0, 1, 2] and len(generator.asked) == 2
    assert [record.no_reason for record in wave] == [False, True, False]
    assert not any(record.overlong for record in wave)  # the conversation itself is whole
    assert [record.reason for record in wave] == ["because x", "", "because z"]


def test_a_reason_that_reached_its_limit_is_marked():
    """Of two reasons only the one that did not end by itself is cut."""
    wave = [Record(0, "x"), Record(1, "y" * 30)]
    list(synthesise_wave(speaker(), speaker(limit=20), plan_of(max_turns=2), wave))
    assert [record.cut_reason for record in wave] == [False, True]
    assert quality(wave, OS)["cut_reason"] == 0.5 and wave[1].reason == "because " + "y" * 12


def test_a_reason_is_drawn_from_a_seed_of_its_own():
    """The seed depends on the run's seed and the record, not on what else is in the wave."""

    class Seeds(Script):
        def speak(self, conversations, sampling, seeds=None):
            self.seeds = seeds
            return super().speak(conversations, sampling, seeds)

    def seeds(indices, seed):
        generator = Seeds(agent=None, environment=None)
        wave = [Record(i, f"x{i}", ["Act: finish"]) for i in indices]
        list(reasons(generator, plan_of(seed=seed), wave))
        return generator.seeds

    three = seeds([0, 1, 2], seed=5)
    assert len(set(three)) == 3 and seeds([1], seed=5) == three[1:2]
    assert not set(three) & set(seeds([0, 1, 2], seed=6))


def test_reasons_and_turns_have_limits_of_their_own():
    """A turn is greedy with the limit of turns, a reason warm with the limit of reasons."""
    plan = Plan(PROMPT, OS, 3, max_new_tokens=11, max_reason_tokens=22, seed=0)
    assert (plan.turn_sampling.max_new_tokens, plan.turn_sampling.temperature) == (11, 0.0)
    assert plan.reason_sampling == Sampling(22, temperature=0.7, top_p=0.9)


def test_records_that_are_there_are_not_made_again(tmp_path):
    """What an interrupted run has written stays as it is, and only the others are added."""
    state = {"rounds": 1, "fruitless": 0, "seconds": 1.0, "inputs": ["x0", "x1", "x2"]}
    (tmp_path / "inputs.json").write_text(json.dumps(state))
    kept = Record(1, "x1", ["Act: bash"], "mine", "mine")
    append_record(tmp_path / "data.jsonl", kept)
    voice = speaker()
    records = synthesise(voice, voice, plan_of(3, max_turns=2), tmp_path)
    assert [record.index for record in records] == [0, 1, 2] and records[1] == kept
    assert [record.reason for record in records] == ["because x0", "mine", "because x2"]
    before = len(voice.asked)
    assert synthesise(voice, voice, plan_of(3, max_turns=2), tmp_path) == records
    assert len(voice.asked) == before


def test_quality_counts_agent_turns_and_flags():
    """Two records of three and one agent turns have a mean of two; shares are of all records."""
    records = [Record(0, "x", ["a", "e", "a", "e", "a"], hit_limit=True), Record(1, "y", ["a"])]
    table = quality(records, OS)
    assert (table["mean_turns"], table["hit_limit"], table["no_end_token"]) == (2, 0.5, 0)
    assert (table["max_turns"], table["gold_turns"]) == (10, 3)
