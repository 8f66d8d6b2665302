"""The ledger on the disk of the runs: what is booked is there after a kill, to the last step.

A kill does not lose what the system has not yet written to the disk; power failure does, and
cannot be tried here. For that the check asks what SQLite waits for, as a ledger opens its file.
That two processes cannot exceed a budget jointly needs each to see what the other has booked:
one that has the file open while another books is asked to book at the head it saw before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import fedlr
from fedlr.doctor.crash import EVENT, LATE, OPEN, PAID, SOURCE, UPDATE, book
from fedlr.doctor.finding import Result
from fedlr.errors import LedgerError, LedgerMoved
from fedlr.privacy.events import merge
from fedlr.privacy.ledger import SqliteLedger

_SECONDS = 60.0
_LEVELS = ("OFF", "NORMAL", "FULL", "EXTRA")
_DURABLE = 2

PROGRAM = "import pathlib, sys; from fedlr.doctor.crash import book_and_die; \
book_and_die(pathlib.Path(sys.argv[1]))"
"""Python program that books in the ledger of its argument and is killed."""


def survives_a_kill(output: Path) -> Result:
    """Book in another process, kill it with SIGKILL, and read the ledger here.

    Args:
        output: Folder that run folders are made in; the ledger is made in a temporary
            folder there, so that its disk is the one that is tried.
    """
    with _folder(output) as (folder, where):
        path = folder / "doctor.sqlite"
        with closing(SqliteLedger(path, SOURCE)) as ledger:
            level, before = ledger.synchronous(), ledger.history().head
            child = _killed(path)
            if child.returncode != -signal.SIGKILL:
                reason = (child.stderr.strip().splitlines() or [f"exit {child.returncode}"])[-1]
                return Result(False, f"a ledger in {where} cannot be used: {reason}")
            problems = [*_problems(path), *_late(ledger, before)]
    if level < _DURABLE:
        problems.append(
            f"synchronous = {_LEVELS[level]}, bound FULL: power failure can lose what is booked"
        )
    done = (
        f"killed after a reservation in {where}: all {2 * EVENT.steps} steps are still booked, "
        f"synchronous = {_LEVELS[level]}, a booking at an old head is refused"
    )
    return Result(not problems, "; ".join(problems) or done)


def _killed(path: Path) -> subprocess.CompletedProcess[str]:
    home = str(Path(fedlr.__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(path)],
        env={**os.environ, "PYTHONPATH": home},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )


def _problems(path: Path) -> list[str]:
    """Return what the killed process booked and the file lacks."""
    ledger = SqliteLedger(path, SOURCE)
    problems = []
    spent, booked = ledger.spent(), merge([EVENT, EVENT])
    if spent != booked:
        steps = sum(event.steps for event in spent)
        problems.append(f"{steps} steps are booked after a kill, bound {booked[0].steps}")
    if ledger.joins() != 2:
        problems.append(f"{ledger.joins()} jobs are booked after a kill, bound 2")
    paid, left_open = ledger.recall(PAID), ledger.recall(OPEN)
    if paid is None or not paid.committed or paid.update != UPDATE:
        problems.append("a committed update is lost after a kill")
    if left_open is None or left_open.committed:
        problems.append("an open reservation is lost after a kill")
    try:
        book(ledger, OPEN)
        problems.append("a job can be booked twice")
    except LedgerError:
        pass
    ledger.close()
    return problems


def _late(ledger: SqliteLedger, before: int) -> list[str]:
    """Return whether a process that saw the ledger at ``before`` can book as if it stood there."""
    try:
        ledger.reserve(LATE, EVENT, head=before)
    except LedgerMoved:
        return []
    except LedgerError as error:
        return [f"a ledger that another process wrote to cannot be used: {error}"]
    return [f"a job is booked at head {before}, though another process had booked since"]


@contextmanager
def _folder(output: Path) -> Iterator[tuple[Path, str]]:
    """Make a temporary folder in ``output``, or where that will be, or in the system's place."""
    output = output.expanduser().absolute()
    near = next(place for place in (output, *output.parents) if place.is_dir())
    for place in (near, Path(tempfile.gettempdir())):
        try:
            made = tempfile.TemporaryDirectory(prefix=".fedlr-doctor-", dir=place)
        except OSError:
            continue
        with made as folder:
            yield Path(folder), str(place)
        return
    raise OSError(f"neither {near} nor the system's temporary folder can be written")
