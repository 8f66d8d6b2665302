"""FedAvg-LoRA: both factors are trained and averaged separately.

FedAvg (Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera
y Arcas, arXiv 1602.05629, algorithm 1) applied to LoRA factors as in FedIT
(Jianyi Zhang and others: Towards Building the Federated GPT, arXiv 2305.05644).
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
class FedAvgLoRA:
    """B̄ = Σ p_k B_k and Ā = Σ p_k A_k: inexact, B̄·Ā ≠ Σ p_k B_k·A_k.

    The difference is −Σ_k p_k (B_k − B̄)(A_k − Ā): it grows with the clients'
    disagreement, and under DP the product of the two noises joins it.

    Attributes:
        subspace: Where the first A comes from.
        combine: How the clients' A, B and head become one.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "fedavg_lora"
    facts = Facts(
        title="FedAvg-LoRA (FedIT)",
        source="McMahan et al., arXiv 1602.05629; Zhang et al., arXiv 2305.05644",
        trains=frozenset({Role.A, Role.B}),
        exact=False,
        limit="mean(B)·mean(A) is not mean(B·A)",
        linear=True,
        combiners=True,
        consensus=True,
        mixed_ranks=True,
    )

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0 and A from the subspace policy."""
        return shared.initial_state(layout, self.subspace, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive, train and send A and B; the head where trained."""
        return shared.single_phase(state.layout, frozenset({Role.A, Role.B}))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the mean of each factor and of the head.

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
