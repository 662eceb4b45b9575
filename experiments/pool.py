"""A pool of records of which is known which rules of the prompt each of them shows.

A record shows a rule if the agent acts otherwise in it once the rule is gone: in a run the exam's
witnesses (exam.py), so for any prompt and model whose teacher obeys its rules. Who knows what a
right agent does writes such a file himself, as tiny/gold.py, and needs no teacher.

From the pool samples are chosen of which an exact number shows a rule, and whether an adapter obeys
it is asked on held-out records that need it:

    obeyed    in a whole conversation without p the adapter takes the teacher's actions, up to and
              with the last turn that needs the rule

While it does, the environment says what is recorded; where it does not, the conversation is lost.

Left out: rules that change the words of a turn but not its action; a machine that answers to what
no teacher did.
"""

import random
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from exam import rules_of, same_action, steady, witnesses
from files import check_kinds, kinds, read_rows, write_rows
from prompt import Task, conversation, student_messages
from runs import Record, Run, covering_records, hash_seed, load_records, split_records
from sampler import Sampling, Voice, say


@dataclass(frozen=True)
class Example:
    """A record, and rule -> the number of the last agent turn that needs it."""

    held_out: bool
    shows: dict
    record: Record

    def __post_init__(self):
        check_kinds(vars(self.record), kinds(Record))
        turns = (len(self.record.turns) + 1) // 2
        if not all(type(n) is int and 0 <= n < turns for n in self.shows.values()):
            raise ValueError(f"shows = {self.shows} are not turns of {turns}")


def pool_of_run(run: Run, voice: Voice) -> list[Example]:
    """The records of a finished run, also those of --cover. voice: its base, without an adapter."""
    records, _ = load_records(run)
    train, held_out = split_records(records, run.samples, run.held_out)
    train = [r for r in train + covering_records(run.folder) if not r.no_reason]
    whole = [record for record in train + held_out if not record.overlong]
    n_train = sum(not record.overlong for record in train)
    shows: list[dict[str, int]] = [{} for _ in whole]
    rules = rules_of(run.prompt, run.task)
    limit = run.max_new_tokens
    found = steady([witnesses(voice, run.task, whole, rule, limit) for rule in rules])
    for rule, some in zip(rules, found, strict=True):
        for i, turn in sorted(some):
            shows[i][rule.text] = turn
    return [Example(i >= n_train, shows[i], record) for i, record in enumerate(whole)]


def write_pool(path: Path, pool: list[Example]) -> None:
    write_rows(path, [asdict(example) for example in pool])


def read_pool(path: Path) -> list[Example]:
    """Raises: ValueError naming a line that is corrupt, or if the file is missing or empty."""

    def parse(row: dict) -> Example:
        return Example(row["held_out"] is True, dict(row["shows"]), Record(**row["record"]))

    if not path.exists():
        raise ValueError(f"{path}: no such pool; leave --pool out to make one of the run")
    pool, _ = read_rows(path, parse)
    if not pool:
        raise ValueError(f"{path} holds no record; delete it")
    return pool


# ----------------------------------------------------------------------------------------- rules


def counts(pool: list[Example], rule: str) -> tuple[int, int]:
    """How many records to train on show a rule, and how many held-out ones."""
    some = [example.held_out for example in pool if rule in example.shows]
    return len(some) - sum(some), sum(some)


def rare_rules(pool: list[Example], most: int, text: str) -> list[str]:
    """The rules that can be studied, in their order in the prompt's text.

    At least `most` records to train on show such a rule, and no more than half of them (what nearly
    all need is not rare), and at least one held-out record needs it.
    """
    half = sum(not example.held_out for example in pool) / 2
    rules = {rule for example in pool for rule in example.shows}
    found = [
        rule
        for rule in rules
        if max(1, most) <= counts(pool, rule)[0] <= half and counts(pool, rule)[1] > 0
    ]
    return sorted(found, key=lambda rule: (text.find(rule), rule))


def levels_of(rules: list[str], shows: tuple[int, ...], seed: int) -> dict[str, int]:
    """How many samples shall show each rule. Over as many seeds as there are levels each rule has
    every level once, so that no level is that of an easy rule.
    """
    block, turn = divmod(seed, len(shows))
    order = random.Random(hash_seed("levels", block)).sample(rules, len(rules))
    return {rule: shows[(place + turn) % len(shows)] for place, rule in enumerate(order)}


def choose(pool: list[Example], levels: dict[str, int], n: int, seed: int) -> list[Example]:
    """n records to train on of which levels[rule] show each rule, and the others none of them.

    Fewer than levels[rule] show a rule that hardly ever stands alone. Raises: ValueError if n is
    too few for the levels, or the pool for n.
    """
    rng = random.Random(hash_seed("choose", seed, n))
    training = [example for example in pool if not example.held_out]
    left = dict(levels)
    chosen = []
    plain = []
    for example in rng.sample(training, len(training)):
        rules = example.shows.keys() & levels.keys()
        if not rules:
            plain.append(example)
        elif all(left[rule] > 0 for rule in rules):
            chosen.append(example)
            left |= {rule: left[rule] - 1 for rule in rules}
    if len(chosen) > n:
        told = f"{n} samples have no room for the {len(chosen)} that show a rule"
        raise ValueError(f"{told}; give more --samples, or fewer --shows")
    if len(chosen) + len(plain) < n:
        told = f"{n} samples: the pool has {len(plain)} that show no rule, beside {len(chosen)}"
        raise ValueError(f"{told}; give fewer --samples, or a run with more")
    return chosen + plain[: n - len(chosen)]


def questions_of(pool: list[Example], rules: Collection[str], most: int) -> dict[str, list[int]]:
    """rule -> places in the pool of held-out records that need it, at most so many: no other rule
    that is studied, if there are such. Under "": of those that need none.
    """
    held_out = [i for i, example in enumerate(pool) if example.held_out]
    found = {}
    for rule in rules:
        some = [i for i in held_out if rule in pool[i].shows]
        alone = [i for i in some if len(pool[i].shows.keys() & set(rules)) == 1]
        found[rule] = (alone or some)[:most]
    plain = [i for i in held_out if not pool[i].shows.keys() & set(rules)]
    return found | {"": plain[:most]}


# -------------------------------------------------------------------------------------- obedience


def right_turns(voice: Voice, task: Task, records: list[Record], limit: int) -> list[int]:
    """How many agent turns of each conversation, without p, take the teacher's action until the
    first that does not. What follows that is not played.
    """
    said: list[list[str]] = [[] for _ in records]
    right = [0] * len(records)
    live = list(range(len(records)))
    turn = 0
    while live:
        asked = {i: conversation(student_messages(records[i].pseudo_input), said[i]) for i in live}
        asked = {i: messages for i, messages in asked.items() if voice.fits(messages, limit)}
        live = []
        replies = say(voice, list(asked.values()), Sampling(limit))
        for i, text in zip(asked, replies, strict=True):
            taught = records[i].turns
            if same_action(task, text, taught[2 * turn]):
                right[i] = turn + 1
                said[i] += [text, *taught[2 * turn + 1 : 2 * turn + 2]]
                if 2 * turn + 2 < len(taught):
                    live.append(i)
        turn += 1
    return right


def due_turn(example: Example, rule: str) -> int:
    """The turn up to and with which all must be right for a rule to be obeyed; for "" the last."""
    return example.shows[rule] if rule else (len(example.record.turns) - 1) // 2
