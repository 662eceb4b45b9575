"""Intervals and paired comparisons, by hand."""

import pytest

from stats import clustered_difference, fisher, flip_test, paired_difference, wilson


def test_wilson_is_the_interval_of_the_textbook():
    """The ends p solve (p - k/n)^2 = z^2 p (1 - p) / n; 47 of 50 is 84 to 98 %."""
    for k, n in ((47, 50), (0, 50), (50, 50), (1, 3)):
        row = wilson(k, n)
        for p in (row["low"], row["high"]):
            assert (p - k / n) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)
    assert [round(100 * wilson(47, 50)[end]) for end in ("low", "high")] == [84, 98]
    assert wilson(0, 0)["high"] == 1


def test_two_runs_are_compared_input_by_input():
    """3 inputs only ours, 1 only theirs, of 10: +20 points; p = 2 (1 + 4) / 2^4, by hand."""
    ours = [True] * 8 + [False] * 2
    theirs = [True] * 5 + [False] * 3 + [True, False]
    found = paired_difference(ours, theirs)
    assert found["difference"] == pytest.approx(0.2)
    assert (found["only_ours"], found["only_theirs"]) == (3, 1)
    assert found["p"] == pytest.approx(2 * (1 + 4) / 16)
    assert found["low"] < 0.2 < found["high"]
    turned = paired_difference(theirs, ours)
    assert turned["p"] == found["p"] and turned["difference"] == pytest.approx(-0.2)


def test_a_difference_of_many_pairs_can_be_told():
    """10 inputs only ours and none theirs: p = 2 / 2^10, and the interval leaves 0 out."""
    found = paired_difference([True] * 40, [True] * 30 + [False] * 10)
    assert found["p"] == pytest.approx(2 / 1024) and found["low"] > 0
    same = paired_difference([True, False] * 9, [True, False] * 9)
    assert (same["p"], same["low"], same["high"]) == (1, 0, 0)


def test_fisher_is_the_lady_who_tastes_tea():
    """3 of 4 against 1 of 4: (1 + 16 + 16 + 1) / 70 of all ways are at least as uneven."""
    assert fisher(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert fisher(4, 4, 0, 4) == fisher(0, 4, 4, 4) == pytest.approx(2 / 70)
    assert fisher(2, 4, 2, 4) == pytest.approx(1)
    assert fisher(0, 3, 2, 5) == pytest.approx((10 + 3) / 28)  # of 0, 1, 2: 10, 15 and 3 ways


def test_the_flip_test_by_hand():
    """Of the eight signs of 1, 2, 3 only two sum up to 6 in size; of 1, 1, -2 all that sum to 0 or
    more do, which are all. Gaps of 0 tell nothing.
    """
    assert flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert flip_test([1.0, 1.0, -2.0]) == 1 and flip_test([0.0, 0.0]) == 1
    assert flip_test([5.0]) == 1 and flip_test([0.1] * 10) == 2 / 1024


def test_a_difference_over_seeds_and_rules():
    """1 of 4 and 3 of 4 more are 4 of 8; the interval spans seeds and rules; p counts a seed once,
    so two rules of one seed that gain are no evidence by themselves.
    """
    found = clustered_difference({(0, "a"): (1, 0, 4), (1, "b"): (3, 0, 4)})
    assert found["difference"] == 0.5 and found["p"] == 2 / 4
    assert found["low"] == pytest.approx(0.25) and found["high"] == pytest.approx(0.75)
    alone = clustered_difference({(0, rule): (4, 0, 4) for rule in "abcdef"})
    assert (alone["difference"], alone["low"], alone["p"]) == (1, 1, 1)
    none = clustered_difference({(seed, "a"): (2, 2, 4) for seed in range(8)})
    assert (none["difference"], none["low"], none["high"], none["p"]) == (0, 0, 0, 1)
