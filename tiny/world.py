"""The imaginary Linux machine on which the embedded model learns to be an agent.

A `Problem` is a user's wish about files, users or variables with the commands that solve it. The
machine is a function: the same command always prints the same thing, because every name carries its
own fixed facts (`FACTS`). A greedy environment that has learnt the names can therefore answer
without a hidden state, and its answers differ from name to name. Thirty-four kinds of problem: 18
questions, 12 changes, 4 that take two commands.

Leaves out: errors, empty directories, anything that depends on what happened earlier on the
machine.
"""

import random
import re
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
EXTENSIONS = "txt log csv md py sh json conf".split()
MODES = "600 644 640 700 750 755".split()
TOPS = "srv opt data var".split()


def _facts(seed=7):
    """name -> what the machine says about it; the whole state of the machine."""
    rng = random.Random(seed)
    return {
        name: {
            "count": str(rng.randint(3, 98)),
            "owner": rng.choice(USERS),
            "mode": rng.choice(MODES),
            "first": rng.choice(WORDS),
            "last": rng.choice(WORDS),
            "largest": f"{rng.choice(WORDS)}.{rng.choice(EXTENSIONS)}",
            "newest": f"{rng.choice(WORDS)}.{rng.choice(EXTENSIONS)}",
            "exists": rng.choice(("yes", "no")),
        }
        for name in WORDS + USERS
    }


FACTS = _facts()


@dataclass(frozen=True)
class Problem:
    """kind, wish (the user's words), steps ((thought, command, output), ...), end (thought, answer
    or None), advice.
    """

    kind: str
    wish: str
    steps: tuple
    answer: str | None  # None: the problem is a change, which ends without an answer
    advice: str  # what the commands do, in a general assistant's words


def stem(path):
    """The name that carries the facts of a path: /home/ana/notes.txt -> notes."""
    return path.rstrip("/").split("/")[-1].split(".")[0]


def machine(command):
    """[in] a shell command of the kinds below -> [out] what the imaginary machine prints."""
    for pattern, fact in RULES:
        found = re.fullmatch(pattern, command)
        if found:
            return FACTS[stem(found[1])][fact] if fact else ""
    raise ValueError(f"the imaginary machine does not know the command {command!r}")


RULES = [
    (r"ls (/\S+) \| wc -l", "count"),
    (r"wc -l < (/\S+)", "count"),
    (r"grep -c (\w+) /\S+", "count"),
    (r"wc -w < (/\S+)", "count"),
    (r"du -sm (/\S+) \| cut -f 1", "count"),
    (r"ps -u (\w+) \| wc -l", "count"),
    (r"find (/\S+) -name '\*\.\w+' \| wc -l", "count"),
    (r"stat -c %U (/\S+)", "owner"),
    (r"stat -c %a (/\S+)", "mode"),
    (r"head -n 1 (/\S+)", "first"),
    (r"tail -n 1 (/\S+)", "last"),
    (r"cat (/\S+)", "first"),
    (r"ls -S (/\S+) \| head -n 1", "largest"),
    (r"ls -t (/\S+) \| head -n 1", "newest"),
    (r"test -e (/\S+) && echo yes \|\| echo no", "exists"),
    (r"test -d (/\S+) && echo yes \|\| echo no", "exists"),
    (r"crontab -u (\w+) -l \| wc -l", "count"),
    (r"last (\w+) \| wc -l", "count"),
    (r"(?:mkdir|touch|rm|rm -r|mv|cp|ln -s|chmod|chown|echo|sed|tar) .*()", None),
]

# kind: (wishes, command, thought, advice). {d} a directory, {f} a file, {e} another directory, {g}
# another file
# name, {w} {v} words, {u} a user, {m} a mode, {x} an extension.
QUESTIONS = {
    "count_files": (
        ["How many files are in the directory {d}?", "Count the files in {d}.",
         "Tell me the number of files in {d}.", "I want to know how many files {d} contains."],
        "ls {d} | wc -l", "I list the directory and count the lines.", "lists {d} and counts the lines"),
    "count_lines": (
        ["How many lines does the file {f} have?", "Count the lines of {f}.",
         "Tell me how long {f} is, in lines.", "What is the number of lines in {f}?"],
        "wc -l < {f}", "I count the lines of the file.", "counts the lines of {f}"),
    "count_matches": (
        ["How many lines of {f} contain the word {w}?", "Count the lines with {w} in {f}.",
         "In {f}, on how many lines does {w} appear?", "Tell me how many lines in {f} mention {w}."],
        "grep -c {w} {f}", "I count the lines that match the word.", "counts the lines of {f} with {w}"),
    "count_words": (
        ["How many words are in {f}?", "Count the words of the file {f}.",
         "Tell me the number of words in {f}.", "What is the word count of {f}?"],
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
         "Tell me the number of cron entries of the user {u}.", "How long is the crontab of {u}?"],
        "crontab -u {u} -l | wc -l", "I list the cron jobs of the user and count them.",
        "lists the cron jobs of {u} and counts them"),
    "logins": (
        ["How often has {u} logged in?", "Count the logins of {u}.",
         "Tell me how many times the user {u} logged in.", "What is the number of logins of {u}?"],
        "last {u} | wc -l", "I list the logins of the user and count them.",
        "lists the logins of {u} and counts them"),
    "owner": (
        ["Who owns the file {f}?", "Tell me the owner of {f}.",
         "Which user owns {f}?", "Find the owner of {f}."],
        "stat -c %U {f}", "I print the owner of the file.", "prints the owner of {f}"),
    "mode": (
        ["What are the permissions of {f} as a number?", "Tell me the mode of {f} in digits.",
         "Which octal mode does {f} have?", "Show the numeric permissions of {f}."],
        "stat -c %a {f}", "I print the mode of the file.", "prints the mode of {f}"),
    "first_line": (
        ["What is the first line of {f}?", "Tell me the first line of {f}.",
         "With which line does {f} begin?", "Read the top line of {f} to me."],
        "head -n 1 {f}", "I print the first line of the file.", "prints the first line of {f}"),
    "last_line": (
        ["What is the last line of {f}?", "Tell me the last line of {f}.",
         "With which line does {f} end?", "Read the final line of {f} to me."],
        "tail -n 1 {f}", "I print the last line of the file.", "prints the last line of {f}"),
    "largest": (
        ["Which file in {d} is the largest?", "Name the largest file in {d}.",
         "What is the biggest file of {d}?", "Find the largest file in the directory {d}."],
        "ls -S {d} | head -n 1", "I sort the directory by size and take the top.",
        "sorts {d} by size and takes the top"),
    "newest": (
        ["Which file in {d} is the newest?", "Name the newest file in {d}.",
         "What is the most recent file of {d}?", "Find the latest file in the directory {d}."],
        "ls -t {d} | head -n 1", "I sort the directory by time and take the top.",
        "sorts {d} by time and takes the top"),
    "exists": (
        ["Is there a file {f}? Say yes or no.", "Does the file {f} exist? Answer yes or no.",
         "Tell me, yes or no, whether {f} exists.", "Check, yes or no, if {f} is there."],
        "test -e {f} && echo yes || echo no", "I test whether the file exists.", "tests whether {f} exists"),
    "is_directory": (
        ["Is {d} a directory? Say yes or no.", "Tell me, yes or no, whether {d} is a directory.",
         "Check, yes or no, if {d} is a directory.", "Does the directory {d} exist? Answer yes or no."],
        "test -d {d} && echo yes || echo no", "I test whether the directory exists.",
        "tests whether {d} is a directory"),
    "content": (
        ["What does the file {f} say?", "Show me the content of {f}.",
         "Tell me what is written in {f}.", "Read {f} to me."],
        "cat {f}", "I print the file.", "prints {f}"),
}
CHANGES = {
    "make_directory": (
        ["Create the directory {d}.", "Make a new directory {d}.", "I need a directory {d}.", "Add the directory {d}."],
        "mkdir -p {d}", "I create the directory.", "creates {d}"),
    "make_file": (
        ["Create an empty file {f}.", "Make a new empty file {f}.", "I need an empty file {f}.", "Add an empty file {f}."],
        "touch {f}", "I create the empty file.", "creates {f}"),
    "delete": (
        ["Delete the file {f}.", "Remove {f}.", "Please get rid of the file {f}.", "Erase {f}."],
        "rm {f}", "I delete the file.", "deletes {f}"),
    "rename": (
        ["Rename {f} to {g}.", "Change the name of {f} to {g}.", "Give {f} the new name {g}.",
         "The file {f} should be called {g}."],
        "mv {f} {p}/{g}", "I rename the file in its directory.", "renames {f} to {g}"),
    "move": (
        ["Move {f} to {e}.", "Put the file {f} into {e}.", "Bring {f} over to {e}.", "The file {f} belongs in {e}, move it."],
        "mv {f} {e}", "I move the file to the directory.", "moves {f} to {e}"),
    "copy": (
        ["Copy {f} to {e}.", "Put a copy of {f} into {e}.", "Make a copy of {f} in {e}.", "Place a second {f} in {e}."],
        "cp {f} {e}", "I copy the file to the directory.", "copies {f} to {e}"),
    "link": (
        ["Make a link {e} that points to {d}.", "Link {e} to {d}.", "Let {e} be a symbolic link to {d}.",
         "I want {e} to be a link to {d}."],
        "ln -s {d} {e}", "I make the symbolic link.", "links {e} to {d}"),
    "set_mode": (
        ["Set the permissions of {f} to {m}.", "Change the mode of {f} to {m}.", "Give {f} the mode {m}.",
         "The file {f} needs the permissions {m}."],
        "chmod {m} {f}", "I set the mode of the file.", "sets the mode of {f} to {m}"),
    "set_owner": (
        ["Make {u} the owner of {f}.", "Change the owner of {f} to {u}.", "Give the file {f} to {u}.",
         "The user {u} should own {f}."],
        "chown {u} {f}", "I change the owner of the file.", "makes {u} the owner of {f}"),
    "replace": (
        ["Replace {w} with {v} in {f}.", "In {f}, change the word {w} to {v}.", "Write {v} for every {w} in {f}.",
         "Swap {w} for {v} in the file {f}."],
        "sed -i 's/{w}/{v}/g' {f}", "I replace the word in the file.", "writes {v} for {w} in {f}"),
    "append": (
        ["Append the line {w} to {f}.", "Add a line {w} at the end of {f}.", "Put the line {w} at the bottom of {f}.",
         "Write {w} as a new last line of {f}."],
        "echo {w} >> {f}", "I append the line to the file.", "appends {w} to {f}"),
    "pack": (
        ["Pack {d} into the archive {e}.tar.", "Make an archive {e}.tar of {d}.", "Put {d} into {e}.tar.",
         "Archive the directory {d} as {e}.tar."],
        "tar -cf {e}.tar {d}", "I pack the directory into the archive.", "packs {d} into {e}.tar"),
}
# kind: (wishes, first command, thought, second command, thought, ends with an answer, advice). {o}
# first output
CHAINS = {
    "lines_of_largest": (
        ["How many lines does the largest file in {d} have?", "Count the lines of the largest file in {d}.",
         "Find the largest file in {d} and tell me its number of lines.",
         "Tell me how many lines the biggest file of {d} has."],
        "ls -S {d} | head -n 1", "First I look for the largest file.",
        "wc -l < {d}/{o}", "Now I count the lines of {o}.", True, "finds the largest file of {d}"),
    "owner_of_newest": (
        ["Who owns the newest file in {d}?", "Tell me the owner of the newest file in {d}.",
         "Find the newest file in {d} and tell me who owns it.", "Which user owns the latest file of {d}?"],
        "ls -t {d} | head -n 1", "First I look for the newest file.",
        "stat -c %U {d}/{o}", "Now I print the owner of {o}.", True, "finds the newest file of {d}"),
    "move_newest": (
        ["Move the newest file of {d} to {e}.", "Put the newest file in {d} into {e}.",
         "Find the newest file in {d} and move it to {e}.", "Bring the latest file of {d} over to {e}."],
        "ls -t {d} | head -n 1", "First I look for the newest file.",
        "mv {d}/{o} {e}", "Now I move {o} to the directory.", False, "finds the newest file of {d}"),
    "delete_largest": (
        ["Delete the largest file in {d}.", "Remove the largest file of {d}.",
         "Find the largest file in {d} and delete it.", "Please get rid of the biggest file in {d}."],
        "ls -S {d} | head -n 1", "First I look for the largest file.",
        "rm {d}/{o}", "Now I delete {o}.", False, "finds the largest file of {d}"),
}
WEIGHTS = {"rename": 3, "replace": 2, "move": 2, "copy": 2, "link": 2, "pack": 2, "count_matches": 2,
           "lines_of_largest": 2, "owner_of_newest": 2, "move_newest": 2, "delete_largest": 2}  # the harder kinds
KINDS = [*QUESTIONS, *CHANGES, *CHAINS]
OPENERS = ["", "", "", "", "", "Please help me: ", "Hi. ", "Next: "]


def directory(rng):
    """A random directory, such as /home/ana/notes, /srv/music or /opt/games/maps."""
    top = f"home/{rng.choice(USERS)}" if rng.random() < 0.6 else rng.choice(TOPS)
    return "/" + "/".join([top, *rng.sample(WORDS, 1 if rng.random() < 0.7 else 2)])


def random_problem(rng, output=machine):
    """A fresh Problem.

    output: command -> text. With `machine` the imaginary machine answers; an agent that shall read
    instead of remember is shown `surprise(rng)`, whose answers do not follow from the names.
    """
    kind = rng.choices(KINDS, [WEIGHTS.get(kind, 1) for kind in KINDS])[0]
    place, (w, v) = directory(rng), rng.sample(WORDS, 2)
    slots = {
        "d": directory(rng), "e": directory(rng), "p": place, "w": w, "v": v,
        "f": f"{place}/{rng.choice(WORDS)}.{rng.choice(EXTENSIONS)}",
        "g": f"{rng.choice(WORDS)}.{rng.choice(EXTENSIONS)}",
        "u": rng.choice(USERS), "m": rng.choice(MODES), "x": rng.choice(EXTENSIONS),
    }  # fmt: skip
    row = {**QUESTIONS, **CHANGES, **CHAINS}[kind]
    wish = rng.choice(OPENERS) + rng.choice(row[0]).format(**slots)
    steps = []
    for command, thought in zip(row[1:-1:2], row[2:-1:2], strict=False):
        command = command.format(**slots)
        text = output(command)
        steps.append((thought.format(**slots), command, text))
        slots["o"] = text
    asks = kind in QUESTIONS or (kind in CHAINS and row[5])
    return Problem(kind, wish, tuple(steps), text if asks else None, row[-1].format(**slots))


def surprise(rng):
    """An `output` of the right kind for every command that no one can know beforehand."""

    def output(command):
        text = machine(command)
        if text.isdigit() and text not in MODES:
            return str(rng.randint(1, 9999 if rng.random() < 0.3 else 99))
        if text in ("yes", "no"):
            return rng.choice(("yes", "no"))
        if "." in text:
            return f"{rng.choice(WORDS)}.{rng.choice(EXTENSIONS)}"
        return text and rng.choice(MODES if text in MODES else USERS if text in USERS else WORDS)

    return output
