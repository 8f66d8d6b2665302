"""Robust combiners that look at distances between whole updates.

An update is one vector over all of its parts. Only differences enter, so a reference
changes no result; it keeps the distances precise. K clients counted, f of them may
send anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr import checks
from fedlr.methods.combine import NO_REFERENCE, mean_of
from fedlr.methods.method import ClientUpdate, PartKey, Parts
from fedlr.methods.vectors import (
    changes,
    check_enough,
    check_equal,
    counted,
    inner_products,
    lower_median,
    mixture,
    squared_distances,
)

SMOOTHING = 1e-6
"""ν of the smoothed Weiszfeld algorithm, in units of the typical distance of two clients."""

TOLERANCE = 1e-9
"""Step below which it has converged, in the same unit."""

STEPS = 10_000
"""Most steps of it; a limit for inputs on which it converges slowly."""


@dataclass(frozen=True)
class Krum:
    """The one update that is nearest to its K − f − 2 nearest neighbours.

    score_k = Σ ‖x_k − x_l‖² over those neighbours l ≠ k; the lowest score wins, and of
    equal scores the first client identifier.

    Attributes:
        malicious: f ≥ 1, with K ≥ 2f + 3; None takes ⌊(K − 3)/2⌋.

    Guarantees:
        Returns an update bit-identical to the one that was sent. With f malicious
        clients it lies within √(K − f − 2)·Δ of an honest one, Δ the largest distance
        of two honest ones: the winner's score is at most an honest one's, which is
        ≤ (K − f − 2)·Δ², and one of its neighbours is honest because f − 1 < K − f − 2.

    Weights:
        Counts clients alike; unequal positive weights are refused, not ignored.

    Reference:
        Blanchard, El Mhamdi, Guerraoui and Stainer, arXiv 1703.02757.
    """

    malicious: int | None = None

    name = "krum"
    linear = False

    def __post_init__(self) -> None:
        if self.malicious is not None:
            checks.at_least("malicious", self.malicious, 1)

    @property
    def minimum(self) -> int:
        """2f + 3; 5 where f is not set."""
        return 2 * (self.malicious or 1) + 3

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the arrays of the chosen client, see `Combiner.__call__`.

        Raises:
            ValueError: Fewer than 2f + 3 clients of positive weight, unequal weights, or
                an update that is not finite.
        """
        ordered, shares = counted(updates, weights)
        check_enough(self.name, len(ordered), self.minimum, self.malicious or 1)
        check_equal(self.name, shares)
        first, *_ = _ranked(ordered, reference, self.malicious)
        return {key: value.detach().clone() for key, value in ordered[first].parts.items()}


@dataclass(frozen=True)
class MultiKrum:
    """The weighted mean of the K − f − 2 updates of the lowest Krum scores.

    As many as a score has neighbours; the paper leaves the number open.

    Attributes:
        malicious: f ≥ 1, with K ≥ 2f + 3; None takes ⌊(K − 3)/2⌋.

    Guarantees:
        With f malicious clients every chosen update lies within √(K − f − 2)·Δ of an
        honest one, as for `Krum`, since K − f honest clients have scores
        ≤ (K − f − 2)·Δ²; their mean is as near to the convex hull of the honest ones.

    Weights:
        Scores count clients alike; the chosen are averaged with their weights.

    Reference:
        Blanchard, El Mhamdi, Guerraoui and Stainer, arXiv 1703.02757 (Multi-Krum).
    """

    malicious: int | None = None

    name = "multi_krum"
    linear = False

    def __post_init__(self) -> None:
        if self.malicious is not None:
            checks.at_least("malicious", self.malicious, 1)

    @property
    def minimum(self) -> int:
        """2f + 3; 5 where f is not set."""
        return 2 * (self.malicious or 1) + 3

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the mean of the chosen clients, see `Combiner.__call__`.

        Raises:
            ValueError: Fewer than 2f + 3 clients of positive weight, or an update that is
                not finite.
        """
        ordered, shares = counted(updates, weights)
        check_enough(self.name, len(ordered), self.minimum, self.malicious or 1)
        neighbours = _neighbours(len(ordered), self.malicious)
        chosen = sorted(_ranked(ordered, reference, self.malicious)[:neighbours])
        total = sum(shares[k] for k in chosen)
        return {
            key: mean_of(
                [ordered[k].parts[key] for k in chosen], [shares[k] / total for k in chosen]
            )
            for key in ordered[0].parts
        }


def _neighbours(clients: int, malicious: int | None) -> int:
    """K − f − 2, with the most malicious clients that K allows where f is None."""
    return clients - (malicious or (clients - 3) // 2) - 2


def _ranked(ordered: Sequence[ClientUpdate], reference: Parts, malicious: int | None) -> list[int]:
    """Indices of the clients by rising Krum score."""
    clients = len(ordered)
    squares = squared_distances(inner_products(changes(ordered, reference)))
    # The first of each sorted row is the zero distance of a client from itself.
    nearest = squares.sort(dim=1).values[:, 1 : _neighbours(clients, malicious) + 1]
    scores = nearest.sum(dim=1).tolist()
    return sorted(range(clients), key=lambda k: (scores[k], k))


@dataclass(frozen=True)
class GeometricMedian:
    """The point z with the smallest Σ p_k ‖z − x_k‖, by the smoothed Weiszfeld algorithm.

    z ← Σ β_k x_k / Σ β_k with β_k = p_k / max(ν, ‖z − x_k‖), from the weighted mean on,
    until a step is shorter than `TOLERANCE`. It runs on the K coefficients of z and the
    K × K inner products alone: its cost per step does not depend on the model.

    Guarantees:
        With malicious clients of total share α < ½, for every point μ within r of all
        honest ones, ‖z − μ‖ ≤ 2(1 − α)/(1 − 2α)·r up to the smoothing. ν is `SMOOTHING`
        times the median over the clients of their median distance to the others, which
        f ≤ ⌊(K − 1)/2⌋ clients cannot raise above the largest distance of two honest
        ones. Deterministic: no randomness, the order of replies is in no result. Equal
        clients come back as they are.

    Weights:
        Used: what counts is the share of weight, so a client with half of it decides alone.

    Reference:
        Pillutla, Kakade and Harchaoui, arXiv 1912.13445 (RFA), with a relative ν and a
        test of convergence in the place of its fixed number of steps.
    """

    name = "geometric_median"
    linear = False
    minimum = 3

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the geometric median, see `Combiner.__call__`.

        Raises:
            ValueError: Fewer than 3 clients of positive weight, or an update that is not
                finite.
        """
        ordered, shares = counted(updates, weights)
        check_enough(self.name, len(ordered), self.minimum, 1)
        typical = _typical(squared_distances(inner_products(changes(ordered, reference))))
        # Relative to a client in the middle of the others, the inner products of those
        # near each other are as precise as their distances, whatever the rest sent.
        base = ordered[typical.index(min(typical))].parts
        stacks = changes(ordered, base)
        products = inner_products(stacks)
        coefficients = weiszfeld(products, torch.tensor(shares, dtype=torch.float64))
        return mixture(stacks, coefficients, base, ordered[0].parts)


def weiszfeld(products: Tensor, shares: Tensor) -> Tensor:
    """Return c, Σ c_k = 1, such that Σ c_k x_k is the smoothed geometric median.

    Args:
        products: ⟨x_k, x_l⟩ relative to a point near most of them; float64, (K, K).
        shares: p_k > 0 with sum 1; float64, (K,).

    Returns:
        float64, (K,), all > 0. The shares themselves where all x_k are equal.
    """
    squares = squared_distances(products)
    positive = squares[squares > 0]
    if not len(positive):
        return shares
    unit = lower_median(_typical(squares)) or float(positive.min().sqrt())
    found = shares
    for _ in range(STEPS):
        mixed = products @ found
        away = (found @ mixed - 2 * mixed + products.diagonal()).clamp(min=0.0).sqrt()
        pull = shares / away.clamp(min=SMOOTHING * unit)
        following = pull / pull.sum()
        step = following - found
        found = following
        if float(step @ products @ step) <= (TOLERANCE * unit) ** 2:
            break
    return found


def _typical(squares: Tensor) -> list[float]:
    """Every client's median distance to the others."""
    rows = squares.sqrt().tolist()
    return [lower_median(row[:k] + row[k + 1 :]) for k, row in enumerate(rows)]
