"""What a run will cost its clients: ε after every round, of a sweep, on top of earlier runs.

Public numbers alone: nothing is trained and no row is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedlr.config import RunConfig
from fedlr.errors import ConfigError, LedgerError
from fedlr.planning import Terms, max_joins
from fedlr.privacy.accounting import Accountant, Cost, cost
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report.plan import ClientForecast, Composed, PathPoint, RunForecast

PATH_POINTS = 10
"""Rounds after which ε is evaluated: all where there are no more, else evenly spaced ones."""

Spent = Mapping[str, Sequence[Release]]


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


def forecast(
    config: RunConfig,
    terms: Sequence[Terms],
    cohorts: Sequence[Sequence[int]],
    spent: Spent | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RunForecast:
    """Return what ``config`` costs every client, round by round.

    Args:
        config: The run.
        terms: Its clients, as `plan_sizes` returns them.
        cohorts: Indices of the clients of every round, a public function of the seed.
        spent: Events that each client's ledger holds already; None is nothing.
        say: Told what is being done.

    Raises:
        ConfigError: A ledger holds events of another unit of privacy.
    """
    federation, privacy = config.federation, config.privacy
    if len(terms) > 1 or federation.rounds > 1:
        say(f"composing ε over {federation.rounds} rounds")
    clients = tuple(
        _client_forecast(
            config, term, _joined(cohorts, index), tuple((spent or {}).get(term.name, ()))
        )
        for index, term in enumerate(terms)
    )
    return RunForecast(
        overrides=(),
        data=config.data.name or config.data.path or config.data.kind,
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


def _client_forecast(
    config: RunConfig, term: Terms, joined: Sequence[int], spent: tuple[Release, ...]
) -> ClientForecast:
    """Forecast one client; ``joined`` is its number of cohorts after each round."""
    federation, budget = config.federation, config.privacy.epsilon
    share = federation.clients_per_round / federation.clients
    ahead = forecaster(config, term, spent)
    limit = max_joins(config)
    # Without noise ε is ∞ at once, and no budget stops a client.
    most = ahead.affordable(budget, limit) if config.privacy.mode == "dp" else limit

    def after(joins: float) -> float:
        return ahead.after(min(math.ceil(joins - 1e-9), most)).epsilon

    before, expected = ahead.after(0).epsilon, expected_joins(federation.rounds, share, limit)
    dearest = ahead.after(most)
    return ClientForecast(
        client=term.name,
        declared_size=term.declared_size,
        delta=term.delta,
        sample_rate=term.sample_rate,
        noise_multiplier=term.noise_multiplier,
        steps=config.optimizer.steps,
        max_joins=limit,
        expected_joins=expected,
        scheduled_joins=min(joined[-1], limit),
        affordable_joins=most,
        spent=before,
        left=max(0.0, budget - before),
        epsilon_max=dearest.epsilon,
        epsilon_expected=after(expected),
        epsilon_scheduled=after(joined[-1]),
        accountant=dearest.accountant,
        path=tuple(
            PathPoint(
                round=number,
                maximum=after(number),
                expected=after(expected_joins(number, share, limit)),
                scheduled=after(joined[number - 1]),
            )
            for number in path_rounds(federation.rounds)
        ),
    )


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


def _joined(cohorts: Sequence[Sequence[int]], client: int) -> list[int]:
    """Return how many of the first 1, 2, … cohorts a client is in."""
    counts, total = [], 0
    for members in cohorts:
        total += client in members
        counts.append(total)
    return counts


def compose_runs(
    runs: Sequence[tuple[RunConfig, Sequence[Terms]]], alike: bool, spent: Spent | None = None
) -> Composed:
    """Return what all ``runs`` together cost, each client joining every round that it may.

    Args:
        runs: Each configuration with its clients.
        alike: Whether a unit is with the same client in every run. If not, any of a
            run's clients may hold it, and each run counts as one release from which
            that of any client follows: the least σ and the largest q of them.
        spent: As in `forecast`.

    Raises:
        ConfigError: The runs have different units of privacy.
    """
    check_units([config for config, _ in runs])
    delta = min(term.delta for _, terms in runs for term in terms)
    by_prv = all(config.privacy.accountant == "prv" for config, _ in runs)
    accountant: Accountant = "prv" if by_prv else "rdp"
    earlier = spent or {}

    def composed(events: Sequence[Release]) -> float:
        return cost(events, delta, accountant).epsilon

    if alike:
        names = [term.name for term in runs[0][1]]
        histories = [
            [*earlier.get(name, ()), *(_whole(config, terms[index]) for config, terms in runs)]
            for index, name in enumerate(names)
        ]
        values = dict(zip(names, map(composed, histories), strict=True))
        return Composed(epsilon_max=max(values.values()), delta=delta, by_client=values)
    dominating = [_dominating([_whole(config, term) for term in terms]) for config, terms in runs]
    held = [tuple(events) for events in earlier.values()] or [()]
    dearest = max(composed([*events, *dominating]) for events in held)
    return Composed(epsilon_max=dearest, delta=delta)


def check_units(configs: Sequence[RunConfig]) -> None:
    """Raise ConfigError unless all runs have one unit of privacy."""
    if len({config.privacy.unit for config in configs}) > 1:
        raise ConfigError(
            [
                "privacy.unit takes several values, and ε of an example and of a user cannot be "
                "composed; plan them one by one"
            ]
        )


def _whole(config: RunConfig, term: Terms) -> Release:
    """Return everything that one client may release in a run."""
    steps = config.optimizer.steps * max_joins(config)
    return Release(term.noise_multiplier, term.sample_rate, steps, config.privacy.unit)


def _dominating(events: Sequence[Release]) -> Release:
    """Return a release from whose output that of each of ``events`` follows."""
    return Release(
        min(event.noise_multiplier for event in events),
        max(event.sample_rate for event in events),
        max(event.steps for event in events),
        events[0].unit,
    )


def read_ledgers(folder: Path, names: Sequence[str]) -> dict[str, tuple[Release, ...]]:
    """Return what the ledgers of earlier runs hold, by client.

    Args:
        folder: A folder of ``<client>.sqlite``, or a run folder with one in ``ledgers``.
        names: The clients of the plan.

    Raises:
        LedgerError: There is none for any of ``names``, or one cannot be read.
    """
    inner = folder / "ledgers"
    place = inner if inner.is_dir() else folder
    found = {name: place / f"{name}.sqlite" for name in names}
    present = {name: path for name, path in found.items() if path.is_file()}
    if not present:
        raise LedgerError(
            f"{str(folder)!r} holds no ledger of any client; give a run folder, or one with files "
            f"such as {names[0]}.sqlite"
        )
    return {name: _spent(path) for name, path in present.items()}


def _spent(path: Path) -> tuple[Release, ...]:
    ledger = SqliteLedger(path)
    try:
        return ledger.spent()
    finally:
        ledger.close()
