"""ε against closed forms and an independent accountant; PRV distrusted where it is wrong."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedlr.errors import LedgerError
from fedlr.privacy import accounting, composition
from fedlr.privacy.accounting import Cost, cost, epsilon
from fedlr.privacy.events import Release, merge

DELTA = 1e-5


def release(sigma: float, rate: float, steps: int) -> Release:
    return Release(sigma, rate, steps, "example")


def pld_of_history(events: Sequence[Release], delta: float) -> float:
    """ε by privacy loss distributions, of dp-accounting: the other implementation."""
    from dp_accounting import dp_event  # type: ignore[import-untyped]
    from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped]

    logging.disable(logging.WARNING)
    try:
        wide = min(event.noise_multiplier for event in events) > 3
        accountant = PLDAccountant(value_discretization_interval=1e-5 if wide else 1e-4)
        for event in events:
            noise = dp_event.GaussianDpEvent(event.noise_multiplier)
            sampled = dp_event.PoissonSampledDpEvent(event.sample_rate, noise)
            accountant.compose(sampled, event.steps)
        return float(accountant.get_epsilon(delta))
    finally:
        logging.disable(logging.NOTSET)


@cache
def pld_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    return pld_of_history([release(sigma, rate, steps)], delta)


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """ε of ``steps`` Gaussian mechanisms (q = 1), exactly.

    k outputs x_i ~ N(μ, σ²) with μ = 0 or 1 have the sufficient statistic
    mean(x) ~ N(μ, σ²/k): one Gaussian mechanism with s = σ/√k. Its privacy loss
    under μ = 1 is N(1/(2s²), 1/s²), and P(loss > ε) - e^ε·Q(loss > ε) is
    Φ(1/(2s) - εs) - e^ε·Φ(-1/(2s) - εs) = δ(ε): Balle and Wang 2018, theorem 8.
    """
    s = sigma / math.sqrt(steps)

    def excess(value: float) -> float:
        tail = math.exp(value + stats.norm.logcdf(-1 / (2 * s) - value * s))
        return float(stats.norm.cdf(1 / (2 * s) - value * s) - tail - delta)

    return float(optimize.brentq(excess, 0, 500, xtol=1e-10))


def assert_close(value: float, truth: float) -> None:
    """Within 1 %, or 0.01 where ε < 1, and not below by more than rounding."""
    assert truth - 2e-3 * max(truth, 1) <= value
    assert abs(value - truth) <= 0.01 * max(truth, 1)


FAST = [(1.0, 0.01, 200), (0.6, 0.02, 100), (4.0, 0.3, 100), (1.5, 1.0, 10)]
GRID = list(product((0.5, 0.8, 1.5, 5.0), (1e-3, 0.0263, 1 / 3, 1.0), (1, 50, 1000)))
GRID += [(1.5, 1.0, 25), (0.6, 0.05, 400), (2.5, 1 / 3, 300)]


@pytest.mark.parametrize("cell", FAST)
def test_prv_agrees_with_pld(cell: tuple[float, float, int]) -> None:
    assert_close(epsilon([release(*cell)], DELTA), pld_epsilon(*cell, DELTA))


def test_a_mixed_history_agrees_with_pld() -> None:
    events = [release(1.0, 0.02, 90), release(0.8, 0.05, 7), release(3.0, 0.5, 21)]
    assert_close(epsilon(events, DELTA), pld_of_history(events, DELTA))


@pytest.mark.slow
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_prv_agrees_with_pld_on_the_grid(delta: float) -> None:
    reached, worst = [], 0.0
    for cell in GRID:
        value, truth = epsilon([release(*cell)], delta), pld_epsilon(*cell, delta)
        assert epsilon([release(*cell)], delta, "rdp") >= max(value, truth)
        # Above ε = 60 the domain bound lets Rényi take over: an upper bound, less tight.
        if truth > 60:
            assert truth <= value <= 1.25 * truth
            continue
        assert_close(value, truth)
        if 0.1 <= truth <= 20:
            reached.append(truth)
            worst = max(worst, abs(value - truth) / max(truth, 1))
    ends = f"{min(reached):.2f} to {max(reached):.2f}"
    print(f"\nδ = {delta}: {len(reached)} cells, ε {ends}, differ by {100 * worst:.2f} % at most")
    assert len(reached) >= 20
    assert min(reached) < 0.2
    assert max(reached) > 15


@pytest.mark.parametrize(("sigma", "steps"), [(5.0, 1), (2.0, 3), (8.0, 200), (40.0, 10)])
def test_full_batches_follow_the_closed_form(sigma: float, steps: int) -> None:
    truth = gaussian_epsilon(sigma, steps, DELTA)
    value = epsilon([release(sigma, 1.0, steps)], DELTA)
    assert truth <= value <= truth + 2e-3
    assert truth <= epsilon([release(sigma, 1.0, steps)], DELTA, "rdp")


def test_mixed_gaussians_add_their_precisions() -> None:
    # Σ steps/σ² = 4/4² + 9/6² = 1/2, as one Gaussian of σ = √2.
    value = epsilon([release(4.0, 1.0, 4), release(6.0, 1.0, 9)], DELTA)
    truth = gaussian_epsilon(math.sqrt(2), 1, DELTA)
    assert truth <= value <= truth + 2e-3


@pytest.mark.parametrize("cell", [*FAST[:2], (20.0, 1e-3, 10), (0.5, 0.5, 2)])
def test_renyi_is_never_below_prv_nor_below_pld(cell: tuple[float, float, int]) -> None:
    renyi = epsilon([release(*cell)], DELTA, "rdp")
    assert epsilon([release(*cell)], DELTA, "prv") <= renyi
    assert pld_epsilon(*cell, DELTA) <= renyi


def test_splitting_and_reordering_change_nothing() -> None:
    whole = [release(1.0, 0.01, 200), release(2.0, 0.05, 30)]
    split = [release(2.0, 0.05, 10), release(1.0, 0.01, 199), release(2.0, 0.05, 20)]
    split.append(release(1.0, 0.01, 1))
    assert epsilon(split, DELTA) == epsilon(whole, DELTA)


def test_composition_costs_more_than_its_parts_and_no_more_than_their_sum() -> None:
    first, second = [release(1.0, 0.01, 200)], [release(2.0, 0.05, 30)]
    together = epsilon(first + second, DELTA)
    parts = [epsilon(part, DELTA / 2) for part in (first, second)]
    assert max(epsilon(first, DELTA), epsilon(second, DELTA)) < together < sum(parts)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_monotone_in_steps_rate_noise_and_delta(accountant: accounting.Accountant) -> None:
    def value(sigma: float, rate: float, steps: int, delta: float) -> float:
        return epsilon([release(sigma, rate, steps)], delta, accountant)

    chains = [
        [value(1.2, 0.02, steps, DELTA) for steps in (10, 11, 50)],
        [value(1.2, rate, 50, DELTA) for rate in (0.01, 0.02, 0.021, 0.1)],
        [value(sigma, 0.02, 50, DELTA) for sigma in (5.0, 1.3, 1.2, 0.7)],
        [value(1.2, 0.02, 50, delta) for delta in (1e-3, 1e-5, 1e-6, 1e-9)],
    ]
    for chain in chains:
        assert all(low < high for low, high in pairwise(chain))


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], DELTA) == 0.0
    assert epsilon([release(0.0, 0.1, 0)], DELTA) == 0.0
    assert epsilon([release(0.0, 0.1, 1)], DELTA) == math.inf
    assert epsilon([release(1.0, 0.1, 9), release(0.0, 1e-9, 1)], DELTA) == math.inf


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
def test_more_steps_than_a_double_can_count_cost_everything(
    accountant: accounting.Accountant,
) -> None:
    assert epsilon([release(1.0, 0.1, 10**400)], DELTA, accountant) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan"), 2.0])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([], delta)


def test_units_are_not_mixed() -> None:
    with pytest.raises(LedgerError, match="unit"):
        epsilon([release(1.0, 0.1, 1), Release(1.0, 0.1, 1, "user")], DELTA)


@pytest.mark.parametrize(
    "answer", [float("nan"), math.inf, -1.0, 0.01, 1e9, RuntimeError("diverged")]
)
def test_renyi_takes_over_where_prv_is_not_a_bound(
    answer: float | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def composed(*arguments: object) -> float:
        if isinstance(answer, Exception):
            raise answer
        return answer

    events = [release(0.9, 0.1, 2)]
    monkeypatch.setattr(composition, "composed", composed)
    accounting._cached.cache_clear()
    try:
        assert cost(events, DELTA) == Cost(epsilon(events, DELTA, "rdp"), "rdp")
    finally:
        accounting._cached.cache_clear()


@pytest.mark.parametrize("cell", [(0.05, 0.5, 1000), (0.3, 1.0, 10**6), (0.011, 1e-9, 10**7)])
def test_extreme_histories_end_quickly_with_an_upper_bound(cell: tuple[float, float, int]) -> None:
    assert epsilon([release(*cell)], DELTA) == epsilon([release(*cell)], DELTA, "rdp") > 100


@pytest.mark.parametrize(
    ("sigma", "rate"), [(0.05, 0.5), (0.3, 0.2), (1.0, 1e-4), (5.0, 0.3), (20.0, 0.5)]
)
def test_fractional_orders_are_those_of_opacus_and_fit_between_the_whole_ones(
    sigma: float, rate: float
) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    found = dict(zip(accounting._ORDERS, accounting._divergences(sigma, rate), strict=True))
    orders = [1.1, 1.5, 2.5, 10.9]
    theirs = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders)
    mine = [found[order] for order in orders]
    assert mine == pytest.approx(list(theirs), rel=1e-9, abs=1e-11)
    # Rényi divergence rises with its order.
    rising = [found[order] for order in sorted(found)]
    assert all(low <= high * (1 + 1e-9) + 1e-11 for low, high in pairwise(rising))


@pytest.mark.parametrize(
    ("sigma", "rate"),
    [
        (7.05446, 1.755e-10),
        (7.650604349321118, 2.8131997359364665e-11),
        (16.249772586087552, 1.1170721572001577e-09),
    ],
)
def test_no_divergence_is_rounded_to_nothing(sigma: float, rate: float) -> None:
    assert (accounting._divergences(sigma, rate) > 0).all()


def test_a_hundred_different_gaussians_follow_the_closed_form() -> None:
    events = [release(20 + number / 10, 1.0, 5) for number in range(100)]
    precision = sum(event.steps / event.noise_multiplier**2 for event in events)
    truth = gaussian_epsilon(precision**-0.5, 1, DELTA)
    # What 2²⁴ mesh points leave for a hundred mechanisms: 1 %.
    assert truth <= epsilon(events, DELTA) <= 1.01 * truth


def test_a_long_history_of_different_events_lies_between_its_ends() -> None:
    many = [release(2 + number / 100, 0.01, 40) for number in range(6)]
    value = epsilon(many, DELTA)
    assert epsilon([release(2.05, 0.01, 240)], DELTA) < value
    assert value < epsilon([release(2.0, 0.01, 240)], DELTA)


def test_too_many_mechanisms_are_rounded_to_the_unsafe_side_and_cost_little_more() -> None:
    events = merge(release(30 + n / 100, 1 - (n % 7) / 1000, 1) for n in range(500))
    coarse = accounting._coarsen(events)
    assert 50 <= len(coarse) <= accounting.MOST_MECHANISMS < len(events)
    assert sum(event.steps for event in coarse) == 500
    assert min(e.noise_multiplier for e in coarse) <= 30
    assert max(e.noise_multiplier for e in coarse) <= max(e.noise_multiplier for e in events)
    assert min(e.sample_rate for e in coarse) >= min(e.sample_rate for e in events)
    assert max(e.sample_rate for e in coarse) == 1.0
    # Between the closed forms of the same noise at q = 1 and of all noise at its least, but 3 %.
    precision = sum(event.noise_multiplier**-2 for event in events)
    full = gaussian_epsilon(precision**-0.5, 1, DELTA)
    assert 0.98 * full <= epsilon(events, DELTA) <= 1.03 * full


@given(
    sigmas=st.lists(st.floats(0.05, 50), min_size=140, max_size=160, unique=True),
    rates=st.lists(st.floats(1e-6, 1), min_size=160, max_size=160),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_each_mechanism_is_rounded_to_one_that_dominates_it(
    sigmas: list[float], rates: list[float]
) -> None:
    events = merge(map(release, sigmas, rates, range(1, len(sigmas) + 1)))
    coarse = accounting._coarsen(events)
    assert len(coarse) <= accounting.MOST_MECHANISMS
    for bound in sigmas:
        # At every σ, no step moved to more noise than it had.
        noisier = [sum(e.steps for e in h if e.noise_multiplier > bound) for h in (coarse, events)]
        assert noisier[0] <= noisier[1]
    for bound in rates:
        rarer = [sum(e.steps for e in h if e.sample_rate < bound) for h in (coarse, events)]
        assert rarer[0] <= rarer[1]


def test_opacus_is_imported_only_when_needed() -> None:
    code = "import sys; import fedlr.privacy.calibration as c; sys.exit('opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("delta", [1e-9, 1e-10, 1e-11, 1e-12])
@pytest.mark.parametrize("steps", [1_000, 100_000])
@pytest.mark.parametrize("total", [0.3, 1.0])
def test_the_bound_holds_where_delta_meets_the_rounding_of_doubles(
    delta: float, steps: int, total: float
) -> None:
    """At q = 1 the composition is one Gaussian of sensitivity μ = √(steps/σ²) exactly."""
    sigma = math.sqrt(steps / total)
    found = epsilon([Release(sigma, 1.0, steps, "example")], delta)
    mu = math.sqrt(total)
    # Balle and Wang 2018, theorem 8: δ(ε) = Φ(μ/2 - ε/μ) - e^ε·Φ(-μ/2 - ε/μ).
    exact = stats.norm.cdf(mu / 2 - found / mu) - math.exp(found) * stats.norm.cdf(
        -mu / 2 - found / mu
    )
    assert exact <= delta
