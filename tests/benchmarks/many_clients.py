"""Peak memory round after round: ``python -m tests.benchmarks.many_clients FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .own_process import peak_bytes
from .rounds import LocalRounds, workbench

CLIENTS, PER_ROUND, ROUNDS = 1000, 50, 10

WORDS = (
    "debug=tiny",
    "data.max_examples=null",
    f"federation.clients={CLIENTS}",
    f"federation.clients_per_round={PER_ROUND}",
    "optimizer.expected_batch=3",
    "privacy.accountant=rdp",
)


def main(folder: str) -> None:
    """Print [accepted, peak in bytes] of every round as one line of JSON."""
    rounds = LocalRounds(workbench(*WORDS), Path(folder))
    print(json.dumps([(rounds(), peak_bytes()) for _ in range(ROUNDS)]))
    rounds.close()


if __name__ == "__main__":
    main(sys.argv[1])
