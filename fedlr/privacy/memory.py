"""The ledger of tests and dry runs: the contract, without a file."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fedlr.errors import LedgerError
from fedlr.privacy.booking import (
    DAY_S,
    Booking,
    Entry,
    History,
    JobKey,
    check_covered,
    check_head,
    known,
    not_open,
)
from fedlr.privacy.events import Release


class MemoryLedger:
    """A ledger in memory, gone with the process: for tests and dry runs.

    Nothing of it can be restored from a backup, so it has neither chain nor witness.
    """

    def __init__(self) -> None:
        self._reserved: dict[JobKey, tuple[Release, int]] = {}
        self._committed: dict[JobKey, Release] = {}
        self._jobs: dict[JobKey, str] = {}
        self._updates: dict[tuple[str, str], tuple[JobKey, bytes]] = {}
        self._fingerprint: str | None = None
        self._head = 0
        self._booked_at = 0
        self._lock = threading.Lock()
        self._closed = False

    def reserve(
        self,
        key: JobKey,
        event: Release,
        max_joins: int | None = None,
        job: str = "",
        head: int | None = None,
    ) -> bool:
        """See `Ledger.reserve`."""
        with self._open():
            if key in self._reserved:
                raise LedgerError(known(key))
            check_head(self._head, head)
            if max_joins is not None and len(self._reserved) >= max_joins:
                return False
            self._booked_at = max(self._booked_at, int(time.time()))
            self._reserved[key] = (event, self._booked_at // DAY_S)
            self._jobs[key] = job
            self._head += 1
            return True

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """See `Ledger.commit`."""
        with self._open():
            if key in self._committed or key not in self._reserved:
                raise LedgerError(not_open(key))
            check_covered(self._reserved[key][0], event)
            self._committed[key] = event
            self._updates[key.run, key.client] = (key, update)
            self._head += 1

    def check_room(self, size: int) -> None:
        """See `Ledger.check_room`; there is as much as there is memory."""

    def recall(self, key: JobKey) -> Booking | None:
        """See `Ledger.recall`."""
        with self._open():
            if key not in self._reserved:
                return None
            latest, update = self._updates.get((key.run, key.client), (None, b""))
            kept = update if latest == key else None
            return Booking(self._jobs[key], key in self._committed, kept)

    def released(self, run: str, round: int, client: str) -> bytes | None:
        """See `Ledger.released`."""
        with self._open():
            key, update = self._updates.get((run, client), (None, b""))
            return update if key is not None and key.round == round else None

    def history(self) -> History:
        """See `Ledger.history`."""
        with self._open():
            counted = Counter(
                Entry(key.run, day, self._committed.get(key, event))
                for key, (event, day) in self._reserved.items()
            )
            return History(self._head, tuple(item[0].times(item[1]) for item in counted.items()))

    def spent(self) -> tuple[Release, ...]:
        """See `Ledger.spent`."""
        return self.history().events()

    def joins(self, run: str | None = None) -> int:
        """See `Ledger.joins`."""
        with self._open():
            return sum(run in (None, key.run) for key in self._reserved)

    def observe(self, fingerprint: str) -> bool:
        """See `Ledger.observe`."""
        with self._open():
            before, self._fingerprint = self._fingerprint, fingerprint
            return before not in (None, fingerprint)

    def close(self) -> None:
        """See `Ledger.close`."""
        self._closed = True

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Hold the lock of a ledger that is not closed."""
        with self._lock:
            if self._closed:
                raise LedgerError("the ledger is closed; open it again")
            yield
