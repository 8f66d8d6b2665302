"""The running hash of a ledger: every booking moves the head and is chained to all before it.

digest = SHA-256(previous digest ‖ canonical JSON of the booking). A ledger starts from 256
random bits, so two ledgers never share a history, not even those of one data source. What
a point (head, digest) stands for is everything booked up to it; the update that left with a
commit is not hashed.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from fedlr.errors import LedgerCorrupt

REMEMBERED = 1024
"""Newest points that a witness keeps: a backup of the last 512 rounds is known by one of them."""

_SHORT = 16
_TIP = "SELECT head, digest FROM chain ORDER BY head DESC LIMIT 1"
_PATH = (
    f"SELECT head || ':' || substr(digest, 1, {_SHORT}) FROM chain "
    f"ORDER BY head DESC LIMIT {REMEMBERED}"
)


class Point(NamedTuple):
    """Where a ledger stands.

    Attributes:
        head: Number of bookings and more; it only ever grows.
        digest: Hexadecimal, of all that was booked up to there; "" where the head alone
            is known, from a witness of an older version.
    """

    head: int
    digest: str

    def short(self) -> str:
        """Return the point as it stands in a `path`."""
        return f"{self.head}:{self.digest[:_SHORT]}"


def tip(connection: sqlite3.Connection) -> Point:
    """Return where the ledger stands; LedgerCorrupt where it does not say."""
    row = connection.execute(_TIP).fetchone()
    if row is None:
        raise LedgerCorrupt("the ledger has no head; restore it from a backup")
    return Point(int(row[0]), str(row[1]))


def passes(connection: sqlite3.Connection, point: Point) -> bool:
    """Return whether everything that ``point`` stands for is in this ledger."""
    if not point.digest:
        return tip(connection).head >= point.head
    found = connection.execute("SELECT 1 FROM chain WHERE head = ? AND digest = ?", point)
    return found.fetchone() is not None


def path(connection: sqlite3.Connection) -> str:
    """Return the newest `REMEMBERED` points, short, newest first, with spaces between."""
    return " ".join(text for (text,) in connection.execute(_PATH))


def forward(connection: sqlite3.Connection, content: Sequence[object], beyond: int = 0) -> None:
    """Move the head by a booking, inside the caller's transaction.

    Args:
        connection: Of the ledger.
        content: What is booked, of strings and integers, its kind first.
        beyond: A head that the new one must exceed as well.
    """
    before = tip(connection)
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(f"{before.digest}{text}".encode()).hexdigest()
    accept(connection, Point(max(before.head, beyond) + 1, digest))


def accept(connection: sqlite3.Connection, point: Point) -> None:
    """Note that everything that ``point`` stands for is in this ledger."""
    connection.execute("INSERT OR IGNORE INTO chain VALUES (?, ?)", point)
