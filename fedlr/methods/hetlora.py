"""HetLoRA: zero-padding, weights by norm, and ranks that shrink.

Yae Jee Cho, Luyang Liu, Zheng Xu, Aldi Fahrezi, Gauri Joshi: Heterogeneous LoRA for
Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, arXiv 2401.06432.

Where this differs: the paper's clients prune while they train, helped by a penalty on
the tail in their loss. Here a client's loss is the task's own, and the server prunes,
from what was released: post-processing, at no ε, effective from the next round. The
paper's weights are the norms alone; here they multiply the weights p_k that the server
was given, and the head, which the paper has not, is averaged with p_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fedlr.lowrank.subspace import Subspace
from fedlr.methods import products, shared
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.method import (
    ClientUpdate,
    Facts,
    GlobalState,
    Layout,
    PartKey,
    Parts,
    Role,
    RoundPlan,
)


@dataclass(frozen=True)
class HetLoRA:
    """B̄ = Σ q_k [B_k, 0] and Ā = Σ q_k [A_k; 0] with q_k ∝ p_k ‖s·B_k·A_k‖_F over all sites.

    Clients train and send A and B, r_k·(m + n) a site: one private release a round, in
    which both factors are clipped together and both carry noise. Inexact, as FedAvg-LoRA
    is, and padding shrinks columns that few clients train. Weights that depend on what is
    sent need every update: secure aggregation does not fit. A norm counts noise as signal, and
    a client that lies about its length takes nearly all the weight.

    Guarantees:
        Equal to FedAvg-LoRA at equal ranks with both options off. Where all products
        are zero, q_k = p_k.

    Attributes:
        subspace: Where the first A comes from.
        combine: The weighted mean; no other combiner has weights by norm.
        norm_weighting: Whether the norm enters the weights; q_k = p_k otherwise.
        pruning: γ in (0, 1): a client whose Σ ‖B_tail‖_F·‖A_tail‖_F over the sites has
            become smaller than what it was sent, the tail being its columns beyond
            ⌈γ r_k⌉, has the rank ⌈γ r_k⌉ in later rounds. None prunes nobody.

    Raises:
        ValueError: ``pruning`` is not in (0, 1), or ``combine`` is another combiner.
    """

    subspace: Subspace
    combine: Combiner = weighted_mean
    norm_weighting: bool = True
    pruning: float | None = None

    name = "hetlora"
    facts = Facts(
        title="HetLoRA",
        source="Cho et al., arXiv 2401.06432",
        trains=frozenset({Role.A, Role.B}),
        exact=False,
        limit="mean(B)·mean(A) is not mean(B·A); padding shrinks rare columns",
        mixed_ranks=True,
    )

    def __post_init__(self) -> None:
        products.check_mean(self.name, self.combine)
        if self.pruning is not None and not 0 < self.pruning < 1:
            raise ValueError(f"pruning = {self.pruning} must be in (0, 1), or None")

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return B = 0 and A from the subspace policy."""
        return shared.initial_state(layout, self.subspace, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase: receive, train and send A and B; the head where trained."""
        return shared.single_phase(state.layout, frozenset({Role.A, Role.B}))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the weighted means of the padded factors and of the head, and the new ranks.

        Raises:
            ValueError: Parts that are not exactly the phase's, a client twice, or weights
                that are refused.
        """
        phase = shared.current_phase(self.plan(state), state)
        found = products.counted(state, phase, updates, weights)
        by_norm = [share * self._norm(state.layout, update.parts) for update, share in found]
        shares = by_norm if any(by_norm) else [share for _, share in found]
        padded = [_padded(update, state) for update, _ in found]
        parts = {**self.combine(padded, shares), **products.mean_head(found)}
        pruned = {update.client: self._rank(state, update.parts) for update, _ in found}
        ranks = {client: rank for client, rank in pruned.items() if rank is not None}
        return replace(shared.next_round(state, parts), ranks={**state.ranks, **ranks})

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head, cut to ``rank`` if given."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)

    def _norm(self, layout: Layout, parts: Parts) -> float:
        """‖s·B·A‖_F over all sites from r × r Gram matrices; 1 where norms do not count."""
        if not self.norm_weighting:
            return 1.0
        squares = []
        for site in layout.sites:
            b, a = (parts[PartKey(site.name, role)].double() for role in (Role.B, Role.A))
            square = float(torch.sum((b.mT @ b) * (a @ a.mT)))
            squares.append(site.scaling**2 * max(square, 0.0))
        return math.sqrt(math.fsum(squares))

    def _rank(self, state: GlobalState, parts: Parts) -> int | None:
        """The new rank of the client that sent ``parts``; None where it keeps its own."""
        sent = max((v.shape[1] for k, v in parts.items() if k.role is Role.B), default=1)
        kept = sent if self.pruning is None else math.ceil(self.pruning * sent)
        before, after = (_tail(state.layout, of, kept, sent) for of in (state.parts, parts))
        return kept if after < before else None


def _tail(layout: Layout, parts: Parts, low: int, high: int) -> float:
    """Σ ‖B_tail‖_F·‖A_tail‖_F over the sites, the tail being columns [low, high)."""
    norms = []
    for site in layout.sites:
        b, a = (parts[PartKey(site.name, role)].double() for role in (Role.B, Role.A))
        norms.append(float(b[:, low:high].norm() * a[low:high].norm()))
    return math.fsum(norms)


def _padded(update: ClientUpdate, state: GlobalState) -> ClientUpdate:
    """The factors of an update with zeros for the columns that its client was not sent."""
    parts = {}
    for key, value in update.parts.items():
        if key.role is not Role.HEAD:
            whole = torch.zeros_like(state.parts[key])
            whole[: value.shape[0], : value.shape[1]] = value
            parts[key] = whole
    return replace(update, parts=parts)
