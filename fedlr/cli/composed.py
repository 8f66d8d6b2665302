"""What all runs of a sweep spent together, by their ledgers: the price of choosing among them.

A choice by results looks at every run, so it costs what they released together. What is
counted is what was booked, by finished and unfinished runs alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.errors import FedlrError, LedgerError
from fedlr.report.chosen import left
from fedlr.report.facts import FACTS_FILE, RunFacts, read_facts
from fedlr.report.page.sweep import SweepCost
from fedlr.report.plan import listed
from fedlr.report.sweep import Cell, Sweep, strays
from fedlr.report.traces import LEDGERS, trace

if TYPE_CHECKING:
    from fedlr.config import RunConfig
    from fedlr.privacy.accounting import Accountant
    from fedlr.privacy.events import Release


@dataclass(frozen=True)
class Spent:
    """What one run released.

    Attributes:
        config: Its configuration.
        facts: What it was made of.
        events: By client; empty without privacy.
        shared: Clients whose ledger is their operator's, over all runs.
    """

    config: RunConfig
    facts: RunFacts
    events: Mapping[str, tuple[Release, ...]]
    shared: tuple[str, ...] = ()


def composed(sweep: Sweep) -> SweepCost:
    """Return what all runs of a sweep spent together.

    Clients of one name hold the same rows in all runs only where data, seed, partition and
    unit agree: each client is composed by itself then. Where they do not, any client of a
    run may hold a given unit, and each run counts as one release from which that of any of
    its clients follows: the least σ, the largest q, the most steps.

    Args:
        sweep: As `read_sweep` returns it. Runs that have not begun spent nothing. Where a
            run cannot be read, or a cell is not there any more, ε is not known.
    """
    begun = [cell for cell in sweep.cells if (cell.run / FACTS_FILE).exists()]
    runs, unread = list[Spent](), list[str]()
    for cell in begun:
        try:
            runs.append(read_spent(cell))
        except (FedlrError, ValueError) as error:
            reason = " ".join(str(error).split())
            unread.append(f"what {cell.facts.cell} spent cannot be read here: {reason}")
    unread += [*_without_facts(sweep), *strays(sweep)]
    private = [run for run in runs if run.config.privacy.mode == "dp"]
    units = sorted({run.config.privacy.unit for run in private})
    if len(units) > 1:
        unread.append(f"ε of the units {' and '.join(units)} cannot be composed")
    notices = (*unread, *_about(sweep, private))
    # Of a run that cannot be read, not even its privacy is believed.
    if unread:
        return SweepCost(runs=len(begun), epsilon_max=None, notices=notices)
    if not private:
        return SweepCost(runs=len(begun), epsilon_max=math.inf if runs else 0.0, notices=notices)
    by_client, largest, delta = _compose(private)
    if len(private) == len(runs):
        return SweepCost(
            runs=len(begun),
            epsilon_max=largest,
            delta=delta,
            by_client=by_client,
            notices=notices,
        )
    return SweepCost(
        runs=len(begun),
        epsilon_max=math.inf,
        delta=delta,
        private_epsilon=largest,
        notices=notices,
    )


def _without_facts(sweep: Sweep) -> list[str]:
    """Say which cells have begun, as something in their run tells, and have lost their facts."""
    lost = [cell for cell in sweep.cells if not (cell.run / FACTS_FILE).exists()]
    return [
        f"what {cell.facts.cell} spent cannot be read here: its run has {found} and no "
        f"{FACTS_FILE}; bring {FACTS_FILE} back from a copy"
        for cell in lost
        if (found := trace(cell.run)) is not None
    ]


def read_spent(cell: Cell) -> Spent:
    """Return what the run of a cell released, by its ledgers.

    Raises:
        FedlrError: Its configuration, its facts or one of its ledgers cannot be read.
    """
    from fedlr.cli.cells import config_of
    from fedlr.privacy.earlier import read_ledger

    config, facts = config_of(cell.facts), read_facts(cell.run)
    if config.privacy.mode != "dp":
        return Spent(config, facts, {})
    places = _ledgers(config, facts, cell.run)
    events = {
        client: read_ledger(path, source).history.events(run=facts.run)
        for client, (path, source) in places.items()
    }
    own = cell.run / LEDGERS
    shared = tuple(client for client, (path, _) in places.items() if path.parent != own)
    return Spent(config, facts, events, shared)


def _ledgers(config: RunConfig, facts: RunFacts, run: Path) -> dict[str, tuple[Path, str | None]]:
    """Return file and source of each client's ledger; LedgerError where nothing names it."""
    from fedlr.orders import read_policies

    own = run / LEDGERS
    sources = facts.sources or tuple(f"{facts.run}/{one.client}" for one in facts.clients)
    policies = read_policies(config)
    found: dict[str, tuple[Path, str | None]] = {}
    for one, source in zip(facts.clients, sources, strict=True):
        client, limits = one.client, policies.get(one.client)
        if source == f"{facts.run}/{client}":
            found[client] = (own / f"{client}.sqlite", source)
        elif limits is not None and limits.ledger is not None and limits.source_id == source:
            found[client] = (limits.ledger, source)
        else:
            raise LedgerError(
                f"no policy names the ledger of {client} any more, of the source {source!r}; bring "
                "privacy.policies back"
            )
    return found


def _compose(runs: Sequence[Spent]) -> tuple[dict[str, float], float, float]:
    """Return ε by client (empty where they hold different rows), the largest, and its δ."""
    from fedlr.privacy.accounting import epsilon

    delta = min(client.delta for run in runs for client in run.facts.clients)
    by_prv = all(run.config.privacy.accountant == "prv" for run in runs)
    accountant: Accountant = "prv" if by_prv else "rdp"
    if not _alike(runs):
        bound = [event for run in runs for event in _dominating(run)]
        return {}, epsilon(bound, delta, accountant), delta
    names = [client.client for client in runs[0].facts.clients]
    values = {
        name: epsilon([event for run in runs for event in run.events[name]], delta, accountant)
        for name in names
    }
    return values, max(values.values()), delta


def _alike(runs: Sequence[Spent]) -> bool:
    """Return whether a unit is with the same client in every run."""
    return len({_dealt(run) for run in runs}) <= 1


def _dealt(run: Spent) -> object:
    """Return what decides which client holds which row."""
    config = run.config
    units = (config.federation.clients, config.privacy.unit)
    return (run.facts.data_sha256, config.seed, config.data, config.partition, *units)


def _dominating(run: Spent) -> list[Release]:
    """Return at most one release from whose output that of each client of the run follows."""
    from fedlr.privacy.events import Release

    histories = [events for events in run.events.values() if events]
    every = [event for events in histories for event in events]
    if not every:
        return []
    return [
        Release(
            min(event.noise_multiplier for event in every),
            max(event.sample_rate for event in every),
            max(sum(event.steps for event in events) for events in histories),
            every[0].unit,
        )
    ]


def _about(sweep: Sweep, private: Sequence[Spent]) -> list[str]:
    """Say what is not in the number, and how it was composed."""
    told = []
    open_runs = len(left(sweep))
    if open_runs:
        told.append(
            f"{open_runs} of {len(sweep.cells)} cells have not finished: what they will still "
            "spend is not counted"
        )
    if len(private) > 1 and not _alike(private):
        told.append(
            "the runs deal the data differently, so any client of a run may hold a given unit: "
            "each run is composed at the least σ and the largest q of its clients; for sites "
            "whose rows stay where they are that is an upper bound"
        )
    by_client = len(private) > 1 and _alike(private)
    if by_client and not all(run.config.data.public for run in private):
        told.append(
            "this holds if the rows were the same in all runs: of data that are not declared "
            "public, nothing here tells"
        )
    if shared := list(dict.fromkeys(name for run in private for name in run.shared)):
        told.append(
            f"the ledgers of {listed(shared)} are their operators' own; what they hold of runs "
            "outside this sweep is not counted here"
        )
    return told
