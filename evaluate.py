"""How much of the prompt was internalised, and does it pay?

    python evaluate.py --run runs/os                             the report of a finished run
    python evaluate.py --run runs/os --before runs/earlier       both adapters sit the exam
    python evaluate.py --run runs/os --against runs/os-sft       do two adapters differ?
    python evaluate.py --run runs/os --merge merged              the adapter, folded in
    python evaluate.py os --run runs/os                          a benchmark
    python evaluate.py tables                                    an experiment (COMMANDS)

The first prints the report and writes report.json, report.md and report.svg. All is measured on the
held-out inputs, which training never saw, and all but the costs with one set of weights: the
adapter is switched on and off.

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
from difflib import SequenceMatcher
from importlib import import_module
from itertools import accumulate, pairwise
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
from agreement import (
    agreement_by_turn,
    closed_loop,
    closed_loop_agreement,
    first_replies,
    held_out_records,
    share,
)
from chat import Chat
from compare import compare
from exam import same_action
from files import UNSEEN, write_json, write_text
from flags import WHOLE, Flags, device_flag, exit_code
from model import Llama
from prompt import Prompt, Task
from runs import Record, Run
from sampler import Sampling, Voice, say
from stats import interval
from synth import quality
from train import fitting, micro_batches, open_model

RECALLED = 4  # held-out records from which the prompt is asked back
COMMANDS = {  # first word of a command line: the module whose command it is
    **dict.fromkeys(("os", "web_browsing", "web_shopping"), "benchmarks.driver"),
    "tables": "experiments.tables",
    "figures": "experiments.figures",
    "few-samples": "experiments.few_samples",
    "rules": "experiments.rules",
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


def follows(task: Task, records: list[Record]) -> dict | None:
    """On how many inputs the teacher's first reply has the form of p; None if we know none."""
    if task.action is None:
        return None
    return share([task.act(record.teacher) is not None for record in records])


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
    own = prompt.text.count(loss.BEFORE_REASON)  # where p itself has that word
    parts = [text.split(loss.BEFORE_REASON)[: own + 1] for text in said]
    recited = [chat.tokens(loss.BEFORE_REASON.join(part)) for part in parts]
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


def measure(
    run: Run, loaded: tuple[Llama, Chat] | None, users: int, before: Path | None = None
) -> dict:
    """Measure everything -> the content of report.json. Raises ValueError for an unfinished run.

    before: the folder of an earlier adapter, which sits the exam too.
    """
    clock = time.perf_counter()
    if before and not (before / "adapter_config.json").exists():
        raise ValueError(f"{before} has no adapter; give the --out of an earlier run as --before")
    model, chat = open_model(run, loaded)
    records, seconds = runs.load_records(run)
    held_out = held_out_records(run, records)
    training, _ = runs.split_records(records, run.samples, run.held_out)
    training += runs.covering_records(run.folder)
    prompt = run.prompt
    voice = Voice(model, chat, run.slots)
    with torch.device("meta"):  # an NF4 weight counts as the numbers that it stands for
        base = sum(p.numel() for p in Llama(model.config).parameters())
    adapter = sum(p.numel() for p in lora.adapter_parameters(model))
    nll = nll_of_three(model, chat, run, held_out)
    agree = agreement_by_turn(voice, run.task, held_out, run.max_new_tokens)
    played = closed_loop(voice, run, held_out)
    target = objectives.recalled(run.lam, run.pg_target)
    reciting = [(r, objectives.pg_sequence(chat, prompt, r, target)) for r in held_out]
    asked = [record for record, sequence in reciting if len(sequence) <= chat.context]
    recited = recall(voice, prompt, asked[:RECALLED], target) if asked else None
    kinds = run.lam, run.objective, run.pg_target
    shown = [record for record, *_ in fitting(chat, prompt, training, *kinds)]
    found = exam.examine(voice, prompt, run.task, held_out, shown, run.max_new_tokens, before)
    unmerged = first_replies(voice, held_out, run.max_new_tokens)
    spent = seconds["synth"] + seconds["train"]
    paid = costs.break_even(model, chat, prompt, held_out, spent, users)  # merges the adapter
    merged = first_replies(voice, held_out, run.max_new_tokens)
    same = [same_action(run.task, *pair) for pair in zip(merged, unmerged, strict=True)]
    return {
        "model": run.model, "prompt_tokens": len(chat.tokens(prompt.text)), "lam": run.lam,
        "objective": run.objective,
        "trained": objectives.in_words(
            run.objective, run.lam, run.pg_target, run.prepend_prob, run.full
        ),
        "trainable_params": base if run.full else adapter, "total_params": base + adapter,
        "samples": len(shown), "held_out": len(held_out),
        "teacher_follows": follows(run.task, held_out),
        "nll": nll, "gap_closed": gap_closed(nll),
        "agreement": agree["first"], "agreement_by_turn": agree,
        "closed_loop": closed_loop_agreement(run.task, played, held_out),
        "merged_agrees": share(same), "recall": recited, "exam": found, "break_even": paid,
        "synthesis": quality(records, run.task),
        "seconds": {**seconds, "evaluate": time.perf_counter() - clock},
    }  # fmt: skip


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
    print(f"\n{page}")
    try:
        write_json(folder / "report.json", found)
        write_text(folder / "report.md", page)
        rows = runs.read_metrics(folder / "metrics.jsonl")
        write_text(folder / "report.svg", picture.draw(found, rows, folder.name).translate(UNSEEN))
    except OSError as error:
        raise ValueError(f"{folder}: {error}; free some space and run it again") from None


# ---------------------------------------------------------------------------------- the command


HELD = "args.json", "config.json", "*.safetensors*", "chat_template.jinja"  # a run or a model


def write_merged(folder: Path, target: Path, device: str | None, model: str | None) -> None:
    """Write the base of a run with its adapter folded in, as a plain checkpoint that needs no LoRA.

    Raises: ValueError if the target is the base's own folder, or holds a run or another model.
    """
    run = runs.load_run(folder, device, model)
    if taken := [file.name for name in HELD for file in sorted(target.glob(name))]:
        raise ValueError(f"{target} holds {taken[0]} already; choose another folder for --merge")
    lora.save_dense(open_model(run)[0], target, run.base)
    print(f"{target}: {run.model} with the adapter of {folder} folded in")


def command(argv: list[str]) -> None:
    """Report on a run, compare two, write one as a plain checkpoint, or do what the word says."""
    if argv and not argv[0].startswith("-"):
        return word(argv)
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


def word(argv: list[str]) -> None:
    """A command of its own, by its first word. Raises: ValueError if there is none like that."""
    if argv[0] not in COMMANDS:
        raise ValueError(f"{argv[0]}: no such command; give {', '.join(COMMANDS)}, or --run RUN")
    import_module(COMMANDS[argv[0]]).command(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
