"""Coverage: inputs for the rules of the prompt that the samples hardly show (--cover K).

A rule that no sample needs cannot be learnt from them. So for every rule with fewer than K
witnesses among the samples (exam.py) the generator is shown the rule and asked for messages in
which it matters. Whether one does is not its word to say: the teacher answers it with the rule and
without, and what comes out otherwise joins the samples.

Left out: rules that no single message can bring up.
"""

import random
import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from exam import Rule, rules_of, steady, witnesses
from files import write_json
from prompt import student_messages
from runs import COVER, Inputs, Record, hash_seed, read_inputs
from sampler import Sampling, Voice
from server import Server
from synth import Plan, item_room, normalised, role_play, synthesise, whole_items

ROUNDS = 3  # times that the generator is asked about a rule
ASKED = 8  # messages that it is asked for each time

QUESTION = """Between the lines of dashes stands a prompt that is given to an agent.

---
{prompt}
---

One of its rules is:

{rule}

Write first messages that users of this agent could send to it and for which this rule matters, \
all about different things. Write them as a numbered list with one message an item.

{demos}

Continue this list with {n} new items."""


def cover_rules(
    voice: Voice,
    generator: Voice | Server,
    plan: Plan,
    samples: list[Record],
    held_out: list[Record],
    k: int,
    folder: Path,
) -> list[Record]:
    """The records that are added to the samples, in a folder of their own within the run's."""
    path = folder / COVER / "inputs.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        clock = time.perf_counter()
        inputs = cover(voice, generator, plan, samples, held_out, k)
        write_json(path, asdict(Inputs(seconds=time.perf_counter() - clock, inputs=inputs)))
    given = tuple(read_inputs(path).inputs)
    if not given:
        return []
    own = replace(plan, given=given, kept=frozenset())  # their numbers are not those of --from
    return synthesise(voice, generator, own, path.parent)


def cover(
    voice: Voice,
    generator: Voice | Server,
    plan: Plan,
    samples: list[Record],
    held_out: list[Record],
    k: int,
) -> list[str]:
    """Inputs that prove to be witnesses of the rules that fewer than k samples show; none of them
    is held out, for training must not see those.

    Prints a line for each rule that stays short of k.
    """
    rules = rules_of(plan.prompt, plan.task)
    found: list[str] = []
    known = [record.pseudo_input for record in samples + held_out]
    seen = {normalised(x) for x in (*known, *plan.task.demos)}
    whole = [record for record in samples if not record.overlong]
    limit = plan.max_new_tokens
    needed = steady([witnesses(voice, plan.task, whole, rule, limit) for rule in rules])
    shown = [len({i for i, _ in some}) for some in needed]
    for round_ in range(ROUNDS):
        for number, rule in enumerate(rules):
            if shown[number] >= k:
                continue
            seed = hash_seed(plan.seed, "cover", number, round_)
            fresh = []
            for x in ask_about(generator, plan, rule, [r.pseudo_input for r in whole], seed):
                if normalised(x) not in seen:
                    seen.add(normalised(x))
                    fresh.append(x)
            proved = proven(voice, plan, rule, fresh)
            shown[number] += len(proved)
            found += proved
    for rule, n in zip(rules, shown, strict=True):
        if n < k:
            tqdm.write(
                f"cover: {n} of {k} samples need the rule: {' '.join(rule.text.split())[:60]}"
            )
    return found


def proven(voice: Voice, plan: Plan, rule: Rule, inputs: list[str]) -> list[str]:
    """Those of some inputs in whose conversation the teacher needs the rule."""
    if not inputs:
        return []
    records = [Record(i, x) for i, x in enumerate(inputs)]
    role_play(voice, plan, records)
    records = [record for record in records if not record.overlong]
    needed = {i for i, _ in witnesses(voice, plan.task, records, rule, plan.max_new_tokens)}
    return [records[i].pseudo_input for i in sorted(needed)]


def ask_about(
    generator: Voice | Server, plan: Plan, rule: Rule, known: list[str], seed: int
) -> list[str]:
    """Messages for which, in the generator's view, the rule matters."""
    rng = random.Random(seed)
    demos = list(plan.task.demos) or rng.sample(known, min(5, len(known)))
    listed = "\n".join(f"{i + 1}. {demo}" for i, demo in enumerate(demos))
    text = QUESTION.format(prompt=plan.prompt.text, rule=rule.text, demos=listed, n=ASKED)
    messages = student_messages(text)
    room = ASKED * item_room(demos)
    if not generator.fits(messages, room):
        return []
    said = generator.speak([messages], Sampling(room, 1.0, 0.9), [rng.getrandbits(40)])
    _, text, ended = next(iter(said))
    return whole_items(text or "", len(demos) + 1, ended)
