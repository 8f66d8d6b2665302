"""Calibration lands on the private side, within its tolerance, in few evaluations."""

from __future__ import annotations

import math
from itertools import product
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


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.1, 1.0, 6.0, 20.0])
def test_calibration_lands_on_the_private_side_all_over_the_grid(target: float) -> None:
    least = 1.0
    for rate, steps in product((1e-3, 0.0263, 1 / 3, 1.0), (1, 50, 1000)):
        sigma = noise_multiplier(target, DELTA, rate, steps)
        value = epsilon([Release(sigma, rate, steps, "example")], DELTA)
        assert 0.98 * target <= value <= target
        least = min(least, value / target)
    print(f"\nε = {target}: at least {least:.4f} of it is used")


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
