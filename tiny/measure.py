"""Measure the embedded model: does it read os.txt, and can it play every part that GenPI gives it?

    python tiny/measure.py                  the model beside this file; five minutes of processor time
    python tiny/measure.py --model OTHER --bits 4 --json other.json
    python tiny/measure.py --run runs/os    the agent only: with os.txt, without, and with the adapter

    agent         works through whole conversations; what it is shown follows from nothing it knows
    no prompt     answers the bare wish, where nothing of os.txt may show
    environment   prints what the agent's command would print, and ends the conversation
    inputs        lists new problems
    reasons       says why the prompt turns the first reply into the second
    protocols     the agent again, under prompts in which every label is a nonsense word

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
from corpus import OUTPUTS, Protocol, random_prompt, random_protocol

from lora import adapter_off
from model import load_model
from prompt import (
    END,
    conversation,
    environment_messages,
    os_action,
    parse_demos,
    parse_prompt,
    student_messages,
)
from prompt import OS as TASK
from runs import Record, load_run
from sampler import Sampling, Voice, say
from stats import wilson
from synth import Plan, more_inputs, normalised, reason_messages
from train import open_model

TURN = Sampling(128)  # greedy
BLOCK = "{name}\n\n```{lang}\n{x}\n```"
ACTS = ("bash", "finish", "answer")
OS = Protocol(  # what os.txt lays down
    "Think", "Act", *ACTS, "{}:", BLOCK, "{name}({x})", "bash", "\n\n", OUTPUTS[0], "{}"
)
OF_OS = re.compile(rf"\b(Think|Act):|\b({'|'.join(ACTS)})\b")  # belongs in no general reply
PATH = r"/[\w/]+"
SLOTS = {"d": PATH, "e": PATH, "f": PATH + r"\.\w+", "g": r"\w+\.\w+", "m": "[0-7]{3}"}  # else \w+
PRINTS = {  # fact of the machine -> how it is printed
    "count": r"\d+", "owner": "|".join(world.USERS), "mode": "[0-7]{3}", "first": "[a-z]+",
    "last": "[a-z]+", "largest": r"\w+\.\w+", "newest": r"\w+\.\w+", "exists": "yes|no",
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
        output = world.surprise(rng) if surprising else world.machine
        problem = world.random_problem(rng, output)
        found[problem.kind].append(problem)
    return [problem for row in zip(*found.values(), strict=False) for problem in row][:n]


# ------------------------------------------------------------------------------------------- agent


def reader(protocol):
    """A strict reading of turns: text -> action as from os_action, None for any other text.

    A command is one line here, since no problem of the world needs two.
    """
    forms = {}
    for name, act in zip(("run", "finish", "answer"), ACTS, strict=True):
        form = re.escape(protocol.turn("THOUGHT", name, "VALUE"))
        forms[act] = form.replace("THOUGHT", r"[^\n]+").replace("VALUE", r"([^\n]+)")

    def read(text):
        found = ((act, re.fullmatch(form, text)) for act, form in forms.items())
        return next(((act, *match.groups()) for act, match in found if match), None)

    return read


def printed(problem, command):
    """The output of a command: the problem's own, else one of the right kind, else nothing."""
    known = {command: output for _, command, output in problem.steps}
    try:
        return known[command] if command in known else world.surprise(random.Random(0))(command)
    except (KeyError, ValueError):  # a name or a command that the imaginary machine does not have
        return ""


def converse(voice, cases, with_prompt=True):
    """Let the agent work on cases (problem, prompt, protocol) -> the texts of each, agent first."""
    talks, busy = [[] for _ in cases], range(len(cases))
    for _ in range(TASK.max_turns):
        views = {i: cases[i][1].teacher if with_prompt else student_messages for i in busy}
        openings = {i: view(cases[i][0].wish) for i, view in views.items()}
        asked = {i: conversation(opening, talks[i]) for i, opening in openings.items()}
        room = TURN.max_new_tokens
        asked = {i: messages for i, messages in asked.items() if voice.fits(messages, room)}
        busy = []
        for i, text in zip(asked, say(voice, list(asked.values()), TURN), strict=True):
            problem, _, protocol = cases[i]
            talks[i].append(text)
            action = os_action(text) if protocol is OS else reader(protocol)(text)
            if action and action[0] == "bash":
                talks[i].append(protocol.observe(printed(problem, action[1])))
                busy.append(i)
    return talks


def judge(rates, name, cases, talks):
    """Note which conversations have the protocol's form in every turn, and which go right."""
    for (problem, _, protocol), talk in zip(cases, talks, strict=True):
        formal = [reader(protocol)(turn) for turn in talk[::2]]
        actions = [os_action(turn) for turn in talk[::2]] if protocol is OS else formal
        end = ("finish",) if problem.answer is None else ("answer", problem.answer)
        wanted = [*(("bash", command) for _, command, _ in problem.steps), end]
        rates.note(problem.kind, "\n\n".join([problem.wish, *talk]), {
            f"{name}: follows the prompt": formal and all(formal) and formal[-1][0] != "bash",
            f"{name}: first command right": actions[:1] == wanted[:1],
            f"{name}: solved": actions == wanted,
        })  # fmt: skip


# ------------------------------------------------------------------------------------- other parts


def no_prompt(rates, problems, replies):
    for problem, reply in zip(problems, replies, strict=True):
        rates.note(problem.kind, f"{problem.wish}\n\n{reply}", {
            "no prompt: nothing of os.txt": reply and not OF_OS.search(reply),
            "no prompt: names the right command": f"`{problem.steps[0][1]}`" in reply,
        })  # fmt: skip


def environment(rates, voice, prompt, problems):
    """Note what the environment says to right agent turns -> how varied its numbers are."""
    asked = []  # (problem, turns so far, the command to be answered or None after the last turn)
    for problem in problems:
        turns = OS.turns(problem)
        asked += [(problem, turns[: 2 * i + 1], step[1]) for i, step in enumerate(problem.steps)]
        asked.append((problem, turns, None))
    views = [environment_messages(prompt, TASK, p.wish, turns) for p, turns, _ in asked]
    replies = say(voice, views, TURN)
    numbers, due = set(), set()
    for (problem, turns, command), reply in zip(asked, replies, strict=True):
        said = f"{problem.wish}\n\n{turns[-1]}\n\n{reply}"
        if command is None:
            rates.note(problem.kind, said, {"environment: [END] at the end": reply == END})
            continue
        right = OS.observe(world.machine(command))
        fact = next(fact for form, fact in world.RULES if re.fullmatch(form, command))
        form = re.escape(OS.observe(fact and "VALUE")).replace("VALUE", f"({PRINTS.get(fact)})")
        passed = {"form and kind": re.fullmatch(form, reply), "as the machine": reply == right}
        rates.note(problem.kind, said, {f"environment: {k}": ok for k, ok in passed.items()})
        if fact == "count":
            numbers, due = numbers | {reply}, due | {right}
    return {"environment: distinct numbers": f"{len(numbers)} (the machine has {len(due)})"}


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
            "reasons: name the command": f"`{problem.steps[0][1]}`" in text,
        })  # fmt: skip
    return {"reasons: mean sentences": round(sum(counts) / len(counts), 2)}


# ------------------------------------------------------------------------------------------ report


def measure(voice, args):
    """All parts in turn -> (rates, other values)."""
    rates, rng = Rates(), random.Random(f"measure-{args.seed}")
    prompt = parse_prompt((HERE.parent / "os.txt").read_text(encoding="utf-8"))
    problems = balanced(args.problems, rng, surprising=True)
    cases = [(problem, prompt, OS) for problem in problems]
    talks = converse(voice, cases)
    judge(rates, "agent", cases, talks)
    students = say(voice, [student_messages(problem.wish) for problem in problems], TURN)
    no_prompt(rates, problems, students)
    values = environment(rates, voice, prompt, balanced(args.problems, rng))
    values |= inputs(rates, voice, prompt, 6 * args.problems // 5, args.seed)
    some = problems[: len(problems) // 3]  # the last two parts are slow
    replies = zip(some, students, talks, strict=False)
    records = [Record(0, p.wish, talk, yS) for p, yS, talk in replies]
    asked = [reason_messages(prompt, record) for record in records]
    seeds = [args.seed + i for i in range(len(asked))]
    values |= reasons(rates, some, say(voice, asked, Sampling(512, 0.7, 0.9), seeds))
    protocols = [random_protocol(rng, strange=1.0) for _ in some]
    cases = [(x, random_prompt(rng, p), p) for x, p in zip(some, protocols, strict=True)]
    judge(rates, "protocols", cases, converse(voice, cases))
    return rates, values


def three_ways(folder, problems, seed):
    """The agent on the imaginary machine: the base with os.txt and without, and the adapter."""
    run = load_run(folder)
    model, chat = open_model(run)
    voice, rates = Voice(model, chat), Rates()
    rng = random.Random(f"measure-{seed}")
    cases = [(problem, run.prompt, OS) for problem in balanced(problems, rng, surprising=True)]
    judge(rates, "adapter", cases, converse(voice, cases, with_prompt=False))
    with adapter_off(model):
        judge(rates, "prompt", cases, converse(voice, cases))
        judge(rates, "neither", cases, converse(voice, cases, with_prompt=False))
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
    print(f"{'rate':<36}{'k of n':>10}{'%':>7}  {'95 % interval':<15}worst kinds")
    for name, row in rates.items():
        worst = ", ".join(f"{kind} {k}/{n}" for kind, (k, n) in list(row["kinds"].items())[:4])
        interval = f"{100 * row['low']:.1f} - {100 * row['high']:.1f}"
        share = f"{row['k']:>3} of {row['n']:<3}{100 * row['k'] / row['n']:>7.1f}"
        print(f"{name:<36}{share}  {interval:<15}{worst}".rstrip())
    for name, value in values.items():
        print(f"{name:<36}{value}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(HERE), help="checkpoint folder")
    parser.add_argument("--run", type=Path, help="run folder of genpi.py: measure its adapter")
    parser.add_argument("--bits", type=int, default=16, choices=(4, 16), help="4: blocks in NF4")
    parser.add_argument("--problems", type=int, default=204, help="a multiple of the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table here too, with some misses")
    args = parser.parse_args()
    n = len(world.KINDS)
    if args.problems < n or args.problems % n:
        parser.error(f"--problems {args.problems}: not a multiple of the {n} kinds; take {6 * n}")
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


if __name__ == "__main__":
    main()
