"""What counts say and what they do not: intervals of shares, paired comparisons.

A share is told with its interval, and two runs are compared on the same inputs: what both get right
or both get wrong says nothing of their difference.
"""

import math
from itertools import product

import torch


def wilson(k: int, n: int, z: float = 1.96) -> dict:
    """k of n with the 95 % interval of the share. Source: Wilson 1927."""
    if n == 0:
        return {"k": 0, "n": 0, "low": 0.0, "high": 1.0}
    p = k / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"k": k, "n": n, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def interval(row: dict) -> str:
    """k of n and its interval in words."""
    return f"{row['k']} of {row['n']} ({100 * row['low']:.0f} to {100 * row['high']:.0f} %)"


def sign_test(wins: int, losses: int) -> float:
    """The chance of a split at least as uneven if a fair coin decided each: exact, two-sided."""
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(ours: list[bool], theirs: list[bool]) -> dict:
    """Compare outcomes on the same inputs: difference of the shares, its bootstrap interval, and p.

    p is that of the exact McNemar test, which is the sign test of the inputs that differ. The
    interval is of 10,000 resamples of the inputs.
    """
    gaps = torch.tensor(ours).double() - torch.tensor(theirs).double()
    only_ours = int((gaps > 0).sum())
    only_theirs = int((gaps < 0).sum())
    draw = torch.Generator().manual_seed(0)
    resamples = torch.randint(len(gaps), (10_000, len(gaps)), generator=draw)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = gaps[resamples].mean(1).quantile(ends).tolist()
    found = {"difference": gaps.mean().item(), "low": low, "high": high}
    found |= {"only_ours": only_ours, "only_theirs": only_theirs}
    return found | {"p": sign_test(only_ours, only_theirs)}


def fisher(k: int, n: int, other: int, m: int) -> float:
    """The chance of counts k of n and other of m at least as uneven if both shares were the same.

    Fisher's exact test, two-sided: for two samples that are not paired input by input.
    """
    ways = [math.comb(n, i) * math.comb(m, k + other - i) for i in range(min(n, k + other) + 1)]
    return sum(each for each in ways if each <= ways[k]) / sum(ways)


def flip_test(gaps: list[float]) -> float:
    """The chance of a sum at least as far from 0 if a fair coin gave each gap its sign: exact,
    two-sided. It cannot be below 2 / 2^n. Source: Fisher 1935.
    """
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=len(gaps))), dtype=torch.float64)
    sums = signs @ torch.tensor(gaps, dtype=torch.float64)
    return (sums.abs() >= abs(sum(gaps)) - 1e-9).double().mean().item()


def clustered_difference(pairs: dict[tuple, tuple[int, int, int]]) -> dict:
    """Compare two ways over (seed, rule): pairs[seed, rule] = (ours right, theirs right, of n).

    The difference of the shares; its interval, of 10,000 resamples of the seeds and of the rules,
    each with replacement; and p, by the flip test of the seeds' differences: what one training does
    to one rule it may do to the next, so that a seed counts once. p cannot be below 2 / 2^differ,
    differ being the seeds whose difference is not 0.
    """
    seeds, rules = (sorted({key[i] for key in pairs}) for i in (0, 1))
    gap = torch.zeros(len(seeds), len(rules), dtype=torch.float64)
    n = torch.zeros_like(gap)
    for (seed, rule), (ours, theirs, size) in pairs.items():
        place = seeds.index(seed), rules.index(rule)
        gap[place] = ours - theirs
        n[place] = size
    draw = torch.Generator().manual_seed(0)
    weights = []
    for names in (seeds, rules):
        drawn = torch.randint(len(names), (10_000, len(names)), generator=draw)
        weights.append(torch.nn.functional.one_hot(drawn, len(names)).sum(1).double())
    gaps, sizes = (((weights[0] @ table) * weights[1]).sum(1) for table in (gap, n))
    shares = (gaps / sizes)[sizes > 0]  # a resample may hold no pair at all
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    gaps = gap.sum(1).tolist()
    found = {"difference": (gap.sum() / n.sum()).item(), "low": low, "high": high}
    return found | {"p": flip_test(gaps), "differ": sum(each != 0 for each in gaps)}
