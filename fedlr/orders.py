"""What makes another process a simulated site: settled where the run starts, read by its actors.

The process that starts a run makes all ledgers; actors only open them. An actor on
a machine that does not see the run's folder then cannot start a ledger of its own,
in which everything spent elsewhere would be missing.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fedlr.config import RunConfig, to_json
from fedlr.errors import ConfigError, LedgerError, RunError
from fedlr.methods.registry import METHODS
from fedlr.planning import client_name
from fedlr.privacy.earlier import Earlier, read_ledger
from fedlr.privacy.ledger import SqliteLedger
from fedlr.privacy.limits import Declared, Limits, read_limits
from fedlr.report import strict_json
from fedlr.report.folder import output_folder
from fedlr.report.records import write_atomically


@dataclass(frozen=True)
class SiteOrder:
    """Everything an actor builds the sites of one run from; equal orders make equal sites.

    Attributes:
        config: Canonical JSON of the configuration.
        run: Identifier of the run, as in its jobs.
        clients: Names of all clients, in client order.
        noise: Their σ, calibrated once where the run starts.
        ledgers: Absolute paths of their ledgers.
        sources: What each ledger is for: ``<run>/<client>``, one run's releases and no
            other's, or the source id that the client's operator gave to their own.
    """

    config: str
    run: str
    clients: tuple[str, ...]
    noise: tuple[float, ...]
    ledgers: tuple[str, ...]
    sources: tuple[str, ...]
    policies: tuple[str, ...]

    def ledger(self, client: str) -> Path:
        """Return the file of a client's ledger."""
        return Path(self.ledgers[self.clients.index(client)])

    def source(self, client: str) -> str:
        """Return what the client's ledger is for."""
        return self.sources[self.clients.index(client)]

    def is_own(self, client: str) -> bool:
        """Return whether the client's ledger is the run's own, not its operator's."""
        return self.source(client) == _source(self.run, client)


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
            if path.suffix.lower() == ".toml" and path.stem in names:
                problems.append(f"policy {path} must end in .toml, in small letters; rename it")
            continue
        try:
            found[path.stem] = read_limits(path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


class DeclaredClient(Protocol):
    """What a policy is held against: the public numbers of a client, of a run or of its plan."""

    @property
    def name(self) -> str:
        """Stable public identifier."""
        ...

    @property
    def declared_size(self) -> int:
        """N."""
        ...

    @property
    def delta(self) -> float:
        """δ."""
        ...


def check_policies(
    config: RunConfig, clients: Sequence[DeclaredClient], labels: tuple[str, ...]
) -> None:
    """Check that every client can take part under its operator's policy, before a run begins.

    Args:
        config: The run.
        clients: What it declares of them.
        labels: Its label list.

    Raises:
        ConfigError: As `read_policies` and `hold_policies`.
    """
    hold_policies(read_policies(config), config, clients, labels)


def hold_policies(
    policies: Mapping[str, Limits],
    config: RunConfig,
    clients: Sequence[DeclaredClient],
    labels: tuple[str, ...] | None,
    read: Callable[[Path, str | None], Earlier] = read_ledger,
) -> dict[str, Earlier]:
    """Hold policies against a run: the one check, for a run that begins and for its plan.

    Args:
        policies: What operators allow, by client.
        config: The run.
        clients: What it declares of them.
        labels: Its label list; None where it is not known.
        read: Reads a ledger of a source, as `read_ledger`.

    Returns:
        What the ledgers that policies name hold, by client.

    Raises:
        ConfigError: A policy does not fit the run, or names a ledger that is not there or is
            another source's, or two name one; all problems at once.
    """
    held, problems, owners = dict[str, Earlier](), list[str](), dict[object, str]()
    for client in clients:
        limits = policies.get(client.name)
        if limits is None:
            continue
        run = Declared(
            client=client.name,
            mode=config.privacy.mode,
            declared_size=client.declared_size,
            unit=config.privacy.unit,
            delta=client.delta,
            method=config.method.name,
            labels=labels,
            columns=columns_of(config),
        )
        problems += limits.conflicts(run)
        if limits.ledger is None:
            continue
        try:
            held[client.name] = _read_own(run, limits.ledger, limits.source_id, read)
        except ConfigError as error:
            problems += error.problems
        keys = (limits.ledger, limits.source_id, _inode(limits.ledger))
        named = {owners.setdefault(key, client.name) for key in keys if key is not None}
        if others := sorted(named - {client.name}):
            problems.append(
                f"the policies of {others[0]} and {client.name} name one ledger or source id, "
                f"{limits.ledger} ({limits.source_id!r}); give each client that of its own data"
            )
    if problems:
        raise ConfigError(problems)
    return held


def columns_of(config: RunConfig) -> int | None:
    """Return how many columns every client must train; None where the method mixes ranks."""
    kind = METHODS.get(config.method.name)
    return None if kind is None or kind.facts.mixed_ranks else config.adapter.rank


def _read_own(
    run: Declared,
    path: Path,
    source_id: str | None,
    read: Callable[[Path, str | None], Earlier],
) -> Earlier:
    """Return what the ledger holds that a client's policy names; ConfigError if it is unfit."""
    if _is_missing(path):
        raise ConfigError(
            [
                f"the policy of {run.client} names the ledger {path}, which does not exist; bring "
                "it back, or for data that never had one: fedlr ledger new "
                f"{shlex.quote(str(path))} --source-id {shlex.quote(str(source_id))} "
                "--disjoint '<reason>'"
            ]
        )
    try:
        earlier = read(path, source_id)
    except LedgerError as error:
        raise ConfigError([f"the policy of {run.client}: {error}"]) from error
    units = {event.unit for event in earlier.history.events()}
    if others := sorted(units - {run.unit}):
        raise ConfigError(
            [
                f"the ledger {path} of {run.client} holds releases of the unit {unit}, the run has "
                f"privacy.unit = {run.unit}; they cannot be composed, set privacy.unit={unit}"
                for unit in others
            ]
        )
    return earlier


def _is_missing(path: Path) -> bool:
    """Return whether there is no such file; not whether it can be read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _inode(path: Path) -> tuple[int, int] | None:
    """Return what tells one file from another, whatever its names; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def policy_digest(limits: Limits | None) -> str:
    """Return sha256, hex, of what an operator allows; empty where nobody said anything."""
    return "" if limits is None else hashlib.sha256(repr(limits.canonical()).encode()).hexdigest()


def _source(run: str, client: str) -> str:
    return f"{run}/{client}"


def run_ledger_of(source_id: str) -> str | None:
    """Return whose ledger this is if a run made it for itself; None for an operator's.

    Example:
        >>> run_ledger_of("2031-05-01-120000-tiny-1a2b3c4d/client-007"), run_ledger_of("ward-7")
        ('client-007', None)
    """
    found = re.fullmatch(r"[^/]+/(client-\d{3,})", source_id)
    return None if found is None else found[1]


def prepare(
    config: RunConfig, run: str, folder: Path, noise: Mapping[str, float], resumed: bool = False
) -> SiteOrder:
    """Make the ledgers of a run that starts, and return the order for its actors.

    Args:
        config: The configuration of the run.
        run: Its identifier.
        folder: Gets the ledgers of clients whose operators name none; made where it is
            missing. Actors on other machines need it at the same path.
        noise: σ by client, in client order.
        resumed: Whether sites may have spent already. No ledger is made then: a
            client whose file is lost abstains.

    Raises:
        LedgerError: A ledger cannot be made, or a file there is another run's.
        ConfigError: As `read_policies`.
    """
    policies, ledgers, sources = read_policies(config), list[str](), list[str]()
    for client in noise:
        limits = policies.get(client, Limits())
        own = limits.ledger is None or limits.source_id is None
        ledgers.append(str(folder.absolute() / f"{client}.sqlite" if own else limits.ledger))
        sources.append(_source(run, client) if own else str(limits.source_id))
    order = SiteOrder(
        config=to_json(absolute(config)),
        run=run,
        clients=tuple(noise),
        noise=tuple(noise.values()),
        ledgers=tuple(ledgers),
        sources=tuple(sources),
        policies=tuple(policy_digest(policies.get(client)) for client in noise),
    )
    if not resumed:
        folder.mkdir(exist_ok=True)
        for client in filter(order.is_own, order.clients):
            # The machines of a cluster share the run folder.
            shared = config.federation.address is not None
            SqliteLedger(order.ledger(client), order.source(client), shared).close()
    return order


def absolute(config: RunConfig) -> RunConfig:
    """Return ``config`` for a process that works in another folder of this machine."""
    model, data = config.model, config.data
    if Path(model.name).is_dir():
        model = replace(model, name=str(Path(model.name).absolute()))
    if data.path is not None:
        data = replace(data, path=str(Path(data.path).absolute()))
    if data.cache is not None:
        data = replace(data, cache=str(Path(data.cache).expanduser().absolute()))
    policies = config.privacy.policies
    if policies is not None:
        policies = str(Path(policies).expanduser().absolute())
    privacy = replace(config.privacy, policies=policies)
    return replace(config, model=model, data=data, privacy=privacy)


def order_file(output: str, flower_run: int) -> Path:
    """Return where the apps of ``flwr run`` hand an order over.

    Args:
        output: The configuration's ``output``; a relative one is below the folder in
            which Flower's local SuperLink was started.
        flower_run: Flower's id of the run, the one thing both apps are told.
    """
    return output_folder(output).absolute() / "flower" / f"{flower_run}.json"


def write_order(path: Path, order: SiteOrder) -> None:
    """Write ``order``, whole or not at all; RunError where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"output: {path.parent} cannot be made ({error.strerror or error}); give a folder of "
            "your own"
        ) from error
    write_atomically(path, strict_json.encode(order).encode())


def read_order(path: Path) -> SiteOrder:
    """Return the order in ``path``; RunError where there is none."""
    try:
        return strict_json.decode(SiteOrder, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(
            f"the order of the run is not at {path} ({error.strerror or error}); output must be a "
            "folder that all machines of the run share, best an absolute path"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; start the run again") from error
