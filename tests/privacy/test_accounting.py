"""ε against closed forms and an independent accountant; PRV distrusted where it is wrong."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from itertools import pairwise

import pytest
from scipy import optimize, stats

from fedlr.errors import LedgerError
from fedlr.privacy import accounting
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release

DELTA = 1e-5


def release(sigma: float, rate: float, steps: int) -> Release:
    return Release(sigma, rate, steps, "example")


def pld_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """ε by privacy loss distributions, of dp-accounting: the other implementation."""
    from dp_accounting import dp_event  # type: ignore[import-untyped]
    from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped]

    logging.disable(logging.WARNING)
    try:
        event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        accountant = PLDAccountant(value_discretization_interval=1e-5 if sigma > 3 else 1e-4)
        return float(accountant.compose(event, steps).get_epsilon(delta))
    finally:
        logging.disable(logging.NOTSET)


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
SLOW = [
    (sigma, rate, steps)
    for sigma in (0.5, 0.8, 1.5, 5.0)
    for rate in (1e-3, 0.0263, 1 / 3, 1.0)
    for steps in (1, 50, 1000)
]


@pytest.mark.parametrize("cell", FAST)
def test_prv_agrees_with_pld(cell: tuple[float, float, int]) -> None:
    assert_close(epsilon([release(*cell)], DELTA), pld_epsilon(*cell, DELTA))


@pytest.mark.slow
@pytest.mark.parametrize("cell", SLOW)
def test_prv_agrees_with_pld_on_the_grid(cell: tuple[float, float, int]) -> None:
    for delta in (1e-5, 1e-7):
        value, truth = epsilon([release(*cell)], delta), pld_epsilon(*cell, delta)
        # Above ε = 60 the domain bound lets Rényi take over: an upper bound, less tight.
        if truth > 60:
            assert truth <= value <= 1.25 * truth
        else:
            assert_close(value, truth)


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
    from opacus.accountants import PRVAccountant

    def get_epsilon(self: object, delta: float, **options: float) -> float:
        if isinstance(answer, Exception):
            raise answer
        return answer

    events = [release(0.9, 0.1, 2)]
    monkeypatch.setattr(PRVAccountant, "get_epsilon", get_epsilon)
    accounting._cached.cache_clear()
    try:
        assert epsilon(events, DELTA) == epsilon(events, DELTA, "rdp")
    finally:
        accounting._cached.cache_clear()


@pytest.mark.parametrize("cell", [(0.05, 0.5, 1000), (0.3, 1.0, 10**6), (0.011, 1e-9, 10**7)])
def test_extreme_histories_end_quickly_with_an_upper_bound(cell: tuple[float, float, int]) -> None:
    assert epsilon([release(*cell)], DELTA) == epsilon([release(*cell)], DELTA, "rdp") > 100


def test_the_single_step_check_is_the_exact_delta() -> None:
    event = release(1.5, 1.0, 1)
    exact = gaussian_epsilon(1.5, 1, DELTA)
    assert accounting._single_step_delta(event, exact) == pytest.approx(DELTA, rel=1e-6)
    # Sampling mixes the two hypotheses, (1-q)·Q + q·P: δ(0), their distance, is q times as large.
    sampled = accounting._single_step_delta(release(1.5, 0.1, 1), 0.0)
    assert sampled == pytest.approx(0.1 * accounting._single_step_delta(event, 0.0))


def test_a_long_history_of_different_events_stays_within_its_mesh() -> None:
    many = [release(2 + number / 100, 0.01, 40) for number in range(6)]
    value = epsilon(many, DELTA)
    # Between 240 steps of the noisiest and of the least noisy event.
    assert epsilon([release(2.05, 0.01, 240)], DELTA) < value
    assert value < epsilon([release(2.0, 0.01, 240)], DELTA)


def test_opacus_is_imported_only_when_needed() -> None:
    code = "import sys; import fedlr.privacy.calibration as c; sys.exit('opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
