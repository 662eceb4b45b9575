"""How much of the prompt was internalised, and does it pay?

    python evaluate.py --run runs/os                             the report of a finished run
    python evaluate.py --run runs/os --against runs/os-sft       do two adapters differ?
    python evaluate.py --run runs/os --merge merged              the adapter, folded in
    python evaluate.py os --run runs/os                          a benchmark (benchmarks/driver.py)
    python evaluate.py tables                                    the paper's tables (experiments/)
    python evaluate.py figures                                   its figures

The first prints the report and writes report.json and report.md. All is measured on the held-out
inputs, which training never saw, and all but the costs with one set of weights: the adapter is
switched on and off.

    nll          nats/token of the teacher's turns: base without p, base with p (the teacher),
                 adapter without p
    gap_closed   (base - adapter) / (base - teacher); 1 means that p is no longer missed
    agreement    on how many inputs the greedy first reply takes the teacher's action; the same for
                 a turn in the middle and the last one, after the recorded turns before it
    closed_loop  whole conversations of the adapter, without p, with the environment, played by the
                 base: how many take all of the teacher's actions
    recall       how much of p the adapter writes down when asked, and the lines it knows worst
    exam         rule by rule: on how many held-out turns does it decide, on how many of those does
                 the adapter act right (exam.py)
    break_even   what a request costs with the full prompt, a cached prompt and the adapter, and
                 after how many the training has paid (costs.py); and whether the adapter acts
                 the same once it is merged

Left out: a judge model; the measures are those that need nobody's opinion.
"""

import statistics
import sys
import time
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import partial
from importlib import import_module
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F

import costs
import exam
import lora
import loss
import objectives
import picture
import runs
from chat import Chat
from exam import same_action
from files import UNSEEN, write_json, write_text
from flags import WHOLE, Flags, device_flag
from model import Llama
from prompt import Prompt, Task, conversation, student_messages
from runs import Record, Run
from sampler import Sampling, Voice, say
from stats import interval, paired_difference, wilson
from synth import Plan, quality, role_play
from train import micro_batches, open_model

RECALLED = 4  # held-out records from which the prompt is asked back
EXAMINED = 100  # training records that are looked through for what shows a rule
WORDS = {  # first words of the command, and who knows what to do
    **dict.fromkeys(("os", "web_browsing", "web_shopping"), "benchmarks.driver"),
    "tables": "experiments.tables",
    "figures": "experiments.figures",
}

# ------------------------------------------------------------------------------------ measures


@torch.no_grad()
def mean_nll(model: Llama, sequences: list[loss.Sequence], tokens: int) -> float:
    """nats/token over all targets."""
    nats = sum(loss.batch_nll(model, rows).item() for rows in micro_batches(sequences, tokens))
    return nats / sum(sequence.n_targets for sequence in sequences)


def nll_of_three(model: Llama, chat: Chat, run: Run, records: list[Record]) -> dict:
    """nats/token of the teacher's turns: base without p, base with p, adapter without p."""
    tokens = run.micro_tokens
    bare = [loss.sft_sequence(chat, record) for record in records]
    prompted = [loss.teacher_sequence(chat, run.prompt, record) for record in records]
    adapter = mean_nll(model, bare, tokens)
    with lora.adapter_off(model):
        base = mean_nll(model, bare, tokens)
        teacher = mean_nll(model, prompted, tokens)
    return {"base": base, "teacher": teacher, "adapter": adapter}


def gap_closed(nll: dict[str, float]) -> float | None:
    """(base - adapter) / (base - teacher); None if p did not help the teacher either."""
    gap = nll["base"] - nll["teacher"]
    return (nll["base"] - nll["adapter"]) / gap if gap > 0 else None


def agrees(task: Task, texts: list[str], records: list[Record]) -> list[bool]:
    """For each first reply, whether it takes the teacher's action."""
    return [same_action(task, t, r.teacher) for t, r in zip(texts, records, strict=True)]


def first_replies(voice: Voice, records: list[Record], limit: int) -> list[str]:
    """What a voice says to the inputs of these records without p, greedily."""
    asked = [student_messages(record.pseudo_input) for record in records]
    return say(voice, asked, Sampling(limit))


def share(outcomes: list[bool]) -> dict:
    return wilson(sum(outcomes), len(outcomes))


def follows(task: Task, records: list[Record]) -> dict | None:
    """On how many inputs the teacher's first reply has the form of p; None if we know none."""
    if task.action is None:
        return None
    return share([task.act(record.teacher) is not None for record in records])


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
    plan = Plan(run.prompt, run.task, len(records), run.max_new_tokens, 1, 0)
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


def matched_ratio(wanted: list[int], said: list[int]) -> float:
    """Share of the wanted tokens that stand in what was said, in the same order."""
    blocks = SequenceMatcher(None, wanted, said, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(1, len(wanted))


def recall(
    voice: Voice, prompt: Prompt, records: list[Record], target: str = "prompt+reason"
) -> dict:
    """Ask for p as in training -> matched-token ratio, and each line's nats/token, worst first.

    target: of --pg-target, one that asks for p.
    """
    chat = voice.chat
    wanted = chat.tokens(prompt.text)
    asked = [objectives.pg_messages(prompt, record, target)[:-1] for record in records]
    room = chat.context - max(len(chat.encode(question, reply=True)[0]) for question in asked)
    said = say(voice, asked, Sampling(min(room, len(wanted) + 64)))
    recited = [chat.tokens(text.split(loss.BEFORE_REASON)[0]) for text in said]
    ratios = [matched_ratio(wanted, tokens) for tokens in recited]
    nats = [line_nll(voice.model, chat, prompt, record, target) for record in records]
    means = map(statistics.mean, zip(*nats, strict=True))  # of a line over the records
    pairs = zip(prompt.text.splitlines(True), means, strict=True)
    rows = [{"line": i, "text": line, "nll": nll} for i, (line, nll) in enumerate(pairs, 1)]
    lines = [row for row in rows if row["text"].strip()]
    return {"ratio": statistics.mean(ratios), "lines": sorted(lines, key=lambda row: -row["nll"])}


@torch.no_grad()
def line_nll(
    model: Llama, chat: Chat, prompt: Prompt, record: Record, target: str = "prompt+reason"
) -> list[float]:
    """nats/token of each line of p in one PG sequence."""
    sequence = objectives.pg_sequence(chat, prompt, record, target)
    device = next(model.parameters()).device
    targets = loss.next_tokens(torch.tensor([sequence.labels], device=device))
    asked = targets != loss.IGNORE
    logits = model(torch.tensor([sequence.ids], device=device), at=asked).float()
    nats = F.cross_entropy(logits, targets[asked], reduction="none").tolist()
    ends = [len(chat.tokens(text)) for text in accumulate(prompt.text.splitlines(True))]
    return [sum(nats[a:b]) / max(1, b - a) for a, b in pairwise([0, *ends])]


# -------------------------------------------------------------------------------------- report


def held_out_records(run: Run, records: list[Record]) -> list[Record]:
    """The held-out records that can be measured. Raises: ValueError if there are none."""
    _, held_out = runs.split_records(records, run.samples, run.held_out)
    held_out = [record for record in held_out if not record.overlong]
    if not held_out:
        told = "no held-out conversation fits the context; lower --max-turns, with another --out"
        raise ValueError(f"{run.folder}: {told}")
    return held_out


def measure(
    run: Run, loaded: tuple[Llama, Chat] | None, users: int, before: Path | None = None
) -> dict:
    """Measure everything -> the content of report.json. Raises ValueError for an unfinished run.

    before: the folder of an earlier adapter, which sits the exam too.
    """
    clock = time.perf_counter()
    model, chat = open_model(run, loaded)
    records, seconds = runs.load_records(run)
    held_out = held_out_records(run, records)
    training, _ = runs.split_records(records, run.samples, run.held_out)
    training += runs.covering_records(run.folder)
    prompt = run.prompt
    voice = Voice(model, chat, run.slots)
    adapter = sum(p.numel() for p in lora.adapter_parameters(model))
    with torch.device("meta"):  # an NF4 weight counts as the numbers that it stands for
        base = sum(p.numel() for p in Llama(model.config).parameters())
    nll = nll_of_three(model, chat, run, held_out)
    agree = agreement_by_turn(voice, run.task, held_out, run.max_new_tokens)
    played = closed_loop(voice, run, held_out)
    target = objectives.recalled(run.lam, run.pg_target)
    reciting = [(r, objectives.pg_sequence(chat, prompt, r, target)) for r in held_out]
    asked = [record for record, sequence in reciting if len(sequence) <= chat.context]
    recited = recall(voice, prompt, asked[:RECALLED], target) if asked else None
    shown = [record for record in training if not record.overlong][-EXAMINED:]
    found = exam.examine(voice, prompt, run.task, held_out, shown, run.max_new_tokens, before)
    unmerged = first_replies(voice, held_out, run.max_new_tokens)
    spent = seconds["synth"] + seconds["train"]
    paid = costs.break_even(model, chat, prompt, held_out, spent, users)  # merges the adapter
    merged = first_replies(voice, held_out, run.max_new_tokens)
    same = [same_action(run.task, *pair) for pair in zip(merged, unmerged, strict=True)]
    return {
        "model": run.model, "prompt_tokens": len(chat.tokens(prompt.text)), "lam": run.lam,
        "objective": run.objective, "trained": trained_how(run),
        "trainable_params": base if run.full else adapter, "total_params": base + adapter,
        "samples": len(training), "held_out": len(held_out),
        "teacher_follows": follows(run.task, held_out),
        "nll": nll, "gap_closed": gap_closed(nll),
        "agreement": agree["first"], "agreement_by_turn": agree,
        "closed_loop": closed_loop_agreement(run.task, played, held_out),
        "merged_agrees": share(same), "recall": recited, "exam": found, "break_even": paid,
        "synthesis": quality(records, run.task),
        "seconds": {**seconds, "evaluate": time.perf_counter() - clock},
    }  # fmt: skip


def trained_how(run: Run) -> str:
    """What was descended, and by which weights, in words."""
    chosen = run.objective, run.lam, run.pg_target, run.prepend_prob
    return objectives.in_words(*chosen, run.full)


def markdown(report: dict, name: str) -> str:
    """The report as one page: a table a question."""
    nll = report["nll"]
    whom = ("base", "teacher", "adapter")
    part = 100 * report["trainable_params"] / report["total_params"]
    rows = [
        f"| agreement, {name} turn | {' | '.join(interval(row[who]) for who in whom)} |"
        for name, row in report["agreement_by_turn"].items()
        if row["teacher"]["n"]
    ]
    loop = report["closed_loop"]["conversations"]
    rows.append(f"| all actions, closed loop | | {loop['n']} of {loop['n']} | {interval(loop)} |")
    return f"""# {name}: {report["prompt_tokens"]} prompt tokens in {report["trainable_params"]:,} \
parameters ({part:.1f} %)

{report["held_out"]} held-out inputs; trained on {report["samples"]}, {report["trained"]}\
{followed(report["teacher_follows"])}

| (intervals of 95 %) | base, no prompt | teacher, prompt | adapter, no prompt |
|---|---|---|---|
| nll (nats/token) | {" | ".join(f"{nll[who]:.3f}" for who in whom)} |
{chr(10).join(rows)}

{behaves(report)}

{internalised(report)}

{exam.markdown(report)}

{costs.markdown(report)}
"""


def followed(teacher: dict | None) -> str:
    """Does the teacher itself do what p says? More than that an adapter cannot learn from it."""
    if teacher is None:
        return ""
    return f"; the teacher follows the form of the prompt on {interval(teacher)}"


def behaves(report: dict) -> str:
    """How the conversations of the closed loop went, and whether merging changes the adapter."""
    loop = report["closed_loop"]
    actions = loop["actions"]
    end = loop["final_action"]
    return f"""in the closed loop (the base plays the environment) the adapter takes \
{actions["k"]} of {actions["n"]} actions as the teacher; {end["adapter"]["k"]} of \
{end["adapter"]["n"]} conversations end with a final action, the teacher's in {end["teacher"]["k"]}

merged into dense weights the adapter takes the same first action on \
{interval(report["merged_agrees"])}"""


def internalised(report: dict) -> str:
    """How much of the gap is closed and of p is known; says so where there is no answer."""
    closed = report["gap_closed"]
    known = report["recall"]
    gap = "no gap to close: the prompt does not help" if closed is None else f"{closed:.3f}"
    if known is None:
        return f"gap closed {gap}; recall of the prompt not asked: it does not fit the context"
    rows = [f"| `{row['text'].strip()[:70]}` | {row['nll']:.3f} |" for row in known["lines"][:3]]
    return f"""gap closed {gap}; recall of the prompt {known["ratio"]:.3f} (whoever has the \
adapter can read the prompt)

| least known lines of the prompt | nats/token |
|---|---|
{chr(10).join(rows)}"""


def report(
    folder: Path,
    loaded: tuple[Llama, Chat] | None,
    device: str | None = None,
    users: int = costs.USERS,
    model: str | None = None,
    before: Path | None = None,
) -> None:
    """Make the report of a finished run, write it into its folder and print it.

    model: where the base of the run is now. before: an earlier run, whose adapter sits the exam
    too.
    """
    run = runs.load_run(folder, device, model)
    found = measure(run, loaded, users, before)
    page = markdown(found, folder.name).translate(UNSEEN)
    try:
        write_json(folder / "report.json", found)
        write_text(folder / "report.md", page)
        rows = runs.read_metrics(folder / "metrics.jsonl")
        write_text(folder / "report.svg", picture.draw(found, rows, folder.name).translate(UNSEEN))
    except OSError as error:
        raise ValueError(f"{folder}: {error}; free some space and run it again") from None
    print(f"\n{page}")


# ------------------------------------------------------------------------------------ two runs


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


# ---------------------------------------------------------------------------------- the command


def write_merged(folder: Path, target: Path, device: str | None, model: str | None) -> None:
    """Write the base of a run with its adapter folded in, as a plain checkpoint that needs no LoRA.

    Raises: ValueError if the target is the base's own folder.
    """
    run = runs.load_run(folder, device, model)
    lora.merge(open_model(run)[0], target, run.base)
    print(f"{target}: {run.model} with the adapter of {folder} folded in")


def command(argv: list[str]) -> None:
    """Report on a run, compare two, write one as a plain checkpoint, or do what a word says."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in WORDS:
            raise ValueError(f"{argv[0]} is none of {', '.join(WORDS)}; give one of them, or --run")
        return import_module(WORDS[argv[0]]).command(argv)
    parser = Flags(prog="evaluate.py", description="Report on a finished run.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of genpi.py")
    add("--device", type=device_flag, choices=("cpu", "cuda"), help="by default the run's own")
    add("--model", help="folder or Hub id of the base model, if it is no more where it was")
    add("--against", type=Path, metavar="RUN", help="compare with this run instead")
    add("--before", type=Path, metavar="RUN", help="examine the adapter of this run, too")
    add("--users", type=WHOLE, default=costs.USERS, help="requests in flight at a time")
    add("--merge", type=Path, metavar="FOLDER", help="write model + adapter there instead")
    args = parser.parse_args(argv)
    if args.merge:
        write_merged(args.run, args.merge, args.device, args.model)
    elif args.against:
        compare(args.run, args.against, args.device, args.model)
    else:
        report(args.run, None, args.device, args.users, args.model, args.before)


def main(argv: list[str] | None = None) -> int:
    return runs.exit_code(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
