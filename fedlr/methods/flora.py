"""FLoRA: the clients' factors are stacked into the base, and every round starts afresh.

Ziyao Wang, Zheyu Shen, Yexiao He, Guoheng Sun, Hongyi Wang, Lingjuan Lyu, Ang Li: FLoRA:
Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,
NeurIPS 2024, arXiv 2409.05976.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from fedlr.lowrank.subspace import Subspace
from fedlr.methods import products, residual, shared
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.method import (
    RESIDUAL_ROLES,
    ClientUpdate,
    Facts,
    GlobalState,
    Layout,
    PartKey,
    Role,
    RoundPlan,
)


@dataclass(frozen=True)
class FLoRA:
    """R grows by Σ p_k s·B_k·A_k, then B = 0 and A is drawn anew: exact.

    Clients train and send A and B, r_k·(m + n) a site: one private release a round, in
    which both factors are clipped together and both carry noise. A client of rank r_k
    trains the leading r_k rows of A. The server needs every pair, so a weighted sum is not
    enough: secure aggregation does not fit.

    Guarantees:
        R after aggregation = R + Σ p_k s·B_k·A_k, up to rounding, whatever the ranks. The
        new A depends on the seed of `init` and the number of the round alone.

    Attributes:
        subspace: Where the A of every round comes from.
        combine: The weighted mean; stacking knows no other combiner.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "flora"
    facts = Facts(
        title="FLoRA",
        source="Wang et al., arXiv 2409.05976",
        trains=frozenset({Role.A, Role.B}),
        exact=True,
        limit="each round starts from B = 0; the residual grows to full rank and goes down",
        mixed_ranks=True,
        folds=True,
    )

    def __post_init__(self) -> None:
        products.check_mean(self.name, self.combine)

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0, A from the subspace policy, an empty residual and the seed of later draws.

        The seed, int64 of shape (1,), is drawn last and kept in ``memory``.
        """
        state = shared.initial_state(layout, self.subspace, generator)
        return residual.with_restarts(state, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive A, B and R; train and send A and B; the head where trained."""
        phase = shared.single_phase(state.layout, frozenset({Role.A, Role.B})).phases[0]
        return RoundPlan((replace(phase, receive=phase.receive | RESIDUAL_ROLES),))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the grown residual, B = 0, a fresh A and the mean of the head.

        Raises:
            ValueError: Parts that are not exactly the phase's, a client twice, weights
                that are refused, or a state without the seed of `init`.
        """
        phase = shared.current_phase(self.plan(state), state)
        found = products.counted(state, phase, updates, weights)
        added = products.mean_products(state.layout, found)
        done = state.round + 1
        parts = residual.restarted(state, added, self.subspace, done=done, turn=done)
        return shared.next_round(state, {**products.mean_head(found), **parts})

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head, cut to ``rank`` if given, and the whole of R."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)
