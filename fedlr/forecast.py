"""What a run will cost its clients: ε after every round, of a sweep, on top of earlier runs,
and where a bound ends a client's part in it.

Public numbers alone: nothing is trained and no row is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from fedlr.config import RunConfig
from fedlr.errors import ConfigError
from fedlr.planning import Terms, max_joins
from fedlr.privacy.accounting import Accountant, Cost, cost
from fedlr.privacy.earlier import Earlier
from fedlr.privacy.events import Release
from fedlr.report.plan import ClientForecast, Composed, PathPoint, RunForecast, Stop

PATH_POINTS = 10
"""Rounds after which ε is evaluated: all where there are no more, else evenly spaced ones."""


@dataclass(frozen=True)
class Bounds:
    """What a client's operator allows; None where they say nothing.

    Attributes:
        epsilon_total: Largest ε over everything in the ledger.
        epsilon_per_run: Largest ε of one run.
        epsilon_per_month: Largest ε of thirty days, into which the whole run is taken
            to fall.
        month_start: The first of those days, counted from 1970.
        max_joins: Most rounds in the ledger, over all runs.
        own_ledger: Whether the client keeps one ledger over all runs. ``privacy.epsilon``
            then bounds the run alone, else everything in the ledger.
    """

    epsilon_total: float | None = None
    epsilon_per_run: float | None = None
    epsilon_per_month: float | None = None
    month_start: int = 0
    max_joins: int | None = None
    own_ledger: bool = False


@dataclass(frozen=True)
class Planned:
    """One run to forecast.

    Attributes:
        config: Its configuration.
        terms: Its clients, as `plan_sizes` returns them.
        bounds: What their operators allow, by client.
        earlier: What their ledgers hold already, by client.
    """

    config: RunConfig
    terms: Sequence[Terms]
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    earlier: Mapping[str, Earlier] = field(default_factory=dict)


@dataclass(frozen=True)
class Forecaster:
    """ε of one client as its joins grow, on top of what its ledger holds.

    Attributes:
        join: What one joined round releases.
        delta: δ.
        accountant: The accountant to use.
        spent: Events of earlier runs, of the same unit.
    """

    join: Release
    delta: float
    accountant: Accountant = "prv"
    spent: tuple[Release, ...] = ()

    def after(self, joins: int) -> Cost:
        """Return the cost of ``joins`` ≥ 0 rounds and all that was spent before."""
        planned = replace(self.join, steps=self.join.steps * joins)
        return cost((*self.spent, planned), self.delta, self.accountant)

    def affordable(self, budget: float, most: int) -> int:
        """Return the largest number of joins, ≤ ``most``, whose cost is ≤ ``budget``."""
        if self.after(most).epsilon <= budget:
            return most
        low, high = -1, most  # low fits (or is no number of joins at all), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.after(middle).epsilon > budget else (middle, high)
        return max(low, 0)


def forecast(planned: Planned, cohorts: Sequence[Sequence[int]]) -> RunForecast:
    """Return what a run costs every client, round by round.

    Args:
        planned: The run.
        cohorts: Indices of the clients of every round, a public function of the seed.

    Raises:
        ConfigError: A ledger holds events of another unit of privacy.
    """
    config = planned.config
    federation, privacy = config.federation, config.privacy
    clients = tuple(
        _client_forecast(planned, term, list(accumulate(int(index in one) for one in cohorts)))
        for index, term in enumerate(planned.terms)
    )
    return RunForecast(
        overrides=(),
        data=config.data.label,
        method=config.method.name,
        privacy_mode=privacy.mode,
        unit=privacy.unit,
        accountant=privacy.accountant,
        budget=privacy.epsilon,
        rounds=federation.rounds,
        clients_per_round=federation.clients_per_round,
        expected_batch=config.optimizer.expected_batch,
        epsilon_max=max(client.epsilon_max for client in clients),
        epsilon_scheduled=max(client.epsilon_scheduled for client in clients),
        clients=clients,
    )


def _client_forecast(planned: Planned, term: Terms, joined: Sequence[int]) -> ClientForecast:
    """Forecast one client; ``joined`` is its number of cohorts after each round."""
    config, federation = planned.config, planned.config.federation
    earlier = planned.earlier.get(term.name, Earlier())
    share = federation.clients_per_round / federation.clients
    ahead = forecaster(config, term, earlier.history.events())
    most, by, bound = _most_joins(planned, term, earlier)
    stop = Stop(by=by, bound=bound, joins=most, scheduled_round=_round_of(joined, most))

    def after(joins: float) -> float:
        return ahead.after(min(math.ceil(joins - 1e-9), most)).epsilon

    expected, dearest = expected_joins(federation.rounds, share, most), ahead.after(most)
    return ClientForecast(
        client=term.name,
        declared_size=term.declared_size,
        delta=term.delta,
        sample_rate=term.sample_rate,
        noise_multiplier=term.noise_multiplier,
        steps=config.optimizer.steps,
        max_joins=max_joins(config),
        expected_joins=expected,
        scheduled_joins=min(joined[-1], most),
        affordable_joins=most,
        spent=after(0),
        left=_left(planned, term, earlier),
        epsilon_max=dearest.epsilon,
        epsilon_expected=after(expected),
        epsilon_scheduled=after(joined[-1]),
        accountant=dearest.accountant,
        stop=stop if most < federation.rounds else None,
        path=tuple(
            PathPoint(
                round=number,
                maximum=after(number),
                expected=after(expected_joins(number, share, most)),
                scheduled=after(joined[number - 1]),
            )
            for number in path_rounds(federation.rounds)
        ),
    )


def _most_joins(planned: Planned, term: Terms, earlier: Earlier) -> tuple[int, str, float]:
    """Return how many rounds a client can join, and the bound that ends it: name and value.

    Of several bounds that end it alike, the one that the site meets first.
    """
    config, bounds = planned.config, planned.bounds.get(term.name, Bounds())
    if config.privacy.mode == "none":
        return config.federation.rounds, "", math.inf  # nothing is booked, nothing is bounded
    most = max(0, max_joins(config) - earlier.recovered)
    by, bound = "privacy.max_joins", float(max_joins(config))
    if config.privacy.mode != "dp":
        return most, by, bound  # ε is ∞ at once, and no budget stops a client
    for name, budget, ahead in _budgets(planned, term, earlier):
        joins = ahead.affordable(budget, most)
        if joins < most:
            most, by, bound = joins, name, budget
    total = bounds.max_joins
    if total is not None and total - earlier.joins < most:
        return max(0, total - earlier.joins), "policy.max_joins", float(total)
    return most, by, bound


def _left(planned: Planned, term: Terms, earlier: Earlier) -> float:
    """Return the least that a budget leaves, before the run."""
    budgets = _budgets(planned, term, earlier)
    return max(0.0, min(budget - ahead.after(0).epsilon for _, budget, ahead in budgets))


def _budgets(
    planned: Planned, term: Terms, earlier: Earlier
) -> list[tuple[str, float, Forecaster]]:
    """Return name and size of every bound on ε, and how what counts against it grows."""
    config, bounds = planned.config, planned.bounds.get(term.name, Bounds())
    held = earlier.history.events
    # No run has the name "": what is left was recovered from a witness, and is of every run.
    everything, of_run, month = held(), held(run=""), held(since=bounds.month_start)
    budgets = (
        ("privacy.epsilon", config.privacy.epsilon, of_run if bounds.own_ledger else everything),
        ("policy.epsilon_total", bounds.epsilon_total, everything),
        ("policy.epsilon_per_run", bounds.epsilon_per_run, of_run),
        ("policy.epsilon_per_month", bounds.epsilon_per_month, month),
    )
    return [
        (name, budget, forecaster(config, term, events))
        for name, budget, events in budgets
        if budget is not None
    ]


def _round_of(joined: Sequence[int], most: int) -> int | None:
    """Return the round after which a client has joined ``most`` times, if it would join again."""
    if joined[-1] <= most:
        return None
    return 1 + joined.index(most) if most else 0


def forecaster(config: RunConfig, term: Terms, spent: Sequence[Release] = ()) -> Forecaster:
    """Return the forecaster of one client of a run.

    Raises:
        ConfigError: ``spent`` holds events of another unit of privacy.
    """
    unit = config.privacy.unit
    if other := {event.unit for event in spent} - {unit}:
        raise ConfigError(
            [
                f"privacy.unit = {unit}, but the ledger of {term.name} holds releases of the unit "
                f"{', '.join(sorted(other))}; they cannot be composed, plan with that unit"
            ]
        )
    join = Release(term.noise_multiplier, term.sample_rate, config.optimizer.steps, unit)
    return Forecaster(join, term.delta, config.privacy.accountant, tuple(spent))


def path_rounds(rounds: int) -> tuple[int, ...]:
    """Return at most `PATH_POINTS` rounds from 1 to ``rounds``, both among them, rising.

    Example:
        >>> path_rounds(4), path_rounds(100)
        ((1, 2, 3, 4), (1, 12, 23, 34, 45, 56, 67, 78, 89, 100))
    """
    if rounds <= PATH_POINTS:
        return tuple(range(1, rounds + 1))
    last = PATH_POINTS - 1
    return tuple(1 + round(point * (rounds - 1) / last) for point in range(PATH_POINTS))


def expected_joins(rounds: int, share: float, most: int) -> float:
    """Return E[min(X, most)] for X ~ Binomial(rounds, share): the mean number of joined rounds.

    Example:
        >>> expected_joins(100, 0.5, 100), round(expected_joins(2, 0.5, 1), 6)
        (50.0, 0.75)
    """
    if share >= 1 or most >= rounds:
        return min(rounds * share, float(most))
    # E[min(X, m)] = m - Σ_{j<m} (m - j)·P(X = j)
    short = 0.0
    for joins in range(most):
        ways = math.lgamma(rounds + 1) - math.lgamma(joins + 1) - math.lgamma(rounds - joins + 1)
        chance = ways + joins * math.log(share) + (rounds - joins) * math.log1p(-share)
        short += (most - joins) * math.exp(chance)
    return most - short


def compose_runs(runs: Sequence[Planned], alike: bool) -> Composed:
    """Return what all ``runs`` together cost, each client joining every round that it may.

    Each run counts what it may do where nothing was spent before it, so that no order
    of the runs matters; what ledgers hold already is added once.

    Args:
        runs: The runs.
        alike: Whether a unit is with the same client in every run. If not, any of a
            run's clients may hold it, and each run counts as one release from which
            that of any client follows: the least σ and the largest q of them.

    Raises:
        ConfigError: The runs have different units of privacy.
    """
    check_units([run.config for run in runs])
    delta = min(term.delta for run in runs for term in run.terms)
    by_prv = all(run.config.privacy.accountant == "prv" for run in runs)
    accountant: Accountant = "prv" if by_prv else "rdp"

    def composed(events: Sequence[Release]) -> float:
        return cost(events, delta, accountant).epsilon

    if alike:
        names = [term.name for term in runs[0].terms]
        histories = [
            [*_held(runs, name), *(_whole(run, run.terms[index]) for run in runs)]
            for index, name in enumerate(names)
        ]
        values = dict(zip(names, map(composed, histories), strict=True))
        return Composed(epsilon_max=max(values.values()), delta=delta, by_client=values)
    dominating = [_dominating([_whole(run, term) for term in run.terms]) for run in runs]
    held = [_held(runs, name) for name in dict.fromkeys(n for run in runs for n in run.earlier)]
    return Composed(
        epsilon_max=max(composed([*events, *dominating]) for events in held or [[]]), delta=delta
    )


def _held(runs: Sequence[Planned], name: str) -> list[Release]:
    """Return what the ledgers of a client hold already, each ledger once."""
    ledgers = dict.fromkeys(run.earlier[name] for run in runs if name in run.earlier)
    return [event for ledger in ledgers for event in ledger.history.events()]


def check_units(configs: Sequence[RunConfig]) -> None:
    """Raise ConfigError unless all runs have one unit of privacy."""
    if len({config.privacy.unit for config in configs}) > 1:
        raise ConfigError(
            [
                "privacy.unit takes several values, and ε of an example and of a user cannot be "
                "composed; plan them one by one"
            ]
        )


def _whole(planned: Planned, term: Terms) -> Release:
    """Return everything that one client may release in a run."""
    joins, _, _ = _most_joins(planned, term, Earlier())
    join = forecaster(planned.config, term).join
    return replace(join, steps=join.steps * joins)


def _dominating(events: Sequence[Release]) -> Release:
    """Return a release from whose output that of each of ``events`` follows."""
    return Release(
        min(event.noise_multiplier for event in events),
        max(event.sample_rate for event in events),
        max(event.steps for event in events),
        events[0].unit,
    )
