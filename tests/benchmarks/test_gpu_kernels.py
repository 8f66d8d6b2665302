"""What the Triton kernels gain on a GPU over their twins, and how near memory lets them come.

See `test_gpu.py` on when this is skipped.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlr.kernels.clipped_sum import naive
from fedlr.kernels.dispatch import MERGED, NAIVE, TRITON
from tests.kernels.execution import differentiate
from tests.kernels.parity import Rows, layer

from .gpu import MARKS, MODULES, PRECISIONS, RANK, SHAPES, STAGE, runnable, timed
from .ratios import alternate, most
from .report import Report, at_least
from .steps import Shape, apart

pytestmark = MARKS

TRAFFIC = (
    "bandwidth: bytes that two passes over δ and z must read, per second, against bytes that a "
    "plain copy reads and writes"
)
ONCE = "formed once: torch forms each unit's gradient, and takes norm and sum of it"


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
    case = Rows(pair[0].cpu(), pair[1].cpu(), index, torch.linspace(0, 1, shape.rows))
    there = index.to(STAGE.device)
    case.check_norms(kernel.unit_squared_norms(*pair, there, shape.rows).cpu())
    case.check_sum(kernel.weighted_sum(*pair, there, case.factors.to(STAGE.device)).cpu())


@SHAPES
@PRECISIONS
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
    gate.ratio(timed("formed once", once, 3), fast, 20, at_least(1.0), ONCE)
    source = torch.zeros(STAGE.copied, dtype=torch.uint8, device=STAGE.device)
    target = torch.empty_like(source)
    copying = timed("copy", lambda: target.copy_(source), 3)
    mine, copied = alternate(fast, copying, most(20))
    rates = [triton.bytes_read() / t for t in mine], [2 * STAGE.copied / t for t in copied]
    base = f"{np.median(rates[1]) / 1e9:.0f} GB/s"
    gate.quotients(f"{TRITON} / plain copy, bandwidth", rates, base, note=TRAFFIC)


@PRECISIONS
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
