"""A sweep's folder: what is written is read back, and one process works at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlr.errors import RunError
from fedlr.report.sweep import SweepFacts, hold, read_sweep_facts, write_sweep_facts


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


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(RunError, match="another `fedlr sweep`"), hold(tmp_path):
        raise AssertionError("held twice")
    with hold(tmp_path):
        pass
    with pytest.raises(RunError, match="cannot be written"), hold(tmp_path / "lock"):
        raise AssertionError("held in a file")
