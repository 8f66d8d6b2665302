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
from fedlr.methods.combine import Combiner, check_weights
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


def whole_broadcast(
    state: GlobalState, phase: Phase, rank: int | None = None
) -> dict[PartKey, Tensor]:
    """Return `broadcast` for a method whose clients train every column.

    Raises:
        ValueError: ``rank`` is out of range, or below the rank of some site.
    """
    if rank is not None:
        broadcast(state, phase, rank)
        largest = max((site.rank for site in state.layout.sites), default=1)
        if rank < largest:
            raise ValueError(
                f"rank = {rank} must be None or {largest}: this method needs every column of "
                "every client; choose one with mixed ranks for weak clients"
            )
    return broadcast(state, phase)


def accepted(
    state: GlobalState, phase: Phase, updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    """Check updates against ``phase`` and return them as they were sent.

    Args:
        state: The state whose broadcast the clients trained from.
        phase: Its ``send`` fixes the part keys, exactly.
        updates: Any number of updates; A and B may have the leading rank that their
            client was sent.

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
        for key, array in update.parts.items():
            if (reference := state.parts.get(key)) is not None:
                _check_fits(f"{update.client}: {key}", key.role, array, reference)
    return list(updates)


def combined(
    state: GlobalState,
    phase: Phase,
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    combine: Combiner,
) -> dict[PartKey, Tensor]:
    """Combine what was sent, each column of B (row of A) over the clients that trained it.

    Where all clients have the full rank this is ``combine``. Otherwise the columns fall
    into blocks that the same clients trained, and each block is combined alone. Columns
    that nobody trained, or fewer clients than ``combine.minimum``, or only clients of
    weight zero, keep the server's value.

    Args:
        state: The state whose broadcast the clients trained from.
        phase: Its ``send`` fixes the part keys, exactly.
        updates: K ≥ ``combine.minimum`` updates.
        weights: K non-negative public weights, not all zero.
        combine: How arrays become one.

    Returns:
        Every part of ``phase.send`` with the full rank of its site.

    Raises:
        ValueError: As `accepted`, and everything that ``combine`` refuses.

    Guarantees:
        Linear in what was trained where ``combine`` is. An untouched broadcast of any
        rank leaves the model as it is. What a combiner bears of malicious clients, and how far
        it lets one move the model, is of each block by itself and of the clients that trained it.
    """
    sent = accepted(state, phase, updates)
    reference = {key: value for key, value in state.parts.items() if key.role in phase.send}
    cuts = sorted({rank for update in sent for rank in _ranks(update)})
    if not sent or not _differ(sent):
        before = {k: _leading(v, sent[0].parts[k], k) for k, v in reference.items() if sent}
        whole = combine(sent, weights, before)
        return {key: _completed(value, key, state) for key, value in whole.items()}
    check_weights(updates, weights)
    pieces: dict[PartKey, list[Tensor]] = {}
    for low, high in zip([0, *cuts], cuts, strict=False):
        for key, piece in _block(sent, weights, reference, combine, (low, high)).items():
            pieces.setdefault(key, []).append(piece)
    joined = {
        key: torch.cat(found, dim=_RANK_AXIS[key.role]) if len(found) > 1 else found[0]
        for key, found in pieces.items()
    }
    return {key: _completed(joined[key], key, state) for key in sent[0].parts}


def check_whole(state: GlobalState, updates: Sequence[ClientUpdate]) -> None:
    """Check that every A and B sent has the rank of its site, for methods without mixed ranks.

    Raises:
        ValueError: One has another rank; the message names client and part.
    """
    for update in updates:
        for key, array in update.parts.items():
            axis, own = _RANK_AXIS.get(key.role), state.parts.get(key)
            if axis is None or own is None or array.ndim != own.ndim:
                continue
            if array.shape[axis] != own.shape[axis]:
                raise ValueError(
                    f"{update.client}: {key} has rank {array.shape[axis]}, but this method needs "
                    f"rank {own.shape[axis]} of every client; choose one with mixed ranks"
                )


def _block(
    sent: Sequence[ClientUpdate],
    weights: Sequence[float],
    reference: Parts,
    combine: Combiner,
    columns: tuple[int, int],
) -> dict[PartKey, Tensor]:
    """Columns [low, high) of every part that has some; parts without rank with the first block."""
    low, high = columns
    trainers: dict[PartKey, tuple[int, ...]] = {}
    for key in sent[0].parts:
        axis = _RANK_AXIS.get(key.role)
        if axis is None:
            who = tuple(range(len(sent))) if low == 0 else ()
        else:
            who = tuple(i for i, update in enumerate(sent) if update.parts[key].shape[axis] > low)
        if who:
            trainers[key] = who
    found: dict[PartKey, Tensor] = {}
    for who in dict.fromkeys(trainers.values()):
        keys = [key for key, mine in trainers.items() if mine == who]
        pieces = [
            replace(sent[i], parts={k: _cut(sent[i].parts[k], k, low, high) for k in keys})
            for i in who
        ]
        before = {key: _cut(reference[key], key, low, high) for key in keys if key in reference}
        shares = [weights[i] for i in who]
        few = sum(share > 0 for share in shares) < max(1, combine.minimum)
        if low > 0 and few:
            found.update(before)
        else:
            found.update(combine(pieces, shares, before))
    return found


def _differ(updates: Sequence[ClientUpdate]) -> bool:
    """Whether some array of A or B has another rank than that of the first client."""
    return any(
        array.shape != updates[0].parts[key].shape
        for update in updates
        for key, array in update.parts.items()
        if key.role in _RANK_AXIS
    )


def _ranks(update: ClientUpdate) -> set[int]:
    """The ranks of an update's A's and B's."""
    return {
        array.shape[_RANK_AXIS[key.role]]
        for key, array in update.parts.items()
        if key.role in _RANK_AXIS
    }


def _leading(array: Tensor, like: Tensor, key: PartKey) -> Tensor:
    """``array`` with as many columns of B (rows of A) as ``like``."""
    axis = _RANK_AXIS.get(key.role)
    return array if axis is None else _cut(array, key, 0, like.shape[axis])


def _cut(array: Tensor, key: PartKey, low: int, high: int) -> Tensor:
    axis = _RANK_AXIS.get(key.role)
    if axis is None:
        return array
    return array.narrow(axis, low, min(high, array.shape[axis]) - low)


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


def _check_fits(name: str, role: Role, array: Tensor, reference: Tensor) -> None:
    """ValueError where ``array`` differs from ``reference`` other than by a smaller rank."""
    if array.dtype != reference.dtype:
        raise ValueError(f"{name} has dtype {array.dtype}, expected {reference.dtype}")
    axis = _RANK_AXIS.get(role)
    if axis is not None and array.ndim == 2 and 1 <= array.shape[axis] < reference.shape[axis]:
        reference = reference.narrow(axis, 0, array.shape[axis])
    checks.same_shape(name, array.shape, reference.shape)


def _completed(array: Tensor, key: PartKey, state: GlobalState) -> Tensor:
    """``array`` with the server's own trailing columns of B (rows of A)."""
    axis, own = _RANK_AXIS.get(key.role), state.parts.get(key)
    if axis is None or own is None or array.shape[axis] == own.shape[axis]:
        return array
    rank = array.shape[axis]
    return torch.cat([array, own.narrow(axis, rank, own.shape[axis] - rank)], dim=axis)
