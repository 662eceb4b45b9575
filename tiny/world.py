"""The imaginary Linux machine on which the embedded model learns to be an agent.

A `Problem` is a user's wish about files or users with the commands that solve it. Every name
carries its own fixed facts (`FACTS`): a number, an owner, whether it is there at all, whether it is
empty. What a command prints follows from the facts of the name it is used on, so a greedy
environment that has learnt the names can answer without a hidden state, and its answers differ from
name to name. Thirty-four kinds of problem: 18 questions, 12 changes, 4 that take two commands.

Leaves out: anything that depends on what happened earlier on the machine, but for a look at what
has just been changed.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

WORDS = """
notes plan report budget music photos letters recipes games books garden travel school team orders stock
invoice taxes salary clients events tickets backup cache mail drafts archive source build tests data models
results figures tables lectures homework thesis poems stories songs movies maps weather sensors traffic energy
water forest birds flowers horses kitchen market bakery hotel museum library theatre sports hockey tennis chess
puzzle robot engine planet rocket ocean river island bridge castle village harbor station airport factory
office meeting project design sketch colors fonts icons themes plugins drivers kernel network router server
cluster queue jobs tasks alarm clock calendar history journal diary contacts friends family parents doctor
health diet fitness yoga running cycling hiking winter summer autumn spring morning evening dinner coffee
bread cheese apples lemon pepper sugar honey salad soup pasta rice beans tomato onion carrot
""".split()
USERS = """ana ben carla david emma frank grace henry irene jack karen leo maria nina oscar paula quinn rosa sam
tina umar vera will yuri""".split()
NAMES = WORDS[:60]  # of the machine that always says the same: so many can be learnt by heart
EXTENSIONS = "txt log csv md py sh json conf".split()
MODES = "600 644 640 700 750 755".split()
TOPS = "srv opt data var mnt usr".split()


STATES = {"there": 78, "missing": 10, "empty": 7, "long": 5}  # shares of the names
CUT = "[the output was cut]"


def draw_facts(rng, state=None):
    """What the machine says about one name; state: one of STATES, drawn if None."""
    state = state or rng.choices(list(STATES), STATES.values())[0]
    big = 9999 if rng.random() < 0.3 else 98
    return {
        "state": state,
        "count": "0" if state == "empty" else str(rng.randint(3, big)),
        "owner": rng.choice(USERS),
        "mode": rng.choice(MODES),
        "first": rng.choice(WORDS),
        "last": rng.choice(WORDS),
        "largest": f"{rng.choice(WORDS)}.{rng.choice(EXTENSIONS)}",
        "newest": f"{rng.choice(WORDS)}.{rng.choice(EXTENSIONS)}",
        "long": " ".join(rng.sample(WORDS, 6)),
    }


def all_facts(seed=7):
    """name -> its facts; the whole state of the machine. The numbers are spread evenly."""
    rng = random.Random(seed)
    facts = {name: draw_facts(rng) for name in WORDS}
    facts |= {name: draw_facts(rng, "there") for name in USERS}
    numbers = [str(3 + i % 96) for i in range(len(facts))]
    rng.shuffle(numbers)
    for known, number in zip(facts.values(), numbers, strict=True):
        known["count"] = "0" if known["state"] == "empty" else number
        # Few words and owners, twice each: fewer facts to learn by heart.
        known["first"] = known["last"] = rng.choice(NAMES[:12])
        known["largest"] = known["newest"] = f"{rng.choice(NAMES[:12])}.txt"
        known["owner"] = rng.choice(USERS[:6])
    return facts


FACTS = all_facts()


def machine(name):
    """The facts of a name on the imaginary machine."""
    return FACTS[name]


def surprise(rng, state=None):
    """A machine whose facts nobody can know beforehand: name -> facts, drawn at every call."""

    def know(name):
        return draw_facts(rng, "there" if name in USERS else state)

    return know


FACT = {  # what a question is about -> the fact that answers it; a change prints nothing
    "count_files": "count", "count_lines": "count", "count_matches": "count", "count_words": "count",
    "count_type": "count", "size": "count", "processes": "count", "cron": "count", "logins": "count",
    "owner": "owner", "mode": "mode", "first_line": "first", "last_line": "last",
    "largest": "largest", "newest": "newest", "content": "first",
}  # fmt: skip
CREATES = {"make_directory", "make_file", "link"}  # their target need not be there
MISSING = {  # program -> how it says that a file is not there; any other: "program: file"
    "ls": "ls: cannot access '{}'", "du": "du: cannot access '{}'", "stat": "stat: cannot statx '{}'",
    "head": "head: cannot open '{}' for reading", "tail": "tail: cannot open '{}' for reading",
    "rm": "rm: cannot remove '{}'", "mv": "mv: cannot stat '{}'", "cp": "cp: cannot stat '{}'",
    "chmod": "chmod: cannot access '{}'", "chown": "chown: cannot access '{}'",
    "sed": "sed: can't read {}", "tar": "tar: {}: Cannot stat",
}  # fmt: skip
NO_FILE = "No such file or directory"
PATH = re.compile(r"/[\w/.]*\w")


@dataclass(frozen=True)
class Step:
    """One command of a solution.

    use: the kind of question or change that the command is for, or "check"; target: the path or the
    user that it is about; facts: those of the target.
    """

    use: str
    thought: str
    command: str
    target: str
    facts: dict

    @property
    def output(self):
        """What the machine prints."""
        state, fact = self.facts["state"], FACT.get(self.use)
        if self.use in ("exists", "is_directory"):
            return "no" if state == "missing" else "yes"
        if self.use == "check":
            return looked_at(self.command, self.target, self.facts)
        if state == "missing" and self.use not in CREATES:
            return no_file(self.command, self.target)
        if fact is None or (state == "empty" and fact in ("first", "last", "largest", "newest")):
            return ""
        if self.use == "content" and state == "long":
            return f"{self.facts['long']} {CUT}"
        return self.facts[fact]


def no_file(command, path):
    """What a command prints about a path that is not there."""
    program = "bash" if re.search(" [<>]+ ", command) else command.split()[0]
    line = f"{MISSING.get(program, program + ': {}').format(path)}: {NO_FILE}"
    return line + ("\n0" if command.endswith("| wc -l") else "")


def looked_at(command, path, facts):
    """What a look at a path before or after a change prints."""
    if facts["state"] == "missing":
        return no_file(command, path)
    shown = {"ls": "-rw-r--r-- 1 {owner} {count} {path}", "stat": "{path} {owner} {mode}", "find": "{path}",
             "cat": "{first}", "head": "{first}", "tail": "{last}"}  # fmt: skip
    return shown.get(command.split()[0], "ok").format(path=path, **facts)


@dataclass(frozen=True)
class Problem:
    """kind; wish (the user's words); steps; what the solution ends in; advice (what the commands
    do, in a general assistant's words); know (name -> facts, the machine it stands on).

    answer: None for a change, which ends without an answer. trouble: "error", "empty" or None, what
    is wrong with the last output; a problem of two commands ends at the first that has some.
    """

    kind: str
    wish: str
    steps: tuple[Step, ...]
    answer: str | None
    trouble: str | None
    advice: str
    know: Callable

    @property
    def changed(self):
        """Has something been changed?"""
        return self.answer is None and self.trouble is None

    @property
    def topic(self):
        """The words for what the wish is about."""
        return TOPIC[self.kind]

    @property
    def paths(self):
        """The paths in the wish, in order."""
        return PATH.findall(self.wish)


def stem(path):
    """The name that carries the facts of a path: /home/ana/notes.txt -> notes."""
    return path.rstrip("/").split("/")[-1].split(".")[0]


def trouble_of(step):
    """What is wrong with the output of a step: "error", "empty" or None."""
    if NO_FILE in step.output:
        return "error"
    return "empty" if step.output == "" and step.use in FACT else None


# kind: (wishes, command, thought, advice). {d} a directory, {f} a file, {e} another directory, {g}
# another file
# name, {w} {v} words, {u} a user, {m} a mode, {x} an extension.
QUESTIONS = {
    "count_files": (
        ["How many files are in the directory {d}?", "Count the files in {d}.",
         "Tell me the number of files in {d}.", "I want to know how many files {d} contains."],
        "ls {d} | wc -l", "I list the files and count them.", "lists {d} and counts the lines"),
    "count_lines": (
        ["How many lines does the file {f} have?", "Count the lines of {f}.",
         "Tell me how many lines {f} has.", "What is the number of lines in {f}?"],
        "wc -l < {f}", "I count the lines of the file.", "counts the lines of {f}"),
    "count_matches": (
        ["How many lines of {f} contain the word {w}?", "Count the lines with {w} in {f}.",
         "In {f}, on how many lines does {w} appear?", "Tell me how many lines in {f} mention {w}."],
        "grep -c {w} {f}", "I count the lines that match the word.", "counts the lines of {f} with {w}"),
    "count_words": (
        ["How many words are in {f}?", "Count the words of the file {f}.",
         "Tell me the number of words in {f}.", "How long is {f}, in words?"],
        "wc -w < {f}", "I count the words of the file.", "counts the words of {f}"),
    "count_type": (
        ["How many .{x} files are there below {d}?", "Count the .{x} files in {d}.",
         "Find out how many files in {d} end in .{x}.", "Tell me the number of .{x} files under {d}."],
        "find {d} -name '*.{x}' | wc -l", "I find the files of this type and count them.",
        "finds the .{x} files below {d} and counts them"),
    "size": (
        ["How large is {d} in megabytes?", "Tell me the size of {d} in megabytes.",
         "How many megabytes does {d} take?", "What is the disk use of {d} in megabytes?"],
        "du -sm {d} | cut -f 1", "I measure the directory in megabytes.", "measures {d} in megabytes"),
    "processes": (
        ["How many processes does {u} run?", "Count the processes of the user {u}.",
         "Tell me how many processes belong to {u}.", "What is the number of processes of {u}?"],
        "ps -u {u} | wc -l", "I list the processes of the user and count them.",
        "lists the processes of {u} and counts them"),
    "cron": (
        ["How many cron jobs does {u} have?", "Count the cron jobs of {u}.",
         "Tell me the number of cron jobs of the user {u}.", "What is the number of cron jobs of {u}?"],
        "crontab -u {u} -l | wc -l", "I list the cron jobs of the user and count them.",
        "lists the cron jobs of {u} and counts them"),
    "logins": (
        ["How many logins does {u} have?", "Count the logins of {u}.",
         "Tell me how many logins the user {u} has.", "What is the number of logins of {u}?"],
        "last {u} | wc -l", "I list the logins of the user and count them.",
        "lists the logins of {u} and counts them"),
    "owner": (
        ["Who is the owner of the file {f}?", "Tell me the owner of {f}.",
         "Which user is the owner of {f}?", "Find the owner of {f}."],
        "stat -c %U {f}", "I print the owner of the file.", "prints the owner of {f}"),
    "mode": (
        ["What are the permissions of {f} as a number?", "Tell me the permissions of {f} in digits.",
         "Which permissions does {f} have, in octal?", "Show the numeric permissions of {f}."],
        "stat -c %a {f}", "I print the permissions of the file.", "prints the permissions of {f}"),
    "first_line": (
        ["What is the first line of {f}?", "Tell me the first line of {f}.",
         "What does the first line of {f} say?", "Read the first line of {f} to me."],
        "head -n 1 {f}", "I print the first line of the file.", "prints the first line of {f}"),
    "last_line": (
        ["What is the last line of {f}?", "Tell me the last line of {f}.",
         "What does the last line of {f} say?", "Read the last line of {f} to me."],
        "tail -n 1 {f}", "I print the last line of the file.", "prints the last line of {f}"),
    "largest": (
        ["Which file in {d} is the largest?", "Name the largest file in {d}.",
         "What is the largest file of {d}?", "Find the largest file in the directory {d}."],
        "ls -S {d} | head -n 1", "I look for the largest file.",
        "sorts {d} by size and takes the top"),
    "newest": (
        ["Which file in {d} is the newest?", "Name the newest file in {d}.",
         "What is the newest file of {d}?", "Find the newest file in the directory {d}."],
        "ls -t {d} | head -n 1", "I look for the newest file.",
        "sorts {d} by time and takes the top"),
    "exists": (
        ["Is there a file {f}? Say yes or no.", "Does the file {f} exist? Answer yes or no.",
         "Tell me, yes or no, whether {f} exists.", "Check, yes or no, if {f} is there."],
        "test -e {f} && echo yes || echo no", "I test, yes or no, whether the file exists.", "tests whether {f} exists"),
    "is_directory": (
        ["Is {d} a directory? Say yes or no.", "Tell me, yes or no, whether {d} is a directory.",
         "Check, yes or no, if {d} is a directory.", "Does the directory {d} exist? Answer yes or no."],
        "test -d {d} && echo yes || echo no", "I test, yes or no, whether the directory exists.",
        "tests whether {d} is a directory"),
    "content": (
        ["What is the text of the file {f}?", "Show me the text of {f}.",
         "Tell me the text of {f}.", "Read the text of {f} to me."],
        "cat {f}", "I print the text of the file.", "prints {f}"),
}
CHANGES = {
    "make_directory": (
        ["Create a new directory {d}.", "Make the new directory {d}.", "I need a new directory {d}.", "Add a new directory {d}."],
        "mkdir -p {d}", "I make the new directory.", "creates {d}"),
    "make_file": (
        ["Create an empty file {f}.", "Make an empty file {f}.", "I need an empty file {f}.", "Add an empty file {f}."],
        "touch {f}", "I make the empty file.", "creates {f}"),
    "delete": (
        ["Delete the file {f}.", "Please delete {f}.", "I want to delete the file {f}.", "The file {f} is old, delete it."],
        "rm {f}", "I delete the file.", "deletes {f}"),
    "rename": (
        ["Rename {f} to {g}.", "Please rename {f} to {g}.", "I want to rename {f} to {g}.",
         "The file {f} should be called {g}, rename it."],
        "mv {f} {p}/{g}", "I rename the file in its directory.", "renames {f} to {g}"),
    "move": (
        ["Move {f} to {e}.", "Please move the file {f} to {e}.", "I want to move {f} to {e}.", "The file {f} belongs in {e}, move it."],
        "mv {f} {e}", "I move the file to the directory.", "moves {f} to {e}"),
    "copy": (
        ["Copy {f} to {e}.", "Put a copy of {f} into {e}.", "Make a copy of {f} in {e}.", "Please copy {f} to {e}."],
        "cp {f} {e}", "I copy the file to the directory.", "copies {f} to {e}"),
    "link": (
        ["Make a link {e} that points to {d}.", "Please link {e} to {d}.", "Let {e} be a symbolic link to {d}.",
         "I want {e} to be a link to {d}."],
        "ln -s {d} {e}", "I make the link.", "links {e} to {d}"),
    "set_mode": (
        ["Set the mode of {f} to {m}.", "Change the mode of {f} to {m}.", "Let {f} have the mode {m}.",
         "The file {f} needs the mode {m}."],
        "chmod {m} {f}", "I set the mode of the file.", "sets the mode of {f} to {m}"),
    "set_owner": (
        ["Give the file {f} to {u}.", "Please give {f} to the user {u}.", "I want to give {f} to {u}.",
         "The file {f} is for {u}, give it."],
        "chown {u} {f}", "I give the file to the user.", "gives {f} to {u}"),
    "replace": (
        ["Replace {w} with {v} in {f}.", "In {f}, replace the word {w} with {v}.", "Please replace every {w} in {f} with {v}.",
         "I want to replace {w} with {v} in the file {f}."],
        "sed -i 's/{w}/{v}/g' {f}", "I replace the word in the file.", "writes {v} for {w} in {f}"),
    "append": (
        ["Append the line {w} to {f}.", "Please append {w} to {f}.", "I want to append a line {w} to {f}.",
         "The file {f} lacks {w}, append it."],
        "echo {w} >> {f}", "I append the line to the file.", "appends {w} to {f}"),
    "pack": (
        ["Pack {d} into the archive {e}.tar.", "Make an archive {e}.tar of {d}.", "Put {d} into an archive {e}.tar.",
         "I want an archive of {d} as {e}.tar."],
        "tar -cf {e}.tar {d}", "I make the archive.", "packs {d} into {e}.tar"),
}
# kind: (wishes, first command, thought, second command, thought, ends with an answer, advice). {o}
# first output
CHAINS = {
    "lines_of_largest": (
        ["How many lines does the largest file in {d} have?", "Count the lines of the largest file in {d}.",
         "Find the largest file in {d} and tell me its number of lines.",
         "Tell me how many lines the largest file of {d} has."],
        "ls -S {d} | head -n 1", "First I look for the largest file.",
        "wc -l < {d}/{o}", "Now I count the lines of {o}.", True, "finds the largest file of {d}"),
    "owner_of_newest": (
        ["Who is the owner of the newest file in {d}?", "Tell me the owner of the newest file in {d}.",
         "Find the newest file in {d} and tell me its owner.", "Which user is the owner of the newest file of {d}?"],
        "ls -t {d} | head -n 1", "First I look for the newest file.",
        "stat -c %U {d}/{o}", "Now I print the owner of {o}.", True, "finds the newest file of {d}"),
    "move_newest": (
        ["Move the newest file of {d} to {e}.", "Please move the newest file in {d} to {e}.",
         "Find the newest file in {d} and move it to {e}.", "I want to move the newest file of {d} to {e}."],
        "ls -t {d} | head -n 1", "First I look for the newest file.",
        "mv {d}/{o} {e}", "Now I move {o} to the directory.", False, "finds the newest file of {d}"),
    "delete_largest": (
        ["Delete the largest file in {d}.", "Please delete the largest file of {d}.",
         "Find the largest file in {d} and delete it.", "I want to delete the largest file in {d}."],
        "ls -S {d} | head -n 1", "First I look for the largest file.",
        "rm {d}/{o}", "Now I delete {o}.", False, "finds the largest file of {d}"),
}
TOPIC = {  # kind -> the words for it, which are in the wish, in the thoughts and in the line of a house rule for it
    "count_files": "files", "count_lines": "lines", "count_matches": "lines", "count_words": "words",
    "count_type": "files", "size": "megabytes", "processes": "processes", "cron": "cron jobs", "logins": "logins",
    "owner": "owner", "mode": "permissions", "first_line": "first line", "last_line": "last line",
    "largest": "largest", "newest": "newest", "exists": "yes or no", "is_directory": "yes or no",
    "content": "text", "make_directory": "new directory", "make_file": "empty file", "delete": "delete",
    "rename": "rename", "move": "move", "copy": "copy", "link": "link", "set_mode": "mode", "set_owner": "give",
    "replace": "replace", "append": "append", "pack": "archive", "lines_of_largest": "lines",
    "owner_of_newest": "owner", "move_newest": "move", "delete_largest": "delete",
}  # fmt: skip
USES = {  # what the two commands of a chain are for
    "lines_of_largest": ("largest", "count_lines"), "owner_of_newest": ("newest", "owner"),
    "move_newest": ("newest", "move"), "delete_largest": ("largest", "delete"),
}  # fmt: skip
WEIGHTS = {"rename": 3, "replace": 2, "move": 2, "copy": 2, "link": 2, "pack": 2, "count_matches": 2,
           "lines_of_largest": 2, "owner_of_newest": 2, "move_newest": 2, "delete_largest": 2}  # the harder kinds
KINDS = [*QUESTIONS, *CHANGES, *CHAINS]
OPENERS = ["", "", "", "", "", "Please help me: ", "Hi. ", "Next: "]


def directory(rng, names=WORDS):
    """A random directory, such as /home/ana/notes, /srv/music or /opt/games/maps."""
    top = f"/home/{rng.choice(USERS)}" if rng.random() < 0.6 else f"/{rng.choice(TOPS)}"
    return "/".join([top, *rng.sample(names, 1 if rng.random() < 0.7 else 2)])


def random_problem(rng, know=machine, kind=None, openers=OPENERS):
    """A fresh Problem; the kind is drawn where it is None.

    know: name -> facts. With `machine` the imaginary machine answers; an agent that shall read
    instead of remember is shown `surprise(rng)`, whose answers do not follow from the names.
    """
    kind = kind or rng.choices(KINDS, [WEIGHTS.get(kind, 1) for kind in KINDS])[0]
    names = NAMES if know is machine else WORDS
    place, (w, v) = directory(rng, names), rng.sample(WORDS, 2)
    slots = {
        "d": directory(rng, names), "e": directory(rng, names), "p": place, "w": w, "v": v,
        "f": f"{place}/{rng.choice(names)}.{rng.choice(EXTENSIONS)}",
        "g": f"{rng.choice(names)}.{rng.choice(EXTENSIONS)}",
        "u": rng.choice(USERS), "m": rng.choice(MODES), "x": rng.choice(EXTENSIONS),
    }  # fmt: skip
    row = {**QUESTIONS, **CHANGES, **CHAINS}[kind]
    wish = rng.choice(openers) + rng.choice(row[0]).format(**slots)
    steps = []
    for use, form, thought in zip(USES.get(kind, (kind,)), row[1:-1:2], row[2:-1:2], strict=False):
        target = next(slots[s] for s in "fdu" if f"{{{s}}}" in form)
        target = f"{target}/{slots['o']}" if steps else target
        facts = know(stem(target))
        if use in ("exists", "is_directory") and know is not machine:
            facts = facts | {"state": rng.choice(["there", "missing"])}
        steps.append(Step(use, thought.format(**slots), form.format(**slots), target, facts))
        slots["o"] = steps[-1].output
        if trouble := trouble_of(steps[-1]):
            break
    asks = kind in QUESTIONS or (kind in CHAINS and row[5])
    answer = {"error": "unknown", "empty": "none"}.get(trouble, slots["o"].removesuffix(f" {CUT}"))
    return Problem(kind, wish, tuple(steps), answer if asks else None, trouble, row[-1].format(**slots), know)
