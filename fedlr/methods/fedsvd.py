"""FedSVD: train B, average exactly, refactorise so that A stays orthonormal.

Seanie Lee, Sangwoo Park, Dong Bok Lee, Dominik Wagner, Haebin Seong, Tobias
Bocklet, Juho Lee, Sung Ju Hwang: FedSVD: Adaptive Orthogonalization for Private
Federated Learning with LoRA, NeurIPS 2025, arXiv 2505.12805.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from fedlr.lowrank.subspace import Subspace
from fedlr.lowrank.svd import refactorise_many
from fedlr.methods import shared
from fedlr.methods.combine import Combiner, weighted_mean
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

    Up: B and head, m·r per site. Server: post-processing of private releases,
    no ε. Only the weighted sum of the B_k is needed: secure aggregation fits.

    Guarantees:
        B·A after aggregation = Σ p_k B_k·A with the A that was broadcast; from
        round 1 on A·Aᵀ = I and the columns of B are orthogonal, by decreasing
        norm; row(A) never changes (package README of ``fedlr.lowrank``).

    Attributes:
        subspace: Where the first A comes from.
        combine: How the clients' B and head become one.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "fedsvd"
    facts = Facts(
        title="FedSVD",
        source="Lee et al., arXiv 2505.12805",
        trains=frozenset({Role.B}),
        exact=True,
        limit="row(A) never changes",
        linear=True,
        combiners=True,
        refreshes=True,
        mixed_ranks=True,
    )

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0 and A from the subspace policy."""
        return shared.initial_state(layout, self.subspace, generator)

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
        parts: dict[PartKey, Tensor] = {**state.parts, **mean}
        for site, pair in refactorise_many(shared.factor_pairs(state.layout, parts)).items():
            parts[PartKey(site, Role.B)] = pair.b
            parts[PartKey(site, Role.A)] = pair.a
        return shared.next_round(state, parts)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head; the leading ``rank`` columns are the best of that rank."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)
