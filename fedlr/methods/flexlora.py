"""FlexLoRA: the mean of the products, cut back to rank r by an SVD.

Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao, Yaliang Li: Federated Fine-tuning of
Large Language Models under Heterogeneous Tasks and Client Resources, NeurIPS 2024,
arXiv 2402.11505.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from fedlr.lowrank.factors import Factors, stack
from fedlr.lowrank.subspace import Subspace
from fedlr.lowrank.svd import best_of_rank_many
from fedlr.methods import products, shared
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
class FlexLoRA:
    """The best B·A of rank r for Σ p_k B_k·A_k: B = U_r Σ_r and A = V_rᵀ.

    Clients train and send A and B, r_k·(m + n) a site: one private release a round, in
    which both factors are clipped together and both carry noise. A client of rank r_k is
    sent the leading r_k columns, the best of that rank, and counts with the product that
    it sends: what it was not sent is not in it. The server needs every pair, so a weighted
    sum is not enough: secure aggregation does not fit.

    The paper decomposes the m × n sum; here the QRs of the stacked factors
    (`fedlr.lowrank.svd.best_of_rank`) give the same without it.

    Guarantees:
        ‖B·A − Σ p_k B_k·A_k‖_F² is the sum of the squared singular values that are cut
        off (Eckart and Young), and 0 where the sum has rank ≤ r. From round 1 on
        A·Aᵀ = I and the columns of B are orthogonal, by decreasing norm.

    Attributes:
        subspace: Where the first A comes from.
        combine: The weighted mean; stacking knows no other combiner.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "flexlora"
    facts = Facts(
        title="FlexLoRA",
        source="Bai et al., arXiv 2402.11505",
        trains=frozenset({Role.A, Role.B}),
        exact=False,
        limit="cut back to rank r: the tail of the spectrum is lost",
        mixed_ranks=True,
    )

    def __post_init__(self) -> None:
        products.check_mean(self.name, self.combine)

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0 and A from the subspace policy."""
        return shared.initial_state(layout, self.subspace, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive, train and send A and B; the head where trained."""
        return shared.single_phase(state.layout, frozenset({Role.A, Role.B}))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the best pair of rank r for the mean product, and the mean of the head.

        Raises:
            ValueError: Parts that are not exactly the phase's, a client twice, weights
                that are refused, or NaN or infinite entries.
        """
        phase = shared.current_phase(self.plan(state), state)
        found = products.counted(state, phase, updates, weights)
        sums = products.mean_products(state.layout, found)
        for site in state.layout.sites:
            if sums[site.name].rank < site.rank:
                sums[site.name] = _completed(sums[site.name], state, site.name)
        ranks = {site.name: site.rank for site in state.layout.sites}
        parts = products.mean_head(found)
        for name, pair in best_of_rank_many(sums, ranks).items():
            for role, array in ((Role.B, pair.b), (Role.A, pair.a)):
                key = PartKey(name, role)
                parts[key] = array.to(state.parts[key])
        return shared.next_round(state, parts)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head; the leading ``rank`` columns are the best of that rank."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)


def _completed(pair: Factors, state: GlobalState, site: str) -> Factors:
    """The same product beside the server's A: rows for directions that nobody trained."""
    a = state.parts[PartKey(site, Role.A)].to(pair.a)
    idle = Factors(b=a.new_zeros(pair.b.shape[0], a.shape[0]), a=a)
    return stack([replace(pair, scaling=1.0), idle])
