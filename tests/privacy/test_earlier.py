"""Ledgers are read before a run as they are, found by client, and never made."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from fedlr.errors import LedgerError
from fedlr.privacy.earlier import Earlier, read_ledger, read_ledgers
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger

EVENT = Release(1.0, 0.1, 5, "example")
NAMES = ["client-000", "client-001"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with one ledger, in which one round is booked."""
    (tmp_path / "ledgers").mkdir()
    with closing(SqliteLedger(tmp_path / "ledgers" / "client-001.sqlite", "one source")) as ledger:
        ledger.reserve(JobKey("run", 0, "client-001", "nonce"), EVENT)
    return tmp_path


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_ledgers_are_read_from_a_run_folder_or_from_their_own(run_folder: Path) -> None:
    for folder in (run_folder, run_folder / "ledgers"):
        found = read_ledgers(folder, NAMES)
        assert list(found) == ["client-001"]
        held = found["client-001"]
        assert held.history.events() == (EVENT,)
        assert (held.joins, held.recovered, held.source_id) == (1, 0, "one source")
    assert Earlier().history.events() == ()


def test_what_is_no_folder_of_ledgers_is_refused_and_nothing_is_made(run_folder: Path) -> None:
    before = contents(run_folder)
    with pytest.raises(LedgerError, match=r"holds no ledger of any client; .* client-007.sqlite"):
        read_ledgers(run_folder, ["client-007"])
    with pytest.raises(LedgerError, match=r"absent' is no folder"):
        read_ledgers(run_folder / "absent", NAMES)
    with pytest.raises(LedgerError, match=r"belongs to the data source 'one source'"):
        read_ledger(run_folder / "ledgers" / "client-001.sqlite", "another")
    with pytest.raises(LedgerError, match=r"client-000\.sqlite cannot be read: No such file"):
        read_ledger(run_folder / "ledgers" / "client-000.sqlite")
    assert contents(run_folder) == before
