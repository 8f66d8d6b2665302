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
from fedlr.methods.method import ClientUpdate, GlobalState
from fedlr.report.records import Refusal
from fedlr.training.jobs import Abstention
from server.checking import check_claims, check_update
from server.dispatch import Order
from server.membership import Member
from server.messages import read_outcome

FAILED, NO_ANSWER, QUORUM, LATE = "failed", "no_answer", "quorum", "late"
"""Codes the server itself refuses with: an error reply, no reply in time, a valid update
of a round that too few clients joined, and no reply before enough others had come."""

_NO_BASE = "no_base"
"""Code of a site that lacks the basis which a job relies on (`fedlr.training.jobs`)."""

_MAY_HAVE_PAID = ("failed", "ledger")
"""Codes that a site may give after it has booked a job, without an ε where it cannot read it."""

_log = logging.getLogger("fedlr.server")


@dataclass
class OpenRound:
    """One round in progress.

    Attributes:
        state: The state the current phase trains from.
        cohort: Clients drawn for the round.
        standing: Those whose updates of all phases so far were accepted; only
            they are asked in the next phase.
        wanted: Updates after which a phase waits for no more; None waits for all.
        asked: What was sent last, and not answered yet.
        lacking: Orders of the phase that are to be sent again, with the basis: their
            clients answered that they have not got it.
        holders: Digest of the basis by client, as this round's answers tell; empty text
            for a client that lacks it.
        refused: Clients that dropped out, each with its code.
        steps: Local steps of accepted updates by client.
        epsilon: ε reported in this round by client, refused updates included:
            the site has spent it.
        unheard: Clients that may have spent more than the ε they reported last.
        bytes_down: Payload sent so far, bytes.
        bytes_up: Payload of the readable updates so far, bytes.
        server_s: Time spent aggregating, seconds.
        began: Monotonic clock at the start, seconds.
    """

    state: GlobalState
    cohort: tuple[Member, ...]
    standing: tuple[Member, ...]
    wanted: int | None = None
    asked: list[Order] = field(default_factory=list)
    lacking: list[Order] = field(default_factory=list)
    holders: dict[str, str] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    epsilon: dict[str, float] = field(default_factory=dict)
    unheard: set[str] = field(default_factory=set)
    bytes_down: int = 0
    bytes_up: int = 0
    server_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    _accepted: dict[Member, ClientUpdate] = field(default_factory=dict)
    _codes: dict[Member, str] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Number of the round as people count, from 1."""
        return self.state.round + 1

    def sent(self, orders: list[Order]) -> list[Message]:
        """Note what goes out now, and return it."""
        self.asked, self.lacking = orders, []
        self.bytes_down += sum(order.size for order in orders)
        return [order.message for order in orders]

    def receive(
        self,
        replies: Iterable[Message],
        bound: float | None,
        answered: Callable[[str, int], None],
    ) -> None:
        """Sort replies into accepted updates, refusals and `lacking`.

        Args:
            replies: To what was `sent` last, in any order; strangers and second replies
                are ignored.
            bound: As in `server.checking.check_update`.
            answered: Told (client, steps) as each reply is read.
        """
        open_orders = {order.message.metadata.message_id: order for order in self.asked}
        for reply in replies:
            order = open_orders.pop(reply.metadata.reply_to_message_id, None)
            if order is None:
                continue
            judged = self._judge(reply, order, bound)
            if judged == _NO_BASE and not order.whole:
                self.lacking.append(order)
                continue
            if isinstance(judged, str):
                self._codes[order.member] = judged
            else:
                self._accepted[order.member] = judged
            answered(order.member.client, 0 if isinstance(judged, str) else judged.steps)
            if self._enough:
                break
        silent = LATE if self._enough else NO_ANSWER
        unanswered = [*open_orders.values(), *(self.lacking if self._enough else ())]
        self.lacking = [] if self._enough else self.lacking
        self._codes |= {order.member: silent for order in unanswered}
        training = (order for order in open_orders.values() if order.phase.train)
        self.unheard |= {order.member.client for order in training}

    @property
    def _enough(self) -> bool:
        return self.wanted is not None and len(self._accepted) >= self.wanted

    @property
    def answering(self) -> set[str]:
        """Clients of the cohort that gave what they were asked for; late is neither that nor a
        failure.
        """
        return {member.client for member in self.cohort} - self._refused_with(LATE) - self.failing

    @property
    def failing(self) -> set[str]:
        """Clients that did not give what they were asked for, and could have."""
        return {refusal.client for refusal in self.refused if refusal.code not in (QUORUM, LATE)}

    @property
    def doubtful(self) -> set[str]:
        """Clients that may have paid under their nonce, and whose answer never came."""
        return self._refused_with(NO_ANSWER, LATE, *_MAY_HAVE_PAID)

    def _refused_with(self, *codes: str) -> set[str]:
        return {refusal.client for refusal in self.refused if refusal.code in codes}

    def close_phase(self) -> list[ClientUpdate]:
        """Return the accepted updates of the phase in client order; refuse the others."""
        accepted, codes = self._accepted, self._codes
        self._accepted, self._codes = {}, {}
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

    def _hear(self, outcome: ClientUpdate | Abstention, client: str, unheard_before: bool) -> None:
        """Note the ε of an answer, which is of everything in the ledger of its site."""
        free = isinstance(outcome, Abstention) and outcome.code not in _MAY_HAVE_PAID
        if outcome.epsilon is not None:
            self.epsilon[client] = outcome.epsilon
        if outcome.epsilon is not None or (free and not unheard_before):
            self.unheard.discard(client)

    def _judge(self, reply: Message, order: Order, bound: float | None) -> ClientUpdate | str:
        """Return the update if it is acceptable, otherwise the code of its refusal."""
        client = order.member.client
        unheard = client in self.unheard
        if order.phase.train:  # what projects a release costs nothing, and tells no ε
            self.unheard.add(client)
        if reply.has_error():
            return FAILED
        try:
            outcome = read_outcome(reply)
            check_claims(outcome, client)
            self._hear(outcome, client, unheard)
            if order.basis is not None:
                lacks = isinstance(outcome, Abstention) and outcome.code == _NO_BASE
                self.holders[client] = "" if lacks else order.basis
            if isinstance(outcome, Abstention):
                return outcome.code
            self.bytes_up += codec.size_in_bytes(outcome.parts)
            check_update(outcome, self.state, order.phase, bound)
        except BadUpdate as error:
            _log.warning("round %d: %s refused: %s", self.number, client, error)
            return error.code
        return outcome
