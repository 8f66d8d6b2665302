"""A process that books in a ledger and dies: run by `fedlr.doctor.durability` in a child.

It imports no framework, so that the child lives for a fraction of a second.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, Ledger, SqliteLedger

SOURCE = "fedlr doctor"
PAID = JobKey("doctor", 0, "client", "paid")
OPEN = JobKey("doctor", 1, "client", "open")
LATE = JobKey("doctor", 2, "client", "late")
EVENT = Release(noise_multiplier=1.0, sample_rate=0.5, steps=3, unit="example")
UPDATE = b"what the paid job released"


def book(ledger: Ledger, key: JobKey) -> None:
    """Reserve `EVENT` for a job."""
    ledger.reserve(key, EVENT)


def book_and_die(path: Path) -> None:
    """Commit one job, reserve another, and kill this process at once (SIGKILL)."""
    ledger = SqliteLedger(path, SOURCE)
    book(ledger, PAID)
    ledger.commit(PAID, EVENT, UPDATE)
    book(ledger, OPEN)
    os.kill(os.getpid(), signal.SIGKILL)
