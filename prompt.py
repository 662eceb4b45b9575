"""The prompt p, what is known of its kind, and the messages that each speaker reads.

    teacher       p with x in its place: the agent that knows p
    student       x alone: the same model without p
    environment   the conversation from the other side: the worked examples of p with the roles
                  swapped, closed by [END], then x as a message of its own; where p is plain text
                  and has none, all of p as what the agent was told

A prompt file is UTF-8 text. With lines <USER>: and <AGENT>: it is a chat: instructions and worked
examples, then an open <USER>: turn, in which {user_input} marks the place of x. With none it is one
system message. A message is {"role": "system" | "user" | "assistant", "content": str}.

Left out: images, tools, prompts in several files. Source: GenPI section 5, AgentBench (2308.03688).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

ASSISTANT = "You are a helpful assistant."  # the system message where p brings none
END = "[END]"  # the environment's last word
START = "Start a new conversation."

ENVIRONMENT = """You play {environment} in a conversation with an agent. When you are told to \
start a new conversation, give the agent a problem. Answer each later message of the agent \
exactly as {environment} would, in the form that you used before, and add nothing of your own. \
As soon as the agent has given its final answer, write only {end}"""

INSTRUCTIONS = """

The agent works by these instructions:

---
{prompt}
---"""


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# --------------------------------------------------------------------------------------- prompt


@dataclass(frozen=True)
class Prompt:
    """The prompt p: its text, the closed chat turns in it, and the open user turn that x completes.

    A plain text (no <USER>: and <AGENT>: lines) has no turns and no opening.
    """

    text: str
    turns: tuple[tuple[str, str], ...] = ()  # (role, text), role user or assistant
    opening: str | None = None

    def teacher(self, x: str) -> list[dict]:
        """The messages that the teacher reads: p with x in its place."""
        if self.opening is None:
            return [message("system", self.text), message("user", x)]
        turns = [message(role, text) for role, text in self.turns]
        return [message("system", ASSISTANT), *turns, message("user", self.open_turn(x))]

    def open_turn(self, x: str) -> str:
        """The last user turn of p with x at {user_input}, or behind it where there is no mark."""
        if self.opening is None:
            return x
        if "{user_input}" in self.opening:
            return self.opening.replace("{user_input}", x)
        return f"{self.opening}\n\n{x}".strip()


MARKER = re.compile(r"^<(USER|AGENT)>:[ \t]*\n?", re.MULTILINE)
ROLES = {"USER": "user", "AGENT": "assistant"}


def parse_prompt(text: str, name: str = "prompt") -> Prompt:
    """Read the text of a prompt file.

    Raises: ValueError where <USER>: and <AGENT>: do not alternate, or nothing is left open.
    """
    text = text.strip()
    before, *pieces = MARKER.split(text)  # what stands before, then marker, text, marker, text ...
    if not pieces:
        return Prompt(text)
    markers = pieces[::2]
    texts = [piece.strip() for piece in pieces[1::2]]
    check_markers(before, markers, name)
    if set(texts) <= {"", "{user_input}"}:
        raise ValueError(f"{name}: nothing but <USER>: and <AGENT>: lines; write what they say")
    turns = tuple((ROLES[marker], said) for marker, said in zip(markers, texts, strict=True))
    return Prompt(text, turns[:-1], opening=texts[-1])


def check_markers(before: str, markers: list[str], name: str) -> None:
    """Raise ValueError unless a chat runs user, agent, ..., user."""
    if before.strip():
        raise ValueError(f"{name}: text before the first <USER>: line; begin the file with <USER>:")
    for i, marker in enumerate(markers):
        if marker != ("USER", "AGENT")[i % 2]:
            told = f"turn {i + 1} is <{marker}>:; <USER>: and <AGENT>: must alternate"
            raise ValueError(f"{name}: {told}")
    if markers[-1] != "USER":
        told = "the last turn is <AGENT>:; end with an open <USER>: turn for the input"
        raise ValueError(f"{name}: {told}")


# ---------------------------------------------------------------------------------------- demos


def parse_demos(text: str) -> tuple[str, ...]:
    """Read the text of a file of demonstrations: first messages, each of one or more lines.

    With lines of three dashes these part the messages; else every line is one: a JSON string if
    all lines are (JSONL), or the message itself.
    """
    blocks = re.split(r"^---[ \t]*$", text, flags=re.MULTILINE)
    if len(blocks) == 1:
        lines = [line for line in text.split("\n") if line.strip()]
        blocks = json_strings(lines) or lines
    demos = [block.strip() for block in blocks]
    return tuple(demo for demo in demos if demo)


def json_strings(lines: list[str]) -> list[str]:
    """The strings that the lines spell in JSON; none if any line is something else."""
    try:
        found = [json.loads(line) for line in lines if line.lstrip().startswith('"')]
    except json.JSONDecodeError:
        return []
    if len(found) < len(lines):
        return []
    return [demo.encode(errors="replace").decode() for demo in found]  # half a surrogate pair: ?


# ---------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """What we know of a kind of prompt beyond its text.

    environment   whom the model plays
    max_turns     agent turns of a conversation at most
    gold_turns    agent turns that the benchmark's own solutions take (GenPI Table 4), if known
    action        agent text -> its parsed action or None; without one any text is an action
    final         parsed action -> does it end the conversation?
    counted       parsed action -> does Table 4 take it for a final action? None: as `final`
    demos         first messages that show the generator what is wanted; they come from a file
    """

    name: str
    environment: str
    max_turns: int
    action: Callable[[str], tuple | None] | None = None
    final: Callable[[tuple], bool] = lambda action: False
    counted: Callable[[tuple], bool] | None = None
    gold_turns: float | None = None
    demos: tuple[str, ...] = ()

    def act(self, text: str) -> tuple | None:
        """The action that an agent turn takes, None if it takes none."""
        return self.action(text) if self.action else (text.strip(),)

    def is_final(self, text: str) -> bool:
        """Does an agent turn end the conversation?"""
        action = self.act(text)
        return action is not None and self.final(action)

    def has_final_action(self, text: str) -> bool:
        """Would GenPI Table 4 count the last agent turn of a conversation as a final action?"""
        action = self.act(text)
        return action is not None and (self.counted or self.final)(action)


def os_action(text: str) -> tuple | None:
    """The last valid Act: of an agent turn: (bash, code), (finish,) or (answer, value).

    Source: AgentBench, OS interaction.
    """
    for act in reversed(re.findall(r"Act:\s*(.+)", text)):
        blocks = re.findall(r"```bash\s*\n(.*?)```", text, re.DOTALL)
        if act.lower().startswith("bash"):  # without a block an empty command
            return ("bash", "\n\n".join(block.strip() for block in blocks))
        if act.lower().startswith("finish"):
            return ("finish",)
        value = re.match(r"answer[^(]*\((.*)\)", act, re.IGNORECASE)
        if value:
            return ("answer", value[1].strip())
    return None


def browsing_action(text: str) -> tuple | None:
    """(letter, operation, value) of a web browsing turn. Source: Mind2Web, multi-choice form."""
    letter = re.search(r"Answer: ([A-F])", text)
    if not letter:
        return None
    operation = re.search(r"Action: (CLICK|SELECT|TYPE)", text)
    value = re.search(r"Value: (.*)$", text, re.MULTILINE)
    return (letter[1], operation[1] if operation else "", value[1].strip() if value else "")


def shopping_action(text: str) -> tuple | None:
    """(search or click, argument) of a web shopping turn. Source: WebShop, text mode."""
    found = re.search(r"Action:\s*(search|click)\[(.+?)\]", text, re.IGNORECASE)
    return (found[1].lower(), found[2].strip().lower()) if found else None


def search_action(text: str) -> tuple | None:
    """(thing, highest price or "any") of a line for a search engine: search.txt."""
    found = re.fullmatch(r"([^|\n]+?) \| (any|\d+)", text.strip())
    return (found[1].lower(), found[2]) if found else None


def reminders_action(text: str) -> tuple | None:
    """(what, when or None) of a calendar entry in JSON: reminders.txt."""
    try:
        entry = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.keys() != {"do", "when"}:
        return None
    values = entry["do"], entry["when"]
    if not isinstance(values[0], str) or not isinstance(values[1], str | None):
        return None
    return tuple(value and value.lower() for value in values)


OS = Task(
    "os", "the shell of a Linux machine", 10, os_action,
    final=lambda action: action[0] in ("finish", "answer"), gold_turns=3,
)  # fmt: skip
WEB_BROWSING = Task(
    "web_browsing", "a browser that shows pages as HTML", 2, browsing_action, final=bool,
    counted=lambda action: action[0] == "A" or action[1] != "", gold_turns=1,
)  # fmt: skip
WEB_SHOPPING = Task(
    "web_shopping", "a shop that shows its pages as text", 5, shopping_action,
    final=lambda action: action == ("click", "buy now"),
    counted=lambda action: True, gold_turns=4,
)  # fmt: skip
SEARCH = Task("search", "a customer of a shop", 1, search_action, final=bool)
REMINDERS = Task("reminders", "somebody who dictates notes", 1, reminders_action, final=bool)
ANY = Task("any", "the user of this conversation", 1)
TASKS = {task.name: task for task in (OS, WEB_BROWSING, WEB_SHOPPING, SEARCH, REMINDERS, ANY)}


# ------------------------------------------------------------------------------------- messages


def student_messages(x: str) -> list[dict]:
    """The messages that the student reads: x without p."""
    return [message("system", ASSISTANT), message("user", x)]


def conversation(opening: list[dict], turns: list[str], roles=("assistant", "user")) -> list[dict]:
    """opening continued by agent and environment texts in turn, which have these roles."""
    return opening + [message(roles[i % 2], text) for i, text in enumerate(turns)]


def environment_messages(prompt: Prompt, task: Task, x: str, turns: list[str]) -> list[dict]:
    """The conversation as the environment sees it: roles swapped, [END] after each worked example.

    turns: agent and environment texts in turn so far, the last one the agent's.
    """
    system = ENVIRONMENT.format(environment=task.environment, end=END)
    if prompt.opening is None:
        system += INSTRUCTIONS.format(prompt=prompt.text)
    chat = [message("system", system), message("user", START)]
    swapped = {"user": "assistant", "assistant": "user"}
    ended = [message("assistant", END), message("user", START)]
    for role, text in prompt.turns:
        chat.append(message(swapped[role], text))
        if role == "assistant" and task.is_final(text):
            chat += ended
    if prompt.turns and chat[-2:] != ended:  # the last example ends where x begins
        chat += ended
    chat.append(message("assistant", prompt.open_turn(x)))
    return conversation(chat, turns, roles=("user", "assistant"))
