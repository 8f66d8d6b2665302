"""Correct guesses → a lower bound on ε: the binomial tail of one-run auditing, with its δ-term.

The README of this package states the theorem and derives both terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlr import checks

_STEP = 0.05
_BISECTIONS = 40


@dataclass(frozen=True)
class Guesses:
    """What the auditor guessed about canaries that were included by fair, independent coins.

    Attributes:
        canaries: m ≥ 1, number of coins.
        guesses: r ≤ m, coins that were guessed; the auditor abstained on the others.
        correct: v ≤ r, guesses that were right.

    Raises:
        ValueError: A number is outside its range.
    """

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        checks.at_least("canaries", self.canaries, 1)
        checks.at_least("guesses", self.guesses, 0)
        checks.at_least("correct", self.correct, 0)
        if not self.correct <= self.guesses <= self.canaries:
            raise ValueError(
                f"correct = {self.correct} ≤ guesses = {self.guesses} ≤ canaries = "
                f"{self.canaries} must hold"
            )


def p_value(found: Guesses, epsilon: float, delta: float) -> float:
    """Return the most probable that so many correct guesses are under (ε, δ)-privacy.

    Args:
        found: m, r and v; r was fixed before anything was released.
        epsilon: ε ≥ 0 of the hypothesis.
        delta: δ of the hypothesis, in [0, 1].

    Returns:
        min(1, β + 2mδ·α) with B ~ Binomial(r, e^ε/(1 + e^ε)), β = P[B ≥ v] and
        α = max over 1 ≤ i ≤ v of P[v > B ≥ v - i] / i.

    Raises:
        ValueError: ε or δ is outside its range.

    Example:
        >>> round(p_value(Guesses(10, 10, 10), epsilon=0.0, delta=0.0) * 2**10, 6)
        1.0

    Reference:
        Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), theorem 5.2 and appendix D.
    """
    checks.non_negative("epsilon", epsilon)
    checks.in_range("delta", delta, 0.0, 1.0)
    masses = _binomial(found.guesses, epsilon)
    tail = float(masses[found.correct :].sum())
    if delta == 0 or found.correct == 0:
        return min(1.0, tail)
    below = np.cumsum(masses[: found.correct][::-1])
    slope = float((below / np.arange(1, found.correct + 1)).max())
    return min(1.0, tail + 2 * found.canaries * delta * slope)


def epsilon_lower_bound(found: Guesses, delta: float, confidence: float) -> float:
    """Return ε such that, at this confidence, no smaller ε holds with δ.

    Args:
        found: m, r and v.
        delta: δ of the claim, in [0, 1].
        confidence: In [0.5, 1): 1 minus the probability that the result exceeds the ε
            of a mechanism that is (ε, δ)-private.

    Returns:
        The first ε ≥ 0 at which `p_value` reaches 1 - confidence, rounded down by less
        than 1e-9: everything below it is rejected. 0.0 where ε = 0 is not rejected.

    Raises:
        ValueError: δ or the confidence is outside its range.

    Example:
        >>> epsilon_lower_bound(Guesses(100, 100, 50), delta=0.0, confidence=0.95)
        0.0
    """
    checks.in_range("confidence", confidence, 0.5, 1.0 - 1e-12)
    level = 1.0 - confidence
    if p_value(found, 0.0, delta) >= level:
        return 0.0
    # Upwards in small steps, not by doubling: the δ-term need not grow with ε, and the
    # argument for the confidence needs the *first* crossing.
    low = 0.0
    while p_value(found, low + _STEP, delta) < level:
        low += _STEP
    high = low + _STEP
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if p_value(found, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def largest_bound(canaries: int, guesses: int, delta: float, confidence: float) -> float:
    """Return the bound that an auditor gets whose every guess is right; no audit shows more.

    Example:
        >>> 4.1 < largest_bound(1000, 200, delta=1e-5, confidence=0.95) < 4.2
        True
    """
    return epsilon_lower_bound(Guesses(canaries, guesses, guesses), delta, confidence)


def _binomial(trials: int, epsilon: float) -> npt.NDArray[np.float64]:
    """Return P[B = k] for k = 0 … r, shape (r + 1,), B ~ Binomial(r, e^ε/(1 + e^ε))."""
    k = np.arange(trials + 1, dtype=np.float64)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(trials - k[:-1]) - np.log(k[1:]))])
    log_right = -math.log1p(math.exp(-epsilon))
    return np.exp(log_choose + k * log_right + (trials - k) * (log_right - epsilon))
