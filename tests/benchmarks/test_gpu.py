"""What the private step costs on a GPU: time and memory, beside the ordinary step and Opacus.

Without a CUDA device all of it is skipped; `test_gpu_dry.py` runs it on the CPU, so that it
works when there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlr.kernels.dispatch import NAIVE, TRITON
from fedlr.privacy.noise import secret_stream
from fedlr.training.fused import train_together
from fedlr.training.precision import check_same_bits

from .gpu import (
    BINDING,
    HUGE,
    MARKS,
    MODULES,
    PRECISIONS,
    RANK,
    SHAPES,
    STAGE,
    Case,
    base,
    peak,
    random_rows,
    runnable,
    timed,
    units,
)
from .gpu_steps import GhostSteps, OrdinarySteps, PrivateSteps
from .report import Gate, Report, at_least, at_most, megabytes
from .steps import Shape, apart

pytestmark = MARKS

SAME = {"float32": 1e-4, "nf4": 1e-4, "bfloat16": 5e-2}
"""Relative difference of the change of B that rounding may make."""

CHANGE = "change of B, relative; σ = 0"
PROMISE = (
    f"GPU, private: {STAGE.steps} steps of Poisson draw, batch and its way to the device, clipped "
    "sum, secret noise and SGD, and what a task does once; ordinary: as many forward and backward "
    "passes of a batch that is on the device already, and SGD; random weights"
)
OWN = (
    "GPU, private, bfloat16: rows have a shape of their own, on which the clip bound rests: a row "
    "of padding more in every pass, and no Triton clipped sum"
)

implementations = pytest.mark.parametrize("implementation", [NAIVE, TRITON])


def step_gate(report: Report, case: Case) -> Gate:
    """Open the way to numbers about a private step: unclipped, it is the ordinary one."""
    found = PrivateSteps(case, HUGE, 0.0).anew()
    if apart(PrivateSteps(case, BINDING, 0.0).anew(), found) < 0.5:
        figure = math.inf  # a clip that does not bind would prove nothing below
    else:
        figure = apart(found, OrdinarySteps(case).anew())
    return report.parity(f"step {case}", figure, SAME[case.precision], f"{CHANGE}, C huge")


@SHAPES
@PRECISIONS
@implementations
def test_the_private_step_against_the_ordinary_one(
    report: Report, shape: Shape, precision: str, implementation: str
) -> None:
    runnable(implementation, precision)
    case = Case(shape, precision, implementation)
    gate = step_gate(report, case)
    private = timed(f"private {implementation}", PrivateSteps(case))
    note = PROMISE if precision == "float32" else OWN
    gate.ratio(private, timed("ordinary", OrdinarySteps(case)), 20, at_most(1.03), note)
    if implementation == TRITON:
        twin = PrivateSteps(replace(case, implementation=NAIVE))
        gate.ratio(timed(f"private {NAIVE}", twin), private, 20, at_least(1.0))
        del twin
    del private
    mine, ordinary = peak(lambda: PrivateSteps(case)), peak(lambda: OrdinarySteps(case))
    quantity = f"private {implementation} / ordinary, peak memory"
    gate.quotients(quantity, ([mine], [ordinary]), megabytes(ordinary), at_most(1.05))


@SHAPES
@PRECISIONS
@implementations
@pytest.mark.parametrize("name", ["Opacus hooks", "Opacus ghost"])
def test_opacus_against_the_private_step(
    report: Report, shape: Shape, precision: str, implementation: str, name: str
) -> None:
    """Its hooks stand in our step; its ghost clipping is a step of its own."""
    pytest.importorskip("opacus", reason="opacus is not installed")
    runnable(implementation, precision)
    case = Case(shape, precision, implementation)
    exact = replace(case, rate=1.0)
    ours = PrivateSteps(exact, BINDING, 0.0).anew()
    figure = apart(opacus(name, exact, BINDING, 0.0).anew(), ours)
    gate = report.parity(f"step {case}", figure, SAME[precision], f"{CHANGE}, clip binds")
    theirs = timed(name, opacus(name, case))
    gate.ratio(theirs, timed(f"private {implementation}", PrivateSteps(case)), 6, at_least(1.0))
    del theirs
    if implementation == NAIVE:
        other, ordinary = peak(lambda: opacus(name, case)), peak(lambda: OrdinarySteps(case))
        quantity = f"{name} / ordinary, peak memory"
        gate.quotients(quantity, ([other], [ordinary]), megabytes(ordinary))


def opacus(
    name: str, case: Case, clip_norm: float = 1.0, sigma: float = 1.0
) -> PrivateSteps | GhostSteps:
    """The steps that ``name`` stands for."""
    if name == "Opacus hooks":
        hooked = replace(case, implementation=NAIVE, gradients="opacus")
        return PrivateSteps(hooked, clip_norm, sigma)
    return GhostSteps(case, clip_norm, sigma)


@SHAPES
@PRECISIONS
def test_the_secret_noise_of_a_step(report: Report, shape: Shape, precision: str) -> None:
    """Drawn on a CPU core, whatever computes the step, and moved to the device."""
    sizes, stream = [(STAGE.hidden, RANK)] * (STAGE.layers * len(MODULES)), secret_stream()

    def noise() -> list[Tensor]:
        return [stream.gaussian(size, 1.0).to(STAGE.device) for size in sizes]

    drawn = torch.cat([value.flatten() for value in noise()])
    figure, bound = abs(float(drawn.std()) - 1), 5 / math.sqrt(2 * drawn.numel())
    case = Case(shape, precision, steps=1)
    gate = report.parity(f"noise, step {case}", figure, bound, "deviation − 1")
    sides = timed("secret noise", noise), timed("ordinary", OrdinarySteps(case))
    gate.ratio(*sides, 20, at_most(0.03))


def test_fused_clients(report: Report) -> None:
    """Clients that share passes against one after the other, on one resident model."""
    clients, rows, tokens = STAGE.clients.rows, STAGE.clients.tokens, STAGE.shapes[0].tokens
    case = Case(Shape(clients * rows, tokens))
    members = [units(range(rows * k, rows * (k + 1))) for k in range(clients)]

    def sides(steps: PrivateSteps) -> tuple[Callable[[], list[Any]], Callable[[], list[Any]]]:
        return (
            lambda: [steps.trainer.train(steps.task(), own) for own in members],
            lambda: train_together(steps.trainer, [steps.task() for _ in members], members),
        )

    exact = PrivateSteps(replace(case, rate=1.0), BINDING, 0.0)
    changes = [
        {f"{k}/{site}": v for k, own in enumerate(call()) for site, v in exact.change(own).items()}
        for call in sides(exact)
    ]
    setting = f"{clients} clients x {rows} rows x {tokens} {case.precision}"
    gate = report.parity(setting, apart(*changes), SAME["float32"], f"{CHANGE}, clip binds")
    alone, together = sides(PrivateSteps(case))
    gate.ratio(timed("one by one", alone), timed("fused", together), 10, at_least(1.0))


@implementations
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_a_row_alone_and_in_company(report: Report, precision: str, implementation: str) -> None:
    """How far a row's clipped gradient moves because of other rows, in units of its own.

    The row is a quarter as long as the others: alone it is not padded. Differences of sums
    show what a neighbouring data set shows.
    """
    runnable(implementation, precision)
    shape = STAGE.shapes[0]
    if precision == "bfloat16":  # as a run does before its first round
        check_same_bits(base(precision), STAGE.vocabulary, shape.rows, shape.tokens)
    case = Case(shape, precision, implementation, steps=1, rate=1000.0)
    data = random_rows(shape, first=max(2, shape.tokens // 4))
    steps, rows = PrivateSteps(case, BINDING, 0.0, data), range(shape.rows)
    alone, rest, whole = (steps.anew(chosen) for chosen in (rows[:1], rows[1:], rows))
    figure = apart({site: whole[site] - rest[site] for site in whole}, alone)
    setting = f"a row in company, {precision} {implementation}"
    gate = report.parity(setting, figure, 3e-4, "of the row's clipped gradient")
    gate.absolute("effect of other rows", lambda: [1e6 * figure], "ppm")


def test_a_base_in_four_bits(report: Report) -> None:
    runnable(NAIVE, "nf4")
    case = Case(STAGE.shapes[0], "nf4")
    whole = replace(case, precision="float32")
    gate = step_gate(report, case)
    private = timed("private nf4", PrivateSteps(case))
    gate.ratio(private, timed("ordinary nf4", OrdinarySteps(case)), 10, at_most(1.03))
    gate.ratio(private, timed("private float32", PrivateSteps(whole)), 10)
    del private
    mine, full = peak(lambda: PrivateSteps(case)), peak(lambda: PrivateSteps(whole))
    gate.quotients("private nf4 / float32, peak memory", ([mine], [full]), megabytes(full))
