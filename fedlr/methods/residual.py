"""What a method has folded into the base weights: R = R_b·R_a, kept as two factors.

And the start afresh that may follow a fold: B = 0, and another A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Generator, Tensor

from fedlr import checks
from fedlr.lowrank.factors import Factors, stack
from fedlr.lowrank.subspace import Subspace
from fedlr.lowrank.svd import narrow
from fedlr.methods.method import GlobalState, Layout, PartKey, Parts, Role

SEED = PartKey("residual", Role.SEED)
"""Where a state's memory has the public seed of the A's that are drawn after a fold."""

_LARGEST_SEED = 2**63 - 1


def with_residual(state: GlobalState) -> GlobalState:
    """Return ``state`` with an empty residual, R_b (m, 0) and R_a (0, n), in A's dtype."""
    parts = dict(state.parts)
    for site in state.layout.sites:
        a = state.parts[PartKey(site.name, Role.A)]
        parts[PartKey(site.name, Role.RESIDUAL_B)] = a.new_zeros(site.out_features, 0)
        parts[PartKey(site.name, Role.RESIDUAL_A)] = a.new_zeros(0, site.in_features)
    return replace(state, parts=parts)


def with_restarts(state: GlobalState, generator: Generator) -> GlobalState:
    """Return `with_residual`, and a seed for `restarted` in the memory: int64, shape (1,)."""
    seed = torch.randint(_LARGEST_SEED, (1,), generator=generator, device=generator.device)
    return replace(with_residual(state), memory={**state.memory, SEED: seed.cpu()})


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


def restarted(
    state: GlobalState, added: Mapping[str, Factors], subspace: Subspace, done: int, turn: int
) -> dict[PartKey, Tensor]:
    """Return what a start afresh changes: `fold` of every site, B = 0 and another A.

    Args:
        state: Has the residual, and the seed of `with_restarts` in its memory.
        added: As in `fold`.
        subspace: Where A's come from.
        done: Rounds that are over with this fold, ≥ 1.
        turn: How many A's came before, ≥ 1 (`Subspace.redraw`).

    Returns:
        R_b, R_a, B and A of every site, in the dtypes of the state.

    Raises:
        ValueError: The memory has no seed, or ``subspace`` gives an A that is not (r, n).

    Guarantees:
        The A's are a function of the seed, ``done`` and ``turn`` alone, so that a resumed run
        draws the same; hashing keeps rounds and runs apart.
    """
    if SEED not in state.memory:
        raise ValueError("state.memory has no seed; start from the state that init returned")
    digest = hashlib.sha256(f"{int(state.memory[SEED])}:{done}".encode()).digest()
    generator = Generator().manual_seed(int.from_bytes(digest[:8], "big") & _LARGEST_SEED)
    found = fold(state.layout, state.parts, added)
    for site in state.layout.sites:
        b, a = PartKey(site.name, Role.B), PartKey(site.name, Role.A)
        drawn = subspace.redraw(site, generator, turn)
        checks.same_shape(f"{site.name}: a", drawn.shape, state.parts[a].shape)
        found[a] = drawn.to(state.parts[a])
        found[b] = torch.zeros_like(state.parts[b])
    return found
