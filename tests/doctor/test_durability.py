"""A ledger that forgets is caught; nothing is left behind."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fedlr.doctor import durability
from fedlr.doctor.crash import EVENT, UPDATE
from fedlr.doctor.durability import survives_a_kill
from fedlr.privacy.booking import Booking
from fedlr.privacy.database import Database
from fedlr.privacy.events import merge
from fedlr.privacy.ledger import SqliteLedger


def test_an_honest_ledger_survives_and_leaves_nothing(tmp_path: Path) -> None:
    result = survives_a_kill(tmp_path / "runs" / "not there yet")
    assert result.passed, result.detail
    assert str(tmp_path) in result.detail
    assert "synchronous = EXTRA, a booking at an old head is refused" in result.detail
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **options: Any) -> Any:
        if options["dir"] == tmp_path / "runs":
            raise PermissionError("read-only")
        return real(**options)

    (tmp_path / "runs").mkdir()
    real = tempfile.TemporaryDirectory
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    result = survives_a_kill(tmp_path / "runs")
    assert result.passed
    assert result.detail.startswith(f"killed after a reservation in {tmp_path}:")


DEFECTIVE = """
import os, pathlib, signal, sys
from fedlr.doctor import crash
from fedlr.privacy.ledger import MemoryLedger, SqliteLedger
path = pathlib.Path(sys.argv[1])
ledger = SqliteLedger(path, crash.SOURCE)
crash.book(ledger, crash.PAID)
{middle}
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("middle", "sentence"),
    [
        ("crash.book(MemoryLedger(), crash.OPEN)", "3 steps are booked after a kill, bound 6"),
        ("crash.book(ledger, crash.OPEN)", "a committed update is lost"),
        ("raise ValueError('the disk is full')", "cannot be used: ValueError: the disk is full"),
        (
            "[file.unlink() for file in path.parent.iterdir()]",
            "0 jobs are booked after a kill, bound 2",
        ),
        ("path.write_bytes(b'')", None),
    ],
)
def test_a_ledger_that_forgets_is_caught(
    middle: str, sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "PROGRAM", DEFECTIVE.format(middle=middle))
    if sentence is None:
        with pytest.raises(Exception, match="damaged"):
            survives_a_kill(tmp_path)
    else:
        result = survives_a_kill(tmp_path)
        assert not result.passed
        assert sentence in result.detail
    assert list(tmp_path.iterdir()) == []


def test_open_reservations_that_do_not_count_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteLedger, "spent", lambda self: merge([EVENT]))
    assert "3 steps are booked" in survives_a_kill(tmp_path).detail


def test_a_reservation_that_reads_as_committed_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteLedger, "recall", lambda self, key: Booking("", True, UPDATE))
    assert "an open reservation is lost" in survives_a_kill(tmp_path).detail


def test_a_job_that_can_be_booked_twice_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "book", lambda *_: None)
    assert "booked twice" in survives_a_kill(tmp_path).detail


@pytest.mark.parametrize("level", ["OFF", "NORMAL"])
def test_a_ledger_that_does_not_wait_for_the_disk_is_caught(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Database._open

    def careless(self: Database) -> sqlite3.Connection:
        connection = real(self)
        connection.execute(f"PRAGMA synchronous = {level}")
        return connection

    monkeypatch.setattr(Database, "_open", careless)
    result = survives_a_kill(tmp_path)
    assert not result.passed
    assert f"synchronous = {level}, bound FULL" in result.detail


def test_a_ledger_that_does_not_see_other_processes_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlr.privacy.ledger.check_head", lambda found, expected: None)
    result = survives_a_kill(tmp_path)
    assert not result.passed
    assert "a job is booked at head 0, though another process had booked since" in result.detail
