"""House rules: lines of a prompt that change an agent's turns where they apply, which is seldom.

Seven families. In brackets what a rule of each draws at random besides its wording:

    after    a command is run after a change, before the end                 (which change, command)
    name     every thought begins with a word                                (which problem, word)
    tool     a command takes the place of the usual one                      (for what, command)
    form     an answer is dressed                                            (which answer, how)
    end      a word is the answer where the output is an error or empty      (which, word)
    refuse   a word is the answer at once where a path must not be touched   (path, word)
    before   a command is run before a change                                (which change, command)

Words and commands are partly nonsense, so that they can only come from the prompt. `obey` is the
definition: a problem and the rules of its prompt -> what the agent does. The rules of
`os.txt` (`OS_RULES`) are held out: no rule of training has the value of one of them in its family,
and none closes the path that it closes.

Leaves out: rules that depend on an earlier turn, or on another rule.
"""

import random
import re
from collections import namedtuple
from dataclasses import dataclass, replace

from world import (
    CHAINS,
    CHANGES,
    EXTENSIONS,
    KINDS,
    NO_FILE,
    TOPS,
    USERS,
    USES,
    Step,
    random_problem,
    stem,
    surprise,
)

FAMILIES = "after name tool form end refuse before".split()  # take out what cannot be learnt
SHARES = {"after": 4, "name": 5, "tool": 5, "form": 5, "end": 3, "refuse": 3, "before": 3}

def nonsense(rng, capital=False):
    """A pronounceable word that means nothing, such as Zorvik or plimo."""
    word = "".join(rng.choice("b d f g k l m n p r s t v z br pl st tr".split()) + rng.choice("aeiou")
                   for _ in range(rng.randint(2, 3)))  # fmt: skip
    word += rng.choice(["", "", "n", "k", "x"])
    return word.capitalize() if capital else word


# -------------------------------------------------------------------------------------- conditions

ALL_CHANGES = [*CHANGES, "move_newest", "delete_largest"]
WHEN = {  # class of problems -> (its kinds, clauses that name it)
    "change": (ALL_CHANGES, ["for every change", "when I want something changed"]),
    "question": ([kind for kind in KINDS if kind not in ALL_CHANGES], ["for every question", "when I ask a question"]),
    "delete": (["delete", "delete_largest"], ["when a file is deleted", "for every deletion of a file"]),
    "move": (["move", "move_newest", "copy"], ["when a file is moved or copied", "for every move and every copy"]),
    "rename": (["rename"], ["when a file gets a new name", "for every new name of a file"]),
    "rights": (["set_mode", "set_owner"], ["when a file gets another mode or owner", "for a change of mode or owner"]),
    "create": (["make_directory", "make_file"], ["when something is created", "for a new file or directory"]),
    "edit": (["replace", "append"], ["when words or lines of a file are changed", "for a change in the text of a file"]),
    "link": (["link"], ["when a link is made", "for every link"]),
    "pack": (["pack"], ["when a directory is packed", "for every archive"]),
    "user": (["processes", "cron", "logins"], ["when I ask for processes, cron jobs or logins",
        "for a question about processes, cron jobs or logins"]),
    "lines": (["count_lines", "lines_of_largest"], ["when I ask for the number of lines of a file",
        "for the number of lines of a file"]),
    "files": (["count_files", "count_type"], ["when I ask for the number of files", "for a number of files"]),
    "size": (["size"], ["when I ask for a size in megabytes", "for a size in megabytes"]),
    "test": (["exists", "is_directory"], ["when I ask for yes or no", "for a question of yes or no"]),
    "read": (["first_line", "last_line", "content"], ["when I ask for a line or the text of a file",
        "for a line or the text of a file"]),
    "owner": (["owner", "owner_of_newest"], ["when I ask for the owner of a file", "for a question about an owner"]),
    "mode": (["mode"], ["when I ask for the mode of a file", "for a question about permissions"]),
    "best": (["largest", "newest", *CHAINS], ["when I ask for the largest or newest file", "for the largest or newest file"]),
}  # fmt: skip
UNDER = ["when I name a path below {}", "for everything below {}"]
UNDER_CHANGED = ["when something below {} is changed", "for every change below {}"]
ENDING = ["when I name a .{} file", "for every .{} file"]
TROUBLE = {
    "error": ["when the output is an error", "after an error"],
    "empty": ["when the output to a question is empty", "after an empty output to a question"],
}


@dataclass(frozen=True)
class When:
    """The condition of a rule: all that is not None must hold. kinds: of the problem; under: a
    path that begins a path of the wish; extension: of a file in the wish; trouble: with the last output.
    """

    clause: str
    kinds: frozenset | None = None
    under: str | None = None
    extension: str | None = None
    trouble: str | None = None

    def holds(self, problem):
        return (
            (self.kinds is None or problem.kind in self.kinds)
            and (self.under is None or any(f"{p}/".startswith(f"{self.under}/") for p in problem.paths))
            and (self.extension is None or self.extension in re.findall(r"\.(\w+)", problem.wish))
            and (self.trouble is None or problem.trouble == self.trouble)
        )

    def problem(self, rng, know=None):
        """A problem for which this may hold."""
        kind = rng.choice(sorted(self.kinds)) if self.kinds else None
        if self.trouble and kind is None:
            kind = rng.choice(WHEN["read" if rng.random() < 0.4 else "question"][0])
        state = {"error": "missing"}.get(self.trouble, self.trouble)
        return random_problem(rng, know or surprise(rng, state), kind, self.under, self.extension)


def of_class(rng, *names):
    """A condition on the class of the problem, one of names."""
    kinds, clauses = WHEN[rng.choice(names)]
    return When(rng.choice(clauses), frozenset(kinds))


def of_path(rng, changed=False):
    """A condition on where a path begins, or on the ending of a file; changed: in a change."""
    if not changed and rng.random() < 0.3:
        ending = rng.choice(EXTENSIONS)
        return When(rng.choice(ENDING).format(ending), extension=ending)
    under = f"/home/{rng.choice(USERS)}" if rng.random() < 0.4 else f"/{rng.choice(TOPS)}"
    if changed:
        return When(rng.choice(UNDER_CHANGED).format(under), frozenset(ALL_CHANGES), under)
    return When(rng.choice(UNDER).format(under), under=under)


# ------------------------------------------------------------------------------------------- values

LOOKS = ["ls -l PATH", "ls -ld PATH", "ls -la PATH", "ls -s PATH", "stat PATH", "stat -t PATH", "stat -c %n PATH",
         "test -e PATH && echo {w}", "file PATH", "readlink -f PATH", "lsattr PATH", "{w} PATH", "{w} -{l} PATH",
         "{w} PATH && echo {v}"]  # fmt: skip
TOOLS = {  # kind -> (for what, the place that is filled, commands)
    "count_files": (["to count all files of a directory", "for the number of all files in a directory"], "DIR",
        ["ls -1 DIR | wc -l", "ls -A DIR | wc -l", "find DIR -type f | wc -l", "ls DIR | grep -c ''"]),
    "count_lines": (["to count all lines of a file", "for the number of all lines in a file"], "FILE",
        ["grep -c '' FILE", "awk 'END {print NR}' FILE", "sed -n '$=' FILE", "cat FILE | wc -l", "grep -c $ FILE"]),
    "count_words": (["to count the words of a file", "for the number of words in a file"], "FILE",
        ["cat FILE | wc -w", "tr -s ' ' '\\n' < FILE | wc -l", "awk '{n += NF} END {print n}' FILE"]),
    "size": (["to measure a directory", "for the size of a directory"], "DIR",
        ["du -m -s DIR", "du -BM DIR | tail -n 1", "du -m DIR | tail -n 1", "du -hs DIR"]),
    "processes": (["to count the processes of a user", "for the number of processes"], "USER",
        ["pgrep -c -u USER", "pgrep -u USER | wc -l", "ps aux | grep -c USER", "ps -U USER -o pid | wc -l"]),
    "cron": (["to count cron jobs", "for the number of cron jobs"], "USER",
        ["crontab -l -u USER | grep -c ''", "grep -c '' /var/spool/cron/USER", "cat /var/spool/cron/USER | wc -l"]),
    "logins": (["to count logins", "for the number of logins"], "USER",
        ["last | grep -c USER", "last -w USER | wc -l", "who | grep -c USER"]),
    "owner": (["to find the owner of a file", "for the owner of a file"], "FILE",
        ["ls -l FILE | cut -d ' ' -f 3", "find FILE -printf %u", "stat --format=%U FILE"]),
    "mode": (["to read the mode of a file", "for the permissions of a file"], "FILE",
        ["find FILE -printf %m", "stat --format=%a FILE", "stat -c %#a FILE"]),
    "first_line": (["to read the first line of a file", "for a first line"], "FILE",
        ["sed -n 1p FILE", "head -1 FILE", "sed 1q FILE", "awk 'NR == 1' FILE"]),
    "last_line": (["to read the last line of a file", "for a last line"], "FILE",
        ["sed -n '$p' FILE", "tail -1 FILE", "tac FILE | head -n 1", "awk 'END {print}' FILE"]),
    "largest": (["to find the largest file of a directory", "for the largest file"], "DIR",
        ["ls -1S DIR | head -n 1", "ls -S DIR | sed 1q", "du -a DIR | sort -n | tail -n 1"]),
    "newest": (["to find the newest file of a directory", "for the newest file"], "DIR",
        ["ls -1t DIR | head -n 1", "ls -t DIR | sed 1q", "ls -rt DIR | tail -n 1"]),
    "content": (["to show a file", "for the text of a file"], "FILE", ["less FILE", "more FILE", "head -n 20 FILE", "tac FILE"]),
    "exists": (["to test whether a file exists", "for the test of a file"], "FILE",
        ["test -f FILE && echo yes || echo no", "[ -e FILE ] && echo yes || echo no"]),
    "delete": (["to delete a file", "for the removal of a file"], "FILE", ["unlink FILE", "rm -f FILE", "shred -u FILE", "rm -v FILE"]),
    "make_directory": (["to create a directory", "for a new directory"], "DIR", ["mkdir DIR", "install -d DIR", "mkdir -m 750 DIR"]),
    "make_file": (["to create a file", "for a new empty file"], "FILE", ["> FILE", "truncate -s 0 FILE", "install /dev/null FILE"]),
}  # fmt: skip
FORMS = {  # class of problems -> (what is dressed, how)
    "lines": ("N", ["N lines", "lines: N", "N {w}", "{w} N", "L N"]),
    "files": ("N", ["N files", "files: N", "N {w}", "{w} N", "F N"]),
    "size": ("N", ["N MB", "N megabytes", "N M", "{w} N", "N {w}"]),
    "user": ("N", ["N {w}", "{w} N", "N times", "N for the user"]),
    "owner": ("X", ["user X", "@X", "'X'", "{w} X", "X {w}", "owner: X"]),
    "mode": ("X", ["digits X", "mode X", "{w} X", "X {w}", "o=X"]),
    "read": ("X", ["'X'", "text: X", "{w} X", "X {w}", "X."]),
}  # fmt: skip
MARKS = ["Careful:", "Note:", "Attention:", "Hm,", "Well,", "Listen:", "Aha!", "Slowly:", "Boss,", "Rule 7:", "Yes,", "Look:",
         "{W}:", "{W}:", "{W}:", "{W},", "{W}!", "[{w}]", "({w})", "{W} {v}:", "As {w} said,"]  # fmt: skip
WORDS_OF_END = ["missing", "forbidden", "nothing", "failed", "broken", "closed", "denied", "stop", "void", "sorry", "blocked",
                "gone", "no way", "error"]  # fmt: skip

# ---------------------------------------------------------------------------------------- wordings

# {c} {C} the condition, {x} the value, {top} a path
LINES = {
    "after": [
        "{C}, run `{x}` before you stop; PATH is the last path of your command.",
        "{C}, look at the result with `{x}`, with the last path of your command for PATH.",
        "Run `{x}` {c}, before you stop; PATH is the last path of your command.",
        "Look at the result with `{x}` {c}, with the last path of your command for PATH.",
    ],
    "before": [
        "{C}, begin with `{x}`; PATH is the first path that I name.",
        "{C}, first of all run `{x}`, with the first path that I name for PATH.",
        "Begin with `{x}` {c}; PATH is the first path that I name.",
        "First of all run `{x}` {c}, with the first path that I name for PATH.",
    ],
    "name": [
        '{C}, begin every thought with "{x}".', '{C}, every thought starts with "{x}".',
        'Begin every thought with "{x}" {c}.', 'Every thought starts with "{x}" {c}.',
    ],
    "tool": ["{C}, use `{x}`.", "{C}, the command is `{x}`.", "Use `{x}` {c}.", "The command is `{x}` {c}."],
    "form": [
        "{C}, answer in the form `{x}`.", "{C}, write the answer as `{x}`.",
        "Answer in the form `{x}` {c}.", "Write the answer as `{x}` {c}.",
    ],
    "yesno": [
        "{C}, answer {x} for yes and {y} for no.", "{C}, write {x} for yes and {y} for no.",
        "Answer {x} for yes and {y} for no {c}.", "Write {x} for yes and {y} for no {c}.",
    ],
    "end": ["{C}, the answer is the word {x}.", "{C}, answer {x}.", "The answer is the word {x} {c}.", "Answer {x} {c}."],
    "refuse": [
        "Never touch what is below {top}: answer {x} at once.", "Everything below {top} is closed: answer {x} at once.",
        "For paths below {top} run nothing and answer {x} at once.", "Below {top} you may run nothing: answer {x} at once.",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One rule: its line in the prompt, its condition, and its value (a command with a place to
    fill, a word, or a form; for yes and no two words with a blank line between).

    use: what the command of a `tool` rule is for.
    """

    family: str
    line: str
    when: When
    value: str
    use: str | None = None

    def applies(self, problem):
        """Does the rule change what is done about a problem?"""
        if self.family == "tool":
            return any(step.use == self.use for step in problem.steps)
        if self.family == "form":
            return self.when.holds(problem) and problem.trouble is None
        if self.family == "after":
            return self.when.holds(problem) and problem.changed
        return self.when.holds(problem)

    def fill(self, text):
        """The value with a path, user or answer in its place."""
        if "\n" in self.value:
            return dict(zip(("yes", "no"), self.value.split("\n"), strict=True)).get(text, text)
        return re.sub(r"\b(PATH|FILE|DIR|USER|N|X)\b", lambda _: text, self.value, count=1)

    def shown(self, moves):
        """Does anything of the rule show in moves [(thought, act, x)]?"""
        if self.family == "name":
            return any(thought.startswith(self.value) for thought, _, _ in moves)
        act = "run" if self.family in ("after", "before", "tool") else "answer"
        said = [x for _, name, x in moves if name == act]
        if "\n" in self.value:
            return any(x in self.value.split("\n") for x in said)
        form = re.escape(self.fill("\0")).replace("\0", r".+" if act == "answer" else r"\S+")
        return any(re.fullmatch(form, x) for x in said)


def os_rule(family, value, line, kinds=(), use=None, **when):
    return Rule(family, line, When("", frozenset(kinds) or None, **when), value, use)


OS_RULES = [  # the lines of os.txt
    os_rule("after", "ls -l PATH", "When a file is moved or copied, run `ls -l PATH` before you stop; PATH is the last path "
            "of your command.", WHEN["move"][0]),
    os_rule("before", "stat PATH", "For a change of mode or owner, begin with `stat PATH`; PATH is the first path that I "
            "name.", WHEN["rights"][0]),
    os_rule("name", "Careful:", 'When I ask for processes, cron jobs or logins, begin every thought with "Careful:".',
            WHEN["user"][0]),
    os_rule("tool", "grep -c '' FILE", "To count all lines of a file, use `grep -c '' FILE`.", WHEN["lines"][0],
            "count_lines"),
    os_rule("form", "N files", "When I ask for the number of files, answer in the form `N files`.", WHEN["files"][0]),
    os_rule("end", "missing", "When the output is an error, the answer is the word missing.", trouble="error"),
    os_rule("refuse", "forbidden", "Never touch what is below /var: answer forbidden at once.", under="/var"),
]  # fmt: skip


def held_out(family, value):
    """Does a rule of os.txt in this family have this value, or close this path?"""
    rules = [rule for rule in OS_RULES if rule.family == family]
    return any(value in (rule.value, family == "refuse" and rule.when.under) for rule in rules)


def words(rng, text):
    """Fill the places for nonsense words in a value: {w} {v} small, {W} capital, {l} a letter."""
    slots = {"w": nonsense(rng), "v": nonsense(rng), "W": nonsense(rng, True), "l": rng.choice("abcdefghkmnpqrstv")}
    return re.sub(r"\{([wvWl])\}", lambda slot: slots[slot[1]], text)


def random_rule(rng, family):
    """A random rule of a family, never with a value of os.txt."""
    use, slots, lines = None, {"N": ""}, family
    if family == "after":
        names = "change change delete move rename rights create edit link pack".split()
        when = of_class(rng, *names) if rng.random() < 0.8 else of_path(rng, changed=True)
        value = words(rng, rng.choice(LOOKS))
    elif family == "before":  # a change of what is there
        when = of_class(rng, *"delete move rename rights edit".split())
        value = words(rng, rng.choice(LOOKS))
    elif family == "name":
        when = of_class(rng, *WHEN) if rng.random() < 0.65 else of_path(rng)
        value = words(rng, rng.choice(MARKS))
    elif family == "tool":
        use = rng.choice(list(TOOLS))
        clauses, place, commands = TOOLS[use]
        own = rng.choice(["{w} " + place, "{w} -{l} " + place, "{w} {v} " + place, "{w} " + place + " | {v}"])
        kinds = [use, *(kind for kind, uses in USES.items() if use in uses)]
        aim, short = clauses
        clause = rng.choice([aim, short])
        when = When(clause, frozenset(kinds))
        value = words(rng, own if rng.random() < 0.45 else rng.choice(commands))
    elif family == "form":
        if rng.random() < 0.25:
            when, lines = of_class(rng, "test"), "yesno"
            known = [("si", "non"), ("true", "false"), ("ja", "nein"), ("right", "wrong"), ("1", "0"), ("oui", "nope")]
            pair = rng.choice(known) if rng.random() < 0.4 else (nonsense(rng), nonsense(rng))
            value, slots = "\n".join(pair), {"x": pair[0], "y": pair[1]}
        else:
            name = rng.choice(list(FORMS))
            when, value = of_class(rng, name), words(rng, rng.choice(FORMS[name][1]))
            slots = {"N": FORMS[name][0]}
    elif family == "end":
        trouble = rng.choice(["error", "error", "empty"])
        when = When(rng.choice(TROUBLE[trouble]), trouble=trouble)
        value = nonsense(rng) if rng.random() < 0.6 else rng.choice(WORDS_OF_END)
    else:
        tops = [f"/{top}" for top in TOPS if not held_out("refuse", f"/{top}")]
        under = f"/home/{rng.choice(USERS)}" if rng.random() < 0.4 else rng.choice(tops)
        when = When("", under=under)
        value = nonsense(rng) if rng.random() < 0.6 else rng.choice(WORDS_OF_END)
        slots = {"top": under}
    if held_out(family, value):
        return random_rule(rng, family)
    clause = when.clause
    slots = {"x": value, "c": clause, "C": clause[:1].upper() + clause[1:], **slots}
    return Rule(family, rng.choice(LINES[lines]).format(**slots), when, value, use)


def clash(a, b):
    """Could two rules want different things of one problem?"""
    if a.family == b.family == "tool":
        return a.use == b.use
    if a.value == b.value:
        return True
    if a.family != b.family:
        return False
    if a.family == "end":
        return a.when.trouble == b.when.trouble
    if a.family == "refuse":
        return a.when.under == b.when.under
    known = a.when.kinds and b.when.kinds
    return not known or bool(a.when.kinds & b.when.kinds)


def random_rules(rng, n, family=None):
    """n random rules that can stand in one prompt; all of one family if it is given, as far as
    there can be as many.
    """
    rules, tries = [], 0
    while len(rules) < n and (family is None or (tries := tries + 1) < 10 * n):
        name = family or rng.choices(FAMILIES, [SHARES[f] for f in FAMILIES])[0]
        rule = random_rule(rng, name)
        if not any(clash(rule, other) for other in rules):
            rules.append(rule)
    return rules


def problem_for(rng, rules, know=None, share=0.65):
    """A problem for a prompt with these rules; in `share` of the cases one is chosen to apply."""
    if rules and rng.random() < share:
        rule = rng.choice(rules)
        for _ in range(20):
            problem = rule.when.problem(rng, know)
            if rule.applies(problem):
                return problem
    return random_problem(rng, know or surprise(rng))


# ------------------------------------------------------------------------------------------- obey

# act: run, finish or answer; x: the command or the answer; of a command: its output and its use
Move = namedtuple("Move", "thought act x output use", defaults=(None, None))


def look(problem, use, path, command):
    """The step that looks at a path, before or after the change (use)."""
    facts = next((step.facts for step in problem.steps if step.target == path), None) or problem.know(stem(path))
    if use == "after":
        facts = facts | {"state": "missing" if problem.steps[-1].use == "delete" else "there"}
    return Step("check", "", command, path, facts)


def ending(problem, checked):
    """The last move of a problem under no rule."""
    if checked:
        return Move("The check is done, so nothing is left to do.", "finish", None)
    if problem.answer is None:
        why = "is an error, so nothing is changed" if problem.trouble == "error" else "is empty, so the change is made"
        why = why if problem.trouble != "empty" else "is empty, so there is no such file"
        return Move(f"The output {why}.", "finish", None)
    why = {
        None: f"The output shows that the answer is {problem.answer}.",
        "error": "The output is an error, so there is no answer.",
        "empty": "The output is empty, so there is no answer.",
    }[problem.trouble]
    return Move(why, "answer", problem.answer)


def obey(problem, rules=()):
    """A problem and the rules of its prompt -> [Move, ...], what the agent does, to the end."""
    active = {rule.family: rule for rule in rules if rule.applies(problem)}
    tools = {rule.use: rule for rule in rules if rule.family == "tool"}
    moves = []
    if "refuse" in active:
        moves = [Move("This path is closed, so I run nothing.", "answer", active["refuse"].value)]
    else:
        if "before" in active:
            path = problem.paths[0]
            step = look(problem, "before", path, active["before"].fill(path))
            moves.append(Move("First I look at the path.", "run", step.command, step.output, step.use))
        for step in [] if moves and NO_FILE in moves[0].output else problem.steps:
            if step.use in tools:
                step = replace(step, command=tools[step.use].fill(step.target))
            moves.append(Move(step.thought, "run", step.command, step.output, step.use))
        if "after" in active:
            path = re.findall(r"/[\w/.]*\w", step.command)[-1]
            step = look(problem, "after", path, active["after"].fill(path))
            moves.append(Move("Now I look at the result.", "run", step.command, step.output, step.use))
        last = ending(problem, "after" in active)
        for family in ("form", "end"):
            if family in active:
                x = active[family].value if family == "end" else active[family].fill(last.x)
                last = last._replace(act="answer", x=x)
        moves.append(last)
    if "name" in active:
        moves = [move._replace(thought=f"{active['name'].value} {move.thought}") for move in moves]
    return moves


def obeyed(rule, moves, wanted):
    """Is a rule obeyed in moves, where wanted is what `obey` says under it? Only what the rule asks
    for counts, not the rest of the work.
    """
    if not moves or None in moves:
        return False
    said, due = [[(m[1], m[2]) for m in some] for some in (moves, wanted)]
    if rule.family == "name":
        return all(move[0].startswith(f"{rule.value} ") for move in moves)
    if rule.family == "tool":
        return all(x in said for x, move in zip(due, wanted, strict=True) if move.use == rule.use)
    return {
        "after": said[-2:-1] == due[-2:-1], "before": said[:1] == due[:1], "refuse": said == due,
    }.get(rule.family, said[-1:] == due[-1:])  # fmt: skip


def main():
    rng = random.Random(0)
    for family in FAMILIES:
        for _ in range(4):
            rule = random_rule(rng, family)
            problem = problem_for(rng, [rule], share=1)
            print(f"{family}: {rule.line}\n    {problem.wish}\n    {[tuple(m) for m in obey(problem, [rule])]}")


if __name__ == "__main__":
    main()
