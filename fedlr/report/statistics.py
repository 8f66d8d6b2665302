"""Means with their intervals, paired differences and their tests: what repeats of a run say.

SciPy does the arithmetic: `scipy.stats.t` (quantiles), `scipy.stats.ttest_1samp` (t test of
differences against 0, which is the paired t test) and `scipy.stats.wilcoxon`. Holm's
correction is not in SciPy and is four lines here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

LEVEL = 0.95
"""Confidence of every interval."""

FEWEST_FOR_WILCOXON = 6
"""Below, no outcome of a two-sided signed-rank test can reach 0.05: 2/2⁵ > 0.05 ≥ 2/2⁶."""

_SAME = 1e-12
"""Accuracies are shares of some thousand examples: what differs by less differs by rounding."""


@dataclass(frozen=True)
class Interval:
    """A mean and how well it is known.

    Attributes:
        n: Number of values, ≥ 1.
        mean: Their mean.
        low: Lower end of the `LEVEL` interval of Student's t; None for n = 1, which says
            nothing of the spread.
        high: Upper end.
    """

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length; None without one."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Paired:
    """One arm against another over pairs that agree in everything else.

    Attributes:
        difference: Mean of first - second over the complete pairs, with its interval.
        p: Two-sided p value of the paired t test; None for one pair, and where all
            differences are equal: their spread, by which t divides, is 0.
        p_wilcoxon: Two-sided p value of the signed-rank test; None where fewer than
            `FEWEST_FOR_WILCOXON` differences are not 0.
        incomplete: Keys that only one of the arms has; they do not count.
    """

    difference: Interval
    p: float | None
    p_wilcoxon: float | None
    incomplete: int

    @property
    def n(self) -> int:
        """Number of complete pairs."""
        return self.difference.n


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of ``values`` and its 95 % interval, mean ± t·s/√n with n - 1 degrees.

    Args:
        values: Finite numbers, at least one; order does not matter.

    Raises:
        ValueError: There are none, or one is not finite.

    Example:
        >>> interval([0.5]).low is None, interval([0.5, 0.5]).low
        (True, 0.5)
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values = {list(values)} must be finite numbers, at least one")
    from scipy.stats import t

    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(1, mean, None, None)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * _spread(values) / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def paired(first: Mapping[Key, float], second: Mapping[Key, float]) -> Paired | None:
    """Compare two arms over the keys that both have.

    Args:
        first: Result by key, such as the seed; finite.
        second: That of the other arm.

    Returns:
        The comparison; None where no key is in both.

    Example:
        >>> found = paired({0: 0.5, 1: 0.75, 2: 1.0}, {0: 0.25, 1: 0.25})
        >>> found.n, found.incomplete, found.difference.mean
        (2, 1, 0.375)
    """
    common = [key for key in first if key in second]
    if not common:
        return None
    differences = [first[key] - second[key] for key in common]
    return Paired(
        difference=interval(differences),
        p=_t_test(differences),
        p_wilcoxon=_signed_rank(differences),
        incomplete=len(first) + len(second) - 2 * len(common),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for there being several, by Holm's step-down method.

    The i-th smallest of m is multiplied by m - i + 1, and none ends below a smaller one.
    Rejecting where the result is ≤ α bounds the chance of any false rejection by α, however
    the tests depend on each other.

    Args:
        p_values: In [0, 1]; None is no test and is not counted.

    Returns:
        In the same order, at most 1; None where None was.

    Example:
        >>> holm([0.5, None, 0.015625, 0.25])
        [0.5, None, 0.046875, 0.5]

    Reference:
        Holm 1979, Scandinavian Journal of Statistics 6, pages 65-70.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - place)))
        corrected[index] = largest
    return corrected


def _t_test(differences: Sequence[float]) -> float | None:
    """Return p of the one-sample t test against 0, which is that of the paired t test."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or _spread(differences) == 0:
        return None
    return float(ttest_1samp(differences, 0.0).pvalue)


def _signed_rank(differences: Sequence[float]) -> float | None:
    """Return p of Wilcoxon's test; zeros are left out, and ties enumerated where n allows it."""
    from scipy.stats import PermutationMethod, wilcoxon

    moved = [round(value, 12) for value in differences if abs(value) > _SAME]
    if len(moved) < FEWEST_FOR_WILCOXON:
        return None
    if len({abs(value) for value in moved}) == len(moved):
        return float(wilcoxon(moved).pvalue)
    # The table of exact p values knows no ties, and the normal approximation few values: for
    # 2ⁿ ≤ 9999 SciPy goes through all signs, beyond that the approximation is good.
    if len(moved) <= 13:
        return float(wilcoxon(moved, method=PermutationMethod(n_resamples=9_999)).pvalue)
    return float(wilcoxon(moved, method="asymptotic").pvalue)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation with n - 1; 0.0 where it is rounding alone."""
    found = statistics.stdev(values)
    return 0.0 if found <= _SAME else found
