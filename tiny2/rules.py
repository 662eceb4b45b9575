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
    "change": (ALL_CHANGES, ["for every change", "when I want something changed", "if my problem asks for a change",
        "whenever the problem is a change", "for a problem that changes something"]),
    "delete": (["delete", "delete_largest"], ["when a file is to be deleted", "for every deletion",
        "if I want a file removed", "when I ask you to delete something", "whenever you delete a file"]),
    "move": (["move", "move_newest", "copy"], ["when a file is to be moved or copied", "for every move and every copy",
        "if I want a file moved or copied", "whenever you move or copy a file"]),
    "rename": (["rename"], ["when a file gets a new name", "for every renaming", "if I want a file renamed",
        "whenever you rename a file", "when I ask for another name of a file"]),
    "rights": (["set_mode", "set_owner"], ["when a file gets another mode or owner", "for a change of mode or owner",
        "if I want the permissions or the owner changed", "whenever you set a mode or an owner"]),
    "create": (["make_directory", "make_file"], ["when a new file or directory is made", "for a new file or directory",
        "if I want a file or a directory created", "whenever you create a file or a directory"]),
    "edit": (["replace", "append"], ["when the text of a file is edited", "if I want words replaced or lines added",
        "for an edit of a file", "whenever you replace a word or append a line"]),
    "link": (["link"], ["when a link is made", "for every link", "if I want a symbolic link", "whenever you link something"]),
    "pack": (["pack"], ["when an archive is made", "for every archive", "if I want a directory packed",
        "whenever you pack something"]),
    "question": ([kind for kind in KINDS if kind not in ALL_CHANGES], ["for every question", "when I ask a question",
        "if my problem is a question", "whenever I want to know something"]),
    "user": (["processes", "cron", "logins"], ["for a question about processes, cron jobs or logins",
        "when I ask what a user runs or how often he logged in", "if I ask about processes, logins or cron jobs",
        "whenever the question is about the processes, cron jobs or logins of a user"]),
    "lines": (["count_lines", "lines_of_largest"], ["when all lines of a file are counted", "for the number of all lines of a file",
        "if I ask how many lines a file has", "whenever you count every line of a file"]),
    "files": (["count_files", "count_type"], ["when files are counted", "for a number of files",
        "if I ask how many files there are", "whenever you count files"]),
    "size": (["size"], ["when a size is asked for", "for a size in megabytes", "if I ask how large a directory is",
        "whenever I want to know a size"]),
    "test": (["exists", "is_directory"], ["for a question of yes or no", "when I ask for yes or no",
        "if yes or no is the answer", "whenever the answer is yes or no"]),
    "read": (["first_line", "last_line", "content"], ["when I want to read in a file", "for a line or the text of a file",
        "if I ask what a file says", "whenever a file is read to me"]),
    "owner": (["owner", "owner_of_newest"], ["when I ask for an owner", "for the question who owns a file",
        "if I want to know who owns a file", "whenever the owner of a file is asked for"]),
    "mode": (["mode"], ["when I ask for the mode of a file", "for a question about permissions",
        "if I want to know permissions", "whenever permissions are asked for"]),
    "best": (["largest", "newest", *CHAINS], ["when the largest or newest file is meant", "for the largest or the newest file",
        "if I speak of the largest or the newest file", "whenever you look for the largest or newest file"]),
    "number": (["count_files", "count_lines", "count_matches", "count_words", "count_type", "size", "processes", "cron",
        "logins", "lines_of_largest"], ["when the answer is a number", "for a number", "if I ask for a number",
        "whenever a number is the answer"]),
    "file": (["largest", "newest"], ["when the answer is the name of a file", "for the name of a file",
        "if a file name is the answer", "whenever I ask for the name of a file"]),
}  # fmt: skip
UNDER = ["when a path below {} is named", "for everything below {}", "if the problem is about {}",
         "whenever a path begins with {}", "for paths in {}"]  # fmt: skip
UNDER_CHANGED = ["when you change something below {}", "for every change in {}", "if something in {} is changed",
                 "whenever a change is about {}"]  # fmt: skip
ENDING = ["when a file ends in .{}", "for every .{} file", "if a .{} file is named", "whenever the problem names a .{} file"]
TROUBLE = {
    "error": ["when the output is an error", "if the shell reports an error", "after an error",
              "when the file is not there", "whenever a command fails"],
    "empty": ["when I ask something and nothing is printed", "if a question has an empty output",
              "after an empty output to a question", "when the output to my question has no text",
              "whenever the command of a question prints nothing"],
}  # fmt: skip


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
    "number": ("N", ["N {w}", "N {w}", "{w} N", "{w}: N", "N of {w}", "<N>", "#N", "N!", "about N", "~N", "=N", "no. N", "N in all"]),
    "lines": ("N", ["N lines", "lines: N", "N {w}", "{w} N", "L N"]),
    "files": ("N", ["N files", "files: N", "N {w}", "{w} N", "F N"]),
    "size": ("N", ["N MB", "N megabytes", "N M", "{w} N", "N {w}"]),
    "user": ("N", ["N {w}", "{w} N", "N times", "N for the user"]),
    "owner": ("X", ["user X", "@X", "'X'", "{w} X", "X {w}", "owner: X"]),
    "file": ("X", ["'X'", "file X", "./X", "{w} X", "{w}: X", "X {w}"]),
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
        "{C}, look at it with `{x}` at the end, with the last path of your command as PATH.",
        "Run `{x}` {c}, after the command and before the end; PATH stands for its last path.",
        "{C}, the last command is `{x}`, where PATH is the last path that you used.",
        "Never stop without `{x}` {c}; for PATH put the last path of your command.",
        "{C}, check the result with `{x}` (PATH: the last path of the command).",
        "Check with `{x}` {c}, and stop only then. PATH is the path that comes last.",
        "{C}, one more command follows: `{x}`, with the last path for PATH.",
    ],
    "before": [
        "{C}, run `{x}` first; PATH is the first path that I name.",
        "{C}, begin with the command `{x}`, with my first path as PATH.",
        "Before anything else run `{x}` {c}; PATH stands for the first path in my problem.",
        "{C}, the first command is `{x}`, where PATH is the path that I name first.",
        "Start with `{x}` {c}; for PATH put my first path.",
        "{C}, look first with `{x}` (PATH: the first path of my message).",
        "{C}, no command comes before `{x}`, with the path named first for PATH.",
        "Look at the first path with `{x}` {c}, before you change it.",
    ],
    "name": [
        '{C}, begin every thought with "{x}".', 'Your thoughts begin with "{x}" {c}.',
        '{C}, each thought starts with "{x}".', 'Put "{x}" before your thought {c}.',
        '{C}, the first word of a thought is "{x}".', 'Write "{x}" at the start of each thought {c}.',
        '{C}, "{x}" opens all thoughts.', 'Every thought must start with "{x}" {c}.',
        '{C}, say "{x}" before you think.',
    ],
    "tool": [
        "{C}, use `{x}`.", "{C}, take the command `{x}`.", "{C}, the command is `{x}`.",
        "Use `{x}` {c}.", "{C}, write `{x}` and nothing else.", "The right command {c} is `{x}`.",
        "{C}, always run `{x}`.", "{C}, our machine has `{x}`.", "Prefer `{x}` {c}.",
        "`{x}` is the command {c}.", "`{x}` is what we run {c}.",
    ],
    "form": [
        "{C}, write it as `{x}`, with the value for {N}.", "{C}, answer in the form `{x}`.",
        "{C}, the form of the answer is `{x}`.", "Answer `{x}` {c}, where {N} is the value.",
        "{C}, put the value into `{x}` at {N}.", "{C}, answer with `{x}` and not with {N} alone.",
        "The answer looks like `{x}` {c}.", "{C}, I want to read `{x}`, {N} being the value.",
        "Give the answer as `{x}` {c}.",
    ],
    "yesno": [
        "{C}, answer {x} for yes and {y} for no.", "{C}, yes is called {x} and no is called {y}.",
        "{C}, say {x} in place of yes and {y} in place of no.", "Write {x} for yes and {y} for no {c}.",
        "{C}, the words are {x} (yes) and {y} (no).", "{C}, a yes is {x} and a no is {y}.",
        "Instead of yes or no, answer {x} or {y} {c}.", "{C}, I read only {x} as yes and {y} as no.",
    ],
    "end": [
        "{C}, answer with the word {x}.", "{C}, the answer is {x}.",
        "{C}, give {x} as the answer.", "Answer {x} {c}.", "{C}, stop and answer {x}.",
        "Reply with {x} {c}.", "{C}, the word {x} is the answer.", "{C}, do not guess, answer {x}.",
        "Say {x} as your answer {c}.",
    ],
    "refuse": [
        "Never touch anything below {top}: answer {x} at once.", "If a path begins with {top}, run nothing and answer {x}.",
        "{top} is not yours; answer {x} without a command when I name a path in it.",
        "For every path below {top} the only answer is {x}.", "Keep out of {top}: the answer is {x}, with no command before it.",
        "When my problem names {top}, answer {x} right away.", "Do not run commands for paths in {top}, answer {x}.",
        "Everything in {top} is locked, so answer {x} immediately.", "Problems about {top} get the answer {x} and no command.",
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
    os_rule("after", "ls -l PATH", "As soon as a file has been moved or copied, run `ls -l PATH` before you finish, "
            "with the last path of your command in place of PATH.", WHEN["move"][0]),
    os_rule("before", "stat PATH", "Before you touch the mode or the owner of a file, look at it: your first command is "
            "`stat PATH`, with the path that I name first.", WHEN["rights"][0]),
    os_rule("name", "Careful:", "Where I ask for processes, cron jobs or logins, every thought begins with "
            '"Careful:".', WHEN["user"][0]),
    os_rule("tool", "grep -c '' FILE", "All lines of a file are counted with `grep -c '' FILE`.", WHEN["lines"][0],
            "count_lines"),
    os_rule("form", "N files", "If I ask how many files there are, the answer has the form `N files`.", WHEN["files"][0]),
    os_rule("end", "missing", "If the output is an error, the answer is the word missing.", trouble="error"),
    os_rule("refuse", "forbidden", "Nothing below /var may be touched: run no command there, but answer forbidden at once.",
            under="/var"),
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
        classes = [name for name in WHEN if name not in ("number", "file")]
        when = of_class(rng, *classes) if rng.random() < 0.65 else of_path(rng)
        value = words(rng, rng.choice(MARKS))
    elif family == "tool":
        use = rng.choice(list(TOOLS))
        clauses, place, commands = TOOLS[use]
        own = rng.choice(["{w} " + place, "{w} -{l} " + place, "{w} {v} " + place, "{w} " + place + " | {v}"])
        kinds = [use, *(kind for kind, uses in USES.items() if use in uses)]
        aim, short = clauses
        clause = rng.choice([aim, aim, short, f"if you need {aim}", f"when you want {aim}", f"whenever you have {aim}"])
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
    known = a.when.kinds and b.when.kinds
    return not known or bool(a.when.kinds & b.when.kinds)


def random_rules(rng, n):
    """n random rules that can stand in one prompt."""
    rules = []
    while len(rules) < n:
        family = rng.choices(FAMILIES, [SHARES[f] for f in FAMILIES])[0]
        rule = random_rule(rng, family)
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
