"""The Flag Aggregator: the mean update inside a subspace that is near to the updates.

Hamidreza Almasi, Harsh Mishra, Balajee Vamanan, Sathya N. Ravi: Flag Aggregator:
Scalable Distributed Training under Failures and Augmented Losses using Convex
Optimization, ICLR 2024, arXiv 2302.05865.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.methods.combine import NO_REFERENCE
from fedlr.methods.method import ClientUpdate, PartKey, Parts
from fedlr.methods.vectors import (
    changes,
    check_enough,
    check_equal,
    counted,
    inner_products,
    lower_median,
    mixture,
)

PERTURBATION = 1e-7
"""Added to 1 − v_k, so that a client inside the subspace has a finite weight."""

STEPS = 100
"""Most reweightings; each lowers the objective."""

TOLERANCE = 1e-10
"""Fall of the objective per client below which it has converged."""


@dataclass(frozen=True)
class Flag:
    """Y·Yᵀ·mean of the clients' changes, Y (d × m) near to most of their directions.

    With g_k = Δ_k / ‖Δ_k‖ the direction of client k's whole change, Y with orthonormal
    columns is a local minimum of Σ √(1 − v_k), v_k = ‖Yᵀ g_k‖², by iteratively reweighted
    singular value decompositions (`explained_subspace`). The mean that is projected is that of
    changes cut to the median of their norms (the lower one of two); m = ⌈(K + 1)/2⌉.

    Guarantees:
        ‖result − x_ref‖ is at most that median, which is at most the largest honest norm
        while f ≤ ⌊(K − 1)/2⌋: harm is bounded, not removed. The projection leaves out
        what the clients' directions spend least on; a malicious direction is among that
        only where the honest ones fill m dimensions by themselves, and never where they
        share it. Up to rounding equal clients come back as they are.

    Differences from the authors' code:
        It starts from a random subspace and takes m as a setting; here equal weights
        are the start, so that the result is deterministic. Its pairwise term (λ), off by
        default, is left out. It sums the directions g_k, which loses the length of an
        update; here it is the changes, bounded as said.

    Weights:
        Counts clients alike; unequal positive weights are refused, not ignored.

    Reference:
        Almasi, Mishra, Vamanan and Ravi, arXiv 2302.05865, and its public code.
    """

    name = "flag"
    linear = False
    minimum = 3

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return reference + projection; a part without a reference counts from zero.

        Raises:
            ValueError: Fewer than 3 clients of positive weight, unequal weights, or an
                update that is not finite.
        """
        ordered, shares = counted(updates, weights)
        check_enough(self.name, len(ordered), self.minimum, 1)
        check_equal(self.name, shares)
        stacks = changes(ordered, reference)
        norms = inner_products(stacks).diagonal().sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        units = {key: rows * inverse[:, None] for key, rows in stacks.items()}
        products = inner_products(units)
        basis = explained_subspace(products, (len(ordered) + 2) // 2)
        bounded = norms.clamp(max=lower_median(norms.tolist())) / len(ordered)
        return mixture(
            units, basis @ (basis.mT @ (products @ bounded)), reference, ordered[0].parts
        )


def explained_subspace(products: Tensor, dimension: int) -> Tensor:
    """Return C (K × m) such that the columns of Y = [g_1 … g_K]·C are orthonormal.

    Y are the leading left singular vectors of [w_1·g_1 … w_K·g_K], and again with
    w_k = (1 − v_k + ε)^(−¼) until Σ √(1 − v_k + ε) falls no further. No step raises it:
    the root is concave, so its tangent at the present v_k, of slope −w_k²/2, bounds it
    from above, and the next Y is where that bound is lowest.

    Args:
        products: ⟨g_k, g_l⟩ of K vectors of length 1 or 0; float64, (K, K).
        dimension: m, in [1, K].

    Returns:
        float64, (K, m'), m' ≤ m the rank that was found; (K, 0) where all g_k are zero.
    """
    weight = torch.ones(len(products), dtype=torch.float64)
    before = torch.inf
    basis = products.new_zeros(len(products), 0)
    for _ in range(STEPS):
        values, vectors = torch.linalg.eigh(weight[:, None] * products * weight[None, :])
        smallest = len(products) * torch.finfo(torch.float64).eps * float(values[-1])
        kept = [i for i in range(len(products) - dimension, len(products)) if values[i] > smallest]
        found = weight[:, None] * vectors[:, kept] / values[kept].sqrt()
        lost = (1 - (products @ found).square().sum(dim=1)).clamp(min=0.0) + PERTURBATION
        objective = float(lost.sqrt().sum())
        if objective >= before:
            break
        basis = found
        if before - objective <= TOLERANCE * len(products):
            break
        before, weight = objective, lost ** (-0.25)
    return basis
