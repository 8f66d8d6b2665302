"""What the server demands of an update before it may touch the model.

Every update is judged alone, so that no single site can stop a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlr.errors import BadUpdate
from fedlr.methods import shared
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Phase, Role
from fedlr.training.jobs import Abstention

LARGEST_NORM = 1e15
"""Norm above which an array is refused in any case: products of two arrays, added up over
any number of rounds, must stay in the range of float32, or no method could go on."""


def check_claims(update: ClientUpdate | Abstention, client: str) -> None:
    """Check what an update or an abstention says of its sender.

    Args:
        update: The answer as received.
        client: Identifier of the node it came from.

    Raises:
        BadUpdate: ``names`` where the update names another client or a negative
            ε; ``not_finite`` where ε is NaN. ∞ is a valid ε (dry mode).

    Edge cases:
        An abstention may name nobody: a real site's proxy that does not reach the agent does
        not know whose it is, and the reply is that of the node that was asked.
    """
    if update.client != client and (update.client or isinstance(update, ClientUpdate)):
        raise BadUpdate("names", f"client = {update.client!r} but the node announced {client!r}")
    if update.epsilon is not None and math.isnan(update.epsilon):
        raise BadUpdate("not_finite", f"{client}: epsilon is NaN")
    if update.epsilon is not None and update.epsilon < 0:
        raise BadUpdate("names", f"{client}: epsilon = {update.epsilon} must be ≥ 0")


def check_update(
    update: ClientUpdate, state: GlobalState, phase: Phase, bound: float | None = None
) -> None:
    """Check the arrays of one update against what was broadcast.

    Args:
        update: The update as received.
        state: The state whose broadcast the site trained from.
        phase: Its ``send`` fixes the part keys, exactly; its ``rank``, the client's own,
            the shapes.
        bound: Largest Frobenius norm of the change of one array against the
            broadcast, > 0; None sets no bound. An array that was not broadcast
            is a projection of B on an orthonormal basis, and its own norm must
            be ≤ ``bound`` + ‖B‖.

    Raises:
        BadUpdate: ``names`` other part keys · ``shape`` · ``dtype`` other than
            float32 · ``not_finite`` NaN or ∞ · ``norm`` beyond ``bound`` or
            `LARGEST_NORM`.
        ValueError: The phase sends an array whose shape ``state`` does not fix.
    """
    expected = references(state, phase)
    if update.parts.keys() != expected.keys():
        missing = sorted(expected.keys() - update.parts.keys())
        unexpected = sorted(update.parts.keys() - expected.keys())
        raise BadUpdate(
            "names", f"{update.client}: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for key, value in update.parts.items():
        name = f"{update.client}: {key.site}/{key.role}"
        reference = expected[key]
        if value.dtype != torch.float32:
            raise BadUpdate("dtype", f"{name} has dtype {value.dtype}, expected float32")
        if value.shape != reference.shape:
            raise BadUpdate(
                "shape", f"{name} has shape {tuple(value.shape)}, not {tuple(reference.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise BadUpdate("not_finite", f"{name} holds NaN or infinite entries")
        _check_norm(name, value, reference, _allowed(state, key, bound))


def references(state: GlobalState, phase: Phase) -> Mapping[PartKey, Tensor]:
    """Return the array that each array of ``phase.send`` is compared with.

    Returns:
        The broadcast value of what the state holds, cut to the phase's rank;
        zeros of shape (columns of the rotation, rank) for a projected core.

    Raises:
        ValueError: The phase sends a part that the state does not fix.
    """
    layout, parts = state.layout, state.parts
    held = frozenset(
        role
        for role in phase.send
        if all(key in parts for key in shared.part_keys(layout, frozenset({role})))
    )
    found = shared.broadcast(state, replace(phase, receive=held))
    for site in layout.sites:
        rotation = parts.get(PartKey(site.name, Role.ROTATION))
        if Role.CORE in phase.send - held and rotation is not None:
            rank = min(site.rank, phase.rank or site.rank)
            found[PartKey(site.name, Role.CORE)] = rotation.new_zeros(rotation.shape[-1], rank)
    unknown = [key for key in shared.part_keys(layout, phase.send) if key not in found]
    if unknown:
        raise ValueError(
            f"phase.send has {unknown[0]}, whose shape the state does not fix; a method must "
            "hold the array in its state or broadcast a rotation for it"
        )
    return found


def _allowed(state: GlobalState, key: PartKey, bound: float | None) -> float:
    """The largest change of one array; ∞ without a bound."""
    if bound is None:
        return math.inf
    if key in state.parts:
        return bound
    # ‖QᵀB_k‖ ≤ ‖B_k‖ ≤ ‖B‖ + ‖B_k − B‖ for a Q with orthonormal columns.
    return bound + float(state.parts[PartKey(key.site, Role.B)].double().norm())


def _check_norm(name: str, value: Tensor, reference: Tensor, allowed: float) -> None:
    norm = float(value.double().norm())
    if norm > LARGEST_NORM:
        raise BadUpdate("norm", f"{name} has norm {norm:.3g}, it must be ≤ {LARGEST_NORM:.3g}")
    change = float((value.double() - reference.double()).norm())
    if change > allowed:
        raise BadUpdate("norm", f"{name} changed by {change:.3g}, it must be ≤ {allowed:.3g}")
