"""Events → ε: numerical composition (PRV), with Rényi accounting where that fails.

The divergences of whole order are Opacus's; fractional orders are one sum here, and
composition one product of spectra (`fedlr.privacy.composition`), so that a history of a
hundred mechanisms costs about a second. This file decides when to believe the result.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedlr import checks
from fedlr.errors import LedgerError
from fedlr.privacy import composition
from fedlr.privacy.events import Release, merge

Floats = npt.NDArray[np.float64]

Accountant = Literal["prv", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("prv", "rdp")

MOST_MECHANISMS = 128
"""Different mechanisms composed as they are; more are first rounded to the unsafe side."""

# Opacus's series for fractional orders does not end where σ² underflows.
_SMALLEST_NOISE_MULTIPLIER = 0.01
# Of Rényi divergence: any set gives a bound.
_FRACTIONAL_ORDERS = tuple(order / 10 for order in range(11, 110) if order % 10)
_INTEGER_ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 512)
_ORDERS = (*_FRACTIONAL_ORDERS, *_INTEGER_ORDERS)

# warnings.catch_warnings is process-wide state, and equal requests should wait for the cache.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Cost:
    """What a history costs.

    Attributes:
        epsilon: Upper bound on ε.
        accountant: Which accountant gave it: ``"rdp"`` although ``"prv"`` was asked for
            where PRV failed or was larger.
    """

    epsilon: float
    accountant: Accountant


def epsilon(events: Sequence[Release], delta: float, accountant: Accountant = "prv") -> float:
    """Return an upper bound on the ε of everything in ``events``, composed adaptively.

    ``"prv"`` composes privacy loss random variables by FFT, those of removing the unit
    and those of adding it, and returns the larger of the *upper* ends of the intervals
    that discretisation leaves (the estimate plus its error 0.001, and δ reduced by the
    δ error δ/1000). The mesh is bounded to 2²² points per mechanism and 2²⁴ in all, so
    for long or very unprivate histories, and those of many mechanisms, the added error
    grows above 0.001, to 0.1 at most; the value stays an upper bound. The Rényi bound is
    returned instead where PRV fails, is not finite, would need a coarser mesh than that,
    contradicts the closed form of a single step (so is no bound at all), finds losses
    where there can be none, is simply larger, or where δ is so small that the rounding
    of double precision over the steps may reach it.

    Args:
        events: Any number of events, in any order; equal mechanisms are merged
            first, so splitting an event changes nothing. All of one unit.
        delta: δ, in (0, 1).
        accountant: ``"prv"`` or ``"rdp"`` (Rényi alone: looser and faster).

    Returns:
        ε ≥ 0 for add/remove of one unit. The empty history costs 0.0; one step
        with σ = 0 costs ``math.inf``, and so does σ < 0.01, where neither
        accountant is reliable.

    Raises:
        ValueError: δ or the accountant is outside its range.
        LedgerError: Events of different units: a user-level event does not
            bound the change of one row of that user under add/remove.

    Guarantees:
        Pure and deterministic; safe to call from several threads; results are
        cached by merged history. A history of more than 128 different mechanisms
        is replaced by one that it can be computed from (`_coarsen`), so the time
        is bounded, and ε is never below that of the history itself.

    Example:
        >>> epsilon([], delta=1e-5)
        0.0
        >>> 4.37 < epsilon([Release(1.0, 1.0, 1, "example")], delta=1e-5) < 4.39
        True

    Reference:
        Gopi, Lee, Wutschitz 2021 (arXiv 2106.02848), theorem 5.5; Mironov et
        al. 2019 (arXiv 1908.10530), section 3.3; Balle et al. 2020 (arXiv
        1905.09982), theorem 21.
    """
    return cost(events, delta, accountant).epsilon


def cost(events: Sequence[Release], delta: float, accountant: Accountant = "prv") -> Cost:
    """Return `epsilon` of the same arguments, and which accountant gave it."""
    checks.positive("delta", delta)
    if delta >= 1:
        raise ValueError(f"delta = {delta} must be < 1; at 1 nothing is promised")
    checks.one_of("accountant", accountant, ACCOUNTANTS)
    history = merge(events)
    units = sorted({event.unit for event in history})
    if len(units) > 1:
        raise LedgerError(
            f"the events have the units {', '.join(units)} and cannot be composed; "
            "keep one ledger and one unit per data source"
        )
    if not history:
        return Cost(0.0, accountant)
    if min(event.noise_multiplier for event in history) < _SMALLEST_NOISE_MULTIPLIER:
        return Cost(math.inf, accountant)
    return _cached(history, float(delta), accountant)


_ROUNDING_MARGIN = 1000.0
"""Smallest δ, in units of steps·2⁻⁵², that PRV is asked for; it was too small by 1 % at 0.5."""


@lru_cache(maxsize=4096)
def _cached(history: tuple[Release, ...], delta: float, accountant: Accountant) -> Cost:
    """Return the cost of a merged, non-empty history with σ > 0."""
    history = _coarsen(history)
    with _LOCK, _quiet():
        renyi = _renyi(history, delta)
        # Both are upper bounds, so the smaller one is.
        numerical = _numerical(history, delta) if accountant == "prv" else math.inf
    return Cost(numerical, "prv") if numerical < renyi else Cost(renyi, "rdp")


def _coarsen(history: tuple[Release, ...]) -> tuple[Release, ...]:
    """Return at most `MOST_MECHANISMS` mechanisms from whose output that of ``history`` follows.

    σ is rounded down and q up, on a logarithmic grid as fine as the number allows.
    That is never too good: more noise can be added to an output; and one of a lower
    rate q' comes from one of rate q by replacing it, with probability 1 - q'/q, by
    noise alone. Both maps know nothing of the data.
    """
    coarse, step = history, 1e-4
    while len(coarse) > MOST_MECHANISMS:
        width = math.log1p(step)
        coarse = merge(
            replace(
                event,
                noise_multiplier=min(
                    event.noise_multiplier,
                    math.exp(math.floor(math.log(event.noise_multiplier) / width) * width),
                ),
                sample_rate=min(
                    max(
                        event.sample_rate,
                        math.exp(math.ceil(math.log(event.sample_rate) / width) * width),
                    ),
                    1.0,
                ),
            )
            for event in history
        )
        step *= 1.3
    return coarse


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Opacus: its advice on orders, NumPy's log(0) at q = 1."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _renyi(history: tuple[Release, ...], delta: float) -> float:
    """Return the Rényi upper bound on ε, ``inf`` where it cannot be computed."""
    try:
        total = sum(event.steps * _divergences(*_mechanism(event)) for event in history)
        return _from_renyi(total, delta)
    except (ArithmeticError, ValueError):
        return math.inf


@lru_cache(maxsize=4096)
def _divergences(sigma: float, rate: float) -> Floats:
    """Return the Rényi divergence of one step at every order, shape (orders,), read-only.

    Opacus's, but for fractional orders and q < 1: its series takes up to seconds there.
    """
    from opacus.accountants.analysis.rdp import compute_rdp

    def theirs(orders: tuple[float, ...]) -> Floats:
        found: Floats = compute_rdp(
            q=rate, noise_multiplier=sigma, steps=1, orders=list(map(float, orders))
        )
        return found

    fractional = theirs(_FRACTIONAL_ORDERS) if rate == 1 else _fractional(sigma, rate)
    found = np.concatenate([fractional, theirs(_INTEGER_ORDERS)])
    # What rounding can have taken away.
    found = found * (1 + 1e-12) + 1e-12
    found.setflags(write=False)
    return found


def _fractional(sigma: float, rate: float) -> Floats:
    """Return log(E[exp(α·Y)])/(α - 1) for every fractional order α, by equal spacing.

    Y is the privacy loss of x ~ N(0, σ²). The integrand is a Gaussian around a point
    in [0, α] times an analytic function, see `composition.means`.
    """
    x, width = composition.nodes(sigma, max(_FRACTIONAL_ORDERS))
    loss = composition.loss(x, sigma, rate)
    base = math.log(width / (sigma * math.sqrt(2 * math.pi))) - (x / sigma) ** 2 / 2
    moments = [np.logaddexp.reduce(base + order * loss) for order in _FRACTIONAL_ORDERS]
    found: Floats = np.array(moments) / (np.array(_FRACTIONAL_ORDERS) - 1)
    return found


def _from_renyi(divergences: Floats | int, delta: float) -> float:
    """Return ε of the divergences at every order; ``inf`` where that is not a number."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    value = float(get_privacy_spent(orders=list(_ORDERS), rdp=divergences, delta=delta)[0])
    return math.inf if math.isnan(value) else max(value, 0.0)


def _numerical(history: tuple[Release, ...], delta: float) -> float:
    """Return the PRV upper bound on ε, ``inf`` where it cannot be computed or believed."""
    try:
        if delta < _ROUNDING_MARGIN * sum(event.steps for event in history) * 2.0**-52:
            return math.inf  # what double precision loses in the spectra is no longer below δ
        half_width = _half_width(history, delta / 1000)
        value = composition.upper_epsilon(history, delta, half_width)
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return math.inf
    if not math.isfinite(value):
        return math.inf
    value = max(value, 0.0)
    if any(composition.single_step_delta(event, value) > delta for event in history):
        return math.inf
    return value


def _half_width(history: tuple[Release, ...], delta_error: float) -> float:
    """Return W: the privacy loss, of all and of each step, is in [-W, W] but for δ_error.

    Remark 5.6 of Gopi et al. as Opacus reads it, with Rényi bounds. (ε, δ) bounds the tail:
    P(loss > ε + x) ≤ δ/(1 - exp(-x)), so that 2 of the 3 that are added would do.
    """
    steps = sum(event.steps for event in history)
    single = [_divergences(*_mechanism(event)) for event in history]
    total = sum(event.steps * found for event, found in zip(history, single, strict=True))
    widest = max(_from_renyi(found, delta_error / (8 * steps)) for found in single)
    return max(_from_renyi(total, delta_error / 4), widest, composition.EPSILON_ERROR) + 3


def _mechanism(event: Release) -> tuple[float, float]:
    """Return (σ, q)."""
    return event.noise_multiplier, event.sample_rate
