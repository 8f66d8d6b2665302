"""A 95 % interval of a median from its order statistics.

Distribution-free: for independent draws of any continuous law the number of draws
below the median is Binomial(n, ½), so that [X₍ₖ₎, X₍ₙ₊₁₋ₖ₎] covers it with probability
1 − 2·P(Bin(n, ½) < k), whatever the law. Times are skewed and have outliers; a
bootstrap percentile interval of so few pairs covers less than it says, this one never.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Least probability that an interval covers the median."""


@dataclass(frozen=True)
class Spread:
    """A median with its interval.

    Attributes:
        count: n, number of values.
        median: Their median.
        low: Lower end of the interval; None where n is too small for one (n < 6).
        high: Upper end; None likewise.
    """

    count: int
    median: float
    low: float | None
    high: float | None


def rank(count: int, level: float = LEVEL) -> int | None:
    """Return the largest k with coverage ≥ ``level``; None where even k = 1 covers less.

    Args:
        count: n ≥ 0.
        level: Least coverage, in (0, 1).

    Example:
        >>> [rank(count) for count in (5, 6, 8, 9, 30)]
        [None, 1, 1, 2, 10]
    """
    found, outside = None, 0.0
    for k in range(1, count // 2 + 1):
        outside += 2 * math.comb(count, k - 1) * 0.5**count
        if 1 - outside < level:
            break
        found = k
    return found


def spread(values: Sequence[float], level: float = LEVEL) -> Spread:
    """Return median and interval of ``values``.

    Raises:
        ValueError: No value, or one that is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values = {list(values)} must be at least one finite number")
    ordered, k = sorted(values), rank(len(values), level)
    low, high = (None, None) if k is None else (ordered[k - 1], ordered[-k])
    return Spread(len(ordered), statistics.median(ordered), low, high)
