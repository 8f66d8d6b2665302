"""Cases, exact values and rounding bounds for the kernels and their twins.

Values are compared with the twin in float64, element by element, within what float32
rounding can do: a sum of n products, in any order, is off by at most
n·u/(1 - n·u)·Σ|products| (Higham 2002, Accuracy and Stability of Numerical
Algorithms, section 3.1). u is taken as 2⁻²³, twice the unit roundoff: tensor cores
may cut off where a processor rounds. Products of float16 and bfloat16 are exact in
float32, so that the inputs' dtype matters only where a result is rounded to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlr.kernels.clipped_sum.naive import unit_gradients
from tests.kernels.execution import differentiate

UNIT = torch.finfo(torch.float32).eps


def gamma(terms: int | Tensor) -> float | Tensor:
    """Return the largest relative error of a float32 sum of so many products."""
    return terms * UNIT / (1 - terms * UNIT)


def assert_within(name: str, found: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Fail unless |found - exact| ≤ bound everywhere; NaN fails."""
    if found.shape != exact.shape:
        raise AssertionError(f"{name} has shape {found.shape}, expected {exact.shape}")
    error = (found.double() - exact).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        ratio = (error / torch.as_tensor(bound, dtype=torch.float64)).nan_to_num(torch.inf)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, the worst by "
            f"{float(ratio.max()):.2g} times its bound, at {wrong.nonzero()[0].tolist()}"
        )


@dataclass(frozen=True)
class Rows:
    """Input of the clipped sum.

    Attributes:
        delta, z, unit_index: As in the twin.
        factors: One per unit; their number is U.
    """

    delta: Tensor
    z: Tensor
    unit_index: Tensor
    factors: Tensor

    @property
    def units(self) -> int:
        """U."""
        return self.factors.shape[0]

    def gradients(self) -> Tensor:
        """Return G_u exactly, (U, m, r) float64."""
        return unit_gradients(self.delta.double(), self.z.double(), self.unit_index, self.units)

    def errors(self) -> Tensor:
        """Return how far rounding may move each element of G_u."""
        size = unit_gradients(
            self.delta.double().abs(), self.z.double().abs(), self.unit_index, self.units
        )
        rows = torch.bincount(self.unit_index, minlength=self.units)
        return gamma(rows * self.delta.shape[1] + 1).view(-1, 1, 1) * size

    def check_norms(self, found: Tensor) -> None:
        """Check ‖G_u‖² against the float64 twin."""
        exact, error = self.gradients(), self.errors()
        # A tile adds m·r squares in a tree or in at most 64 steps; then tiles are added.
        steps = 64 + -(-self.delta.shape[2] // 64)
        moved = (2 * exact.abs() * error + error**2).sum((1, 2))
        square = exact.square().sum((1, 2))
        assert_within("norms", found, square, moved + gamma(steps) * (square + moved))

    def check_sum(self, found: Tensor) -> None:
        """Check Σ c_u·G_u against the float64 twin."""
        weight = self.factors.double().view(-1, 1, 1)
        exact, error = self.gradients(), self.errors()
        moved = (weight * error).sum(0)
        size = (weight * exact.abs()).sum(0) + moved
        assert_within("sum", found, (weight * exact).sum(0), moved + gamma(self.units + 2) * size)


def rows(shape: tuple[int, int, int, int], units: int, dtype: torch.dtype, seed: int = 0) -> Rows:
    """Draw a case of shape (N, T, m, r); the first unit gets no rows if there are several."""
    n, tokens, features, rank = shape
    draws = torch.Generator().manual_seed(seed)
    return Rows(
        torch.randn(n, tokens, features, generator=draws).to(dtype),
        torch.randn(n, tokens, rank, generator=draws).to(dtype),
        torch.randint(min(1, max(units - 1, 0)), max(units, 1), (n,), generator=draws),
        torch.rand(units, generator=draws),
    )


@dataclass(frozen=True)
class Layer:
    """Input of the LoRA layer and a cotangent for its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float
    cotangent: Tensor

    @property
    def arguments(self) -> tuple[Tensor | float | None, ...]:
        """The arguments of ``lora_linear``."""
        return self.x, self.weight, self.bias, self.a, self.b, self.scaling

    def check(self, found: tuple[Tensor, ...], device: torch.device) -> None:
        """Check (y, z, gradient of x, gradient of B) against exact low-rank terms.

        The base products are the same torch calls in kernel, twin and here, rounded
        to the dtype of x: only what is added to them is measured.
        """
        y, z, gradient_x, gradient_b = found
        x, g, a, b = (v.double() for v in (self.x, self.cotangent, self.a, self.b))
        s, n, rank, m = abs(self.scaling), a.shape[1], a.shape[0], b.shape[0]
        size_z = x.abs() @ a.abs().T
        assert_within("z", z, x @ a.T, gamma(n) * size_z)
        there = [v if v is None else v.to(device) for v in (self.x, self.weight, self.bias)]
        assert_within(
            "y",
            y,
            *self._added(
                F.linear(*there), x @ a.T @ b.T, gamma(n + rank + 3) * s * size_z @ b.abs().T
            ),
        )
        base = torch.matmul(self.cotangent.to(device), self.weight.to(device))
        size_h = g.abs() @ b.abs()
        assert_within(
            "gradient of x",
            gradient_x,
            *self._added(base, g @ b @ a, gamma(m + rank + 3) * s * size_h @ a.abs()),
        )
        flat_g, flat_z, flat_size = (v.reshape(-1, v.shape[-1]) for v in (g, x @ a.T, size_z))
        assert_within(
            "gradient of B",
            gradient_b,
            self.scaling * flat_g.T @ flat_z,
            gamma(n + flat_g.shape[0] + 3) * s * flat_g.abs().T @ flat_size,
        )

    def _added(self, base: Tensor, low: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return (base + s·low, bound): every rounding to the dtype of x counts once."""
        base, low = base.cpu().double(), self.scaling * low
        ulp = max(torch.finfo(self.x.dtype).eps, UNIT)
        return base + low, error + ulp * (base.abs() + low.abs() + (base + low).abs())


def layer(lead: tuple[int, ...], sizes: tuple[int, int, int], dtype: torch.dtype) -> Layer:
    """Draw a case: x of shape (*lead, n), and (n, m, r) = ``sizes``; A and B are float32."""
    n, m, rank = sizes
    draws = torch.Generator().manual_seed(n + m)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    return Layer(
        normal(*lead, n).to(dtype),
        (normal(m, n) / n**0.5).to(dtype),
        normal(m).to(dtype) if rank % 2 else None,
        normal(rank, n) / n**0.5,
        normal(m, rank),
        0.5 + rank,
        normal(*lead, m).to(dtype),
    )


__all__ = ["Layer", "Rows", "assert_within", "differentiate", "gamma", "layer", "rows"]
