"""The consensus filter: drop the directions of a combined change that clients do not share.

The combined change of a site's B is C = Σ S_i u_i v_iᵀ (m × r). A direction i stays if
the clients agree on it, else its term is taken out of C. Like the consensus projection
of FedGSA (arXiv 2608.03267) it filters the mean of the clients' B by column directions
and is post-processing of what clients have released: no ε. The measure of agreement is
this project's own (`agreement`).

Why it is taken on the small side, of r directions: among m ≫ r directions the combined
noise of K clients always finds one that every client's noise shares in. Were agreement
measured along u_i, pure noise would reach about m / (m + r·(K − 1)), almost 1; along
v_i it is about Σ p_k², whatever m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr import checks
from fedlr.methods.combine import NO_REFERENCE, Combiner
from fedlr.methods.method import ClientUpdate, PartKey, Parts, Role
from fedlr.methods.vectors import counted, lower_median

SLACK = 1e-9
"""Rounding by which the agreement of equal clients may miss 1."""


@dataclass(frozen=True)
class Consensus:
    """A combiner whose change of every B and A keeps only what clients agree on.

    Attributes:
        inner: The combiner that is filtered.
        threshold: t in [0, 1]: directions with agreement < t are dropped. 0 drops none.
            Σ p_k² (1/K for equal weights) is what independent noise has.

    Guarantees:
        t = 0, and every site where nothing is dropped, gives the inner combiner's
        arrays bit for bit; where all is dropped, the reference. Equal clients lose
        nothing at any t. The filter only removes:
        ‖filtered change‖ ≤ ‖change‖. It reads nothing but released updates and public
        weights, so under differential privacy it is post-processing. Heads and other
        roles pass through.

    Weights:
        As the inner combiner; agreement uses the shares p_k.
    """

    inner: Combiner
    threshold: float

    linear = False

    def __post_init__(self) -> None:
        checks.in_range("consensus", self.threshold, 0.0, 1.0)

    @property
    def name(self) -> str:
        """The inner combiner's name with the filter's."""
        return f"{self.inner.name}+consensus"

    @property
    def minimum(self) -> int:
        """That of the inner combiner: one client agrees with itself and loses nothing."""
        return self.inner.minimum

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the filtered combination; a part without a reference counts from zero.

        Raises:
            ValueError: What the inner combiner refuses, or an update that is not finite.
        """
        combined = self.inner(updates, weights, reference)
        if self.threshold == 0:
            return combined
        ordered, shares = counted(updates, weights)
        for key, value in combined.items():
            if key.role in (Role.A, Role.B):
                start = reference.get(key, torch.zeros_like(value)).detach().double()
                sent = torch.stack([u.parts[key].detach().double() for u in ordered]) - start
                combined[key] = self._filtered(value, start, sent, shares, key.role)
        return combined

    def _filtered(
        self, value: Tensor, start: Tensor, sent: Tensor, shares: Sequence[float], role: Role
    ) -> Tensor:
        """``value`` without the dropped directions of value − start."""
        change = value.double() - start
        if role is Role.A:
            change, sent = change.mT, sent.mT
        left, size, right = torch.linalg.svd(change, full_matrices=False)
        shared = agreement(sent, shares, right.mT) >= self.threshold - SLACK
        if bool(shared.all()):
            return value
        kept: Tensor = left[:, shared] * size[shared] @ right[shared]
        return (start + (kept.mT if role is Role.A else kept)).to(value.dtype)


def agreement(sent: Tensor, shares: Sequence[float], directions: Tensor) -> Tensor:
    """Return how far the clients agree along each direction.

    agreement_i = ‖Σ p_k X_k v_i‖² / Σ p_k ‖X_k v_i‖², with X_k the changes cut to the
    median of their norms, so that no single client can outvote the others by its length.

    Args:
        sent: Changes, float64, shape (K, m, r).
        shares: p_k > 0 with sum 1.
        directions: v_i as columns, orthonormal, float64, shape (r, i).

    Returns:
        float64, shape (i,), in [0, 1] up to rounding (Jensen): 1 where all are equal, and
        where none has a component; Σ p_k² where the X_k v_i are orthogonal and equally long.
        Independent noise of variance σ² per number around a common s·u·vᵀ has, for large
        m, 1/K + (1 − 1/K)·s²/(s² + σ²·m) along v under equal weights, and 1/K elsewhere.

    Example:
        >>> sent = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]], dtype=torch.float64)
        >>> agreement(sent, [0.5, 0.5], torch.eye(2, dtype=torch.float64)).tolist()
        [1.0, 0.0]
    """
    norms = sent.flatten(start_dim=1).norm(dim=1)
    bound = lower_median(norms.tolist())
    cut = torch.where(norms > bound, bound / norms, 1.0)
    along = sent @ directions * cut[:, None, None]  # (K, m, i)
    weight = torch.tensor(shares, dtype=torch.float64)
    common = torch.einsum("k,kmi->mi", weight, along).square().sum(dim=0)
    whole = torch.einsum("k,kmi->i", weight, along.square())
    return torch.where(whole > 0, common / whole, 1.0)
