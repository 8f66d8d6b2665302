"""What a run and the ledgers of its clients must agree on, when it begins and when it goes on."""

from __future__ import annotations

from contextlib import closing

from fedlr.build import Workbench
from fedlr.config import RunConfig
from fedlr.errors import RunError
from fedlr.orders import SiteOrder
from fedlr.planning import Say
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report.facts import RunFacts
from server.outcome import Checkpoint
from server.results import ledger_epsilon


def notices(order: SiteOrder) -> tuple[str, ...]:
    """Return what readers of the result must know of ledgers that other runs write to as well."""
    standing = [client for client in order.clients if not order.is_own(client)]
    if not standing:
        return ()
    return (
        f"ε of {', '.join(standing)} is that of their operators' own ledgers: of everything "
        "released from those data, by this run and by others.",
    )


def observe(workbench: Workbench, order: SiteOrder, say: Say) -> None:
    """Let operators' own ledgers notice that their data have changed.

    Args:
        workbench: Has the rows.
        order: Names the ledgers.
        say: Told of a change, on the operator's console alone.

    Raises:
        LedgerError: A ledger refuses.
    """
    for plan in workbench.clients:
        if order.is_own(plan.name):
            continue
        with closing(SqliteLedger(order.ledger(plan.name), order.source(plan.name))) as ledger:
            changed = ledger.observe(workbench.data.rows_sha256(plan.units.rows))
        if changed:
            say(
                f"the rows of {plan.name} are not those that its ledger saw last; what was "
                "released before goes on counting. A unit that another client had before has "
                "spent there too: keep seed and partition, or compose the ledgers"
            )


def check_resumed(config: RunConfig, facts: RunFacts, order: SiteOrder, at: Checkpoint) -> None:
    """Check that the ledgers of a resumed run are those it began with, and remember it.

    Args:
        config: The run's configuration.
        facts: What it began with.
        order: Its ledgers now.
        at: What the server knows of the clients.

    Raises:
        RunError: A ledger is gone, another one, or holds less than the run knows of it.
        LedgerError: A ledger refuses.
    """
    if facts.sources and order.sources != facts.sources:
        raise RunError(
            "privacy.policies name other ledgers than the run began with: what it spent would be "
            "forgotten there; bring the policies back as they were"
        )
    if config.privacy.mode != "dp":
        return
    for client in order.clients:
        path = order.ledger(client)
        if not path.exists():
            raise RunError(
                f"the ledger {path} of {client} is gone: what it spent would be forgotten, and it "
                "could not take part; bring it back"
            )
        with closing(SqliteLedger(path, order.source(client))) as ledger:
            found, known = ledger.joins(facts.run), at.joins.get(client, 0)
        if found < known:
            raise RunError(
                f"the ledger {path} holds {found} rounds of this run, but {client} joined {known}: "
                "it was restored from a backup, or is another one; bring back the newest"
            )
    for client, spent in ledger_epsilon(config, facts, order).items():
        reported = at.epsilon.get(client, 0.0)
        if spent < reported * (1 - 1e-9):
            raise RunError(
                f"the ledger {order.ledger(client)} gives ε = {spent:.4g}, but {client} had "
                f"reported {reported:.4g}: it was restored from a backup; bring back the newest "
                "one, or run `fedlr ledger recover` on it"
            )
