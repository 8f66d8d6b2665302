"""A run with real sites: what the ServerApp does with the order that a coordinator signed.

The server holds no site's rows and no ledger. Who takes part, and σ, N and δ of each, is what
the sites announce; ε is what they report. The folder of the run is named by its order, so that
the same order, submitted again, goes on where the run stood.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.serverapp import Grid

from fedlr.build import Workbench, build, source_spec
from fedlr.config import RunConfig, from_json, to_json
from fedlr.data.sources import load
from fedlr.errors import RunError
from fedlr.planning import OwnRows
from fedlr.report.facts import (
    FACTS_FILE,
    ClientFacts,
    RunFacts,
    check_same,
    read_facts,
    write_facts,
)
from fedlr.report.folder import make_run_folder, output_folder, remove_unbegun, write_config
from fedlr.report.live import say
from fedlr.report.tables import show_closing
from fedlr.signing import RunOrder, announced
from fedlr.told import whole
from server.journal import FileJournal, write_head
from server.membership import Membership, gather
from server.outcome import StrategyConfig
from server.session import FIXED, Session, facts_of, first, read_config, strategy_config
from server.tracking import check_tracking, open_tracker
from server.watched import WatchedGrid

POLL_S = 0.5
"""Seconds between two looks for replies over a network."""

ROUND_TIMEOUT_S = 3600.0
"""Seconds a round may take where the configuration sets no bound: a node can vanish."""

_OF_THE_SERVER = tuple(name for name in FIXED if name != "clients")


@dataclass(frozen=True)
class _Run:
    """An order, and what the server makes of it before it asks anyone."""

    order: RunOrder
    config: RunConfig
    folder: Path
    workbench: Workbench
    settings: StrategyConfig
    began: float

    @property
    def known(self) -> RunFacts | None:
        """What the run began with; None where it begins now."""
        return read_facts(self.folder) if (self.folder / FACTS_FILE).exists() else None


def run_deployed(grid: Grid, text: str) -> Path:
    """Run, or go on with, the federation that a signed order describes; return its folder.

    Args:
        grid: Connects to the nodes of the sites.
        text: The order, as in the run config. Its signature is the sites' matter: whoever
            starts this process could run anything here.

    Raises:
        FedlrError: The run cannot be built, begun or gone on with, or completed no round.
    """
    run = _prepared(announced(text))
    watched = WatchedGrid(grid, threading.Event(), POLL_S)
    known = run.known
    names = None if known is None else [client.client for client in known.clients]
    found = gather(watched, run.settings, run.workbench.provenance, names)
    members = found if known is None else _those_of(known, found, run.settings.min_clients)
    session = _begun(run, members) if known is None else _continued(run, known)
    try:
        outcome = session.strategy(run.settings, members).run(watched)
        summary = session.finish(outcome)
    finally:
        session.close()
    show_closing(summary, outcome.records, sys.stdout)
    say(f"the run is in {session.folder.absolute()}")
    session.check_progress(summary, outcome)
    return session.folder


def over_a_network(settings: StrategyConfig) -> StrategyConfig:
    """Return ``settings`` with a bound on every round."""
    return replace(settings, round_timeout_s=settings.round_timeout_s or ROUND_TIMEOUT_S)


def folder_of(order: RunOrder, config: RunConfig) -> Path:
    """Return the folder of the run of an order."""
    return output_folder(config.output) / order.run


def check_rows(config: RunConfig) -> None:
    """Raise DataError where the server's rows cannot be read."""
    load(server_rows(config).spec)


def server_rows(config: RunConfig) -> OwnRows:
    """Return what the server reads: public validation rows, and no client's."""
    return OwnRows(replace(source_spec(config), only="validation"), lambda _: ())


def _prepared(order: RunOrder) -> _Run:
    began, config = time.monotonic(), whole(order.run, from_json(order.config))
    check_tracking(config)
    settings = over_a_network(strategy_config(config, order.run))
    workbench = build(config, say, own=server_rows(config))
    return _Run(order, config, folder_of(order, config), workbench, settings, began)


def _begun(run: _Run, members: Membership) -> Session:
    """Make the run folder; the facts come last, as in `server.session.begin`."""
    workbench, folder = run.workbench, run.folder
    remove_unbegun(folder)
    make_run_folder(folder)
    write_config(folder, to_json(run.config))
    facts = replace(facts_of(workbench, run.order.run), clients=_clients(members))
    journal = FileJournal(folder)
    try:
        write_head(folder, workbench.whole_head)
        write_facts(folder, facts)
        tracker = open_tracker(run.config, folder, facts)
    except BaseException:
        journal.close()
        raise
    return Session(workbench, folder, facts, None, first(workbench), journal, run.began, tracker)


def _continued(run: _Run, facts: RunFacts) -> Session:
    workbench, folder = run.workbench, run.folder
    # The configuration that was signed now must be the one that the run began with.
    if read_config(folder, facts) != run.config:
        raise RunError(
            f"the run in {folder} has another configuration than the order; submit it as it was, "
            "or start a new run"
        )
    journal = FileJournal(folder)
    try:
        check_same(facts, facts_of(workbench, facts.run), _OF_THE_SERVER)
        start = journal.checkpoint(workbench.layout) or first(workbench)
        tracker = open_tracker(run.config, folder, facts, start.records)
    except BaseException:
        journal.close()
        raise
    say(f"going on after round {start.state.round}")
    return Session(workbench, folder, facts, None, start, journal, run.began, tracker)


def _clients(members: Membership) -> tuple[ClientFacts, ...]:
    return tuple(
        ClientFacts(
            client=status.client,
            declared_size=status.declared_size,
            delta=status.delta,
            noise_multiplier=status.noise_multiplier,
        )
        for status in (member.status for member in members.members)
    )


def _those_of(facts: RunFacts, found: Membership, least: int) -> Membership:
    """Return the members whose numbers are those that the run began with.

    Raises:
        RunError: Fewer than ``least`` are left: no round could be completed.
    """
    known = {client.client: client for client in facts.clients}
    now = {client.client: client for client in _clients(found)}
    kept = tuple(m for m in found.members if known[m.client] == now[m.client])
    others = tuple(
        f"Client {member.client!r} is left out: it declares other numbers now."
        for member in found.members
        if member not in kept
    )
    notices = (*found.notices, *others)
    if len(kept) < least:
        raise RunError(
            f"{len(kept)} clients of the run are left, federation.min_clients = {least} are "
            f"needed: {' '.join(notices)} Bring the others back as they were"
        )
    return Membership(kept, notices)
