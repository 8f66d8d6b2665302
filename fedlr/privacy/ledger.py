"""The privacy ledger of one data source: reserve before training, commit before release.

A reservation that was never committed, because the process died or the round
failed, counts as spent in full: what it computed may have left.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Literal

from fedlr.errors import LedgerCorrupt, LedgerError
from fedlr.privacy.booking import Booking, JobKey, Ledger
from fedlr.privacy.events import Release, merge

__all__ = ["MIGRATIONS", "Booking", "JobKey", "Ledger", "MemoryLedger", "SqliteLedger"]

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        """CREATE TABLE entries (
            run TEXT NOT NULL,
            round INTEGER NOT NULL,
            client TEXT NOT NULL,
            nonce TEXT NOT NULL,
            reserved TEXT NOT NULL,
            committed TEXT,
            PRIMARY KEY (run, round, client, nonce)
        )""",
        "INSERT INTO meta VALUES ('schema_version', '1')",
    ),
    (
        "ALTER TABLE entries ADD COLUMN job TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE entries ADD COLUMN released BLOB",
    ),
)
"""Statements that take schema version i to i + 1; only ever appended to."""

_BUSY_SECONDS = 30.0
_INSERT = "INSERT INTO entries (run, round, client, nonce, reserved, job) VALUES (?, ?, ?, ?, ?, ?)"
_KEY = "WHERE run = ? AND round = ? AND client = ? AND nonce = ?"
_SELECT = f"SELECT reserved, committed, job, released FROM entries {_KEY}"
_UPDATE = f"UPDATE entries SET committed = ?, released = ? {_KEY}"
_DROP = "UPDATE entries SET released = NULL WHERE run = ? AND client = ? AND released IS NOT NULL"
# Primary SQLite result codes that mean a broken or foreign file; the others
# (busy, read-only, full, no such file) leave the ledger as it was.
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class MemoryLedger:
    """A ledger in memory, gone with the process: for tests and dry runs."""

    def __init__(self) -> None:
        self._reserved: dict[JobKey, Release] = {}
        self._committed: dict[JobKey, Release] = {}
        self._jobs: dict[JobKey, str] = {}
        self._updates: dict[tuple[str, str], tuple[JobKey, bytes]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def reserve(
        self, key: JobKey, event: Release, max_joins: int | None = None, job: str = ""
    ) -> bool:
        """See `Ledger.reserve`."""
        with self._open():
            if key in self._reserved:
                raise LedgerError(_known(key))
            if max_joins is not None and len(self._reserved) >= max_joins:
                return False
            self._reserved[key] = event
            self._jobs[key] = job
            return True

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """See `Ledger.commit`."""
        with self._open():
            if key in self._committed or key not in self._reserved:
                raise LedgerError(_not_open(key))
            _check_covered(self._reserved[key], event)
            self._committed[key] = event
            self._updates[key.run, key.client] = (key, update)

    def recall(self, key: JobKey) -> Booking | None:
        """See `Ledger.recall`."""
        with self._open():
            if key not in self._reserved:
                return None
            latest, update = self._updates.get((key.run, key.client), (None, b""))
            kept = update if latest == key else None
            return Booking(self._jobs[key], key in self._committed, kept)

    def spent(self) -> tuple[Release, ...]:
        """See `Ledger.spent`."""
        with self._open():
            return merge({**self._reserved, **self._committed}.values())

    def joins(self) -> int:
        """See `Ledger.joins`."""
        with self._open():
            return len(self._reserved)

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
    """A ledger in one SQLite file, opened for each call and closed again.

    File, journal and folder are synchronised (``synchronous=EXTRA``), so a call
    that returned survives a power failure. Calls take the file's lock at once
    (``BEGIN IMMEDIATE``) and wait up to 30 s for another process. A new ledger
    is completed under another name and then linked to ``path``, so an existing
    empty file was truncated, and is refused.

    Attributes:
        source_id: Identifier of the data source that the ledger belongs to.

    Args:
        path: The file, created with mode 0600 if it does not exist, in a folder
            that does; or ``":memory:"``.
        source_id: Identifier of the data source: stored in a new ledger (by
            default a random one), compared with that of an existing one.

    Raises:
        LedgerError: The folder is missing, the file belongs to another source
            or to a newer version of the program, or it cannot be opened.
        LedgerCorrupt: The file is damaged or is no ledger.
    """

    def __init__(self, path: Path | Literal[":memory:"], source_id: str | None = None) -> None:
        self._path = Path(path)
        self._memory = _connect(":memory:") if path == ":memory:" else None
        self._lock = threading.Lock()
        self._closed = False
        if self._memory is not None:
            _create(self._memory, source_id)
        elif not self._path.exists():
            _create_file(self._path, source_id)
        self.source_id = self._check(source_id)

    def reserve(
        self, key: JobKey, event: Release, max_joins: int | None = None, job: str = ""
    ) -> bool:
        """See `Ledger.reserve`."""
        with self._transaction() as database:
            if _row(database, key) is not None:
                raise LedgerError(_known(key))
            if max_joins is not None and _joins(database) >= max_joins:
                return False
            database.execute(_INSERT, (*astuple(key), event.to_json(), job))
            return True

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """See `Ledger.commit`."""
        with self._transaction() as database:
            row = _row(database, key)
            if row is None or row[1] is not None:
                raise LedgerError(_not_open(key))
            _check_covered(Release.from_json(row[0]), event)
            database.execute(_DROP, (key.run, key.client))
            database.execute(_UPDATE, (event.to_json(), update, *astuple(key)))

    def recall(self, key: JobKey) -> Booking | None:
        """See `Ledger.recall`."""
        with self._transaction() as database:
            row = _row(database, key)
        return None if row is None else Booking(str(row[2]), row[1] is not None, row[3])

    def spent(self) -> tuple[Release, ...]:
        """See `Ledger.spent`; raises LedgerError on an event it does not know."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT COALESCE(committed, reserved), COUNT(*) FROM entries GROUP BY 1"
            ).fetchall()
        counted = ((Release.from_json(str(text)), count) for text, count in rows)
        return merge(replace(event, steps=event.steps * count) for event, count in counted)

    def joins(self) -> int:
        """See `Ledger.joins`."""
        with self._transaction() as database:
            return _joins(database)

    def close(self) -> None:
        """See `Ledger.close`."""
        with self._lock:
            self._closed = True
            if self._memory is not None:
                self._memory.close()

    def _check(self, source_id: str | None) -> str:
        """Return the source id of a sound ledger of that source."""
        with self._transaction() as database:
            damage = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise LedgerCorrupt(_damaged(self._path, damage))
            stored = _meta(database, "source_id")
        if source_id is not None and stored != source_id:
            raise LedgerError(
                f"ledger {self._path} belongs to the data source {stored!r}, not to "
                f"{source_id!r}; name its own ledger, or correct the source id"
            )
        return stored

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in one durable transaction; roll back if it raises."""
        with self._lock:
            if self._closed:
                raise LedgerError("the ledger is closed; open it again")
            with _translated(self._path), self._connection() as database, _immediate(database):
                # Each time: another process may have upgraded the file meanwhile.
                _migrate(database)
                yield database

    def _connection(self) -> AbstractContextManager[sqlite3.Connection]:
        """Return the connection in memory, or one to the file for this call alone."""
        if self._memory is not None:
            return nullcontext(self._memory)
        if self._path.stat().st_size == 0:
            raise LedgerCorrupt(_damaged(self._path, "it is empty"))
        # mode=rw: a ledger deleted under our feet must not come back empty.
        return closing(_connect(f"{self._path.absolute().as_uri()}?mode=rw"))


def _connect(uri: str) -> sqlite3.Connection:
    """Open a connection without implicit transactions."""
    return sqlite3.connect(
        uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )


@contextmanager
def _immediate(database: sqlite3.Connection) -> Iterator[None]:
    """Hold the writer's lock for the block; commit durably, or roll back if it raises."""
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into those of the ledger."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _DAMAGE:
            raise LedgerCorrupt(_damaged(path, str(error))) from error
        raise LedgerError(
            f"ledger {path} cannot be used ({error}); nothing was booked, check the file, "
            "its folder and other processes, then try again"
        ) from error
    except OSError as error:
        raise LedgerError(
            f"ledger {path} cannot be opened ({error}); restore it, nothing can be released "
            "without it"
        ) from error


def _create_file(path: Path, source_id: str | None) -> None:
    """Make a complete ledger and link it to ``path`` unless another process was faster."""
    if not path.parent.is_dir():
        raise LedgerError(f"ledger folder {path.parent} does not exist; create it first")
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with _translated(path):
        try:
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            with closing(_connect(draft.absolute().as_uri())) as database:
                _create(database, source_id)
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _create(database: sqlite3.Connection, source_id: str | None) -> None:
    """Run every migration on an empty database and name its source."""
    identifier = secrets.token_hex(16) if source_id is None else source_id
    with _immediate(database):
        _run_migrations(database, 0)
        database.execute("INSERT INTO meta VALUES ('source_id', ?)", (identifier,))


def _migrate(database: sqlite3.Connection) -> None:
    """Bring an existing ledger to this program's schema; refuse a newer one."""
    version = int(_meta(database, "schema_version"))
    if version > len(MIGRATIONS):
        raise LedgerError(
            f"ledger schema_version = {version} is newer than {len(MIGRATIONS)}, the newest this "
            "program knows; upgrade the program"
        )
    _run_migrations(database, version)


def _run_migrations(database: sqlite3.Connection, version: int) -> None:
    """Run the steps from ``version`` on, inside the caller's transaction."""
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in statements:
            database.execute(statement)
        database.execute("UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(number),))


def _meta(database: sqlite3.Connection, name: str) -> str:
    """Return one value of the meta table; LedgerCorrupt if it is missing."""
    row = database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise LedgerCorrupt(f"the ledger has no {name}; restore it from a backup")
    return str(row[0])


def _row(database: sqlite3.Connection, key: JobKey) -> Any:
    """Return (reserved, committed, job, released) of a key, or None."""
    return database.execute(_SELECT, astuple(key)).fetchone()


def _joins(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT COUNT(*) FROM entries").fetchone()[0])


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


def _damaged(path: Path, reason: str) -> str:
    """Message for a file that is no sound ledger."""
    return (
        f"ledger {path} is damaged ({reason}); restore it from a backup, nothing can be "
        "released without it"
    )
