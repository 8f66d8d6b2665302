"""Fed-SB: an r × r core between two fixed factors.

Raghav Singhal, Kaustubh Ponkshe, Rohit Vartak, Lav R. Varshney, Praneeth Vepakomma:
Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning, arXiv 2502.15436.

The paper sets B and A as LoRA-SB does, from an estimate of the first full update; an
estimate from un-noised private gradients would be a release of its own, so here B and A
come from the subspace policy, which reads no private data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from fedlr import checks
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
class FedSB:
    """R̄ = Σ p_k R_k, so s·B·R̄·A = Σ p_k s·B·R_k·A exactly.

    Trains and sends the core R alone: r² numbers a site, which is also the size of the
    noise. One private release a round. Only the weighted sum is needed: secure
    aggregation fits.

    Guarantees:
        B and A are bit-identical in every round; the columns of B are orthonormal.

    Attributes:
        subspace: Where A (``rows``) and B (``columns``) come from.
        combine: How the clients' R and head become one.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "fed_sb"
    facts = Facts(
        title="Fed-SB",
        source="Singhal et al., arXiv 2502.15436",
        trains=frozenset({Role.CORE}),
        exact=True,
        limit="the update lives between two fixed subspaces",
        linear=True,
        combiners=True,
    )

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return R = 0, A and B from the subspace policy.

        Raises:
            ValueError: The policy returns an A that is not (r, n) or a B that is not (m, r).
        """
        state = shared.initial_state(layout, self.subspace, generator)
        parts = dict(state.parts)
        for site in layout.sites:
            a = parts[PartKey(site.name, Role.A)]
            b = self.subspace.columns(site, generator).to(a).contiguous()
            checks.same_shape(f"{site.name}: b", b.shape, (site.out_features, site.rank))
            parts[PartKey(site.name, Role.B)] = b
            parts[PartKey(site.name, Role.CORE)] = a.new_zeros(site.rank, site.rank)
        return replace(state, parts=parts)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive A, B and R; train and send R; the head where trained."""
        core = frozenset({Role.CORE})
        phase = shared.single_phase(state.layout, core).phases[0]
        return RoundPlan((replace(phase, receive=phase.receive | core),))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the mean of R and head, A and B untouched.

        Raises:
            ValueError: Parts that are not exactly the phase's, a core that is not
                (r, r), and everything that the combiner refuses.
        """
        phase = shared.current_phase(self.plan(state), state)
        mean = shared.combined(state, phase, updates, weights, self.combine)
        return shared.next_round(state, mean)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B, R and head; a ``rank`` below that of a site is refused."""
        return shared.whole_broadcast(state, shared.current_phase(self.plan(state), state), rank)
