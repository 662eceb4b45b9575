"""The sampler: greedy text needs no cache, neighbours change nothing, the nucleus is exact."""

import copy
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import synth
from model import Config, Llama
from synth import generate, message, pick, sample, stream

ALPHABET = "#abcdefghijklmnopqrstuvwxyz.,;:!"
STOPS = "#ab"
WARM = {"temperature": 1.0, "top_p": 0.9}
SLOTS = (1, 2, 3, None)  # rows in flight; None takes all
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
        self.stops, self.context = {ALPHABET.index(letter) for letter in stops}, context

    def encode(self, messages, reply=False):
        assert reply
        ids = [ALPHABET.index(letter) for m in messages for letter in m["content"]]
        return ids, [-1] * len(ids)

    def decode(self, ids):
        return "".join(ALPHABET[i] for i in ids)


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


def by_hand(model: Llama, chat: Letters, text: str, room: int) -> str:
    """The greedy reply, every token from a whole forward pass with no cache."""
    written = ""
    while len(written) < room:
        with torch.no_grad():
            logits = model(torch.tensor([chat.encode(chats(text + written)[0], True)[0]]))[0, -1]
        best, second = logits.topk(2).values
        assert best - second > 1e-3, "the test's weights leave the greedy choice open"
        if logits.argmax().item() in chat.stops:
            break
        written += ALPHABET[logits.argmax()]
    return written


# ------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("texts", [OWN, SHARED], ids=["no prefix", "prefix"])
def test_greedy_is_argmax_without_a_cache(model, texts, slots):
    """With any number of slots each row's text is that of a cache-free argmax loop."""
    chat = Letters()
    expected = [by_hand(model, chat, text, 12) for text in texts]
    assert generate(model, chat, chats(*texts), 12, slots=slots) == expected
    lengths = set(map(len, expected))
    assert len(set(expected)) > 4 and len(lengths) > 2 and max(lengths) == 12


@pytest.mark.parametrize("texts", [OWN, SHARED], ids=["no prefix", "prefix"])
def test_a_row_is_the_same_alone_and_in_any_company(model, texts):
    """Alone, in every order and beside any others, a conversation gets one text."""
    chat, rng = Letters(), random.Random(0)
    alone = {text: generate(model, chat, chats(text), 12)[0] for text in texts}
    for _ in range(8):
        some = rng.choices(texts, k=rng.randint(2, 9))  # may hold a conversation twice
        slots = rng.choice(SLOTS)
        assert generate(model, chat, chats(*some), 12, slots=slots) == [alone[t] for t in some]


@pytest.mark.parametrize("slots", SLOTS)
def test_rows_that_finish_together_leave_no_gap(model, slots):
    """Five rows of equal length, which free several slots at once, are all written."""
    chat = Letters(stops="")
    expected = [by_hand(model, chat, text, 4) for text in OWN[:5]]
    assert generate(model, chat, chats(*OWN[:5]), 4, slots=slots) == expected


def test_prompts_read_in_pieces_give_the_same_text(model, monkeypatch):
    """A bound on the prompt tokens of a pass changes no text, neither in prefix nor in rows."""
    chat = Letters()
    whole = generate(model, chat, chats(*SHARED), 12)
    for tokens, scores, prefix in ((20, 10**9, 20), (7, 10**9, 7), (8192, 800, 3), (8192, 1, 1)):
        monkeypatch.setattr(synth, "PREFILL_TOKENS", tokens)
        monkeypatch.setattr(synth, "PREFILL_SCORES", scores)
        monkeypatch.setattr("model.PREFILL", prefix)
        assert generate(model, chat, chats(*SHARED), 12) == whole


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("burst", [2, 5, 40])
@pytest.mark.parametrize("texts", [OWN, SHARED], ids=["no prefix", "prefix"])
def test_looking_less_often_changes_no_text(model, monkeypatch, texts, burst, slots):
    """With many tokens between two looks at the device, and keys in strides, texts are the same."""
    chat = Letters()
    greedy = generate(model, chat, chats(*texts), 12)
    warm = sorted(sample(model, chat, chats(*texts), 12, **WARM))
    monkeypatch.setitem(synth.BURST, "cpu", burst)
    monkeypatch.setattr(synth, "STRIDE", 8)
    assert generate(model, chat, chats(*texts), 12, slots=slots) == greedy
    assert sorted(sample(model, chat, chats(*texts), 12, **WARM, slots=slots)) == warm
    for text, whole in zip(texts, greedy, strict=True):
        assert "".join(stream(model, chat, chats(text)[0], 12)) == whole


def test_a_captured_step_is_made_once_a_stride(model, monkeypatch):
    """In a burst the first step of a stride runs as it is, all later ones are the captured step."""
    made, capture = [], synth.capture
    monkeypatch.setitem(synth.BURST, "cpu", 4)
    monkeypatch.setattr(synth, "STRIDE", 16)
    monkeypatch.setattr(synth, "capture", lambda *step: made.append(0) or capture(*step))
    generate(model, Letters(""), chats("x" * 10), 40)  # 50 tokens: strides end at 16, 32, 48, 64
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
    batches, replayed = [], []
    start = synth.Batch.start
    monkeypatch.setattr(synth.Batch, "start", lambda b, *a: batches.append(b) or start(b, *a))

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

    monkeypatch.setattr(synth, "capture", capture)
    monkeypatch.setitem(synth.BURST, "cpu", 3)
    monkeypatch.setattr(synth, "STRIDE", 8)
    for slots in (3, 7):  # slots that are refilled, and slots that are dropped at the end
        generate(model, Letters(), chats(*SHARED), 12, temperature=temperature, slots=slots)
    assert len(replayed) > 10 and batches[-1].slots < 7


def test_logits_that_are_not_finite_are_refused(model):
    """A damaged weight is one ValueError, greedy or sampled, not a text of token 0."""
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"\A.*logits are not finite.*\Z"):
            generate(broken, Letters(), chats(*OWN), 5, temperature=temperature)


def test_a_stream_is_the_greedy_text_in_pieces(model):
    """The pieces that stream yields make up what generate returns."""
    for text in OWN:
        pieces = list(stream(model, Letters(), chats(text)[0], 12))
        assert "".join(pieces) == generate(model, Letters(), chats(text), 12)[0]


# ------------------------------------------------------------------------------------- how it works


def test_a_common_prefix_is_read_once(model, shapes):
    """The 20 shared tokens go through the model in one row, then rows bring only their own."""
    generate(model, Letters(), chats(*SHARED), 12)
    first, *later = [shape for shape in shapes if shape[1] > 1]
    assert first == (1, 20) and later == [(7, 17)]


def test_a_freed_slot_is_refilled_while_the_other_goes_on(model, shapes):
    """With two slots no pass has more than two rows, and later rows start alone."""
    expected = generate(model, Letters(), chats(*OWN), 12)
    shapes.clear()
    assert generate(model, Letters(), chats(*OWN), 12, slots=2) == expected
    prefills = [rows for rows, tokens in shapes if tokens > 1]
    assert prefills[0] == 2 and sum(prefills) == 7 and prefills.count(1) >= 3
    assert max(rows for rows, _ in shapes) == 2


def test_empty_slots_are_dropped_at_the_end(model, shapes):
    """Once no row waits, the rows of a pass only get fewer, down to less than half."""
    texts = generate(model, Letters(), chats(*OWN), 12)
    rows = [rows for rows, tokens in shapes if tokens == 1]
    assert rows == sorted(rows, reverse=True) and rows[0] == 7 and rows[-1] <= 3
    assert len(rows) == max(map(len, texts)) - 1  # the first token comes from reading the prompt


# ------------------------------------------------------------------------------------------- limits


def test_each_row_stops_by_itself(model):
    """A row ends before its first stop token, and sample tells stopping from the token limit."""
    chat, free = Letters(), Letters(stops="")
    found = sorted(sample(model, chat, chats(*OWN), 12))
    endless = [cut(text) for text in generate(model, free, chats(*OWN), 13)]
    assert [row for row, _, _ in found] == list(range(7))
    assert [chat.decode(ids) for _, ids, _ in found] == [text[:12] for text in endless]
    assert [stopped for _, _, stopped in found] == [len(text) < 12 for text in endless]
    assert {stopped for _, _, stopped in found} == {True, False}


def cut(text: str) -> str:
    """What stands before the first letter that is a stop token."""
    return text[: min((i for i, letter in enumerate(text) if letter in STOPS), default=len(text))]


@pytest.mark.parametrize("n", [1, 5, 9])
def test_max_new_tokens_cuts_the_same_text(model, n):
    """Without stop tokens every row has exactly n tokens, the first n of a longer run."""
    chat = Letters(stops="")
    texts, longer = (generate(model, chat, chats(*OWN), tokens) for tokens in (n, 12))
    assert texts == [text[:n] for text in longer] and {len(text) for text in texts} == {n}


@pytest.mark.parametrize("texts", [OWN, SHARED], ids=["no prefix", "prefix"])
def test_the_context_is_a_limit_too(model, texts):
    """Prompt and reply together never exceed the context; shorter prompts get their full reply."""
    longest = max(map(len, texts))
    replies = generate(model, Letters("", context=longest + 2), chats(*texts), 6, slots=2)
    assert [len(reply) for reply in replies] == [min(6, longest + 2 - len(text)) for text in texts]
    full = generate(model, Letters(""), chats(*texts), 6)
    assert all(whole.startswith(reply) for whole, reply in zip(full, replies, strict=True))


def test_no_room_is_refused_in_one_line(model):
    """A prompt that fills the context is a ValueError with its length and the limit."""
    with pytest.raises(ValueError, match=r"\A.*\b17 tokens.*\b17\b.*\Z"):
        generate(model, Letters(context=17), chats(*OWN), 5)


def test_nothing_asked_nothing_written(model):
    """No conversations, no texts."""
    assert generate(model, Letters(), [], 5) == []


# -------------------------------------------------------------------------------------- the nucleus


def chosen(p, u, temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
    """The token that each u picks from the distribution p."""
    logits = torch.tensor(p, dtype=torch.float64).log().float().expand(len(u), -1)
    return pick(logits, torch.tensor(u), temperature, top_p).tolist()


def grid(n: int) -> list[float]:
    return [(i + 0.5) / n for i in range(n)]


def nucleus(p: list[float], temperature: float, top_p: float) -> list[float]:
    """p^(1/T), cut to the fewest likeliest tokens that reach top_p, and renormalised."""
    warm = [x ** (1 / temperature) for x in p]
    warm = [x / sum(warm) for x in warm]
    kept, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda i: -warm[i]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += warm[token]
    return [x / mass if i in kept else 0.0 for i, x in enumerate(warm)]


def test_u_walks_down_the_sorted_distribution():
    """p = (.2, .5, .3): u below .5 is token 1, below .8 token 2, the rest token 0."""
    u = [0.0, 0.25, 0.499, 0.501, 0.799, 0.801, 1 - 2**-24]
    assert chosen([0.2, 0.5, 0.3], u) == [1, 1, 1, 2, 2, 0, 0]


def test_u_is_stretched_over_the_nucleus():
    """With top_p .75, tokens 1 and 2 remain, and the border lies at .5 / .8."""
    u = [0.0, 0.624, 0.626, 1 - 2**-24]
    assert chosen([0.2, 0.5, 0.3], u, top_p=0.75) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [(1e-6, "a"), (0.499, "a"), (0.501, "ab"), (0.799, "ab"), (0.801, "abc"), (0.951, "abcd")],
)
def test_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, tokens):
    """p = (.5, .3, .15, .05): token k is reachable if and only if those before it fall short."""
    reached = chosen([0.5, 0.3, 0.15, 0.05], grid(400), top_p=top_p)
    assert {"abcd"[token] for token in reached} == set(tokens)


def test_a_border_belongs_to_the_next_token():
    """Of four tokens of 1/4 each, u = 0, 1/4, 1/2 and 3/4 pick four different ones."""
    assert sorted(chosen([0.25] * 4, [0.0, 0.25, 0.5, 0.75])) == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_mass_of_exactly_top_p_is_enough(n):
    """Of four tokens of 1/4 each, top_p = n/4 keeps n and no more."""
    assert len(set(chosen([0.25] * 4, grid(400), top_p=n / 4))) == n


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_those_of_the_renormalised_nucleus(temperature, top_p):
    """Over n even u each token comes n * p times, to within two."""
    p, n = torch.rand(30, generator=torch.Generator().manual_seed(1)).square().tolist(), 5000
    counts = torch.tensor(chosen(p, grid(n), temperature, top_p)).bincount(minlength=30).double()
    expected = n * torch.tensor(nucleus(p, temperature, top_p), dtype=torch.float64)
    torch.testing.assert_close(counts, expected, rtol=0, atol=2.0)
    assert (counts[expected == 0] == 0).all() and (expected == 0).any() == (top_p < 1)


def test_the_largest_u_stays_in_the_nucleus():
    """u = 1 - 2^-24, whatever rounding makes of it, is the nucleus' last token in 500 cases."""
    logits = 3 * torch.randn(500, 40, generator=torch.Generator().manual_seed(2))
    tokens = pick(logits, torch.full((500,), 1 - 2**-24), 1.0, 0.4)
    p = logits.double().softmax(-1)
    mine = p.gather(1, tokens[:, None])
    above = (p * (p > mine)).sum(-1)
    assert (above < 0.4).all() and (above + mine[:, 0] >= 0.4).all()


def test_impossible_tokens_are_never_chosen():
    """A token of probability 0 is out of reach for every u, even with top_p 1."""
    assert set(chosen([0.0, 0.6, 0.0, 0.4], [*grid(100), 1 - 2**-24])) == {1, 3}


def test_temperature_zero_is_argmax():
    """At temperature 0 neither u nor top_p matters."""
    assert chosen([0.2, 0.5, 0.3], [0.0, 0.9, 0.999], 0.0, 0.9) == [1, 1, 1]


def test_each_row_has_its_own_nucleus():
    """Rows of one batch are cut and picked from separately."""
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]]).log()
    assert pick(logits, torch.tensor([0.99, 0.99, 0.99]), 1.0, 0.8).tolist()[:2] == [0, 1]
    assert pick(logits, torch.tensor([0.95, 0.95, 0.0]), 1.0, 1.0).tolist()[:2] == [1, 0]


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("texts", [OWN, SHARED], ids=["no prefix", "prefix"])
def test_sampled_text_does_not_depend_on_the_neighbours(model, texts):
    """Row i of any batch, with any number of slots, is the row alone with seed + i."""
    chat = Letters()
    rows = enumerate(chats(*texts))
    alone = [generate(model, chat, [row], 12, **WARM, seed=5 + i)[0] for i, row in rows]
    for slots in SLOTS:
        assert generate(model, chat, chats(*texts), 12, **WARM, seed=5, slots=slots) == alone
    backwards = [5 + i for i in reversed(range(7))]
    reversed_texts = generate(model, chat, chats(*texts[::-1]), 12, **WARM, seed=backwards)
    assert reversed_texts == alone[::-1]


def test_a_seed_gives_its_text_again_and_another_gives_another(model):
    """The same seeds give the same texts; of other seeds and of greedy text most rows differ."""
    chat = Letters(stops="")
    rows = chats(*OWN)
    first, again, other = (generate(model, chat, rows, 12, **WARM, seed=s) for s in (1, 1, 50))
    greedy = generate(model, chat, rows, 12)
    assert first == again
    for texts in (other, greedy):
        assert sum(a != b for a, b in zip(first, texts, strict=True)) >= 5


def test_two_tokens_of_many_seeds_follow_the_model(model):
    """Over 2,000 seeds in a row, p(ab) = p(a) p(b | a) for all pairs, within 4 standard errors."""
    chat, n, text = Letters(stops=""), 2000, OWN[0]
    pairs = generate(model, chat, chats(text) * n, 2, temperature=0.7, top_p=0.9)
    frequency = torch.tensor([[pairs.count(a + b) / n for b in ALPHABET] for a in ALPHABET])
    p = next_letter(model, chat, text)[:, None] * torch.stack(
        [next_letter(model, chat, text + a) for a in ALPHABET]
    )
    limit = 4 * (p * (1 - p) / n).sqrt() + 2 / n  # two more, since rare counts are not normal
    assert ((frequency - p).abs() <= limit).all() and (p > 0.03).sum() > 6


def next_letter(model: Llama, chat: Letters, text: str) -> torch.Tensor:
    """The nucleus of top_p 0.9 at temperature 0.7 after a text, from one whole forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([chat.encode(chats(text)[0], True)[0]]))[0, -1]
    return torch.tensor(nucleus(logits.double().softmax(-1).tolist(), 0.7, 0.9))
