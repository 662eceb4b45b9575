"""House rules: lines of a prompt that change an agent's turns where they apply, which is seldom.

Four families. In brackets what a rule of each draws at random besides its wording:

    after    a command is run after a change, before the end                 (which change, command)
    tool     a command takes the place of the usual one                      (for what, command)
    form     an answer is dressed                                            (which answer, how)
    end      a word is the answer where the output is an error or empty      (which, word)

A model of this size learns to look a rule up by a word that it has just written; it does not learn
what "to get rid of a file" and "deletion" have in common besides all else. So the line of a rule
ends with its topic and its value, the wishes of that topic and the thoughts about them have the
same word (`TOPIC` in world.py), and where a prompt has rules, the thought looks the topic up: what it
says and how that is filled in are two steps, each a short one.

Words and commands are partly nonsense, so that they can only come from the prompt. `obey` is the
definition: a problem and the rules of its prompt -> what the agent does. The rules of `os.txt`
(`OS_RULES`) are held out: no rule of training has the value of one of them in its family.

Leaves out: rules that depend on an earlier turn, or on another rule.
"""

import random
import re
from collections import namedtuple
from dataclasses import dataclass, replace

from world import CHANGES, KINDS, TOPIC, USES, WORDS, Step, random_problem, stem, surprise

SHARES = {"after": 3, "tool": 4, "form": 5, "end": 4}
FAMILIES = list(SHARES)


def nonsense(rng, capital=False):
    """A pronounceable word that means nothing, such as Zorvik or plimo."""
    word = "".join(rng.choice("b d f g k l m n p r s t v z br pl st tr".split()) + rng.choice("aeiou")
                   for _ in range(rng.randint(2, 3)))  # fmt: skip
    word += rng.choice(["", "", "n", "k", "x"])
    return word.capitalize() if capital else word


# -------------------------------------------------------------------------------------- conditions

QUESTIONS = [kind for kind in KINDS if kind not in (*CHANGES, "move_newest", "delete_largest")]
CLAUSES = {  # family -> {topic: how its clause says it, with the topic at the end}
    "after": {
        "delete": "after a delete", "move": "after a move", "copy": "after a copy", "rename": "after a rename",
        "mode": "after a change of mode", "new directory": "after a new directory", "empty file": "after an empty file",
        "append": "after an append", "replace": "after a replace", "link": "after a link", "archive": "after an archive",
    },
    "form": {
        "lines": "when I ask for lines", "files": "when I ask for files", "words": "when I ask for words",
        "megabytes": "when I ask for megabytes", "processes": "when I ask for processes",
        "cron jobs": "when I ask for cron jobs", "logins": "when I ask for logins", "owner": "when I ask for an owner",
        "permissions": "when I ask for permissions", "first line": "when I ask for a first line",
        "last line": "when I ask for a last line", "text": "when I ask for a text", "yes or no": "when I ask for yes or no",
    },
    "end": {"error": "after an error", "empty": "after an empty output"},
}  # fmt: skip


@dataclass(frozen=True)
class When:
    """The condition of a rule: all that is not None must hold. kinds: of the problem; trouble: with
    the last output.
    """

    clause: str
    kinds: frozenset | None = None
    trouble: str | None = None

    def holds(self, problem):
        return (self.kinds is None or problem.kind in self.kinds) and (
            self.trouble is None or problem.trouble == self.trouble
        )

    def problem(self, rng, know=None):
        """A problem for which this may hold."""
        kind = rng.choice(sorted(self.kinds or QUESTIONS))
        state = {"error": "missing"}.get(self.trouble, self.trouble)
        return random_problem(rng, know or surprise(rng, state), kind)


def about(topic):
    """The kinds of problems of a topic."""
    return frozenset(kind for kind, words in TOPIC.items() if words == topic)


# ------------------------------------------------------------------------------------------- values

# A command is followed by what it is about; an answer stands in the place of the X of its form.
LOOKS = ["ls -l", "ls -ld", "ls -la", "ls -s", "stat", "stat -t", "stat -c %n", "file", "readlink -f", "lsattr",
         "{c}", "{w}", "{w} -{l}", "{w} {v}", "{c} {w}", "{c} -{l}", "{c} --{w}", "{c} -{l} {v}"]
TOOLS = {  # use of a command -> (how a clause says it, commands)
    "count_words": ("to count words", ["wc -w", "wc --total -w", "countwords", "nwords"]),
    "size": ("to measure megabytes", ["du -m -s", "du -BM -s", "du --total -m", "megabytes-of"]),
    "processes": ("to count processes", ["pgrep -c -u", "pgrep --count -u", "procs -n", "ps -h --count"]),
    "cron": ("to count cron jobs", ["cronjobs", "cron-of -n", "count-jobs"]),
    "logins": ("to count logins", ["logins-of", "last --count", "who -n"]),
    "owner": ("to find an owner", ["stat --format=%U", "stat -L -c %U", "owner-of", "find -printf %u"]),
    "mode": ("to read permissions", ["stat --format=%a", "stat -L -c %a", "mode-of", "find -printf %m"]),
    "first_line": ("to read a first line", ["sed -n 1p", "head -1", "sed 1q", "awk 'NR == 1'"]),
    "last_line": ("to read a last line", ["sed -n '$p'", "tail -1", "awk 'END {print}'"]),
    "largest": ("to find the largest", ["largest-of", "ls -S1 --first", "bysize -r"]),
    "newest": ("to find the newest", ["newest-of", "ls -t1 --first", "bydate -r"]),
    "content": ("to show a text", ["less", "more", "head -n 20", "tac", "nl"]),
    "delete": ("to delete", ["unlink", "rm -f", "shred -u", "rm -v"]),
    "make_directory": ("to make a new directory", ["mkdir", "install -d", "mkdir -m 750"]),
    "make_file": ("to make an empty file", [">", "truncate -s 0", "install /dev/null"]),
}
PROGRAMS = "cat wc head tail du find stat ls file test nl od awk sed sort grep cut tr".split()
OWN_TOOLS = ["{w}", "{w} -{l}", "{w} {v}", "{c} --{w}", "{c} {w}", "{c} {w} -{l}", "{c} --{w}=%{l}", "{w} <"]
FLAGS = "lines words chars bytes max total format count size time name zero quiet all long full short brief printf".split()
FORMS = ["X {t}", "{t}: X", "X {w}", "{w} X", "{w}: X", "X {w}", "{w} X", "X {U}", "{U}: X", "X {f}"]
WORDS_OF_END = ["missing", "forbidden", "nothing", "failed", "broken", "closed", "denied", "stop", "void", "sorry", "blocked", "missing",
                "gone", "no way", "error"]  # fmt: skip
ENDINGS = ["ing", "ed", "er", "ion", "able", "ly", "es", "ure"]  # for words that only look known, such as loging

# ---------------------------------------------------------------------------------------- wordings

# {c} the clause. It ends with the topic and is followed by the value: who has just written the topic
# finds the value behind the same word in the prompt.
LINES = {
    "after": ["Look at the result {c}", "Also run this {c}", "Last command {c}"],
    "tool": ["Use this {c}", "The command {c}", "Run this and nothing else {c}"],
    "form": ["Form of the answer {c}", "Answer like this {c}", "The answer {c}"],
    "end": ["The answer {c}", "Answer with this word {c}", "Say this {c}"],
}


@dataclass(frozen=True)
class Rule:
    """One rule: its line in the prompt, its condition, and its value (a command that is followed by what
    it is about, a form with a place X for the answer, or a word).

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
        """The value with the path or user behind it, or with the answer in its place."""
        if self.family in ("after", "tool"):
            return f"{self.value} {text}"
        return re.sub(r"\bX\b", lambda _: text, self.value, count=1)

    def shown(self, moves):
        """Does anything of the rule show in moves [(thought, act, x)]?"""
        act = "run" if self.family in ("after", "tool") else "answer"
        form = re.escape(self.fill("\0")).replace("\0", r".+" if act == "answer" else r"\S+")
        return any(re.fullmatch(form, x) for _, name, x in moves if name == act)


def kinds_with(use):
    """The kinds of problems that have a command for this use."""
    return frozenset({use, *(kind for kind, uses in USES.items() if use in uses)})


def rule_of(family, topic, lead, value):
    """topic: of CLAUSES, for a `tool` rule the use of TOOLS; lead: of LINES."""
    clause = TOOLS[topic][0] if family == "tool" else CLAUSES[family][topic]
    kinds = kinds_with(topic) if family == "tool" else None if family == "end" else about(topic)
    when = When(clause, kinds, topic if family == "end" else None)
    return Rule(family, f"{lead.format(c=clause)}: `{value}`", when, value, topic if family == "tool" else None)


OS_RULES = [  # the lines of os.txt
    rule_of("form", "files", "Form of the answer {c}", "count: X"),
    rule_of("tool", "count_words", "Use this {c}", "wc --words <"),
    rule_of("after", "move", "Look at the result {c}", "du -h"),
    rule_of("end", "error", "The answer {c}", "halt"),
    rule_of("tool", "mode", "Use this {c}", "stat --printf=%a"),
    rule_of("form", "megabytes", "Form of the answer {c}", "MB: X"),
    rule_of("after", "append", "Look at the result {c}", "sum"),
]


def held_out(family, value):
    """Does a rule of os.txt in this family have this value?"""
    return any((rule.family, rule.value) == (family, value) for rule in OS_RULES)


def words(rng, text, topic=""):
    """Fill the places in a value: {w} {v} nonsense words, {l} a letter, {U} capitals, {c} a program,
    {f} a word, {t} the topic.
    """
    slots = {
        "w": lambda: nonsense(rng), "v": lambda: nonsense(rng), "l": lambda: rng.choice("abcdefghkmnpqrstv"),
        "c": lambda: rng.choice(PROGRAMS), "U": lambda: "".join(rng.choices("ABCDEFGHKLMNPRST", k=rng.choice([1, 2]))),
        "f": lambda: rng.choice(FLAGS), "t": lambda: topic,
    }  # fmt: skip
    return re.sub(r"\{([wvlcUft])\}", lambda slot: slots[slot[1]](), text)


def varied(rng, command):
    """A known command with flags of its own: to copy it, the model may not go on as it is used to."""

    def flag(_=None):
        letters, word = "".join(rng.sample("abcdefghlmnpqrstuvw", rng.randint(1, 2))), rng.choice(FLAGS)
        return rng.choice([f" -{letters}", f" -{letters}", f" --{word}", f" --{word}=%{letters[0]}"])

    new = re.sub(r" -[-\w=%]+", lambda old: flag() if rng.random() < 0.7 else old[0], command)
    return new if new != command else re.sub(r"^[\w-]+", lambda program: program[0] + flag(), command)


def random_rule(rng, family):
    """A random rule of a family, never with a value of os.txt."""
    if family == "after":
        topic, value = rng.choice(list(CLAUSES[family])), words(rng, rng.choice(LOOKS))
        value = varied(rng, value) if rng.random() < 0.4 else value
    elif family == "tool":
        topic = rng.choice(list(TOOLS))
        value = words(rng, rng.choice(OWN_TOOLS if rng.random() < 0.5 else TOOLS[topic][1]))
        value = varied(rng, value) if rng.random() < 0.6 else value
    elif family == "form":
        topic = rng.choice(list(CLAUSES[family]))
        value = words(rng, rng.choice(FORMS), topic)
    else:
        topic = rng.choice(["error", "error", "empty"])
        start = rng.choice([*WORDS, *WORDS_OF_END, *FLAGS])[: rng.randint(3, 5)]
        value = rng.choice([nonsense(rng), rng.choice(WORDS_OF_END), rng.choice(WORDS), start + rng.choice(ENDINGS)])
    return random_rule(rng, family) if held_out(family, value) else rule_of(family, topic, rng.choice(LINES[family]), value)


def clash(a, b):
    """Could two rules want different things of one problem?"""
    if a.value.replace("X", "").split()[0] == b.value.replace("X", "").split()[0]:
        return True  # two values that begin alike are hard to tell apart
    if a.family != b.family:
        return False
    if a.family == "tool":
        return a.use == b.use
    return a.when.trouble == b.when.trouble if a.family == "end" else a.when.kinds == b.when.kinds


def random_rules(rng, n, family=None):
    """n random rules that can stand in one prompt; all of one family if it is given, as far as
    there can be as many.
    """
    rules, tries = [], 0
    while len(rules) < n and (family is None or (tries := tries + 1) < 10 * n):
        rule = random_rule(rng, family or rng.choices(FAMILIES, SHARES.values())[0])
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


def ending(problem):
    """The last move of a problem under no rule."""
    if problem.trouble == "error":
        why = "is an error, so nothing is changed" if problem.answer is None else "is an error, so there is no answer"
    elif problem.answer is None:
        why = f"is empty, so the {problem.topic} is done"
        why = why if problem.trouble is None else "is empty, so there is no such file"
    else:
        why = f"shows the {problem.topic}: {problem.answer}" if problem.trouble is None else "is empty, so there is no answer"
    return Move(f"The output {why}.", "finish" if problem.answer is None else "answer", problem.answer)


def look_up(thought, clause, rule):
    """A thought that goes on to say what the prompt has behind this clause: the value of a rule, or none."""
    return f"{thought} Rule {clause}: " + (f"`{rule.value}`." if rule else "none.") if clause else thought


def last_clause(problem):
    """The clause of the rules that could change how a problem ends, None where none could."""
    if problem.trouble:
        return CLAUSES["end"][problem.trouble]
    return CLAUSES["after" if problem.answer is None else "form"].get(problem.topic)


def check(problem, rule):
    """The look at the last path of the last command that an `after` rule asks for."""
    path = re.findall(r"/[\w/.]*\w", problem.steps[-1].command)[-1]
    facts = next((step.facts for step in problem.steps if step.target == path), None) or problem.know(stem(path))
    facts = facts | {"state": "missing" if problem.steps[-1].use == "delete" else "there"}
    step = Step("check", "", rule.fill(path), path, facts)
    return Move("", "run", step.command, step.output, step.use)


def obey(problem, rules=()):
    """A problem and the rules of its prompt -> [Move, ...], what the agent does, to the end."""
    active = {rule.family: rule for rule in rules if rule.applies(problem)}
    tools = {rule.use: rule for rule in rules if rule.family == "tool"}
    moves = []
    for step in problem.steps:
        rule, clause = tools.get(step.use), TOOLS[step.use][0] if step.use in TOOLS else None
        thought = look_up(step.thought, rules and clause, rule)
        if rule:
            step = replace(step, command=rule.fill(step.target))
        moves.append(Move(thought, "run", step.command, step.output, step.use))
    last = ending(problem)
    rule = active.get("end") or active.get("form") or active.get("after")
    thought = look_up(last.thought, rules and last_clause(problem), rule)
    if rule and rule.family == "after":
        moves.append(check(problem, rule)._replace(thought=thought))
        thought = "I have looked at the result, so nothing is left to do."
    elif rule:
        last = last._replace(act="answer", x=rule.fill(last.x or ""))
    return [*moves, last._replace(thought=thought)]


def obeyed(rule, moves, wanted):
    """Is a rule obeyed in moves, where wanted is what `obey` says under it? Only what the rule asks
    for counts, not the rest of the work.
    """
    if not moves or None in moves:
        return False
    said, due = [[(m[1], m[2]) for m in some] for some in (moves, wanted)]
    if rule.family == "tool":
        return all(x in said for x, move in zip(due, wanted, strict=True) if move.use == rule.use)
    return said[-2:-1] == due[-2:-1] if rule.family == "after" else said[-1:] == due[-1:]


def main():
    rng = random.Random(0)
    for family in FAMILIES:
        for _ in range(4):
            rule = random_rule(rng, family)
            problem = problem_for(rng, [rule], share=1)
            print(f"{family}: {rule.line}\n    {problem.wish}\n    {[tuple(m) for m in obey(problem, [rule])]}")


if __name__ == "__main__":
    main()
