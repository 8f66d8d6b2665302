"""Settings, checkpoint and result of a run: frozen values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedlr import checks
from fedlr.methods.averaging import average
from fedlr.methods.method import GlobalState, Parts
from fedlr.report.records import RoundRecord
from fedlr.training.jobs import SiteStatus


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How a run bears with clients that fail; the default bears with nothing.

    Attributes:
        spare_clients: Clients asked beyond ``clients_per_round``: a phase goes on as soon as
            that many have answered, and the answers of the others come too late (and are paid
            for at their sites), ≥ 0.
        retries: Times that a round which too few clients joined is tried again, ≥ 0. Who has
            paid for it gives the same update and pays nothing.
        retry_wait_s: Seconds before each of those, ≥ 0.
        longest_pause: Most rounds in a row that a failing client is left out of
            (`server.backoff`); 0 asks it again in the next one.

    Raises:
        ValueError: A value outside its range.
    """

    spare_clients: int = 0
    retries: int = 0
    retry_wait_s: float = 0.0
    longest_pause: int = 0

    def __post_init__(self) -> None:
        for name in ("spare_clients", "retries", "longest_pause"):
            checks.at_least(name, getattr(self, name), 0)
        checks.non_negative("retry_wait_s", self.retry_wait_s)


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """The public settings of a federation.

    Attributes:
        run: Identifier of the run; jobs carry it and ledgers are keyed by it.
        seed: Public seed; decides the cohorts here.
        rounds: Total number of rounds, those before a resume included, ≥ 1.
        clients: Clients that must answer before the first round, ≥ 1.
        clients_per_round: Cohort size, in [1, ``clients``]; all, where fewer
            clients than that are admitted.
        min_clients: Fewer accepted updates than this end the run, or have the round tried
            again, in [1, ``clients_per_round``].
        evaluate_every: Rounds between two evaluations, ≥ 1; start and end are
            always evaluated.
        average_rounds: The result is the mean of this many last states, ≥ 1.
        weights: ``uniform``; ``declared``: by the size each site declares;
            ``inverse_variance``: by 1/σ² of the noise each site announces
            (`server.weights`). Both take the sites at their word.
        update_norm_bound: Largest Frobenius norm of the change of one array,
            > 0; None sets no bound.
        round_timeout_s: Seconds to wait for a phase's replies, > 0; None waits
            without end. A real network needs one.
        start_timeout_s: Seconds to wait for ``clients`` answers before the
            first round, > 0.
        patience: How it bears with clients that fail.

    Raises:
        ValueError: A value outside its range.
    """

    run: str
    seed: int
    rounds: int
    clients: int
    clients_per_round: int
    min_clients: int = 1
    evaluate_every: int = 1
    average_rounds: int = 1
    weights: Literal["uniform", "declared", "inverse_variance"] = "uniform"
    update_norm_bound: float | None = None
    round_timeout_s: float | None = None
    start_timeout_s: float = 60.0
    patience: Patience = Patience()

    def __post_init__(self) -> None:
        for name in ("rounds", "clients", "clients_per_round", "min_clients"):
            checks.at_least(name, getattr(self, name), 1)
        for name in ("evaluate_every", "average_rounds"):
            checks.at_least(name, getattr(self, name), 1)
        checks.in_range("clients_per_round", self.clients_per_round, 1, self.clients)
        checks.in_range("min_clients", self.min_clients, 1, self.clients_per_round)
        checks.one_of("weights", self.weights, ("uniform", "declared", "inverse_variance"))
        checks.positive("start_timeout_s", self.start_timeout_s)
        for name in ("update_norm_bound", "round_timeout_s"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands between two rounds; continuing from it repeats nothing.

    Attributes:
        state: The server's model, at the start of a round.
        recent: The last ``average_rounds`` states, the newest last; empty
            before the first round.
        records: One record per round, an abandoned last one included.
        joins: Rounds in which a client's update was aggregated, by client.
        steps: Local steps over those rounds, by client.
        epsilon: Latest ε that each client reported; empty where privacy is off.
        unheard: Clients that were asked to train since, and whose answer did not come: they
            may have spent more.
        accuracy_start: Accuracy before round 0; None if not evaluated.
        holders: Digest of the basis that each client is believed to hold
            (`fedlr.training.downlink`). A belief: where it is wrong, the client says so
            and is sent the basis, which costs an exchange and changes no result.

    Raises:
        ValueError: ``state`` is inside a round.
    """

    state: GlobalState
    recent: tuple[GlobalState, ...] = ()
    records: tuple[RoundRecord, ...] = ()
    joins: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    epsilon: Mapping[str, float] = field(default_factory=dict)
    unheard: frozenset[str] = frozenset()
    accuracy_start: float | None = None
    holders: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state.phase != 0:
            raise ValueError(f"state.phase = {self.state.phase} must be 0; keep whole rounds")

    @property
    def epsilon_bound(self) -> dict[str, float]:
        """`epsilon`, and ∞ for the unheard: no ε may look smaller than it is. Empty where nobody
        reports one, as without privacy.
        """
        unknown = dict.fromkeys(sorted(self.unheard), math.inf)
        return {**self.epsilon, **unknown} if self.epsilon else {}

    @property
    def parts(self) -> Parts:
        """The result so far: the state's parts, or the mean of the last states."""
        return average(self.recent) if len(self.recent) > 1 else self.state.parts


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind.

    Attributes:
        state: The state after the last completed round.
        parts: The result: ``state.parts``, or the mean of the last states.
        records: One record per round, an abandoned last one included.
        accuracy_start: Accuracy before round 0, [0, 1]; None if not evaluated.
        accuracy: Accuracy of ``parts``; None without an evaluation.
        loss: Mean loss of ``parts``; None without an evaluation.
        stopped_reason: Why the run ended before its last round; None if it did not.
        joins: Rounds in which a client's update was aggregated; every admitted
            client has an entry.
        steps: Local steps over those rounds, likewise.
        epsilon: Latest ε of each client that reported one.
        unheard: As in `Checkpoint`.
        statuses: What each admitted client announced, in client order.
        notices: Sentences a reader of the numbers must know.
    """

    state: GlobalState
    parts: Parts
    records: tuple[RoundRecord, ...]
    accuracy_start: float | None
    accuracy: float | None
    loss: float | None
    stopped_reason: str | None
    joins: Mapping[str, int]
    steps: Mapping[str, int]
    epsilon: Mapping[str, float]
    statuses: Mapping[str, SiteStatus]
    unheard: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()
