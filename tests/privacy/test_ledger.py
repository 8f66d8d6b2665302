"""The ledger's contract, run for every store, and what only a file can suffer."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.errors import LedgerCorrupt, LedgerError, LedgerMoved
from fedlr.privacy import database
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import Booking, JobKey, Ledger, MemoryLedger, SqliteLedger

EVENT = Release(1.1, 0.05, 10, "example")
KEY = JobKey("run", 0, "client", "nonce")
ROOT = Path(__file__).resolve().parents[2]


def key(number: int) -> JobKey:
    return JobKey("run", number, "client", "nonce")


class LedgerContract(ABC):
    """Laws of every ledger; a subclass supplies `make`."""

    @abstractmethod
    def make(self, folder: Path) -> Ledger: ...

    @pytest.fixture
    def ledger(self, tmp_path: Path) -> Iterator[Ledger]:
        ledger = self.make(tmp_path)
        yield ledger
        ledger.close()

    def test_starts_empty(self, ledger: Ledger) -> None:
        assert ledger.spent() == ()
        assert ledger.joins() == 0

    def test_an_open_reservation_counts_whole(self, ledger: Ledger) -> None:
        ledger.reserve(KEY, EVENT)
        assert ledger.spent() == (EVENT,)
        assert ledger.joins() == 1

    def test_a_join_above_the_bound_books_nothing(self, ledger: Ledger) -> None:
        assert ledger.reserve(key(0), EVENT, max_joins=2)
        assert ledger.reserve(key(1), EVENT, max_joins=2)
        assert not ledger.reserve(key(2), EVENT, max_joins=2)
        assert ledger.joins() == 2
        assert ledger.spent() == (replace(EVENT, steps=2 * EVENT.steps),)

    def test_the_bound_holds_for_callers_at_the_same_moment(self, ledger: Ledger) -> None:
        barrier, booked = threading.Barrier(8), []

        def join(number: int) -> None:
            barrier.wait()
            booked.append(ledger.reserve(key(number), EVENT, max_joins=3))

        threads = [threading.Thread(target=join, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(booked) == ledger.joins() == 3

    def test_a_commit_replaces_its_reservation(self, ledger: Ledger) -> None:
        ledger.reserve(KEY, EVENT)
        ledger.commit(KEY, replace(EVENT, steps=3))
        assert ledger.spent() == (replace(EVENT, steps=3),)
        assert ledger.joins() == 1

    def test_a_commit_of_nothing_costs_nothing_but_is_a_join(self, ledger: Ledger) -> None:
        ledger.reserve(KEY, EVENT)
        ledger.commit(KEY, replace(EVENT, steps=0))
        assert ledger.spent() == ()
        assert ledger.joins() == 1

    def test_equal_events_add_up_and_different_ones_stay_apart(self, ledger: Ledger) -> None:
        other = replace(EVENT, noise_multiplier=2.0)
        for number in range(3):
            ledger.reserve(key(number), EVENT)
        ledger.commit(key(1), replace(EVENT, steps=4))
        ledger.reserve(key(3), other)
        # 10 + 4 + 10 steps of one mechanism, 10 of the other.
        assert ledger.spent() == (replace(EVENT, steps=24), other)
        assert ledger.joins() == 4

    def test_each_part_of_the_key_distinguishes(self, ledger: Ledger) -> None:
        parts = ({"run": "x"}, {"round": 1}, {"client": "x"}, {"nonce": "x"})
        keys = [KEY, *(replace(KEY, **part) for part in parts)]
        for each in keys:
            ledger.reserve(each, EVENT)
        assert ledger.joins() == 5
        assert ledger.spent() == (replace(EVENT, steps=50),)

    @pytest.mark.parametrize("committed", [False, True])
    def test_a_known_key_cannot_be_reserved(self, ledger: Ledger, committed: bool) -> None:
        ledger.reserve(KEY, EVENT)
        if committed:
            ledger.commit(KEY, EVENT)
        with pytest.raises(LedgerError, match="nonce"):
            ledger.reserve(KEY, replace(EVENT, steps=1))
        assert ledger.spent() == (EVENT,)
        assert ledger.joins() == 1

    def test_only_an_open_reservation_can_be_committed(self, ledger: Ledger) -> None:
        with pytest.raises(LedgerError, match="no open reservation"):
            ledger.commit(KEY, EVENT)
        ledger.reserve(KEY, EVENT)
        ledger.commit(KEY, EVENT)
        with pytest.raises(LedgerError, match="no open reservation"):
            ledger.commit(KEY, replace(EVENT, steps=0))
        assert ledger.spent() == (EVENT,)

    @pytest.mark.parametrize(
        "actual",
        [
            replace(EVENT, steps=11),
            replace(EVENT, noise_multiplier=1.0),
            replace(EVENT, noise_multiplier=2.0),
            replace(EVENT, sample_rate=0.04),
            replace(EVENT, unit="user"),
            replace(EVENT, noise_multiplier=2.0, steps=0),
        ],
    )
    def test_a_commit_beyond_its_reservation_is_refused(
        self, ledger: Ledger, actual: Release
    ) -> None:
        ledger.reserve(KEY, EVENT)
        with pytest.raises(LedgerError, match="not covered"):
            ledger.commit(KEY, actual)
        assert ledger.spent() == (EVENT,)
        ledger.commit(KEY, EVENT)

    def test_a_commit_keeps_its_update_until_the_next_of_its_client(self, ledger: Ledger) -> None:
        assert ledger.recall(key(0)) is None
        ledger.reserve(key(0), EVENT, job="digest")
        assert ledger.recall(key(0)) == Booking("digest", False, None)
        ledger.commit(key(0), EVENT, b"\x00update")
        assert ledger.recall(key(0)) == Booking("digest", True, b"\x00update")
        other = replace(key(0), client="another")
        for name in (other, key(1)):
            ledger.reserve(name, EVENT)
            ledger.commit(name, EVENT, b"later")
            assert ledger.recall(name) == Booking("", True, b"later")
            kept = b"\x00update" if name == other else None
            assert ledger.recall(key(0)) == Booking("digest", True, kept)
            assert ledger.released(name.run, name.round, name.client) == b"later"
            assert ledger.released("run", 0, "client") == kept
        assert ledger.released("run", 2, "client") is None

    def test_a_reservation_at_a_head_that_moved_books_nothing(self, ledger: Ledger) -> None:
        before = ledger.history()
        assert ledger.reserve(key(0), EVENT, head=before.head)
        for late in (before.head, before.head + 2):
            with pytest.raises(LedgerMoved, match="meanwhile"):
                ledger.reserve(key(1), EVENT, head=late)
        assert ledger.joins() == 1
        now = ledger.history().head
        ledger.commit(key(0), EVENT)
        assert ledger.history().head == now + 1 > before.head + 1

    def test_history_by_run_and_day(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        other = replace(EVENT, noise_multiplier=3.0)
        days = 100 * 86_400
        for number, (run, event, later) in enumerate(
            [("a", EVENT, 0), ("a", EVENT, 5), ("b", other, 0), ("b", EVENT, 90_000)]
        ):
            monkeypatch.setattr("fedlr.privacy.ledger.time.time", lambda later=later: days + later)
            ledger.reserve(replace(key(number), run=run), event)
        ledger.commit(replace(key(0), run="a"), replace(EVENT, steps=4))
        history = ledger.history()
        assert set(history.events()) == {replace(EVENT, steps=24), other}
        assert history.events(run="a") == (replace(EVENT, steps=14),)
        assert history.events(run="c") == ()
        assert history.events(since=101) == (EVENT,)
        assert history.events() == ledger.spent()
        assert {(entry.run, entry.day) for entry in history.entries} == {
            ("a", 100),
            ("b", 100),
            ("b", 101),
        }

    def test_a_clock_that_is_set_back_takes_nothing_out_of_a_window(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number, day in enumerate((100, 60, 101)):
            seconds = day * 86_400.0
            monkeypatch.setattr("time.time", lambda seconds=seconds: seconds)
            ledger.reserve(key(number), EVENT)
        history = ledger.history()
        assert sorted((entry.day, entry.event.steps) for entry in history.entries) == [
            (100, 20),
            (101, 10),
        ]
        assert history.events(since=100) == (replace(EVENT, steps=30),)

    def test_joins_of_one_run(self, ledger: Ledger) -> None:
        for number, run in enumerate("aab"):
            ledger.reserve(replace(key(number), run=run), EVENT)
        assert [ledger.joins(run) for run in ("a", "b", "c", None)] == [2, 1, 0, 3]

    def test_data_that_changed_are_noticed_and_keep_their_history(self, ledger: Ledger) -> None:
        ledger.reserve(KEY, EVENT)
        assert [ledger.observe(digest) for digest in "aabba"] == [False, False, True, False, True]
        assert ledger.spent() == (EVENT,)

    def test_a_closed_ledger_refuses(self, ledger: Ledger) -> None:
        ledger.reserve(KEY, EVENT)
        ledger.close()
        ledger.close()
        for call in (ledger.spent, ledger.joins, lambda: ledger.commit(KEY, EVENT)):
            with pytest.raises(LedgerError, match="closed"):
                call()

    def test_threads_share_a_ledger(self, ledger: Ledger) -> None:
        refused: list[LedgerError] = []

        def work(name: str) -> None:
            for number in range(4):
                ledger.reserve(replace(key(number), client=name), EVENT)
                ledger.commit(replace(key(number), client=name), replace(EVENT, steps=1))
            try:
                ledger.reserve(KEY, EVENT)
            except LedgerError as error:
                refused.append(error)

        threads = [threading.Thread(target=work, args=(f"c{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # 4 threads commit 4 single steps each; one of them wins the contested key.
        assert len(refused) == 3
        assert ledger.joins() == 17
        assert ledger.spent() == (replace(EVENT, steps=16 + 10),)


class TestMemoryLedger(LedgerContract):
    def make(self, folder: Path) -> Ledger:
        return MemoryLedger()


class TestSqliteInMemory(LedgerContract):
    def make(self, folder: Path) -> Ledger:
        return SqliteLedger(":memory:")


class TestSqliteOnDisk(LedgerContract):
    def make(self, folder: Path) -> Ledger:
        return SqliteLedger(folder / "ledger.sqlite")


@pytest.mark.parametrize(
    "parts",
    [
        ("", 0, "c", "n"),
        ("r", -1, "c", "n"),
        ("r", 0, "", "n"),
        ("r", 0, "c", ""),
        ("r", 0, 1, "n"),
    ],
)
def test_a_key_is_complete(parts: tuple[str, int, str, str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        JobKey(*parts)


def test_room_is_asked_of_the_disk_that_the_ledger_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    free = shutil.disk_usage(tmp_path)._replace(free=2_000_000 + database.SPARE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", {tmp_path.resolve(): free}.__getitem__)
    ledger.check_room(1_000_000)
    with pytest.raises(LedgerError, match=r"a round needs .*; nothing was booked, make room"):
        ledger.check_room(1_000_001)
    assert ledger.joins() == 0
    ledger.close()


def test_a_reopened_ledger_remembers_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = SqliteLedger(path, source_id="hospital-7")
    first.reserve(key(0), EVENT)
    first.reserve(key(1), EVENT)
    first.commit(key(1), replace(EVENT, steps=2))
    first.close()
    again = SqliteLedger(path)
    assert again.source_id == "hospital-7"
    assert again.spent() == (replace(EVENT, steps=12),)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # The write-ahead log and its index may be there too, as private as the ledger.
    files = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
    assert files.keys() >= {"ledger.sqlite", "ledger.sqlite.witness"}
    assert set(files.values()) == {0o600}
    again.close()
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "ledger.sqlite",
        "ledger.sqlite.witness",
    }


def test_a_ledger_belongs_to_one_source(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    SqliteLedger(path, source_id="a")
    with pytest.raises(LedgerError, match="belongs to"):
        SqliteLedger(path, source_id="b")
    assert SqliteLedger(":memory:").source_id != SqliteLedger(":memory:").source_id


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="does not exist"):
        SqliteLedger(tmp_path / "missing" / "ledger.sqlite")


def test_a_ledger_deleted_in_use_does_not_come_back_empty(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path)
    ledger.reserve(KEY, EVENT)
    path.unlink()
    with pytest.raises(LedgerError):
        ledger.reserve(key(1), EVENT)
    assert not path.exists()


def test_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path)
    for number in range(60):
        ledger.reserve(key(number), EVENT)
    ledger.close()
    whole = path.read_bytes()
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    overwritten = whole[:4096] + b"\xa5" * 4096 + whole[8192:]
    for content in (b"", b"not a ledger" * 400, whole[:-4096], overwritten, foreign.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(LedgerCorrupt):
            SqliteLedger(path)
    path.write_bytes(whole)
    assert SqliteLedger(path).joins() == 60


def test_unknown_events_in_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path)
    ledger.reserve(KEY, EVENT)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET reserved = replace(reserved, 'gaussian', 'laplace')")
    connection.close()
    for call in (ledger.spent, lambda: ledger.commit(KEY, EVENT)):
        with pytest.raises(LedgerError, match="mechanism"):
            call()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema_version'")
    connection.close()
    for call in (lambda: SqliteLedger(path), lambda: ledger.reserve(KEY, EVENT)):
        with pytest.raises(LedgerError, match="upgrade"):
            call()


def test_an_older_schema_is_migrated_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    SqliteLedger(path, source_id="s").reserve(KEY, EVENT)
    step = ("ALTER TABLE entries ADD COLUMN note TEXT NOT NULL DEFAULT ''",)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, step))
    for _ in range(2):
        ledger = SqliteLedger(path, source_id="s")
    ledger.reserve(key(1), EVENT)
    assert ledger.spent() == (replace(EVENT, steps=20),)
    with sqlite3.connect(path) as connection:
        version = connection.execute("SELECT value FROM meta WHERE name = 'schema_version'")
        assert version.fetchone() == (str(len(database.MIGRATIONS)),)
    connection.close()


def test_a_ledger_of_the_first_schema_keeps_what_it_booked(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        for statement in database.MIGRATIONS[0]:
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('source_id', 's')")
        for number, committed in ((0, EVENT.to_json()), (1, None)):
            row = ("run", number, "client", "nonce", EVENT.to_json(), committed)
            connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
    connection.close()
    ledger = SqliteLedger(path, source_id="s")
    assert ledger.spent() == (replace(EVENT, steps=20),)
    assert ledger.recall(key(0)) == Booking("", True, None)
    ledger.commit(key(1), EVENT, b"update")
    assert ledger.recall(key(1)) == Booking("", True, b"update")


def test_a_declaration_and_its_file_are_made_in_one_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(database, "declare", crash)
        with pytest.raises(KeyboardInterrupt):
            SqliteLedger(path, disjoint="patients of 2027 only")
    assert list(tmp_path.iterdir()) == []
    ledger = SqliteLedger(path, disjoint="patients of 2027 only")
    (declared,) = ledger.declarations()
    assert (declared.kind, declared.reason) == ("disjoint", "patients of 2027 only")
    with pytest.raises(LedgerError, match="exists"):
        SqliteLedger(path, disjoint="again")
    assert len(ledger.declarations()) == 1


def test_a_commit_waits_for_the_disk(tmp_path: Path) -> None:
    assert SqliteLedger(tmp_path / "ledger.sqlite").synchronous() == 3  # EXTRA


def test_a_failed_migration_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    SqliteLedger(path).reserve(KEY, EVENT)
    step = ("ALTER TABLE entries ADD COLUMN note TEXT", "ALTER TABLE missing ADD COLUMN note TEXT")
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, step))
        with pytest.raises(LedgerError):
            SqliteLedger(path)
    assert SqliteLedger(path).spent() == (EVENT,)


def spawn(body: str, path: Path) -> subprocess.Popen[str]:
    """Start a child process that has a ledger on ``path`` open."""
    prelude = f"""
        import os, signal, sys
        from pathlib import Path
        from fedlr.errors import LedgerError
        from fedlr.privacy.events import Release
        from fedlr.privacy.ledger import JobKey, SqliteLedger
        event = Release(1.1, 0.05, 10, "example")
        ledger = SqliteLedger(Path({str(path)!r}))
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_killed_between_reserve_and_commit_the_reservation_counts_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    child = spawn(
        """
        ledger.reserve(JobKey("run", 0, "client", "nonce"), event)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    ledger = SqliteLedger(path)
    assert ledger.spent() == (EVENT,)
    with pytest.raises(LedgerError, match="nonce"):
        ledger.reserve(KEY, EVENT)


def test_killed_at_any_time_no_acknowledged_entry_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    child = spawn(
        """
        for number in range(10**6):
            ledger.reserve(JobKey("run", number, "client", "nonce"), event)
            print(number, flush=True)
        """,
        path,
    )
    if child.stdout is None:
        raise RuntimeError("the child has no output pipe")
    child.stdout.readline()
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    acknowledged = 1 + sum(line.endswith("\n") for line in child.stdout)
    child.wait(timeout=60)
    child.stdout.close()
    joins = SqliteLedger(path).joins()
    # The last reservation may be on disk without its acknowledgement, never the reverse.
    assert acknowledged <= joins <= acknowledged + 1


def test_two_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    body = """
        won = 0
        for number in range(25):
            try:
                ledger.reserve(JobKey("run", number, "contested", "nonce"), event)
                won += 1
            except LedgerError:
                pass
            ledger.reserve(JobKey("run", number, str(os.getpid()), "nonce"), event)
        print(won)
    """
    children = [spawn(body, path) for _ in range(2)]
    won = [int(child.communicate(timeout=60)[0]) for child in children]
    # Each contested key has exactly one winner; the 2·25 others never collide.
    assert sum(won) == 25
    assert SqliteLedger(path).joins() == 75


def test_many_ledgers_hold_a_bounded_number_of_handles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = Path("/proc/self/fd")
    if not handles.exists():
        pytest.skip("the platform does not list open handles")
    monkeypatch.setattr(database, "_kept", threading.BoundedSemaphore(4))
    gc.collect()
    before = len(list(handles.iterdir()))
    ledgers = [SqliteLedger(tmp_path / f"{number}.sqlite") for number in range(12)]
    for ledger in ledgers:
        ledger.reserve(KEY, EVENT)
        ledger.commit(KEY, EVENT)
    assert len(list(handles.iterdir())) <= before + 3 * 4
    # One that is let go of makes room for another.
    for ledger in ledgers:
        ledger.close()
    assert len(list(handles.iterdir())) <= before
    again = [SqliteLedger(tmp_path / f"{number}.sqlite") for number in range(4)]
    assert all(ledger.joins() == 1 for ledger in again)
    assert not database._kept.acquire(blocking=False)


def test_a_shared_file_has_no_write_ahead_log(tmp_path: Path) -> None:
    for shared, mode in ((True, "delete"), (False, "wal")):
        path = tmp_path / f"{mode}.sqlite"
        ledger = SqliteLedger(path, shared=shared)
        ledger.reserve(KEY, EVENT)
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == (mode,)
        connection.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_ledger_serves_both_sides_of_a_fork(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    ledger.reserve(key(0), EVENT)
    child = os.fork()
    if child == 0:
        ledger.reserve(key(1), EVENT)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    ledger.reserve(key(2), EVENT)
    assert ledger.joins() == 3
    assert ledger.history().head == 3


def test_two_processes_cannot_jointly_exceed_a_budget(tmp_path: Path) -> None:
    """Each looks, decides, and reserves only if nothing was booked since it looked."""
    path = tmp_path / "ledger.sqlite"
    SqliteLedger(path).close()
    body = """
        from fedlr.errors import LedgerMoved
        won = moved = 0
        for number in range(40):
            while True:
                history = ledger.history()
                if sum(e.steps for e in history.events()) + event.steps > 150:
                    break
                try:
                    key = JobKey("run", number, str(os.getpid()), "nonce")
                    ledger.reserve(key, event, head=history.head)
                    won += 1
                    break
                except LedgerMoved:
                    moved += 1
        print(won, moved)
    """
    children = [spawn(body, path) for _ in range(3)]
    counts = [list(map(int, child.communicate(timeout=120)[0].split())) for child in children]
    assert sum(won for won, _ in counts) == 15
    assert sum(event.steps for event in SqliteLedger(path).spent()) == 150
