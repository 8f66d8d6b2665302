"""Target (ε, δ) → noise multiplier, on the private side of a stated tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from fedlr import checks
from fedlr.privacy.accounting import ACCOUNTANTS, Accountant, epsilon
from fedlr.privacy.events import Release

LARGEST_NOISE_MULTIPLIER = 1e6
"""Where the search gives up: no update survives that much noise."""

_EVALUATIONS = 60


def noise_multiplier(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "prv",
    tolerance: float = 0.002,
) -> float:
    """Return σ for ``steps`` Poisson-subsampled Gaussian releases of at most the target ε.

    Args:
        target_epsilon: ε > 0 that may not be exceeded.
        delta: δ, in (0, 1).
        sample_rate: q, in (0, 1].
        steps: The *largest* number of releases that may happen, ≥ 1. Calibrating
            for an expected number exceeds the budget whenever more happen.
        accountant: As in `fedlr.privacy.accounting.epsilon`.
        tolerance: Relative slack, in [1e-4, 0.5].

    Returns:
        σ > 0 with (1 - tolerance)·target ≤ ε(σ) ≤ target, evaluated by
        `fedlr.privacy.accounting.epsilon`. The upper inequality always holds;
        the lower one fails only where that function jumps across the whole
        tolerance band, which happens where PRV stops being usable (ε in the
        hundreds, or σ so small that one step's loss is), and where nothing costs
        enough: with q·steps < δ no σ need reach the target.

    Raises:
        ValueError: An argument is outside its range, or the target cannot be
            reached with σ ≤ 10⁶.

    Guarantees:
        Pure, deterministic and cached. The Rényi bound, several times faster, gives
        the first guess, so PRV is evaluated about four times.

    Example:
        >>> sigma = noise_multiplier(1.0, 1e-5, sample_rate=0.05, steps=20)
        >>> 0.998 <= epsilon([Release(sigma, 0.05, 20, "example")], 1e-5) <= 1.0
        True
    """
    checks.positive("target_epsilon", target_epsilon)
    checks.in_range("tolerance", tolerance, 1e-4, 0.5)
    if checks.at_least("steps", steps, 0) == 0:
        raise ValueError("steps = 0 must be ≥ 1; zero releases need no noise, skip the calibration")
    checks.one_of("accountant", accountant, ACCOUNTANTS)
    checks.in_range("sample_rate", sample_rate, 0.0, 1.0)
    checks.positive("sample_rate", sample_rate)
    checks.positive("delta", delta)
    return _cached(
        float(target_epsilon), float(delta), float(sample_rate), steps, accountant, float(tolerance)
    )


@lru_cache(maxsize=4096)
def _cached(
    target: float, delta: float, rate: float, steps: int, accountant: Accountant, tolerance: float
) -> float:
    """Search for checked arguments: by Rényi first, then by the wanted accountant."""

    def evaluate(sigma: float, by: Accountant) -> float:
        return epsilon([Release(sigma, rate, steps, "example")], delta, by)

    rough = tolerance if accountant == "rdp" else max(tolerance, 0.05)
    guess = _search(lambda sigma: evaluate(sigma, "rdp"), 1.0, target, rough)
    if accountant == "prv":
        start = 1.0 if guess is None else guess
        guess = _search(lambda sigma: evaluate(sigma, "prv"), start, target, tolerance)
    if guess is None:
        raise ValueError(
            f"target_epsilon = {target} cannot be reached with noise_multiplier ≤ "
            f"{LARGEST_NOISE_MULTIPLIER:g} at delta = {delta}, sample_rate = {rate}, "
            f"steps = {steps}; raise the target or delta, or lower the steps"
        )
    return guess


def _search(
    evaluate: Callable[[float], float], start: float, target: float, tolerance: float
) -> float | None:
    """Return σ with ε(σ) in [(1 - tolerance)·target, target], or None if out of reach.

    A bracket in log σ, narrowed by interpolation of log ε, which is nearly
    linear there; where the band is jumped over, its private end.
    """
    aim = target * (1 - tolerance / 4)
    sigma, private, over = start, None, None
    for _ in range(_EVALUATIONS):
        value = evaluate(sigma)
        if value > target:
            over = (sigma, value)
        elif value >= (1 - tolerance) * target:
            return sigma
        else:
            private = (sigma, value)
        if private is None and sigma >= LARGEST_NOISE_MULTIPLIER:
            return None
        if private and over and private[0] < over[0] * (1 + 1e-9):
            break
        sigma = _next(private, over, sigma, value, aim)
    return private[0] if private else None


def _next(
    private: tuple[float, float] | None,
    over: tuple[float, float] | None,
    sigma: float,
    value: float,
    aim: float,
) -> float:
    """Return the next σ to try: inside the bracket, or beyond its known end."""
    if private is None or over is None:
        # ε falls roughly as 1/σ; a step of at least 5 % and at most 4-fold.
        factor = min(max(value / aim, 0.25), 4.0)
        factor = max(factor, 1.05) if private is None else min(factor, 1 / 1.05)
        return min(sigma * factor, LARGEST_NOISE_MULTIPLIER)
    low, high = math.log(over[0]), math.log(private[0])
    share = 0.5
    if math.isfinite(over[1]) and private[1] > 0:
        share = math.log(over[1] / aim) / math.log(over[1] / private[1])
    return math.exp(low + min(max(share, 0.05), 0.95) * (high - low))
