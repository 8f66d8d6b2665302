"""Simulated sites: one per client of a workbench, sharing its resident model.

On the engine ``local`` all of them live in one process (`make_sites`); elsewhere
each actor process builds them once (`site_in_actor`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, Protocol

from client.policy import SitePolicy, terms_of_run, tighten
from client.site import Site
from fedlr.build import Workbench, build
from fedlr.config import RunConfig, from_json
from fedlr.doctor.checkup import quick
from fedlr.errors import ConfigError, LedgerError
from fedlr.orders import SiteOrder, policy_digest, read_policies
from fedlr.planning import ClientPlan
from fedlr.privacy.booking import Booking, History, JobKey, Ledger
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import MemoryLedger, SqliteLedger
from fedlr.privacy.limits import Limits


class NodeContext(Protocol):
    """What is read of Flower's Context of a node."""

    @property
    def node_config(self) -> Mapping[str, Any]:
        """``partition-id`` and ``num-partitions``."""
        ...


def make_sites(workbench: Workbench, order: SiteOrder | None) -> list[Site]:
    """Return one site per client, in client order.

    Args:
        workbench: What `fedlr.build.build` returned.
        order: Of the run; its ledgers are there already, and none is made: a client
            whose file is lost abstains. None keeps ledgers in memory, for tests.

    Raises:
        ConfigError: What operators allow is not what it was when the order was made.
    """
    policies = read_policies(workbench.config)
    if order is not None:
        found = tuple(policy_digest(policies.get(client)) for client in order.clients)
        if found != order.policies:
            raise ConfigError(
                [
                    "privacy.policies are not those that the run began or was resumed with; bring "
                    "them back as they were, or stop the run and resume it"
                ]
            )
    return [
        Site(
            policy=_policy(workbench.config, index, plan, policies.get(plan.name)),
            units=plan.units,
            trainer=workbench.trainer,
            ledger=_ledger(order, plan.name),
            provenance=workbench.provenance,
        )
        for index, plan in enumerate(workbench.clients)
    ]


def site_in_actor(order: SiteOrder, context: NodeContext) -> Site:
    """Return the site of a node; the sites of one order share one model per process.

    Args:
        order: What `fedlr.orders.prepare` returned where the run started.
        context: Its ``partition-id`` is the index of the client.

    Raises:
        ValueError: The number of partitions is not that of the clients.
        FedlrError: As `fedlr.build.build`: model or data are not on this machine.

    Guarantees:
        No ledger is ever made here. A site whose ledger is not there announces itself
        and then answers every private job with the code ``ledger``.
    """
    partitions = context.node_config["num-partitions"]
    if partitions != len(order.clients):
        raise ValueError(
            f"num-partitions = {partitions} must be {len(order.clients)}, the number of clients"
        )
    return _resident(order)[int(context.node_config["partition-id"])]


@lru_cache(maxsize=1)
def _resident(order: SiteOrder) -> tuple[Site, ...]:
    """Build the sites of an order once per process."""
    # What Flower says here about its own actor is of no use on the run's console.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    noise = dict(zip(order.clients, order.noise, strict=True))
    workbench = build(from_json(order.config), noise=noise, evaluate=False)
    quick(workbench)  # here too: the device of this process may be another one
    return tuple(make_sites(workbench, order))


def open_ledger(path: Path, source_id: str) -> Ledger:
    """Return the ledger in an existing file; where there is none, one that refuses everything."""
    return SqliteLedger(path, source_id) if path.exists() else UnreachableLedger(path)


class UnreachableLedger:
    """The ledger of a site that cannot see its file: every call raises LedgerError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def reserve(
        self,
        key: JobKey,
        event: Release,
        max_joins: int | None = None,
        job: str = "",
        head: int | None = None,
    ) -> bool:
        """Raise LedgerError."""
        self._refuse()

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """Raise LedgerError."""
        self._refuse()

    def check_room(self, size: int) -> None:
        """Raise LedgerError."""
        self._refuse()

    def recall(self, key: JobKey) -> Booking | None:
        """Raise LedgerError."""
        self._refuse()

    def released(self, run: str, round: int, client: str) -> bytes | None:
        """Raise LedgerError."""
        self._refuse()

    def history(self) -> History:
        """Raise LedgerError."""
        self._refuse()

    def observe(self, fingerprint: str) -> bool:
        """Raise LedgerError."""
        self._refuse()

    def spent(self) -> tuple[Release, ...]:
        """Raise LedgerError."""
        self._refuse()

    def joins(self, run: str | None = None) -> int:
        """Raise LedgerError."""
        self._refuse()

    def close(self) -> None:
        """Do nothing."""

    def _refuse(self) -> NoReturn:
        raise LedgerError(
            f"ledger {self._path} does not exist on this machine, and a new one would forget what "
            "is spent; keep the run folder on storage that all machines of the run share, at one "
            "path, or bring the file back"
        )


def _policy(config: RunConfig, index: int, plan: ClientPlan, limits: Limits | None) -> SitePolicy:
    ranks = config.adapter.rank_by_client
    policy = terms_of_run(config, plan, None if ranks is None else ranks[index])
    return policy if limits is None else tighten(policy, limits)


def _ledger(order: SiteOrder | None, client: str) -> Ledger:
    if order is None:
        return MemoryLedger()
    return open_ledger(order.ledger(client), order.source(client))
