"""A sweep's folder: what is written is read back, and one process works at it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlr.errors import RunError
from fedlr.report.sweep import (
    SweepFacts,
    hold,
    read_sweep,
    read_sweep_facts,
    write_sweep_facts,
)
from tests.report.sweeps import make_sweep


@pytest.mark.parametrize("search", [True, False])
def test_the_facts_come_back(tmp_path: Path, search: bool) -> None:
    facts = SweepFacts(
        name="mine",
        study=None,
        about="",
        fixed=("debug=tiny",),
        axes={"privacy.epsilon": ("1", "inf"), "seed": ()},
        search=search,
    )
    write_sweep_facts(tmp_path, facts)
    assert read_sweep_facts(tmp_path) == facts
    path = tmp_path / "sweep.json"
    path.write_text(path.read_text().replace(str(search).lower(), "1"))
    with pytest.raises(RunError, match=r"search = 1 must be of type bool"):
        read_sweep_facts(tmp_path)


def without(path: Path, *names: str) -> None:
    known = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        del known[name]
    path.write_text(json.dumps(known), encoding="utf-8")


def test_a_folder_of_before_sweeps_tuned_is_untuned(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "old", {"method": ("fedsvd",), "seed": ("0", "1")})
    found = read_sweep(folder)
    cells = [cell.folder / "cell.json" for cell in found.cells]
    without(folder / "sweep.json", "variants", "tuning")
    for path in cells:
        without(path, "tuned", "tuning")
    assert read_sweep(folder) == found
    write_sweep_facts(folder, found.facts)
    without(folder / "sweep.json", "tuning")  # no version wrote one of them alone
    with pytest.raises(RunError, match="lacks the key tuning"):
        read_sweep(folder)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(RunError, match="another `fedlr sweep`"), hold(tmp_path):
        raise AssertionError("held twice")
    with hold(tmp_path):
        pass
    with pytest.raises(RunError, match="cannot be written"), hold(tmp_path / "lock"):
        raise AssertionError("held in a file")
