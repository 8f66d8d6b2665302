"""Intervals and paired tests: closed forms, SciPy's own functions, and the edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedlr.report.statistics import Interval, holm, interval, paired

FIRST = [0.71, 0.74, 0.69, 0.80, 0.77, 0.73, 0.78, 0.70]
SECOND = [0.70, 0.70, 0.71, 0.73, 0.72, 0.70, 0.70, 0.69]

p_values = st.lists(st.none() | st.floats(0, 1), max_size=6)


def arm(values: list[float]) -> dict[object, float]:
    return dict(enumerate(values))


def test_two_values_have_the_interval_of_one_degree_of_freedom() -> None:
    # t with one degree is Cauchy: its quantile is tan(π(p - 1/2)), at 0.975 tan(0.475π) = 12.706.
    # s/√n of 0 and 1 is (1/√2)/√2 = 1/2.
    found = interval([0.0, 1.0])
    assert found.high == pytest.approx(0.5 + math.tan(0.475 * math.pi) / 2, rel=1e-9)
    assert found.low == pytest.approx(0.5 - math.tan(0.475 * math.pi) / 2, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_interval_is_that_of_scipy(count: int) -> None:
    values = FIRST[:count]
    theirs = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx(theirs, rel=1e-12)
    assert (found.n, found.mean) == (count, pytest.approx(np.mean(values)))
    assert found.half_width == pytest.approx((theirs[1] - theirs[0]) / 2)


def test_one_value_has_no_interval() -> None:
    assert interval([0.7]) == Interval(1, 0.7, None, None)
    assert interval([0.7]).half_width is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert interval([0.75, 0.75, 0.75]) == Interval(3, 0.75, 0.75, 0.75)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers, at least one"):
        interval(values)


def test_the_paired_test_is_that_of_scipy() -> None:
    found = paired(arm(FIRST), arm(SECOND))
    theirs = stats.ttest_rel(FIRST, SECOND)
    assert found is not None
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    low, high = theirs.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high), rel=1e-9)
    assert found.incomplete == 0


def test_the_paired_test_of_two_pairs_in_closed_form() -> None:
    # Differences 1 and 3: t = 2/(√2/√2) = 2, one degree: p = 1 - 2·arctan(2)/π.
    found = paired({"a": 1.0, "b": 3.0}, {"a": 0.0, "b": 0.0})
    assert found is not None
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi, rel=1e-9)


def test_swapping_the_arms_turns_the_sign_and_nothing_else() -> None:
    there, back = paired(arm(FIRST), arm(SECOND)), paired(arm(SECOND), arm(FIRST))
    assert there is not None
    assert back is not None
    assert there.difference.mean == pytest.approx(-back.difference.mean)
    assert (there.p, there.p_wilcoxon) == pytest.approx((back.p, back.p_wilcoxon))


def test_only_complete_pairs_count() -> None:
    first = {0: 0.5, 1: 0.6, 2: 0.9, 7: 99.0}
    second = {0: 0.4, 1: 0.3, 2: 0.5, 8: -99.0, 9: -99.0}
    found = paired(first, second)
    assert found is not None
    assert (found.n, found.incomplete) == (3, 3)
    assert found.p == pytest.approx(stats.ttest_rel([0.5, 0.6, 0.9], [0.4, 0.3, 0.5]).pvalue)


def test_arms_without_a_common_key_cannot_be_compared() -> None:
    assert paired({0: 0.5}, {1: 0.5}) is None
    assert paired({}, {}) is None


def test_one_pair_has_a_difference_and_no_test() -> None:
    found = paired({0: 0.75}, {0: 0.5})
    assert found is not None
    assert found.difference == Interval(1, 0.25, None, None)
    assert (found.p, found.p_wilcoxon) == (None, None)


def test_differences_without_spread_have_no_test() -> None:
    # 0.3 - 0.2 and 0.8 - 0.7 differ by rounding alone: t would be 10¹⁵ and p 0.
    found = paired({0: 0.3, 1: 0.8}, {0: 0.2, 1: 0.7})
    assert found is not None
    assert found.p is None
    assert found.difference.half_width == pytest.approx(0.0, abs=1e-15)
    same = paired(arm(FIRST), arm(FIRST))
    assert same is not None
    assert (same.difference.mean, same.p, same.p_wilcoxon) == (0.0, None, None)


def signed_rank_by_enumeration(differences: list[float]) -> float:
    """P(|W - E W| ≥ that observed) over all signs, W the sum of the ranks of those above 0."""
    ranks = stats.rankdata(np.abs(differences))
    middle = ranks.sum() / 2
    seen = abs(ranks[np.array(differences) > 0].sum() - middle)
    signs = itertools.product([0, 1], repeat=len(ranks))
    return float(np.mean([abs(np.dot(sign, ranks) - middle) >= seen - 1e-9 for sign in signs]))


@pytest.mark.parametrize(
    "differences",
    [
        [0.01, 0.02, -0.03, 0.04, 0.05, 0.06],
        [0.01, 0.01, -0.01, 0.04, 0.04, 0.06, 0.02],
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    ],
    ids=["exact", "ties", "all above"],
)
def test_the_signed_rank_test_counts_all_signs(differences: list[float]) -> None:
    found = paired(arm(differences), arm([0.0] * len(differences)))
    assert found is not None
    assert found.p_wilcoxon == pytest.approx(signed_rank_by_enumeration(differences))


def test_the_signed_rank_test_is_that_of_scipy() -> None:
    first = [0.1 * index + 0.01 * index**2 for index in range(1, 9)]
    found = paired(arm(first), arm(SECOND))
    assert found is not None
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(first, SECOND).pvalue)


def test_the_signed_rank_test_needs_six_differences() -> None:
    # Five can never do: both tails together are 2/2⁵ = 0.0625.
    five = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    found = paired(arm(five), arm([0.0] * 6))
    assert found is not None
    assert found.p_wilcoxon is None
    six = paired(arm([*five, 6.0]), arm([0.0] * 7))
    assert six is not None
    assert six.p_wilcoxon == pytest.approx(2 / 2**6)


@given(p_values)
def test_holm_is_the_closure_of_bonferroni(found: list[float | None]) -> None:
    """Corrected p: the largest Bonferroni p of any set of hypotheses that this one is in."""
    corrected = holm(found)
    tested = [index for index, p in enumerate(found) if p is not None]
    assert [index for index, p in enumerate(corrected) if p is not None] == tested
    for index in tested:
        closed = max(
            min(1.0, len(subset) * min(found[member] or 0.0 for member in subset))
            for size in range(1, len(tested) + 1)
            for subset in itertools.combinations(tested, size)
            if index in subset
        )
        assert corrected[index] == pytest.approx(closed)


def test_holm_of_a_textbook_example() -> None:
    # 4·0.005, 3·0.01, 2·0.03 and 1·0.04, which may not end below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_interval_covers_the_truth_nineteen_times_of_twenty() -> None:
    """Four standard deviations of the count; an interval of the normal law would fail."""
    draws = np.random.default_rng(7).normal(0.7, 0.02, size=(2_000, 3))
    found = [interval(row.tolist()) for row in draws]
    covered = sum((one.low or 0) <= 0.7 <= (one.high or 0) for one in found)
    assert abs(covered - 1_900) <= 4 * math.sqrt(2_000 * 0.95 * 0.05)
