"""Tokenizer and chat format: a conversation becomes token ids, each with the message that wrote it.

A chat format puts a header before each message and an end of turn behind it. It is read off the
checkpoint's own chat_template, a Jinja program from messages to text: rendered with a marker in the
place of each content, the text is cut at the markers. encode() guarantees:

    ids and owners are made together, so that ids and loss mask cannot drift apart;
    what a user writes is never a control token, whatever it spells;
    what encode(reply=True) returns is a prefix of the same conversation with the reply;
    BOS stands where the template writes it: once, in front (Llama 2: before every user turn).

Left out: tool calls, thinking, and the branches of a template that look into a content: they see
the marker, which is not empty and holds no tag. Departures from templates, since an adapter must
mean the same on every day and in every turn: where one asks for today's date (Llama 3.2) it gets a
fixed one; a system text that one moves to the last user turn (Mistral v3), or refuses, stands in
the first; the empty thought that one puts before a reply (Qwen3), and takes away when the next turn
begins, stays.
"""

import json
import re
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint import read_settings, read_tokenizer, token_names
from runs import text_hash

# --------------------------------------------------------------------------------------- template

CURE = "write one for plain chats into its chat_template.jinja"
TODAY = date(2024, 7, 26)  # which Llama 3.2's template takes where there is no clock
UNTOLD = {  # without a template the vocabulary must tell: a control token of it -> the format
    "<|start_header_id|>": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}",
    "<|im_start|>": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
    "[INST]": "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}",
}
# a content: a letter that no text has, between white space that no template writes
FIRST = "\v\ue000\v"
SECOND = "\v\ue001\v"
THIRD = "\v\ue002\v"
LETTER = re.compile("[\ue000-\ue002]")


class Gap(NamedTuple):
    """What stands between two contents."""

    end: str  # the end of turn, by the author of the first
    header: str  # nobody's words
    start: str  # before the second, by its author
    trims: tuple[bool, bool]  # does the second lose the white space on its left, on its right?


def compile_template(source: str, names: dict[str, str]) -> Callable[..., str]:
    """Make a template a function, as transformers does; it may use names, as of eos_token."""

    def refuse(why: str):
        raise TemplateError(why)

    # {% generation %} is no Jinja: it tells transformers' trainer what the assistant wrote
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [LoopControlExtension]}
    jinja = ImmutableSandboxedEnvironment(**options)
    jinja.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    known = names | {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    return partial(jinja.from_string(source, known).render, enable_thinking=False, tools=None)


def cut(render: Callable, *messages: tuple[str, str], reply: bool = False) -> list[str]:
    """The texts before, between and behind the contents of rendered messages (role, content).

    Raises: ValueError if not every content is there, once and in order.
    """
    said = [{"role": role, "content": content} for role, content in messages]
    rendered = render(messages=said, add_generation_prompt=reply)
    if LETTER.findall(rendered) != LETTER.findall("".join(content for _, content in messages)):
        raise ValueError("it drops, repeats or moves a message")
    return LETTER.split(rendered)


def read_gaps(render: Callable, control: re.Pattern) -> dict[tuple[str | None, str | None], Gap]:
    """Read a chat format off its template: (role, next role) -> Gap, where None is begin or end.

    Raises: ValueError, or what the template raises, if it is of no use for conversations.
    """
    asked = cut(render, ("user", FIRST), reply=True)
    unanswered = cut(render, ("user", FIRST))
    answered = cut(render, ("user", FIRST), ("assistant", SECOND))
    longer = cut(render, ("user", FIRST), ("assistant", SECOND), ("user", THIRD))
    try:
        system = cut(render, ("system", FIRST), ("user", SECOND), reply=True)
    except (TemplateError, ValueError):  # refused or dropped
        system = cut(render, ("user", f"{FIRST}\n\n{SECOND}"), reply=True)
    texts = {  # the text before the second content, and the one behind it
        (None, "user"): asked,
        (None, "system"): system,
        ("system", "user"): system[1:],
        ("user", "assistant"): longer[1:],
        ("assistant", "user"): longer[2:],
        ("user", None): [unanswered[1], ""],
        ("assistant", None): [answered[2], ""],
    }
    stop = control.search(answered[2])
    gaps = {}
    for roles, (before, behind, *_) in texts.items():
        text = before.strip("\v")
        start = ""
        if roles == ("user", "assistant"):
            text, start = reply_header(asked[1].strip("\v"), text)
        first = control.search(text)
        end = text[: first.end()] if first and stop and first[0] == stop[0] else ""
        trims = not before.endswith("\v"), not behind.startswith("\v")  # a marker has lost its own
        gaps[roles] = Gap(end, text[len(end) :], start, trims)
    if not (gaps["assistant", "user"].end and gaps["assistant", None].end):
        raise ValueError("it writes no end of turn, a control token, behind a reply")
    return gaps


def reply_header(prompt: str, history: str) -> tuple[str, str]:
    """What a template asks for a reply with, and what it writes before one -> header, start.

    White space that it adds to the prompt (Llama 2) is for the model to write.
    """
    more = history[len(prompt) :] if history.startswith(prompt) else ""
    return (prompt + more, "") if more.strip() else (prompt, more)


def read_format(folder: Path, settings: dict, control: dict[str, int], names: re.Pattern) -> dict:
    """The gaps of a checkpoint's template. Raises: ValueError for one that cannot be used."""
    source = settings["chat_template"] or next((UNTOLD[c] for c in UNTOLD if c in control), "")
    try:
        gaps = read_gaps(compile_template(source, token_names(settings)), names)
        headers = "".join(gap.header for gap in gaps.values())
        for name in re.findall(r"<\|(?!system|user|assistant)\w+\|>", headers):
            if name not in control:
                raise ValueError(f"the tokenizer lacks its {name}")
    except Exception as error:  # a template can raise whatever a program can
        why = " ".join(str(error).split()) if source else "there is none"
        raise ValueError(f"{folder}: its chat template is of no use: {why}; {CURE}") from None
    return gaps


# ------------------------------------------------------------------------------------------- chat

CUT = None  # between two texts that are tokenised apart
Piece = tuple[str | int | None, int]  # a text, control token or CUT, and its owner


class Chat:
    """Tokenizer and chat format of a checkpoint.

    tokenizer  a tokenizers.Tokenizer, to which the names of control tokens are text like any other
    control    name -> id of the control tokens
    gaps       the chat format; format is a hash of it
    stops      ids that end a reply
    context    how many tokens the model can read
    """

    def __init__(self, folder: str | Path, context: int):
        folder = Path(folder)
        settings = read_settings(folder)
        self.context = context
        self.tokenizer, self.control, self.space_rule = read_tokenizer(folder)
        self.names = re.compile(f"({'|'.join(map(re.escape, self.control))})")
        self.gaps = read_format(folder, settings, self.control, self.names)
        self.format = text_hash(repr(self.gaps))[:8]
        eos = settings.get("eos_token_id") or []
        eos = set(eos if isinstance(eos, list) else [eos])
        end = self.split(self.gaps["assistant", None].end, -1)
        self.stops = eos | {what for what, _ in end if isinstance(what, int)}

    def encode(self, messages: list[dict], reply: bool = False) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation and the owner of each: the index of its message, or -1.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...]. A message owns
        its content and its end of turn; headers belong to nobody, and never carry loss.

            messages                0 user "How many?"              1 assistant "7"
            ids         BOS  header  How  many   ?   EOT    header    7   EOT
            owner        -1    -1     0     0    0    0       -1      1    1
            reply=True: the first message alone ends here, ------^ where the assistant writes

        Raises: ValueError for roles, or an order of roles, that is none of a chat.
        """
        check_roles([message["role"] for message in messages])
        owned = []  # (id, owner)
        fresh = True  # the next text comes first, or after a control token
        pieces = self.pieces(messages, reply)
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece[0], str)):
            if is_text:
                owned += self.encode_run(list(group), fresh, first=not owned)
            else:
                controls = [piece for piece in group if piece[0] is not CUT]
                owned += controls
                fresh = bool(controls)
        return [token for token, _ in owned], [owner for _, owner in owned]

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return [token for token, _ in self.encode_run([(text, -1)], fresh=True, first=True)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pieces(self, messages: list[dict], reply: bool) -> Iterator[Piece]:
        """Yield a conversation as it stands before tokenisation."""
        roles = [None, *(message["role"] for message in messages), "assistant" if reply else None]
        for index, pair in enumerate(pairwise(roles)):
            gap = self.gaps[pair]
            yield from self.split(gap.end, index - 1)
            yield from self.split(gap.header, -1)
            if index == len(messages):
                return
            if pair[1] == "assistant":
                yield CUT, -1  # as at generation, where the header is given and the reply is not
            yield from self.split(gap.start, index)
            content = messages[index]["content"]
            left, right = gap.trims
            content = content.lstrip() if left else content
            yield content.rstrip() if right else content, index

    def split(self, text: str, owner: int) -> Iterator[Piece]:
        """Yield the texts and control tokens in a string of the format."""
        for part in filter(None, self.names.split(text)):
            yield self.control.get(part, part), owner

    def encode_run(self, run: list[Piece], fresh: bool, first: bool) -> list[tuple[int, int]]:
        """Tokenise texts as ONE; a token's owner is that of its last letter."""
        text = "".join(part for part, _ in run)
        space, when = self.space_rule
        lacking = not text.startswith((" ", space))
        wanted = {"every": True, "missing": lacking, "first": lacking and first}[when]
        space = space if text and fresh and wanted else ""
        owners = [-1] * len(space) + [owner for part, owner in run for _ in part]
        encoding = self.tokenizer.encode(space + text, add_special_tokens=False)
        last_letters = [end - 1 for _, end in encoding.offsets]
        return [(i, owners[last]) for i, last in zip(encoding.ids, last_letters, strict=True)]


def check_roles(roles: list[str]) -> None:
    """Raise ValueError unless there is a user, who speaks first, and replies alternate."""
    turns = roles[roles[:1] == ["system"] :]
    if not turns or turns != (["user", "assistant"] * len(roles))[: len(turns)]:
        raise ValueError(f"roles {roles}: a chat runs [system] user assistant user ...")
