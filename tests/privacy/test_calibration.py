"""Calibration lands on the private side, within its tolerance, in few evaluations."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedlr.privacy import accounting, calibration
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.calibration import noise_multiplier
from fedlr.privacy.events import Release

DELTA = 1e-5
CELLS: list[Any] = [
    (1.0, 1e-5, 0.01, 200),
    (6.0, 1e-5, 0.1, 50),
    (8.0, 1e-7, 1.0, 30),
    (0.1, 1e-5, 0.005, 20),
    (0.5, 1e-6, 0.001, 1),
    pytest.param((60.0, 1e-5, 0.1, 20), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_of_the_answer_is_just_below_the_target(
    cell: tuple[float, float, float, int], accountant: accounting.Accountant
) -> None:
    target, delta, rate, steps = cell
    sigma = noise_multiplier(target, delta, rate, steps, accountant)
    value = epsilon([Release(sigma, rate, steps, "example")], delta, accountant)
    assert 0.98 * target <= value <= target


def test_the_tolerance_is_kept() -> None:
    sigma = noise_multiplier(2.0, DELTA, 0.02, 50, tolerance=1e-3)
    value = epsilon([Release(sigma, 0.02, 50, "example")], DELTA)
    assert 0.999 * 2.0 <= value <= 2.0


def test_few_evaluations_of_prv(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(
        events: list[Release], delta: float, accountant: accounting.Accountant = "prv"
    ) -> float:
        asked.append(accountant)
        return epsilon(events, delta, accountant)

    monkeypatch.setattr(calibration, "epsilon", counted)
    calibration._cached.cache_clear()
    noise_multiplier(1.5, DELTA, 0.015, 80)
    assert asked.count("prv") <= 6
    before = len(asked)
    noise_multiplier(1.5, DELTA, 0.015, 80)
    assert len(asked) == before


def test_prv_needs_less_noise_than_renyi() -> None:
    assert noise_multiplier(1.0, DELTA, 0.01, 200) < noise_multiplier(1.0, DELTA, 0.01, 200, "rdp")


def test_a_jump_across_the_band_ends_on_the_private_side(monkeypatch: pytest.MonkeyPatch) -> None:
    def jump(events: list[Release], delta: float, accountant: accounting.Accountant) -> float:
        return 0.5 if events[0].noise_multiplier >= math.pi else 2.0

    monkeypatch.setattr(calibration, "epsilon", jump)
    calibration._cached.cache_clear()
    try:
        assert noise_multiplier(1.0, DELTA, 0.5, 3) == pytest.approx(math.pi, rel=1e-6)
        assert noise_multiplier(1.0, DELTA, 0.5, 3) >= math.pi
    finally:
        calibration._cached.cache_clear()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"target_epsilon": float("nan")}, "target_epsilon"),
        ({"target_epsilon": 1e-4}, "cannot be reached"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"accountant": "gdp"}, "accountant"),
    ],
)
def test_impossible_requests_are_refused(change: dict[str, object], match: str) -> None:
    arguments: dict[str, object] = {
        "target_epsilon": 1.0, "delta": DELTA, "sample_rate": 0.1, "steps": 5
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        noise_multiplier(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.slow
def test_calibrating_for_half_the_rate_overspends() -> None:
    """A client of 17,237 rows in batches of 128, noise for (6, 1e-5) at q/2 over 1000 steps.

    Halving q credits the sampling of clients, which the server sees; the client
    then makes 500 steps at the full q and has spent 7.74, not 6.
    """
    rate = 1 / math.ceil(17_237 / 128)
    sigma = noise_multiplier(6.0, DELTA, rate / 2, 1000, tolerance=1e-3)
    assert sigma == pytest.approx(0.512, abs=1e-3)
    assert epsilon([Release(sigma, rate, 500, "example")], DELTA) == pytest.approx(7.74, abs=0.05)
