"""What makes another process a simulated site: settled where the run starts, read by its actors.

The process that starts a run makes all ledgers; actors only open them. An actor on
a machine that does not see the run's folder then cannot start a ledger of its own,
in which everything spent elsewhere would be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedlr.config import RunConfig, to_json
from fedlr.errors import RunError
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report import strict_json
from fedlr.report.folder import output_folder
from fedlr.report.records import write_atomically


@dataclass(frozen=True)
class SiteOrder:
    """Everything an actor builds the sites of one run from; equal orders make equal sites.

    Attributes:
        config: Canonical JSON of the configuration.
        run: Identifier of the run, as in its jobs.
        ledgers: Absolute path of the folder with the ledgers.
        clients: Names of all clients, in client order.
        noise: Their σ, calibrated once where the run starts.
    """

    config: str
    run: str
    ledgers: str
    clients: tuple[str, ...]
    noise: tuple[float, ...]

    def ledger(self, client: str) -> Path:
        """Return the file of a client's ledger."""
        return ledger_path(Path(self.ledgers), client)

    def source(self, client: str) -> str:
        """Return what the client's ledger is for; see `ledger_source`."""
        return ledger_source(self.run, client)


def ledger_path(folder: Path, client: str) -> Path:
    """Return the file of a simulated client's ledger in ``folder``."""
    return folder / f"{client}.sqlite"


def ledger_source(run: str, client: str) -> str:
    """Return what a simulated client's ledger is for: one run's releases and no other's."""
    return f"{run}/{client}"


def prepare(
    config: RunConfig, run: str, ledgers: Path, noise: Mapping[str, float], resumed: bool = False
) -> SiteOrder:
    """Make the ledgers of a run that starts, and return the order for its actors.

    Args:
        config: The configuration of the run.
        run: Its identifier.
        ledgers: Existing folder; actors on other machines need it at the same path.
        noise: σ by client, in client order.
        resumed: Whether sites may have spent already. No ledger is made then: a
            client whose file is lost abstains.

    Raises:
        LedgerError: A ledger cannot be made, or a file there is another run's.
    """
    order = SiteOrder(
        config=to_json(_absolute(config)),
        run=run,
        ledgers=str(ledgers.absolute()),
        clients=tuple(noise),
        noise=tuple(noise.values()),
    )
    if not resumed:
        for client in order.clients:
            # The machines of a cluster share the run folder.
            shared = config.federation.address is not None
            SqliteLedger(order.ledger(client), order.source(client), shared).close()
    return order


def _absolute(config: RunConfig) -> RunConfig:
    """Return ``config`` for a process that works in another folder of this machine."""
    model, data = config.model, config.data
    if Path(model.name).is_dir():
        model = replace(model, name=str(Path(model.name).absolute()))
    if data.path is not None:
        data = replace(data, path=str(Path(data.path).absolute()))
    policies = config.privacy.policies
    privacy = replace(config.privacy, policies=policies and str(Path(policies).absolute()))
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
