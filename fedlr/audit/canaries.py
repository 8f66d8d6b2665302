"""Canaries: units whose gradients the auditor chooses, and the units of a site that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlr import checks
from fedlr.data.batching import Integers, UnitIndex
from fedlr.methods.method import PartKey, Parts
from fedlr.privacy.noise import public_stream, secret_stream

ORDINARY = -1
"""Stands for a drawn unit that is no canary."""


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions u_0 … u_{m-1} in the space of all trained arrays, public.

    Every coordinate belongs to one canary, by a public random permutation, and u_i has
    entries ±1/√n_i on its n_i coordinates. So the directions do not overlap, each is
    spread over all arrays (clipping each array alone makes its signal larger), and a real
    gradient falls on each of them with a random sign.

    Attributes:
        count: m, number of canaries.
        owner: Canary of each coordinate by array, int64, shape of the array.
        weight: Entry of its owner's direction there, float32, shape of the array.
    """

    count: int
    owner: Mapping[PartKey, Tensor]
    weight: Mapping[PartKey, Tensor]

    @staticmethod
    def draw(shapes: Mapping[PartKey, torch.Size], count: int) -> Directions:
        """Draw the directions of ``count`` canaries from a public stream.

        Args:
            shapes: Shape of every trained array.
            count: m, at most the number of coordinates.

        Raises:
            ValueError: There are fewer coordinates than canaries.
        """
        checks.at_least("canaries", count, 1)
        keys = sorted(shapes)
        sizes = [shapes[key].numel() for key in keys]
        total = sum(sizes)
        if total < count:
            raise ValueError(f"canaries = {count} must be ≤ {total}, the trained coordinates")
        generator = public_stream("audit", "directions").torch_generator()
        owner = torch.randperm(total, generator=generator) % count
        sign = 2.0 * torch.randint(0, 2, (total,), generator=generator) - 1.0
        weight = sign / torch.bincount(owner, minlength=count)[owner].sqrt()

        def split(flat: Tensor) -> dict[PartKey, Tensor]:
            pieces = zip(keys, torch.split(flat, sizes), strict=True)
            return {key: piece.reshape(shapes[key]) for key, piece in pieces}

        return Directions(count, split(owner), split(weight))

    def gradients(self, key: PartKey, canaries: Tensor) -> Tensor:
        """Return u_i restricted to one array for some canaries: (K,) int64 → (K, *shape)."""
        owner, weight = self.owner[key].to(canaries.device), self.weight[key].to(canaries.device)
        chosen = canaries.reshape(-1, *[1] * owner.ndim)
        return torch.where(owner == chosen, weight, 0.0)

    def project(self, parts: Parts) -> Tensor:
        """Return ⟨u_i, parts⟩ of every canary, shape (m,), float64, CPU."""
        found = torch.zeros(self.count, dtype=torch.float64)
        for key, owner in self.owner.items():
            product = self.weight[key].double() * parts[key].detach().cpu().double()
            found.index_add_(0, owner.flatten(), product.flatten())
        return found


def toss(count: int) -> npt.NDArray[np.bool_]:
    """Return one fair, independent coin per canary from the operating system's entropy."""
    included = np.zeros(count, dtype=np.bool_)
    included[secret_stream().poisson_sample(count, 0.5)] = True
    return included


@dataclass(frozen=True, eq=False)
class CanaryUnits(UnitIndex):
    """The units of a site, followed by one unit for each canary that is included.

    A canary needs a row, since units have rows; whatever gradient that row has is
    replaced (`fedlr.audit.trainer`).

    Attributes:
        included: Canary of each added unit, shape (k,), int64.
        drawn: For every Poisson draw so far, the canary of each drawn unit, `ORDINARY`
            for the site's own.
    """

    included: Integers
    drawn: list[Integers] = field(default_factory=list)

    @classmethod
    def join(cls, units: UnitIndex, coins: npt.NDArray[np.bool_], row: int) -> CanaryUnits:
        """Add the included canaries to a site's units, each with the one row ``row``."""
        included = np.flatnonzero(coins).astype(np.int64)
        rows = np.concatenate([units.rows, np.full(len(included), row, dtype=np.int64)])
        ends = units.offsets[-1] + 1 + np.arange(len(included))
        return cls(rows, np.concatenate([units.offsets, ends]), included)

    def rows_of(self, units: Integers) -> tuple[Integers, Integers]:
        """See `UnitIndex.rows_of`; notes which canaries were drawn."""
        padded = np.concatenate([self.included, [ORDINARY]])
        position = np.asarray(units) - (self.count - len(self.included))
        self.drawn.append(padded[np.where(position < 0, len(self.included), position)])
        return super().rows_of(units)
