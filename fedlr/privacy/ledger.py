"""The privacy ledger of one data source: reserve before training, commit before release.

A reservation that was never committed, because the process died or the round
failed, counts as spent in full: what it computed may have left.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Literal

from fedlr.errors import LedgerCorrupt, LedgerError, LedgerMoved
from fedlr.privacy import database, witness
from fedlr.privacy.booking import RECOVERED, Booking, Entry, History, JobKey, Ledger
from fedlr.privacy.database import MIGRATIONS, Database
from fedlr.privacy.events import Release

__all__ = ["MIGRATIONS", "Booking", "JobKey", "Ledger", "MemoryLedger", "SqliteLedger"]

_DAY_S = 86_400
_INSERT = (
    "INSERT INTO entries (run, round, client, nonce, reserved, job, booked_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_KEY = "WHERE run = ? AND round = ? AND client = ? AND nonce = ?"
_SELECT = f"SELECT reserved, committed, job, released FROM entries {_KEY}"
_UPDATE = f"UPDATE entries SET committed = ?, released = ? {_KEY}"
_DROP = "UPDATE entries SET released = NULL WHERE run = ? AND client = ? AND released IS NOT NULL"
_RELEASED = (
    "SELECT released FROM entries WHERE run = ? AND round = ? AND client = ? "
    "AND released IS NOT NULL"
)
_HISTORY = (
    f"SELECT run, booked_at / {_DAY_S}, COALESCE(committed, reserved), COUNT(*) "
    "FROM entries GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
)
_FORWARD = "UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE name = 'head'"


class MemoryLedger:
    """A ledger in memory, gone with the process: for tests and dry runs."""

    def __init__(self) -> None:
        self._reserved: dict[JobKey, tuple[Release, int]] = {}
        self._committed: dict[JobKey, Release] = {}
        self._jobs: dict[JobKey, str] = {}
        self._updates: dict[tuple[str, str], tuple[JobKey, bytes]] = {}
        self._fingerprint: str | None = None
        self._head = 0
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
                raise LedgerError(_known(key))
            _check_head(self._head, head)
            if max_joins is not None and len(self._reserved) >= max_joins:
                return False
            self._reserved[key] = (event, int(time.time()) // _DAY_S)
            self._jobs[key] = job
            self._head += 1
            return True

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """See `Ledger.commit`."""
        with self._open():
            if key in self._committed or key not in self._reserved:
                raise LedgerError(_not_open(key))
            _check_covered(self._reserved[key][0], event)
            self._committed[key] = event
            self._updates[key.run, key.client] = (key, update)
            self._head += 1

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
            return History(self._head, tuple(_times(*item) for item in counted.items()))

    def spent(self) -> tuple[Release, ...]:
        """See `Ledger.spent`."""
        return self.history().events()

    def joins(self) -> int:
        """See `Ledger.joins`."""
        with self._open():
            return len(self._reserved)

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


class SqliteLedger:
    """A ledger in one SQLite file (`fedlr.privacy.database.Database`).

    Beside a file lies its witness (`fedlr.privacy.witness`): what had been booked when
    something last left the process. A ledger that knows less was restored from a backup,
    and is refused until `recover` books what it lacks.

    Attributes:
        path: The file.
        source_id: Identifier of the data source that the ledger belongs to.

    Args:
        path: The file, created with mode 0600 if it does not exist, in a folder
            that does; or ``":memory:"``.
        source_id: Identifier of the data source: stored in a new ledger (by
            default a random one), compared with that of an existing one.
        shared: Whether the file is on storage that several machines write to.

    Raises:
        LedgerError: The folder is missing, the file belongs to another source
            or to a newer version of the program, it cannot be opened, or it was
            restored from a backup, or is missing while its witness is there.
        LedgerCorrupt: The file is damaged or is no ledger.
    """

    def __init__(
        self,
        path: Path | Literal[":memory:"],
        source_id: str | None = None,
        shared: bool = False,
    ) -> None:
        self.path = Path(path)
        self._witness = None if path == ":memory:" else witness.beside(self.path)
        if self._witness is not None and self._witness.exists() and not self.path.exists():
            raise LedgerError(
                f"ledger {self.path} is gone, but {self._witness.name} tells of what it had booked;"
                " bring back the newest backup, then run `fedlr ledger recover`"
            )
        self._database = Database(path, source_id, shared)
        try:
            self.source_id = self._check(source_id)
        except BaseException:
            self._database.close()
            raise

    def reserve(
        self,
        key: JobKey,
        event: Release,
        max_joins: int | None = None,
        job: str = "",
        head: int | None = None,
    ) -> bool:
        """See `Ledger.reserve`."""
        with self._checked() as connection:
            if _row(connection, key) is not None:
                raise LedgerError(_known(key))
            _check_head(_head(connection), head)
            if max_joins is not None and _joins(connection) >= max_joins:
                return False
            booked = (*astuple(key), event.to_json(), job, int(time.time()))
            connection.execute(_INSERT, booked)
            connection.execute(_FORWARD)
            return True

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """See `Ledger.commit`."""
        with self._checked() as connection:
            row = _row(connection, key)
            if row is None or row[1] is not None:
                raise LedgerError(_not_open(key))
            _check_covered(Release.from_json(row[0]), event)
            connection.execute(_DROP, (key.run, key.client))
            connection.execute(_UPDATE, (event.to_json(), update, *astuple(key)))
            connection.execute(_FORWARD)
            history = _history(connection)
        if self._witness is not None:
            witness.write(self._witness, self.source_id, history.head, history.events())

    def recall(self, key: JobKey) -> Booking | None:
        """See `Ledger.recall`."""
        with self._checked() as connection:
            row = _row(connection, key)
            history = _history(connection)
        if self._witness is not None and row is not None and row[1] is not None:
            # Whoever asks may send it: a crash can have come between commit and witness.
            witness.write(self._witness, self.source_id, history.head, history.events())
        return None if row is None else Booking(str(row[2]), row[1] is not None, row[3])

    def released(self, run: str, round: int, client: str) -> bytes | None:
        """See `Ledger.released`."""
        with self._checked() as connection:
            row = connection.execute(_RELEASED, (run, round, client)).fetchone()
        return None if row is None else row[0]

    def history(self) -> History:
        """See `Ledger.history`; raises LedgerError on an event it does not know."""
        with self._checked() as connection:
            return _history(connection)

    def spent(self) -> tuple[Release, ...]:
        """See `Ledger.spent`; raises LedgerError on an event it does not know."""
        return self.history().events()

    def joins(self) -> int:
        """See `Ledger.joins`."""
        with self._checked() as connection:
            return _joins(connection)

    def observe(self, fingerprint: str) -> bool:
        """See `Ledger.observe`."""
        latest = "SELECT sha256 FROM fingerprints ORDER BY rowid DESC LIMIT 1"
        with self._checked() as connection:
            row = connection.execute(latest).fetchone()
            if row is None or row[0] != fingerprint:
                values = (fingerprint, int(time.time()))
                connection.execute("INSERT INTO fingerprints VALUES (?, ?)", values)
            return row is not None and row[0] != fingerprint

    def entries(self) -> Iterator[dict[str, object]]:
        """Yield every entry as plain values: key, events as JSON, day, digest of the job."""
        names = "run, round, client, nonce, reserved, committed, booked_at, job"
        with self._checked() as connection:
            rows = connection.execute(f"SELECT {names} FROM entries ORDER BY rowid").fetchall()
        yield from (dict(zip(names.split(", "), row, strict=True)) for row in rows)

    def declare_disjoint(self, reason: str) -> None:
        """Note why this ledger starts empty: no row of its data was in another one's."""
        with self._checked() as connection:
            connection.execute("INSERT INTO meta VALUES ('disjoint', ?)", (reason,))

    def recover(self) -> tuple[Release, ...]:
        """Book what the witness knows and this ledger, restored from a backup, does not.

        Returns:
            The events booked now; none where nothing is missing.

        Raises:
            LedgerError: There is no witness, or it is another ledger's.
        """
        if self._witness is None:
            raise LedgerError("a ledger in memory has no witness, and nothing to recover")
        seen = witness.read(self._witness, self.source_id)
        if seen is None:
            raise LedgerError(f"{self._witness} does not exist; there is nothing to recover from")
        with self._database.transaction() as connection:
            history = _history(connection)
            missing = witness.missing(seen.events, history.events())
            key = JobKey(RECOVERED, seen.head, RECOVERED, str(time.time_ns()))
            for number, event in enumerate(missing):
                one = replace(key, nonce=f"{key.nonce}-{number}")
                booked = (*astuple(one), event.to_json(), "", int(time.time()))
                connection.execute(_INSERT, booked)
            forward = max(history.head, seen.head) + len(missing)
            connection.execute("UPDATE meta SET value = ? WHERE name = 'head'", (str(forward),))
        return missing

    def close(self) -> None:
        """See `Ledger.close`."""
        self._database.close()

    def _check(self, source_id: str | None) -> str:
        """Return the source id of a sound ledger of that source."""
        with self._database.transaction() as connection:
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise LedgerCorrupt(database.damaged(self.path, damage))
            stored = database.meta(connection, "source_id")
        if source_id is not None and stored != source_id:
            raise LedgerError(
                f"ledger {self.path} belongs to the data source {stored!r}, not to "
                f"{source_id!r}; name its own ledger, or correct the source id"
            )
        return stored

    @contextmanager
    def _checked(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction of a ledger that is no older than its witness."""
        with self._database.transaction() as connection:
            if self._witness is not None:
                seen = witness.read(self._witness, self.source_id)
                if seen is not None and _head(connection) < seen.head:
                    raise LedgerError(
                        f"ledger {self.path} stands at {_head(connection)}, but stood at "
                        f"{seen.head} when this site last released something: it was restored "
                        "from a backup. `fedlr ledger recover` books what it lacks"
                    )
            yield connection


def _row(connection: sqlite3.Connection, key: JobKey) -> Any:
    """Return (reserved, committed, job, released) of a key, or None."""
    return connection.execute(_SELECT, astuple(key)).fetchone()


def _joins(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0])


def _head(connection: sqlite3.Connection) -> int:
    return int(database.meta(connection, "head"))


def _history(connection: sqlite3.Connection) -> History:
    rows = connection.execute(_HISTORY).fetchall()
    entries = (
        _times(Entry(str(run), int(day), Release.from_json(str(text))), count)
        for run, day, text, count in rows
    )
    return History(_head(connection), tuple(entries))


def _times(entry: Entry, count: int) -> Entry:
    """Return one entry for ``count`` equal ones."""
    return replace(entry, event=replace(entry.event, steps=entry.event.steps * count))


def _check_head(found: int, expected: int | None) -> None:
    """Raise unless nothing was booked since the caller looked."""
    if expected is not None and found != expected:
        raise LedgerMoved(
            f"the ledger stands at {found}, not at {expected}: something was booked meanwhile; "
            "compute the budget again"
        )


def _check_covered(reserved: Release, actual: Release) -> None:
    """Raise unless ``actual`` is ``reserved`` with at most as many steps."""
    if replace(actual, steps=reserved.steps) != reserved or actual.steps > reserved.steps:
        raise LedgerError(
            f"committed event {actual.to_json()} is not covered by its reservation "
            f"{reserved.to_json()}; the reservation stays open and counts whole"
        )


def _known(key: JobKey) -> str:
    """Message for a key that was reserved before."""
    return f"{key} is already in the ledger; a retry is a new release and needs a new nonce"


def _not_open(key: JobKey) -> str:
    """Message for a commit without an open reservation."""
    return f"{key} has no open reservation; reserve before training, commit once"
