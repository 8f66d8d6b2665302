"""RoLoRA: one factor a round, B and A in turn.

Shuangyi Chen, Yuanxin Guo, Yue Ju, Harik Dalal, Zhongwen Zhu, Ashish Khisti: Robust
Federated Finetuning of LLMs via Alternating Optimization of LoRA, arXiv 2502.01755.
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
class RoLoRA:
    """First round B̄ = Σ p_k B_k under a fixed A, second round Ā = Σ p_k A_k under that B.

    Counted from one, odd rounds train and send B (m·r), even ones A (r·n): the first A
    would have no gradient, because B = 0. One private release a round, of one factor: a
    round adds no product of two fresh noises, though B·A keeps that of a noisy B with the
    next round's noise on A. Only the weighted sum is needed: secure aggregation fits.

    Guarantees:
        B·A after a round = Σ p_k B_k·A_k exactly, because one factor is shared; that
        factor is bit-identical. Unlike with B alone, row(A) moves.

    Attributes:
        subspace: Where the first A comes from.
        combine: How the clients' trained factor and head become one.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "rolora"
    facts = Facts(
        title="RoLoRA",
        source="Chen et al., arXiv 2502.01755",
        trains=frozenset({Role.A, Role.B}),
        exact=True,
        limit="each factor rests every other round",
        linear=True,
        combiners=True,
        consensus=True,
        mixed_ranks=True,
    )

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0 and A from the subspace policy."""
        return shared.initial_state(layout, self.subspace, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive A and B; train and send B after 0, 2, … rounds, else A."""
        trained = Role.B if state.round % 2 == 0 else Role.A
        return shared.single_phase(state.layout, frozenset({trained}))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the mean of the trained factor and of the head, the other factor untouched.

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
