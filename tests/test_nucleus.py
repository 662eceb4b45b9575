"""The nucleus: pick takes one of the fewest likeliest tokens that reach top_p, and no other."""

import pytest
import torch

from sampler import pick, pick_by_definition


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
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log().requires_grad_()
    assert pick(logits, torch.tensor([0.99, 0.99]), 1.0, 0.8).tolist() == [0, 1]
    assert pick(logits, torch.tensor([0.95, 0.95]), 1.0, 1.0).tolist() == [1, 0]


@pytest.mark.parametrize("digits", [0, 1, 6])
@pytest.mark.parametrize("scale", [0.0, 1.0, 9.0])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_same_choice_as_by_definition(top_p, scale, digits):
    """On flat and on peaked rows; rounded to few digits, hundreds of tokens are as probable."""
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(64, 5000, generator=generator)).round(decimals=digits)
    u = torch.rand(64, generator=generator)
    assert torch.equal(pick(logits, u, 0.7, top_p), pick_by_definition(logits, u, 0.7, top_p))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_still_gives_a_token(bad):
    """The sampler finds out later, and until then looks the token up."""
    logits = torch.full((2, 40), bad)
    logits[1, 3:] = 0
    tokens = pick(logits, torch.tensor([0.5, 0.999]), 1.0, 0.9)
    assert ((tokens >= 0) & (tokens < 40)).all()
