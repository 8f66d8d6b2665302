"""Which runs have asked at a site, and which of them its operator approved: a file for each.

The files lie beside the ledger. A run keeps the order that it first came with: its name with
another content is refused, so that what an operator has looked at stays what is run.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from fedlr.errors import OrderRefused, RunError
from fedlr.report import strict_json
from fedlr.report.records import write_atomically
from fedlr.signing import RunOrder


@dataclass(frozen=True)
class Asked:
    """A run that has asked.

    Attributes:
        order: What it asks.
        digest: `RunOrder.digest`.
        first_seen: Seconds since 1970.
        approved: Whether the operator approved it.
    """

    order: RunOrder
    digest: str
    first_seen: int
    approved: bool = False


def orders_folder(ledger: Path) -> Path:
    """Return where a site keeps the orders that have come: beside its ledger."""
    return ledger.with_name(f"{ledger.name}.orders")


class OrderBook:
    """The runs that a site knows; one process admits, others may look and approve.

    Args:
        folder: Where their files are; made, for its owner alone, where it is missing.

    Raises:
        RunError: The folder cannot be made, or is not this user's alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            raise RunError(
                f"the folder of orders {folder} cannot be made: {error.strerror or error}; let "
                "this user write there"
            ) from error
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise RunError(
                f"the folder of orders {folder} must belong to this user, and nobody else may "
                f"write there: whoever can, approves runs; chmod 700 {folder}"
            )

    def admit(self, order: RunOrder, approval: bool) -> None:
        """Note a run that asks, and let it pass.

        Args:
            order: Verified.
            approval: Whether the operator must have approved it.

        Raises:
            OrderRefused: ``replayed``: the run has asked before, for something else.
                ``unapproved``: the operator has not approved it (yet).
            RunError: Its file cannot be read or written.
        """
        with self._lock:
            known = self._read(self._file(order.run))
            if known is None:
                known = Asked(order, order.digest, int(time.time()))
                self._write(known)
        if known.digest != order.digest:
            raise OrderRefused(
                "replayed",
                f"the run {order.run} asked for something else before ({self._file(order.run)}); "
                "a new run needs a new name",
            )
        if approval and not known.approved:
            raise OrderRefused(
                "unapproved", f"the run {order.run} waits for: fedlr site approve {order.run}"
            )

    def approve(self, run: str) -> Asked:
        """Approve a run that has asked, and return it; RunError where none of that name has."""
        known = next((asked for asked in self.all() if asked.order.run == run), None)
        if known is None:
            names = ", ".join(asked.order.run for asked in self.all()) or "none"
            raise RunError(f"no run {run!r} has asked here; those that have: {names}")
        approved = replace(known, approved=True)
        self._write(approved)
        return approved

    def all(self) -> list[Asked]:
        """Return every run that has asked, the first one first; RunError for a damaged file."""
        found = [self._read(path) for path in sorted(self._folder.glob("*.json"))]
        return sorted((asked for asked in found if asked), key=lambda asked: asked.first_seen)

    def _file(self, run: str) -> Path:
        return self._folder / f"{run}.json"

    def _read(self, path: Path) -> Asked | None:
        try:
            asked = strict_json.decode(Asked, path.read_text(encoding="utf-8"))
            if asked.digest != asked.order.digest or path != self._file(asked.order.run):
                raise ValueError("it is not the file of this order")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} cannot be used: {error}; look at it, and take it away if the run may ask "
                "anew"
            ) from error
        return asked

    def _write(self, asked: Asked) -> None:
        write_atomically(
            self._file(asked.order.run), strict_json.encode(asked, indent=2).encode() + b"\n"
        )
