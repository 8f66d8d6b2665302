"""What the ledgers of clients hold before a run begins. They are read, and never made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from fedlr.errors import LedgerError
from fedlr.privacy.booking import History
from fedlr.privacy.ledger import SqliteLedger


@dataclass(frozen=True)
class Earlier:
    """A client's ledger before the run.

    Attributes:
        history: Everything that was booked.
        joins: Rounds of all runs.
        recovered: Those of them that count in every run.
        source_id: Of which data it tells; empty where there is no ledger.
    """

    history: History = field(default_factory=lambda: History(0, ()))
    joins: int = 0
    recovered: int = 0
    source_id: str = ""


def read_ledgers(folder: Path, names: Sequence[str]) -> dict[str, Earlier]:
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
        lacks = "holds no ledger of any client" if folder.is_dir() else "is no folder"
        raise LedgerError(
            f"{str(folder)!r} {lacks}; give a run folder, or one with files such as "
            f"{names[0]}.sqlite"
        )
    return {name: read_ledger(path) for name, path in present.items()}


def read_ledger(path: Path, source_id: str | None = None) -> Earlier:
    """Return what one ledger holds.

    Args:
        path: Its file.
        source_id: Of which data it must tell; None takes any.

    Raises:
        LedgerError: It is not there, cannot be read, or belongs to other data.
    """
    try:
        path.stat()  # or one would be made
    except OSError as error:
        raise LedgerError(
            f"ledger {path} cannot be read: {error.strerror or error}; correct its path, or bring "
            "it back"
        ) from error
    with closing(SqliteLedger(path, source_id)) as ledger:
        return Earlier(
            ledger.history(), ledger.joins(), ledger.joins(run=""), source_id=ledger.source_id
        )
