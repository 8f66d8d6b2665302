"""Low-rank factor pairs: the frozen type every layer of the library shares.

One adapted linear layer ("adapter site") has the update ``s·B·A`` with B of
shape m × r, A of shape r × n and s the scaling α / r (LoRA, arXiv 2106.09685,
section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlr import checks


@dataclass(frozen=True)
class AdapterSite:
    """The public description of one adapted linear layer.

    Attributes:
        name: Path of the linear layer inside the base model, e.g.
            ``"encoder.layer.5.attention.self.query"``.
        out_features: m, rows of the base weight.
        in_features: n, columns of the base weight.
        rank: r, 1 ≤ r ≤ min(m, n).
        scaling: s = α / r, multiplies B·A.

    Raises:
        ValueError: On a non-positive dimension, a rank outside [1, min(m, n)],
            or a scaling that is not a positive finite number.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    scaling: float

    def __post_init__(self) -> None:
        checks.at_least(f"{self.name}: out_features", self.out_features, 1)
        checks.at_least(f"{self.name}: in_features", self.in_features, 1)
        checks.at_least(f"{self.name}: rank", self.rank, 1)
        if self.rank > min(self.out_features, self.in_features):
            raise ValueError(
                f"{self.name}: rank = {self.rank} must be ≤ min(m, n) = "
                f"{min(self.out_features, self.in_features)}; lower the rank"
            )
        checks.positive(f"{self.name}: scaling", self.scaling)


@dataclass(frozen=True)
class Factors:
    """A factor pair of one site, shape-checked and never mutated.

    Attributes:
        b: Up-projection, shape (m, r) or batched (..., m, r), floating.
        a: Down-projection, shape (r, n) or (..., r, n), same dtype and device.
        scaling: s = α / r, multiplies B·A; positive and finite.

    Raises:
        ValueError: Inner dimensions, batch dimensions, dtype or device differ.

    Example:
        >>> f = Factors(b=torch.ones(3, 2), a=torch.ones(2, 4), scaling=0.5)
        >>> f.product()[0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    b: Tensor
    a: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        checks.positive("scaling", self.scaling)
        if self.b.ndim < 2 or self.a.ndim != self.b.ndim:
            raise ValueError(
                f"b has {self.b.ndim} dimensions and a has {self.a.ndim}; both need the same, ≥ 2"
            )
        expected = (*self.b.shape[:-2], self.b.shape[-1], self.a.shape[-1])
        checks.same_shape("a", self.a.shape, expected)
        if self.a.dtype != self.b.dtype or self.a.device != self.b.device:
            raise ValueError(
                f"a is {self.a.dtype} on {self.a.device} but b is {self.b.dtype} on {self.b.device}"
            )

    @property
    def rank(self) -> int:
        """r, the inner dimension."""
        return int(self.b.shape[-1])

    def product(self) -> Tensor:
        """Return s·B·A, shape (..., m, n). Forms m × n: for tests and export."""
        return self.scaling * (self.b @ self.a)

    def scale(self, factor: float) -> Factors:
        """Return the pair whose product is ``factor`` times this one's (B scaled)."""
        return replace(self, b=self.b * checks.finite("factor", factor))

    def truncate(self, rank: int) -> Factors:
        """Return the leading ``rank`` columns of B and rows of A.

        Optimal (Eckart-Young) only when the columns are sorted by singular
        value, as `fedlr.lowrank.svd.refactorise` leaves them.

        Raises:
            ValueError: ``rank`` is outside [1, r].
        """
        checks.in_range("rank", rank, 1, self.rank)
        return replace(self, b=self.b[..., :rank], a=self.a[..., :rank, :])


def stack(pairs: list[Factors]) -> Factors:
    """Concatenate pairs along the rank: the product is the sum of the products.

    Args:
        pairs: K ≥ 1 pairs with equal (m, n), dtype and device; ranks may
            differ. Each pair's scaling is folded into its B.

    Returns:
        One pair of rank Σ r_k and scaling 1.

    Raises:
        ValueError: ``pairs`` is empty or the outer shapes differ.
    """
    if not pairs:
        raise ValueError("pairs is empty; stack needs at least one factor pair")
    b = torch.cat([pair.b * pair.scaling for pair in pairs], dim=-1)
    a = torch.cat([pair.a for pair in pairs], dim=-2)
    return Factors(b=b, a=a)
