"""The chats on which the embedded model is trained: random protocols, and six uses of each.

A protocol is what an agent prompt lays down: how the thought and the action are labelled, what the
three actions are called, how their arguments are written, how the machine's output is announced.
All of it is drawn at random, a third of the labels being nonsense words, and the wording and the
examples too: the only way to predict an agent's turn is to read the prompt. What `os.txt` uses is
held out (`held_out`).

Every question is built by the functions of `prompt.py`, `synth.py` and `loss.py` that ask it later,
so they cannot drift apart.
"""

import random
from dataclasses import dataclass

from world import directory, random_problem, surprise

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
RUNS = ["{name}\n\n```{lang}\n{x}\n```"] * 3 + ["{name}[{x}]", "{name}\n{x}", "<{name}>{x}</{name}>", "{name}: {x}", "{name} {x}"]
ANSWERS = ["{name}({x})"] * 3 + ["{name}[{x}]", "<{name}>{x}</{name}>", "{name}: {x}", "{name}\n{x}"]
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
RULES = [
    "Use only one action in a turn.", "Do not answer before you have seen the output.", "Long output is cut.",
    "Write nothing else.", "Keep your thoughts short.", "The answer is only the bare value, with no other words.",
    "Print only what you need.", "I will send you the output of your commands.", "You have ten turns.",
    "Never guess.", "Stop as soon as the problem is solved.",
]  # fmt: skip
MACHINES = ["the shell of a Linux machine"] * 3 + ["a Linux terminal", "the operating system", "the user and the computer"]


def nonsense(rng, capital):
    """A pronounceable word that means nothing, such as Zorvik or plimo."""
    word = "".join(rng.choice("b d f g k l m n p r s t v z br pl st tr".split()) + rng.choice("aeiou")
                   for _ in range(rng.randint(2, 3)))  # fmt: skip
    word += rng.choice(["", "", "n", "k", "x"])
    return word.capitalize() if capital else word


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

    def turns(self, problem):
        """[in] Problem -> [out] agent and environment texts in turn, ending with the agent's last.
        """
        texts = []
        for thought, command, output in problem.steps:
            texts += [self.turn(thought, "run", command), self.observe(output)]
        if problem.answer is None:
            return [*texts, self.turn("The output is empty, so the change is made.", "finish")]
        return [*texts, self.turn(f"The output shows that the answer is {problem.answer}.", "answer", problem.answer)]

    def describe(self, rng):
        """The instructions of a prompt, in random words and order."""
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
        rules = " ".join(rng.sample(RULES, rng.randint(0, 3)))
        head = rng.choice(INTRO) + rng.choice([" ", "\n\n"]) + rng.choice(TURNS).format(**labels)
        return "\n\n".join(filter(None, [head, *listed, rules]))


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


def random_prompt(rng, p, examples=None, short=False):
    """A Prompt for protocol p: instructions and 0 to 2 worked examples as a chat, or one plain
    text.
    """
    chosen = rng.choices([0, 1, 2, "plain"], [15, 60, 10, 15])[0] if examples is None else examples
    head = rng.choice(INTRO) if short else p.describe(rng)
    if chosen == "plain":
        shown = rng.choice(["...", "the output", "what was printed"])
        return parse_prompt(f"{head}\n\nYou will see the output like this:\n\n{p.observe(shown)}\n\n{p.observe('')}")
    text, first = f"<USER>:\n{head}\n\n", True
    for _ in range(chosen):
        problem = random_problem(rng, surprise(rng))
        opened = ("Now, my problem is:\n\n{}" if first and p.open_form == "{}" else p.open_form).format(problem.wish)
        roles = ["<USER>:\n", "<AGENT>:\n"]
        text += ("" if first else roles[0]) + opened + "\n"
        text += "".join(roles[1 - i % 2] + t + "\n" for i, t in enumerate(p.turns(problem)))
        first = False
    return parse_prompt(text + ("" if first else "<USER>:\n") + p.open_form.format("{user_input}"))


# Each use below gives (messages, weights): weights[i] is the loss weight of message i.
AGENT, MACHINE, LISTED, REST = 1.0, 0.7, 0.5, 0.15


def agent_chat(rng, short=False):
    """The teacher: the prompt, then one to four problems solved under its protocol."""
    p = random_protocol(rng)
    prompt = random_prompt(rng, p, examples=1 if short else None, short=short)
    chat = []
    for _ in range(rng.randint(2, 4) if prompt.turns else rng.randint(1, 2)):
        problem = random_problem(rng, surprise(rng))
        if chat:
            chat.append(message("user", p.open_form.format(problem.wish) if prompt.opening else problem.wish))
        else:
            chat = prompt.teacher(problem.wish)
        chat += [message(("assistant", "user")[i % 2], t) for i, t in enumerate(p.turns(problem))]
    return chat, [AGENT if m["role"] == "assistant" else REST for m in chat]


def machine_chat(rng):
    """The environment: roles swapped, the imaginary machine answers, [END] after the final action.
    """
    p = random_protocol(rng)
    prompt = random_prompt(rng, p)
    chat, weights = None, []
    for _ in range(rng.randint(2, 4)):
        problem = random_problem(rng)
        if chat is None:
            task = Task("machine", rng.choice(MACHINES), max_turns=10)
            chat = environment_messages(prompt, task, problem.wish, p.turns(problem))
            played = len(p.turns(problem))
            weights = [REST] * (len(chat) - played)
        else:
            chat += [message("user", START), message("assistant", p.open_form.format(problem.wish))]
            chat += [message(("user", "assistant")[i % 2], t) for i, t in enumerate(p.turns(problem))]
            played = len(p.turns(problem))
            weights += [REST, REST]
        weights += [(REST, MACHINE)[i % 2] for i in range(played)]
        chat.append(message("assistant", END))
        weights.append(MACHINE)
    return chat, weights


def inputs_chat(rng):
    """The generator of pseudo inputs: a numbered list of wishes is continued."""
    prompt = random_prompt(rng, random_protocol(rng))
    shown, n = rng.choice([0, 1, 3, 5, 5, 5, 5]), rng.randint(5, 10)
    wishes = [random_problem(rng).wish for _ in range(shown + n)]
    listed = [f"{i + 1}. {wish}" for i, wish in enumerate(wishes)]
    chat = inputs_messages(prompt, wishes[:shown], n) + [message("assistant", "\n".join(listed[shown:]))]
    return chat, [REST, REST, LISTED]


def advice(rng, problem):
    """What a general assistant says to a wish: which command would do it."""
    command = problem.steps[0][1]
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


def reason(rng, p, problem):
    """About five sentences on why the protocol turns advice into an action."""
    command, act, think = problem.steps[0][1], p.label.format(p.act), p.label.format(p.think)
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
    return " ".join(chosen)


def first_replies(rng):
    """(protocol, prompt, problem, student output, first teacher output) for the two chats below."""
    p = random_protocol(rng)
    problem = random_problem(rng)
    return p, random_prompt(rng, p), problem, advice(rng, problem), p.turns(problem)[0]


def reason_chat(rng):
    """The generator of reasons."""
    p, prompt, problem, student, teacher = first_replies(rng)
    chat = reason_messages(prompt, Record(0, problem.wish, [teacher], student))
    return [*chat, message("assistant", reason(rng, p, problem))], [REST, REST, LISTED]


def prompt_chat(rng):
    """The PG question about a prompt that can only be guessed: what a prompt and a reason look
    like.
    """
    p, prompt, problem, student, teacher = first_replies(rng)
    record = Record(0, problem.wish, [teacher], student, reason(rng, p, problem))
    return pg_messages(prompt, record), [REST] * 3


USES = {agent_chat: 50, machine_chat: 19, inputs_chat: 9, general_chat: 10, reason_chat: 8, prompt_chat: 4}


def random_chat(rng):
    """One training chat: (messages, weight of each message)."""
    return rng.choices(list(USES), list(USES.values()))[0](rng)


def short_chat(rng):
    """A chat of the first part of training: short prompts, where reading a label is learnt fastest.
    """
    return general_chat(rng) if rng.random() < 0.15 else agent_chat(rng, short=True)


def main():
    rng = random.Random(0)
    for use in USES:
        chat, weights = use(rng)
        print(f"===== {use.__name__}")
        for m, weight in zip(chat, weights, strict=True):
            print(f"--- {m['role']} ({weight})\n{m['content']}")
    print(directory(rng))


if __name__ == "__main__":
    main()
