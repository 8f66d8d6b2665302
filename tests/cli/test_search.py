"""A search: proposals in a file, each a cell; killed and gone on with, it is the same search."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedlr.cli import launch, search
from fedlr.cli.main import main
from fedlr.cli.studies import Range, Search
from fedlr.errors import RunError
from fedlr.report.page import sweep as sweep_page
from fedlr.report.sweep import Sweep, read_sweep
from tests.cli.small import small
from tests.cli.test_sweep import DRY, times

pytest.importorskip("optuna", reason="the search is in the extra 'search'")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = small(tmp_path_factory.mktemp("place"))
    kept = [word for word in words if not word.startswith(("output=", "federation.rounds="))]
    return ["sweep", "sweep=learning_rate", *kept, *DRY]


def searched(place: list[str], output: Path, trials: int, status: int = 0) -> Sweep:
    assert main([*place, f"output={output}", f"search.trials={trials}"]) == status
    return read_sweep(output / "sweeps" / "learning_rate")


def proposals(found: Sweep) -> list[str]:
    return [cell.facts.values["optimizer.learning_rate"] for cell in found.cells]


def states(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / search.FILE)) as database:
        return [row[0] for row in database.execute("select state from trials order by number")]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, BaseException]]:
    """What the runs of the named cells meet instead of being run."""
    met: dict[str, BaseException] = {}
    run_cell = launch.run_cell

    def meeting(config: Any, folder: Path, *rest: Any) -> Any:
        for start, error in met.items():
            if folder.parent.name.startswith(start):
                raise error
        return run_cell(config, folder, *rest)

    monkeypatch.setattr(launch, "run_cell", meeting)
    return met  # type: ignore[return-value]


@pytest.mark.slow  # 10 s
def test_killed_and_gone_on_with_it_is_the_same_search(
    place: list[str], tmp_path: Path, real: dict[str, BaseException]
) -> None:
    whole = searched(place, tmp_path / "whole", 3)
    assert len(set(proposals(whole))) == 3
    assert all(0.25 <= float(text) <= 32 for text in proposals(whole))
    assert all(repr(float(text)) == text for text in proposals(whole))
    assert {cell.state for cell in whole.cells} == {"finished"}
    assert states(whole.folder) == ["COMPLETE"] * 3

    real["001"] = KeyboardInterrupt()
    cut = searched(place, tmp_path / "cut", 3, status=130)
    assert states(cut.folder) == ["COMPLETE", "RUNNING"]
    before = times(cut.cells[0].folder)
    real.clear()
    again = searched(place, tmp_path / "cut", 3)
    assert proposals(again) == proposals(whole)
    assert states(again.folder) == ["COMPLETE"] * 3
    assert times(again.cells[0].folder) == before

    more = searched(place, tmp_path / "cut", 4)
    assert proposals(more)[:3] == proposals(whole)
    assert len(more.cells) == 4
    unchanged = times(more.folder / "cells")
    assert searched(place, tmp_path / "cut", 2).cells == more.cells
    assert times(more.folder / "cells") == unchanged


def test_a_failed_trial_is_tried_twice_and_again_on_the_next_call(
    place: list[str], tmp_path: Path, real: dict[str, BaseException]
) -> None:
    real["000"] = RunError("the machine is on fire")
    found = searched(place, tmp_path, 2, status=7)
    assert [cell.state for cell in found.cells] == ["failed", "finished"]
    assert states(found.folder) == ["FAIL", "COMPLETE"]
    real.clear()
    after = searched(place, tmp_path, 2)
    assert {cell.state for cell in after.cells} == {"finished"}
    assert proposals(after) == proposals(found)


def test_without_optuna_the_extra_is_named(
    place: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlr.cli.main.check_siblings", lambda: None)
        assert main([*place, f"output={tmp_path}"]) == 2
    assert "pip install 'fedlr[search]'" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_proposals_that_repeat_themselves_end_the_search(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_MOST_REPEATS", 3)
    searched(place, tmp_path, 1)
    known = {"optimizer.learning_rate": Range(low=1.0, high=1.00001, log=True)}
    folder = tmp_path / "sweeps" / "learning_rate"
    task = search.Searching(folder, read_sweep(folder).facts, Search(trials=5, parameters=known), 0)
    with pytest.raises(RunError, match=r"the last 3 proposals .* ends with 2 of 5 cells"):
        search.search(task)


def test_a_damaged_file_of_trials_is_told(
    place: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweeps" / "learning_rate"
    folder.mkdir(parents=True)
    (folder / search.FILE).write_text("no database " * 1000)
    searched(place, tmp_path, 1, status=7)
    printed = capfd.readouterr().err
    assert "search.db cannot be read" in printed
    assert "bring it back from a copy, or search anew" in printed
    assert "Traceback" not in printed


def test_a_trial_that_was_left_before_it_drew_draws_what_it_would_have(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = searched(place, tmp_path / "whole", 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "_answer", stop)
        searched(place, tmp_path / "cut", 1, status=130)
    assert proposals(searched(place, tmp_path / "cut", 1)) == proposals(whole)


def test_the_page_asks_for_as_many_trials(place: list[str], tmp_path: Path) -> None:
    found = searched(place, tmp_path, 1)
    assert "search.trials=1 name=learning_rate" in sweep_page.command(found)
