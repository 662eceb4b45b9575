"""Does the adapter, without p, act as the teacher that has read p? Counted on held-out records.

    first replies    what it says to x
    by turn          the first, a middle and the last turn, each after the recorded ones before it
    closed loop      whole conversations with the environment, which the base plays

An action is what a turn does, by the form that the task lays down; where there is none, its text.
Left out: whether the teacher is right.
"""

from collections.abc import Callable
from functools import partial
from itertools import zip_longest

import lora
import runs
from exam import same_action
from prompt import Task, conversation, student_messages
from runs import Record, Run
from sampler import Sampling, Voice, say
from stats import wilson
from synth import Plan, role_play


def held_out_records(run: Run, records: list[Record]) -> list[Record]:
    """The held-out records that can be measured. Raises: ValueError if there are none."""
    _, held_out = runs.split_records(records, run.samples, run.held_out)
    held_out = [record for record in held_out if not record.overlong]
    if not held_out:
        cure = "lower --max-turns or shorten the messages of --inputs, with another --out"
        told = f"no held-out conversation fits the context; {cure}"
        raise ValueError(f"{run.folder}: {told}")
    return held_out


def agrees(task: Task, texts: list[str], records: list[Record]) -> list[bool]:
    """For each first reply, whether it takes the teacher's action."""
    return [same_action(task, t, r.teacher) for t, r in zip(texts, records, strict=True)]


def first_replies(voice: Voice, records: list[Record], limit: int) -> list[str]:
    """What a voice says to the inputs of these records without p, greedily."""
    asked = [student_messages(record.pseudo_input) for record in records]
    return say(voice, asked, Sampling(limit))


def share(outcomes: list[bool]) -> dict:
    return wilson(sum(outcomes), len(outcomes))


def asked_turns(record: Record) -> dict[str, int]:
    """The agent turns of a conversation that are asked about, by name: three, or all of fewer."""
    n = (len(record.turns) + 1) // 2
    turns = {"first": 0}
    if n > 2:
        turns["middle"] = n // 2
    if n > 1:
        turns["last"] = n - 1
    return turns


def agreement_by_turn(voice: Voice, task: Task, records: list[Record], limit: int) -> dict:
    """k of n turns that take the teacher's action: without p, the model and the adapter.

    A turn is asked for after the recorded ones before it, in which the model sees how actions are
    written; hence the base has a figure at every turn. The teacher agrees with itself by
    construction; its row is there for its interval.
    """
    found = {}
    for name in ("first", "middle", "last"):
        some = [(r, asked_turns(r)[name]) for r in records if name in asked_turns(r)]
        taught = [record.turns[2 * turn] for record, turn in some]
        openings = [(student_messages(r.pseudo_input), r.turns[: 2 * turn]) for r, turn in some]
        asked = [conversation(*opening) for opening in openings]
        said = {"teacher": taught, "adapter": say(voice, asked, Sampling(limit))}
        with lora.adapter_off(voice.model):
            said["base"] = say(voice, asked, Sampling(limit))
        found[name] = {
            who: share([same_action(task, *pair) for pair in zip(texts, taught, strict=True)])
            for who, texts in said.items()
        }
    return found


def closed_loop(
    voice: Voice, run: Run, records: list[Record], opening: Callable = student_messages
) -> list[Record]:
    """Let the adapter talk to the environment, which its base plays as in synthesis.

    opening: x -> what the adapter reads of it; by default without p.
    """
    unused = {"max_reason_tokens": 1, "seed": 0}  # nothing is sampled
    plan = Plan(run.prompt, run.task, len(records), run.max_new_tokens, **unused)
    played = [Record(record.index, record.pseudo_input) for record in records]
    base = partial(lora.adapter_off, voice.model)
    role_play(voice, plan, played, opening, base)
    return played


def same_conversation(task: Task, ours: Record, theirs: Record) -> list[bool]:
    """For each agent turn, whether both are there and take the same action."""
    pairs = zip_longest(ours.turns[::2], theirs.turns[::2])
    return [None not in pair and same_action(task, *pair) for pair in pairs]


def closed_loop_agreement(task: Task, played: list[Record], records: list[Record]) -> dict:
    """k of n conversations in which all actions are the teacher's, and how many actions are.

    Once an action differs the environment answers something else, so that few later ones agree. The
    actions of a conversation hang together, hence they have no interval.
    """
    same = [same_conversation(task, *pair) for pair in zip(played, records, strict=True)]
    actions = sum(same, [])
    return {
        "conversations": share([all(turns) for turns in same]),
        "actions": {"k": sum(actions), "n": len(actions)},
        "final_action": {
            "adapter": share([not record.no_final_action for record in played]),
            "teacher": share([not record.no_final_action for record in records]),
        },
    }
