"""A record as it is trained: its parts by the paper's names, and both sequences with their masks.

The sequences are those that loss.py builds for the training, decoded in runs of equal mask, so that
what is shown cannot drift from what is trained. On a terminal what carries loss is bold and the
rest is dim; elsewhere, and where NO_COLOR is set, ⟦ ⟧ stand around what carries loss.

Left out: the model's weights, of which a sequence knows nothing. Source: GenPI Eq. 2 and 3.
"""

import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import runs
from chat import Chat
from files import UNSEEN
from loss import IGNORE, Sequence
from model import read_shape
from objectives import Twin, conversation_sequence, pg_sequence
from runs import Record, Run
from synth import FAULTS
from train import base_folder

MARKS = {True: "⟦{}⟧", False: "{}"}  # by whether it carries loss
COLOURS = {True: "\033[1;32m{}\033[0m", False: "\033[2m{}\033[0m"}  # bold green, dim


def show(folder: Path, number: int | None, model: str | None = None) -> None:
    """Print the record of that number, by default the first that is trained on.

    model: where the base of the run is now. Raises: ValueError if there is no such record, or if
    the run or its model is damaged.
    """
    run = runs.load_run(folder, model=model)
    _, chat = read_shape(base_folder(run))
    records = runs.read_records(folder / "data.jsonl", mend=False)
    inputs = runs.read_inputs(folder / "inputs.json").inputs
    runs.check_inputs_of(records, inputs, folder)
    if not records:
        raise ValueError(f"{folder}: no finished record yet; genpi.py with its flags makes them")
    if number is None:
        found = [record for record in records if fate(run, chat, record) == "trained on"]
        told = f"none of its {len(records)} records is trained on; choose one with --record"
    else:
        found = [record for record in records if record.index == number]
        told = f"no record {number}; choose one of {records[0].index} to {records[-1].index}"
    if not found:
        raise ValueError(f"{folder}: {told}")
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    print("\n".join(page(run, chat, found[0], MARKS if plain else COLOURS)))


def fate(run: Run, chat: Chat, record: Record) -> str:
    """What becomes of a record: is it trained on, and if not, why?"""
    if record.overlong or (record.no_reason and run.lam < 1):
        return "left out, since it did not fit the context"
    asked = sequences(run, chat, record)
    asked = asked if run.lam < 1 else asked[:-1]
    longest = max(len(sequence) for _, sequence in asked)
    if longest > chat.context:
        return f"left out, since {longest} tokens do not fit the context of {chat.context}"
    inputs = runs.read_inputs(run.folder / "inputs.json").inputs
    numbers = list(range(len(inputs)))  # those of all records, also of the unfinished
    training, _ = runs.split_records(numbers, run.samples, run.held_out)
    return "trained on" if record.index in training else "held out for the report"


def sequences(run: Run, chat: Chat, record: Record) -> list[tuple[str, Sequence]]:
    """The training sequences with their names: the very ones of the training."""
    sft = conversation_sequence(chat, run.prompt, record, run.objective)
    found = [(f"SFT (Eq. 2, weight {run.lam:g})", sft)]
    if isinstance(sft, Twin):
        one = "of the adapter"
        other = "of its teacher"
        if run.objective == "prepend":
            one = f"with probability {1 - run.prepend_prob:g}"
            other = f"with probability {run.prepend_prob:g}"
        found = [(f"{run.objective}, {one}", sft.bare), (f"{run.objective}, {other}", sft.prompted)]
    target = "Eq. 3" if run.pg_target == "prompt+reason" else f"Eq. 3, {run.pg_target}"
    pg = pg_sequence(chat, run.prompt, record, run.pg_target)
    return [*found, (f"PG ({target}, weight {1 - run.lam:g})", pg)]


def spans(chat: Chat, sequence: Sequence) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a sequence, cut where the mask changes, and whether each carries loss.

    A text is what its tokens add to those before, since some tokenizers drop a first space.
    """
    end = 0
    before = ""
    for has_loss, group in groupby(label != IGNORE for label in sequence.labels):
        end += len(list(group))
        text = chat.tokenizer.decode(sequence.ids[:end], skip_special_tokens=False)
        yield text[len(before) :], has_loss
        before = text


def page(run: Run, chat: Chat, record: Record, style: dict[bool, str]) -> Iterator[str]:
    """Yield the parts of a record, then its sequences. style: how to write a text, by its loss."""
    yield f"{run.folder.name}, record {record.index}: {fate(run, chat, record)}"
    parts = [("pseudo input x", record.pseudo_input)]
    for i, text in enumerate(record.turns):  # yT_0, env_1, yT_1, env_2, ...
        parts.append((f"{'environment env' if i % 2 else 'agent yT'}_{(i + 1) // 2}", text))
    parts += [("student output yS", record.student), ("reason r", record.reason)]
    parts += [("faults", ", ".join(flag for flag in FAULTS if getattr(record, flag)))]
    for name, text in parts:
        if text:
            yield f"\n{name}\n    " + text.translate(UNSEEN).replace("\n", "\n    ")
    for name, sequence in [] if record.overlong else sequences(run, chat, record):
        yield f"\n{name}: {len(sequence.ids)} tokens, {sequence.n_targets} with loss"
        written = [style[loss].format(t.translate(UNSEEN)) for t, loss in spans(chat, sequence)]
        yield "".join(written)
