"""The privacy ledger of one data source: reserve before training, commit before release.

A reservation that was never committed, because the process died or the round
failed, counts as spent in full: what it computed may have left.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Literal

from fedlr.errors import LedgerCorrupt, LedgerError
from fedlr.privacy import chain, database, witness
from fedlr.privacy.booking import (
    DAY_S,
    RECOVERED,
    Booking,
    Declaration,
    Entry,
    History,
    JobKey,
    Ledger,
    check_covered,
    check_head,
    known,
    not_open,
)
from fedlr.privacy.database import MIGRATIONS, Database
from fedlr.privacy.events import Release
from fedlr.privacy.memory import MemoryLedger
from fedlr.privacy.witness import Lack, Seen

__all__ = ["MIGRATIONS", "Booking", "JobKey", "Ledger", "MemoryLedger", "SqliteLedger"]

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
    f"SELECT run, booked_at / {DAY_S}, COALESCE(committed, reserved), COUNT(*) "
    "FROM entries GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
)
_MARKED = "SELECT 1 FROM meta WHERE name = 'witnessed'"
_MARK = "INSERT OR IGNORE INTO meta VALUES ('witnessed', '1')"


class SqliteLedger:
    """A ledger in one SQLite file (`fedlr.privacy.database.Database`).

    Beside a file lies its witness (`fedlr.privacy.witness`): what had been booked when
    something last left the process. A ledger that knows less, or other things, was
    restored from a backup, and is refused until `recover` books what it lacks. One that
    has released something and has no witness is refused until `declare_loss`.

    The mark that demands a witness is set by the first commit, in its transaction, and
    while that is open a witness of what was booked before is made durable: killed
    anywhere, a ledger has its witness before it needs one, and is past it.

    Attributes:
        path: The file.
        source_id: Identifier of the data source that the ledger belongs to.

    Args:
        path: The file, created with mode 0600 if it does not exist, in a folder
            that does; or ``":memory:"``.
        source_id: Identifier of the data source: stored in a new ledger (by
            default a random one), compared with that of an existing one.
        shared: Whether the file is on storage that several machines write to.
        disjoint: Why a ledger may start empty: no row of its data was in another one.
            Noted in the transaction that makes the file, which must be new. None: an
            existing file will do.

    Raises:
        LedgerError: The folder is missing, the file belongs to another source
            or to a newer version of the program, cannot be opened, is missing while its
            witness is there, or is there although ``disjoint`` is given.
        LedgerCorrupt: The file is damaged or is no ledger.
    """

    def __init__(
        self,
        path: Path | Literal[":memory:"],
        source_id: str | None = None,
        shared: bool = False,
        disjoint: str | None = None,
    ) -> None:
        # A witness lies beside the file itself, whatever link it is opened by.
        self.path = Path(path) if path == ":memory:" else Path(path).resolve()
        self._witness = None if path == ":memory:" else witness.beside(self.path)
        if self._witness is not None and self._witness.exists() and not self.path.exists():
            raise LedgerError(witness.gone(self.path))
        self._database = Database(path, source_id, shared, disjoint)
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
                raise LedgerError(known(key))
            check_head(chain.tip(connection).head, head)
            if max_joins is not None and _joins(connection) >= max_joins:
                return False
            _book(connection, key, event, job)
            return True

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """See `Ledger.commit`."""
        with self._checked() as connection:
            row = _row(connection, key)
            if row is None or row[1] is not None:
                raise LedgerError(not_open(key))
            check_covered(Release.from_json(row[0]), event)
            self._mark(connection)
            connection.execute(_DROP, (key.run, key.client))
            connection.execute(_UPDATE, (event.to_json(), update, *astuple(key)))
            chain.forward(connection, ["commit", *astuple(key), event.to_json()])
            now = _seen(connection)
        self._write(now)

    def check_room(self, size: int) -> None:
        """See `Ledger.check_room`."""
        self._database.check_room(size)

    def recall(self, key: JobKey) -> Booking | None:
        """See `Ledger.recall`."""
        with self._checked() as connection:
            row = _row(connection, key)
            if row is None or row[1] is None:
                return None if row is None else Booking(str(row[2]), False, None)
            now = _seen(connection)
        # Whoever asks may send it: a crash can have come between commit and witness.
        self._write(now)
        return Booking(str(row[2]), True, row[3])

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

    def joins(self, run: str | None = None) -> int:
        """See `Ledger.joins`."""
        with self._checked() as connection:
            return _joins(connection, run)

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

    def declarations(self) -> tuple[Declaration, ...]:
        """Return what its operator has declared, the oldest first."""
        rows = "SELECT kind, reason, head, declared_at FROM declarations ORDER BY rowid"
        with self._checked() as connection:
            found = connection.execute(rows).fetchall()
        return tuple(Declaration(kind, why, head, at // DAY_S) for kind, why, head, at in found)

    def synchronous(self) -> int:
        """See `fedlr.privacy.database.Database.synchronous`."""
        return self._database.synchronous()

    def recover(self) -> Lack:
        """Book what the witness knows and this ledger, restored from a backup, does not.

        Returns:
            What was booked now, one key for each join that was lost; nothing where the
            ledger is past its witness.

        Raises:
            LedgerError: There is no witness, or it is another ledger's.
        """
        path = self._file()
        with self._database.transaction() as connection:
            seen = witness.read(path, self.source_id)
            if seen is None:
                raise LedgerError(
                    witness.absent(self.path)
                    if _marked(connection)
                    else f"{path} does not exist; there is nothing to recover from"
                )
            if chain.passes(connection, seen.point):
                return Lack()
            at = chain.tip(connection)
            lack = witness.lack(seen, _history(connection).events(), _joins(connection), at)
            self._mark(connection)
            _book_lack(connection, lack, seen)
            now = _seen(connection)
        self._write(now)
        return lack

    def declare_loss(self, reason: str) -> None:
        """Note that the witness is lost and that this is the newest ledger; write a new one.

        The declaration moves the head: a witness that is found again is then older.

        Raises:
            LedgerError: No reason is given, or the witness is there or was never needed.
        """
        path = self._file()
        if not reason.strip():
            raise LedgerError("the reason is empty; say how the witness was lost")
        with self._database.transaction() as connection:
            if witness.read(path, self.source_id) is not None or not _marked(connection):
                raise LedgerError(
                    f"ledger {self.path} misses no witness, and no loss can be declared; "
                    f"`fedlr ledger recover {self.path}` alone books what it lacks"
                )
            at = _clock(connection)
            chain.forward(connection, ["loss", reason, at])
            database.declare(connection, "loss", reason, chain.tip(connection).head, at)
            now = _seen(connection)
        self._write(now)

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
        """Run the block in a transaction of a ledger that is past its witness."""
        with self._database.transaction() as connection:
            if self._witness is not None:
                seen = witness.read(self._witness, self.source_id)
                if seen is None and _marked(connection):
                    raise LedgerError(witness.absent(self.path))
                if seen is not None and not chain.passes(connection, seen.point):
                    at = chain.tip(connection)
                    raise LedgerError(witness.restored(self.path, at, seen))
            yield connection

    def _file(self) -> Path:
        """Return the path of the witness."""
        if self._witness is None:
            raise LedgerError("a ledger in memory has no witness, and nothing to recover")
        return self._witness

    def _mark(self, connection: sqlite3.Connection) -> None:
        """Demand a witness from now on, after one of what is booked so far was written."""
        if not _marked(connection):
            self._write(_seen(connection))
            connection.execute(_MARK)

    def _write(self, now: Seen) -> None:
        if self._witness is not None:
            witness.write(self._witness, self.source_id, now)


def _row(connection: sqlite3.Connection, key: JobKey) -> Any:
    """Return (reserved, committed, job, released) of a key, or None."""
    return connection.execute(_SELECT, astuple(key)).fetchone()


def _joins(connection: sqlite3.Connection, run: str | None = None) -> int:
    of_run, keys = ("", ()) if run is None else ("WHERE run IN (?, ?)", (run, RECOVERED))
    found = connection.execute(f"SELECT COUNT(*) FROM entries {of_run}", keys)
    return int(found.fetchone()[0])


def _marked(connection: sqlite3.Connection) -> bool:
    """Return whether the ledger has ever committed anything, since that is noted."""
    return connection.execute(_MARKED).fetchone() is not None


def _clock(connection: sqlite3.Connection) -> int:
    """Return the time, Unix seconds, or that of the latest entry if the clock is behind it."""
    latest = connection.execute("SELECT MAX(booked_at) FROM entries").fetchone()[0]
    return max(int(time.time()), latest or 0)


def _history(connection: sqlite3.Connection) -> History:
    rows = connection.execute(_HISTORY).fetchall()
    entries = (
        Entry(str(run), int(day), Release.from_json(str(text))).times(count)
        for run, day, text, count in rows
    )
    return History(chain.tip(connection).head, tuple(entries))


def _seen(connection: sqlite3.Connection) -> Seen:
    """Return what a witness of this moment says."""
    events = _history(connection).events()
    return Seen(chain.tip(connection), _joins(connection), events, chain.path(connection))


def _book(connection: sqlite3.Connection, key: JobKey, event: Release, job: str = "") -> None:
    """Insert an open reservation and move the head."""
    entry = (*astuple(key), event.to_json(), job, _clock(connection))
    connection.execute(_INSERT, entry)
    chain.forward(connection, ["reserve", *entry])


def _book_lack(connection: sqlite3.Connection, lack: Lack, seen: Seen) -> None:
    """Book what is lacking, and note that the ledger is past the witness."""
    chain.forward(connection, ["recover", *seen.point], beyond=seen.point.head)
    if seen.point.digest:  # or a kill before the next witness would leave it refused
        chain.accept(connection, seen.point)
    template = (lack.events or seen.events or (Release(1.0, 1.0, 0, "example"),))[-1]
    nothing = replace(template, steps=0)
    stamp = time.time_ns()
    for number in range(lack.joins):
        event = lack.events[number] if number < len(lack.events) else nothing
        key = JobKey(RECOVERED, seen.point.head, RECOVERED, f"{stamp}-{number}")
        _book(connection, key, event)
