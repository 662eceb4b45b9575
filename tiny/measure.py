"""Measure the embedded model: does it read os.txt, and can it play every part that GenPI gives it?

    python tiny/measure.py                  the model beside this file; ten minutes of processor time
    python tiny/measure.py --model OTHER --bits 4 --json other.json
    python tiny/measure.py --run runs/os    the agent only: with os.txt, without, and with the adapter

    agent         works through whole conversations; what it is shown follows from nothing it knows
    no prompt     answers the bare wish, where nothing of os.txt may show
    environment   prints what the agent's command would print, and ends the conversation
    inputs        lists new problems
    reasons       says why the prompt turns the first reply into the second
    protocols     the agent again, under prompts in which every label is a nonsense word
    os rules      problems for each house rule of os.txt: is it obeyed, is it absent elsewhere?
    os rules gone the same without the line of the rule, which must not show any more
    rules         random protocols under one to seven random house rules, whose values are as new to
    rules gone    the model as those of os.txt; and without the line of one of them

The problems are fresh and equally many of each kind; training draws its own from other seeds. Each
rate is k of n with its Wilson 95 % interval. "Right" means equal to the commands that `world.py`
has for the problem, so another command that would do as well counts as wrong.

Leaves out: what GenPI makes of the model, which `evaluate.py` measures.
"""

import argparse
import json
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the modules of the project; no package is installed

import world
from corpus import OS, os_prompt, random_examples, random_prompt, random_protocol
from rules import FAMILIES, OS_RULES, obey, obeyed, problem_for, random_rules

from flags import SEED, WHOLE, Flags, exit_code
from lora import adapter_off
from model import load_model
from prompt import (
    END,
    conversation,
    environment_messages,
    os_action,
    parse_demos,
    student_messages,
)
from prompt import OS as TASK
from runs import Record, load_run
from sampler import Sampling, Voice, say
from stats import wilson
from synth import Plan, more_inputs, normalised, reason_messages
from train import open_model

TURN = Sampling(128)  # greedy
ACTS = {"run": "bash", "finish": "finish", "answer": "answer"}  # of os_action
OF_OS = re.compile(rf"\b(Think|Act):|\b({'|'.join(ACTS.values())})\b")  # belongs in no general reply
PATH = r"/[\w/]+"
SLOTS = {"d": PATH, "e": PATH, "f": PATH + r"\.\w+", "g": r"\w+\.\w+", "m": "[0-7]{3}"}  # else \w+
PRINTS = {  # fact of the machine -> how it is printed
    "count": r"\d+", "owner": "|".join(world.USERS), "mode": "[0-7]{3}", "first": "[a-z]+",
    "last": "[a-z]+", "largest": r"\w+\.\w+", "newest": r"\w+\.\w+",
}  # fmt: skip


class Rates(dict):
    """name of a rate -> its trials [(kind, passed, said)]; said: what was asked and written."""

    def note(self, kind, said, passed):
        for name, ok in passed.items():
            self.setdefault(name, []).append((kind, bool(ok), said))


def balanced(n, rng, surprising=False):
    """n fresh problems, all kinds in turn. surprising: the outputs do not follow from the names."""
    found = {kind: [] for kind in world.KINDS}
    while min(map(len, found.values())) < n // len(found):
        know = world.surprise(rng) if surprising else world.machine
        problem = world.random_problem(rng, know)
        found[problem.kind].append(problem)
    return [problem for row in zip(*found.values(), strict=False) for problem in row][:n]


# ------------------------------------------------------------------------------------------- agent


def reader(protocol):
    """A strict reading of turns: text -> (thought, act, x) with act run, finish or answer, or None.

    A command is one line here, since no problem of the world needs two.
    """
    forms = {}
    for act in ACTS:
        form = re.escape(protocol.turn("THOUGHT", act, "VALUE"))
        forms[act] = form.replace("THOUGHT", r"([^\n]+)").replace("VALUE", r"([^\n]+)")

    def read(text):
        found = ((act, re.fullmatch(form, text)) for act, form in forms.items())
        return next(((t[1], act, t[2] if act != "finish" else None) for act, t in found if t), None)

    return read


def action(protocol, text):
    """What a turn does, (act, x) or None: for os.txt as os_action reads it, else as `reader`."""
    if protocol is not OS:
        move = reader(protocol)(text)
        return move and move[1:]
    taken = os_action(text)
    act = taken and next(act for act, name in ACTS.items() if name == taken[0])
    return taken and (act, taken[1] if len(taken) > 1 else None)


def printed(problem, rules, command):
    """The output of a command: the one that belongs to the problem, else nothing."""
    known = {move.x: move.output for some in ((), rules) for move in obey(problem, some)}
    return known.get(command) or ""


def converse(voice, cases, with_prompt=True):
    """Let the agent work on cases (problem, prompt, protocol, rules) -> the texts, agent first."""
    talks, busy = [[] for _ in cases], range(len(cases))
    for _ in range(TASK.max_turns):
        views = {i: cases[i][1].teacher if with_prompt else student_messages for i in busy}
        openings = {i: view(cases[i][0].wish) for i, view in views.items()}
        asked = {i: conversation(opening, talks[i]) for i, opening in openings.items()}
        room = TURN.max_new_tokens
        asked = {i: messages for i, messages in asked.items() if voice.fits(messages, room)}
        busy = []
        for i, text in zip(asked, say(voice, list(asked.values()), TURN), strict=True):
            problem, _, protocol, rules = cases[i]
            talks[i].append(text)
            taken = action(protocol, text)
            if taken and taken[0] == "run":
                talks[i].append(protocol.observe(printed(problem, rules, taken[1])))
                busy.append(i)
    return talks


def judge(rates, name, cases, talks):
    """Note which conversations have the protocol's form in every turn, and which go right."""
    for (problem, _, protocol, rules), talk in zip(cases, talks, strict=True):
        formal = [reader(protocol)(turn) for turn in talk[::2]]
        actions = [action(protocol, turn) for turn in talk[::2]]
        wanted = [(move.act, move.x) for move in obey(problem, rules)]
        rates.note(problem.kind, "\n\n".join([problem.wish, *talk]), {
            f"{name}: follows the prompt": formal and all(formal) and formal[-1][1] != "run",
            f"{name}: first action right": actions[:1] == wanted[:1],
            f"{name}: solved": actions == wanted,
        })  # fmt: skip


def judge_rules(rates, name, cases, talks, gone=None):
    """Note of every house rule whether it is obeyed where it applies, and absent where it does not.

    gone: the rule of each case whose line was taken out; it alone is judged, and must be absent.
    """
    for i, ((problem, _, protocol, rules), talk) in enumerate(zip(cases, talks, strict=True)):
        moves = [reader(protocol)(turn) for turn in talk[::2]]
        told = [move for move in moves if move]
        said = "\n\n".join([problem.wish, *talk])
        wanted = obey(problem, rules)
        if gone:
            rates.note(gone[i].family, f"{gone[i].line}\n\n{said}", {f"{name}: absent": not gone[i].shown(told)})
            continue
        for rule in rules:
            if rule.applies(problem) and rule.shown([move[:3] for move in wanted]):  # no other forbids it
                passed = {f"{name}: {rule.family} obeyed": obeyed(rule, moves, wanted)}
            else:
                passed = {f"{name}: absent where it does not apply": not rule.shown(told)}
            rates.note(rule.family, f"{rule.line}\n\n{said}", passed)


def os_rule_cases(rng, n):
    """(cases, the rule of each): n problems for every house rule of os.txt."""
    chosen = [rule for rule in OS_RULES for _ in range(n)]
    return [(problem_that_applies(rng, rule, OS_RULES), os_prompt(), OS, OS_RULES) for rule in chosen], chosen


def problem_that_applies(rng, rule, rules):
    """A fresh problem in which a rule among rules applies, and no other is in its way."""
    while True:
        problem = problem_for(rng, [rule], share=1)
        if rule.applies(problem) and rule.shown([move[:3] for move in obey(problem, rules)]):
            return problem


def os_rules(rates, voice, rng, n):
    """The house rules of os.txt with their lines, and one line at a time without."""
    cases, due = os_rule_cases(rng, n)
    judge_rules(rates, "os rules", cases, converse(voice, cases))
    cases = [(x, os_prompt(rule), OS, [r for r in OS_RULES if r is not rule])
             for (x, *_), rule in zip(cases, due, strict=True)]  # fmt: skip
    judge_rules(rates, "os rules gone", cases, converse(voice, cases), due)


def random_rule_cases(rng, n):
    """(cases, the same without the line of the rule in mind, that rule): one to seven rules each."""
    cases, without, due = [], [], []
    while len(cases) < n:
        rules = random_rules(rng, rng.randint(1, 7))
        rule = next((r for r in rules if r.family == FAMILIES[len(cases) % len(FAMILIES)]), None)
        if rule is None:
            continue
        problem, p, seed = problem_that_applies(rng, rule, rules), random_protocol(rng), rng.getrandbits(32)
        examples = random_examples(rng, rules)
        due.append(rule)
        for some, row in ((rules, cases), ([r for r in rules if r is not rule], without)):
            row.append((problem, random_prompt(random.Random(seed), p, examples, some), p, some))
    return cases, without, due


# ------------------------------------------------------------------------------------- other parts


def no_prompt(rates, problems, replies):
    for problem, reply in zip(problems, replies, strict=True):
        rates.note(problem.kind, f"{problem.wish}\n\n{reply}", {
            "no prompt: nothing of os.txt": reply and not OF_OS.search(reply),
            "no prompt: names the right command": f"`{problem.steps[0].command}`" in reply,
        })  # fmt: skip


def environment(rates, voice, prompt, problems, rules):
    """Note what the environment says to right agent turns -> how varied its numbers are."""
    asked = []  # (problem, turns so far, the move to be answered or None after the last turn)
    for problem in problems:
        moves, turns = obey(problem, rules), OS.turns(problem, rules)
        asked += [(problem, turns[: 2 * i + 1], move) for i, move in enumerate(moves[:-1])]
        asked.append((problem, turns, None))
    views = [environment_messages(prompt, TASK, p.wish, turns) for p, turns, _ in asked]
    replies = say(voice, views, TURN)
    numbers, due = set(), set()
    for (problem, turns, move), reply in zip(asked, replies, strict=True):
        said = f"{problem.wish}\n\n{turns[-1]}\n\n{reply}"
        if move is None:
            rates.note(problem.kind, said, {"environment: [END] at the end": reply == END})
            continue
        right, fact = OS.observe(move.output), world.FACT.get(move.use)
        passed = {"form and kind": form_of(move, fact, reply), "as the machine": reply == right}
        rates.note(problem.kind, said, {f"environment: {k}": ok for k, ok in passed.items()})
        if fact == "count" and move.output.isdigit():
            numbers, due = numbers | {reply}, due | {right}
    return {"environment: distinct numbers": f"{len(numbers)} (the machine has {len(due)})"}


def form_of(move, fact, reply):
    """Has a reply the form of an output to this command: a fact of its kind, an error or nothing?"""
    if fact is None and move.use in world.CHANGES:
        prints = [f".*{world.NO_FILE}"]
    elif fact is None:
        prints = [".+"] if move.use == "check" else ["yes", "no"]
    else:
        prints = [PRINTS[fact], rf".*{world.NO_FILE}(\n0)?", rf"[a-z ]+ {re.escape(world.CUT)}"]
    form = re.escape(OS.observe("VALUE")).replace("VALUE", f"({'|'.join(prints)})")
    return reply == OS.observe("") or re.fullmatch(form, reply)


def wish_patterns():
    """kind -> a regular expression for its wishes: its templates with any names in the slots."""
    openers = "|".join(map(re.escape, dict.fromkeys(world.OPENERS)))

    def pattern(wish):
        return re.sub(r"\\{(\w)\\}", lambda slot: SLOTS.get(slot[1], r"\w+"), re.escape(wish))

    rows = {**world.QUESTIONS, **world.CHANGES, **world.CHAINS}.items()
    return {kind: f"(?:{openers})(?:{'|'.join(map(pattern, row[0]))})" for kind, row in rows}


def inputs(rates, voice, prompt, n, seed):
    """Note about n pseudo inputs, sampled in lists of ten -> their spread over the kinds."""
    patterns, kinds = wish_patterns(), []
    demos = parse_demos((HERE.parent / "demos" / "os.txt").read_text(encoding="utf-8"))
    task = replace(TASK, demos=demos)
    seen = {normalised(demo) for demo in demos}
    for item in more_inputs(voice, Plan(prompt, task, n, 128, 512, seed), [], n, seed):
        kind = next((k for k, form in patterns.items() if re.fullmatch(form, item)), "none")
        new = normalised(item) not in seen
        rates.note(kind, item, {"inputs: usable": kind != "none", "inputs: distinct": new})
        kinds.append(kind)
        seen.add(normalised(item))
    met, most = {*kinds} - {"none"}, max(patterns, key=kinds.count)
    spread = f"{len(met)} of {len(patterns)}, most often {most} ({kinds.count(most)})"
    return {"inputs: kinds": spread}


def reasons(rates, problems, texts):
    """Note the reasons -> their mean length."""
    counts = [len(re.findall(r'[.!?]["`]?(?=\s|$)', text)) for text in texts]
    for i, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        rates.note(problem.kind, text, {
            "reasons: 3 to 7 sentences": 3 <= counts[i] <= 7,
            "reasons: distinct": text not in texts[:i],
            "reasons: name the command": f"`{problem.steps[0].command}`" in text,
        })  # fmt: skip
    return {"reasons: mean sentences": round(sum(counts) / len(counts), 2)}


# ------------------------------------------------------------------------------------------ report


def measure(voice, args):
    """All parts in turn -> (rates, other values)."""
    rates, rng = Rates(), random.Random(f"measure-{args.seed}")
    prompt = os_prompt()
    problems = balanced(args.problems, rng, surprising=True)
    cases = [(problem, prompt, OS, OS_RULES) for problem in problems]
    talks = converse(voice, cases)
    judge(rates, "agent", cases, talks)
    os_rules(rates, voice, rng, args.problems // len(OS_RULES))
    cases, without, due = random_rule_cases(rng, args.problems)
    talks_of_rules = converse(voice, cases)
    judge(rates, "rules", cases, talks_of_rules)
    judge_rules(rates, "rules", cases, talks_of_rules)
    judge_rules(rates, "rules gone", without, converse(voice, without), due)
    students = say(voice, [student_messages(problem.wish) for problem in problems], TURN)
    no_prompt(rates, problems, students)
    values = environment(rates, voice, prompt, balanced(args.problems, rng), OS_RULES)
    values |= inputs(rates, voice, prompt, 6 * args.problems // 5, args.seed)
    some = problems[: len(problems) // 3]  # the last two parts are slow
    replies = zip(some, students, talks, strict=False)
    records = [Record(0, p.wish, talk, yS) for p, yS, talk in replies]
    asked = [reason_messages(prompt, record) for record in records]
    seeds = [args.seed + i for i in range(len(asked))]
    values |= reasons(rates, some, say(voice, asked, Sampling(512, 0.7, 0.9), seeds))
    protocols = [random_protocol(rng, strange=1.0) for _ in problems]
    cases = [(x, random_prompt(rng, p, random_examples(rng, ())), p, ()) for x, p in zip(problems, protocols, strict=True)]
    judge(rates, "protocols", cases, converse(voice, cases))
    return rates, values


def three_ways(folder, problems, seed):
    """The agent on the imaginary machine: the base with os.txt and without, and the adapter.

    The house rules are judged on problems of their own, as far as they stand in the run's prompt.
    """
    run = load_run(folder)
    model, chat = open_model(run)
    voice, rates = Voice(model, chat), Rates()
    rng = random.Random(f"measure-{seed}")
    rules = [rule for rule in OS_RULES if rule.line in run.prompt.text]
    plain = [(problem, run.prompt, OS, rules) for problem in balanced(problems, rng, surprising=True)]
    ruled = [(problem_that_applies(rng, rule, rules), run.prompt, OS, rules) for rule in rules for _ in range(24)]

    def play(name, with_prompt):
        judge(rates, name, plain, converse(voice, plain, with_prompt))
        judge_rules(rates, name, ruled, converse(voice, ruled, with_prompt))

    play("adapter", with_prompt=False)
    with adapter_off(model):
        play("prompt", with_prompt=True)
        play("neither", with_prompt=False)
    return rates


def summary(trials):
    """k of n with its interval; [k, n] of every kind with a miss, worst first; some misses."""
    counts = {kind: [0, 0] for kind, _, _ in trials}
    for kind, passed, _ in trials:
        counts[kind] = [counts[kind][0] + passed, counts[kind][1] + 1]
    worst = sorted(counts.items(), key=lambda row: row[1][0] / row[1][1])
    return {
        **wilson(sum(passed for _, passed, _ in trials), len(trials)),
        "kinds": {kind: [k, n] for kind, (k, n) in worst if k < n},
        "misses": [said for _, passed, said in trials if not passed][:5],
    }


def print_table(rates, values):
    print(f"{'rate':<46}{'k of n':>10}{'%':>7}  {'95 % interval':<15}worst kinds")
    for name, row in rates.items():
        worst = ", ".join(f"{kind} {k}/{n}" for kind, (k, n) in list(row["kinds"].items())[:4])
        interval = f"{100 * row['low']:.1f} - {100 * row['high']:.1f}"
        share = f"{row['k']:>3} of {row['n']:<3}{100 * row['k'] / row['n']:>7.1f}"
        print(f"{name:<46}{share}  {interval:<15}{worst}".rstrip())
    for name, value in values.items():
        print(f"{name:<46}{value}")


def command(argv):
    parser = Flags(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(HERE), help="checkpoint folder")
    parser.add_argument("--run", type=Path, help="run folder of genpi.py: measure its adapter")
    parser.add_argument("--bits", type=int, default=16, choices=(4, 16), help="4: blocks in NF4")
    parser.add_argument("--problems", type=WHOLE, default=204, help="a multiple of the kinds")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--json", type=Path, help="write the table here too, with some misses")
    args = parser.parse_args(argv)
    n = len(world.KINDS)
    if args.problems < n or args.problems % n:
        raise ValueError(f"--problems {args.problems}: not a multiple of {n}, the kinds; take {6 * n}")
    clock = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.run:
        trials, values = three_ways(args.run, args.problems, args.seed), {}
    else:
        model, chat = load_model(args.model, device, bits=args.bits)
        trials, values = measure(Voice(model, chat), args)
    rates = {name: summary(some) for name, some in trials.items()}
    print_table(rates, values)
    seconds = round(time.perf_counter() - clock)
    print(f"{args.run or f'{args.model}, {args.bits} bits'}, seed {args.seed}, {seconds} s")
    if args.json:
        about = {key: getattr(args, key) for key in ("model", "bits", "problems", "seed")}
        report = {**about, "seconds": seconds, "rates": rates, "values": values}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main(argv=None):
    return exit_code(command, argv)


if __name__ == "__main__":
    sys.exit(main())
