"""The suite's own machinery: coverage of the interval, and no number without parity."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import JSON_VARIABLE
from .interval import rank, spread
from .machine import ROOT
from .ratios import Side, alternate
from .report import ParityFailed, Report, at_least, at_most

NOTHING = Side("nothing", lambda: None)


@pytest.mark.parametrize("count", [6, 9, 30])
def test_interval_covers_the_median_of_a_skewed_law_as_often_as_it_says(count: int) -> None:
    draws = np.random.default_rng(0).lognormal(0.0, 1.0, (4000, count))  # median 1
    covered = np.mean([s.low <= 1.0 <= s.high for s in map(spread, draws.tolist())])
    k = rank(count)
    assert k is not None
    exact = 1 - 2 * sum(math.comb(count, i) for i in range(k)) / 2**count
    assert exact >= 0.95
    assert covered == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


@pytest.mark.parametrize("count", [6, 9, 30])
def test_a_tighter_interval_would_cover_too_little(count: int) -> None:
    k = rank(count)
    assert k is not None
    assert 1 - 2 * sum(math.comb(count, i) for i in range(k + 1)) / 2**count < 0.95


def test_five_values_have_no_interval_and_none_no_median() -> None:
    few = spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (few.median, few.low, few.high) == (3.0, None, None)
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite"):
            spread(bad)


def test_pairs_alternate_in_random_order_after_one_warm_up_each() -> None:
    said: list[str] = []
    sides = (Side(name, lambda name=name: said.append(name)) for name in ("a", "b"))
    first, second = alternate(*sides, 40)
    assert said[:2] == ["a", "b"]
    assert len(first) == len(second) == 40
    pairs = list(zip(said[2::2], said[3::2], strict=True))
    assert set(pairs) == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize("figure", [2e-4, math.nan, math.inf])
def test_a_failed_parity_gives_no_row(figure: float) -> None:
    report = Report()
    with pytest.raises(ParityFailed, match="step: parity"):
        report.parity("step", figure, 1e-4, "B").ratio(NOTHING, NOTHING, 1)
    assert report.rows == []
    assert "withheld: step: parity" in report.table(MACHINE)[-1]


def test_rows_reach_table_and_file_with_their_parity(tmp_path: Path) -> None:
    report = Report()
    gate = report.parity("step", 3e-7, 1e-4, "B, relative")
    gate.quotients("ours / theirs", ([2.0] * 9, [2.0] * 9), "2 s", at_most(1.05), "a remark")
    gate.absolute("time of ours", lambda: [7.0], "ms", at_least(8))
    gate.ratio(NOTHING, NOTHING, 6)
    table = report.table(MACHINE)
    (ours,) = [line for line in table if "ours / theirs" in line]
    assert ours.split()[-4:] == ["3.0e-07", "≤", "1.05", "met"]
    assert any("7.000 ms" in line and "≥ 8 MISSED" in line for line in table)
    assert "· a remark" in table
    report.save(tmp_path / "new" / "bench.json", MACHINE)
    saved = json.loads((tmp_path / "new" / "bench.json").read_text(encoding="utf-8"))
    assert [row["found"]["count"] for row in saved["rows"]] == [9, 1, 6]
    assert {row["parity"] for row in saved["rows"]} == {3e-7}
    assert saved["machine"] == MACHINE


def test_a_goal_is_judged_by_the_far_end_of_the_interval() -> None:
    wide = spread([0.9, 1.0, 1.0, 1.0, 1.0, 1.2])
    assert (at_most(1.2).met(wide), at_most(1.1).met(wide)) == (True, False)
    assert (at_least(0.9).met(wide), at_least(0.95).met(wide)) == (True, False)


RED_AND_GREEN = """
from tests.benchmarks.ratios import Side

SIDE = Side("side", lambda: None)

def test_red(report):
    report.parity("unequal", 1.0, 1e-4, "B").ratio(SIDE, SIDE, 1)

def test_green(report):
    report.parity("equal", 0.0, 1e-4, "B").ratio(SIDE, SIDE, 1)
"""


def test_a_red_parity_fails_its_benchmark_and_the_table_says_so(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.benchmarks.conftest import *\n")
    (tmp_path / "test_two.py").write_text(RED_AND_GREEN)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: v for name, v in os.environ.items() if name != JSON_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    lines = done.stdout.splitlines()
    assert any(line.startswith("equal") and "side / side" in line for line in lines)
    assert any(line.startswith("withheld: unequal: parity 1 > 0.0001") for line in lines)
    saved = json.loads((tmp_path / "build" / "bench.json").read_text(encoding="utf-8"))
    assert [row["setting"] for row in saved["rows"]] == ["equal"]


MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "usable_cores": 2,
    "torch_threads": 1,
    "clock": "wall",
    "memory_bytes": 2**30,
    "load_average": [0.0, 0.0, 0.0],
    "os": "an operating system",
    "python": "3",
    "versions": {"torch": "2"},
    "revision": None,
    "date": "2026-01-01T00:00:00+00:00",
}
