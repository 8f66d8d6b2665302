"""Twenty-four sites, fifty rounds, and a program killed in every round: the run ends, and the books
are right.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from fedlr.report.records import read_rounds, read_summary
from tests.cli.small import small
from tests.e2e.harness import Federation, federation, fedlr

pytestmark = pytest.mark.e2e

SITES, ROUNDS, ASKED, SPARE = 24, 50, 3, 1
SEED = 20_261_201
LONGEST_S = 3600
SHAPE = [
    *(f"federation.clients={SITES}", f"federation.clients_per_round={ASKED}"),
    *(f"federation.spare_clients={SPARE}", f"federation.rounds={ROUNDS}"),
    *("federation.min_clients=2", "federation.retries=20", "federation.retry_wait_s=5"),
    *("federation.round_timeout_s=60", "federation.longest_pause=4"),
    *("federation.start_timeout_s=600", "federation.evaluate_every=10"),
]


def break_something(made: Federation, draw: random.Random) -> str:
    """Kill an agent, a node or, in one of forty-nine cases, the SuperLink; return which kind."""
    names = ["superlink", *(f"{kind}-{i}" for kind in ("agent", "node") for i in range(SITES))]
    name = draw.choice(names)
    try:
        made.programs[name].kill()
    except ProcessLookupError:
        return "already dead"
    return name.split("-")[0]


def closed(made: Federation, run: str) -> int:
    """The last round that was completed."""
    path = made.run_folder(run) / "rounds.jsonl"
    records = read_rounds(path) if path.exists() else []
    return max((record.round for record in records if record.accepted), default=0)


def kill_as_rounds_pass(made: Federation, run: str) -> Counter[str]:
    """Break something once in every round, until the last one."""
    draw, killed, seen = random.Random(SEED), Counter[str](), 0
    deadline = time.monotonic() + LONGEST_S
    while seen < ROUNDS - 1 and time.monotonic() < deadline:
        if (now := closed(made, run)) > seen:
            seen = now
            killed[break_something(made, draw)] += 1
        time.sleep(0.5)
    return killed


def test_twenty_four_sites_and_a_kill_in_every_round(tmp_path: Path) -> None:
    left_out = ("federation.", "output=")
    words = [word for word in small(tmp_path, rows=20 * SITES) if not word.startswith(left_out)]
    words += SHAPE
    began = time.monotonic()
    with federation(tmp_path, words, SITES, str(tmp_path / "model")) as made:
        up = time.monotonic()
        # At the default step, fifty rounds of noise on twenty rows outgrow what sites accept.
        run = made.begin("privacy.epsilon=20", "optimizer.learning_rate=1e-4")
        killed = kill_as_rounds_pass(made, run)
        assert made.ended(run, 600) == "finished:completed"
        ended = time.monotonic()
        folder = made.run_folder(run)
        records, summary = (
            read_rounds(folder / "rounds.jsonl"),
            read_summary(folder / "summary.json"),
        )
        assert summary.rounds == ROUNDS
        assert sum(killed.values()) >= ROUNDS // 2
        paid = 0
        for index, shown in enumerate(summary.clients):
            fedlr("ledger", "verify", str(made.site(index) / "ledger" / "site.sqlite"))
            assert shown.joins <= made.booked(index)
            if shown.epsilon is not None:
                assert shown.epsilon >= made.spent(index) * (1 - 1e-9)
            paid += made.booked(index)
    refused = Counter(refusal.code for record in records for refusal in record.refused)
    joined = sum(client.joins for client in summary.clients)
    print(
        f"\n{SITES} sites up after {up - began:.0f} s; {ROUNDS} rounds in {ended - up:.0f} s; "
        f"killed {dict(killed)}; refused {dict(refused)}; {joined} updates joined, {paid} paid for"
    )
