"""The stages of the synthesis, with scripted speakers in place of a model."""

import json

import pytest

import synth
from synth import (
    END,
    FRUITLESS_ROUNDS,
    TASKS,
    Record,
    append_record,
    parse_list,
    parse_prompt,
    pseudo_inputs,
    quality,
    read_records,
    role_play,
    synthesise,
)

OS = TASKS["os"]
PROMPT = parse_prompt("<USER>:\nRules. {user_input}")
LIST = "Act: bash\n\n```bash\nls\n```"


class Script:
    """A voice that answers from a table: (who speaks, x, agent turns so far) -> text.

    The environment is recognised by its system message, as a model would.
    """

    max_new_tokens = 9

    def __init__(self, agent, environment, room=10**9):
        self.agent, self.environment, self.room, self.asked = agent, environment, room, []

    def fits(self, messages):
        return sum(len(m["content"]) for m in messages) <= self.room

    def say(self, conversations, bar=None):
        self.asked += conversations
        return [self.reply(messages) for messages in conversations]

    def reply(self, messages):
        if messages[0]["content"].startswith("You play"):
            return self.environment(messages)
        return self.agent(messages)


def turns_of(agent, environment, max_turns, x="q", **script):
    record = Record(0, x)
    role_play(Script(agent, environment, **script), PROMPT, OS, [record], max_turns)
    return record


def count(messages, role):
    return sum(m["role"] == role for m in messages)


# ------------------------------------------------------------------------------------- role-play


def test_agent_and_environment_take_turns_until_the_end_token():
    """Two actions and an answer: the environment speaks between them, and its [END] is not kept."""
    agent = lambda m: LIST if count(m, "assistant") < 2 else "Act: answer(7)"  # noqa: E731
    environment = lambda m: END if "answer" in m[-1]["content"] else "The output: 7"  # noqa: E731
    record = turns_of(agent, environment, 10)
    assert record.turns == [LIST, "The output: 7", LIST, "The output: 7", "Act: answer(7)"]
    assert not (record.hit_limit or record.no_end_token or record.no_final_action)


def test_the_turn_limit_ends_a_conversation():
    """An agent that never finishes has max_turns turns; the last environment turn is dropped."""
    record = turns_of(lambda m: LIST, lambda m: "more", 3)
    assert record.turns == [LIST, "more", LIST, "more", LIST]
    assert record.hit_limit and record.no_final_action and not record.no_end_token


def test_a_final_action_ends_a_conversation_without_end_token():
    """If the environment forgets [END] after a final action, the record says so and stops there."""
    record = turns_of(lambda m: "Act: finish", lambda m: "what else?", 10)
    assert record.turns == ["Act: finish"]
    assert record.no_end_token and not record.hit_limit and not record.no_final_action


def test_an_early_end_token_leaves_no_final_action():
    """[END] after a mere command ends the conversation, which then lacks its final action."""
    record = turns_of(lambda m: LIST, lambda m: END, 10)
    assert record.turns == [LIST]
    assert record.no_final_action and not record.hit_limit


def test_single_turns_need_no_environment():
    """With max_turns 1 the environment is never asked."""
    record = turns_of(lambda m: LIST, lambda m: pytest.fail("the environment was asked"), 1)
    assert record.turns == [LIST]


def test_a_conversation_that_fills_the_context_is_marked():
    """A turn that may not fit is not taken; the record ends with the agent and is overlong."""
    record = turns_of(lambda m: LIST, lambda m: "x" * 400, 10, room=900)
    assert record.overlong
    assert len(record.turns) % 2 == 1


def test_the_environment_sees_the_roles_swapped():
    """To the environment x is its own message and the agent's turn the user's."""
    script = Script(lambda m: "Act: finish", lambda m: END)
    role_play(script, PROMPT, OS, [Record(0, "my x")], 2)
    view = script.asked[1]
    assert [m["role"] for m in view] == ["system", "user", "assistant", "user"]
    assert "my x" in view[2]["content"] and view[3]["content"] == "Act: finish"


def test_conversations_advance_together():
    """Ten conversations of two turns take two calls to the agent, not twenty."""
    calls = []
    script = Script(lambda m: LIST, lambda m: "out")
    say = script.say
    script.say = lambda conversations, bar=None: (
        calls.append(len(conversations)) or say(conversations)
    )
    role_play(script, PROMPT, OS, [Record(i, f"x{i}") for i in range(10)], 2)
    assert calls == [10, 10, 10, 10]  # agent, environment, agent, environment


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


def scripted_lists(monkeypatch, rounds):
    """Let round i of more_inputs bring rounds[i], and nothing after the last."""
    rounds = iter(rounds)
    monkeypatch.setattr(synth, "more_inputs", lambda *args: next(rounds, []))


def fresh():
    return {"rounds": 0, "fruitless": 0, "seconds": 0.0, "inputs": []}


def test_inputs_are_distinct_and_no_demonstrations(monkeypatch):
    """Copies, also in other letters or spaces, and the demonstrations themselves are dropped."""
    scripted_lists(monkeypatch, [["a", "A ", "demo"], ["a  b", "A b", "c"]])
    found = pseudo_inputs(None, PROMPT, ("Demo",), 3, 0, fresh(), lambda s: None)
    assert found == ["a", "a  b", "c"]


def test_fruitless_rounds_are_bounded(monkeypatch):
    """After FRUITLESS_ROUNDS rounds that bring nothing new we go on with what there is."""
    saved = []
    scripted_lists(monkeypatch, [["a"], ["a"], ["b"]])
    state = fresh()
    assert pseudo_inputs(None, PROMPT, (), 9, 0, state, lambda s: saved.append(s["rounds"])) == [
        "a",
        "b",
    ]
    assert saved == list(range(1, 3 + FRUITLESS_ROUNDS + 1))


def test_no_list_at_all_is_an_error(monkeypatch):
    """A generator that never writes a list stops the run with one line that names the cure."""
    scripted_lists(monkeypatch, [])
    with pytest.raises(ValueError, match="--demos"):
        pseudo_inputs(None, PROMPT, (), 9, 0, fresh(), lambda s: None)


def test_inputs_go_on_where_they_stopped(monkeypatch):
    """A round's seed depends on its number, so two halves bring what one whole would."""
    seeds = []
    monkeypatch.setattr(synth, "more_inputs", lambda *a: seeds.append(a[-1]) or [f"x{len(seeds)}"])
    state = fresh()
    pseudo_inputs(None, PROMPT, (), 2, 5, state, lambda s: None)
    pseudo_inputs(None, PROMPT, (), 4, 5, json.loads(json.dumps(state)), lambda s: None)
    assert len(set(seeds)) == 4
    whole = []
    monkeypatch.setattr(synth, "more_inputs", lambda *a: whole.append(a[-1]) or [f"x{len(whole)}"])
    pseudo_inputs(None, PROMPT, (), 4, 5, fresh(), lambda s: None)
    assert whole == seeds


# ------------------------------------------------------------------------------------------ files


def test_records_survive_the_file(tmp_path):
    """What is appended is read back equal, in order of index, line ends inside texts included."""
    path = tmp_path / "data.jsonl"
    records = [Record(1, "é\nx", ["a", "b\n", "c"], "s", "r", seconds=0.5), Record(0, "y")]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records[::-1]


@pytest.mark.parametrize("end", ['{"index": 2, "pseu', '{"index": 2}\n', "\x00\x00\n"])
def test_a_corrupt_last_line_is_dropped(tmp_path, end):
    """A last line that a crash cut short is dropped, and the file is whole again."""
    path = tmp_path / "data.jsonl"
    append_record(path, Record(0, "x"))
    whole = path.read_bytes()
    path.write_bytes(whole + end.encode())
    assert [r.index for r in read_records(path)] == [0]
    assert path.read_bytes() == whole


def test_a_corrupt_middle_line_is_an_error_with_its_number(tmp_path):
    """Damage that no crash explains is not repaired silently."""
    path = tmp_path / "data.jsonl"
    for i in range(3):
        append_record(path, Record(i, "x"))
    lines = path.read_text().splitlines(True)
    path.write_text(lines[0] + "{broken\n" + lines[2])
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_quality_counts_agent_turns_and_flags():
    """Two records of three and one agent turns have a mean of two; shares are of all records."""
    records = [Record(0, "x", ["a", "e", "a", "e", "a"], hit_limit=True), Record(1, "y", ["a"])]
    table = quality(records, 10)
    assert (table["mean_turns"], table["hit_limit"], table["no_end_token"]) == (2, 0.5, 0)


def test_a_wave_yields_whole_records():
    """Every record of a wave comes back with its conversation, yS and r, as its reason is done."""
    script = Script(
        lambda m: "Use ls." if "Rules" not in m[1]["content"] else "Act: finish", lambda m: END
    )
    script.speak = lambda asked, **how: ((i, f"because {i}", True) for i in range(len(asked)))
    wave = [Record(i, f"x{i}") for i in range(3)]
    done = list(synthesise(script, script, PROMPT, OS, wave, 2, seed=0))
    assert [r.index for r in done] == [0, 1, 2]
    assert [(r.turns, r.student, r.reason) for r in done] == [
        (["Act: finish"], "Use ls.", f"because {i}") for i in range(3)
    ]
