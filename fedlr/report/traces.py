"""What tells that a run has begun, though the file that says what it was is gone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from fedlr.report.records import ROUNDS_FILE, SUMMARY_FILE

LEDGERS = "ledgers"
"""Folder of the ledgers that a run made for itself, in the run folder."""

_LEFT = (ROUNDS_FILE, SUMMARY_FILE, "journal/sending*", "journal/checkpoint*")


def trace(run: Path) -> str | None:
    """Return a file that only a run leaves which may have released something; None without one.

    A run makes its folder, its journal and empty ledgers before it begins: those alone are
    what a process left that was killed before.

    Args:
        run: A run folder, whether it exists or not.

    Returns:
        The file, as a path below ``run``. A ledger that cannot be read is one: nothing
        tells that it is empty.
    """
    for pattern in _LEFT:
        for path in sorted(run.glob(pattern)):
            return str(path.relative_to(run))
    for path in sorted((run / LEDGERS).glob("*.sqlite")):
        if not _is_empty(path):
            return str(path.relative_to(run))
    return None


def _is_empty(ledger: Path) -> bool:
    """Return whether a ledger holds no release, reserved or committed."""
    try:
        place = f"file:{quote(str(ledger.resolve()))}?mode=ro"
        with closing(sqlite3.connect(place, uri=True)) as database:
            known = "SELECT 1 FROM sqlite_master WHERE name = 'entries'"
            if database.execute(known).fetchone() is None:
                return True
            return database.execute("SELECT 1 FROM entries LIMIT 1").fetchone() is None
    except (OSError, sqlite3.Error):
        return False
