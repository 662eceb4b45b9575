"""After an edit of the prompt: what of an earlier run still holds (--from RUN).

    inputs     all of them; what they and the kept records took is not counted anew
    records    those in which the teacher says with the new p what it said with the old one; yS does
               not depend on p, and r explains the same two replies. All others are made anew
    adapter    where the training begins

Left out: that the environment, too, might answer otherwise under the new p; the records that
--cover added to the earlier run.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path

from exam import greedy_turns
from files import AGAIN, read_json, write_json, write_rows
from prompt import Prompt, conversation
from runs import Record, read_inputs, read_records
from sampler import Voice

KEPT = "kept.json"


def begin_with(earlier: Path, folder: Path, voice: Voice, prompt: Prompt) -> frozenset[int]:
    """Begin the records of a run folder with those of an earlier run -> which of them were kept.

    Written last, the list of these says that all else is there.
    """
    path = folder / KEPT
    if not path.exists():
        clock = time.perf_counter()
        records = read_records(earlier / "data.jsonl", mend=False)
        kept = unchanged(voice, prompt, records)
        write_rows(folder / "data.jsonl", [asdict(replace(r, seconds=0.0)) for r in kept])
        inputs = read_inputs(earlier / "inputs.json")
        inputs.seconds = time.perf_counter() - clock  # what it took to look through the records
        write_json(folder / "inputs.json", asdict(inputs))
        write_json(path, {"kept": [record.index for record in kept]})
        print(f"{len(kept)} of {len(records)} records of {earlier} hold for the new prompt")
    return frozenset(read_json(path, AGAIN, {"kept": list[int]})["kept"])


def unchanged(voice: Voice, prompt: Prompt, records: list[Record]) -> list[Record]:
    """The records that fit the context after this p, and in which it is what makes the teacher say
    every one of its turns.
    """
    whole = [r for r in records if not (r.overlong or r.no_reason or r.cut_turn)]
    whole = [r for r in whole if tokens_of(voice, prompt, r) <= voice.chat.context]
    same = greedy_turns(voice, prompt, whole)
    return [record for record, turns in zip(whole, same, strict=True) if all(turns)]


def tokens_of(voice: Voice, prompt: Prompt, record: Record) -> int:
    """Tokens of a record's whole conversation after p."""
    ids, _ = voice.chat.encode(conversation(prompt.teacher(record.pseudo_input), record.turns))
    return len(ids)
