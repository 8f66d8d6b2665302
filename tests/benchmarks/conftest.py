"""One report per pytest run; its table is printed, and saved, when the run ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .machine import describe
from .report import Report

JSON_VARIABLE = "FEDLR_BENCH_JSON"
"""Environment variable: where the report is written instead of ``build/bench.json``."""

_KEY = pytest.StashKey[Report]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """The report that this run prints at its end."""
    stash = request.config.stash
    if _KEY not in stash:
        stash[_KEY] = Report()
    return stash[_KEY]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print one table and write it as JSON, if there was a benchmark."""
    found = config.stash.get(_KEY, None)
    if found is None:
        return
    machine = describe()
    path = Path(os.environ.get(JSON_VARIABLE) or config.rootpath / "build" / "bench.json")
    found.save(path, machine)
    terminalreporter.section("benchmarks")
    for line in [*found.table(machine), "", f"written to {path}"]:
        terminalreporter.write_line(line)
