"""What a combiner is, and the weighted mean: many clients' arrays become one per part.

The weighted mean is the combiner that secure aggregation supports and under
which FedSVD's and FFA-LoRA's aggregation is exact. The list of all combiners is
`fedlr.methods.combiners`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedlr import checks
from fedlr.methods.method import ClientUpdate, PartKey, Parts

NO_REFERENCE: Parts = {}
"""For combiners that look at the clients' arrays alone."""


class Combiner(Protocol):
    """How the clients' arrays become one.

    Pure, and invariant under a joint permutation of updates and weights.
    """

    @property
    def name(self) -> str:
        """Name in the configuration."""
        ...

    @property
    def linear(self) -> bool:
        """Whether it is a weighted sum with weights known beforehand."""
        ...

    @property
    def minimum(self) -> int:
        """Fewest updates it is defined for, ≥ 1: below, its breakdown point is void."""
        ...

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Combine the updates of one phase.

        Args:
            updates: K ≥ `minimum` updates with the same part keys, shapes and dtypes.
            weights: K non-negative public weights, not all zero.
            reference: What the clients started from, by the keys of the updates, where
                the server holds it; a combiner of changes needs it.

        Returns:
            One new array per part key, with the updates' shape and dtype.

        Raises:
            ValueError: Fewer updates than `minimum`, or what `check_alike` refuses.
        """
        ...


def normalised(weights: Sequence[float]) -> list[float]:
    """Return p_k = w_k / Σ w_j.

    Args:
        weights: K ≥ 1 finite numbers ≥ 0, not all zero.

    Returns:
        K numbers in [0, 1] whose sum is 1 up to rounding. The sum is exact
        before one rounding, so p_k does not depend on the order of the others,
        and a single client gets exactly 1.

    Raises:
        ValueError: Empty, a negative or non-finite weight, or zero total.

    Example:
        >>> normalised([1, 3])
        [0.25, 0.75]
    """
    if not weights:
        raise ValueError("weights is empty; at least one client must take part")
    for index, weight in enumerate(weights):
        checks.non_negative(f"weights[{index}]", weight)
    largest = max(weights)
    if largest == 0:
        raise ValueError(
            f"the total weight of {len(weights)} clients is 0; give at least one a positive weight"
        )
    # Dividing by the largest first keeps the sum of huge weights finite.
    scaled = [weight / largest for weight in weights]
    total = math.fsum(scaled)
    return [weight / total for weight in scaled]


@dataclass(frozen=True)
class WeightedMean:
    """Σ p_k x_k of every part, p_k the normalised weights.

    Guarantees:
        Accumulated in float64 in the order of client identifiers, one rounded
        product and one rounded sum per client and element: the result is
        bit-identical under permutation of the clients and under any split of an
        array into pieces. One client comes back bit-identical. Values are not
        inspected: NaN propagates.

    Example:
        >>> from fedlr.methods.method import Role
        >>> key = PartKey("q", Role.B)
        >>> one = ClientUpdate("one", {key: torch.tensor([[1.0]])}, steps=1)
        >>> two = ClientUpdate("two", {key: torch.tensor([[5.0]])}, steps=1)
        >>> weighted_mean([one, two], [3, 1])[key].item()
        2.0

    Reference:
        FederatedAveraging, McMahan et al., arXiv 1602.05629, algorithm 1.
    """

    name = "weighted_mean"
    linear = True
    minimum = 1

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        """Return the mean; ``reference`` is not looked at, see `Combiner.__call__`."""
        ordered, shares = in_order(updates, weights)
        return {
            key: mean_of([update.parts[key] for update in ordered], shares)
            for key in ordered[0].parts
        }


weighted_mean = WeightedMean()
"""The one instance: it has no settings."""


def check_weights(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> list[float]:
    """Return `normalised` weights, one per update; ValueError where there are more or fewer."""
    if len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates but {len(weights)} weights; give one per update")
    return normalised(weights)


def in_order(
    updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> tuple[list[ClientUpdate], list[float]]:
    """Return updates and their shares p_k in the order of client identifiers.

    Raises:
        ValueError: No update; weights that `normalised` refuses or that are not
            K; and what `check_alike` refuses.
    """
    check_alike(updates)
    shares = check_weights(updates, weights)
    order = sorted(range(len(updates)), key=lambda index: updates[index].client)
    return [updates[index] for index in order], [shares[index] for index in order]


def mean_of(arrays: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return Σ p_k x_k, summed in float64 in the given order, in the dtype of the arrays.

    Args:
        arrays: K ≥ 1 arrays of one shape and floating dtype.
        shares: K numbers p_k.

    Returns:
        A new array of that shape and dtype.
    """
    total = torch.zeros_like(arrays[0], dtype=torch.float64)
    for array, share in zip(arrays, shares, strict=True):
        # A fused multiply-add may round vector bodies and tails differently.
        total += array.detach().double() * share
    return total.to(arrays[0].dtype)


def check_alike(updates: Sequence[ClientUpdate]) -> None:
    """ValueError unless clients are distinct and their parts have one signature."""
    clients = [update.client for update in updates]
    repeated = sorted({client for client in clients if clients.count(client) > 1})
    if repeated:
        raise ValueError(f"clients {repeated} appear more than once; send one update per client")
    for update in updates:
        first = updates[0]
        if update.parts.keys() != first.parts.keys():
            differing = sorted(update.parts.keys() ^ first.parts.keys())
            raise ValueError(
                f"clients {first.client!r} and {update.client!r} sent different parts: {differing}"
            )
        for key, array in update.parts.items():
            checks.same_shape(f"{update.client}: {key}", array.shape, first.parts[key].shape)
            if array.dtype != first.parts[key].dtype or not array.dtype.is_floating_point:
                raise ValueError(
                    f"{update.client}: {key} has dtype {array.dtype}, expected the floating "
                    f"dtype {first.parts[key].dtype} that client {first.client!r} sent"
                )
