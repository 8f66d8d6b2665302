"""What the methods have in common whose server needs every client's product B_k·A_k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedlr.lowrank.factors import Factors, stack
from fedlr.methods import shared
from fedlr.methods.combine import Combiner, check_alike, check_weights, weighted_mean
from fedlr.methods.method import ClientUpdate, GlobalState, Layout, PartKey, Phase, Role

Counted = list[tuple[ClientUpdate, float]]
"""Updates with their shares p_k > 0, Σ p_k = 1, in the order of client identifiers."""


def check_mean(method: str, combine: Combiner) -> None:
    """Check that ``combine`` is the weighted mean, for methods that no other composes with.

    Raises:
        ValueError: It is another one.
    """
    if combine.name != weighted_mean.name:
        raise ValueError(
            f"combine = {combine.name} does not compose with {method}; use {weighted_mean.name}"
        )


def counted(
    state: GlobalState, phase: Phase, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> Counted:
    """Return the accepted updates that have a weight, for methods that read each of them.

    Args:
        state: The state whose broadcast the clients trained from.
        phase: Its ``send`` fixes the part keys, exactly.
        updates: K ≥ 1 updates of distinct clients, of any ranks that `accepted` takes.
        weights: K non-negative public weights, not all zero.

    Raises:
        ValueError: No update, a client twice, weights that are not K or that
            `fedlr.methods.combine.normalised` refuses, and what `accepted` refuses.
    """
    sent = shared.accepted(state, phase, updates)
    check_alike([replace(update, parts={}) for update in sent])
    shares = check_weights(sent, weights)
    pairs = sorted(zip(sent, shares, strict=True), key=lambda pair: pair[0].client)
    return [(update, share) for update, share in pairs if share > 0]


def mean_head(found: Counted) -> dict[PartKey, Tensor]:
    """Return the weighted mean of the head arrays; empty where none was sent."""
    heads = [
        replace(update, parts={k: v for k, v in update.parts.items() if k.role is Role.HEAD})
        for update, _ in found
    ]
    return weighted_mean(heads, [share for _, share in found])


def mean_products(layout: Layout, found: Counted) -> dict[str, Factors]:
    """Return Σ p_k B_k·A_k of every site by its name, by stacking and without the m × n product.

    Returns:
        float64 pairs [p_1 B_1 … p_K B_K] of shape (m, Σ r_k) and [A_1; …; A_K] of shape
        (Σ r_k, n), with the scaling of their site.
    """
    return {
        site.name: replace(
            stack(
                [
                    Factors(
                        b=update.parts[PartKey(site.name, Role.B)].double() * share,
                        a=update.parts[PartKey(site.name, Role.A)].double(),
                    )
                    for update, share in found
                ]
            ),
            scaling=site.scaling,
        )
        for site in layout.sites
    }
