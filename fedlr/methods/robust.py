"""Robust combiners that look at entries or at norms.

A coordinate-wise rule treats every number of an update by itself; the norm bound
looks at the whole update but only at its length. K clients counted, f of them may
send anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr import checks
from fedlr.methods.combine import NO_REFERENCE, mean_of
from fedlr.methods.method import ClientUpdate, PartKey, Parts
from fedlr.methods.vectors import check_enough, check_equal, counted, lower_median


@dataclass(frozen=True)
class CoordinateMedian:
    """The median of every entry; for an even K the mean of the two in the middle.

    Guarantees:
        With f ≤ ⌊(K − 1)/2⌋ malicious clients every entry lies between the smallest
        and the largest honest value. Bit-identical under permutation of the clients
        and under any split of an array into pieces. Equal clients come back as they are.

    Weights:
        Counts clients alike; unequal positive weights are refused, not ignored.

    Example:
        >>> from fedlr.methods.method import Role
        >>> key = PartKey("q", Role.B)
        >>> sent = [
        ...     ClientUpdate(str(x), {key: torch.tensor([x])}, steps=1) for x in (1.0, 2.0, -900.0)
        ... ]
        >>> CoordinateMedian()(sent, [1, 1, 1])[key].item()
        1.0

    Reference:
        Yin, Chen, Ramchandran and Bartlett, arXiv 1803.01498, definition 1.
    """

    name = "coordinate_median"
    linear = False
    minimum = 3

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the median; ``reference`` is not looked at, see `Combiner.__call__`.

        Raises:
            ValueError: Fewer than 3 clients of positive weight, unequal weights, or an
                update that is not finite.
        """
        ordered, shares = counted(updates, weights)
        check_enough(self.name, len(ordered), self.minimum, 1)
        check_equal(self.name, shares)
        return _between(ordered, (len(ordered) - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every entry without its f smallest and f largest values.

    Attributes:
        malicious: f ≥ 1; None trims ⌊(K − 1)/2⌋ on each side, which is the median.

    Guarantees:
        With f malicious clients every entry lies between the smallest and the largest
        honest value. Bit-identical under permutation of the clients and under any
        split of an array into pieces.

    Weights:
        Counts clients alike; unequal positive weights are refused, not ignored.

    Reference:
        Yin, Chen, Ramchandran and Bartlett, arXiv 1803.01498, definition 2, with
        β = f / K.
    """

    malicious: int | None = None

    name = "trimmed_mean"
    linear = False

    def __post_init__(self) -> None:
        if self.malicious is not None:
            checks.at_least("malicious", self.malicious, 1)

    @property
    def minimum(self) -> int:
        """2f + 1; 3 where f is not set."""
        return 2 * (self.malicious or 1) + 1

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the trimmed mean; ``reference`` is not looked at, see `Combiner.__call__`.

        Raises:
            ValueError: Fewer than 2f + 1 clients of positive weight, unequal weights, or
                an update that is not finite.
        """
        ordered, shares = counted(updates, weights)
        check_enough(self.name, len(ordered), self.minimum, self.malicious or 1)
        check_equal(self.name, shares)
        return _between(ordered, self.malicious or (len(ordered) - 1) // 2)


def _between(ordered: Sequence[ClientUpdate], cut: int) -> dict[PartKey, Tensor]:
    """The mean of every entry without its ``cut`` smallest and largest values."""
    found = {}
    for key, first in ordered[0].parts.items():
        values = torch.stack([update.parts[key].detach().double() for update in ordered])
        kept = values.sort(dim=0).values[cut : len(ordered) - cut]
        total = torch.zeros_like(kept[0])
        # In the order of size: which client had which value is in no rounding.
        for row in kept:
            total += row
        found[key] = (total / len(kept)).to(first.dtype)
    return found


@dataclass(frozen=True)
class NormBoundedMean:
    """Σ p_k x_k with every change x_k − x_ref cut to one Frobenius norm over all parts.

    Attributes:
        bound: M > 0, in the unit of the updates; None takes the median of the norms of
            this round's clients (the lower one of two), which needs no knowledge of the
            scale. A part without a reference counts from zero.

    Guarantees:
        ‖result − x_ref‖ ≤ M, and no client moves the result by more than p_k·M. With
        the median, M is at most the largest honest norm while f ≤ ⌊(K − 1)/2⌋. An
        update within the bound enters as it was sent: where all are, the result is the
        weighted mean, bit for bit. It bounds harm and does not remove it: malicious
        clients of total weight p move the result by up to p·M.

    Weights:
        Used, as in the weighted mean; norms count clients alike.

    Reference:
        Sun, Kairouz, Suresh and McMahan, arXiv 1911.07963 (norm thresholding of updates,
        without noise).
    """

    bound: float | None = None

    name = "norm_bounded_mean"
    linear = False

    def __post_init__(self) -> None:
        if self.bound is not None:
            checks.positive("bound", self.bound)

    @property
    def minimum(self) -> int:
        """1 under a bound of its own; 3 where the median of the norms is the bound."""
        return 3 if self.bound is None else 1

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the mean of the cut updates, see `Combiner.__call__`.

        Raises:
            ValueError: Too few clients of positive weight, or an update that is not finite.
        """
        ordered, shares = counted(updates, weights)
        check_enough(self.name, len(ordered), self.minimum, 1)
        norms = [_norm(update, reference) for update in ordered]
        bound = lower_median(norms) if self.bound is None else self.bound
        found = {}
        for key, first in ordered[0].parts.items():
            start = reference.get(key, torch.zeros_like(first)).detach().double()
            cut = [
                _shortened(update.parts[key].detach().double(), start, norm, bound)
                for update, norm in zip(ordered, norms, strict=True)
            ]
            found[key] = mean_of(cut, shares).to(first.dtype)
        return found


def _norm(update: ClientUpdate, reference: Parts) -> float:
    """‖x − x_ref‖ over all parts."""
    squares = []
    for key, value in update.parts.items():
        change = value.detach().double()
        if key in reference:
            change = change - reference[key].detach().double()
        squares.append(float(change.square().sum()))
    return math.sqrt(math.fsum(squares))


def _shortened(value: Tensor, start: Tensor, norm: float, bound: float) -> Tensor:
    """Start + min(1, bound / norm)·(value − start); ``value`` itself where it is short enough."""
    return value if norm <= bound else start + (value - start) * (bound / norm)
