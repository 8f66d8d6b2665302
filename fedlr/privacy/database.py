"""The file under a ledger: durable transactions, one schema, nothing ever made twice."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from fedlr.errors import LedgerCorrupt, LedgerError

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
    (
        # Unix seconds; 0 for what was booked before they were kept.
        "ALTER TABLE entries ADD COLUMN booked_at INTEGER NOT NULL DEFAULT 0",
        "CREATE TABLE fingerprints (sha256 TEXT NOT NULL, seen_at INTEGER NOT NULL)",
        # Every reservation and every commit so far moved the head by one.
        """INSERT INTO meta SELECT 'head', COUNT(*) + COUNT(committed) FROM entries""",
    ),
    (
        # Points of the running hash (`fedlr.privacy.chain`), from a random start.
        """CREATE TABLE chain (
            head INTEGER NOT NULL,
            digest TEXT NOT NULL,
            PRIMARY KEY (head, digest)
        ) WITHOUT ROWID""",
        """INSERT INTO chain SELECT CAST(value AS INTEGER), lower(hex(randomblob(32)))
            FROM meta WHERE name = 'head'""",
        "DELETE FROM meta WHERE name = 'head'",
        """CREATE TABLE declarations (
            kind TEXT NOT NULL,
            reason TEXT NOT NULL,
            head INTEGER NOT NULL,
            declared_at INTEGER NOT NULL
        )""",
        """INSERT INTO declarations SELECT 'disjoint', value, 0, 0
            FROM meta WHERE name = 'disjoint'""",
        "DELETE FROM meta WHERE name = 'disjoint'",
    ),
)
"""Statements that take schema version i to i + 1; only ever appended to."""

KEPT_OPEN = 200
"""Ledgers of one process that keep their connection (three file handles); the others
open one for each call, which takes about forty milliseconds more a round."""

SPARE_BYTES = 262_144
"""Room that a commit needs beside its update: pages of both tables, their logs, a witness."""

_BUSY_SECONDS = 30.0
# Primary SQLite result codes that mean a broken or foreign file; the others
# (busy, read-only, full, no such file) leave the ledger as it was.
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

_kept = threading.BoundedSemaphore(KEPT_OPEN)


class Database:
    """A SQLite file of the current schema, or one in memory.

    The file is in write-ahead mode with every commit synchronised
    (``synchronous=EXTRA``), so a transaction that returned survives a power failure;
    write-ahead needs all processes on one machine, so a file on shared storage uses the
    rollback journal instead. A new file is completed under another name and then linked
    into place: an existing empty one was truncated, and is refused. So is a file that
    was replaced or deleted while it was in use.

    Args:
        path: The file, made with mode 0600 where it is missing, in a folder that is there.
        source_id: Identifier that a new file gets; None draws one.
        shared: Whether processes on other machines use the file too; decided when the
            file is made, which keeps it.
        disjoint: Why a new file starts empty; noted in the transaction that makes it.
            None: an existing file will do.

    Raises:
        LedgerError: The folder is missing, or the file cannot be opened, is of a newer
            version of the program, or is there although ``disjoint`` declares it new.
        LedgerCorrupt: The file is damaged, or is no ledger.
    """

    def __init__(
        self,
        path: Path | Literal[":memory:"],
        source_id: str | None,
        shared: bool = False,
        disjoint: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._mode = "DELETE" if shared else "WAL"
        self._lock = threading.Lock()
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._counted = False
        self._owner = (0, 0)
        self._in_memory = path == ":memory:"
        if self._in_memory:
            self._connection = _connect(":memory:")
            _create(self._connection, source_id, disjoint)
        elif disjoint is not None or not self.path.exists():
            self._create_file(source_id, disjoint)

    def close(self) -> None:
        """Release the file; any later transaction raises LedgerError."""
        with self._lock:
            self._closed = True
            self._let_go()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in one durable transaction; roll back if it raises."""
        with self._lock:
            if self._closed:
                raise LedgerError("the ledger is closed; open it again")
            with _translated(self.path), self._connected() as connection, _immediate(connection):
                # Each time: another process may have upgraded the file meanwhile.
                _migrate(connection)
                yield connection

    def check_room(self, size: int) -> None:
        """Raise LedgerError unless ``size`` bytes and what is written beside them have room.

        They are counted twice: once in the log, once where SQLite moves them from there.
        """
        if self._in_memory:
            return
        with _translated(self.path):
            free = shutil.disk_usage(self.path.parent).free
        if free < (needed := 2 * size + SPARE_BYTES):
            raise LedgerError(
                f"the disk under ledger {self.path} has {free} bytes left, a round needs {needed}; "
                "nothing was booked, make room"
            )

    def synchronous(self) -> int:
        """Return what a commit waits for, asked of the connection in use.

        Returns:
            SQLite's level: 0 and 1 may lose commits when power fails, 2 (FULL) and
            3 (EXTRA) do not.
        """
        with self.transaction() as connection:
            return int(connection.execute("PRAGMA synchronous").fetchone()[0])

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Give the connection that is kept, or one for the block alone."""
        if self._in_memory and self._connection is not None:
            yield self._connection
            return
        status = self.path.stat()
        if status.st_size == 0:
            raise LedgerCorrupt(damaged(self.path, "it is empty"))
        # A connection does not survive a fork, nor is it one to a file that took its place.
        if self._owner != (os.getpid(), status.st_ino):
            self._let_go()
        if self._connection is None and _kept.acquire(blocking=False):
            try:
                self._connection = self._open()
            except BaseException:
                _kept.release()
                raise
            self._counted, self._owner = True, (os.getpid(), status.st_ino)
        if self._connection is not None:
            yield self._connection
        else:
            with closing(self._open()) as connection:
                yield connection

    def _open(self) -> sqlite3.Connection:
        # mode=rw: a ledger deleted under our feet must not come back empty.
        connection = _connect(f"{self.path.absolute().as_uri()}?mode=rw")
        try:
            connection.execute("PRAGMA synchronous = EXTRA")
        except BaseException:
            connection.close()
            raise
        return connection

    def _create_file(self, source_id: str | None, disjoint: str | None) -> None:
        """Make a complete ledger and link it into place unless another process was faster."""
        path = self.path
        if not path.parent.is_dir():
            raise LedgerError(f"ledger folder {path.parent} does not exist; create it first")
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with _translated(path):
            try:
                os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
                with closing(_connect(draft.absolute().as_uri())) as connection:
                    connection.execute("PRAGMA synchronous = EXTRA")
                    connection.execute(f"PRAGMA journal_mode = {self._mode}")
                    _create(connection, source_id, disjoint)
                os.link(draft, path)
            except FileExistsError as error:
                if disjoint is not None:
                    raise LedgerError(
                        f"ledger {path} exists; rows that it knows keep their history there"
                    ) from error
            finally:
                draft.unlink(missing_ok=True)
            synchronise(path.parent)

    def _let_go(self) -> None:
        if self._connection is not None and self._owner[0] in (0, os.getpid()):
            self._connection.close()
        if self._counted and self._owner[0] == os.getpid():
            _kept.release()
        self._connection, self._counted = None, False

    def __del__(self) -> None:
        try:
            self._let_go()
        except (AttributeError, TypeError):
            return  # the interpreter ends: what is called is None already


def meta(connection: sqlite3.Connection, name: str) -> str:
    """Return one value of the meta table; LedgerCorrupt if it is missing."""
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise LedgerCorrupt(f"the ledger has no {name}; restore it from a backup")
    return str(row[0])


def declare(connection: sqlite3.Connection, kind: str, reason: str, head: int, at: int) -> None:
    """Note a declaration of the operator (`fedlr.privacy.booking.Declaration`)."""
    connection.execute("INSERT INTO declarations VALUES (?, ?, ?, ?)", (kind, reason, head, at))


def synchronise(folder: Path) -> None:
    """Make the names in ``folder`` durable: a new file outlives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(path: Path, reason: str) -> str:
    """Return the message for a file that is no sound ledger."""
    return (
        f"ledger {path} is damaged ({reason}); restore it from a backup, nothing can be "
        "released without it"
    )


def _connect(uri: str) -> sqlite3.Connection:
    """Open a connection without implicit transactions."""
    return sqlite3.connect(
        uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )


@contextmanager
def _immediate(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the writer's lock for the block; commit durably, or roll back if it raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into those of the ledger."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _DAMAGE:
            raise LedgerCorrupt(damaged(path, str(error))) from error
        raise LedgerError(
            f"ledger {path} cannot be used ({error}); nothing was booked, check the file, "
            "its folder and other processes, then try again"
        ) from error
    except OSError as error:
        raise LedgerError(
            f"ledger {path} cannot be opened ({error}); restore it, nothing can be released "
            "without it"
        ) from error


def _create(connection: sqlite3.Connection, source_id: str | None, disjoint: str | None) -> None:
    """Run every migration on an empty database, name its source, and note why it is empty."""
    identifier = secrets.token_hex(16) if source_id is None else source_id
    with _immediate(connection):
        _run_migrations(connection, 0)
        connection.execute("INSERT INTO meta VALUES ('source_id', ?)", (identifier,))
        if disjoint is not None:
            declare(connection, "disjoint", disjoint, 0, int(time.time()))


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring an existing ledger to this program's schema; refuse a newer one."""
    version = int(meta(connection, "schema_version"))
    if version > len(MIGRATIONS):
        raise LedgerError(
            f"ledger schema_version = {version} is newer than {len(MIGRATIONS)}, the newest this "
            "program knows; upgrade the program"
        )
    _run_migrations(connection, version)


def _run_migrations(connection: sqlite3.Connection, version: int) -> None:
    """Run the steps from ``version`` on, inside the caller's transaction."""
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in statements:
            connection.execute(statement)
        connection.execute(
            "UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(number),)
        )
