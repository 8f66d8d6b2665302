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

from client.policy import Limits, SitePolicy, read_limits, tighten
from client.site import Site
from fedlr.build import Workbench, build
from fedlr.config import RunConfig, from_json
from fedlr.doctor.checkup import quick
from fedlr.errors import ConfigError, LedgerError
from fedlr.orders import SiteOrder, ledger_path, ledger_source
from fedlr.planning import ClientPlan, client_name, max_joins
from fedlr.privacy.booking import Booking, History, JobKey, Ledger
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import MemoryLedger, SqliteLedger


class NodeContext(Protocol):
    """What is read of Flower's Context of a node."""

    @property
    def node_config(self) -> Mapping[str, Any]:
        """``partition-id`` and ``num-partitions``."""
        ...


def make_sites(
    workbench: Workbench, ledgers: Path | None, run: str | None = None, resumed: bool = False
) -> list[Site]:
    """Return one site per client, in client order.

    Args:
        workbench: What `fedlr.build.build` returned.
        ledgers: Existing folder that gets one SQLite ledger per client; None
            keeps ledgers in memory, for tests.
        run: Identifier of the run; its ledgers are then those of `fedlr.orders`, so
            a run may go on with another engine. None names ledgers by client alone.
        resumed: Whether sites may have spent already. No ledger is made then: a
            client whose file is lost abstains.
    """
    names = [plan.name for plan in workbench.clients]
    if ledgers is None:
        books: list[Ledger] = [MemoryLedger() for _ in names]
    else:
        books = [_ledger(ledgers, name, run, resumed) for name in names]
    return [_site(workbench, *pair) for pair in zip(workbench.clients, books, strict=True)]


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
    return tuple(
        _site(workbench, plan, open_ledger(order.ledger(plan.name), order.source(plan.name)))
        for plan in workbench.clients
    )


def read_policies(config: RunConfig) -> dict[str, Limits]:
    """Return what the operators of simulated sites allow, by client.

    Raises:
        ConfigError: ``privacy.policies`` is no folder, or a file in it is wrong; all
            problems at once.
    """
    if config.privacy.policies is None:
        return {}
    folder = Path(config.privacy.policies).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            [f"privacy.policies = {str(folder)!r} is no folder; give one with <client>.toml files"]
        )
    found, problems = {}, list[str]()
    names = {client_name(index) for index in range(config.federation.clients)}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".toml" and path.stem not in names:
            problems.append(
                f"policy {path} is no client's; the clients are {client_name(0)} to "
                f"{client_name(config.federation.clients - 1)}"
            )
        if path.suffix != ".toml":
            continue
        try:
            found[path.stem] = read_limits(path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


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

    def joins(self) -> int:
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


def _site(workbench: Workbench, plan: ClientPlan, ledger: Ledger) -> Site:
    return Site(
        policy=_policy(workbench, plan),
        units=plan.units,
        trainer=workbench.trainer,
        ledger=ledger,
        provenance=workbench.provenance,
    )


def _policy(workbench: Workbench, plan: ClientPlan) -> SitePolicy:
    config = workbench.config
    policy = SitePolicy(
        client=plan.name,
        mode=config.privacy.mode,
        declared_size=plan.declared_size,
        expected_batch=config.optimizer.expected_batch,
        clip_norm=config.privacy.clip_norm,
        head_share=config.privacy.head_share,
        noise_multiplier=plan.noise_multiplier,
        delta=plan.delta,
        epsilon=config.privacy.epsilon,
        unit=config.privacy.unit,
        max_joins=max_joins(config),
        accountant=config.privacy.accountant,
        public_seed=config.seed,
    )
    limits = read_policies(config).get(plan.name)
    return policy if limits is None else tighten(policy, limits)


def _ledger(folder: Path, client: str, run: str | None, resumed: bool) -> Ledger:
    path = ledger_path(folder, client)
    source = client if run is None else ledger_source(run, client)
    return open_ledger(path, source) if resumed else SqliteLedger(path, source)
