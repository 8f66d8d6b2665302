"""Combiners: many clients' arrays become one array per part.

The weighted mean is the combiner that secure aggregation supports and under
which FedSVD's and FFA-LoRA's aggregation is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlr import checks
from fedlr.methods.method import ClientUpdate, PartKey

Combiner = Callable[[Sequence[ClientUpdate], Sequence[float]], dict[PartKey, Tensor]]
"""(updates, weights) → one array per part key, with the updates' shape and dtype.

Pure, and invariant under a joint permutation of updates and weights.
"""


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


def weighted_mean(
    updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> dict[PartKey, Tensor]:
    """Return Σ p_k x_k of every part, p_k the normalised weights.

    Args:
        updates: K ≥ 1 updates of distinct clients with the same part keys,
            shapes and floating dtypes. Values are not inspected: NaN propagates.
        weights: K weights as in `normalised`.

    Returns:
        One new array per part key, in the dtype and on the device of the inputs.

    Raises:
        ValueError: No update; weights that `normalised` refuses or that are not
            K; a client that appears twice; part keys, a shape or a dtype that
            differ between clients, or a dtype that is not floating.

    Guarantees:
        Accumulated in float64 in the order of client identifiers, one rounded
        product and one rounded sum per client and element: the result is
        bit-identical under permutation of the clients and under any split of an
        array into pieces. One client comes back bit-identical.

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
    if len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates but {len(weights)} weights; give one per update")
    _check_alike(updates)
    shares = normalised(weights)
    order = sorted(range(len(updates)), key=lambda index: updates[index].client)
    return {
        key: _mean([updates[i].parts[key] for i in order], [shares[i] for i in order])
        for key in updates[order[0]].parts
    }


def _mean(arrays: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ p_k x_k in float64, in the given order, rounded to the input's dtype."""
    total = torch.zeros_like(arrays[0], dtype=torch.float64)
    for array, share in zip(arrays, shares, strict=True):
        # A fused multiply-add may round vector bodies and tails differently.
        total += array.detach().double() * share
    return total.to(arrays[0].dtype)


def _check_alike(updates: Sequence[ClientUpdate]) -> None:
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
