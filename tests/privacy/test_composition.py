"""Numerical composition: both directions, on a window that stays where it belongs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from fedlr.privacy import accounting, composition
from fedlr.privacy.accounting import Cost, cost, epsilon
from fedlr.privacy.events import Release, merge

DELTA = 1e-5


def release(sigma: float, rate: float, steps: int) -> Release:
    return Release(sigma, rate, steps, "example")


def directions(events: Sequence[Release], delta: float) -> list[float]:
    """ε by direction: removal, addition."""
    history = merge(events)
    half_width = accounting._half_width(history, delta / 1000)
    error = composition.mesh_error(history, delta / 1000, half_width)
    return [float(end) for end in composition.composed(history, delta, half_width, error)]


def by_dp_accounting(events: Sequence[Release], delta: float) -> list[float]:
    """ε by direction: removal, addition; of the other implementation, which sums tails up."""
    from dp_accounting.pld import (  # type: ignore[import-untyped]
        privacy_loss_distribution as pld,
    )

    logging.disable(logging.WARNING)
    try:
        found = pld.identity()
        for event in events:
            step = pld.from_gaussian_mechanism(
                event.noise_multiplier, sampling_prob=event.sample_rate
            )
            found = found.compose(step.self_compose(event.steps))
    finally:
        logging.disable(logging.NOTSET)
    pair = (found._pmf_remove, found._pmf_add)
    return [float(mass.get_epsilon_for_delta(delta)) for mass in pair]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of one Gaussian mechanism of sensitivity μ and σ = 1, exactly.

    δ(ε) = Φ(μ/2 - ε/μ) - e^ε·Φ(-μ/2 - ε/μ): Balle and Wang 2018, theorem 8.
    """

    def excess(value: float) -> float:
        tail = math.exp(value + stats.norm.logcdf(-mu / 2 - value / mu))
        return float(stats.norm.cdf(mu / 2 - value / mu) - tail - delta)

    return 0.0 if excess(0) <= 0 else float(optimize.brentq(excess, 0, 500, xtol=1e-10))


def central_limit(event: Release, delta: float) -> float:
    """ε of the Gaussian that many steps of a tiny rate approach.

    dP/dQ = 1 + r with r = q·(exp((2x - 1)/(2σ²)) - 1) and E[r²] = q²·(exp(1/σ²) - 1) under
    Q. Where r is small, the loss has this variance, half of it as its mean, and their sums
    those of one Gaussian mechanism with μ² = steps·E[r²].
    """
    square = math.expm1(event.noise_multiplier**-2)
    return gaussian_epsilon(event.sample_rate * math.sqrt(event.steps * square), delta)


@pytest.mark.parametrize(
    "cell", [(0.6, 0.02), (1.0, 1e-4), (5.0, 0.3), (0.4, 0.9), (20.0, 1.0)], ids=str
)
def test_a_cell_of_removal_is_exp_of_the_loss_times_one_of_addition(
    cell: tuple[float, float],
) -> None:
    """P is e^L times Q: the laws of L under P and under Q differ by e^L exactly."""
    domain = composition._domain(40.0, 1e-3)
    removal, addition = composition.masses(release(*cell, 1), domain)
    middle = domain.size // 2 - 1
    assert domain.ts[middle] == pytest.approx(0, abs=1e-12)
    assert removal.sum() == pytest.approx(1)
    assert addition.sum() == pytest.approx(1)
    assert min(removal.min(), addition.min()) >= 0
    mirrored, lost = addition[: 2 * middle + 1][::-1], domain.ts[: 2 * middle + 1]
    seen = mirrored > 1e-9
    assert mirrored[seen].sum() == pytest.approx(1, abs=1e-4)
    ratio = np.log(removal[: 2 * middle + 1][seen] / mirrored[seen])
    # A cell is 0.001 wide; to 1e-9 masses are known to seven digits.
    assert np.abs(ratio - lost[seen]).max() <= 0.51e-3


@pytest.mark.parametrize(("sigma", "rate"), [(0.3, 1.0), (1.0, 1e-4), (0.1, 0.01), (5.0, 0.3)])
def test_the_means_of_one_step_are_its_two_divergences(sigma: float, rate: float) -> None:
    def log_p(x: float) -> float:
        parts = [stats.norm.logpdf(x, mean, sigma) for mean in (0, 1)]
        if rate == 1:
            return float(parts[1])
        return float(np.logaddexp(math.log1p(-rate) + parts[0], math.log(rate) + parts[1]))

    def log_q(x: float) -> float:
        return float(stats.norm.logpdf(x, 0, sigma))

    points = [0.0, 0.5, 1.0]
    ends = (-10 * sigma, 1 + 10 * sigma)
    expected = [
        integrate.quad(
            lambda x, one=one, other=other: math.exp(one(x)) * (one(x) - other(x)),
            *ends,
            points=points,
            epsabs=1e-14,
            limit=500,
        )[0]
        for one, other in ((log_p, log_q), (log_q, log_p))
    ]
    assert composition.means(release(sigma, rate, 1)) == pytest.approx(expected, rel=1e-6)


def test_the_single_step_check_is_the_exact_delta() -> None:
    event = release(1.5, 1.0, 1)
    exact = gaussian_epsilon(1 / 1.5, DELTA)
    assert composition.single_step_delta(event, exact) == pytest.approx(DELTA, rel=1e-6)
    # Sampling mixes the two hypotheses, (1-q)·Q + q·P: δ(0), their distance, is q times as large.
    sampled = composition.single_step_delta(release(1.5, 0.1, 1), 0.0)
    assert sampled == pytest.approx(0.1 * composition.single_step_delta(event, 0.0))


@pytest.mark.parametrize("cell", [(0.7, 0.05), (1.0, 0.5), (2.0, 0.9), (0.5, 1e-3)], ids=str)
def test_one_step_follows_the_closed_form_in_both_directions(cell: tuple[float, float]) -> None:
    """One step's δ(ε) is two Gaussian tails: beyond x* for removal, before x° for addition."""
    sigma, rate = cell
    delta = 1e-4

    def added(value: float) -> float:
        """Q(x < x°) - e^ε·P(x < x°), where x° has loss -ε; nothing is below log(1 - q)."""
        share = math.expm1(-value) / rate + 1
        if share <= 0:
            return 0.0
        end = sigma**2 * math.log(share) + 0.5
        without, present = (stats.norm.cdf(end, mean, sigma) for mean in (0, 1))
        return float(without - math.exp(value) * ((1 - rate) * without + rate * present))

    def removed(value: float) -> float:
        return composition.single_step_delta(release(sigma, rate, 1), value)

    for found, exact in zip(directions([release(*cell, 1)], delta), (removed, added), strict=True):
        assert exact(max(found, 0.0)) <= delta <= exact(max(found - 3e-3, -1e-2))


SIX = [
    [release(1.0, 0.01, 200)],
    [release(0.6, 0.02, 100)],
    [release(4.0, 0.3, 100)],
    [release(0.8, 0.5, 5)],
    [release(2.0, 0.99, 20)],
    [release(1.0, 0.02, 90), release(3.0, 1.0, 4), release(0.8, 0.3, 3)],
]


@pytest.mark.parametrize("events", SIX)
def test_each_direction_agrees_with_the_other_implementation(events: list[Release]) -> None:
    found, theirs = directions(events, DELTA), by_dp_accounting(events, DELTA)
    assert theirs[1] < theirs[0]
    for mine, other in zip(found, theirs, strict=True):
        assert other - 2e-3 * max(other, 1) <= mine
        assert abs(mine - other) <= 0.01 * max(other, 1)
    # Neither direction may be left out of the bound.
    assert cost(events, DELTA) == Cost(pytest.approx(max(found), rel=1e-12), "prv")


@pytest.mark.parametrize("larger", [0, 1])
def test_the_larger_direction_counts(larger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has proved which one it is."""
    events = merge([release(1.0, 0.01, 200)])
    genuine = directions(events, DELTA)
    ends = np.array([max(genuine), max(genuine)])
    ends[larger] += 0.25
    monkeypatch.setattr(composition, "composed", lambda *arguments: ends)
    assert composition.upper_epsilon(events, DELTA, 10.0) == max(genuine) + 0.25


@pytest.mark.parametrize("failed", [0, 1])
def test_a_direction_without_an_answer_leaves_no_bound(
    failed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = merge([release(1.0, 0.01, 200)])
    ends = np.array(directions(events, DELTA))
    ends[failed] = math.nan
    monkeypatch.setattr(composition, "composed", lambda *arguments: ends)
    accounting._cached.cache_clear()
    try:
        assert cost(events, DELTA) == Cost(epsilon(events, DELTA, "rdp"), "rdp")
    finally:
        accounting._cached.cache_clear()


def test_full_batches_have_one_direction() -> None:
    events = [release(4.0, 1.0, 4), release(6.0, 1.0, 9)]
    assert len(directions(events, DELTA)) == 1
    # A rate just below 1 composes both, and they are as good as equal.
    almost = directions([release(4.0, 1 - 1e-9, 4), release(6.0, 1.0, 9)], DELTA)
    assert almost == pytest.approx(directions(events, DELTA) * 2, abs=1e-6)


@pytest.mark.parametrize(
    "events",
    [
        [release(1.0, 0.05, 1)],
        [release(0.9, 1e-3, 500)],
        [release(1.0, 0.01, 200), release(2.0, 0.05, 31), release(8.0, 1.0, 3)],
    ],
)
def test_one_product_of_spectra_is_the_composition_of_opacus(events: list[Release]) -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in events]
    with accounting._quiet():
        theirs = float(accountant.get_epsilon(DELTA, eps_error=composition.EPSILON_ERROR))
    # The mesh is the same, the domain a little wider and the mean more exact.
    assert cost(events, DELTA) == Cost(pytest.approx(theirs, abs=2e-5), "prv")


@pytest.mark.parametrize("exponent", [1, 2, 3, 50, 101, 999, 2**20 + 1])
def test_powers_by_squaring(exponent: int) -> None:
    base = np.exp(1j * np.linspace(0, 3, 7)) * np.linspace(0.9999, 1, 7)
    expected = np.exp(exponent * np.log(base))
    assert np.abs(composition._power(base, exponent) - expected).max() <= 1e-15 * exponent + 1e-15


@pytest.mark.parametrize(("sigma", "rate"), [(0.5, 1.07e-5), (0.7, 4.38e-6)])
def test_the_window_stays_when_the_mean_moves_by_more_than_it(sigma: float, rate: float) -> None:
    """Each step's mean is moved by a part of a cell, forty million of them by more than 3."""
    event = release(sigma, rate, 40_000_000)
    limit, value = central_limit(event, DELTA), epsilon([event], DELTA)
    assert 0.97 * limit <= value <= min(1.3 * limit, epsilon([event], DELTA, "rdp"))


def test_the_window_stays_for_many_mechanisms_that_move_the_mean_one_way() -> None:
    events = [release(0.55 * (1 + 1e-6 * number), 1.71e-5, 25_000) for number in range(40)]
    assert 0.16 < epsilon(events, 1e-3) < 0.3


Range = tuple[float, float]


def seldom(count: int, sigmas: Range, rates: Range, steps: Range) -> list[tuple[Release, float]]:
    """Return random events of tiny rate and a δ each, to which the central limit applies.

    It does where one step's r is small where it matters: skewness of r over √steps, and
    E[r³]/E[r²], which is that times μ, are below 0.05. Under Q, r/q + 1 is log-normal, of
    skewness (e^{1/σ²} + 2)·√(e^{1/σ²} - 1). What is left of the skewness is positive and
    makes ε larger, not smaller.
    """
    generator, found = np.random.default_rng(0), list[tuple[Release, float]]()
    low, high = np.log(np.array([sigmas, rates, steps, (1e-6, 1e-2)])).T
    while len(found) < count:
        sigma, rate, many, delta = np.exp(generator.uniform(low, high)).tolist()
        square = math.expm1(sigma**-2)
        mu = rate * math.sqrt(many * square)
        skewness = (square + 3) * math.sqrt(square / many) * max(1, mu)
        event = release(sigma, rate, int(many))
        if skewness <= 0.05 and 0.05 <= central_limit(event, delta) <= 10:
            found.append((event, delta))
    return found


WIDE = seldom(10, sigmas=(0.4, 1), rates=(1e-6, 1e-4), steps=(1e5, 1e8))
# Where the means move by most: a cell is far wider than one step's loss.
HARD = seldom(10, sigmas=(0.5, 0.7), rates=(1e-6, 1e-5), steps=(1e7, 1e8))


@pytest.mark.slow
@pytest.mark.parametrize(("event", "delta"), WIDE + HARD)
def test_no_composition_costs_less_than_its_central_limit(event: Release, delta: float) -> None:
    assert epsilon([event], delta) >= 0.95 * central_limit(event, delta)


def test_mass_at_the_ends_of_the_window_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window too narrow for the sum of the losses: their tail wraps to the other end."""
    events = [release(0.6, 0.02, 100)]
    assert cost(events, DELTA).epsilon > 5.5
    monkeypatch.setattr(accounting, "_half_width", lambda *arguments: 5.0)
    accounting._cached.cache_clear()
    try:
        assert cost(events, DELTA) == Cost(epsilon(events, DELTA, "rdp"), "rdp")
    finally:
        accounting._cached.cache_clear()


@pytest.mark.parametrize(("half_width", "steps"), [(300.0, 1), (math.nan, 1), (20.0, 10**9)])
def test_a_mesh_that_cannot_be_fine_enough_is_refused(half_width: float, steps: int) -> None:
    with pytest.raises(RuntimeError, match="coarse"):
        composition.upper_epsilon([release(1.0, 0.1, steps)], DELTA, half_width)
