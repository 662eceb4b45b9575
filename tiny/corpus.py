"""The chats on which the embedded model is trained: random protocols, and seven uses of each.

A protocol is what an agent prompt lays down: how the thought and the action are labelled, what the
three actions are called, how their arguments are written, how the machine's output is announced.
All of it is drawn at random, a third of the labels being nonsense words, and the wording, the house
rules (`rules.py`) and the examples too: the only way to predict an agent's turn is to read the
prompt. What `os.txt` uses is held out (`held_out`).

The course of training (`draw`): plain protocols; then house rules, up to seven, for the most part
of one family in a prompt, with problems that need one of them or just miss it, so that only their
topics tell which is due; some chats come a second time with the line of a rule gone. What nobody can
know, the words of prompts and users, has next to no weight: its gradients would drown the rules'.

Every question is built by the functions of `prompt.py`, `synth.py` and `loss.py` that ask it later,
so they cannot drift apart.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the modules of the project; no package is installed

from rules import (
    FAMILIES,
    OS_RULES,
    SHARES,
    look_up,
    nonsense,
    obey,
    problem_for,
    random_rule,
    random_rules,
)
from world import CHANGES, FACT, USERS, WORDS, directory, machine, random_problem, surprise

from loss import pg_messages
from prompt import (
    END,
    START,
    Task,
    environment_messages,
    message,
    parse_prompt,
    student_messages,
)
from runs import Record
from synth import inputs_messages, reason_messages

THINK = "Think Thought Thoughts Reasoning Plan Idea Note Why Mind Reflection Comment Step".split()
ACT = "Act Action Do Move Next Output Command Decision Choice Call Reply Execute".split()
RUN = "bash run shell exec terminal sh execute command cmd console".split()
FINISH = "finish done stop end complete quit exit close over ready".split()
ANSWER = "answer reply submit result say return tell report solution value".split()
LABELS = ["{}:", "{}:", "{}:", "[{}]", "{} -", "<{}>", "## {}:"]
# No action has its value behind a space: there a word has other tokens than in the quotes of a rule.
RUNS = ["{name}\n\n```{lang}\n{x}\n```"] * 3 + ["{name}[{x}]", "{name}\n{x}", "<{name}>{x}</{name}>", "{name}:\n{x}", "{name}({x})"]
ANSWERS = ["{name}({x})"] * 3 + ["{name}[{x}]", "<{name}>{x}</{name}>", "{name}:\n{x}", "{name}\n{x}"]
OUTPUTS = [
    ("The output of the OS:\n\n{}", "The output of the OS is empty."),
    ("The output of the shell:\n\n{}", "The output of the shell is empty."),
    ("Output:\n{}", "Output is empty."),
    ("The machine printed:\n\n{}", "The machine printed nothing."),
    ("Result: {}", "Result: none"),
    ("The output of the command:\n{}", "The output of the command is empty."),
    ("Observation: {}", "Observation: empty"),
]
OPEN = [
    "Now, my problem is:\n\n{}", "My next problem:\n\n{}", "Here is a new problem.\n\n{}", "New task: {}",
    "Now I have another problem:\n\n{}", "I start again on a new machine. The problem is:\n\n{}", "Problem: {}",
    "Now, a new problem begins. My problem is:\n\n{}", "{}",
]  # fmt: skip
INTRO = [
    "You are an agent on a Linux computer, and you solve a problem for the user.",
    "You work at the shell of a Linux machine to solve my problem.",
    "You control a Linux system and do what I ask, one step at a time.",
    "Act as an operator who solves tasks in a terminal.",
    "I will give you problems about a Linux system. Solve each of them with the shell.",
    "This is a task for an agent that can use a Linux terminal.",
    "You are an assistant who acts on a computer by sending actions to its shell.",
    "Your job is to help the user with a server that you reach through a shell.",
]
TURNS = [
    "Each turn starts with {T} and a thought, then comes {A} and one action.",
    "Every reply has two parts: {T} with a short thought and {A} with an action.",
    "First write {T} and your thought in one sentence, then write {A} and the action.",
    "Reply in this form: {T} what you think, {A} what you do.",
    "In every turn I send you the problem or the output, and you send back {T} with one sentence and {A} with one action.",
    "Begin with {T} and say what you know. After it write {A} with exactly one of the actions.",
]
TO_RUN = [
    "To run commands, write:", "If you want to use the shell, reply:", "For a command in the shell:",
    "When you need to run something:", "To execute commands on the machine:", "To look at something or change it, put the commands like this:",
]  # fmt: skip
TO_FINISH = [
    "When nothing is left to do, write:", "If the task is finished:", "When the change is made, stop:",
    "When you have done what I asked for:", "If the problem asked you to change something and it is done:", "To end without an answer:",
]  # fmt: skip
TO_ANSWER = [
    "To give the answer to a question, write:", "If you know the answer:", "When the problem asked a question and you have seen the answer:",
    "For a question, when the answer is clear:", "To answer me, only with the value:", "When you can answer, reply:",
]  # fmt: skip
REMARKS = [
    "Use only one action in a turn.", "Do not answer before you have seen the output.", "Long output is cut.",
    "Write nothing else.", "Keep your thoughts short.", "The answer is only the bare value, with no other words.",
    "Print only what you need.", "I will send you the output of your commands.", "You have ten turns.",
    "Never guess.", "Stop as soon as the problem is solved.",
]  # fmt: skip
HEADERS = ["House rules:", "Rules:", "Rules of the house; what a command is about comes behind it:", "Further rules:", "Please note:", "On this machine:"]
BULLETS = ["", "- ", "- ", "* ", "{}. ", "({}) ", "Rule {}: "]
MACHINES = ["the shell of a Linux machine"] * 3 + ["a Linux terminal", "the operating system", "the user and the computer"]


@dataclass(frozen=True)
class Protocol:
    """How turns look. think, act, run, finish, answer: labels; the rest: their syntax."""

    think: str
    act: str
    run: str
    finish: str
    answer: str
    label: str
    run_form: str
    answer_form: str
    lang: str
    gap: str
    output_form: tuple
    open_form: str

    def turn(self, thought, name, x=None):
        """One agent turn; name is run, finish or answer, x the command or the answer."""
        form = {"run": self.run_form, "finish": "{name}", "answer": self.answer_form}[name]
        action = form.format(name=getattr(self, name), x=x, lang=self.lang)
        return f"{self.label.format(self.think)} {thought}{self.gap}{self.label.format(self.act)} {action}"

    def observe(self, output):
        """The environment's turn for the output of a command."""
        return self.output_form[0].format(output) if output else self.output_form[1]

    def turns(self, problem, rules=()):
        """[in] Problem and house rules -> [out] agent and environment texts in turn, ending with
        the agent's last.
        """
        texts = []
        for move in obey(problem, rules):
            texts.append(self.turn(move.thought, move.act, move.x))
            if move.output is not None:
                texts.append(self.observe(move.output))
        return texts

    def describe(self, rng, short=False):
        """The instructions of a prompt, in random words and order, as paragraphs; short: the first
        of them alone, which leaves the form to the examples.
        """
        labels = {"T": f'"{self.label.format(self.think)}"', "A": f'"{self.label.format(self.act)}"'}
        thought = rng.choice(["your thought", "Why this helps.", "what you know", "A short reason.", "..."])
        actions = [
            (TO_RUN, self.turn(thought, "run", rng.choice(["the commands", "COMMAND", "your command", "ls"]))),
            (TO_FINISH, self.turn(thought, "finish")),
            (TO_ANSWER, self.turn(thought, "answer", rng.choice(["the value", "ANSWER", "your answer", "..."]))),
        ]
        rng.shuffle(actions)
        number = rng.choice(["", "", "{}. ", "({}) "])
        listed = [f"{number.format(i + 1)}{rng.choice(how)}\n\n{form}" for i, (how, form) in enumerate(actions)]
        remarks = " ".join(rng.sample(REMARKS, rng.randint(0, 3)))
        head = rng.choice(INTRO) + rng.choice([" ", "\n\n"]) + rng.choice(TURNS).format(**labels)
        return [rng.choice(INTRO)] if short else list(filter(None, [head, *listed, remarks]))


OS = Protocol(  # what os.txt lays down
    "Think", "Act", "bash", "finish", "answer", "{}:", RUNS[0], ANSWERS[0], "bash", "\n\n", OUTPUTS[0], "{}"
)


def os_prompt(without=None):
    """The Prompt in os.txt; without: one of OS_RULES, whose line is taken out.

    Raises: ValueError if the line is not there.
    """
    path = HERE.parent / "os.txt"
    text = path.read_text(encoding="utf-8")
    for rule in OS_RULES:
        if text.count(f"- {rule.line}\n") != 1:
            raise ValueError(f"{path.name} lacks the line: {rule.line}")
    if without:
        text = text.replace(f"- {without.line}\n", "")
        if without.value == "count: X":  # the worked example obeys this one
            text = text.replace(f"{without.when.clause}: `{without.value}`.", f"{without.when.clause}: none.").replace("answer(count: 220)", "answer(220)")
    return parse_prompt(text)


def held_out(p):
    """True for what os.txt uses: its two labels together, or its three action names together."""
    return (p.think, p.act) == ("Think", "Act") or (p.run, p.finish, p.answer) == ("bash", "finish", "answer")


def random_protocol(rng, strange=0.35):
    """A random Protocol; `strange` is the share of nonsense labels."""

    def name(known):
        return nonsense(rng, known[0][0].isupper()) if rng.random() < strange else rng.choice(known)

    p = Protocol(
        name(THINK), name(ACT), name(RUN), name(FINISH), name(ANSWER), rng.choice(LABELS), rng.choice(RUNS),
        rng.choice(ANSWERS), rng.choice(["bash", "bash", "sh", "", "shell"]), rng.choice(["\n\n", "\n"]),
        rng.choice(OUTPUTS), rng.choice(OPEN),
    )  # fmt: skip
    return random_protocol(rng, strange) if held_out(p) else p


def list_rules(rng, rules):
    """The lines of the house rules as one paragraph, each on a line of its own."""
    header, bullet = rng.choice(HEADERS), rng.choice(BULLETS)
    lines = [f"{bullet.format(i + 1)}{rule.line}" for i, rule in enumerate(rules)]
    return [header + ("\n\n" if header else "") + "\n".join(lines)] if rules else []


def random_prompt(rng, p, examples=None, rules=(), short=False):
    """A Prompt for protocol p: instructions, house rules, and worked examples as a chat; or one
    plain text if examples is None. What is drawn does not depend on the rules.
    """
    paragraphs = p.describe(rng, short)
    place = rng.choice([1, len(paragraphs), len(paragraphs), len(paragraphs)])
    listed = list_rules(random.Random(rng.getrandbits(32)), rules)
    head = "\n\n".join([*paragraphs[:place], *listed, *paragraphs[place:]])
    if examples is None:
        shown = rng.choice(["...", "the output", "what was printed"])
        return parse_prompt(f"{head}\n\nYou will see the output like this:\n\n{p.observe(shown)}\n\n{p.observe('')}")
    text, first = f"<USER>:\n{head}\n\n", True
    for problem in examples:
        opened = ("Now, my problem is:\n\n{}" if first and p.open_form == "{}" else p.open_form).format(problem.wish)
        roles = ["<USER>:\n", "<AGENT>:\n"]
        text += ("" if first else roles[0]) + opened + "\n"
        text += "".join(roles[1 - i % 2] + t + "\n" for i, t in enumerate(p.turns(problem, rules)))
        first = False
    return parse_prompt(text + ("" if first else "<USER>:\n") + p.open_form.format("{user_input}"))


def random_examples(rng, rules, know=None, short=False):
    """The problems of the worked examples: 0 to 2; None: the prompt is a plain text. short: a
    question and a change, which together show all that a prompt without instructions must.
    """
    if short:
        asked = [random_problem(rng, know or surprise(rng), rng.choice(list(kinds))) for kinds in (FACT, CHANGES)]
        return rng.sample(asked, 2)
    n = rng.choices([0, 1, 2, None], [12, 60, 13, 15])[0]
    return None if n is None else [problem_for(rng, rules, know, share=0.4) for _ in range(n)]


# Each use below gives (messages, weights): weights[i] is the loss weight of message i. An output
# that nobody can predict carries none.
AGENT, MACHINE, LISTED, EXAMPLE, REST, NOTHING = 1.0, 2.0, 1.0, 0.3, 0.01, 0.0


def agent_chat(p, prompt, problems, rules):
    """The teacher: the prompt, then problems solved under its protocol and house rules."""
    chat, weights = [], []
    for problem in problems:
        opened = p.open_form.format(problem.wish) if prompt.opening else problem.wish
        asked = [message("user", opened)] if chat else prompt.teacher(problem.wish)
        if not chat:
            agents = [m["role"] == "assistant" for m in asked]
            weights = [EXAMPLE if agent else REST for agent in agents]
            for i in range(1, len(asked) - 1):  # outputs in the worked examples
                if not agents[i] and agents[i - 1] and not starts(p, asked[i]["content"]):
                    weights[i] = NOTHING
        else:
            weights.append(REST)
        turns = p.turns(problem, rules)
        chat += asked + [message(("assistant", "user")[i % 2], t) for i, t in enumerate(turns)]
        weights += [(AGENT, NOTHING)[i % 2] for i in range(len(turns))]
    return chat, weights


def starts(p, text):
    """Does a user's text start a problem, rather than show an output?"""
    return not text.startswith((p.output_form[0].split("{}")[0], p.output_form[1]))


def agent_chats(rng, n=0, short=False, paired=False, problems=None, kin=False):
    """An agent's chat under n house rules; paired: and the same without the line of one of them.

    kin: all rules are of one family, and the problems need one of them or just miss them. What tells
    them apart is then their topics alone, so that no guess comes near to reading them.
    """
    p = random_protocol(rng)
    family = rng.choices(FAMILIES, SHARES.values())[0] if kin else None
    rules = random_rules(rng, n, family)
    n = len(rules)
    examples = random_examples(rng, rules, short=short)
    many = problems or (rng.randint(4, 8) if kin else rng.randint(2, 5))
    chosen = [problem_for(rng, rules, share=0.65) for _ in range(many)]
    if kin:  # near misses: problems for a rule of the family that is likely not there
        chosen = [problem_for(rng, [random_rule(rng, family)], share=1) if rng.random() < 0.4 else x for x in chosen]
    seed = rng.getrandbits(32)
    sets = [rules]
    if paired:
        gone = rng.randrange(n)
        sets.append(rules[:gone] + rules[gone + 1 :])
    chats = []
    for some in sets:
        prompt = random_prompt(random.Random(seed), p, examples, some, short)
        chats.append(agent_chat(p, prompt, chosen, some))
    return chats


def rules_chat(rng, n, short=False):
    """A prompt is asked for its rules: nothing but looking up and filling in, many times over."""
    family = rng.choices(FAMILIES, SHARES.values())[0] if rng.random() < 0.5 else None
    rules = random_rules(rng, max(n, 2), family)
    clauses = {rule.when.clause: rule for rule in rules}
    near = [random_rule(rng, family or rng.choice(FAMILIES)).when.clause for _ in rules]
    asked = [*clauses, *(clause for clause in near if clause not in clauses)]
    rng.shuffle(asked)
    if short:
        prompt = parse_prompt(f"<USER>:\n{list_rules(rng, rules)[0]}\n\n{{user_input}}")
    else:
        prompt = random_prompt(rng, random_protocol(rng), random_examples(rng, rules), rules)
    chat, weights = [], []
    for clause in asked:
        rule = clauses.get(clause)
        place = rng.choice([rng.choice(USERS), rng.choice(WORDS), directory(rng), str(rng.randint(0, 999))])
        wish = rng.choice([f"Which rule is there {clause}? It is about {place}.", f"It is about {place}. What is the rule {clause}?"])
        said = look_up("", clause, rule).strip() + (f" Here: `{rule.fill(place)}`." if rule else "")
        opened = [message("user", wish)] if chat else prompt.teacher(wish)
        chat += [*opened, message("assistant", said)]
        weights += [REST] * len(opened) + [AGENT]
    return chat, weights


def one_problem(seed, rules, problem):
    """An agent's chat of one problem under these rules; seed: what the prompt is drawn from."""
    rng = random.Random(seed)
    p = random_protocol(rng)
    examples = random_examples(rng, ())
    return agent_chat(p, random_prompt(rng, p, examples, rules), [problem], rules)


NUMBERS = [kind for kind, fact in FACT.items() if fact == "count"]


def machine_chat(rng, n=0, short=False):
    """The environment: roles swapped, the imaginary machine answers, [END] after the final action.

    All outputs, those of the worked examples too, are facts of the machine. short: no prompt, many
    problems, so that names and facts stand close together.
    """
    p, rules = random_protocol(rng), random_rules(rng, n)
    examples = [] if short else random_examples(rng, rules, know=machine)
    prompt = parse_prompt("<USER>:\n{user_input}") if short else random_prompt(rng, p, examples, rules)
    chat, weights = None, []
    for _ in range(rng.randint(6, 12) if short else rng.randint(2, 4)):
        number = short and rng.random() < 0.6  # the numbers are most of what there is to know
        problem = random_problem(rng, machine, rng.choice(NUMBERS)) if number else problem_for(rng, rules, machine)
        turns = p.turns(problem, rules)
        if chat is None:
            task = Task("machine", rng.choice(MACHINES), max_turns=10)
            chat = environment_messages(prompt, task, problem.wish, turns)
            shown = chat[: len(chat) - len(turns)]
            weights = [REST] * len(shown)
            for i, m in enumerate(shown):
                if m["role"] == "assistant" and not starts(p, m["content"]):
                    weights[i] = MACHINE
        else:
            chat += [message("user", START), message("assistant", p.open_form.format(problem.wish))]
            chat += [message(("user", "assistant")[i % 2], t) for i, t in enumerate(turns)]
            weights += [REST, REST]
        weights += [(REST, MACHINE)[i % 2] for i in range(len(turns))]
        chat.append(message("assistant", END))
        weights.append(LISTED)
    return chat, weights


def inputs_chat(rng):
    """The generator of pseudo inputs: a numbered list of wishes is continued."""
    prompt = first_replies(rng)[0]
    shown, n = rng.choice([0, 1, 3, 5, 5, 5, 5]), rng.randint(5, 16)
    wishes = [random_problem(rng, openers=[""]).wish for _ in range(shown + n)]
    listed = [f"{i + 1}. {wish}" for i, wish in enumerate(wishes)]
    chat = inputs_messages(prompt, wishes[:shown], n) + [message("assistant", "\n".join(listed[shown:]))]
    return chat, [REST, REST, LISTED]


def advice(rng, problem):
    """What a general assistant says to a wish: which command would do it."""
    command = problem.steps[0].command
    if len(problem.steps) > 1:
        return rng.choice([
            f"This takes two steps. The command `{command}` {problem.advice}. Use its name in the second command.",
            f"You can do this in two steps. First `{command}` {problem.advice}. Then work on that file.",
        ])  # fmt: skip
    return rng.choice([
        f"You can use the command `{command}`. It {problem.advice}.",
        f"The command `{command}` {problem.advice}.",
        f"Try `{command}` in a terminal. It {problem.advice}.",
    ])  # fmt: skip


SMALL_TALK = [
    ("Hello!", "Hello! How can I help you?"), ("Hi", "Hi! What can I do for you?"),
    ("Good morning", "Good morning! How can I help you today?"), ("Who are you?", "I am a small assistant."),
    ("What can you do?", "I can explain commands for files, users and directories on Linux."),
    ("Thanks!", "You are welcome!"), ("Thank you very much.", "You are welcome! Ask me if you need more."),
    ("How are you?", "I am well, thank you. How can I help you?"), ("Bye", "Goodbye!"),
    ("Can you help me?", "Yes. Tell me what you want to do."), ("What is Linux?", "Linux is an operating system."),
    ("What is a directory?", "A directory holds files and other directories."),
    ("What is a file?", "A file holds data under a name."), ("Tell me a story.", "I only know about Linux commands."),
]  # fmt: skip


def general_chat(rng):
    """A general assistant: no prompt, plain advice, some small talk."""
    chat, weights = [], []
    for _ in range(rng.randint(1, 4)):
        problem = random_problem(rng)
        said, reply = rng.choice(SMALL_TALK) if rng.random() < 0.15 else (problem.wish, advice(rng, problem))
        chat += [message("user", said), message("assistant", reply)] if chat else [*student_messages(said), message("assistant", reply)]
    weights = [AGENT if m["role"] == "assistant" else REST for m in chat]
    return (chat, weights) if rng.random() < 0.9 else (chat[1:], weights[1:])


def reason(rng, p, problem, rules=()):
    """About five sentences on why the protocol turns advice into an action, and which house rule
    has a part in it.
    """
    command, act, think = problem.steps[0].command, p.label.format(p.act), p.label.format(p.think)
    said = ["talks about the command", "explains the command", "gives advice about the command", "names the command"]
    sentences = [
        [f"The first reply only {s} `{command}` and leaves the work to the user." for s in said]
        + [f"Without the prompt the assistant {s} `{command}`, as if the user had asked for advice." for s in said],
        ["The prompt makes the assistant an agent that acts on the machine itself.",
         "The prompt says that the assistant is at a shell and solves the problem step by step.",
         "According to the prompt, the assistant does not explain but acts.",
         "The prompt gives the assistant a shell, so it does not send the user away."],
        [f'Every turn must have a thought after "{think}" and an action after "{act}", and the second reply has both.',
         f'The second reply therefore starts with "{think}" and one sentence, and then it writes "{act}".',
         f'That is why the second reply has the two parts "{think}" and "{act}".',
         f'The form of the second reply, first "{think}" and then "{act}", is the one that the prompt lays down.'],
        [f'Its action is "{p.run}", because the problem needs a command before anything else can be said.',
         f'It chooses "{p.run}" among the three actions and passes it {"one command" if len(problem.steps) == 1 else "the first command"}.',
         f'The name "{p.run}" stands for running a command, and the command here is `{command}`.',
         f'With "{p.run}" the command `{command}` is sent to the machine in the way the prompt shows.'],
        [f'The value comes only in a later turn with "{p.answer}", when the output has been seen.' if problem.answer is not None
         else f'When the change is made, a later turn will say "{p.finish}".',
         "The prompt allows one action in a turn, so the reply stops there and waits for the output.",
         "It adds nothing else, since the output has to come first.",
         "So the reply ends after one action, and the next turn depends on what the machine prints."],
    ]  # fmt: skip
    chosen = [rng.choice(row) for row in sentences]
    if rng.random() < 0.3:
        chosen[1:3] = chosen[2:0:-1]
    for rule in rules:
        if rule.applies(problem) and rule.shown([obey(problem, [rule])[0][:3]]):
            chosen[-1] = rng.choice(["Here the rule applies: ", "One line of the prompt matters here: ", "It obeys the rule: "]) + rule.line
    return " ".join(chosen)


def first_replies(rng):
    """(prompt, problem, student output, first teacher output, reason) for a chat below."""
    p, rules = random_protocol(rng), random_rules(rng, rng.choice([0, 1, 2, 4, 6]))
    problem = problem_for(rng, rules)
    prompt = random_prompt(rng, p, random_examples(rng, rules), rules)
    why = reason(rng, p, problem, rules)
    return prompt, problem, advice(rng, problem), p.turns(problem, rules)[0], why


def reason_chat(rng):
    """The generator of reasons."""
    prompt, problem, student, teacher, why = first_replies(rng)
    chat = reason_messages(prompt, Record(0, problem.wish, [teacher], student))
    return [*chat, message("assistant", why)], [REST, REST, LISTED]


def prompt_chat(rng):
    """The PG question about a prompt that can only be guessed: what a prompt and a reason look
    like.
    """
    prompt, problem, student, teacher, why = first_replies(rng)
    record = Record(0, problem.wish, [teacher], student, why)
    return pg_messages(prompt, record), [REST] * 3


STAGES = [  # (share of the second part at which it begins, numbers of house rules, share of pairs, share of kin)
    (0.0, [1, 2, 3, 4], 0.4, 1.0), (0.6, [0, 1, 2, 3, 4, 5, 6], 0.4, 0.8), (0.9, [0, 1, 2, 3, 4, 5, 6, 7], 0.4, 0.5),
]  # fmt: skip
LONG = 0.005  # share of chats that are longer than 2,048 tokens, from 0.5 on


def draw(rng, share):
    """Some chats of the training: [(messages, weight of each message), ...].

    share: how much of the second part, the one with house rules, is over; below 0 the first part
    goes on, whose protocols are plain.
    """
    numbers, pairs, kin = next(stage[1:] for stage in reversed(STAGES) if stage[0] <= max(share, 0))
    n = rng.choice(numbers) if share >= 0 else 0
    if share >= 0.5 and rng.random() < LONG:
        return agent_chats(rng, n, problems=rng.randint(14, 20))
    if n and rng.random() < 0.08:
        return [rules_chat(rng, n, short=rng.random() < 0.5)]
    use = rng.random()
    if use < 0.59:
        short = rng.random() < (0.6 if share < 0.55 else 0.3)
        return agent_chats(rng, n, short, n > 0 and rng.random() < pairs, kin=n > 0 and rng.random() < kin)
    if use < 0.83:
        return [machine_chat(rng, n, short=rng.random() < 0.6)]
    if use < 0.88:
        return [general_chat(rng)]
    return [rng.choices([inputs_chat, reason_chat, prompt_chat], [12, 5, 2])[0](rng)]


def main():
    rng = random.Random(0)
    chats = [*agent_chats(rng, 3, paired=True), machine_chat(rng, 2), machine_chat(rng, short=True)]
    for chat, weights in [*chats, *(use(rng) for use in (inputs_chat, general_chat, reason_chat, prompt_chat))]:
        print("=====")
        for m, weight in zip(chat, weights, strict=True):
            print(f"--- {m['role']} ({weight})\n{m['content']}")


if __name__ == "__main__":
    main()
