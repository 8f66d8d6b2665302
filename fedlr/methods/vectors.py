"""A cohort as vectors: who counts, what each client changed, how far apart they are.

A combiner that judges a whole update looks at all of its parts together, as one
vector x_k, and at changes x_k − x_ref where the server holds a reference. Everything
is float64, and in the order of client identifiers: the order of replies is in no result.
Where clients train different ranks, each block of columns is a cohort of its own
(`fedlr.methods.shared.combined`), and a whole update is what it has in that block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlr.methods.combine import in_order
from fedlr.methods.method import ClientUpdate, PartKey, Parts

Stacks = Mapping[PartKey, Tensor]
"""The clients' changes by part: float64, shape (K, numbers of the part)."""


def counted(
    updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> tuple[list[ClientUpdate], list[float]]:
    """Return the updates of positive weight and their shares, ordered by client.

    Args:
        updates: K ≥ 1 updates of one signature.
        weights: K non-negative weights, not all zero.

    Returns:
        Updates, and shares p_k > 0 that sum to 1 up to rounding.

    Raises:
        ValueError: What `in_order` refuses; an update that holds NaN or ∞, or whose
            squared norm leaves the range of float64. It names the client.

    Guarantees:
        A client of weight zero is not looked at beyond its signature.
    """
    ordered, shares = in_order(updates, weights)
    found = [(u, p) for u, p in zip(ordered, shares, strict=True) if p > 0]
    for update, _ in found:
        for key, value in update.parts.items():
            if not math.isfinite(float(value.detach().double().square().sum())):
                raise ValueError(
                    f"{update.client}: {key.site}/{key.role} holds NaN, infinite or too large "
                    "entries; leave the client out of this round"
                )
    return [update for update, _ in found], [share for _, share in found]


def check_equal(name: str, shares: Sequence[float]) -> None:
    """ValueError where shares differ, for a combiner that counts every client alike."""
    if min(shares) != max(shares):
        raise ValueError(
            f"{name} counts every client alike, but the shares of weight lie between "
            f"{min(shares):.3g} and {max(shares):.3g}; set method.weights=uniform"
        )


def check_enough(name: str, clients: int, minimum: int, malicious: int) -> None:
    """ValueError where fewer clients count than the breakdown point needs.

    Args:
        name: The combiner.
        clients: K, the clients of positive weight.
        minimum: Fewest clients with which it bears ``malicious`` ones.
        malicious: f ≥ 1.
    """
    if clients < minimum:
        raise ValueError(
            f"{name} bears f = {malicious} malicious from K = {minimum} clients of positive "
            f"weight on, but K = {clients}; take more clients a round, lower combine.malicious "
            "where it is set, or set combine=weighted_mean"
        )


def changes(ordered: Sequence[ClientUpdate], reference: Parts) -> Stacks:
    """Return every client's change by part, row k for client k.

    Args:
        ordered: K ≥ 1 updates of one signature.
        reference: What they started from; a part that is not in it counts from zero.
    """
    found = {}
    for key in ordered[0].parts:
        rows = torch.stack([update.parts[key].detach().double().flatten() for update in ordered])
        if key in reference:
            rows -= reference[key].detach().double().flatten()
        found[key] = rows
    return found


def inner_products(stacks: Stacks) -> Tensor:
    """Return ⟨x_k, x_l⟩ over all parts: float64, shape (K, K), symmetric."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in stacks.values():
        total = total + rows @ rows.mT
    return (total + total.mT) / 2


def squared_distances(products: Tensor) -> Tensor:
    """Return ‖x_k − x_l‖² ≥ 0 from inner products, shape (K, K), zero on the diagonal.

    Guarantees:
        The rounding error of an entry is of the order of ε·(‖x_k‖² + ‖x_l‖²): one huge
        vector does not spoil the distances between others.
    """
    squares = products.diagonal()
    found = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0.0)
    return found.fill_diagonal_(0.0)


def mixture(
    stacks: Stacks, coefficients: Tensor, base: Parts, like: Parts
) -> dict[PartKey, Tensor]:
    """Return base + Σ c_k x_k by part, in shape and dtype of ``like``.

    Args:
        stacks: The K vectors x_k.
        coefficients: c, float64, shape (K,).
        base: Parts to add to; a part that is not in it is zero.
        like: An update of the cohort.
    """
    found = {}
    for key, rows in stacks.items():
        moved = (coefficients @ rows).reshape(like[key].shape)
        if key in base:
            moved = moved + base[key].detach().double()
        found[key] = moved.to(like[key].dtype)
    return found


def lower_median(values: Sequence[float]) -> float:
    """Return the ⌈K/2⌉-th smallest of K ≥ 1 values.

    Never above the largest of any ⌈K/2⌉ of them, so a minority cannot raise it beyond
    the values of the others.

    Example:
        >>> lower_median([5.0, 1.0, 3.0]), lower_median([9.0, 1.0])
        (3.0, 1.0)
    """
    return sorted(values)[(len(values) - 1) // 2]
