"""The sampler: the fast path writes what the definition does, in any company."""

import copy
import random

import pytest
import torch
from test_nucleus import nucleus
from torch.utils._python_dispatch import TorchDispatchMode

import sampler
from model import Config, Llama
from prompt import message
from sampler import Sampling, Voice, generate, generate_by_definition, say

ALPHABET = "#abcdefghijklmnopqrstuvwxyz.,;:!"
STOPS = "#ab"
GREEDY = Sampling(12)
WARM = Sampling(12, temperature=1.0, top_p=0.9)
SLOTS = (1, 2, 3, 64)  # conversations in flight; 64 takes all
SHAPE = Config(
    vocab_size=len(ALPHABET),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


class Letters:
    """A chat whose tokens are single letters and whose messages have no headers."""

    def __init__(self, stops: str = STOPS, context: int = 128):
        self.stops = {ALPHABET.index(letter) for letter in stops}
        self.context = context

    def encode(self, messages, reply=False):
        assert reply
        ids = [ALPHABET.index(letter) for m in messages for letter in m["content"]]
        return ids, [-1] * len(ids)

    def decode(self, ids):
        return "".join(ALPHABET[i] for i in ids)


LETTERS = Letters()
ENDLESS = Letters(stops="")  # no reply ends by itself


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random weights, large enough that what comes next depends on all that came before."""
    torch.manual_seed(3)
    llama = Llama(SHAPE)
    for parameter in llama.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=2 * parameter.size(1) ** -0.5)
    return llama.eval()


@pytest.fixture
def shapes(model):
    """The (rows, tokens) of every forward pass, in order."""
    seen = []
    first = model.model.embed_tokens
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    yield seen
    hook.remove()


def letters(n: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET[1:], k=n))


def chats(*texts: str) -> list[list[dict]]:
    return [[message("user", text)] for text in texts]


PREFIX = letters(20, seed=99)
OWN = [letters(n, seed=n) for n in (5, 12, 3, 17, 8, 2, 9)]  # seven rows of different lengths
SHARED = [PREFIX + text for text in OWN]


def write(model, texts, sampling=GREEDY, slots=64, seeds=None, chat=LETTERS) -> list[str]:
    """The replies to some texts, in their order."""
    return say(Voice(model, chat, slots), chats(*texts), sampling, seeds)


def by_definition(model, texts, sampling=GREEDY, chat=LETTERS) -> list[str]:
    """The same replies, every token from a whole pass; number i draws from seed i."""
    found = []
    for seed, text in enumerate(texts):
        ids = [ALPHABET.index(letter) for letter in text]
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(sampling.max_new_tokens, generator=generator)[: chat.context - len(ids)]
        reply = generate_by_definition(model, ids, chat.stops, sampling, draws)
        found.append(chat.decode(reply))
    return found


def no_choice_is_open(model, text: str, reply: str) -> bool:
    """Is every letter of a greedy reply, and what came after it, ahead by more than rounding?"""
    ids = [ALPHABET.index(letter) for letter in text + reply]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, len(text) - 1 :]
    best, second = logits.topk(2).values.T
    return bool((best - second > 1e-3).all())


# ------------------------------------------------------------------------ definition and fast path

BOTH = pytest.mark.parametrize("texts", [OWN, SHARED], ids=["no prefix", "prefix"])
ANY_SLOTS = pytest.mark.parametrize("slots", SLOTS)


@ANY_SLOTS
@BOTH
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_the_fast_path_writes_what_the_definition_does(model, sampling, texts, slots):
    """Greedy or sampled, with any number of slots, a text is that of whole passes without cache."""
    expected = by_definition(model, texts, sampling)
    assert write(model, texts, sampling, slots) == expected
    if sampling is GREEDY:
        pairs = zip(texts, expected, strict=True)
        assert all(no_choice_is_open(model, text, reply) for text, reply in pairs)
    lengths = set(map(len, expected))
    assert len(set(expected)) > 4 and len(lengths) > 2 and max(lengths) == 12


@BOTH
def test_a_row_is_the_same_alone_and_in_any_company(model, texts):
    """Alone, in every order and beside any others, a conversation gets one text."""
    rng = random.Random(0)
    alone = {text: write(model, [text])[0] for text in texts}
    for _ in range(8):
        some = rng.choices(texts, k=rng.randint(2, 9))  # may hold a conversation twice
        slots = rng.choice(SLOTS)
        assert write(model, some, slots=slots) == [alone[text] for text in some]


@ANY_SLOTS
def test_rows_that_finish_together_leave_no_gap(model, slots):
    """Five rows of equal length, which free several slots at once, are all written."""
    four = Sampling(4)
    expected = by_definition(model, OWN[:5], four, ENDLESS)
    assert write(model, OWN[:5], four, slots, chat=ENDLESS) == expected


def test_prompts_read_in_pieces_give_the_same_text(model, monkeypatch):
    """A bound on the prompt tokens of a pass changes no text, neither in prefix nor in rows."""
    whole = write(model, SHARED)
    for tokens, scores, prefix in ((20, 10**9, 20), (7, 10**9, 7), (8192, 800, 3), (8192, 1, 1)):
        monkeypatch.setattr("sampler.PREFILL_TOKENS", tokens)
        monkeypatch.setattr("sampler.PREFILL_SCORES", scores)
        monkeypatch.setattr("model.PREFILL", prefix)
        assert write(model, SHARED) == whole


@ANY_SLOTS
@pytest.mark.parametrize("burst", [2, 5, 40])
@BOTH
def test_looking_less_often_changes_no_text(model, monkeypatch, texts, burst, slots):
    """With many tokens between two looks at the device, and keys in strides, texts are the same."""
    greedy = write(model, texts)
    warm = write(model, texts, WARM)
    monkeypatch.setitem(sampler.BURST, "cpu", burst)
    monkeypatch.setattr("sampler.STRIDE", 8)
    assert write(model, texts, GREEDY, slots) == greedy
    assert write(model, texts, WARM, slots) == warm
    assert [growth[-1] for growth in grown(model, texts, slots)] == greedy


def grown(model, texts, slots: int) -> list[list[str]]:
    """All that is yielded of every conversation, in order, where unfinished texts are, too."""
    seen = [[] for _ in texts]
    voice = Voice(model, LETTERS, slots)
    for number, text, _ in voice.speak(chats(*texts), GREEDY, partly=True):
        seen[number].append(text)
    return seen


@ANY_SLOTS
@BOTH
def test_texts_grow_to_what_is_said(model, texts, slots):
    """With partly, each text of a row continues the one before it, and the last is the whole."""
    replies = write(model, texts)
    for growth, reply in zip(grown(model, texts, slots), replies, strict=True):
        assert growth[-1] == reply
        assert all(b.startswith(a) for a, b in zip(growth, growth[1:], strict=False))
        assert len(set(growth)) >= len(reply)  # a letter at a time


def test_a_captured_step_is_made_once_a_stride(model, monkeypatch):
    """In a burst the first step of a stride runs as it is, all later ones are the captured step."""
    made = []
    capture = sampler.capture
    monkeypatch.setitem(sampler.BURST, "cpu", 4)
    monkeypatch.setattr("sampler.STRIDE", 16)
    monkeypatch.setattr("sampler.capture", lambda *step: made.append(0) or capture(*step))
    write(model, ["x" * 10], Sampling(40), chat=ENDLESS)  # 50 tokens: to 16, 32, 48 and 64
    assert len(made) == 4


class Watch(TorchDispatchMode):
    """Fails at what would make the host wait for a GPU, or cannot be captured."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_finds_what_it_was_captured_with(model, monkeypatch, temperature):
    """A step asks the device nothing, and at a replay its tensors lie where they lay before."""
    batches = []
    replayed = []
    start = sampler.Batch.start
    monkeypatch.setattr(sampler.Batch, "start", lambda b, *a: batches.append(b) or start(b, *a))

    def places() -> list[int]:
        batch = batches[-1]
        tensors = [getattr(batch, name) for name in (*batch.STATE, "finite", "every", "stops")]
        tensors += [batch.cache.k, batch.cache.v, batch.cache.lengths, batch.prefix.k]
        return [batch.cache.bound, *(t.data_ptr() for t in tensors)]

    def capture(step, pool):
        before = places()

        def replay():
            replayed.append(0)
            assert places() == before
            with Watch():
                step()

        return replay

    monkeypatch.setattr("sampler.capture", capture)
    monkeypatch.setitem(sampler.BURST, "cpu", 3)
    monkeypatch.setattr("sampler.STRIDE", 8)
    for slots in (3, 7):  # slots that are refilled, and slots that are dropped at the end
        write(model, SHARED, Sampling(12, temperature), slots)
    assert len(replayed) > 10 and batches[-1].slots < 7


def test_logits_that_are_not_finite_are_refused(model):
    """A damaged weight is one ValueError, greedy or sampled, not a text of token 0."""
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"\A.*logits are not finite.*\Z"):
            write(broken, OWN, Sampling(5, temperature))


# ------------------------------------------------------------------------------------- how it works


def test_a_common_prefix_is_read_once(model, shapes):
    """The 20 shared tokens go through the model in one row, then rows bring only their own."""
    write(model, SHARED)
    first, *later = [shape for shape in shapes if shape[1] > 1]
    assert first == (1, 20) and later == [(7, 17)]


def test_a_freed_slot_is_refilled_while_the_other_goes_on(model, shapes):
    """With two slots no pass has more than two rows, and later rows start alone."""
    expected = write(model, OWN)
    shapes.clear()
    assert write(model, OWN, slots=2) == expected
    prefills = [rows for rows, tokens in shapes if tokens > 1]
    assert prefills[0] == 2 and sum(prefills) == 7 and prefills.count(1) >= 3
    assert max(rows for rows, _ in shapes) == 2


def test_empty_slots_are_dropped_at_the_end(model, shapes):
    """Once no row waits, the rows of a pass only get fewer, down to less than half."""
    texts = write(model, OWN)
    rows = [rows for rows, tokens in shapes if tokens == 1]
    assert rows == sorted(rows, reverse=True) and rows[0] == 7 and rows[-1] <= 3
    assert len(rows) == max(map(len, texts)) - 1  # the first token comes from reading the prompt


# ------------------------------------------------------------------------------------------- limits


def test_each_row_stops_by_itself(model):
    """A row ends before its first stop token, and speak tells stopping from the token limit."""
    found = sorted(Voice(model, LETTERS).speak(chats(*OWN), GREEDY))
    endless = [cut(text) for text in write(model, OWN, Sampling(13), chat=ENDLESS)]
    assert [row for row, _, _ in found] == list(range(7))
    assert [text for _, text, _ in found] == [text[:12] for text in endless]
    assert [stopped for _, _, stopped in found] == [len(text) < 12 for text in endless]
    assert {stopped for _, _, stopped in found} == {True, False}


def cut(text: str) -> str:
    """What stands before the first letter that is a stop token."""
    return text[: min((i for i, letter in enumerate(text) if letter in STOPS), default=len(text))]


@pytest.mark.parametrize("n", [1, 5, 9])
def test_max_new_tokens_cuts_the_same_text(model, n):
    """Without stop tokens every row has exactly n tokens, the first n of a longer run."""
    texts = write(model, OWN, Sampling(n), chat=ENDLESS)
    longer = write(model, OWN, chat=ENDLESS)
    assert texts == [text[:n] for text in longer] and {len(text) for text in texts} == {n}


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_context_is_a_limit_too(model, texts, temperature):
    """Prompt and reply together never exceed the context; shorter prompts get their full reply."""
    six = Sampling(6, temperature)
    longest = max(map(len, texts))
    chat = Letters("", context=longest + 2)
    replies = write(model, texts, six, slots=2, chat=chat)
    assert [len(reply) for reply in replies] == [min(6, longest + 2 - len(text)) for text in texts]
    full = write(model, texts, six, chat=ENDLESS)
    assert all(whole.startswith(reply) for whole, reply in zip(full, replies, strict=True))
    assert replies == by_definition(model, texts, six, chat)


def test_what_fits_leaves_room_for_a_whole_reply(model):
    """A conversation fits if its tokens and max_new_tokens together are at most the context."""
    voice = Voice(model, Letters(context=17))
    assert voice.fits(chats("x" * 12)[0], 5) and not voice.fits(chats("x" * 13)[0], 5)


def test_no_room_is_refused_in_one_line(model):
    """A prompt that fills the context is a ValueError with its length and the limit."""
    with pytest.raises(ValueError, match=r"\A.*\b17 tokens.*\b17\b.*\Z"):
        write(model, OWN, Sampling(5), chat=Letters(context=17))


def test_nothing_asked_nothing_written(model):
    """No conversations, no texts."""
    assert write(model, []) == []


@pytest.mark.parametrize("wrong", [(0,), (5, -0.1), (5, 1.0, 0.0), (5, 1.0, 1.1)])
def test_sampling_that_cannot_be_is_refused(wrong):
    """No tokens, a temperature below 0, a nucleus outside (0, 1]: one line with the limits."""
    with pytest.raises(ValueError, match=r"\A.*at least 1, at least 0, and above 0 up to 1.*\Z"):
        Sampling(*wrong)


# ----------------------------------------------------------------------------------------- sampling


@BOTH
def test_sampled_text_does_not_depend_on_the_neighbours(model, texts):
    """Row i of any batch, with any number of slots, is the row alone with the seed of row i."""
    seeds = list(range(5, 12))
    pairs = zip(texts, seeds, strict=True)
    alone = [write(model, [text], WARM, seeds=[seed])[0] for text, seed in pairs]
    for slots in SLOTS:
        assert write(model, texts, WARM, slots, seeds) == alone
    assert write(model, texts[::-1], WARM, seeds=seeds[::-1]) == alone[::-1]


def test_generate_counts_the_seeds_up(model):
    """generate gives conversation i the seed + i, and is greedy if nothing is said."""
    sampled = generate(model, LETTERS, chats(*OWN), 12, temperature=1.0, top_p=0.9, seed=5)
    assert sampled == write(model, OWN, WARM, seeds=list(range(5, 12)))
    assert generate(model, LETTERS, chats(*OWN), 12) == write(model, OWN)


def test_a_seed_gives_its_text_again_and_another_gives_another(model):
    """The same seeds give the same texts; of other seeds and of greedy text most rows differ."""
    first = write(model, OWN, WARM, seeds=list(range(1, 8)), chat=ENDLESS)
    again = write(model, OWN, WARM, seeds=list(range(1, 8)), chat=ENDLESS)
    other = write(model, OWN, WARM, seeds=list(range(50, 57)), chat=ENDLESS)
    greedy = write(model, OWN, chat=ENDLESS)
    assert first == again
    for texts in (other, greedy):
        assert sum(a != b for a, b in zip(first, texts, strict=True)) >= 5


def test_two_tokens_of_many_seeds_follow_the_model(model):
    """Over 2,000 seeds in a row, p(ab) = p(a) p(b | a) for all pairs, within 4 standard errors."""
    n = 2000
    text = OWN[0]
    pairs = write(model, [text] * n, Sampling(2, temperature=0.7, top_p=0.9), chat=ENDLESS)
    frequency = torch.tensor([[pairs.count(a + b) / n for b in ALPHABET] for a in ALPHABET])
    p = next_letter(model, text)[:, None] * torch.stack(
        [next_letter(model, text + a) for a in ALPHABET]
    )
    limit = 4 * (p * (1 - p) / n).sqrt() + 2 / n  # two more, since rare counts are not normal
    assert ((frequency - p).abs() <= limit).all() and (p > 0.03).sum() > 6


def next_letter(model: Llama, text: str) -> torch.Tensor:
    """The nucleus of top_p 0.9 at temperature 0.7 after a text, from one whole forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[ALPHABET.index(letter) for letter in text]]))[0, -1]
    return torch.tensor(nucleus(logits.double().softmax(-1).tolist(), 0.7, 0.9))
