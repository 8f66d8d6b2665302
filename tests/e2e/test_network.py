"""A site whose network is cut for half a minute within a round: the run goes on, and ends.

Server and site have networks of their own, joined by a wire; nothing else is reached from either.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlr.report.records import read_rounds, read_summary
from tests.cli.small import small
from tests.e2e.harness import Federation, brought_up, fedlr, free_port, wait_for
from tests.e2e.namespaces import Wire, missing, wire

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(missing()), reason=missing() or "all is here"),
]

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, CLIENTS, FAR = 4, 2, 1
CUT_S = 30.0
WORDS = [
    *(f"federation.clients={CLIENTS}", f"federation.clients_per_round={CLIENTS}"),
    *(f"federation.rounds={ROUNDS}", "federation.min_clients=1", "federation.retries=5"),
    *("federation.retry_wait_s=2", "federation.round_timeout_s=90", "optimizer.expected_batch=4"),
]


@pytest.fixture(scope="module")
def line() -> Iterator[Wire]:
    with wire() as made, made.inside("server"):
        yield made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, line: Wire) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("network")
    words = [word for word in small(folder) if not word.startswith(("federation.", "output="))]
    port = free_port()
    relay = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.relay", line.here, str(port)], cwd=ROOT
    )
    around = {f"node-{FAR}": line.at("site"), f"agent-{FAR}": line.at("site")}
    found = Federation(folder, [*words, *WORDS], port, {FAR: line.here}, around)
    try:
        with brought_up(found, CLIENTS, str(folder / "model")) as made:
            yield made
    finally:
        relay.terminate()
        relay.wait(20)


def cut(line: Wire, port: int) -> None:
    assert reached(line, port)
    line.set("down")
    try:
        time.sleep(CUT_S)
        assert not reached(line, port)
    finally:
        line.set("up")
    wait_for("the network", lambda: reached(line, port), 30)


def reached(line: Wire, port: int) -> bool:
    """Whether the site's end can connect to the server."""
    code = f"import socket; socket.create_connection(('{line.here}', {port}), 2).close()"
    words = [*line.at("site"), sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_network_that_is_cut_for_half_a_minute_ends_no_run(made: Federation, line: Wire) -> None:
    run = made.begin("optimizer.steps=250", "optimizer.learning_rate=1e-4", "privacy.epsilon=20")
    wait_for("round 1", lambda: made.rounds(run) >= 1, 240)
    wait_for("round 2 at the far site", lambda: made.booked(FAR) >= 2, 120)
    cut(line, made.port)
    assert made.ended(run, 400) == "finished:completed"
    folder = made.run_folder(run)
    records, summary = read_rounds(folder / "rounds.jsonl"), read_summary(folder / "summary.json")
    assert [record.round for record in records] == [1, 2, 3, 4]
    joins = {client.client: client.joins for client in summary.clients}
    print("joins", joins, "refused", [record.refused for record in records])
    print("seconds", [record.wall_s for record in records])
    for index in range(CLIENTS):
        fedlr("ledger", "verify", str(made.site(index) / "ledger" / "site.sqlite"))
        assert joins[f"client-{index:03d}"] <= made.booked(index) <= 2 * ROUNDS
    # It was heard again after the cut.
    assert joins[f"client-{FAR:03d}"] >= 3
    assert sorted(made.online()) == ["site-0", "site-1"]
