"""The contract of a federated method and the frozen data that it exchanges.

A method is four pure functions on frozen data: no I/O, no device moves, no
logging, inputs never mutated. What travels, in both directions and for every
method, is a `Parts` mapping: named arrays by (site, role).

The state knows its round and its phase, so every function is a function of the
state alone and a resumed run needs nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from torch import Generator, Tensor

from fedlr import checks
from fedlr.lowrank.factors import AdapterSite


class Role(StrEnum):
    """What an array is to its site; the value is the name on the wire."""

    A = "a"
    """Down-projection, shape (r, n)."""
    B = "b"
    """Up-projection, shape (m, r)."""
    CORE = "core"
    """Square core R of s·B·R·A, shape (r, r); in a projecting phase rotationᵀ·B."""
    RESIDUAL_A = "residual_a"
    """Right factor of a residual folded into the base, shape (R, n)."""
    RESIDUAL_B = "residual_b"
    """Left factor of that residual, shape (m, R); effective weight W + R_b·R_a + s·B·A."""
    ROTATION = "rotation"
    """Orthonormal basis a later phase projects on, shape (m, r) or (r, r); or, beside no A, the
    Q of A = Q·A₀, shape (k, r) (`fedlr.methods.downlink`)."""
    HEAD = "head"
    """A trained parameter of the classification head, any shape."""
    SEED = "seed"
    """Public seed of a method's later draws, shape (1,), int64; kept in memory, never sent."""


MODEL_ROLES = frozenset({Role.A, Role.B, Role.CORE, Role.HEAD})
"""Roles whose arrays are parameters of the adapted model itself: what can train."""

RESIDUAL_ROLES = frozenset({Role.RESIDUAL_A, Role.RESIDUAL_B})
"""Roles whose product is added to a frozen base weight."""


class PartKey(NamedTuple):
    """Address of one array: (site name, role). A head parameter's site is its own name."""

    site: str
    role: Role


Parts = Mapping[PartKey, Tensor]
"""Named float arrays by (site, role): the one wire form of every method."""


@dataclass(frozen=True)
class Layout:
    """What a federation adapts; public, fixed for a run.

    Attributes:
        sites: The adapted linear layers, in model order, names unique.
        head: Initial value of each *trained* head parameter by its name
            (float32, any shape); empty where the head is frozen.
    """

    sites: tuple[AdapterSite, ...]
    head: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites] + list(self.head)
        if len(set(names)) != len(names):
            raise ValueError(f"site and head names must be unique, got {names}")


@dataclass(frozen=True)
class Phase:
    """One exchange between server and cohort.

    Attributes:
        train: Roles whose arrays a client trains; empty for a phase that only
            projects what the client has already released in this round.
        send: Roles a client sends up, in either kind of phase. A projecting
            phase sends ``CORE`` = rotationᵀ·B of its released B.
        receive: Roles the server sends down before the phase.
        rank: Leading columns of B (rows of A) that are exchanged; None: all.
    """

    train: frozenset[Role]
    send: frozenset[Role]
    receive: frozenset[Role]
    rank: int | None = None

    @property
    def private(self) -> bool:
        """Whether the phase releases something computed from private data."""
        return bool(self.train)


@dataclass(frozen=True)
class RoundPlan:
    """The phases of one round; at most one of them is a private release.

    Raises:
        ValueError: No phase, or more than one private phase.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a round plan needs at least one phase")
        private = sum(phase.private for phase in self.phases)
        if private > 1:
            raise ValueError(
                f"a round plan has {private} private phases; at most one may release private data"
            )


@dataclass(frozen=True)
class GlobalState:
    """The server's model: everything a round needs and a checkpoint stores.

    Attributes:
        layout: The adapted sites and the initial head.
        parts: Current arrays by (site, role): B and A of every site, the
            trained head, and a residual where the method folds one.
        round: Number of finished rounds, ≥ 0.
        phase: Index of the next phase inside the round.
        memory: Arrays the method keeps for itself: no broadcast has them.
        ranks: Largest rank of a client by its identifier, where the method itself has
            lowered it (HetLoRA's self-pruning); ≥ 1. The others have that of their site.
    """

    layout: Layout
    parts: Parts
    round: int = 0
    phase: int = 0
    memory: Parts = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.at_least("round", self.round, 0)
        checks.at_least("phase", self.phase, 0)
        for client, rank in self.ranks.items():
            checks.at_least(f"ranks[{client!r}]", rank, 1)


@dataclass(frozen=True)
class Facts:
    """What a user chooses a method by; tables of methods are made of nothing else.

    Attributes:
        title: Name in the literature.
        source: Authors and arXiv number.
        trains: Roles that some round trains, the head aside.
        exact: Whether the aggregate is the weighted mean of the clients' models.
        limit: What it is not exact in, or what it costs; one short phrase.
        linear: Whether the server needs only a weighted sum of what clients send: fit
            for secure aggregation.
        combiners: Whether another combiner than the weighted mean composes with it.
        consensus: Whether `fedlr.methods.consensus` filters all that its adapters learn.
        refreshes: Whether its subspace can be moved by `fedlr.methods.refresh`.
        mixed_ranks: Whether a client may train the leading columns alone.
        folds: Whether it adds a residual to the base weights.
    """

    title: str
    source: str
    trains: frozenset[Role]
    exact: bool
    limit: str
    linear: bool = False
    combiners: bool = False
    consensus: bool = False
    refreshes: bool = False
    mixed_ranks: bool = False
    folds: bool = False


@dataclass(frozen=True)
class ClientUpdate:
    """What one site sends up in one phase; already noised where privacy is on.

    Attributes:
        client: Stable public identifier of the client.
        parts: The arrays of `Phase.send`; for ``HEAD`` and the factors these
            are *values* after training, not differences.
        steps: Local optimiser steps taken (empty batches included).
        epsilon: ε spent by this site so far, after this update; None where
            privacy is off.
    """

    client: str
    parts: Parts
    steps: int
    epsilon: float | None = None


class Method(Protocol):
    """A federated low-rank method; laws in the package README and its contract tests."""

    @property
    def name(self) -> str:
        """Name in the configuration."""
        ...

    @property
    def facts(self) -> Facts:
        """What a user chooses it by."""
        ...

    def init(self, layout: Layout, generator: Generator) -> GlobalState:
        """Return the state before round 0; every random draw comes from ``generator``."""
        ...

    def plan(self, state: GlobalState) -> RoundPlan:
        """Return the phases of the round that ``state`` is in."""
        ...

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        """Combine one phase's updates; the last phase of a round increments ``round``.

        Args:
            state: The state whose broadcast the clients trained from.
            updates: K ≥ 1 updates.
            weights: K non-negative public weights, not all zero; normalised here.

        Raises:
            ValueError: No update, unequal lengths, or zero total weight.
        """
        ...

    def broadcast(self, state: GlobalState, rank: int | None = None) -> Parts:
        """Return what goes down before the current phase, truncated to ``rank`` if given."""
        ...
