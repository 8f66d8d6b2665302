"""``fedlr ledger`` on real files: what is shown, what is refused, what is mended."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.cli.main import main
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
    table = say(capfd, "show", file)[1]
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
    assert "lacks nothing" in say(capfd, "recover", file)[1]
    assert say(capfd, "verify", file)[0] == 0
    assert set(SqliteLedger(file).spent()) == {EVENT, OTHER}


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
