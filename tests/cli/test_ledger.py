"""``fedlr ledger`` on real files: what is shown, what is refused, what is mended."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlr.cli import ledger as verb
from fedlr.cli.main import main
from fedlr.errors import LedgerError
from fedlr.privacy import database
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger

EVENT = Release(1.1, 0.05, 10, "example")
OTHER = replace(EVENT, noise_multiplier=2.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two runs; the ledger was put back as it was before the second one."""
    path = tmp_path / "ledger.sqlite"
    for run, event in (("first", EVENT), ("second", OTHER)):
        ledger = SqliteLedger(path, source_id="hospital")
        key = JobKey(run, 0, "client", "nonce")
        ledger.reserve(key, event)
        ledger.commit(key, event, b"update")
        ledger.close()
        shutil.copy(path, tmp_path / f"{run}.sqlite")
    return path


def say(capfd: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    status = main(["ledger", *map(str, words)])
    found = capfd.readouterr()
    assert "Traceback" not in found.err
    return status, found.out + found.err


def test_show_and_export_tell_what_is_booked(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, text = say(capfd, "show", file, "--json", "--delta", "1e-4")
    found = json.loads(text)
    assert status == 0
    assert found["epsilon"] == epsilon([EVENT, OTHER], 1e-4)
    assert found["epsilon_by_run"] == {
        "first": epsilon([EVENT], 1e-4),
        "second": epsilon([OTHER], 1e-4),
    }
    assert (found["source_id"], found["head"], found["joins"]) == ("hospital", 4, 2)
    assert (found["delta"], found["delta_is_default"], found["declarations"]) == (1e-4, False, [])
    table = say(capfd, "show", file)[1]
    assert "at δ = 1e-05 (the default; a site's own δ is in its policy), in all" in table
    assert "default" not in say(capfd, "show", file, "--delta", "1e-5")[1]
    assert "hospital" in table
    assert "10 steps of σ = 1.1, q = 0.05, unit example" in table
    lines = say(capfd, "export", file)[1].splitlines()
    assert [json.loads(line)["run"] for line in lines] == ["first", "second"]
    assert "update" not in "".join(lines)


def test_a_restored_ledger_is_seen_and_mended(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert say(capfd, "verify", file)[0] == 0
    shutil.copy(tmp_path / "first.sqlite", file)
    for action in ("verify", "show", "export"):
        status, text = say(capfd, action, file)
        assert status == 6
        assert "restored from a backup" in text
    status, text = say(capfd, "recover", file)
    assert (status, "booked 10 steps of σ = 2" in text) == (0, True)
    assert "1 entries were added, and count in every run" in text
    assert "twice" not in text
    assert "lacks nothing" in say(capfd, "recover", file)[1]
    assert say(capfd, "verify", file)[0] == 0
    assert set(SqliteLedger(file).spent()) == {EVENT, OTHER}


def test_a_ledger_that_lost_its_witness_names_the_way_out(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    witness = file.with_name(f"{file.name}.witness")
    witness.unlink()
    for words in (("verify", file), ("show", file), ("export", file), ("recover", file)):
        status, text = say(capfd, *words)
        assert status == 6
        assert f'run `fedlr ledger recover {file} --declare-loss "<reason>"`' in text
    assert not witness.exists()
    assert say(capfd, "recover", file, "--declare-loss", "")[0] == 6
    words = ("recover", file, "--declare-loss", "moved to a new disk")
    status, text = say(capfd, *words)
    assert (status, "a new witness lies beside it" in text) == (0, True)
    assert witness.exists()
    for action in ("verify", "show"):
        status, text = say(capfd, action, file)
        assert status == 0
        assert "at head 5: moved to a new disk" in text
    (declared,) = json.loads(say(capfd, "show", file, "--json")[1])["declarations"]
    assert (declared["kind"], declared["head"]) == ("loss", 5)
    status, text = say(capfd, *words)
    assert (status, "misses no witness" in text) == (6, True)


def test_a_ledger_that_went_on_from_a_backup_says_what_counts_twice(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    witness = file.with_name(f"{file.name}.witness")
    newest = witness.read_bytes()
    shutil.copy(tmp_path / "first.sqlite", file)
    witness.unlink()
    assert say(capfd, "recover", file, "--declare-loss", "believed to be the newest")[0] == 0
    ledger = SqliteLedger(file)
    for number in (8, 9):
        ledger.reserve(JobKey("other", number, "client", "nonce"), OTHER)
    ledger.close()
    witness.write_bytes(newest)
    status, text = say(capfd, "verify", file)
    assert (status, "another history" in text) == (6, True)
    status, text = say(capfd, "recover", file)
    assert (status, "some count twice" in text) == (0, True)
    spent = SqliteLedger(file).spent()
    assert set(spent) == {replace(EVENT, steps=20), replace(OTHER, steps=30)}


def test_every_verb_closes_what_it_opened(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened: list[SqliteLedger] = []
    real = SqliteLedger.__init__

    def noted(self: SqliteLedger, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        opened.append(self)

    monkeypatch.setattr(SqliteLedger, "__init__", noted)
    fresh = tmp_path / "fresh.sqlite"
    for words in (
        *((action, file) for action in ("show", "verify", "export", "recover")),
        ("recover", file, "--declare-loss", "refused, for it is there"),
        ("new", fresh, "--disjoint", "patients of 2027 only"),
    ):
        before = len(opened)
        say(capfd, *words)
        assert len(opened) == before + 1
        with pytest.raises(LedgerError, match="closed"):
            opened[-1].joins()


def test_a_new_ledger_needs_a_reason_and_replaces_none(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, text = say(capfd, "new", file)
    assert status == 2
    assert "exists" in text
    assert "--disjoint <reason> is missing" in text
    fresh = tmp_path / "fresh.sqlite"
    words = ("new", fresh, "--source-id", "ward", "--disjoint", "patients of 2027 only")
    assert say(capfd, *words)[0] == 0
    assert SqliteLedger(fresh).source_id == "ward"
    assert SqliteLedger(fresh).joins() == 0
    assert "declared     disjoint, on 2" in say(capfd, "show", fresh)[1]
    assert ": patients of 2027 only" in say(capfd, "verify", fresh)[1]


def test_no_new_ledger_is_there_without_its_declaration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(database, "declare", crash)
    with pytest.raises(MemoryError):
        verb.run(["new", str(tmp_path / "fresh.sqlite"), "--disjoint", "a reason"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("show", "absent.sqlite"), 6, "absent.sqlite does not exist"),
        (("shwo", "x"), 2, "shwo"),
        ((), 2, "required"),
        (("show", "FILE", "--delta", "2"), 2, "--delta = 2.0 must be"),
    ],
)
def test_a_mistake_meets_a_sentence(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    found, text = say(capfd, *(file if word == "FILE" else word for word in words))
    assert found == status
    assert says in text
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} <= {
        "ledger.sqlite-wal",
        "ledger.sqlite-shm",
    }
