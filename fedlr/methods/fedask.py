"""FedASK: a sketch of the update goes up, then its projection on the sketch.

Ming Wen, Jiaqi Zhu, Yuedong Xu, Yipeng Zhou, Dingding Han: Differentially Private
Federated Low Rank Adaptation Beyond Fixed-Matrix, NeurIPS 2025, arXiv 2507.09990; the
balanced split of the SVD is that of the authors' code (github.com/FLEECERmw/PrivacyFedLLM).

Where this differs: the authors draw a Gaussian test matrix Ω and send B_k·A·Ω. Here
clients train B alone and share A, and B_k itself is sent: it is the sketch of B_k·A for
Ω = A⁺ where A has full row rank, and spans the same columns as with almost every other Ω.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fedlr.lowrank.factors import Factors
from fedlr.lowrank.subspace import Subspace
from fedlr.lowrank.svd import refactorise_many
from fedlr.methods import products, shared
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

_IDLE = 1e-6
"""σ_i below this share of σ_1 is a direction that nobody has trained: float32 rounding."""


@dataclass(frozen=True)
class FedASK:
    """Q from the QR of Σ p_k B_k, then C = Σ p_k Qᵀ·B_k; C·A = U Σ Vᵀ, B = Q·U·Σ^½, A = Σ^½·Vᵀ.

    Two exchanges a round, one private release: the first sends B, m·r a site, trained
    under noise; the second sends Qᵀ·B_k, r × r, of what is released already, at no ε.
    Both need a weighted sum only: secure aggregation fits.

    With a shared A the second exchange repeats what the first one told, since
    Q·Qᵀ·Σ p_k B_k = Σ p_k B_k. What is left of the method is its split: both factors have
    the square roots of the singular values, so strong directions have larger gradients.

    Guarantees:
        B·A after the round = Σ p_k B_k·A with the A that was broadcast, up to rounding, where
        the same clients answer both exchanges. One that fails between them leaves
        Q·Qᵀ·Σ p_k B_k·A over the others, less than their mean.
        A direction with σ_i < 1e-6 σ_1 would lose both factors and never learn again: its
        row of A stays a unit vector, orthogonal to the others, and B has all of σ_i.

    Attributes:
        subspace: Where the first A comes from.
        combine: The weighted mean. Another combiner, asked twice, may choose other clients the
            second time, and only their part inside the span of the first choice would be left.

    Raises:
        ValueError: ``combine`` is another combiner.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean

    name = "fedask"
    facts = Facts(
        title="FedASK",
        source="Wen et al., arXiv 2507.09990",
        trains=frozenset({Role.B}),
        exact=True,
        limit="two exchanges a round; row(A) never changes",
        linear=True,
    )

    def __post_init__(self) -> None:
        products.check_mean(self.name, self.combine)

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0 and A from the subspace policy."""
        return shared.initial_state(layout, self.subspace, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return a phase that trains and sends B and head, and one that projects."""
        trained = shared.single_phase(state.layout, frozenset({Role.B})).phases[0]
        core, rotation = frozenset({Role.CORE}), frozenset({Role.ROTATION})
        return RoundPlan((trained, Phase(train=frozenset(), send=core, receive=rotation)))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the state with Q to project on, then the one with the factors reset.

        Raises:
            ValueError: Parts that are not exactly the phase's, a rank that is not its
                site's, and everything that the combiner refuses.
        """
        phase = shared.current_phase(self.plan(state), state)
        shared.check_whole(state, updates)
        mean = shared.combined(state, phase, updates, weights, self.combine)
        return _sketched(state, mean) if phase.private else _reset(state, mean)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head, or Q; a ``rank`` below that of a site is refused."""
        return shared.whole_broadcast(state, shared.current_phase(self.plan(state), state), rank)


def _sketched(state: GlobalState, mean: dict[PartKey, Tensor]) -> GlobalState:
    """Phase 1: Q (m, r) of every site, and Qᵀ·B that the clients' cores are changes of."""
    parts = {**state.parts, **{k: v for k, v in mean.items() if k.role is Role.HEAD}}
    for site in state.layout.sites:
        key = PartKey(site.name, Role.B)
        basis = torch.linalg.qr(mean[key].double()).Q.to(mean[key])
        parts[PartKey(site.name, Role.ROTATION)] = basis
        parts[PartKey(site.name, Role.CORE)] = basis.mT @ state.parts[key]
    return replace(state, parts=parts, phase=1)


def _reset(state: GlobalState, mean: dict[PartKey, Tensor]) -> GlobalState:
    """The next round, B and A from the SVD of Q·C·A."""
    pairs, gone = {}, {Role.ROTATION, Role.CORE}
    for site in state.layout.sites:
        basis = state.parts[PartKey(site.name, Role.ROTATION)].double()
        core = mean[PartKey(site.name, Role.CORE)].double()
        a = state.parts[PartKey(site.name, Role.A)].double()
        pairs[site.name] = Factors(b=basis @ core, a=a, scaling=site.scaling)
    parts = {key: value for key, value in state.parts.items() if key.role not in gone}
    for name, pair in refactorise_many(pairs).items():
        sigma = pair.b.norm(dim=0)
        root = torch.where(sigma > _IDLE * sigma.amax(), sigma.sqrt(), 1.0)
        for role, array in ((Role.B, pair.b / root), (Role.A, root[:, None] * pair.a)):
            key = PartKey(name, role)
            parts[key] = array.to(state.parts[key])
    return shared.next_round(replace(state, parts=parts), {})
