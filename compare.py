"""Two adapters on the same held-out inputs: do they differ (evaluate.py --against)?

A difference is paired input by input: what both get right or both get wrong says nothing of it.
"""

from pathlib import Path

import runs
from agreement import agrees, closed_loop, first_replies, held_out_records, same_conversation
from runs import Record, Run
from sampler import Voice
from stats import paired_difference
from train import open_model


def compare(folder: Path, against: Path, device: str | None, model: str | None) -> None:
    """Print how two adapters differ on the same held-out inputs, a sentence a measure.

    Raises: ValueError if the runs do not hold out the same inputs, with the same teacher.
    """
    runs_of_two = [runs.load_run(each, device, model) for each in (folder, against)]
    records = [held_out_records(run, runs.load_records(run)[0]) for run in runs_of_two]
    ours, theirs = ([(record.pseudo_input, record.turns) for record in some] for some in records)
    if ours != theirs:
        told = "do not hold out the same records"
        raise ValueError(f"{folder} and {against} {told}; begin one with --records of the other")
    found = [outcomes(run, some) for run, some in zip(runs_of_two, records, strict=True)]
    for measure in found[0]:
        first, second = (each[measure] for each in found)
        told = difference(paired_difference(first, second))
        shares = (
            f"{sum(each)} of {len(each)} ({name})"
            for each, name in ((first, folder), (second, against))
        )
        print(f"{measure}: {' against '.join(shares)}: {told}")


def outcomes(run: Run, records: list[Record]) -> dict[str, list[bool]]:
    """For each held-out input, whether the adapter of a run acts as the teacher."""
    model, chat = open_model(run)
    voice = Voice(model, chat, run.slots)
    replies = first_replies(voice, records, run.max_new_tokens)
    pairs = zip(closed_loop(voice, run, records), records, strict=True)
    return {
        "the teacher's first action": agrees(run.task, replies, records),
        "all its actions in the closed loop": [
            all(same_conversation(run.task, *pair)) for pair in pairs
        ],
    }


def difference(found: dict) -> str:
    """A paired difference in words."""
    low, gap, high = (f"{100 * found[key]:+.1f}" for key in ("low", "difference", "high"))
    return (
        f"{gap} points (95 %: {low} to {high}); {found['only_ours']} only the first, "
        f"{found['only_theirs']} only the second, exact McNemar p = {found['p']:.2f}: "
        f"{'told apart' if found['p'] < 0.05 else 'not told apart'}"
    )
