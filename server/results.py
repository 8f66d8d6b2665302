"""A run → its summary, adapter, plot and page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedlr.build import Workbench
from fedlr.config import DataConfig, RunConfig, to_json
from fedlr.errors import LedgerError
from fedlr.orders import SiteOrder
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report import units
from fedlr.report.command import shell
from fedlr.report.facts import RunFacts
from fedlr.report.live import say
from fedlr.report.page import run
from fedlr.report.plots import curves
from fedlr.report.records import SUMMARY_FILE, ClientSummary, Summary, write_summary
from fedlr.report.spectra import INTRUDERS_FILE, write_intruders
from fedlr.report.stops import BOUNDS, stops
from fedlr.report.units import printable
from fedlr.restore import RunModel, save_result
from server.outcome import Checkpoint, Outcome
from server.spectra import base_weight, intruders_of


def so_far(checkpoint: Checkpoint) -> Outcome:
    """Return what an interrupted run has reached; nothing is measured for it."""
    records = checkpoint.records
    # The mean of several states was never evaluated.
    measured = records[-1] if records and len(checkpoint.recent) < 2 else None
    return Outcome(
        state=checkpoint.state,
        parts=checkpoint.parts,
        records=records,
        accuracy_start=checkpoint.accuracy_start,
        accuracy=measured.accuracy if measured else None,
        loss=measured.loss if measured else None,
        stopped_reason=None,
        joins=checkpoint.joins,
        steps=checkpoint.steps,
        epsilon=checkpoint.epsilon,
        statuses={},
        unheard=checkpoint.unheard,
    )


def ledger_epsilon(config: RunConfig, facts: RunFacts, order: SiteOrder) -> dict[str, float]:
    """Return ε of each client by its own ledger, forfeited rounds included.

    Clients whose ledger cannot be read here are left out; all of them where privacy is
    not on.
    """
    found: dict[str, float] = {}
    for client in facts.clients if config.privacy.mode == "dp" else ():
        path = order.ledger(client.client)
        with suppress(LedgerError):
            if path.exists():
                with closing(SqliteLedger(path, order.source(client.client))) as ledger:
                    spent = ledger.spent()
                found[client.client] = epsilon(spent, client.delta, config.privacy.accountant)
    return found


def settle(config: RunConfig, facts: RunFacts, order: SiteOrder, outcome: Outcome) -> Outcome:
    """Return ``outcome`` with ε as the ledgers have it; a ledger that is missing is a notice.

    What a site reports can be less: it is silent when a round was cut short.
    """
    found = ledger_epsilon(config, facts, order)
    silent = [client.client for client in facts.clients if client.client not in found]
    notices = outcome.notices
    if silent and config.privacy.mode == "dp":
        notices += (
            f"The ledgers of {', '.join(silent)} cannot be read here; their ε is what they last "
            "reported, and may be too small.",
        )
    fallen = [client for client, spent in found.items() if spent < outcome.epsilon.get(client, 0.0)]
    if fallen:
        notices += (
            f"The ledgers of {', '.join(fallen)} hold less than the clients had reported; the "
            "larger ε is shown.",
        )
    larger = {c: max(found[c], outcome.epsilon.get(c, 0.0)) for c in found}
    unknown = {c: math.inf for c in silent if c in outcome.epsilon and c in outcome.unheard}
    return replace(outcome, epsilon={**outcome.epsilon, **larger, **unknown}, notices=notices)


def reported(config: RunConfig, facts: RunFacts, outcome: Outcome) -> Outcome:
    """Return ``outcome`` with what must be known of ε where sites are real: it is what they
    reported. A site that reported none has an unknown one, which nothing bounds here; so has one
    that was asked to train after its last report, and whose answer did not come.
    """
    if config.privacy.mode != "dp":
        return outcome
    clients = [one.client for one in facts.clients]
    silent = [client for client in clients if client not in outcome.epsilon]
    unheard = [c for c in clients if c in outcome.epsilon and c in outcome.unheard]
    notices: tuple[str, ...] = (
        "ε is what each site reported with its last answer that came, of everything in its ledger.",
    )
    if silent:
        notices += (f"{', '.join(silent)} reported no ε: it is unknown here.",)
    for client in unheard:
        notices += (
            f"{client} reported ε = {units.privacy_loss(outcome.epsilon[client])} and was asked "
            "again after that, and its answer did not come: what it has spent since only its "
            "operator knows (∞ stands for it).",
        )
    unknown = {**outcome.epsilon, **dict.fromkeys(unheard, math.inf)}
    return replace(outcome, epsilon=unknown, notices=(*outcome.notices, *notices))


def summarise(config: RunConfig, facts: RunFacts, outcome: Outcome, wall_s: float) -> Summary:
    """Return the summary of a run; every number in it is public.

    Args:
        config: Its configuration.
        facts: What it was made of.
        outcome: What came out.
        wall_s: Duration, seconds.
    """
    records, mode = outcome.records, config.privacy.mode
    private = mode != "none"
    sent = max(1, sum(len(record.cohort) for record in records))
    accepted = max(1, sum(record.accepted for record in records))
    clients = _clients(facts, outcome, mode)
    stopped = (outcome.stopped_reason,) if outcome.stopped_reason else ()
    return Summary(
        method=config.method.name,
        model=facts.model,
        data=facts.data,
        data_sha256=facts.data_sha256,
        label_names=facts.label_names,
        majority=facts.majority,
        rounds=outcome.state.round,
        privacy_mode=mode,
        bytes_up=sum(record.bytes_up for record in records) // accepted,
        bytes_down=sum(record.bytes_down for record in records) // sent,
        wall_s=wall_s,
        server_s=sum(record.server_s for record in records),
        clients=clients,
        accuracy_start=outcome.accuracy_start,
        accuracy=outcome.accuracy,
        unit=config.privacy.unit if private else None,
        accountant=config.privacy.accountant if private else None,
        epsilon_max=max(_or_unbounded(client.epsilon) for client in clients) if private else None,
        epsilon_budget=config.privacy.epsilon if mode == "dp" else None,
        delta=max(client.delta for client in facts.clients) if private else None,
        notices=(*facts.notices, *outcome.notices, *_spent_out(outcome), *stopped),
    )


def _or_unbounded(epsilon: float | None) -> float:
    """Return ε, ∞ where it is unknown: nothing may look smaller than it is."""
    return math.inf if epsilon is None else epsilon


def _spent_out(outcome: Outcome) -> tuple[str, ...]:
    """Return a sentence for every client that stopped because a bound of its own was reached."""
    return tuple(
        f"{client} took part in {_rounds(outcome.joins.get(client, 0))} and stopped before round "
        f"{number}: {BOUNDS[code]} ({code})."
        for client, (number, code) in stops(outcome.records).items()
    )


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _clients(facts: RunFacts, outcome: Outcome, mode: str) -> tuple[ClientSummary, ...]:
    return tuple(
        ClientSummary(
            client=client.client,
            joins=outcome.joins.get(client.client, 0),
            steps=outcome.steps.get(client.client, 0),
            noise_multiplier=client.noise_multiplier if mode != "none" else None,
            epsilon=_spent(outcome.epsilon, client.client, mode),
        )
        for client in facts.clients
    )


def _spent(epsilon: Mapping[str, float], client: str, mode: str) -> float | None:
    """Return the client's ε, None if unknown; ∞ in dry mode, where nothing is promised."""
    if mode == "none":
        return None
    return math.inf if mode == "dry" else epsilon.get(client)


def write_results(workbench: Workbench, outcome: Outcome, summary: Summary, folder: Path) -> None:
    """Write ``adapter/``, plot and summary of a run into ``folder``, the summary last: the run
    has ended where it is there.

    Without a completed round there is no trained model, and no ``adapter/``.
    """
    if summary.rounds:
        save_result(RunModel.of(workbench), outcome.parts, summary, folder / "adapter")
    curves(outcome.records, summary, folder / "curves.png")
    write_summary(folder / SUMMARY_FILE, summary)


def write_page(workbench: Workbench, outcome: Outcome, folder: Path) -> None:
    """Write ``intruders.json`` and the page of a run whose summary is in ``folder``.

    They are looked at, and nothing depends on them: what goes wrong is said on this
    terminal, and the run has ended all the same.
    """
    try:
        (folder / INTRUDERS_FILE).unlink(missing_ok=True)
        _write_intruders(workbench, outcome, folder)
    except Exception as error:
        say(f"intruder dimensions could not be looked for: {_reason(error)}; all else is there")
    try:
        run.write(folder, None, plain_default(), figures=False, ended=True)
    except Exception as error:
        again = shell(["fedlr", "report", str(folder)])
        say(f"the page could not be drawn: {_reason(error)}; `{again}` tries again")


def _write_intruders(workbench: Workbench, outcome: Outcome, folder: Path) -> None:
    """Compare the result with the base; a run without a completed round has none."""
    adapted = workbench.adapted
    if outcome.state.round:
        found = intruders_of(adapted.sites, partial(base_weight, adapted), outcome.parts)
        if found is not None:
            write_intruders(folder, found)


def _reason(error: Exception) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def plain_default() -> Mapping[str, Any]:
    """Return what ``fedlr simulate`` composes without a word; a test compares it with ``conf/``."""
    config = replace(RunConfig(), data=DataConfig(public=True))
    mapping: Mapping[str, Any] = json.loads(to_json(config))
    return mapping
