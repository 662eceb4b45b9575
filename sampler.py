"""Tokens from a KV cache, for many conversations at a time.

generate_by_definition is all of it: read everything, choose a token, append it, read everything
again. What follows writes the same text fast:

    a cache             a token costs a pass over itself, the past is kept as keys and values
    slots               R conversations in flight; one that has ended gives its slot to the next
    a shared prefix     what all conversations begin with, nearly always the long prompt, is read
                        once and stands once in memory
    one look in 16      choosing, noting and stopping happen on the device; a GPU replays them as a
                        CUDA graph and is asked every 16 tokens (NOT MEASURED: none has run it yet)

A row's randomness is its own, so that what it says does not depend on its neighbours (on a GPU up
to the rounding of a matmul, which changes with the number of rows).

Left out: beam search, repetition penalties, speculative decoding, keeping the cache between turns.

Letters: R slots, V vocabulary, P tokens of the shared prefix, n rows of a pass. Source: nucleus
sampling (arXiv 1904.09751), continuous batching (Orca, OSDI 2022).
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from chat import Chat
from model import KVCache, Llama, prefill

BURST = {"cpu": 1, "cuda": 16}  # tokens a row between two looks at what the device has written
STRIDE = 256  # keys in sight are rounded up to this, so that one captured step serves many
PREFILL_TOKENS = 8192  # prompt tokens computed in one forward pass; bounds the activations
PREFILL_SCORES = 1 << 24  # and what they attend to, tokens x keys; bounds the attention scores

# ------------------------------------------------------------------------------------ definition


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. Raises ValueError for what cannot be."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # the nucleus; 1 is all of the vocabulary

    def __post_init__(self):
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            limits = "at least 1, at least 0, and above 0 up to 1 are possible"
            raise ValueError(f"{self}: {limits}")


@torch.no_grad()
def generate_by_definition(
    model: Llama, ids: list[int], stops: set[int], sampling: Sampling, draws: torch.Tensor
) -> list[int]:
    """The reply to one conversation, every token from a whole pass over all that stands before it.

    ids: the conversation; stops: the ids that end a reply; draws (N,): a number in [0, 1) for each
    token that may be written.
    """
    written: list[int] = []
    for u in draws:
        logits = model(torch.tensor([ids + written], device=draws.device))[:, -1]  # (1, V)
        token = pick_by_definition(logits, u[None], sampling.temperature, sampling.top_p).item()
        if token in stops:
            break
        written.append(token)
    return written


def pick_by_definition(
    logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Choose a token of each row: logits (R, V), u (R,) uniform in [0, 1) -> ids (R,).

    The nucleus is the smallest set of most probable tokens (after temperature) whose mass reaches
    top_p; u picks from it by the inverse of its cumulative distribution. Temperature 0 takes the
    likeliest. Source: Holtzman et al. 2020, Eq. 2.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    p, order = p.sort(dim=-1, descending=True, stable=True)
    p = p * (p.cumsum(-1) - p < top_p)  # the mass before a token decides, so the first always stays
    mass = p.cumsum(-1)
    place = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    last = (p > 0).sum(-1, keepdim=True) - 1
    return order.gather(1, place.minimum(last))[:, 0]


def pick(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Same as pick_by_definition, of finite logits; else some token, which nobody will read.

    Probabilities are sorted without their tokens, for which NumPy takes a twentieth of the time:
    the token is the one that has the probability picked. Of several that share it, and so stand
    side by side in falling order, the picked place tells which.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)  # (R, V)
    falling = sort_falling(p)
    mass = falling.cumsum(-1)
    nucleus = (mass - falling < top_p) & (falling > 0)
    last = (nucleus.sum(-1, keepdim=True) - 1).clamp(min=0)
    drawn = u[:, None] * mass.gather(1, last)
    place = torch.searchsorted(mass, drawn, right=True).minimum(last)
    picked = falling.gather(1, place)  # (R, 1)
    alike = place - (falling > picked).sum(-1, keepdim=True)  # those before it in the vocabulary
    return ((p == picked).cumsum(-1) <= alike).sum(-1).clamp(max=p.size(-1) - 1)


def sort_falling(p: torch.Tensor) -> torch.Tensor:
    """Each row of p (R, V) from its largest number to its smallest."""
    if p.device.type == "cpu":
        return torch.from_numpy(np.sort(p.detach().numpy())).flip(-1)
    return p.sort(-1, descending=True).values


# ------------------------------------------------------------------------------------- speaking


@dataclass(frozen=True)
class Voice:
    """A model that speaks, with so many conversations in flight."""

    model: Llama
    chat: Chat
    slots: int = 64

    @torch.no_grad()
    def speak(
        self, conversations: list[list[dict]], sampling: Sampling, seeds=None, partly=False
    ) -> Iterator[tuple[int, str, bool]]:
        """Yield (conversation, its reply, whether it ended by itself) as replies are finished.

        Same as generate_by_definition, without reading anything twice. seeds: one a conversation
        (None: its place). partly: also yield what is written so far of each, with False.
        Raises: ValueError if a conversation leaves no room in the context, and when logits are
        not finite.
        """
        rows = self.rows(conversations, sampling, seeds)
        if not rows:
            return
        batch = Batch(self.model, rows, self.chat.stops, sampling, self.slots)
        waiting = deque(rows)
        while waiting or batch.busy():
            free = batch.free()
            # to read a prompt all rows stop, so that is done for a quarter of the slots at a time
            if waiting and (len(free) * 4 >= batch.slots or not batch.busy()):
                slots = free[: len(waiting)]
                batch.start([waiting.popleft() for _ in slots], slots)
            else:
                batch.advance()
            for row, ids, ended in batch.collect():
                yield row.number, self.chat.decode(ids).strip(), ended
            if partly:
                for row, ids in batch.unfinished():
                    yield row.number, self.chat.decode(ids).strip(), False
            if not waiting:
                batch.shrink()

    def fits(self, messages: list[dict], max_new_tokens: int) -> bool:
        """Does a whole reply still fit the context after these messages?"""
        read = len(self.chat.encode(messages, reply=True)[0])
        return read + max_new_tokens <= self.chat.context

    def rows(self, conversations, sampling: Sampling, seeds: list[int] | None) -> list["Row"]:
        """What is to be read and drawn; ValueError if there is no room for one token."""
        rows = []
        seeds = range(len(conversations)) if seeds is None else seeds
        for number, (messages, seed) in enumerate(zip(conversations, seeds, strict=True)):
            ids = self.chat.encode(messages, reply=True)[0]
            room = min(sampling.max_new_tokens, self.chat.context - len(ids))
            if room < 1:
                raise ValueError(
                    f"a conversation of {len(ids)} tokens leaves no room in the model's context of "
                    f"{self.chat.context}; shorten the prompt or lower --max-turns"
                )
            draws = torch.rand(
                sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)
            )
            rows.append(Row(number, ids, draws[:room]))
        return rows


def say(voice, conversations: list[list[dict]], sampling: Sampling, seeds=None) -> list[str]:
    """The replies of a voice, or of a server, in the order of the conversations."""
    texts = [""] * len(conversations)
    for number, text, _ in voice.speak(conversations, sampling, seeds):
        texts[number] = text
    return texts


@torch.no_grad()
def is_greedy(
    voice: Voice, conversations: list[list[dict]], spoken: list[list[int]]
) -> list[list[bool]]:
    """Is a message the greedy reply to those before it? For the messages numbered in spoken[i].

    say() of what stands before each would tell, a token at a time; here a conversation is one pass.
    A reply is greedy if each of its tokens, and the end of its turn, is the likeliest after those
    before it. One that the tokenizer splits otherwise than it was written counts as another.
    """
    model = voice.model
    device = model.lm_head.weight.device
    rows = [voice.chat.encode(messages) for messages in conversations]  # (ids, owner)
    begins = [owner.index(numbers[0]) for (_, owner), numbers in zip(rows, spoken, strict=True)]
    P = min([shared_prefix([ids for ids, _ in rows]), *(begin - 1 for begin in begins)])
    prefix = prefill(model, rows[0][0][:P]) if P else None
    found: list[list[bool]] = [[] for _ in rows]
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    while waiting:
        longest = len(rows[waiting[-1]][0]) - P
        group = prefill_rows(longest, P)
        some = waiting[-group:]
        del waiting[-group:]
        own = [rows[i][0][P:] for i in some]
        who = [rows[i][1][P + 1 :] for i in some]  # who wrote the token that comes next
        ids = pad_sequence([torch.tensor(x) for x in own], batch_first=True).to(device)  # (n, T)
        said = [[w in spoken[i] for w in owner] for i, owner in zip(some, who, strict=True)]
        at = pad_sequence([torch.tensor([*x, False]) for x in said], batch_first=True).to(device)
        # (N, D) at the N places of the mask (n, T) whose next token a named message wrote
        x = model.hidden(ids, KVCache(model, len(some), longest, prefix), at)
        greedy = torch.cat([model.lm_head(part).argmax(-1) for part in x.split(256)])
        hits = (greedy == ids.roll(-1, 1)[at]).tolist()
        for i, owner in zip(some, who, strict=True):
            wrong = {w for w in owner if w in spoken[i] and not hits.pop(0)}
            found[i] = [number not in wrong for number in spoken[i]]
    return found


def generate(
    model: Llama, chat: Chat, conversations: list[list[dict]],
    max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """Write the assistant's next turn of every conversation; number i draws from seed + i.

    Raises: ValueError as Voice.speak does.
    """
    seeds = [seed + number for number in range(len(conversations))]
    sampling = Sampling(max_new_tokens, temperature, top_p)
    return say(Voice(model, chat), conversations, sampling, seeds)


# ---------------------------------------------------------------------------------------- batch


@dataclass
class Row:
    """One conversation and the room for its reply."""

    number: int
    ids: list[int]
    draws: torch.Tensor  # (room,) in [0, 1), one for each token that may be written


def shared_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with, leaving each one of its own; 0 if not worth it."""
    if len(prompts) < 2:
        return 0
    same = len(os.path.commonprefix(prompts))  # of any lists, not only of paths
    same = min(same, min(map(len, prompts)) - 1)
    return same if same >= 16 else 0


def prefill_rows(longest: int, prefix: int) -> int:
    """Rows that are read in one pass, of so many tokens behind a shared prefix."""
    scores = longest * (prefix + longest)  # of a row and head
    return max(1, min(PREFILL_TOKENS // longest, PREFILL_SCORES // scores))


class Batch:
    """The conversations in flight, each in a slot of the cache.

    What choosing a token needs lies on the device, so that a GPU is not asked after every token:

        last, live, count, room   (R,) the token to feed, 1 while the row goes on, tokens written
                                  and allowed
        written, draws            (R, width) the tokens, and for each a number to pick it by
        finite                    () whether all logits so far were

    On the host: seat[slot] is the Row that sits there, or None; longest is the most tokens that a
    row has in the cache.
    """

    STATE = ("last", "live", "count", "room", "written", "draws")

    def __init__(self, model: Llama, rows: list[Row], stops, sampling: Sampling, slots: int):
        self.model = model
        self.sampling = sampling
        self.P = shared_prefix([row.ids for row in rows])
        self.prefix = prefill(model, rows[0].ids[: self.P]) if self.P else None
        length = max(len(row.ids) - self.P + len(row.draws) for row in rows)
        self.slots = min(slots, len(rows))
        self.cache = KVCache(model, self.slots, length, self.prefix)
        self.device = self.cache.k.device
        self.seat: list[Row | None] = [None] * self.slots
        self.longest = 0
        self.stops = torch.tensor(sorted(stops), device=self.device)
        for name in ("last", "live", "count", "room"):
            setattr(self, name, torch.zeros(self.slots, dtype=torch.int64, device=self.device))
        width = max(len(row.draws) for row in rows) + 1  # the last takes what follows a row's end
        self.written = torch.zeros(self.slots, width, dtype=torch.int64, device=self.device)
        self.draws = torch.zeros(self.slots, width, device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.every = torch.arange(self.slots, device=self.device)
        self.graphs: dict[int, Callable] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def busy(self) -> list[int]:
        """Slots with a row in flight."""
        return [slot for slot, row in enumerate(self.seat) if row is not None]

    def free(self) -> list[int]:
        """Slots without one."""
        return [slot for slot, row in enumerate(self.seat) if row is None]

    def start(self, rows: list[Row], slots: list[int]) -> None:
        """Seat new rows, read their own prompts, and take their first tokens."""
        group = prefill_rows(max(len(row.ids) - self.P for row in rows), self.P)
        for first in range(0, len(rows), group):
            some = rows[first : first + group]
            seats = slots[first : first + group]
            logits, fresh = self.read([row.ids[self.P :] for row in some])
            self.cache.put(seats, fresh)
            index = torch.tensor(seats, device=self.device)
            self.live[index] = 1
            self.count[index] = 0
            self.room[index] = torch.tensor([len(row.draws) for row in some], device=self.device)
            draws = pad_sequence([row.draws for row in some], batch_first=True).to(self.device)
            self.draws[index, : draws.size(1)] = draws
            for slot, row in zip(seats, some, strict=True):
                self.seat[slot] = row
            self.take(logits, index)

    def read(self, prompts: list[list[int]]) -> tuple[torch.Tensor, KVCache]:
        """Read prompts in one pass -> logits (n, V) after the last token of each, their cache."""
        counts = [len(ids) for ids in prompts]
        longest = max(counts)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts])
        ends = torch.tensor(counts, device=self.device)[:, None] - 1
        fresh = KVCache(self.model, len(prompts), longest, self.prefix)
        at_end = torch.arange(longest, device=self.device) == ends
        logits = self.model(padded.to(self.device), fresh, at=at_end)
        fresh.advance(counts)
        return logits, fresh

    def take(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Choose and note the next token of these slots, logits (n, V); end those that it ends."""
        count = self.count[slots]
        u = self.draws[slots, count]
        token = pick(logits, u, self.sampling.temperature, self.sampling.top_p)
        more = self.live[slots].bool() & (token[:, None] != self.stops).all(-1)
        self.written[slots, count] = token
        self.last[slots] = token
        self.count[slots] = count + more
        self.live[slots] = (more & (count + 1 < self.room[slots])).long()
        self.finite &= logits.amax(-1).isfinite().all()  # a nan or inf is the maximum of its row

    def next_token(self) -> None:
        """Feed the last token of every slot and take the next. Nothing here waits for the device.

        A slot without a live row computes along, but what it writes is never read.
        """
        logits = self.model(self.last[:, None], self.cache)[:, -1]
        self.cache.lengths += self.live
        self.take(logits, self.every)

    def advance(self) -> None:
        """Write a burst of tokens in every slot, on a GPU as replays of a captured CUDA graph.

        Same as a loop over next_token. A graph has fixed shapes, so there the keys in sight grow
        in strides, with a graph for each. The first token of a stride is written without one,
        since what that compiles cannot be captured.
        """
        burst = BURST[self.device.type]
        sight = self.longest + burst
        if burst > 1:
            sight = -(-sight // STRIDE) * STRIDE  # rounded up
        self.cache.bound = min(sight, self.cache.k.size(3)) - 1  # the pass adds the token it feeds
        for _ in range(burst):
            self.graphs.get(sight, self.next_token)()
            if burst > 1 and sight not in self.graphs:
                self.graphs[sight] = capture(self.next_token, self.pool)

    def collect(self) -> list[tuple[Row, list[int], bool]]:
        """Rows that have ended: (row, its ids, whether by itself). Their slots are free again.

        Raises: ValueError if the model's logits were not finite.
        """
        live, count = torch.stack((self.live, self.count)).tolist()  # here we wait for the device
        if not self.finite:
            raise ValueError("the model's logits are not finite; is the checkpoint damaged?")
        ended = [slot for slot in self.busy() if not live[slot]]
        found = []
        for slot, ids in zip(ended, self.written[ended].tolist(), strict=True):
            row = self.seat[slot]
            self.seat[slot] = None
            found.append((row, ids[: count[slot]], count[slot] < len(row.draws)))
        lengths = [len(self.seat[slot].ids) - self.P + count[slot] - 1 for slot in self.busy()]
        self.longest = max(lengths, default=0)
        return found

    def unfinished(self) -> list[tuple[Row, list[int]]]:
        """Rows in flight and what they have written so far."""
        slots = self.busy()
        return [
            (self.seat[slot], self.written[slot, : self.count[slot]].tolist()) for slot in slots
        ]

    def shrink(self) -> None:
        """Drop empty slots once they are the majority; only when no row is waiting for them.

        SmolLM2-135M's shape on two cores, 32 rows of 8 to 101 tokens: 12.0 s instead of 14.9.
        """
        used = self.busy()
        if used and 2 * len(used) <= self.slots:
            self.cache.keep(used)
            for name in self.STATE:
                setattr(self, name, getattr(self, name)[used])
            self.seat = [self.seat[slot] for slot in used]
            self.slots = len(used)
            self.every = self.every[: self.slots]
            self.graphs = {}


def capture(work: Callable, pool) -> Callable:
    """Some work on the device as one CUDA graph, launched at once instead of kernel by kernel.

    The graphs of a batch share a pool of memory: what one allocates does not outlive its replay. On
    a CPU, where there is no pool, the work itself.
    """
    if pool is None:
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay
