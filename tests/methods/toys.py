"""Two methods that exist to keep the contract honest; neither is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fedlr.lowrank.subspace import Subspace
from fedlr.methods import shared
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.method import (
    ClientUpdate,
    Facts,
    GlobalState,
    Layout,
    PartKey,
    Parts,
    Phase,
    Role,
    RoundPlan,
)


@dataclass(frozen=True)
class TwoPhase:
    """Phase 0 trains B; phase 1 projects each B_k on an orthonormal basis Q of col(B̄).

    B = Q Σ p_k (Qᵀ B_k) = Q Qᵀ B̄ = B̄, so the second phase must change nothing.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "toy_two_phase"
    facts = Facts("toy", "none", frozenset({Role.B}), exact=True, limit="none", linear=True)

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        return shared.initial_state(layout, self.subspace, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        trained = shared.single_phase(state.layout, frozenset({Role.B})).phases[0]
        project = Phase(
            train=frozenset(), send=frozenset({Role.CORE}), receive=frozenset({Role.ROTATION})
        )
        return RoundPlan((trained, project))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        phase = shared.current_phase(self.plan(state), state)
        mean = shared.combined(state, phase, updates, weights, self.combine)
        if state.phase == 0:
            head = {key: value for key, value in mean.items() if key.role is Role.HEAD}
            rotation = {
                PartKey(site.name, Role.ROTATION): torch.linalg.qr(
                    mean[PartKey(site.name, Role.B)]
                ).Q
                for site in state.layout.sites
            }
            return replace(state, parts={**state.parts, **head, **rotation}, phase=1)
        b = {
            PartKey(key.site, Role.B): state.parts[PartKey(key.site, Role.ROTATION)] @ core
            for key, core in mean.items()
        }
        kept = {k: v for k, v in state.parts.items() if k.role is not Role.ROTATION}
        return shared.next_round(replace(state, parts=kept), b)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> Parts:
        return shared.whole_broadcast(state, shared.current_phase(self.plan(state), state), rank)


@dataclass(frozen=True)
class Folding:
    """Trains B, folds s·B̄·A into the residual, starts again from B = 0 and a fresh A."""

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "toy_folding"
    facts = Facts(
        title="toy",
        source="none",
        trains=frozenset({Role.B}),
        exact=True,
        limit="none",
        linear=True,
        mixed_ranks=True,
        folds=True,
    )

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        state = shared.initial_state(layout, self.subspace, generator)
        empty: dict[PartKey, Tensor] = {}
        for site in layout.sites:
            empty[PartKey(site.name, Role.RESIDUAL_B)] = torch.zeros(site.out_features, 0)
            empty[PartKey(site.name, Role.RESIDUAL_A)] = torch.zeros(0, site.in_features)
        return replace(state, parts={**state.parts, **empty})

    def plan(self, state: GlobalState) -> RoundPlan:
        phase = shared.single_phase(state.layout, frozenset({Role.B})).phases[0]
        residual = frozenset({Role.RESIDUAL_A, Role.RESIDUAL_B})
        return RoundPlan((replace(phase, receive=phase.receive | residual),))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        phase = shared.current_phase(self.plan(state), state)
        parts = {**state.parts, **shared.combined(state, phase, updates, weights, self.combine)}
        generator = torch.Generator().manual_seed(state.round + 1)
        for site in state.layout.sites:
            keys = {role: PartKey(site.name, role) for role in Role}
            b, a = parts[keys[Role.B]], parts[keys[Role.A]]
            left, right = parts[keys[Role.RESIDUAL_B]], parts[keys[Role.RESIDUAL_A]]
            parts[keys[Role.RESIDUAL_B]] = torch.cat([left, site.scaling * b], dim=1)
            parts[keys[Role.RESIDUAL_A]] = torch.cat([right, a], dim=0)
            parts[keys[Role.B]] = torch.zeros_like(b)
            parts[keys[Role.A]] = self.subspace(site, generator)
        return shared.next_round(state, parts)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> Parts:
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)
