"""Synthesis: everything a model writes before training, from the prompt p alone.

    1  pseudo inputs x      a generator is shown p and demonstrations and goes on with the list;
                            or real first messages take their place
    2  role-play            the model plays the agent, who has read p, and the environment, who sees
                            the worked examples of p with the roles swapped, until it says [END]
    3  student outputs yS   the same model answers x without p
    4  reasons r            the generator explains why yS should become the first teacher output yT

The generator may be the model itself, another one, or a server. Inputs are sampled in rounds, the
other stages run in waves of records; what a crash interrupts is begun again with the same seeds,
so that it ends the same.

Left out: a judge of what is written. Source: GenPI section 5, appendix A.1 and A.3.
"""

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from files import write_json
from prompt import (
    END,
    Prompt,
    Task,
    conversation,
    environment_messages,
    student_messages,
)
from runs import (
    Inputs,
    Record,
    append_record,
    check_inputs_of,
    hash_seed,
    read_inputs,
    read_records,
)
from sampler import Sampling, Voice
from server import Server

FRUITLESS_ROUNDS = 5  # rounds in a row that bring nothing new, then we go on with what there is
LIST_ITEMS = 10  # pseudo inputs asked for in one list, at most
ITEM_TOKENS = 64  # room for each of them, at least
LIST_TOKENS = 8192  # room for all of them, at most
LISTS = 32  # lists asked for in one round, at most
WAVE = 64  # records that are synthesised together; an interrupted wave is begun again

INPUTS = """Between the lines of dashes stands a prompt that is given to an agent.

---
{prompt}
---

Write first messages that users of this agent could send to it, all about different things. Write \
them as a numbered list with one message an item.

{demos}

Continue this list with {n} new items."""

REASON = """Between the lines of dashes stands a prompt.

---
{prompt}
---

An assistant that has not read the prompt was asked:

{record.pseudo_input}

It replied:

{record.student}

An assistant that has read the prompt replied:

{record.teacher}

Explain in about five sentences why the prompt turns the first reply into the second."""


@dataclass(frozen=True)
class Plan:
    """What is to be made: of which prompt, how much, and with which limits."""

    prompt: Prompt
    task: Task
    n_inputs: int
    max_new_tokens: int  # of one turn
    max_reason_tokens: int
    seed: int
    kept: frozenset[int] = frozenset()  # numbers of records that are taken from the run of --from
    given: tuple[str, ...] = ()  # distinct real first messages; none: they are invented

    @property
    def turn_sampling(self) -> Sampling:
        """Agent, environment and student are greedy."""
        return Sampling(self.max_new_tokens)

    @property
    def reason_sampling(self) -> Sampling:
        return Sampling(self.max_reason_tokens, temperature=0.7, top_p=0.9)


def synthesise(voice: Voice, generator: Voice | Server, plan: Plan, folder: Path) -> list[Record]:
    """All four stages; what is in the folder is not made again.

    voice: the model that is trained; generator: who writes the inputs and the reasons. Raises:
    ValueError if there are too few inputs to train on, or a file in the folder is damaged.
    """
    asked = folder / "inputs.json"
    inputs = given_inputs(plan, asked) if plan.given else pseudo_inputs(generator, plan, asked)
    path = folder / "data.jsonl"
    records = read_records(path)
    check_inputs_of(records, inputs, folder)
    done = {record.index for record in records}
    for first in range(0, len(inputs), WAVE):
        wave = [Record(first + i, x) for i, x in enumerate(inputs[first : first + WAVE])]
        wave = [record for record in wave if record.index not in plan.kept]
        missing = [record for record in wave if record.index not in done]
        if not missing:
            continue
        if isinstance(generator, Server):  # its answers are paid for, and no batch is like another
            wave = missing
        for record in synthesise_wave(voice, generator, plan, wave):
            if record.index not in done:
                append_record(path, record)
    return read_records(path)


def synthesise_wave(
    voice: Voice, generator: Voice | Server, plan: Plan, wave: list[Record]
) -> Iterator[Record]:
    """Stages 2 to 4 of some records; each is yielded when it is finished."""
    clock = time.perf_counter()
    role_play(voice, plan, wave)
    whole = [record for record in wave if not record.overlong]
    student_outputs(voice, plan, whole)
    for record in whole:
        question = reason_messages(plan.prompt, record)
        record.no_reason = not generator.fits(question, plan.max_reason_tokens)
    yield from (record for record in wave if record.overlong or record.no_reason)
    for record in reasons(generator, plan, [r for r in whole if not r.no_reason]):
        record.seconds = time.perf_counter() - clock  # since the last record
        clock += record.seconds
        yield record


# --------------------------------------------------------------------------------- pseudo inputs


def pseudo_inputs(generator: Voice | Server, plan: Plan, path: Path) -> list[str]:
    """Stage 1: distinct pseudo inputs, round after round, each kept in the file at `path`.

    Ends with fewer than planned after FRUITLESS_ROUNDS rounds that brought nothing new. Raises:
    ValueError if there are fewer than two, one to train on and one to hold out.
    """
    n = plan.n_inputs
    state = read_inputs(path) if path.exists() else Inputs()
    inputs = state.inputs
    seen = {normalised(x) for x in (*inputs, *plan.task.demos)}
    with bar("pseudo inputs", n, "input") as progress:
        progress.update(min(len(inputs), n))
        while len(inputs) < n and state.fruitless < FRUITLESS_ROUNDS:
            clock = time.perf_counter()
            before = len(inputs)
            seed = hash_seed(plan.seed, "inputs", state.rounds)
            for x in more_inputs(generator, plan, inputs, n - before, seed):
                if normalised(x) not in seen and len(inputs) < n:
                    seen.add(normalised(x))
                    inputs.append(x)
            state.rounds += 1
            state.fruitless = 0 if len(inputs) > before else state.fruitless + 1
            state.seconds += time.perf_counter() - clock
            write_json(path, asdict(state))
            progress.update(len(inputs) - before)
    check_inputs(inputs, n)
    return inputs


def given_inputs(plan: Plan, path: Path) -> list[str]:
    """Real first messages in place of invented ones, in an order that the seed draws: a log is in
    order of time, and what is held out should not be its end.
    """
    if not path.exists():  # else it may be that of --records, in the order of another seed
        given = list(plan.given)
        random.Random(hash_seed(plan.seed, "given")).shuffle(given)
        write_json(path, asdict(Inputs(inputs=given[: plan.n_inputs])))
    return read_inputs(path).inputs


def check_inputs(inputs: list[str], n: int) -> None:
    """Raise ValueError if the inputs are too few to train on; say so if they are not n."""
    if len(inputs) < 2:
        found = "1 pseudo input cannot be trained on and held out at once"
        if not inputs:
            found = f"the generator wrote no numbered list in {FRUITLESS_ROUNDS} rounds"
        cure = "give it examples with --demos or a stronger --generator, with another --out"
        raise ValueError(f"{found}; {cure}")
    if len(inputs) < n:
        told = f"nothing new in {FRUITLESS_ROUNDS} rounds, going on with {len(inputs)} of {n}"
        cure = "for more, give other --demos or a stronger --generator"
        tqdm.write(f"pseudo inputs: {told}; {cure}")


@dataclass(frozen=True)
class Question:
    """What the generator is asked for a list."""

    messages: list[dict]
    first: int  # the number of the first new item
    items: int  # new ones that are asked for


def more_inputs(
    generator: Voice | Server, plan: Plan, known: list[str], n: int, seed: int
) -> list[str]:
    """One round: sample lists (temperature 1.0, nucleus 0.9) that hold about n new pseudo inputs.

    Where the task has no demonstrations, five of the inputs found so far serve (Self-Instruct).
    """
    rng = random.Random(seed)
    demos = list(plan.task.demos)
    room = item_room(demos or known)
    questions: list[Question] = []
    while sum(question.items for question in questions) < n and len(questions) < LISTS:
        shown = demos or rng.sample(known, min(5, len(known)))
        questions.append(ask_for_list(generator, plan, shown, room))
    asked = [question.messages for question in questions]
    seeds = [rng.getrandbits(40) for _ in asked]
    limit = room * max(question.items for question in questions)
    sampling = Sampling(limit, temperature=1.0, top_p=0.9)
    found = []
    for number, text, ended in sorted(generator.speak(asked, sampling, seeds)):
        if text is None:
            told = "prompt, demos and a new list do not fit the context of the generator's server"
            cure = "serve it with a longer one, and the same command goes on from here"
            raise ValueError(f"{told}; {cure}")
        found += whole_items(text, questions[number].first, ended)
    return found


def item_room(examples: list[str]) -> int:
    """Tokens that a pseudo input may take. A token is some 4 bytes: bytes / 2 is room for twice the
    mean length of the examples.
    """
    size = sum(len(example.encode()) for example in examples) // max(1, len(examples))
    return min(max(size // 2, ITEM_TOKENS), LIST_TOKENS)


def ask_for_list(generator: Voice | Server, plan: Plan, shown: list[str], room: int) -> Question:
    """Ask for LIST_ITEMS items of `room` tokens, or for as many as the context has room for.

    Inputs found so far give way if there is no room for one item. Raises: ValueError if there is
    none still, or beside the demonstrations.
    """
    for items in range(max(1, min(LIST_ITEMS, LIST_TOKENS // room)), 0, -1):
        messages = inputs_messages(plan.prompt, shown, items)
        if generator.fits(messages, items * room):
            return Question(messages, len(shown) + 1, items)
    if shown and not plan.task.demos:
        return ask_for_list(generator, plan, shown[:-1], room)
    raise ValueError(
        f"prompt and demonstrations leave no room for one more input of {room} tokens in the "
        f"generator's context of {generator.chat.context}; give shorter --demos or a --generator "
        "with a longer context, with another --out"
    )


def inputs_messages(prompt: Prompt, demos: list[str], n: int) -> list[dict]:
    """The generator's question for n more pseudo inputs after the numbered demos."""
    listed = "\n".join(f"{i + 1}. {demo}" for i, demo in enumerate(demos))
    return student_messages(INPUTS.format(prompt=prompt.text, demos=listed, n=n))


def whole_items(text: str, first: int, ended: bool) -> list[str]:
    """The items of a list; one that was cut at its limit ends in half an item."""
    items = parse_list(text, first)
    return items if ended else items[:-1]


ITEM = re.compile(r"\s*(?:\*\*)?(\d+)[.)](?:\*\*)?\s+(.*)")
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def parse_list(text: str, first: int) -> list[str]:
    """The items of a numbered list that begins at `first` or at 1; an item may have more lines.

    Only the number that is due starts an item, so that numbers inside an item stay part of it.
    """
    items: list[str] = []
    due = {first, 1}
    for line in text.splitlines():
        found = ITEM.match(line)
        if found and int(found[1]) in due:
            items.append(found[2])
            due = {int(found[1]) + 1}
        elif items:
            items[-1] += "\n" + line.strip()
    items = [item.strip() for item in items]
    items = [QUOTED.sub(r"\1\2", item) if QUOTED.fullmatch(item) else item for item in items]
    return [item.strip() for item in items if item.strip()]


def normalised(text: str) -> str:
    """What two inputs must differ in to count as two."""
    return " ".join(text.lower().split())


def distinct(inputs: Iterable[str]) -> tuple[str, ...]:
    """The inputs without what comes a second time."""
    first: dict[str, str] = {}
    for x in inputs:
        first.setdefault(normalised(x), x)
    return tuple(first.values())


# ------------------------------------------------------------------------------------- role-play


def role_play(
    voice: Voice,
    plan: Plan,
    records: list[Record],
    opening: Callable[[str], list[dict]] | None = None,
    as_environment: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Stage 2: fill in the turns; agent and environment alternate greedily, all in step.

    opening: x -> what the agent reads of it (None: p with x in its place); as_environment: what the
    model is put into while it plays the environment. Both serve the report, where the adapter is
    the agent without p, and its base the environment.

    A conversation ends when the environment says [END] (which is not kept), with a final action,
    with a turn that was cut, at the limit of turns, or when it fills the context (then it is
    overlong, and is not trained on). With one turn at most no environment is needed.
    """
    prompt = plan.prompt
    task = plan.task
    opening = opening or prompt.teacher

    def agent_reads(record: Record) -> list[dict]:
        return conversation(opening(record.pseudo_input), record.turns)

    def environment_reads(record: Record) -> list[dict]:
        return environment_messages(prompt, task, record.pseudo_input, record.turns)

    live = records  # those in which the agent has its turn
    with bar("role-play", len(records), "chat") as progress:
        for turn in range(1, task.max_turns + 1):
            if not live:
                break
            spoken = say_next(voice, plan, live, agent_reads)
            for record, ended in spoken:
                record.cut_turn = not ended
            if task.max_turns > 1:
                whole = [record for record, ended in spoken if ended]
                with as_environment():
                    answered = say_next(voice, plan, whole, environment_reads)
                last = turn == task.max_turns
                live = [record for record, _ in answered if goes_on(record, task, last)]
                progress.update(len(records) - len(live) - progress.n)
        progress.update(len(records) - progress.n)
    for record in records:
        if len(record.turns) % 2 == 0:  # the environment spoke last, and nobody answered
            record.turns = record.turns[:-1]
        acted = record.turns and task.has_final_action(record.turns[-1])
        record.no_final_action = task.action is not None and not acted


def say_next(
    voice: Voice, plan: Plan, records: list[Record], view: Callable[[Record], list[dict]]
) -> list[tuple[Record, bool]]:
    """Append what is said after view(record) -> who spoke, and whether it ended by itself.

    A record in which there is no room for a whole turn is marked overlong.
    """
    for record in records:
        record.overlong = not voice.fits(view(record), plan.max_new_tokens)
    fitting = [record for record in records if not record.overlong]
    spoken = []
    replies = voice.speak([view(record) for record in fitting], plan.turn_sampling)
    for number, text, ended in sorted(replies):
        fitting[number].turns.append(text)
        spoken.append((fitting[number], ended))
    return spoken


def goes_on(record: Record, task: Task, last: bool) -> bool:
    """Does the agent speak again? Notes why not."""
    agent, answer = record.turns[-2:]
    if END in answer:
        return False
    record.no_end_token = task.is_final(agent)
    record.hit_limit = last and not record.no_end_token
    return not last and not record.no_end_token


# --------------------------------------------------------------------- student outputs and reasons


def student_outputs(voice: Voice, plan: Plan, records: list[Record]) -> None:
    """Stage 3: what the model says without p."""
    asked = [student_messages(record.pseudo_input) for record in records]
    with bar("student outputs", len(asked), "chat") as progress:
        for number, text, _ in voice.speak(asked, plan.turn_sampling):
            records[number].student = text
            progress.update()


def reasons(generator: Voice | Server, plan: Plan, records: list[Record]) -> Iterator[Record]:
    """Stage 4: why p turns yS into yT. Yields records as their reasons are finished."""
    asked = [reason_messages(plan.prompt, record) for record in records]
    seeds = [hash_seed(plan.seed, "reason", record.index) for record in records]
    with bar("reasons", len(asked), "reason") as progress:
        for number, text, ended in generator.speak(asked, plan.reason_sampling, seeds):
            records[number].reason = text or ""
            records[number].no_reason = text is None
            records[number].cut_reason = text is not None and not ended
            progress.update()
            yield records[number]


def reason_messages(prompt: Prompt, record: Record) -> list[dict]:
    """The generator's question for the reason r."""
    return student_messages(REASON.format(prompt=prompt.text, record=record))


# ----------------------------------------------------------------------------------------- report


def bar(what: str, total: int, unit: str) -> tqdm:
    """A progress bar with rate and remaining time."""
    return tqdm(desc=f"{what:<18}", total=total, unit=unit, dynamic_ncols=True)


FAULTS = ("hit_limit", "no_end_token", "no_final_action")  # of GenPI Table 4
FAULTS += ("overlong", "no_reason", "cut_turn", "cut_reason")  # and ours


def quality(records: list[Record], task: Task) -> dict:
    """What GenPI Table 4 reports of the synthesis, and what we add: turns, shares of the records.

    A final action is what the table takes for one: in browsing a choice with an operation, in
    shopping any search or click, not only the purchase.
    """
    n = max(1, len(records))
    agent_turns = [(len(record.turns) + 1) // 2 for record in records]
    table = {"records": len(records), "gold_turns": task.gold_turns}
    table |= {"mean_turns": sum(agent_turns) / n, "max_turns": task.max_turns}
    for flag in FAULTS:
        table[flag] = sum(getattr(record, flag) for record in records) / n
    return table


def print_quality(table: dict) -> None:
    """Print the table in one line."""
    shares = ", ".join(f"{flag.replace('_', ' ')} {100 * table[flag]:.1f} %" for flag in FAULTS)
    gold = f", gold {table['gold_turns']:g}" if table["gold_turns"] else ""
    turns = f"{table['mean_turns']:.2f} of at most {table['max_turns']} turns{gold}"
    print(f"synthesis (GenPI Table 4): {table['records']} records, {turns}; {shares}")
