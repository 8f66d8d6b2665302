"""Head only: adapters stay at zero, the classification head alone is trained and averaged.

No method of its own but the honest baseline of every other one: federated averaging
(McMahan et al., arXiv 1602.05629, algorithm 1) of a linear probe. An adapter that
does not beat it under the same (ε, δ) has not earned its place.
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
    Phase,
    Role,
    RoundPlan,
)

_HEAD = frozenset({Role.HEAD})


@dataclass(frozen=True)
class HeadOnly:
    """Mean of the heads; B = 0 and A stay as they were drawn, so s·B·A = 0 always.

    Attributes:
        subspace: Where the unused A comes from.
        combine: How the clients' heads become one.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "head_only"
    facts = Facts(
        title="Head only",
        source="McMahan et al., arXiv 1602.05629",
        trains=frozenset(),
        exact=True,
        limit="the adapter stays zero: the baseline of every other method",
        linear=True,
        combiners=True,
        mixed_ranks=True,
    )

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0, A from the subspace policy and the initial head.

        Raises:
            ValueError: ``layout`` trains no head: nothing would be learned.
        """
        if not layout.head:
            raise ValueError("head_only needs a trained head; the layout trains none")
        return shared.initial_state(layout, self.subspace, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive, train and send the head."""
        return RoundPlan((Phase(train=_HEAD, send=_HEAD, receive=_HEAD),))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the mean of the heads, A and B untouched.

        Raises:
            ValueError: Parts that are not exactly the phase's, and everything
                that the combiner refuses.
        """
        phase = shared.current_phase(self.plan(state), state)
        mean = shared.combined(state, phase, updates, weights, self.combine)
        return shared.next_round(state, mean)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return the head; ``rank`` changes nothing but is checked."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)
