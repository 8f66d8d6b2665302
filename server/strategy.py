"""The round loop: select → plan → send → check → aggregate → evaluate → journal."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterable
from dataclasses import replace

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlr.adapters import codec
from fedlr.errors import RunError
from fedlr.methods.averaging import can_average
from fedlr.methods.combine import Combiner
from fedlr.methods.method import ClientUpdate, GlobalState, Method, Parts
from fedlr.report.records import RoundRecord
from fedlr.training.jobs import Provenance
from server.backoff import BackOff
from server.cohort import cohort
from server.dispatch import Dispatch, check_ranks
from server.hooks import Hooks
from server.membership import Member, Membership, gather
from server.outcome import Checkpoint, Outcome, StrategyConfig
from server.round import OpenRound
from server.weights import check_weights, weights_of

Measured = tuple[float | None, float | None]
"""(accuracy, loss) of a model; None where nothing is evaluated."""

_log = logging.getLogger("fedlr.server")


class FederatedStrategy(Strategy):
    """A federated low-rank method as a Flower strategy; `run` is its whole life.

    The state is held here, between the calls: `configure_train` opens a round or
    its next phase, `aggregate_train` closes it. Flower's own ``start`` may drive
    them too; one of its "rounds" is then one exchange. An instance is used for one run.

    Guarantees:
        Bit-reproducible: the result depends on seed, state and updates, not on
        the order of nodes or replies; with spare clients, on who answers first. No
        single site can stop a round: what it sends is checked alone, and refused with a
        code. Sites of another provenance never take part.

    Args:
        config: The public settings.
        method: The federated method.
        start: A state before its first round, or where an interrupted run stood.
        provenance: Digests that jobs carry and sites must share.
        hooks: Evaluation, log, display, journal; None has none of them.
        membership: The clients, where they were asked before; None asks them now.

    Raises:
        RunError: ``config.average_rounds`` > 1 for a state that cannot be averaged, or
            cohorts smaller than the method's combiner is defined for.
    """

    def __init__(
        self,
        config: StrategyConfig,
        method: Method,
        start: GlobalState | Checkpoint,
        provenance: Provenance,
        hooks: Hooks | None = None,
        membership: Membership | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self.provenance = provenance
        self._hooks = hooks or Hooks()
        self._at = start if isinstance(start, Checkpoint) else Checkpoint(start)
        if config.average_rounds > 1 and not can_average(self._at.state):
            raise RunError(
                f"average_rounds = {config.average_rounds}, but the parts of {method.name} cannot "
                "be averaged; set it to 1"
            )
        self._smallest = smallest_cohort(config, method)
        self._dispatch = Dispatch(method, config.run, provenance, config.round_timeout_s)
        self._membership: Membership | None = None
        self._found = membership
        self._open: OpenRound | None = None
        self._stopped: str | None = None
        self._back_off = BackOff(config.patience.longest_pause)
        self._attempts = 0
        # An interrupted round: who was asked has paid, or may have.
        self._paid = self._hooks.journal.asked(self._at.state.round)
        self._at = replace(self._at, unheard=self._at.unheard | self._paid)
        self._measured: tuple[GlobalState, Measured] | None = None

    def run(self, grid: Grid) -> Outcome:
        """Run until the last round, or until too few clients are left.

        Args:
            grid: Connects to the clients.

        Returns:
            The result; a run that stopped early says why.

        Raises:
            RunError: The federation cannot start (see `server.membership.gather`),
                or a round cannot be recorded.
        """
        try:
            while messages := self.configure_train(0, ArrayRecord(), ConfigRecord(), grid):
                replies = grid.send_and_receive(messages, timeout=self.config.round_timeout_s)
                self.aggregate_train(0, replies)
            return self._outcome(self._connected(grid))
        finally:
            self._hooks.progress.finish()

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the run stands after the last closed round."""
        return self._at

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the jobs of the next exchange; none once the run has ended.

        Args:
            server_round: Ignored: the state knows its round.
            arrays: Ignored, likewise.
            config: Ignored: jobs carry all that a site needs.
            grid: Asked for the clients before the first round.
        """
        membership = self._connected(grid)
        if self._open is None:
            if self._stopped is not None or self._at.state.round >= self.config.rounds:
                return []
            self._open = self._select(membership.members)
        return self._send(self._open)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and aggregate the replies of a phase; close the round after its last one.

        Where clients lack the basis that their job relies on, the phase stays open and
        `configure_train` sends it to them.

        Args:
            server_round: Ignored: the state knows its round.
            replies: The sites' answers, read one after the other.

        Returns:
            The parts of the new state and the number of accepted updates;
            (None, None) where the model did not change.
        """
        opened = self._open
        if opened is None:
            return None, None
        finished = self._hooks.progress.client_finished
        opened.receive(replies, self.config.update_norm_bound, finished)
        if opened.lacking:
            return None, None
        updates = opened.close_phase()
        weights = weights_of(opened.standing, self.config.weights)
        counted = sum(weight > 0 for weight in weights)
        if len(updates) < self.config.min_clients or counted < self._smallest:
            self._abandon(opened)
            return None, None
        before = time.monotonic()
        opened.state = self.method.aggregate(opened.state, updates, weights)
        opened.server_s += time.monotonic() - before
        if opened.state.phase == 0:
            self._complete(opened, updates)
        arrays = codec.encode(opened.state.parts)
        return (
            ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            MetricRecord({"accepted": len(updates)}),
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return nothing: a measurement on private data would be a release of its own."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Return nothing: no site is asked to evaluate."""

    def summary(self) -> None:
        """Log the settings."""
        _log.info("%s: %s", self.method.name, self.config)

    def _connected(self, grid: Grid) -> Membership:
        """Return the clients; the first call finds them and measures the start."""
        if self._membership is None:
            self._membership = self._found or gather(grid, self.config, self.provenance)
            check_ranks(self._membership.members, self.method, self._at.state.layout)
            check_weights(self._membership.members, self.config.weights)
            count = len(self._membership.members)
            if count < self._smallest:
                raise RunError(
                    f"{count} clients were admitted, but the combiner of {self.method.name} needs "
                    f"{self._smallest} updates a round; take another one, or start more clients: "
                    f"{' '.join(self._membership.notices)}"
                )
            self._hooks.progress.start(self.config.rounds, f"{self.method.name}, {count} clients")
            if self._at.state.round == 0:
                accuracy, _ = self._measure(self._at.state)
                self._at = replace(self._at, accuracy_start=accuracy)
        return self._membership

    @property
    def _needed(self) -> int:
        """Fewest updates that close a round."""
        return max(self.config.min_clients, self._smallest)

    def _select(self, members: tuple[Member, ...]) -> OpenRound:
        """Draw the cohort of the next round; clients that fail only where others are too few."""
        state, count, spare = self._at.state, len(members), self.config.patience.spare_clients
        failing, by_index = self._back_off.paused(), {member.index: member for member in members}
        paused = {member.index for member in members if member.client in failing}
        paid = {member.index for member in members if member.client in self._paid}
        wanted = min(self.config.clients_per_round, count)
        asked = min(wanted + spare, max(count - len(paused), self._needed))
        drawn = tuple(
            by_index[index]
            for index in cohort(
                self.config.seed, state.round, by_index, min(asked, count), paid, paused
            )
        )
        opened = OpenRound(
            state, drawn, drawn, wanted=wanted if spare else None, unheard=set(self._at.unheard)
        )
        self._hooks.progress.round_started(opened.number, [member.client for member in drawn])
        return opened

    def _send(self, opened: OpenRound) -> list[Message]:
        """Build the jobs of the current phase, their nonces journaled first.

        Clients that lacked the basis get the same job again, under the same nonce.
        """
        state = opened.state
        if opened.lacking:
            again = {order.member: order.nonce for order in opened.lacking}
            return opened.sent(self._dispatch.orders(state, again, {}))
        fresh = {member.client: secrets.token_hex(16) for member in opened.standing}
        nonces = {**fresh, **self._hooks.journal.sending(state.round, state.phase, fresh)}
        by_member = {member: nonces[member.client] for member in opened.standing}
        holders = {**self._at.holders, **opened.holders}
        return opened.sent(self._dispatch.orders(state, by_member, holders))

    def _complete(self, opened: OpenRound, updates: list[ClientUpdate]) -> None:
        """Close a round that changed the model."""
        state, at = opened.state, self._at
        self._attempts, self._paid = 0, frozenset()
        due = state.round % self.config.evaluate_every == 0 or state.round == self.config.rounds
        accuracy, loss = self._measure(state) if due else (None, None)
        if self._hooks.recorder is not None:
            self._hooks.recorder.record(state)
        joins, steps = dict(at.joins), dict(at.steps)
        for client, count in opened.steps.items():
            joins[client] = joins.get(client, 0) + 1
            steps[client] = steps.get(client, 0) + count
        self._at = replace(
            at,
            state=state,
            recent=(*at.recent, state)[-self.config.average_rounds :],
            joins=joins,
            steps=steps,
            epsilon={**at.epsilon, **opened.epsilon},
            unheard=frozenset(opened.unheard),
            holders={**at.holders, **opened.holders},
        )
        self._record(opened, state.round, len(updates), (accuracy, loss))
        self._hooks.journal.finished(self._at)

    def _abandon(self, opened: OpenRound) -> None:
        """Close a round that too few clients joined: the model stays, it is tried again, or the
        run ends.
        """
        number, accepted = self._at.state.round + 1, len(opened.standing)
        patience = self.config.patience
        self._attempts += 1
        self._paid = frozenset(member.client for member in opened.standing)
        again = self._attempts <= patience.retries
        reason = (
            f"round {number}: {accepted} of {len(opened.cohort)} clients sent an update that was "
            f"accepted, at least {self._needed} with a positive weight are needed "
            f"(refused: {opened.refusal_counts()})"
        )
        if not again:
            tries = "" if self._attempts == 1 else f"; it was tried {self._attempts} times"
            self._stopped = reason + tries
        # Who may have paid keeps the nonce: where it did, the answer is there and costs nothing.
        refused = {refusal.client for refusal in opened.refused} - opened.doubtful
        opened.abandon()
        self._at = replace(
            self._at,
            epsilon={**self._at.epsilon, **opened.epsilon},
            unheard=frozenset(opened.unheard),
            holders={**self._at.holders, **opened.holders},
        )
        self._record(opened, number, 0, (None, None))
        # First what they spent: a nonce that is kept for too long costs nothing.
        self._hooks.journal.finished(self._at)
        self._hooks.journal.abandoned(refused)
        if again:
            _log.warning("%s; it is tried again in %g s", reason, patience.retry_wait_s)
            self._hooks.wait(patience.retry_wait_s)

    def _record(self, opened: OpenRound, number: int, accepted: int, measured: Measured) -> None:
        """Log and show a closed round: bytes and seconds of its earlier tries are in its own."""
        epsilon = self._at.epsilon_bound
        before = [old for old in self._at.records if old.round == number]  # tries of this round
        record = RoundRecord(
            round=number,
            cohort=tuple(member.client for member in opened.cohort),
            accepted=accepted,
            bytes_down=opened.bytes_down + sum(old.bytes_down for old in before),
            bytes_up=opened.bytes_up + sum(old.bytes_up for old in before),
            wall_s=time.monotonic() - opened.began + sum(old.wall_s for old in before),
            server_s=opened.server_s + sum(old.server_s for old in before),
            steps=sum(opened.steps.values()),
            refused=tuple(opened.refused),
            accuracy=measured[0],
            loss=measured[1],
            epsilon_max=max(epsilon.values(), default=None),
            epsilon_by_client=epsilon,
        )
        self._open = None
        self._back_off.closed(opened.answering, opened.failing)
        earlier = (old for old in self._at.records if old.round < number)
        self._at = replace(self._at, records=(*earlier, record))
        if self._hooks.log is not None:
            self._hooks.log.append(record)
        self._hooks.progress.round_finished(record)

    def _measure(self, state: GlobalState) -> Measured:
        """Evaluate a state, once."""
        if self._measured is None or self._measured[0] is not state:
            self._measured = (state, self._evaluate(state.parts))
        return self._measured[1]

    def _evaluate(self, parts: Parts) -> Measured:
        if self._hooks.evaluate is None:
            return None, None
        accuracy, loss = self._hooks.evaluate(parts)
        # A model whose loss is not a number has diverged; records hold ∞ for that.
        return accuracy, math.inf if math.isnan(loss) else loss

    def _outcome(self, membership: Membership) -> Outcome:
        at = self._at
        if len(at.recent) > 1:
            parts = at.parts
            accuracy, loss = self._evaluate(parts)
        else:
            parts = at.state.parts
            accuracy, loss = self._measure(at.state)
        clients = [member.client for member in membership.members]
        return Outcome(
            state=at.state,
            parts=parts,
            records=at.records,
            accuracy_start=at.accuracy_start,
            accuracy=accuracy,
            loss=loss,
            stopped_reason=self._stopped,
            joins=dict.fromkeys(clients, 0) | dict(at.joins),
            steps=dict.fromkeys(clients, 0) | dict(at.steps),
            epsilon=at.epsilon,
            unheard=at.unheard,
            statuses={member.client: member.status for member in membership.members},
            notices=membership.notices,
        )


def smallest_cohort(config: StrategyConfig, method: Method) -> int:
    """Return the fewest updates of positive weight that the method can aggregate, ≥ 1.

    Raises:
        RunError: More than ``config.clients_per_round``: no round could be completed.
    """
    # A wrapper combines with what it wraps (`fedlr.methods.refresh`).
    combine: Combiner | None = getattr(getattr(method, "inner", method), "combine", None)
    if combine is None:
        return 1
    if combine.minimum > config.clients_per_round:
        raise RunError(
            f"combine.kind = {combine.name} needs {combine.minimum} updates a round, but "
            f"federation.clients_per_round = {config.clients_per_round}; raise it, or take "
            "another combiner"
        )
    return combine.minimum
