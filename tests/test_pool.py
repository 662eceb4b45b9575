"""A pool of records and the rules they show: which are chosen, what counts as obeyed."""

from dataclasses import replace

import pytest

from experiments.pool import (
    Example,
    choose,
    due_turn,
    levels_of,
    questions_of,
    rare_rules,
    read_pool,
    right_turns,
    write_pool,
)
from prompt import TASKS
from runs import Record

SHOWS = (0, 1, 2, 4)
OS = TASKS["os"]


def example(i, *rules, held_out=False):
    return Example(held_out, dict.fromkeys(rules, 0), Record(i, f"x{i}", [f"yes {i}"], "no", "so"))


def some_pool(of_rule=6, plain=30, held_out=2, rules=("a", "b", "c")):
    shown = [rule for rule in rules for _ in range(of_rule)] + [None] * plain
    pool = [example(i, *([rule] if rule else [])) for i, rule in enumerate(shown)]
    return pool + [example(99 + i, r, held_out=True) for i, r in enumerate(rules * held_out)]


# ------------------------------------------------------------------------------------- the choice


def test_over_as_many_seeds_as_levels_each_rule_has_each_level_once():
    """And over the next four again, in another order of the rules."""
    rules = list("abcdef")
    for block in (0, 4):
        found = [levels_of(rules, SHOWS, seed) for seed in range(block, block + 4)]
        assert all(sorted(row[rule] for row in found) == [0, 1, 2, 4] for rule in rules)
    assert levels_of(rules, SHOWS, 0) != levels_of(rules, SHOWS, 4)


def test_exactly_as_many_samples_show_a_rule_as_shall():
    """The rest show none; the same seed chooses the same, another others; none is held out."""
    levels = {"a": 0, "b": 1, "c": 4}
    chosen = choose(some_pool(), levels, 20, seed=1)
    assert {rule: sum(rule in e.shows for e in chosen) for rule in levels} == levels
    assert len({e.record.index for e in chosen}) == 20 and not any(e.held_out for e in chosen)
    assert chosen == choose(some_pool(), levels, 20, seed=1) != choose(some_pool(), levels, 20, 2)


def test_a_rule_that_never_stands_alone_is_shown_by_fewer():
    """b is shown only together with a, of which no sample may show anything."""
    pool = [example(i, "a", "b") for i in range(9)] + [example(i) for i in range(10, 30)]
    chosen = choose(pool, {"a": 0, "b": 2}, 8, 0)
    assert not any(e.shows for e in chosen) and len(chosen) == 8


@pytest.mark.parametrize(("n", "words"), [(3, "room for the 5"), (40, "30 that show no rule")])
def test_too_few_samples_or_too_small_a_pool(n, words):
    """One line with both numbers."""
    with pytest.raises(ValueError, match=words):
        choose(some_pool(), {"a": 1, "b": 4, "c": 0}, n, 0)


def test_rules_that_are_studied():
    """a is shown by six; of "often" no more than half may be, of "seldom" not only three; nobody
    asks about "untested".
    """
    pool = some_pool(rules=("a",))
    pool += [example(i, "often") for i in range(60)]
    pool += [example(90 + i, "seldom") for i in range(3)]
    pool += [example(95 + i, "untested") for i in range(4)]
    pool += [example(99, "often", "seldom", held_out=True)]
    assert rare_rules(pool, 4, "a seldom untested often") == ["a"]
    assert rare_rules(pool, 3, "seldom, then a") == ["seldom", "a"]


def test_a_rule_is_asked_about_where_it_is_needed():
    """By at most so many held-out records, of those that need no other rule if there are such;
    under "" stand those that need none of the rules.
    """
    both = example(6, "a", "b", held_out=True)
    pool = [both, *some_pool(1, 1, 3, ("a", "b")), both]
    pool += [example(7, held_out=True), example(8, held_out=True)]
    tests = questions_of(pool, ["a", "b"], 2)
    assert [[pool[i].shows.keys() for i in tests[rule]] for rule in "ab"] == [
        [{"a"}, {"a"}], [{"b"}, {"b"}],
    ]  # fmt: skip
    assert [pool[i].record.index for i in tests[""]] == [7, 8]
    assert questions_of([both], ["a", "b"], 2) == {"a": [0], "b": [0], "": []}


# ---------------------------------------------------------------------------------------- obedience


def turn(command):
    return f"Think: so.\n\nAct: bash\n\n```bash\n{command}\n```"


class Adapter:
    """Says what it is told to, by the number of its turn, unless the wish is long."""

    def __init__(self, *words):
        self.words = words

    def fits(self, messages, limit):
        return len(messages[1]["content"]) < 9

    def speak(self, conversations, sampling, seeds=None):
        for number, messages in enumerate(conversations):
            said = [m["content"] for m in messages if m["role"] == "assistant"]
            heard = [m["content"] for m in messages if m["role"] == "user"][1:]
            assert heard == ["done"] * len(said)  # what is recorded
            yield number, self.words[len(said)], True


def test_a_conversation_goes_on_while_the_actions_are_the_teachers():
    """Thoughts may differ. After a turn that differs or has no room nothing is played."""
    record = Record(0, "x", [turn("ls"), "done", turn("pwd"), "done", "Act: finish"])
    others = replace(record, turns=[turn("ls"), "done", turn("cd"), "done", "Act: finish"])
    adapter = Adapter(turn("ls").replace("so", "well"), turn("pwd"), "Act: finish")
    long = replace(record, pseudo_input="a long wish")
    assert right_turns(adapter, OS, [record, others, long], 9) == [3, 1, 0]


def test_a_rule_is_due_with_the_turn_that_needs_it():
    """Rule a with the first turn, b with the second; "" asks for the whole conversation."""
    record = Record(0, "x", [turn("ls"), "done", turn("pwd"), "done", "Act: finish"])
    both = Example(True, {"a": 0, "b": 1}, record)
    assert [due_turn(both, rule) for rule in ("a", "b", "")] == [0, 1, 2]


def test_a_pool_is_read_as_it_was_written(tmp_path):
    """A turn that is not there is corrupt, and so is a record of another kind."""
    path = tmp_path / "pool.jsonl"
    write_pool(path, some_pool())
    assert read_pool(path) == some_pool()
    with pytest.raises(ValueError, match="not turns"):
        Example(True, {"a": 1}, Record(0, "x", ["y"]))
    path.write_text(path.read_text().replace('"index": 0', '"index": "0"', 1))
    with pytest.raises(ValueError, match="line 1 is corrupt"):
        read_pool(path)
