"""FedEx-LoRA: the means of both factors, and what they get wrong folded into the base.

Raghav Singhal, Kaustubh Ponkshe, Praneeth Vepakomma: FedEx-LoRA: Exact Aggregation for
Federated and Efficient Fine-Tuning of Large Language Models, ACL 2025, arXiv 2410.09432.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from fedlr.lowrank.factors import Factors, stack
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
class FedExLoRA:
    """B̄ and Ā, and R grows by s·(Σ p_k B_k·A_k − B̄·Ā): exact.

    Clients train and send A and B, r·(m + n) a site: one private release a round, in
    which both factors are clipped together and both carry noise. The server needs every
    product B_k·A_k, so a weighted sum is not enough: secure aggregation does not fit.

    The difference is Σ p_k (B_k − B̄)(A_k − Ā), and as Σ p_k (B_k − B̄) = 0 any matrix may
    stand for Ā in it. With A_K the last client's term vanishes: rank (K − 1)·r, kept as
    factors until their rank would exceed min(m, n).

    Guarantees:
        R + s·B·A after aggregation = Σ p_k (R + s·B_k·A_k), up to rounding.

    Attributes:
        subspace: Where the first A comes from.
        combine: The weighted mean; no other combiner has an exact residual.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "fedex_lora"
    facts = Facts(
        title="FedEx-LoRA",
        source="Singhal et al., arXiv 2410.09432",
        trains=frozenset({Role.A, Role.B}),
        exact=True,
        limit="the residual grows to full rank, and goes down every round",
        folds=True,
    )

    def __post_init__(self) -> None:
        products.check_mean(self.name, self.combine)

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0, A from the subspace policy and an empty residual."""
        return residual.with_residual(shared.initial_state(layout, self.subspace, generator))

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive A, B and R; train and send A and B; the head where trained."""
        phase = shared.single_phase(state.layout, frozenset({Role.A, Role.B})).phases[0]
        return RoundPlan((replace(phase, receive=phase.receive | RESIDUAL_ROLES),))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the means of A, B and head, with the residual corrected.

        Raises:
            ValueError: Parts that are not exactly the phase's, a rank that is not its
                site's, a client twice, or weights that are refused.
        """
        phase = shared.current_phase(self.plan(state), state)
        shared.check_whole(state, updates)
        mean = shared.combined(state, phase, updates, weights, self.combine)
        found = products.counted(state, phase, updates, weights)
        if len(found) > 1:
            sites = state.layout.sites
            errors = {site.name: _error(site.name, found, site.scaling) for site in sites}
            mean |= residual.fold(state.layout, state.parts, errors)
        return shared.next_round(state, mean)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B, R and head; a ``rank`` below that of a site is refused."""
        return shared.whole_broadcast(state, shared.current_phase(self.plan(state), state), rank)


def _error(site: str, found: products.Counted, scaling: float) -> Factors:
    """Σ p_k B_k·A_k − B̄·Ā of a site as a float64 pair of rank (K − 1)·r."""
    keys = PartKey(site, Role.B), PartKey(site, Role.A)
    pairs = [tuple(update.parts[key].double() for key in keys) for update, _ in found]
    mean = sum(b * share for (b, _), (_, share) in zip(pairs, found, strict=True))
    last = pairs[-1][1]
    terms = [
        Factors(b=(b - mean) * share, a=a - last)
        for (b, a), (_, share) in zip(pairs[:-1], found, strict=False)
    ]
    return replace(stack(terms), scaling=scaling)
