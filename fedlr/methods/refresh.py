"""Move the subspace of a method that trains B alone: merge, or alternate.

With B trained alone, row(A) never changes (README of ``fedlr.lowrank``), so no round reaches
a direction outside it. Both ways out work on what clients have already released: they are
post-processing and cost no ε of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Generator, Tensor

from fedlr import checks
from fedlr.lowrank.factors import Factors
from fedlr.lowrank.subspace import Subspace
from fedlr.lowrank.svd import refactorise_many
from fedlr.methods import residual, shared
from fedlr.methods.combine import Combiner
from fedlr.methods.method import (
    RESIDUAL_ROLES,
    ClientUpdate,
    Facts,
    GlobalState,
    Layout,
    Method,
    PartKey,
    Role,
    RoundPlan,
)


class AveragesB(Method, Protocol):
    """A method of one phase a round whose clients train B under an A that all share."""

    @property
    def combine(self) -> Combiner:
        """How the clients' arrays become one."""
        ...


def check_refreshes(method: Method) -> None:
    """Raise ValueError unless the facts of ``method`` say that its subspace can be moved."""
    if not method.facts.refreshes:
        raise ValueError(
            f"inner = {method.name} has no fixed row space to move; use a method that trains B "
            "alone under a shared A"
        )


@dataclass(frozen=True)
class Merging:
    """Every few rounds: R ← R + s·B·A, B ← 0, A ← a new draw.

    The rank of one round stays r; that of all rounds together grows by r with every merge.
    Between merges everything is the inner method. The residual R = R_b·R_a goes down with
    every broadcast and is kept factored, at most as large as m × n beside an identity
    (`fedlr.methods.residual.fold`).

    Guarantees:
        The merge leaves the effective weight as it is, up to one rounding. The new A's are
        a function of the seed drawn at `init`, which the state keeps in its memory, and of
        the round: a resumed run draws the same. A policy of ordered directions gives the
        next r of them (`Subspace.redraw`).

    Attributes:
        inner: The method; its facts must say that it can be refreshed.
        subspace: Where A's come from.
        every: Rounds between two merges, ≥ 1.

    Raises:
        ValueError: ``every`` < 1, or ``inner`` cannot be refreshed.

    Reference:
        Merging and a new start within one training: ReLoRA, Lialin et al., arXiv 2307.05695.
        By a server: FLoRA, Wang et al., arXiv 2409.05976.
    """

    inner: AveragesB
    subspace: Subspace
    every: int = 1
    name: str = field(init=False)
    facts: Facts = field(init=False)

    def __post_init__(self) -> None:
        checks.at_least("every", self.every, 1)
        check_refreshes(self.inner)
        facts = replace(
            self.inner.facts,
            limit="each merge adds r to the rank that goes down",
            refreshes=False,
            folds=True,
        )
        object.__setattr__(self, "name", self.inner.name)
        object.__setattr__(self, "facts", facts)

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return the inner method's first state, a residual of rank 0, and a seed in memory."""
        return residual.with_restarts(self.inner.init(layout, generator), generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return the inner method's phases, each of which receives the residual too."""
        phases = self.inner.plan(state).phases
        return RoundPlan(
            tuple(replace(phase, receive=phase.receive | RESIDUAL_ROLES) for phase in phases)
        )

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the inner method's next state, merged where a round is over that ends with one.

        Raises:
            ValueError: As the inner method.
        """
        after = self.inner.aggregate(state, updates, weights)
        over = after.round > state.round
        return self._merged(after) if over and after.round % self.every == 0 else after

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return what the inner method sends, and the residual, whole for every rank."""
        shared.current_phase(self.plan(state), state)
        rest = {key: value for key, value in state.parts.items() if key.role in RESIDUAL_ROLES}
        return {**self.inner.broadcast(state, rank), **rest}

    def _merged(self, state: GlobalState) -> GlobalState:
        pairs, turn = shared.factor_pairs(state.layout, state.parts), state.round // self.every
        parts = residual.restarted(state, pairs, self.subspace, done=state.round, turn=turn)
        return replace(state, parts={**state.parts, **parts})


@dataclass(frozen=True)
class Alternating:
    """Even rounds train B under A, odd rounds train A under B = U with orthonormal columns.

    After a round of B the aggregate B̄·A = U Σ Vᵀ is sent as B = U, A = Σ Vᵀ, so that the
    gradient s·UᵀG of A has G's own scale in the directions of U, as s·G·Aᵀ has under an
    orthonormal A. After a round of A, U·Ā = U' Σ' V'ᵀ is sent as B = U' Σ', A = V'ᵀ. A round
    of A moves row(A), a round of B moves the column space: one half step each of subspace
    iteration on what the clients' gradients say.

    Guarantees:
        Both switches keep the product, and each round is exact: under a shared B,
        B·Ā = Σ p_k B·A_k. Within a round the other factor is bit-identical. Each round is
        one release, of r·n numbers a site in the place of m·r in the odd ones.

    Edge cases:
        Where B̄·A has a rank below r, U is completed to orthonormal columns and the rows of
        A beside them are 0; they train like the others.

    Attributes:
        inner: The method of the even rounds; its facts must say that it can be refreshed.

    Raises:
        ValueError: ``inner`` cannot be refreshed.

    Reference:
        RoLoRA, Chen et al., arXiv 2502.01755, alternates the trained factor; it does not
        refactorise between the rounds.
    """

    inner: AveragesB
    name: str = field(init=False)
    facts: Facts = field(init=False)

    def __post_init__(self) -> None:
        check_refreshes(self.inner)
        facts = replace(
            self.inner.facts,
            trains=self.inner.facts.trains | {Role.A, Role.B},
            limit="trains each factor in every second round",
            refreshes=False,
        )
        object.__setattr__(self, "name", self.inner.name)
        object.__setattr__(self, "facts", facts)

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return the inner method's first state; round 0 trains B."""
        return self.inner.init(layout, generator)

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return one phase that receives A and B and trains one of them; and the head."""
        if _trains_b(state):
            return self.inner.plan(state)
        return shared.single_phase(state.layout, frozenset({Role.A}))

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Return the mean of the trained factor, refactorised for a round of the other one.

        Raises:
            ValueError: As the inner method.
        """
        if _trains_b(state):
            after = self.inner.aggregate(state, updates, weights)
            return after if _trains_b(after) else _with_pairs(after, _b_orthonormal(after))
        phase = shared.current_phase(self.plan(state), state)
        mean = shared.combined(state, phase, updates, weights, self.inner.combine)
        after = shared.next_round(state, mean)
        pairs = refactorise_many(shared.factor_pairs(after.layout, after.parts))
        return _with_pairs(after, pairs)

    def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
        """Return A, B and head; the leading ``rank`` columns are the best of that rank."""
        return shared.broadcast(state, shared.current_phase(self.plan(state), state), rank)


def _trains_b(state: GlobalState) -> bool:
    return state.round % 2 == 0


def _b_orthonormal(state: GlobalState) -> dict[str, Factors]:
    """The pairs U, Σ·Vᵀ of every site: refactorised from the other side."""
    flipped = {
        name: replace(pair, b=pair.a.mT, a=pair.b.mT)
        for name, pair in shared.factor_pairs(state.layout, state.parts).items()
    }
    return {
        name: replace(pair, b=pair.a.mT.contiguous(), a=pair.b.mT.contiguous())
        for name, pair in refactorise_many(flipped).items()
    }


def _with_pairs(state: GlobalState, pairs: dict[str, Factors]) -> GlobalState:
    parts = dict(state.parts)
    for name, pair in pairs.items():
        parts[PartKey(name, Role.B)], parts[PartKey(name, Role.A)] = pair.b, pair.a
    return replace(state, parts=parts)
