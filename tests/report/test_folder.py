"""Run folders: never one over another, and a clear word where none can be made."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from filelock import FileLock

from fedlr.errors import RunError
from fedlr.privacy.booking import JobKey
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report.folder import check_output, create_run_folder, remove_unbegun, write_config
from fedlr.report.sweep import LOCK

NOW = datetime(2031, 2, 3, 4, 5, 6)


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    first, second = (create_run_folder(tmp_path, "name", NOW) for _ in range(2))
    assert first == tmp_path / "2031-02-03" / "04-05-06-name"
    assert second == tmp_path / "2031-02-03" / "04-05-06-name-2"
    assert list(first.iterdir()) == list(second.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "..\\x", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="name ="):
        create_run_folder(tmp_path, name, NOW)
    with pytest.raises(RunError, match="name ="):
        check_output(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_output_inside_a_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(RunError, match=r"output = .*file is not a folder; choose another"):
            check_output(output, "name")
    with pytest.raises(RunError, match="output ="):
        create_run_folder(tmp_path / "file" / "runs", "name", NOW)
    assert (tmp_path / "file").read_text() == "kept"
    check_output(tmp_path / "new" / "runs", "name")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_configuration_is_written_with_versions(tmp_path: Path) -> None:
    write_config(tmp_path, '{"seed":3}')
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"] == {"seed": 3}
    assert {"fedlr", "python", "torch", "flwr", "opacus"} <= set(written["versions"])


def unbegun(folder: Path) -> Path:
    """What a process leaves that is killed before its run begins: a lock and empty ledgers."""
    (folder / "journal").mkdir(parents=True)
    (folder / "journal" / "lock").touch()
    (folder / "ledgers").mkdir()
    SqliteLedger(folder / "ledgers" / "client-000.sqlite", "run/client-000").close()
    (folder / "ledgers" / "client-001.sqlite").touch()
    return folder


def test_what_never_began_is_removed(tmp_path: Path) -> None:
    remove_unbegun(unbegun(tmp_path / "run"))
    remove_unbegun(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "left",
    ["run.json", "rounds.jsonl", "summary.json", "journal/sending.json", "ledgers/x.sqlite"],
)
def test_what_has_spent_is_not_removed_whatever_it_has_lost(tmp_path: Path, left: str) -> None:
    run = unbegun(tmp_path / "run")
    (run / left).write_text("no ledger, and not empty", encoding="utf-8")
    with pytest.raises(RunError, match=r"resume it|bring run\.json back from a copy, or move"):
        remove_unbegun(run)
    assert (run / "ledgers" / "client-000.sqlite").exists()


def test_a_ledger_with_an_entry_is_kept(tmp_path: Path) -> None:
    run = unbegun(tmp_path / "run")
    with closing(SqliteLedger(run / "ledgers" / "client-000.sqlite", "run/client-000")) as ledger:
        ledger.reserve(JobKey("run", 0, "client-000", "nonce"), Release(1.0, 0.1, 1, "example"))
    with pytest.raises(RunError, match=r"as ledgers/client-000\.sqlite tells"):
        remove_unbegun(run)


def test_a_run_that_is_just_beginning_is_not_removed(tmp_path: Path) -> None:
    run = unbegun(tmp_path / "run")
    with FileLock(run / LOCK), pytest.raises(RunError, match="another process works at"):
        remove_unbegun(run)
    assert run.exists()
