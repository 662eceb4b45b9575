"""Synthesis: everything a model writes before training, from the prompt p alone (GenPI section 3).

    pseudo inputs x      a generator is shown p and five demonstrations and goes on with the list
    conversations        the model plays the agent, who has read p, and the environment, who sees
                         the worked examples of p with the roles swapped, until it says [END]
    student outputs yS   the same model answers x without p
    reasons r            the generator explains why yS should become the first teacher output yT

The sampler beneath keeps R slots of a KV cache busy (R rows in flight, V vocabulary, P tokens that
all conversations share): the P tokens, nearly always the long prompt, are computed once and stand
once in memory; a conversation that has finished gives its slot to the next one waiting. A row's
randomness is its own, so that what it says does not depend on its neighbours (on a GPU up to the
rounding of a matmul, which changes with the number of rows). The generator may also be a Server,
any that speaks OpenAI's chat completions.

Leaves out: beam search, repetition penalties, speculative decoding, keeping the cache from turn to
turn.
"""

import http.client
import json
import os
import queue
import random
import re
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from model import Chat, KVCache, Llama, prefill

ASSISTANT = "You are a helpful assistant."
END = "[END]"
OPENING = "Start a new conversation."
FRUITLESS_ROUNDS = 5  # rounds without a new pseudo input after which we go on with what there is
LIST_ITEMS = 10  # pseudo inputs asked for in one list
BURST = {"cpu": 1, "cuda": 16}  # tokens a row between two looks at what the device has written
STRIDE = 256  # of the keys in sight of a captured step
PREFILL_TOKENS = 8192  # prompt tokens computed in one forward pass; bounds the activations
PREFILL_SCORES = 1 << 24  # and what they attend to, tokens x keys; bounds the attention scores

# ------------------------------------------------------------------------------------ templates

ENVIRONMENT = """You play {environment} in a conversation with an agent. When you are told to \
start a new conversation, give the agent a problem. Answer each later message of the agent \
exactly as {environment} would, in the form that you used before, and add nothing of your own. \
As soon as the agent has given its final answer, write only {end}"""

INSTRUCTIONS = """

The agent works by these instructions:

---
{prompt}
---"""

INPUTS = """Between the lines of dashes stands a prompt that is given to an agent.

---
{prompt}
---

Write first messages that users of this agent could send to it, all about different things. Write \
them as a numbered list with one message an item.

{demos}

Continue this list with {n} new items."""

REASON = """Between the lines of dashes stands a prompt.

---
{prompt}
---

An assistant that has not read the prompt was asked:

{x}

It replied:

{student}

An assistant that has read the prompt replied:

{teacher}

Explain in about five sentences why the prompt turns the first reply into the second."""

# --------------------------------------------------------------------------------------- prompt


@dataclass(frozen=True)
class Prompt:
    """The prompt p: its text, the closed chat turns in it, and the open user turn that x completes.

    A plain text (no <USER>: and <AGENT>: lines) has no turns and no opening: it is a system
    message.
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
        """The last user turn of p with x at {user_input}, or after the text if there is no such
        mark.
        """
        if self.opening is None:
            return x
        if "{user_input}" in self.opening:
            return self.opening.replace("{user_input}", x)
        return f"{self.opening}\n\n{x}".strip()


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


MARKER = re.compile(r"^<(USER|AGENT)>:[ \t]*\n?", re.MULTILINE)


def parse_prompt(text: str, name: str = "prompt") -> Prompt:
    """Read the text of a prompt file. Raises ValueError where <USER>: and <AGENT>: do not
    alternate.
    """
    text = text.strip()
    before, *pieces = MARKER.split(text)
    if not pieces:
        return Prompt(text)
    roles, texts = pieces[::2], [piece.strip() for piece in pieces[1::2]]
    if before.strip():
        raise ValueError(f"{name}: text before the first <USER>: line; begin the file with <USER>:")
    for i, role in enumerate(roles):
        if role != ("USER", "AGENT")[i % 2]:
            raise ValueError(
                f"{name}: turn {i + 1} is <{role}>:; <USER>: and <AGENT>: must alternate"
            )
    if roles[-1] != "USER":
        raise ValueError(
            f"{name}: the last turn is <AGENT>:; end with an open <USER>: turn for the input"
        )
    names = {"USER": "user", "AGENT": "assistant"}
    turns = tuple((names[role], text) for role, text in zip(roles, texts, strict=True))
    return Prompt(text, turns[:-1], texts[-1])


# ---------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """What we know of a kind of prompt beyond its text.

    environment: whom the model plays; max_turns: agent turns of a conversation (GenPI section 4);
    demos: first messages that show the generator what is wanted; action: agent text -> its parsed
    action or None; final: whether a parsed action ends the conversation.
    """

    name: str
    environment: str
    max_turns: int
    demos: tuple[str, ...] = ()
    action: Callable[[str], tuple | None] = field(default=lambda text: (text.strip(),))
    final: Callable[[tuple], bool] = field(default=lambda action: False)
    parsed: bool = True  # False: any text is an action, so "no final action" has no meaning

    def is_final(self, text: str) -> bool:
        action = self.action(text)
        return action is not None and self.final(action)


def os_action(text: str) -> tuple | None:
    """The last valid Act: of an agent turn: (bash, code), (finish,) or (answer, value).

    Source: AgentBench, OS interaction.
    """
    for act in reversed(re.findall(r"Act:\s*(.+)", text)):
        blocks = re.findall(r"```bash\s*\n(.*?)```", text, re.DOTALL)
        if act.lower().startswith("bash") and blocks:
            return ("bash", "\n\n".join(block.strip() for block in blocks))
        if act.lower().startswith("finish"):
            return ("finish",)
        value = re.match(r"answer[^(]*\((.*)\)", act, re.IGNORECASE)
        if value:
            return ("answer", value[1].strip())
    return None


def os_final(action: tuple) -> bool:
    return action[0] in ("finish", "answer")


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


def shopping_final(action: tuple) -> bool:
    return action == ("click", "buy now")


OS_DEMOS = (
    "How many files are in the directory /srv/photos?",
    "Rename /home/ana/notes.txt to plan.txt.",
    "Who owns the newest file in /data/orders?",
    "Append the line winter to /home/leo/garden/books.md.",
    "Tell me the size of /opt/games in megabytes.",
)
SHOPPING_DEMOS = (
    "I need a pair of waterproof hiking boots in size 9, and price lower than 90.00 dollars",
    "find me a sugar free dark chocolate bar, pack of 12, and price lower than 30.00 dollars",
    "I want a wireless keyboard with a quiet touch, black, and price lower than 50.00 dollars",
    "look for a queen size cotton bed sheet, machine washable, and price lower than 60.00 dollars",
    "I am looking for a fragrance free hand cream for dry skin, and price lower than 20.00 dollars",
)
TASKS = {
    task.name: task
    for task in (
        Task("os", "the shell of a Linux machine", 10, OS_DEMOS, os_action, os_final),
        # no demos: a first message is a whole page, and the worked examples show three of them
        Task("web_browsing", "a browser that shows pages as HTML", 2, (), browsing_action, bool),
        Task("web_shopping", "a shop that shows its pages as text", 5, SHOPPING_DEMOS,
             shopping_action, shopping_final),
        Task("any", "the user of this conversation", 1, parsed=False),
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------ questions


def student_messages(x: str) -> list[dict]:
    """The messages that the student reads: x without p."""
    return [message("system", ASSISTANT), message("user", x)]


def conversation(opening: list[dict], turns: list[str]) -> list[dict]:
    """opening, which ends with the user, continued by agent and environment texts in turn."""
    return opening + [message(("assistant", "user")[i % 2], text) for i, text in enumerate(turns)]


def environment_messages(
    prompt: Prompt, x: str, turns: list[str], environment: str, is_final=lambda text: False
) -> list[dict]:
    """The conversation as the environment sees it: roles swapped, [END] after each worked example.

    turns: agent and environment texts in turn so far, the last one the agent's. Source: GenPI 3.2.
    """
    system = ENVIRONMENT.format(environment=environment, end=END)
    if prompt.opening is None:
        system += INSTRUCTIONS.format(prompt=prompt.text)
    chat = [message("system", system), message("user", OPENING)]
    swapped = {"user": "assistant", "assistant": "user"}
    for i, (role, text) in enumerate(prompt.turns):
        chat.append(message(swapped[role], text))
        if role == "assistant" and (i + 1 == len(prompt.turns) or is_final(text)):
            chat += [message("assistant", END), message("user", OPENING)]
    chat.append(message("assistant", prompt.open_turn(x)))
    return chat + [message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]


def inputs_messages(prompt: Prompt, demos: list[str], n: int) -> list[dict]:
    """The generator's question for n more pseudo inputs after the numbered demos. Source: GenPI
    3.1.
    """
    listed = "\n".join(f"{i + 1}. {demo}" for i, demo in enumerate(demos))
    text = INPUTS.format(prompt=prompt.text, demos=listed, n=n)
    return [message("system", ASSISTANT), message("user", text)]


def reason_messages(prompt: Prompt, x: str, student: str, teacher: str) -> list[dict]:
    """The generator's question for the reason r. Source: GenPI 3.1."""
    text = REASON.format(prompt=prompt.text, x=x, student=student, teacher=teacher)
    return [message("system", ASSISTANT), message("user", text)]


# -------------------------------------------------------------------------------------- sampler


def generate(
    model: Llama,
    chat: Chat,
    conversations: list[list[dict]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | list[int] = 0,
    slots: int | None = None,
    bar: tqdm | None = None,
) -> list[str]:
    """Write the assistant's next turn of every conversation.

    temperature 0 is greedy. seed: row i draws from seed + i, or from seed[i]. slots: rows in flight
    (None: 64 on a CPU, what fits the free memory on a GPU). bar: advanced by one a finished row.
    Raises ValueError if a conversation leaves no room in the model's context.
    """
    texts = [""] * len(conversations)
    for row, ids, _ in sample(
        model, chat, conversations, max_new_tokens, temperature, top_p, seed, slots
    ):
        texts[row] = chat.decode(ids).strip()
        if bar is not None:
            bar.update(1)
    return texts


@torch.no_grad()
def sample(
    model: Llama,
    chat: Chat,
    conversations,
    max_new_tokens,
    temperature=0.0,
    top_p=1.0,
    seed=0,
    slots=None,
) -> Iterator[tuple[int, list[int], bool]]:
    """Yield (row, its written ids, whether it stopped by itself) as rows finish; see generate.

    Raises: ValueError as generate does, and when the model's logits are not finite.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}: "
            "at least 1, at least 0, and above 0 up to 1 are possible"
        )
    prompts = [chat.encode(messages, reply=True)[0] for messages in conversations]
    rooms = [min(max_new_tokens, chat.context - len(ids)) for ids in prompts]
    if min(rooms, default=1) < 1:
        longest = max(map(len, prompts))
        raise ValueError(
            f"a conversation of {longest} tokens leaves no room in the model's context of "
            f"{chat.context}; shorten the prompt or lower --max-turns"
        )
    seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else seed
    draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
    choose = partial(pick, temperature=temperature, top_p=top_p)
    waiting = deque(range(len(prompts)))
    batch = Batch(model, prompts, rooms, draws, chat.stops, choose, slots) if prompts else None
    while waiting or (batch and batch.busy()):
        freed = batch.free()
        # to read a prompt all rows stop, so that is done for a quarter of the slots at a time
        if waiting and (len(freed) * 4 >= batch.slots or not batch.busy()):
            batch.start([waiting.popleft() for _ in freed[: len(waiting)]], freed)
        else:
            batch.advance()
        yield from batch.collect()
        if not waiting:
            batch.shrink()


def pick(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Choose a token of each row: logits (R, V), u (R,) uniform in [0, 1) -> ids (R,).

    The nucleus is the smallest set of most probable tokens (after temperature) whose mass reaches
    top_p; u picks from it by the inverse of its cumulative distribution. Source: Holtzman et al.
    2020, Eq. 2.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (R, V)
    p = p * (p.cumsum(-1) - p < top_p)  # the mass before a token decides, so the first always stays
    mass = p.cumsum(-1)
    place = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    last = (p > 0).sum(-1, keepdim=True) - 1  # -1 where the logits are not numbers
    place = place.minimum(last).clamp(min=0)
    return order.gather(1, place)[:, 0]


def shared_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with, leaving each one of its own; 0 if not worth it."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in lexical order only these two can differ earliest
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    same = min(same, min(map(len, prompts)) - 1)
    return same if same >= 16 else 0


class Batch:
    """The conversations in flight, each in a slot of the cache (R slots, N new tokens at most).

    What choosing a token needs lies on the device, so that a GPU is not asked after every token:

        last, live, count, room   (R,) the token to feed, 1 while the row goes on, tokens written
                                  and allowed
        written, draws            (R, N + 1) the tokens, and for each a uniform number to pick it by

    On the host: seat[slot] is the row that sits there, or None.
    """

    STATE = ("last", "live", "count", "room", "written", "draws")

    def __init__(self, model: Llama, prompts, rooms, draws, stops, choose, slots=None):
        self.model, self.prompts, self.rooms, self.choose = model, prompts, rooms, choose
        embedding = model.model.embed_tokens.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self.burst = BURST[self.device.type]
        self.P = shared_prefix(prompts)
        self.prefix = prefill(model, prompts[0][: self.P]) if self.P else None
        self.own = [ids[self.P :] for ids in prompts]
        length = max(len(ids) + room for ids, room in zip(self.own, rooms, strict=True))
        self.slots = min(slots or self.affordable(length), len(prompts))
        self.cache = self.new_cache(self.slots, length)
        self.seat: list[int | None] = [None] * self.slots
        self.row_draws, self.stops = draws, torch.tensor(sorted(stops), device=self.device)
        for name in self.STATE[:4]:
            setattr(self, name, torch.zeros(self.slots, dtype=torch.int64, device=self.device))
        width = max(rooms) + 1  # the last place takes what a row says after its end
        self.written = torch.zeros(self.slots, width, dtype=torch.int64, device=self.device)
        self.draws = torch.zeros(self.slots, width, device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.every = torch.arange(self.slots, device=self.device)
        self.graphs: dict[int, Callable] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def new_cache(self, batch: int, length: int) -> KVCache:
        return KVCache(self.model.config, batch, length, self.device, self.dtype, self.prefix)

    def affordable(self, length: int) -> int:
        """Slots whose keys and values fit half of the free GPU memory; 64 on a CPU."""
        if self.device.type != "cuda":
            return 64
        c, size = self.model.config, self.dtype.itemsize
        row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * length * size
        reserved = torch.cuda.memory_reserved(self.device)  # by PyTorch, in part for nothing now
        unused = reserved - torch.cuda.memory_allocated(self.device)
        return max(1, min(256, (torch.cuda.mem_get_info(self.device)[0] + unused) // 2 // row))

    def busy(self) -> list[int]:
        """Slots with a row in flight."""
        return [slot for slot, row in enumerate(self.seat) if row is not None]

    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.seat) if row is None]

    def start(self, rows: list[int], slots: list[int]) -> None:
        """Seat new rows, read their own prompts, and take their first tokens."""
        longest = max(len(self.own[row]) for row in rows)
        scores = longest * (self.P + longest)  # of a row and head
        group = max(1, min(PREFILL_TOKENS // longest, PREFILL_SCORES // scores))
        for at in range(0, len(rows), group):
            some = rows[at : at + group]
            seats = slots[at : at + len(some)]
            logits, fresh = self.read([self.own[row] for row in some])
            self.cache.put(seats, fresh)
            index = torch.tensor(seats, device=self.device)
            self.live[index], self.count[index] = 1, 0
            self.room[index] = torch.tensor([self.rooms[row] for row in some], device=self.device)
            draws = torch.stack([self.row_draws[row] for row in some]).to(self.device)
            self.draws[index, : self.draws.size(1) - 1] = draws[:, : self.draws.size(1) - 1]
            for slot, row in zip(seats, some, strict=True):
                self.seat[slot] = row
            self.take(logits, index)

    def read(self, prompts: list[list[int]]) -> tuple[torch.Tensor, KVCache]:
        """Read prompts in one pass -> logits (n, V) after the last token of each, their cache."""
        counts = [len(ids) for ids in prompts]
        padded = [ids + [0] * (max(counts) - len(ids)) for ids in prompts]
        ends = torch.tensor(counts, device=self.device)[:, None] - 1
        fresh = self.new_cache(len(prompts), max(counts))
        at = torch.arange(max(counts), device=self.device) == ends
        logits = self.model(torch.tensor(padded, device=self.device), fresh, at=at)
        fresh.advance(counts)
        return logits, fresh

    def take(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Choose and note the next token of these slots, logits (n, V); end those that it ends."""
        count = self.count[slots]
        token = self.choose(logits, self.draws[slots, count])
        more = self.live[slots].bool() & (token[:, None] != self.stops).all(-1)
        self.written[slots, count] = self.last[slots] = token
        self.count[slots] = count + more
        self.live[slots] = (more & (count + 1 < self.room[slots])).long()
        self.finite &= logits.amax(-1).isfinite().all()

    def step(self) -> None:
        """Feed the last token of every slot and take the next. Nothing here waits for the device.

        A slot without a live row computes along, but what it writes is never read.
        """
        logits = self.model(self.last[:, None], self.cache)[:, -1]
        self.cache.lengths += self.live
        self.take(logits, self.every)

    def advance(self) -> None:
        """Write `burst` tokens in every slot, on a GPU as replays of a captured CUDA graph.

        A graph has fixed shapes, so there the keys in sight grow in strides, with a graph for each.
        The first step of a stride runs as it is, since what it compiles cannot be captured.
        """
        n, length = self.burst, self.cache.k.size(3)
        sight = self.longest + n if n == 1 else -(-(self.longest + n) // STRIDE) * STRIDE
        self.cache.bound = min(sight, length) - 1
        for _ in range(n):
            self.graphs.get(sight, self.step)()
            if n > 1 and sight not in self.graphs:
                self.graphs[sight] = capture(self.step, self.pool)

    def collect(self) -> list[tuple[int, list[int], bool]]:
        """Rows that have ended: (row, its ids, whether by itself). Their slots are free again.

        Raises: ValueError if the model's logits were not finite.
        """
        live, count = torch.stack((self.live, self.count)).tolist()  # here we wait for the device
        if not self.finite:
            raise ValueError("the model's logits are not finite; is the checkpoint damaged?")
        ended = [slot for slot in self.busy() if not live[slot]]
        found = []
        for slot, ids in zip(ended, self.written[ended].tolist(), strict=True):
            row, self.seat[slot] = self.seat[slot], None
            found.append((row, ids[: count[slot]], count[slot] < self.rooms[row]))
        lengths = [len(self.own[self.seat[slot]]) + count[slot] - 1 for slot in self.busy()]
        self.longest = max(lengths, default=0)  # tokens of a row in the cache
        return found

    def shrink(self) -> None:
        """Drop empty slots once they are the majority; only when no row is waiting for them."""
        used = self.busy()
        if used and 2 * len(used) <= self.slots:
            self.cache.keep(used)
            for name in self.STATE:
                setattr(self, name, getattr(self, name)[used])
            self.seat, self.slots = [self.seat[slot] for slot in used], len(used)
            self.every, self.graphs = self.every[: self.slots], {}


def capture(step: Callable, pool) -> Callable:
    """A step as one CUDA graph, launched at once instead of kernel by kernel.

    The graphs of a batch share a pool of memory: what a step allocates does not outlive it. On a
    CPU, where there is no pool, the step itself.
    """
    if pool is None:
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


@torch.no_grad()
def stream(model: Llama, chat: Chat, messages: list[dict], max_new_tokens: int) -> Iterator[str]:
    """Yield the greedy reply to one conversation piece by piece. Raises ValueError as generate."""
    ids = chat.encode(messages, reply=True)[0]
    room = min(max_new_tokens, chat.context - len(ids))
    if room < 1:
        raise ValueError(
            f"the conversation of {len(ids)} tokens fills the model's context of {chat.context}"
        )
    choose = partial(pick, temperature=0.0, top_p=1.0)
    batch, said = Batch(model, [ids], [room], [torch.zeros(room)], chat.stops, choose), ""
    batch.start([0], [0])
    while True:
        ended = batch.collect()
        text = chat.decode(ended[0][1] if ended else batch.written[0, : batch.count[0]].tolist())
        if not text.endswith("\ufffd"):  # half of a multi-byte character: wait for the rest
            yield text[len(said) :]
            said = text
        if ended:
            return
        batch.advance()


# --------------------------------------------------------------------------------------- server

TRIES = 7  # of one request; the waits between them add up to about a minute
FIRST_WAIT = 1.0  # seconds before the second try, doubled before each further one
LONGEST_WAIT = 60.0  # seconds that a server can ask for on top (Retry-After)
LONGEST_ANSWER = 2**23  # bytes
TRY_AGAIN = {408, 409, 425, 429, *range(500, 600)}  # HTTP statuses that may pass
TOO_LONG = re.compile(r"context[ _](length|limit|size|window)", re.IGNORECASE)  # how servers say it
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
CURES = {
    401: "set OPENAI_API_KEY to a key that this server knows",
    403: "OPENAI_API_KEY may not use this model; take another key or --generator-model",
    404: "check that --generator ends as the server's URL does (/v1), and --generator-model",
}


class TooLong(ValueError):
    """A question does not fit the context of the server's model."""


class Untouched(urllib.request.HTTPErrorProcessor):
    """Hands over every answer as it came: no redirect is followed, so none carries the key on."""

    def http_response(self, request, response):
        return response

    https_response = http_response


@dataclass(frozen=True)
class Server:
    """A model behind an OpenAI-compatible server; it speaks as a Voice does.

    url: up to /v1; concurrency: requests in flight; timeout: seconds that one may take; key: goes
    into a header and nowhere else. With the same seed a server that batches need not say the same.
    """

    url: str
    model: str = ""
    max_new_tokens: int = 512
    concurrency: int = 16
    timeout: float = 300.0
    key: str = field(default="", repr=False)
    opener: urllib.request.OpenerDirector = field(
        default_factory=lambda: urllib.request.build_opener(Untouched), repr=False
    )

    def fits(self, messages: list[dict]) -> bool:
        """True: only the server knows its context, and says so when asked; see speak."""
        return True

    def speak(
        self, conversations, *, max_new_tokens: int, temperature: float, top_p: float, seeds
    ) -> Iterator[tuple[int, str | None, bool]]:
        """Yield (row, text, whether it stopped by itself) as answers come.

        text None: too long for the server's context. Raises ValueError at the first failure.
        """
        limits = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        gate, stop = threading.Semaphore(self.concurrency), threading.Event()
        answers = queue.SimpleQueue()

        def work(row: int) -> None:
            body = {"model": self.model, "messages": conversations[row], **limits}
            body["seed"] = seeds[row]
            with gate:
                try:
                    answers.put((row, *self.ask("chat/completions", completion, body, stop=stop)))
                except TooLong:
                    answers.put((row, None, False))
                except Exception as error:  # whatever it is, the main thread raises it
                    answers.put(error)

        for row in range(len(conversations)):
            # a daemon: neither Ctrl-C nor the end of the program waits for what is in flight
            threading.Thread(target=work, args=(row,), daemon=True).start()
        try:
            for _ in conversations:
                answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            stop.set()

    def ask(self, path: str, read, body: dict | None = None, tries: int = TRIES, stop=None):
        """read() of the answer to one request, which is tried again where that may help.

        Raises TooLong, or ValueError with what went wrong and the cure.
        """
        stop, why, wait = stop or threading.Event(), "stopped", 0.0
        for number in range(tries):
            if stop.wait(wait):
                break
            wait = FIRST_WAIT * 2**number * random.uniform(0.5, 1)  # rows must not come in step
            # another try is another draw: the same one might be as empty again
            sent = body and body | {"seed": (body["seed"] + number) % 2**31}
            try:
                status, headers, content = self.exchange(path, sent)
            except (OSError, http.client.HTTPException) as error:
                why = f"no answer: {self.line(repr(getattr(error, 'reason', error)))}"
                if "timed out" in why:
                    why = f"no answer within --timeout {self.timeout:g} s"
                continue
            why = f"HTTP {status} {self.line(content.decode(errors='replace'))}"
            if status == 200:
                try:
                    return read(content)
                except UNREADABLE:
                    why += ", without a text (a model that thinks must be served not to)"
            elif status not in TRY_AGAIN:
                raise self.refusal(path, status, why, headers.get("Location", ""))
            asked = headers.get("Retry-After", "")  # we follow a number, not a date
            wait += min(LONGEST_WAIT, float(asked)) if re.fullmatch(r"\d+(\.\d+)?", asked) else 0
        told = f"{self.url}/{path}: {why} ({tries} tries)"
        raise ValueError(f"{told}; see to the server, and the same command goes on from here")

    def exchange(self, path: str, body: dict | None):
        """One request -> (status, headers, bytes of the answer)."""
        headers = {"Content-Type": "application/json", "User-Agent": "genpi"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = body and json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        content, deadline = b"", time.monotonic() + self.timeout
        with self.opener.open(request, timeout=self.timeout) as response:
            while piece := response.read1(2**16):
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
                if len(content) > LONGEST_ANSWER:
                    raise http.client.HTTPException(f"it has more than {LONGEST_ANSWER} bytes")
            return response.status, response.headers, content

    def refusal(self, path: str, status: int, told: str, location: str) -> ValueError:
        """The error for an answer that another try would not change."""
        cure = CURES.get(status, "the server does not take what genpi.py sends; see its log")
        if 300 <= status < 400:
            place = self.line(re.sub("//[^/]*@", "//", location).partition("?")[0])
            cure = f"it points to {place}; if you trust that, give it to --generator"
        error = TooLong if TOO_LONG.search(told) else ValueError
        return error(f"{self.url}/{path}: {told}; {cure}")

    def line(self, text: str) -> str:
        """A server's words on one short line, without the key."""
        text = text.replace(self.key, "[key]") if self.key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split())


def completion(content: bytes) -> tuple[str, bool]:
    """(text, whether it stopped by itself) of a chat completion; ValueError if there is no text.

    What a model thinks first is not its text, be it in a field of its own or before </think>.
    """
    choice = json.loads(content)["choices"][0]
    text = (choice["message"]["content"] or "").rpartition("</think>")[2].strip()
    if not text or text.startswith("<think>"):
        raise ValueError(text)
    # half a surrogate pair cannot be written down
    return text.encode(errors="replace").decode(), choice.get("finish_reason") == "stop"


# --------------------------------------------------------------------------------------- stages


@dataclass
class Record:
    """One pseudo input and all that was made of it: a line of data.jsonl.

    turns: agent and environment texts in turn; the first and the last are the agent's. The four
    flags are the rows of GenPI Table 4; overlong: the conversation stopped because it filled the
    model's context.
    """

    index: int
    pseudo_input: str
    turns: list[str] = field(default_factory=list)
    student: str = ""
    reason: str = ""
    hit_limit: bool = False
    no_end_token: bool = False
    no_final_action: bool = False
    overlong: bool = False
    seconds: float = 0.0

    def is_whole(self) -> bool:
        """False for what this program never wrote."""
        texts = [self.pseudo_input, self.student, self.reason, *self.turns]
        return isinstance(self.index, int) and all(isinstance(text, str) for text in texts)

    @property
    def teacher(self) -> str:
        """yT_0, the teacher's first output."""
        return self.turns[0]


@dataclass(frozen=True)
class Voice:
    """A model that speaks, with the limits of what it says."""

    model: Llama
    chat: Chat
    max_new_tokens: int = 512
    slots: int | None = None

    def say(self, conversations, bar=None, **sampling) -> list[str]:
        limit = sampling.pop("max_new_tokens", self.max_new_tokens)
        return generate(
            self.model, self.chat, conversations, limit, slots=self.slots, bar=bar, **sampling
        )

    def speak(
        self, conversations, *, max_new_tokens: int, temperature: float, top_p: float, seeds
    ) -> Iterator[tuple[int, str, bool]]:
        """Yield (row, text, whether it stopped by itself) as rows finish; row i draws seeds[i]."""
        limits = max_new_tokens, temperature, top_p, seeds, self.slots
        for row, ids, whole in sample(self.model, self.chat, conversations, *limits):
            yield row, self.chat.decode(ids).strip(), whole

    def fits(self, messages: list[dict]) -> bool:
        """True if a full turn still fits the context after these messages."""
        return (
            len(self.chat.encode(messages, reply=True)[0]) + self.max_new_tokens
            <= self.chat.context
        )


def bar(what: str, total: int, unit: str) -> tqdm:
    """A progress bar with rate and remaining time."""
    return tqdm(desc=f"{what:<18}", total=total, unit=unit, dynamic_ncols=True)


def parse_list(text: str, first: int) -> list[str]:
    """The items of a numbered list that begins at `first` (or at 1); an item may have several
    lines.

    Only the number that is due starts an item, so that numbers inside an item stay part of it.
    """
    items: list[list[str]] = []
    due = None
    for line in text.splitlines():
        found = re.match(r"\s*(?:\*\*)?(\d+)[.)](?:\*\*)?\s+(.*)", line)
        if found and int(found[1]) in ((first, 1) if due is None else (due,)):
            items.append([found[2]])
            due = int(found[1]) + 1
        elif items:
            items[-1].append(line.strip())
    texts = ["\n".join(lines).strip() for lines in items]
    quoted = re.compile(r'"([^"]*)"|“([^”]*)”')
    unquoted = [(m[1] or m[2] or "") if (m := quoted.fullmatch(text)) else text for text in texts]
    return [text.strip() for text in unquoted if text.strip()]


def normalised(text: str) -> str:
    """What two pseudo inputs must differ in to count as two."""
    return " ".join(text.lower().split())


def more_inputs(
    generator: Voice | Server, prompt: Prompt, demos: tuple, known: list[str], n: int, seed: int
) -> list[str]:
    """One round: sample lists (temperature 1.0, nucleus 0.9) that hold about n new pseudo inputs.

    With no demonstrations given, five of the inputs found so far serve.
    """
    rng = random.Random(seed)
    lists = max(1, min(32, -(-n // LIST_ITEMS)))
    asked, firsts = [], []
    for _ in range(lists):
        shown = list(demos) or rng.sample(known, min(5, len(known)))
        asked.append(inputs_messages(prompt, shown, LIST_ITEMS))
        firsts.append(len(shown) + 1)
    sampling = {"max_new_tokens": LIST_ITEMS * 64, "temperature": 1.0, "top_p": 0.9}
    seeds, found = [rng.getrandbits(40) for _ in asked], []
    for row, text, whole in sorted(generator.speak(asked, **sampling, seeds=seeds)):
        if text is None:
            raise ValueError(
                "the prompt does not fit the context of the generator's server; "
                "serve it with a longer one, and the same command goes on from here"
            )
        items = parse_list(text, firsts[row])
        found += items if whole else items[:-1]  # a list cut at the limit ends in half an item
    return found


def pseudo_inputs(
    generator: Voice | Server, prompt: Prompt, demos: tuple, n: int, seed: int, state: dict, save
) -> list[str]:
    """n distinct pseudo inputs, or fewer after FRUITLESS_ROUNDS rounds that brought nothing new.

    state {"rounds", "fruitless", "seconds", "inputs"}: where to go on; save(state) is called after
    a round.
    """
    inputs, seen = state["inputs"], {normalised(x) for x in (*state["inputs"], *demos)}
    with bar("pseudo inputs", n, "input") as progress:
        progress.update(min(len(inputs), n))
        while len(inputs) < n and state["fruitless"] < FRUITLESS_ROUNDS:
            clock, before = time.perf_counter(), len(inputs)
            round_seed = hash_seed(seed, "inputs", state["rounds"])
            for x in more_inputs(generator, prompt, demos, inputs, n - len(inputs), round_seed):
                if normalised(x) not in seen and len(inputs) < n:
                    seen.add(normalised(x))
                    inputs.append(x)
            state["rounds"] += 1
            state["fruitless"] = 0 if len(inputs) > before else state["fruitless"] + 1
            state["seconds"] += time.perf_counter() - clock
            save(state)
            progress.update(len(inputs) - before)
    if not inputs:
        raise ValueError(
            f"the generator wrote no numbered list in {FRUITLESS_ROUNDS} rounds; "
            "give it examples with --demos or a stronger --generator, with another --out"
        )
    if len(inputs) < n:
        tqdm.write(
            f"pseudo inputs: nothing new in {FRUITLESS_ROUNDS} rounds, going on with "
            f"{len(inputs)} of {n}; for more, give other --demos or a stronger --generator"
        )
    return inputs


def hash_seed(*parts) -> int:
    """A seed that depends on all parts and on nothing else (not on the order of work)."""
    return random.Random("-".join(map(str, parts))).getrandbits(40)


def say_next(voice: Voice, records: list[Record], view) -> list[tuple[Record, str]]:
    """The next turn after view(record) of every record; one that may not fit is marked overlong."""
    for record in records:
        record.overlong = not voice.fits(view(record))
    fitting = [record for record in records if not record.overlong]
    return list(zip(fitting, voice.say([view(record) for record in fitting]), strict=True))


def role_play(
    voice: Voice, prompt: Prompt, task: Task, records: list[Record], max_turns: int
) -> None:
    """Fill in the turns of the records: agent and environment alternate greedily, all in step.

    A conversation ends when the environment says [END] (which is not kept), with a final action,
    at the limit, or when it fills the context. With max_turns 1 no environment is needed.
    Source: GenPI 3.2.
    """

    def as_agent(r: Record) -> list[dict]:
        return conversation(prompt.teacher(r.pseudo_input), r.turns)

    def as_environment(r: Record) -> list[dict]:
        x, environment = r.pseudo_input, task.environment
        return environment_messages(prompt, x, r.turns, environment, task.is_final)

    live = list(records)
    with bar("role-play", len(records), "chat") as progress:
        for turn in range(1, max_turns + 1):
            spoken = say_next(voice, live, as_agent)
            for record, text in spoken:
                record.turns.append(text)
            live = []
            if max_turns > 1:
                answers = say_next(voice, [record for record, _ in spoken], as_environment)
                live = [r for r, text in answers if goes_on(r, text, task, turn == max_turns)]
            progress.update(len(records) - len(live) - progress.n)
    for record in records:
        record.turns = record.turns[: len(record.turns) - (len(record.turns) + 1) % 2]
        acted = record.turns and task.is_final(record.turns[-1])
        record.no_final_action = task.parsed and not acted


def goes_on(record: Record, answer: str, task: Task, last: bool) -> bool:
    """Note how the environment answered; True, and the answer stays, if the agent has its turn."""
    if END in answer:
        return False
    final = task.is_final(record.turns[-1])
    record.no_end_token = final
    record.hit_limit = last and not final
    if final or last:
        return False
    record.turns.append(answer)
    return True


def synthesise(
    voice: Voice,
    generator: Voice | Server,
    prompt: Prompt,
    task: Task,
    records: list[Record],
    max_turns: int,
    seed: int,
) -> Iterator[Record]:
    """Fill in a wave's conversations, student outputs and reasons; yield finished records.

    voice: the model that is trained; generator: the model that writes the reasons.
    """
    clock = time.perf_counter()
    role_play(voice, prompt, task, records, max_turns)
    spoken = [r for r in records if r.turns]
    with bar("student outputs", len(spoken), "chat") as progress:
        students = voice.say([student_messages(r.pseudo_input) for r in spoken], progress)
    for record, text in zip(spoken, students, strict=True):
        record.student = text
    yield from (r for r in records if not r.turns)

    def question(r: Record) -> list[dict]:
        return reason_messages(prompt, r.pseudo_input, r.student, r.teacher)

    for record in spoken:
        record.overlong |= not generator.fits(question(record))
    yield from (r for r in spoken if r.overlong)
    spoken = [r for r in spoken if not r.overlong]
    asked = [question(r) for r in spoken]
    seeds = [hash_seed(seed, "reason", r.index) for r in spoken]
    sampling = {"max_new_tokens": generator.max_new_tokens, "temperature": 0.7, "top_p": 0.9}
    rows = generator.speak(asked, **sampling, seeds=seeds)
    for row, text, _ in tqdm(
        rows, f"{'reasons':<18}", len(spoken), unit="reason", dynamic_ncols=True
    ):
        spoken[row].reason, spoken[row].overlong = text or "", text is None
        spoken[row].seconds = time.perf_counter() - clock  # since the last record
        clock += spoken[row].seconds
        yield spoken[row]


# ---------------------------------------------------------------------------------------- files


def read_records(path: Path) -> list[Record]:
    """The records of data.jsonl in order of index.

    A corrupt last line (the machine stopped while writing) is dropped with a warning, and made
    again. Raises ValueError naming the line if any other line is corrupt.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records, seen, ends_whole = [], set(), not lines[-1]
    lines = lines[:-1] if ends_whole else lines
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
            if not record.is_whole() or record.index in seen:
                raise ValueError(line)
            seen.add(record.index)
            records.append(record)
        except (ValueError, TypeError):
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number} is corrupt; delete that line to have it made again"
                ) from None
            tqdm.write(f"{path}: the last line is corrupt; it is dropped and made again")
            ends_whole = False
    if not ends_whole:
        replace_text(path, "".join(to_line(r) for r in records))
    return sorted(records, key=lambda r: r.index)


def to_line(record: Record) -> str:
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def append_record(path: Path, record: Record) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(to_line(record))
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def quality(records: list[Record], max_turns: int) -> dict:
    """What GenPI Table 4 reports of the synthesis: mean turns, and shares of the records."""
    n = max(1, len(records))
    flags = ("hit_limit", "no_end_token", "no_final_action", "overlong")
    agent_turns = [(len(r.turns) + 1) // 2 for r in records]
    shares = {flag: sum(getattr(r, flag) for r in records) / n for flag in flags}
    return {
        "records": len(records),
        "mean_turns": sum(agent_turns) / n,
        "max_turns": max_turns,
        **shares,
    }
