"""What each client is sent in a phase: a job at its own rank, and the basis where it lacks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message

from fedlr.adapters import codec
from fedlr.errors import RunError
from fedlr.methods import shared
from fedlr.methods.downlink import Compacting
from fedlr.methods.method import GlobalState, Layout, Method, Phase
from fedlr.training.downlink import shortened
from fedlr.training.jobs import Job, Provenance, digest_of
from server.membership import Member
from server.messages import train_messages


@dataclass(frozen=True)
class Order:
    """A job on its way to one client.

    Attributes:
        member: The client.
        message: What is sent.
        phase: The phase, with the client's own rank: what its update is held against.
        nonce: Of the job.
        size: Payload, bytes.
        basis: Digest of the A₀ that the job relies on; None where it has its A's.
        whole: Whether nothing more could be sent to a client that lacks the basis.
    """

    member: Member
    message: Message
    phase: Phase
    nonce: str
    size: int
    basis: str | None
    whole: bool


@dataclass(frozen=True)
class _Kind:
    """Clients with equal kinds get the same arrays."""

    rank: int | None
    basis: bool


class Dispatch:
    """Makes the jobs of a run.

    Args:
        method: What is broadcast.
        run: Identifier of the run.
        provenance: Digests that jobs carry.
        timeout_s: Seconds after which a job is void; None is Flower's default.
    """

    def __init__(
        self, method: Method, run: str, provenance: Provenance, timeout_s: float | None
    ) -> None:
        self._method = method
        self._run = run
        self._provenance = provenance
        self._timeout_s = timeout_s

    def orders(
        self,
        state: GlobalState,
        nonces: Mapping[Member, str],
        holders: Mapping[str, str],
    ) -> list[Order]:
        """Return one order per client, those that get the same arrays together.

        Args:
            state: What the phase trains from.
            nonces: Nonce by client.
            holders: Digest of the basis that a client is believed to hold; those that are
                not in it get the basis.
        """
        groups: dict[_Kind, dict[Member, str]] = {}
        phase = shared.current_phase(self._method.plan(state), state)
        basis = self._basis(state)
        for member, nonce in nonces.items():
            lacks = basis is not None and holders.get(member.client) != basis
            kind = _Kind(rank_of(member, state, phase), lacks)
            groups.setdefault(kind, {})[member] = nonce
        return [
            order
            for kind, group in groups.items()
            for order in self._group(state, phase, kind, group)
        ]

    def _group(
        self, state: GlobalState, phase: Phase, kind: _Kind, nonces: Mapping[Member, str]
    ) -> list[Order]:
        job = Job(
            run=self._run,
            round=state.round,
            phase=state.phase,
            nonce="",
            train=phase.train,
            send=phase.send,
            parts=self._method.broadcast(state, kind.rank),
            provenance=self._provenance,
        )
        if isinstance(self._method, Compacting):
            compact = self._method.compact(state, kind.rank)
            job = job if compact is None else shortened(job, compact, kind.basis)
        by_node = {member.node: nonce for member, nonce in nonces.items()}
        messages = train_messages(job, by_node, self._timeout_s)
        own = phase if kind.rank is None else replace(phase, rank=kind.rank)
        return [
            Order(
                member=member,
                message=message,
                phase=own,
                nonce=nonce,
                size=codec.size_in_bytes(job.parts),
                basis=None if job.rotated is None else job.rotated.basis,
                whole=kind.basis or job.rotated is None,
            )
            for (member, nonce), message in zip(nonces.items(), messages, strict=True)
        ]

    def _basis(self, state: GlobalState) -> str | None:
        """Return the digest of the basis that A's are rotations of; None where they are sent."""
        if not isinstance(self._method, Compacting):
            return None
        compact = self._method.compact(state)
        return None if compact is None else digest_of(compact.basis)


def rank_of(member: Member, state: GlobalState, phase: Phase) -> int | None:
    """Return the rank at which a client takes part in a phase; None where nothing is cut.

    The smallest of what the client announces, what the method has lowered it to, and what
    the phase exchanges.
    """
    bounds = (member.status.rank, state.ranks.get(member.client), phase.rank)
    rank = min((bound for bound in bounds if bound is not None), default=None)
    return None if rank is None or rank >= full_rank(state.layout) else rank


def full_rank(layout: Layout) -> int:
    """Return the largest rank of a site."""
    return max((site.rank for site in layout.sites), default=1)


def check_ranks(members: Sequence[Member], method: Method, layout: Layout) -> None:
    """Raise RunError where a client wants fewer columns than ``method`` can give it."""
    full = full_rank(layout)
    low = [m for m in members if m.status.rank is not None and m.status.rank < full]
    if low and not method.facts.mixed_ranks:
        told = ", ".join(f"{m.client} of rank {m.status.rank}" for m in low[:3])
        more = f" and {len(low) - 3} more" if len(low) > 3 else ""
        raise RunError(
            f"{told}{more} cannot take part: method {method.name} gives every client all {full} "
            "columns; take a method that mixes ranks, such as fedsvd, or lower adapter.rank to "
            "what all can train"
        )
