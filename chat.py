"""Tokenizer and chat format: a conversation becomes token ids, each with the message that wrote it.

A chat format puts a header before each message and an end of turn behind it. Five published ones
are written down as data below and tested against the models' own templates. encode() guarantees:

    ids and owners are made together, so that ids and loss mask cannot drift apart;
    what a user writes is never a control token, whatever it spells;
    what encode(reply=True) returns is a prefix of the same conversation with the reply;
    BOS stands once, in front (Llama 2: before every user turn; Zephyr and most of ChatML: nowhere).

Left out: tool calls, Jinja. Two departures from templates, because an adapter must mean the same on
every day and in every turn: where one asks for today's date (Llama 3.2) its fallback date stands,
and where one moves the system text to the last user turn (Mistral v3) it stays in the first.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from checkpoint import read_settings, read_tokenizer

ROLES = ("system", "user", "assistant")

# ---------------------------------------------------------------------------------------- formats


class Turn(NamedTuple):
    """How a message stands in a conversation."""

    header: str  # before it, nobody's words; ROLE is the role
    written: str  # what its author writes, end of turn included; {} is the content
    footer: str = ""  # behind it, nobody's words


@dataclass(frozen=True)
class Format:
    """A chat format. Control tokens of the vocabulary become one id wherever its strings name them,
    <bos> and <eos> stand for the two that every checkpoint names itself; the rest is text."""

    name: str
    marks: str  # what names it in a template (in the vocabulary, if there is no template)
    turns: dict[str, Turn]  # if "system" is not there, that text goes into the first user turn
    begin: str = ""
    trimmed: tuple[str, ...] = ()  # roles whose content loses the white space around it
    system: str | None = None  # the system text of a conversation without one
    preamble: str = ""  # opens every system text
    fold: tuple[str, str] = ("", "\n\n")  # around a system text in the first user turn


FORMATS = (
    Format("llama-3", "<|start_header_id|>", begin="<bos>", trimmed=ROLES, turns=dict.fromkeys(
        ROLES, Turn("<|start_header_id|>ROLE<|end_header_id|>\n\n", "{}<|eot_id|>"))),
    Format("chatml", "<|im_start|>", turns=dict.fromkeys(
        ROLES, Turn("<|im_start|>ROLE\n", "{}<|im_end|>", "\n"))),
    Format("zephyr", "<|user|> <|assistant|> eos_token", turns=dict.fromkeys(
        ROLES, Turn("<|ROLE|>\n", "{}<eos>", "\n"))),
    Format("llama-2", "[INST] <<SYS>>", trimmed=("user", "assistant"),
        turns={"user": Turn("<bos>[INST] ", "{}", " [/INST]"), "assistant": Turn("", " {} <eos>")},
        fold=("<<SYS>>\n", "\n<</SYS>>\n\n")),
    Format("mistral", "[INST]", begin="<bos>",
        turns={"user": Turn("[INST] ", "{}", "[/INST]"), "assistant": Turn("", " {}<eos>")}),
)  # fmt: skip
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def variant(style: Format, template: str) -> Format:
    """A format as one release writes it, read off that release's template."""
    if style.name == "llama-3" and "Cutting Knowledge Date" in template:
        # from 3.1 on there always is a system turn, and it opens with two dates
        return replace(style, system="", preamble=DATES)
    if style.name == "chatml":  # some spell out a default system text
        system = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]*)<\|im_end\|>", template)
        begin = "<bos>" if "bos_token" in template else ""
        return replace(style, begin=begin, system=system and system[1])
    if style.name != "mistral" or not template:
        return style
    # Mistral's releases differ in white space
    header = re.search(r"""['"]( ?\[INST\] ?)['"]""", template)
    footer = re.search(r"""['"]( ?\[/INST\])['"]""", template)
    reply = re.search(r"""(['"] ['"] \+ )?message\[.content.\](\|trim)? \+ eos_token""", template)
    user = Turn(header[1] if header else "[INST] ", "{}", footer[1] if footer else "[/INST]")
    assistant = Turn("", "{}<eos>" if reply and not reply[1] else " {}<eos>")
    trimmed = ("assistant",) if reply and reply[2] else ()
    return replace(style, turns={"user": user, "assistant": assistant}, trimmed=trimmed)


# ------------------------------------------------------------------------------------------- chat

CUT = None  # between two texts that are tokenised apart
Piece = tuple[str | int | None, int]  # a text, control token or CUT, and its owner


class Chat:
    """Tokenizer and chat format of a checkpoint.

    tokenizer  a tokenizers.Tokenizer, to which the names of control tokens are text like any other
    control    name -> id of the control tokens
    format     name of the chat format; style is the format itself
    bos        id of the begin-of-text token, None in a format without one
    stops      ids that end a reply
    context    how many tokens the model can read
    """

    def __init__(self, folder: str | Path, context: int):
        folder = Path(folder)
        settings = read_settings(folder)
        self.context = context
        self.tokenizer, self.control, self.space_rule = read_tokenizer(folder, settings)
        self.names = re.compile(f"({'|'.join(map(re.escape, self.control))})")
        self.style = recognise(settings["chat_template"], self.control, folder)
        self.format = self.style.name
        opening = self.style.begin + self.style.turns["user"].header
        self.bos = self.control["<bos>"] if "<bos>" in opening else None
        written = self.split(self.style.turns["assistant"].written, -1)
        eos = settings.get("eos_token_id") or []
        eos = set(eos if isinstance(eos, list) else [eos])
        self.stops = eos | {what for what, _ in written if isinstance(what, int)}

    def encode(self, messages: list[dict], reply: bool = False) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation and the owner of each: the index of its message, or -1.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...]. A message owns
        its content and its end of turn; headers belong to nobody, and never carry loss.

            messages                0 user "How many?"              1 assistant "7"
            ids         BOS  header  How  many   ?   EOT    header    7   EOT
            owner        -1    -1     0     0    0    0       -1      1    1
            reply=True: the first message alone ends here, ------^ where the assistant writes

        Raises: ValueError for roles, or an order of roles, that the format does not know.
        """
        check_roles([message["role"] for message in messages], "system" in self.style.turns)
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
        style = self.style
        turns = list(enumerate(messages))
        opening = [(style.preamble, -1)]  # of the first turn's content
        has_system = messages[0]["role"] == "system"
        if has_system and "system" not in style.turns:
            _, system = turns.pop(0)
            opening = [(style.fold[0], -1), (system["content"], 0), (style.fold[1], -1)]
        elif not has_system and style.system is not None:
            turns.insert(0, (-1, {"role": "system", "content": style.system}))
        yield from self.split(style.begin, -1)
        for index, message in turns:
            role = message["role"]
            content = message["content"]
            header, written, footer = style.turns[role]
            start, end = written.split("{}")
            if role in style.trimmed:
                # templates strip a turn as a whole, where a folded system text shields the left
                content = content.rstrip() if len(opening) > 1 else content.strip()
            yield from self.split(header.replace("ROLE", role), -1)
            if role == "assistant":
                yield CUT, -1  # as at generation, where the header is given and the reply is not
            yield from self.split(start, index)
            yield from (*opening, (content, index))
            yield from self.split(end, index)
            yield from self.split(footer, -1)
            opening = []
        if reply:
            header = style.turns["assistant"].header.replace("ROLE", "assistant")
            yield from self.split(header, -1)

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


# ------------------------------------------------------------------------------------------ checks


def recognise(template: str, control: dict[str, int], folder: Path) -> Format:
    """The format of a template, or of a vocabulary if there is no template.

    Raises: ValueError for a format that is not known, or whose control tokens are not there.
    """
    text = template or " ".join(control)
    known = [style for style in FORMATS if all(mark in text for mark in style.marks.split())]
    if not known:
        names = ", ".join(style.name for style in FORMATS)
        raise ValueError(f"{folder}: the chat format is none of those known: {names}")
    style = variant(known[0], template)
    strings = style.begin + "".join("".join(turn) for turn in style.turns.values())
    for name in re.findall(r"<bos>|<eos>|<\|\w+\|>", strings.replace("<|ROLE|>", "")):
        if name not in control:
            raise ValueError(f"{folder}: the tokenizer lacks {name}, which {style.name} chats need")
    return style


def check_roles(roles: list[str], any_order: bool) -> None:
    """Raise ValueError unless there are roles, all known, and alternating where it matters."""
    if not roles or set(roles) - set(ROLES):
        known = ", ".join(ROLES)
        raise ValueError(f"roles {roles}: at least one is needed, and only {known} exist")
    turns = roles[roles[0] == "system" :]
    alternating = (["user", "assistant"] * len(roles))[: len(turns)]
    if not any_order and (not turns or turns != alternating):
        raise ValueError(f"roles {roles}: this format needs [system] user assistant user ...")
