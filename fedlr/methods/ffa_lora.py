"""FFA-LoRA: A is drawn once and frozen, B is trained and averaged.

Youbang Sun, Zitao Li, Yaliang Li, Bolin Ding: Improving LoRA in
Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    Role,
    RoundPlan,
)


@dataclass(frozen=True)
class FFALoRA:
    """B̄ = Σ p_k B_k under a fixed A, so B̄·A = Σ p_k B_k·A exactly.

    With ``subspace=orthonormal`` this is the baseline that FedSVD equals under
    plain SGD; the paper draws A as PEFT does (``kaiming``).

    Guarantees:
        A is bit-identical in every round.

    Attributes:
        subspace: Where A comes from.
        combine: How the clients' B and head become one.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "ffa_lora"
    facts = Facts(
        title="FFA-LoRA",
        source="Sun et al., arXiv 2403.12313",
        trains=frozenset({Role.B}),
        exact=True,
        limit="A never changes",
        linear=True,
        combiners=True,
        consensus=True,
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
        """Return the mean of B and head, A untouched.

        Raises:
            ValueError: Parts that are not exactly the phase's, and everything
                that the combiner refuses.
        """
        phase = shared.current_phase(self.plan(state), state)
        mean = shared.combined(state, phase, updates, weights, self.combine)
        return shared.next_round(state, mean)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head, cut to ``rank`` if given."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)
