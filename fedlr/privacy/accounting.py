"""Events → ε: numerical composition (PRV), with Rényi accounting where that fails.

Both accountants are those of Opacus; this file decides when to believe them.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import numpy as np

from fedlr import checks
from fedlr.errors import LedgerError
from fedlr.privacy.events import Release, merge

Accountant = Literal["prv", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("prv", "rdp")

EPSILON_ERROR = 0.001
"""Discretisation error of PRV, added to the returned upper bound."""

_LARGEST_EPSILON_ERROR = 0.1
_MESH_POINTS = 2**22
_TOTAL_MESH_POINTS = 2**24
# exp overflows float64 at 709, and the PRV density holds exp(2t).
_LARGEST_DOMAIN = 300.0
# Opacus's series for fractional orders does not end where σ² underflows.
_SMALLEST_NOISE_MULTIPLIER = 0.01
_EXTRA_ORDERS = (80, 96, 128, 192, 256, 512)

# warnings.catch_warnings is process-wide state, and equal requests should wait for the cache.
_LOCK = threading.Lock()


def epsilon(events: Sequence[Release], delta: float, accountant: Accountant = "prv") -> float:
    """Return an upper bound on the ε of everything in ``events``, composed adaptively.

    ``"prv"`` composes privacy loss random variables by FFT and returns the
    *upper* end of Opacus's interval (its estimate plus discretisation error
    0.001, and δ reduced by the δ error δ/1000). The mesh is bounded to 2²²
    points per event, so for long or very unprivate histories the added error
    grows above 0.001, to 0.1 at most; the value stays an upper bound. The Rényi
    bound is returned instead where PRV fails, is not finite, would need a
    coarser mesh than that, contradicts the closed form of a single step (so is
    no bound at all), or is simply larger.

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
        cached by merged history.

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
        return 0.0
    if min(event.noise_multiplier for event in history) < _SMALLEST_NOISE_MULTIPLIER:
        return math.inf
    return _cached(history, float(delta), accountant)


@lru_cache(maxsize=4096)
def _cached(history: tuple[Release, ...], delta: float, accountant: Accountant) -> float:
    """Return ε of a merged, non-empty history with σ > 0."""
    with _LOCK, _quiet():
        renyi = _renyi(history, delta)
        if accountant == "rdp":
            return renyi
        # Both are upper bounds, so the smaller one is.
        return min(renyi, _numerical(history, delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Opacus: its advice on orders, NumPy's log(0) at q = 1, SciPy's quadrature."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _renyi(history: tuple[Release, ...], delta: float) -> float:
    """Return the Rényi upper bound on ε, ``inf`` where it cannot be computed."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = _triples(history)
    orders = [*RDPAccountant.DEFAULT_ALPHAS, *_EXTRA_ORDERS]
    try:
        value = float(accountant.get_epsilon(delta, alphas=orders))
    except (ArithmeticError, ValueError):
        return math.inf
    return math.inf if math.isnan(value) else max(value, 0.0)


def _numerical(history: tuple[Release, ...], delta: float) -> float:
    """Return the PRV upper bound on ε, ``inf`` where it cannot be computed or believed."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = _triples(history)
    try:
        error = _mesh_error(history, delta)
        if not error <= _LARGEST_EPSILON_ERROR:
            return math.inf
        value = float(accountant.get_epsilon(delta, eps_error=error))
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return math.inf
    if not math.isfinite(value):
        return math.inf
    value = max(value, 0.0)
    if any(_single_step_delta(event, value) > delta for event in history):
        return math.inf
    return value


def _mesh_error(history: tuple[Release, ...], delta: float) -> float:
    """Return the PRV error, 0.001 or what the bounded mesh needs; ``inf``: domain too wide."""
    from opacus.accountants.analysis.prv import (
        PoissonSubsampledGaussianPRV,
        compute_safe_domain_size,
    )

    delta_error = delta / 1000
    variables = [PoissonSubsampledGaussianPRV(e.sample_rate, e.noise_multiplier) for e in history]
    steps = [event.steps for event in history]
    half_width = float(
        compute_safe_domain_size(variables, steps, EPSILON_ERROR, delta_error=delta_error)
    )
    if not half_width < _LARGEST_DOMAIN:
        return math.inf
    # Opacus's mesh: error / √(steps·ln(12/δ_error)/2), over [-half_width, half_width].
    meshes_per_error = math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
    points = min(_MESH_POINTS, _TOTAL_MESH_POINTS // len(history))
    return max(EPSILON_ERROR, 2 * half_width * meshes_per_error / points)


def _single_step_delta(event: Release, epsilon_value: float) -> float:
    """Return the exact δ(ε) of *one* step for removal: a lower bound for any history.

    With P = (1-q)·N(0, σ²) + q·N(1, σ²) and Q = N(0, σ²), the likelihood ratio
    1 - q + q·exp((2x - 1)/(2σ²)) exceeds e^ε exactly for x > x*, and δ(ε) is
    P(x > x*) - e^ε·Q(x > x*).
    """
    sigma, rate = event.noise_multiplier, event.sample_rate
    if epsilon_value > _LARGEST_DOMAIN:
        return 0.0
    ratio = math.expm1(epsilon_value) / rate + 1.0
    threshold = sigma**2 * math.log(ratio) + 0.5
    below = math.erfc(threshold / (sigma * math.sqrt(2))) / 2
    above = math.erfc((threshold - 1) / (sigma * math.sqrt(2))) / 2
    return (1 - rate) * below + rate * above - math.exp(epsilon_value) * below


def _triples(history: tuple[Release, ...]) -> list[tuple[float, float, int]]:
    """Return Opacus's own history: (σ, q, steps)."""
    return [(event.noise_multiplier, event.sample_rate, event.steps) for event in history]
