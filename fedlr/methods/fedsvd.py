"""FedSVD: train B, average exactly, refactorise so that A stays orthonormal.

Seanie Lee, Sangwoo Park, Dong Bok Lee, Dominik Wagner, Haebin Seong, Tobias
Bocklet, Juho Lee, Sung Ju Hwang: FedSVD: Adaptive Orthogonalization for Private
Federated Learning with LoRA, NeurIPS 2025, arXiv 2505.12805.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from fedlr.lowrank.factors import Factors
from fedlr.lowrank.rotation import is_orthonormal, refactorise_rotated, rotate
from fedlr.lowrank.subspace import Subspace
from fedlr.lowrank.svd import refactorise_many
from fedlr.methods import shared
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.downlink import Compact
from fedlr.methods.method import (
    ClientUpdate,
    Facts,
    GlobalState,
    Layout,
    PartKey,
    Role,
    RoundPlan,
)


@dataclass(frozen=True)
class FedSVD:
    """B̄ = Σ p_k B_k, then B̄·A = U Σ Vᵀ gives the next B = U Σ and A = Vᵀ.

    Up: B and head, m·r per site. Down: B, A and head, r·(m + n); with ``downlink="rotation"``
    r·(m + r), and r·n once, since A_t = Q_t·A₀ with Q_t r × r. Server: post-processing of
    private releases, no ε. Only the weighted sum of the B_k is needed: secure aggregation
    fits.

    Guarantees:
        B·A after aggregation = Σ p_k B_k·A with the A that was broadcast; from
        round 1 on A·Aᵀ = I and the columns of B are orthogonal, by decreasing
        norm; row(A) never changes (package README of ``fedlr.lowrank``). Both
        downlinks give the same model up to float32 rounding; with ``rotation`` the
        distance of A·Aᵀ from I does not grow with the rounds.

    Attributes:
        subspace: Where the first A comes from.
        combine: How the clients' B and head become one.
        downlink: ``full`` sends A; ``rotation`` sends Q, and A₀ to those that have not got
            it (`compact`). The state keeps A₀ and Q in its memory, A₀ being the first A
            where its rows are orthonormal, and the A after the first round otherwise.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean
    downlink: Literal["full", "rotation"] = "full"

    name = "fedsvd"
    facts = Facts(
        title="FedSVD",
        source="Lee et al., arXiv 2505.12805",
        trains=frozenset({Role.B}),
        exact=True,
        limit="row(A) never changes",
        linear=True,
        combiners=True,
        consensus=True,
        refreshes=True,
        mixed_ranks=True,
    )

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0 and A from the subspace policy."""
        state = shared.initial_state(layout, self.subspace, generator)
        keys = [PartKey(site.name, Role.A) for site in layout.sites]
        if self.downlink == "full" or not all(is_orthonormal(state.parts[key]) for key in keys):
            return state
        return _based(state)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive A, B; train and send B; the head where trained."""
        return shared.single_phase(state.layout, frozenset({Role.B}))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the mean of B and head with every site refactorised.

        Raises:
            ValueError: Parts that are not exactly the phase's, and everything
                that the combiner refuses.
        """
        phase = shared.current_phase(self.plan(state), state)
        mean = shared.combined(state, phase, updates, weights, self.combine)
        if _has_basis(state):
            return _rotated(state, mean)
        parts: dict[PartKey, Tensor] = {**state.parts, **mean}
        for site, pair in refactorise_many(shared.factor_pairs(state.layout, parts)).items():
            parts[PartKey(site, Role.B)] = pair.b
            parts[PartKey(site, Role.A)] = pair.a
        after = shared.next_round(state, parts)
        return after if self.downlink == "full" else _based(after)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head; the leading ``rank`` columns are the best of that rank."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)

    def compact(self, state: GlobalState, rank: int | None = None) -> Compact | None:
        """Return Q (leading ``rank`` rows) and A₀; None with ``downlink="full"`` or before A₀."""
        if not _has_basis(state):
            return None
        held = state.memory.items()
        rotations = {k: v[:rank].contiguous() for k, v in held if k.role is Role.ROTATION}
        return Compact(rotations, {k: v for k, v in held if k.role is Role.A})


def _has_basis(state: GlobalState) -> bool:
    return any(key.role is Role.ROTATION for key in state.memory)


def _based(state: GlobalState) -> GlobalState:
    """Keep the present A's as the basis A₀, with Q = I."""
    parts, memory = dict(state.parts), dict(state.memory)
    for site in state.layout.sites:
        key, turn = PartKey(site.name, Role.A), PartKey(site.name, Role.ROTATION)
        memory[key], memory[turn] = state.parts[key], torch.eye(site.rank)
        parts[key] = rotate(memory[turn], memory[key])
    return replace(state, parts=parts, memory=memory)


def _rotated(state: GlobalState, mean: dict[PartKey, Tensor]) -> GlobalState:
    """Refactorise in the coordinates of A₀."""
    parts, memory = {**state.parts, **mean}, dict(state.memory)
    sites = [site.name for site in state.layout.sites]
    found = refactorise_rotated(
        {
            site: Factors(b=parts[PartKey(site, Role.B)], a=memory[PartKey(site, Role.ROTATION)])
            for site in sites
        },
        {site: memory[PartKey(site, Role.A)] for site in sites},
    )
    for site, (pair, rotation) in found.items():
        parts[PartKey(site, Role.B)], parts[PartKey(site, Role.A)] = pair.b, pair.a
        memory[PartKey(site, Role.ROTATION)] = rotation
    return shared.next_round(replace(state, memory=memory), parts)
