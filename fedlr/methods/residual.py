"""What a method has folded into the base weights: R = R_b·R_a, kept as two factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedlr.lowrank.factors import Factors, stack
from fedlr.lowrank.svd import narrow
from fedlr.methods.method import GlobalState, Layout, PartKey, Parts, Role


def with_residual(state: GlobalState) -> GlobalState:
    """Return ``state`` with an empty residual, R_b (m, 0) and R_a (0, n), in A's dtype."""
    parts = dict(state.parts)
    for site in state.layout.sites:
        a = state.parts[PartKey(site.name, Role.A)]
        parts[PartKey(site.name, Role.RESIDUAL_B)] = a.new_zeros(site.out_features, 0)
        parts[PartKey(site.name, Role.RESIDUAL_A)] = a.new_zeros(0, site.in_features)
    return replace(state, parts=parts)


def fold(layout: Layout, parts: Parts, added: Mapping[str, Factors]) -> dict[PartKey, Tensor]:
    """Return the residual of every site with s·B·A of a pair added to it.

    The pair is appended, so R grows by its rank; beyond min(m, n) the factors would be
    larger than the m × n product, and `fedlr.lowrank.svd.narrow` makes them that.

    Args:
        layout: The sites.
        parts: Holds R_b (m, R) and R_a (R, n) of every site.
        added: One pair by site name, B (m, q) and A (q, n), any floating dtype, on the
            device of ``parts``; its scaling is folded into B.

    Returns:
        New R_b (m, R') and R_a (R', n), R' = R + q ≤ min(m, n), in the dtype of ``parts``.
    """
    found: dict[PartKey, Tensor] = {}
    for site in layout.sites:
        b, a = PartKey(site.name, Role.RESIDUAL_B), PartKey(site.name, Role.RESIDUAL_A)
        before, more = Factors(b=parts[b], a=parts[a]), added[site.name]
        scaled = Factors(b=(more.b * more.scaling).to(before.b), a=more.a.to(before.a))
        total = narrow(stack([before, scaled]))
        found[b], found[a] = total.b.contiguous(), total.a.contiguous()
    return found
