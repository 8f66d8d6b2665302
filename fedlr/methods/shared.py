"""What the single-round methods have in common: first state, addresses, checks.

Free functions on the frozen types of `fedlr.methods.method`; a method file
keeps only what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from fedlr import checks
from fedlr.lowrank.factors import Factors
from fedlr.lowrank.subspace import Subspace
from fedlr.methods.method import (
    ClientUpdate,
    GlobalState,
    Layout,
    PartKey,
    Parts,
    Phase,
    Role,
    RoundPlan,
)

_RANK_AXIS: Mapping[Role, int] = {Role.A: 0, Role.B: 1}


def part_keys(layout: Layout, roles: frozenset[Role]) -> list[PartKey]:
    """Return the addresses of ``roles``: the sites in model order, then the head."""
    keys = [
        PartKey(site.name, role) for site in layout.sites for role in sorted(roles - {Role.HEAD})
    ]
    if Role.HEAD in roles:
        keys += [PartKey(name, Role.HEAD) for name in layout.head]
    return keys


def initial_state(layout: Layout, subspace: Subspace, generator: Generator) -> GlobalState:
    """Return the state with B = 0, A from ``subspace`` and the layout's head.

    Args:
        layout: Sites and initial head; head arrays are copied.
        subspace: Called once per site in model order.
        generator: The only source of randomness; advanced.

    Returns:
        Round 0, phase 0; B (m, r) and A (r, n) in A's dtype.

    Raises:
        ValueError: ``subspace`` returns an A that is not (r, n).
    """
    parts: dict[PartKey, Tensor] = {}
    for site in layout.sites:
        a = subspace(site, generator)
        checks.same_shape(f"{site.name}: a", a.shape, (site.rank, site.in_features))
        parts[PartKey(site.name, Role.A)] = a
        parts[PartKey(site.name, Role.B)] = a.new_zeros(site.out_features, site.rank)
    for name, value in layout.head.items():
        parts[PartKey(name, Role.HEAD)] = value.detach().clone()
    return GlobalState(layout=layout, parts=parts)


def single_phase(layout: Layout, train: frozenset[Role]) -> RoundPlan:
    """Return one private phase that receives A and B, and trains and sends ``train``.

    The head joins where the layout trains one.
    """
    head = frozenset({Role.HEAD}) if layout.head else frozenset[Role]()
    receive = frozenset({Role.A, Role.B}) | head
    return RoundPlan((Phase(train=train | head, send=train | head, receive=receive),))


def current_phase(plan: RoundPlan, state: GlobalState) -> Phase:
    """Return the phase that ``state`` is in; ValueError where the plan has none such."""
    if state.phase >= len(plan.phases):
        raise ValueError(
            f"state.phase = {state.phase} must be < {len(plan.phases)}, the phases of the round"
        )
    return plan.phases[state.phase]


def broadcast(state: GlobalState, phase: Phase, rank: int | None = None) -> dict[PartKey, Tensor]:
    """Return the arrays of ``phase.receive``, A and B cut to the leading ``rank``.

    Args:
        state: Source of the arrays; they are shared, not copied, where not cut.
        phase: What is received.
        rank: Leading columns of B and rows of A, in [1, largest rank of a
            site]; a site of smaller rank is sent whole. None: ``phase.rank``.

    Raises:
        ValueError: ``rank`` is out of range.
    """
    kept = phase.rank if rank is None else rank
    if kept is not None:
        checks.at_least("rank", kept, 1)
        checks.in_range("rank", kept, 1, max((s.rank for s in state.layout.sites), default=1))
    down: dict[PartKey, Tensor] = {}
    for key in part_keys(state.layout, phase.receive):
        array = state.parts[key]
        axis = _RANK_AXIS.get(key.role)
        if kept is not None and axis is not None and kept < array.shape[axis]:
            array = array.narrow(axis, 0, kept).contiguous()
        down[key] = array
    return down


def accepted(
    state: GlobalState, phase: Phase, updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    """Check updates against ``phase`` and complete those of truncated rank.

    A client that received the leading k columns of B (rows of A) trained only
    those; the others keep the server's value, so an untouched broadcast leaves
    the model as it is and the mean stays linear in what was trained.

    Args:
        state: The state whose broadcast the clients trained from.
        phase: Its ``send`` fixes the part keys, exactly.
        updates: Any number of updates.

    Returns:
        Updates whose A and B have the full rank of their site, in input order.

    Raises:
        ValueError: Missing or unexpected part keys; a dtype or a shape that
            differs from the server's array other than by a rank in [1, r]; A
            and B of one site with different ranks.
    """
    expected = set(part_keys(state.layout, phase.send))
    for update in updates:
        if update.parts.keys() != expected:
            missing = sorted(expected - update.parts.keys())
            unexpected = sorted(update.parts.keys() - expected)
            raise ValueError(
                f"{update.client}: parts must be exactly those of the phase; "
                f"missing {missing}, unexpected {unexpected}"
            )
        _check_ranks(update)
    return [
        replace(
            update,
            parts={
                key: _completed(f"{update.client}: {key}", key.role, array, state.parts.get(key))
                for key, array in update.parts.items()
            },
        )
        for update in updates
    ]


def next_round(state: GlobalState, parts: Parts) -> GlobalState:
    """Return the state of the next round with ``parts`` replaced."""
    return replace(state, parts={**state.parts, **parts}, round=state.round + 1, phase=0)


def factor_pairs(layout: Layout, parts: Parts) -> dict[str, Factors]:
    """Return the factor pair of every site by its name."""
    return {
        site.name: Factors(
            b=parts[PartKey(site.name, Role.B)],
            a=parts[PartKey(site.name, Role.A)],
            scaling=site.scaling,
        )
        for site in layout.sites
    }


def _check_ranks(update: ClientUpdate) -> None:
    """ValueError where one site's A and B disagree on the exchanged rank."""
    for key, b in update.parts.items():
        a = update.parts.get(PartKey(key.site, Role.A))
        if key.role is Role.B and a is not None and b.shape[-1] != a.shape[0]:
            raise ValueError(
                f"{update.client}: {key.site} has b of rank {b.shape[-1]} and a of rank "
                f"{a.shape[0]}; both must have the rank that was broadcast"
            )


def _completed(name: str, role: Role, array: Tensor, reference: Tensor | None) -> Tensor:
    """``array`` with the trailing rank of ``reference``, which None leaves unchecked."""
    if reference is None:
        return array
    if array.dtype != reference.dtype:
        raise ValueError(f"{name} has dtype {array.dtype}, expected {reference.dtype}")
    axis = _RANK_AXIS.get(role)
    if axis is None or array.ndim != 2 or not 1 <= array.shape[axis] < reference.shape[axis]:
        checks.same_shape(name, array.shape, reference.shape)
        return array
    rank = array.shape[axis]
    rest = reference.narrow(axis, rank, reference.shape[axis] - rank)
    checks.same_shape(name, array.shape, reference.narrow(axis, 0, rank).shape)
    return torch.cat([array, rest], dim=axis)
