"""What the private step costs on a GPU, and what the Triton kernels gain there.

Everything is measured twice over: as a step of a run, and the kernels alone. Without a CUDA
device all of it is skipped; `test_gpu_dry.py` runs it on the CPU, to keep it alive.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.adapters.quantised import missing_package
from fedlr.errors import ConfigError
from fedlr.kernels.clipped_sum import naive
from fedlr.kernels.dispatch import MERGED, NAIVE, TRITON, Call, choose
from fedlr.privacy.noise import secret_stream
from fedlr.training.fused import train_together
from tests.kernels.execution import differentiate
from tests.kernels.parity import Rows, layer

from .gpu import (
    BINDING,
    DRY,
    HUGE,
    MODULES,
    RANK,
    STAGE,
    Case,
    GhostSteps,
    OrdinarySteps,
    PrivateSteps,
    peak,
    random_rows,
    timed,
    units,
)
from .ratios import alternate, clock, most
from .report import Gate, Report, at_least, at_most, megabytes
from .steps import Shape, apart

pytestmark = [
    pytest.mark.bench,
    pytest.mark.gpu,
    pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="no CUDA device"),
    pytest.mark.skipif(clock() == "cpu", reason="no CPU time counts what a GPU does"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Opacus' hooks fire in an odd order
]

SAME = {"float32": 1e-4, "nf4": 1e-4, "bfloat16": 5e-2}
"""Relative difference of the change of B that rounding may make."""

CHANGE = "change of B, relative; σ = 0"
PROMISE = (
    "on a GPU, private: Poisson draw, batch and its way to the device, clipped sum, secret noise, "
    "SGD, and what a task does once in five steps; ordinary: forward and backward pass of a batch "
    "that is on the device already, SGD; both on an encoder with random weights"
)
OWN = (
    "bfloat16, private: rows have a shape of their own, which the bound needs: a row of padding "
    "more in every pass, and no Triton clipped sum"
)
TRAFFIC = (
    "share of a plain copy's bandwidth: bytes that two passes over δ and z must read, per second, "
    "against bytes that a copy reads and writes"
)

shapes = pytest.mark.parametrize("shape", STAGE.shapes, ids=lambda shape: f"{shape.rows}x{shape.tokens}")
precisions = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
implementations = pytest.mark.parametrize("implementation", [NAIVE, TRITON])


def runnable(implementation: str, precision: str) -> None:
    """Skip where the machine does not run the implementation, with its reason."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    try:
        for kernel in ("clipped_sum", "lora_linear"):
            choose(kernel, Call(STAGE.device, dtype, RANK), implementation)
    except ConfigError as error:
        pytest.skip(str(error))


def step_gate(report: Report, case: Case) -> Gate:
    """Open the way to numbers about a private step: unclipped, it is the ordinary one."""
    found = PrivateSteps(case, HUGE, 0.0)()
    if apart(PrivateSteps(case, BINDING, 0.0)(), found) < 0.5:
        figure = math.inf  # a clip that does not bind would prove nothing below
    else:
        figure = apart(found, OrdinarySteps(case).anew())
    return report.parity(f"step {case}", figure, SAME[case.precision], f"{CHANGE}, C huge")


@shapes
@precisions
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
    sizes = [(peak(lambda: PrivateSteps(case)), peak(lambda: OrdinarySteps(case)))]
    add_memory(gate, f"private {implementation}", sizes, limit=1.05)


@shapes
@precisions
@implementations
@pytest.mark.parametrize("other", ["Opacus hooks", "Opacus ghost"])
def test_opacus_against_the_private_step(
    report: Report, shape: Shape, precision: str, implementation: str, other: str
) -> None:
    pytest.importorskip("opacus", reason="opacus is not installed")
    runnable(implementation, precision)
    case = Case(shape, precision, implementation)
    theirs = opacus(other, case)
    clipped = PrivateSteps(case, BINDING, 0.0)()
    gate = report.parity(
        f"step {case}",
        apart(theirs(BINDING, 0.0)(), clipped),
        SAME[precision],
        f"{CHANGE}, clip binds",
    )
    sides = timed(other, theirs(1.0, 1.0)), timed(f"private {implementation}", PrivateSteps(case))
    gate.ratio(*sides, 8, at_least(1.0))
    if implementation == NAIVE:
        sizes = [(peak(lambda: theirs(1.0, 1.0)), peak(lambda: OrdinarySteps(case)))]
        add_memory(gate, other, sizes)


def opacus(name: str, case: Case) -> Callable[[float, float], Callable[[], dict[str, Tensor]]]:
    """Return (C, σ) → steps that return the change of B."""
    if name == "Opacus hooks":
        hooked = replace(case, implementation=NAIVE, gradients="opacus")
        return lambda clip_norm, sigma: PrivateSteps(hooked, clip_norm, sigma)
    return lambda clip_norm, sigma: GhostSteps(case, clip_norm, sigma).anew


def add_memory(
    gate: Gate, name: str, sizes: list[tuple[float, float]], limit: float | None = None
) -> None:
    """Add a side's peak memory on the device against the ordinary step's."""
    mine, ordinary = zip(*sizes, strict=True)
    goal = None if limit is None else at_most(limit)
    gate.quotients(
        f"{name} / ordinary, peak memory", (mine, ordinary), megabytes(ordinary[0]), goal
    )


@shapes
@precisions
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


class SumOverSites:
    """Norms at every site, one factor a unit, clipped sum at every site.

    Args:
        kernel: The two passes; None: the gradients formed once, as torch's own way does.
        arrays: (δ, z) of every site, (N, T, m) and (N, T, r); row i is unit i.
    """

    def __init__(self, kernel: Any, arrays: list[tuple[Tensor, Tensor]]) -> None:
        self._kernel, self._arrays = kernel, arrays
        self._index = torch.arange(arrays[0][0].shape[0], device=STAGE.device)

    def __call__(self) -> dict[str, Tensor]:
        """Return the sums by site, and the norms."""
        rows, index = len(self._index), self._index
        if self._kernel is None:
            pairs = [(delta.float(), z.float()) for delta, z in self._arrays]
            formed = [naive.unit_gradients(delta, z, index, rows) for delta, z in pairs]
            squared = torch.stack([naive.squared_norms(value) for value in formed]).sum(0)
            factors = naive.clip_factors(squared, self.bound)
            sums = [naive.clipped_sum(value, factors) for value in formed]
        else:
            passes = [self._kernel.unit_squared_norms(*pair, index, rows) for pair in self._arrays]
            squared = torch.stack(passes).sum(0)
            factors = naive.clip_factors(squared, self.bound)
            sums = [self._kernel.weighted_sum(*pair, index, factors) for pair in self._arrays]
        return {"squared norms": squared, **{str(site): value for site, value in enumerate(sums)}}

    @property
    def bound(self) -> float:
        """A clip norm near that of a unit of independent normal numbers: some units exceed it."""
        delta, z = self._arrays[0]
        size = delta.shape[1] * delta.shape[2] * z.shape[2]
        return math.sqrt(size * len(self._arrays))

    def bytes_read(self) -> int:
        """Bytes that two passes read: norms must be known at every site before any sum."""
        return 2 * sum(value.nbytes for pair in self._arrays for value in pair)


def draw_sites(shape: Shape, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Random δ of ``dtype`` and float32 z of every site."""
    draws = torch.Generator(STAGE.device).manual_seed(0)

    def normal(width: int) -> Tensor:
        size = (shape.rows, shape.tokens, width)
        return torch.randn(size, generator=draws, device=STAGE.device)

    count = STAGE.layers * len(MODULES)
    return [(normal(STAGE.hidden).to(dtype), normal(RANK)) for _ in range(count)]


def check_bounds(shape: Shape, kernel: Any, pair: tuple[Tensor, Tensor]) -> None:
    """Check one site, element by element, against float64 (`tests.kernels.parity`)."""
    index = torch.arange(shape.rows)
    case = Rows(pair[0].cpu(), pair[1].cpu(), index, torch.rand(shape.rows))
    there = index.to(STAGE.device)
    case.check_norms(kernel.unit_squared_norms(*pair, there, shape.rows).cpu())
    case.check_sum(kernel.weighted_sum(*pair, there, case.factors.to(STAGE.device)).cpu())


@shapes
@precisions
def test_clipped_sum(report: Report, shape: Shape, precision: str) -> None:
    runnable(TRITON, precision)
    arrays = draw_sites(shape, getattr(torch, precision))
    kernel = importlib.import_module("fedlr.kernels.clipped_sum.triton")
    check_bounds(shape, kernel, arrays[0])
    triton, twin, once = (SumOverSites(which, arrays) for which in (kernel, naive, None))
    expected = twin()
    figure = max(apart(triton(), expected), apart(once(), expected))
    gate = report.parity(
        f"clipped_sum {shape} {precision}, {len(arrays)} sites", figure, 1e-4, "norms and sums"
    )
    fast = timed(TRITON, triton, 3)
    gate.ratio(timed(NAIVE, twin, 3), fast, 20, at_least(1.0))
    gate.ratio(timed("formed once", once, 3), fast, 20, at_least(1.0))
    source = torch.zeros(STAGE.copied, dtype=torch.uint8, device=STAGE.device)
    target = torch.empty_like(source)
    copying = timed("copy", lambda: target.copy_(source), 3)
    mine, copied = alternate(fast, copying, most(20))
    rates = [triton.bytes_read() / t for t in mine], [2 * STAGE.copied / t for t in copied]
    base = f"{np.median(rates[1]) / 1e9:.0f} GB/s"
    gate.quotients(f"{TRITON} / plain copy, bandwidth", rates, base, note=TRAFFIC)


@precisions
def test_lora_linear(report: Report, precision: str) -> None:
    """Forward and backward pass of one layer; ``merged`` is for float32."""
    runnable(TRITON, precision)
    shape, dtype = STAGE.shapes[0], getattr(torch, precision)
    case = layer((shape.rows, shape.tokens), (STAGE.hidden, STAGE.hidden, RANK), dtype)
    there = [v.to(STAGE.device) if isinstance(v, Tensor) else v for v in case.arguments]
    cotangent = case.cotangent.to(STAGE.device)

    def passes(name: str) -> Callable[[], tuple[Tensor, ...]]:
        module = importlib.import_module(f"fedlr.kernels.lora_linear.{name}")
        return lambda: differentiate(module.lora_linear, cotangent, *there)

    case.check(tuple(value.cpu() for value in passes(TRITON)()), STAGE.device)
    bound = 1e-5 if precision == "float32" else 1e-2
    for name in (NAIVE, MERGED) if precision == "float32" else (NAIVE,):
        other, kernel = passes(name), passes(TRITON)
        names = ("y", "z", "gradient of x", "gradient of B")
        found, expected = (
            {key: value.float() for key, value in zip(names, call(), strict=True)}
            for call in (kernel, other)
        )
        figure = max(apart({key: found[key]}, {key: expected[key]}) for key in names)
        gate = report.parity(
            f"lora_linear {shape} {precision}", figure, bound, "y, z and gradients, relative"
        )
        gate.ratio(timed(name, other, 20), timed(TRITON, kernel, 20), 20, at_least(1.0))


def test_fused_clients(report: Report) -> None:
    """Clients that share passes against one after the other, on one resident model."""
    clients, rows = STAGE.clients.rows, STAGE.clients.tokens
    tokens = STAGE.shapes[0].tokens
    members = [units(range(rows * k, rows * (k + 1))) for k in range(clients)]

    def sides(sigma: float) -> tuple[Callable[[], list[Any]], Callable[[], list[Any]]]:
        steps = PrivateSteps(Case(Shape(clients * rows, tokens)), BINDING, sigma)
        trainer = steps.trainer

        def changes(found: list[Any]) -> list[dict[str, Tensor]]:
            return [steps.change(arrays) for arrays in found]

        return (
            lambda: changes([trainer.train(steps.task(), own) for own in members]),
            lambda: changes(train_together(trainer, [steps.task() for _ in members], members)),
        )

    dry = [
        {f"{k}/{site}": value for k, change in enumerate(call()) for site, value in change.items()}
        for call in sides(0.0)
    ]
    gate = report.parity(
        f"{clients} clients x {rows} rows x {tokens} float32",
        apart(dry[1], dry[0]),
        SAME["float32"],
        f"{CHANGE}, clip binds",
    )
    alone, together = sides(1.0)
    gate.ratio(timed("one by one", alone), timed("fused", together), 10, at_least(1.0))


def company(precision: str) -> float:
    """How far a row's clipped gradient moves because of other rows, in units of its own.

    The row is a quarter as long as the others: alone it is not padded. Differences of sums
    show what a neighbouring data set shows.
    """
    shape = STAGE.shapes[0]
    data = random_rows(shape, max(2, shape.tokens // 4))
    steps = PrivateSteps(Case(shape, precision, steps=1), BINDING, 0.0, data)
    alone, rest, whole = (
        steps.of(rows) for rows in (range(1), range(1, shape.rows), range(shape.rows))
    )
    return apart({site: whole[site] - rest[site] for site in whole}, alone)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_a_row_alone_and_in_company(report: Report, precision: str) -> None:
    if precision == "nf4" and (missing := missing_package()):
        pytest.skip(missing)
    figure = company(precision)
    gate = report.parity(f"a row in company, {precision}", figure, 1e-3, "of its clipped gradient")
    gate.absolute("effect of other rows", lambda: [figure], "of it")


def test_a_base_in_four_bits(report: Report) -> None:
    if missing := missing_package():
        pytest.skip(missing)
    case = Case(STAGE.shapes[0], "nf4")
    gate = step_gate(report, case)
    private, ordinary = PrivateSteps(case), OrdinarySteps(case)
    gate.ratio(timed("private", private), timed("ordinary", ordinary), 10, at_most(1.03))
    whole = replace(case, precision="float32")
    gate.ratio(timed("private nf4", private), timed("private float32", PrivateSteps(whole)), 10)
    sizes = [(peak(lambda: PrivateSteps(case)), peak(lambda: PrivateSteps(whole)))]
    mine, theirs = sizes[0]
    gate.quotients("nf4 / float32, peak memory", ([mine], [theirs]), megabytes(theirs))
