"""The open round: what has been asked, answered, refused and counted so far."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Message

from fedlr.adapters import codec
from fedlr.errors import BadUpdate
from fedlr.methods.method import ClientUpdate, GlobalState, Phase
from fedlr.report.records import Refusal
from fedlr.training.jobs import Abstention
from server.checking import check_claims, check_update
from server.membership import Member
from server.messages import read_outcome

FAILED, NO_ANSWER, QUORUM = "failed", "no_answer", "quorum"
"""Codes the server itself refuses with: an error reply, no reply in time, and a
valid update of a round that too few clients joined."""

_log = logging.getLogger("fedlr.server")


@dataclass
class OpenRound:
    """One round in progress.

    Attributes:
        state: The state the current phase trains from.
        cohort: Clients drawn for the round.
        standing: Those whose updates of all phases so far were accepted; only
            they are asked in the next phase.
        asked: The messages of the current phase, sent already, with their receivers.
        refused: Clients that dropped out, each with its code.
        steps: Local steps of accepted updates by client.
        epsilon: ε reported in this round by client, refused updates included:
            the site has spent it.
        bytes_down: Payload sent so far, bytes.
        bytes_up: Payload of the readable updates so far, bytes.
        server_s: Time spent aggregating, seconds.
        began: Monotonic clock at the start, seconds.
    """

    state: GlobalState
    cohort: tuple[Member, ...]
    standing: tuple[Member, ...]
    asked: list[tuple[Message, Member]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    epsilon: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    server_s: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def number(self) -> int:
        """Number of the round as people count, from 1."""
        return self.state.round + 1

    def receive(
        self,
        replies: Iterable[Message],
        phase: Phase,
        bound: float | None,
        answered: Callable[[str, int], None],
    ) -> list[ClientUpdate]:
        """Sort the replies of a phase into accepted updates and refusals.

        Args:
            replies: In any order; strangers and second replies are ignored.
            phase: What was asked for.
            bound: As in `server.checking.check_update`.
            answered: Told (client, steps) as each reply is read.

        Returns:
            Accepted updates in client order.
        """
        open_orders = {message.metadata.message_id: member for message, member in self.asked}
        accepted: dict[Member, ClientUpdate] = {}
        codes: dict[Member, str] = {}
        for reply in replies:
            member = open_orders.pop(reply.metadata.reply_to_message_id, None)
            if member is None:
                continue
            judged = self._judge(reply, member, phase, bound)
            if isinstance(judged, str):
                codes[member] = judged
            else:
                accepted[member] = judged
            answered(member.client, 0 if isinstance(judged, str) else judged.steps)
        codes |= dict.fromkeys(open_orders.values(), NO_ANSWER)
        order = sorted(accepted, key=lambda member: member.index)
        self.standing = tuple(order)
        for member in order:
            self.steps[member.client] = self.steps.get(member.client, 0) + accepted[member].steps
        for member in sorted(codes, key=lambda member: member.index):
            self.refused.append(Refusal(member.client, codes[member]))
        return [accepted[member] for member in order]

    def abandon(self) -> None:
        """Count the updates that were accepted so far as not aggregated."""
        self.refused += [Refusal(member.client, QUORUM) for member in self.standing]
        self.standing = ()
        self.steps.clear()

    def refusal_counts(self) -> str:
        """Return the codes so far as text, e.g. ``"budget: 3, failed: 1"``."""
        counts = Counter(refusal.code for refusal in self.refused)
        return ", ".join(f"{code}: {count}" for code, count in sorted(counts.items())) or "none"

    def _judge(
        self, reply: Message, member: Member, phase: Phase, bound: float | None
    ) -> ClientUpdate | str:
        """Return the update if it is acceptable, otherwise the code of its refusal."""
        if reply.has_error():
            return FAILED
        try:
            outcome = read_outcome(reply)
            check_claims(outcome, member.client)
            if outcome.epsilon is not None:
                self.epsilon[member.client] = outcome.epsilon
            if isinstance(outcome, Abstention):
                return outcome.code
            self.bytes_up += codec.size_in_bytes(outcome.parts)
            check_update(outcome, self.state, phase, bound)
        except BadUpdate as error:
            _log.warning("round %d: %s refused: %s", self.number, member.client, error)
            return error.code
        return outcome
