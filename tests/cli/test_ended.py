"""A run that ended before its last round has a result, and an exit status that tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlr.cli.ended import check_ended
from fedlr.cli.main import main
from fedlr.errors import EndedEarly
from fedlr.report.records import read_summary
from tests.cli.small import simulate


def test_a_simulated_run_that_ended_early_says_why_and_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = simulate(tmp_path, "privacy.max_joins=2", status=EndedEarly.exit_code)
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(folder)
    why = told.err.splitlines()[-1]
    assert why.startswith("fedlr: the run ended after 2 of 3 rounds (round 3: 0 of 2 clients")
    assert f"in {folder}" in why
    assert f"resume={folder}" in why
    assert (folder / "adapter" / "adapter_config.json").exists()
    assert read_summary(folder / "summary.json").rounds == 2
    check_ended(folder, 2, "nothing")
    # Gone on with, it reaches nothing more: that is a failure.
    assert main(["simulate", f"resume={folder}"]) == 7
