"""Ledgers that were restored from backups, and kills between a ledger and its witness."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from fedlr.errors import LedgerError
from fedlr.privacy import chain, database, witness
from fedlr.privacy import ledger as ledger_module
from fedlr.privacy.events import Release, merge
from fedlr.privacy.ledger import JobKey, SqliteLedger

EVENT = Release(1.1, 0.05, 10, "example")
OTHER = replace(EVENT, noise_multiplier=2.0)
KEY = JobKey("run", 0, "client", "nonce")


def key(number: int) -> JobKey:
    return replace(KEY, round=number)


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.witness")


def join(path: Path, *numbers: int, event: Release = EVENT) -> None:
    """Pay for whole rounds in the ledger at `path`."""
    ledger = SqliteLedger(path, source_id="s")
    for number in numbers:
        ledger.reserve(key(number), event)
        ledger.commit(key(number), event)
    ledger.close()


def keep(path: Path, name: str) -> tuple[Path, Path]:
    """Make a backup of a closed ledger and of its witness."""
    pair = path.with_name(name), path.with_name(f"{name}.its-witness")
    shutil.copy(path, pair[0])
    shutil.copy(beside(path), pair[1])
    return pair


def restored(folder: Path) -> Path:
    """A ledger that was put back as it was after its first of three rounds."""
    path = folder / "ledger.sqlite"
    join(path, 0)
    backup, _ = keep(path, "backup.sqlite")
    join(path, 1)
    join(path, 2, event=OTHER)
    shutil.copy(backup, path)
    return path


def every_call(ledger: SqliteLedger) -> list[Callable[[], object]]:
    return [
        ledger.spent,
        ledger.joins,
        ledger.history,
        ledger.declarations,
        lambda: list(ledger.entries()),
        lambda: ledger.recall(KEY),
        lambda: ledger.released("run", 0, "client"),
        lambda: ledger.reserve(key(9), EVENT),
        lambda: ledger.commit(KEY, EVENT),
        lambda: ledger.observe("x"),
    ]


def test_a_restored_backup_is_refused_until_it_is_recovered(tmp_path: Path) -> None:
    path = restored(tmp_path)
    ledger = SqliteLedger(path)
    for call in every_call(ledger):
        with pytest.raises(LedgerError, match="restored from a backup"):
            call()
    lack = ledger.recover()
    assert set(lack.events) == {EVENT, OTHER}
    assert not lack.doubled
    # A run may have been the one that is lost: what is recovered counts in all of them.
    assert set(ledger.history().events(run="never heard of")) == {EVENT, OTHER}
    assert ledger.joins("never heard of") == 2
    # As much as was ever released, and a second time changes nothing.
    assert set(ledger.spent()) == {replace(EVENT, steps=20), OTHER}
    assert ledger.recover() == witness.Lack()
    assert ledger.reserve(key(9), EVENT)
    assert ledger.history().head > 6


def test_every_lost_join_counts_against_the_bound(tmp_path: Path) -> None:
    """Three of one mechanism, and one that released nothing: one entry each."""
    path = tmp_path / "ledger.sqlite"
    join(path, 0)
    backup, _ = keep(path, "backup.sqlite")
    join(path, 1, 2, 3)
    ledger = SqliteLedger(path)
    ledger.reserve(key(4), EVENT)
    ledger.commit(key(4), replace(EVENT, steps=0))
    ledger.close()
    shutil.copy(backup, path)
    ledger = SqliteLedger(path)
    assert ledger.recover() == witness.Lack((replace(EVENT, steps=30),), 4)
    assert ledger.joins() == 5
    assert ledger.spent() == (replace(EVENT, steps=40),)
    assert not ledger.reserve(key(9), EVENT, max_joins=5)
    assert ledger.reserve(key(9), EVENT, max_joins=6)


def test_a_backup_that_lost_a_commit_alone_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    join(path, 0)
    ledger = SqliteLedger(path)
    ledger.reserve(key(1), EVENT)
    ledger.close()
    backup, _ = keep(path, "backup.sqlite")
    ledger = SqliteLedger(path)
    ledger.commit(key(1), EVENT)
    head = ledger.history().head
    ledger.close()
    shutil.copy(backup, path)
    ledger = SqliteLedger(path)
    assert ledger.recover() == witness.Lack()
    assert ledger.history().head > head
    assert ledger.spent() == (replace(EVENT, steps=20),)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_backup_that_went_on_is_another_history(tmp_path: Path, rounds: int) -> None:
    """Restored with its witness, it booked as much, less or more; then the newer witness comes."""
    path = tmp_path / "ledger.sqlite"
    join(path, 0)
    backup, old = keep(path, "backup.sqlite")
    join(path, 1, 2)
    _, newer = keep(path, "newer.sqlite")
    shutil.copy(backup, path)
    shutil.copy(old, beside(path))
    join(path, *range(10, 10 + rounds))
    shutil.copy(newer, beside(path))
    ledger = SqliteLedger(path)
    says = "another history" if rounds > 1 else "but stood at 6"
    for call in every_call(ledger):
        with pytest.raises(LedgerError, match=says):
            call()
    assert ledger.recover().doubled
    # 3 rounds of the one history and 1 + rounds of the other; the common one is not known.
    assert ledger.spent() == (replace(EVENT, steps=10 * (3 + 1 + rounds)),)
    assert ledger.joins() == 3 + 1 + rounds
    head = ledger.history().head
    assert head > 6
    ledger.close()
    join(path, 20)
    assert SqliteLedger(path).history().head == head + 2


def test_a_backup_of_either_history_is_known_after_a_recovery(tmp_path: Path) -> None:
    path = restored(tmp_path)
    SqliteLedger(path).recover()
    join(path, 5)
    shutil.copy(tmp_path / "backup.sqlite", path)
    ledger = SqliteLedger(path)
    lack = ledger.recover()
    assert (lack.doubled, lack.joins) == (False, 3)
    assert set(ledger.spent()) == {replace(EVENT, steps=30), OTHER}


def test_a_backup_older_than_what_a_witness_remembers_counts_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = chain._PATH.replace(str(chain.REMEMBERED), "4")
    monkeypatch.setattr(chain, "_PATH", newest)
    path = restored(tmp_path)
    ledger = SqliteLedger(path)
    assert ledger.recover().doubled
    assert set(ledger.spent()) == {replace(EVENT, steps=30), OTHER}


def test_every_booking_is_chained_to_all_before_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path, source_id="s")
    ledger.reserve(KEY, EVENT, job="digest")
    ledger.commit(KEY, replace(EVENT, steps=3))
    (entry,) = ledger.entries()
    ledger.close()
    with sqlite3.connect(path) as connection:
        points = connection.execute("SELECT head, digest FROM chain ORDER BY head").fetchall()
    connection.close()
    bookings = [
        ["reserve", *astuple(KEY), EVENT.to_json(), "digest", entry["booked_at"]],
        ["commit", *astuple(KEY), replace(EVENT, steps=3).to_json()],
    ]
    digest = points[0][1]
    assert points[0][0] == 0
    for number, booking in enumerate(bookings, start=1):
        text = digest + json.dumps(booking, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert points[number] == (number, digest)
    seen = witness.read(beside(path), "s")
    assert seen is not None
    assert (seen.point, seen.joins) == ((2, digest), 1)
    # Two ledgers of one source share no history, whatever they book.
    with sqlite3.connect(":memory:") as one, sqlite3.connect(":memory:") as two:
        starts = []
        for connection in (one, two):
            database._create(connection, "s", None)
            starts.append(chain.tip(connection))
    assert starts[0].head == starts[1].head == 0
    assert starts[0].digest != starts[1].digest


def test_a_ledger_without_its_witness_is_refused_until_the_loss_is_declared(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.sqlite"
    join(path, 0, 1)
    before = beside(path).read_bytes()
    beside(path).unlink()
    ledger = SqliteLedger(path, source_id="s")
    for call in (*every_call(ledger), ledger.recover):
        with pytest.raises(LedgerError, match=r"recover .*ledger\.sqlite --declare-loss"):
            call()
    assert not beside(path).exists()
    ledger.declare_loss("the new disk came without it")
    ledger.close()
    ledger = SqliteLedger(path, source_id="s")
    (declared,) = ledger.declarations()
    assert (declared.kind, declared.reason) == ("loss", "the new disk came without it")
    assert declared.head == ledger.history().head == 5
    assert declared.day >= ledger.history().entries[0].day > 0
    assert ledger.spent() == (replace(EVENT, steps=20),)
    seen = witness.read(beside(path), "s")
    assert seen is not None
    assert seen.point.head == 5
    # The old one, found again, is older and no obstacle; what went missing later is.
    beside(path).write_bytes(before)
    assert ledger.reserve(key(2), EVENT)
    ledger.commit(key(2), EVENT)
    beside(path).unlink()
    with pytest.raises(LedgerError, match="declare-loss"):
        ledger.spent()


def test_a_loss_is_declared_only_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path, source_id="s")
    ledger.reserve(KEY, EVENT)
    with pytest.raises(LedgerError, match="misses no witness"):
        ledger.declare_loss("it never had one")
    with pytest.raises(LedgerError, match="nothing to recover from"):
        ledger.recover()
    ledger.commit(KEY, EVENT)
    with pytest.raises(LedgerError, match="misses no witness"):
        ledger.declare_loss("it is there")
    beside(path).unlink()
    with pytest.raises(LedgerError, match="reason is empty"):
        ledger.declare_loss(" ")
    with pytest.raises(LedgerError, match="in memory"):
        SqliteLedger(":memory:").declare_loss("no file")


def older(path: Path) -> None:
    """Make a ledger of schema 3 with one round that was paid for and one left open."""
    with sqlite3.connect(path) as connection:
        for statements in database.MIGRATIONS[:3]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("UPDATE meta SET value = '3' WHERE name = 'schema_version'")
        connection.execute("UPDATE meta SET value = '3' WHERE name = 'head'")
        connection.execute("INSERT INTO meta VALUES ('source_id', 's'), ('disjoint', 'new rows')")
        for number, committed in ((0, EVENT.to_json()), (1, None)):
            row = (*astuple(key(number)), EVENT.to_json(), committed, "", None, 86_400)
            connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    connection.close()


@pytest.mark.parametrize("witnessed", [False, True])
def test_a_ledger_of_an_older_schema_works_and_needs_a_witness_from_its_next_commit(
    tmp_path: Path, witnessed: bool
) -> None:
    path = tmp_path / "ledger.sqlite"
    older(path)
    if witnessed:
        content = {"source_id": "s", "head": 3, "events": [replace(EVENT, steps=20).to_json()]}
        beside(path).write_text(json.dumps(content))
    ledger = SqliteLedger(path, source_id="s")
    assert ledger.history().head == 3
    assert ledger.spent() == (replace(EVENT, steps=20),)
    assert [declared.reason for declared in ledger.declarations()] == ["new rows"]
    ledger.commit(key(1), EVENT)
    assert ledger.history().head == 4
    beside(path).unlink()
    with pytest.raises(LedgerError, match="declare-loss"):
        ledger.spent()


def test_an_older_witness_still_sees_a_restored_backup(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    older(path)
    content = {"source_id": "s", "head": 6, "events": [replace(EVENT, steps=30).to_json()]}
    beside(path).write_text(json.dumps(content))
    ledger = SqliteLedger(path, source_id="s")
    with pytest.raises(LedgerError, match="but stood at 6"):
        ledger.spent()
    assert ledger.recover() == witness.Lack((EVENT,), 1)
    assert ledger.spent() == (replace(EVENT, steps=30),)
    assert ledger.history().head > 6


def test_a_ledger_that_is_gone_is_not_started_anew(tmp_path: Path) -> None:
    path = restored(tmp_path)
    path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        SqliteLedger(path)
    assert not path.exists()
    shutil.copy(tmp_path / "backup.sqlite", path)
    assert SqliteLedger(path).recover().events != ()


def test_a_witness_of_another_source_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    join(path, 0)
    text = beside(path).read_text()
    digest = json.loads(text)["digest"]
    for content, says in (
        (text.replace('"s"', '"t"'), "not of 's'"),
        (text[:-9], r"damaged .* recover .*ledger\.sqlite --declare-loss"),
        ("[]", "damaged"),
        (text.replace(digest, digest[::-1]), "another history"),
    ):
        beside(path).write_text(content)
        with pytest.raises(LedgerError, match=says):
            SqliteLedger(path).spent()


def test_only_what_may_be_sent_again_costs_a_look_at_the_whole_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    ledger.reserve(key(0), EVENT)
    ledger.reserve(key(1), EVENT)
    ledger.commit(key(1), EVENT, b"update")
    looks = []
    real = ledger_module._history

    def history(connection: sqlite3.Connection) -> object:
        looks.append(connection)
        return real(connection)

    monkeypatch.setattr(ledger_module, "_history", history)
    for unpaid in (0, 7):
        ledger.recall(key(unpaid))
    assert looks == []
    assert ledger.recall(key(1)) is not None
    assert len(looks) == 1


def test_a_paid_update_does_not_leave_again_without_its_witness(tmp_path: Path) -> None:
    """Killed between the commit and its witness: whoever asks again gets both."""
    path = tmp_path / "ledger.sqlite"
    join(path, 0)
    before = beside(path).read_bytes()
    join(path, 1)
    beside(path).write_bytes(before)
    SqliteLedger(path).recall(key(1))
    seen = witness.read(beside(path), "s")
    assert seen is not None
    assert seen.point.head == 4


def test_a_witness_that_cannot_be_written_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    join(path, 0)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fedlr.privacy.witness.os.fsync", full)
    with pytest.raises(LedgerError, match="No space left on device"):
        join(path, 1)
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def first_commit(path: Path) -> None:
    ledger = SqliteLedger(path, source_id="s")
    ledger.commit(KEY, EVENT, b"update")


def recover(path: Path) -> None:
    SqliteLedger(path, source_id="s").recover()


def declare(path: Path) -> None:
    SqliteLedger(path, source_id="s").declare_loss("killed while it was declared")


def killed(path: Path, act: Callable[[Path], None], at: int) -> bool:
    """Act in a process that dies at the `at`-th step of its writing; return whether it did."""
    child = os.fork()
    if child == 0:
        steps = iter(range(10**6))

        def step(call: Callable[..., object]) -> Callable[..., object]:
            def stepping(*arguments: object, **named: object) -> object:
                if next(steps) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = call(*arguments, **named)
                if next(steps) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            return stepping

        witness.write = step(witness.write)  # type: ignore[assignment]
        chain.forward = step(chain.forward)  # type: ignore[assignment]
        Path.replace = step(Path.replace)  # type: ignore[assignment, method-assign]
        witness.synchronise = step(witness.synchronise)  # type: ignore[assignment]
        try:
            act(path)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def opened(folder: Path) -> Path:
    path = folder / "ledger.sqlite"
    ledger = SqliteLedger(path, source_id="s")
    ledger.reserve(KEY, EVENT)
    ledger.close()
    return path


def bereft(folder: Path) -> Path:
    path = folder / "ledger.sqlite"
    join(path, 0)
    beside(path).unlink()
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "act", "truth"),
    [
        (opened, first_commit, [EVENT]),
        (restored, recover, [EVENT, EVENT, OTHER]),
        (bereft, declare, [EVENT]),
    ],
)
def test_killed_between_ledger_and_witness_nothing_is_lost_and_nobody_locked_out(
    tmp_path: Path,
    make: Callable[[Path], Path],
    act: Callable[[Path], None],
    truth: list[Release],
) -> None:
    at = 0
    while True:
        folder = tmp_path / str(at)
        folder.mkdir()
        path = make(folder)
        died = killed(path, act, at)
        ledger = SqliteLedger(path, source_id="s")
        try:
            ledger.spent()
        except LedgerError:
            # Not done yet, and the same way out is open; a commit is never refused.
            assert act is not first_commit
            act(path)
        assert ledger.spent() == merge(truth)
        assert ledger.declarations() or act is not declare
        ledger.reserve(key(9), EVENT)
        ledger.commit(key(9), EVENT)
        assert ledger.spent() == merge([*truth, EVENT])
        assert beside(path).exists()
        ledger.close()
        if not died:
            break
        at += 1
    assert at >= 8
