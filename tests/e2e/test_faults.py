"""Programs that die in the middle of a run, and nodes that may not connect: the run ends, no ledger
under-counts, and nothing is lost.

One federation with a tiny model; the tests follow one another in it, each with a run of its own.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlr.deploy.certificates import new_authority, new_node_key
from fedlr.report.records import RoundRecord, read_rounds, read_summary
from tests.cli.small import small
from tests.deploy.test_certificates import write_authority
from tests.e2e.harness import Federation, Program, federation, fedlr, free_port, wait_for

pytestmark = pytest.mark.e2e

ROUNDS = 4
CLIENTS = 3
PATIENCE = [
    *("federation.min_clients=2", "federation.retries=5", "federation.retry_wait_s=2"),
    *("federation.round_timeout_s=40", "federation.longest_pause=2"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("faults")
    left_out = ("federation.", "output=")
    words = [word for word in small(folder) if not word.startswith(left_out)]
    size = [f"federation.clients={CLIENTS}", f"federation.clients_per_round={CLIENTS}"]
    words += [*size, f"federation.rounds={ROUNDS}", *PATIENCE, "optimizer.expected_batch=4"]
    with federation(folder, words, CLIENTS, str(folder / "model")) as found:
        yield found


def long_run(made: Federation) -> str:
    """A run whose rounds take a few seconds at the sites, past its first round."""
    before = [made.booked(index) for index in range(CLIENTS)]
    run = made.begin("optimizer.steps=250", "optimizer.learning_rate=1e-4", "privacy.epsilon=20")
    wait_for("round 1", lambda: made.rounds(run) >= 1, 200)
    wait_for("round 2 at a site", lambda: made.booked(0) > before[0] + 1, 60)
    return run


def check(made: Federation, run: str, before: list[int]) -> list[RoundRecord]:
    """The run came to its end; each ledger is whole and holds at least what its site joined."""
    assert made.ended(run) == "finished:completed"
    folder = made.run_folder(run)
    summary = read_summary(folder / "summary.json")
    assert summary.rounds == ROUNDS
    clients = {client.client: client for client in summary.clients}
    for index in range(CLIENTS):
        fedlr("ledger", "verify", str(made.site(index) / "ledger" / "site.sqlite"))
        spent = made.booked(index) - before[index]
        shown = clients[f"client-{index:03d}"]
        assert shown.joins <= spent <= 2 * ROUNDS
        # Of everything in the ledger, which earlier tests have written to: never less than that.
        assert shown.epsilon is not None
        assert shown.epsilon >= made.spent(index) * (1 - 1e-9) > 0.0
    assert (folder / "adapter" / "adapter_config.json").exists()
    return read_rounds(folder / "rounds.jsonl")


@pytest.fixture
def before(made: Federation) -> list[int]:
    return [made.booked(index) for index in range(CLIENTS)]


def test_an_agent_that_is_killed_while_it_trains_forfeits_a_round(
    made: Federation, before: list[int]
) -> None:
    run = long_run(made)
    made.programs["agent-0"].kill()
    check(made, run, before)
    assert made.programs["agent-0"].starts == 2


def test_a_superlink_that_is_killed_comes_back_to_its_runs(
    made: Federation, before: list[int]
) -> None:
    run = long_run(made)
    made.programs["superlink"].kill()
    records = check(made, run, before)
    assert made.programs["superlink"].starts == 2
    assert [record.round for record in records] == [1, 2, 3, 4]


def test_a_node_that_is_killed_is_done_without_until_it_is_back(
    made: Federation, before: list[int]
) -> None:
    run = long_run(made)
    made.programs["node-1"].kill()
    assert [record.round for record in check(made, run, before)] == [1, 2, 3, 4]
    wait_for("the node", lambda: len(made.online()) == CLIENTS, 150)


def test_a_client_app_that_is_killed_costs_its_round(made: Federation, before: list[int]) -> None:
    run = long_run(made)
    found = subprocess.run(
        ["pgrep", "-g", str(made.programs["node-2"].pid), "-f", "flwr-clientapp"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    for pid in found:
        os.kill(int(pid), signal.SIGKILL)
    assert [record.round for record in check(made, run, before)] == [1, 2, 3, 4]


def test_a_run_whose_server_app_is_killed_goes_on_under_the_same_order(
    made: Federation, before: list[int]
) -> None:
    run = long_run(made)
    made.programs["superexec"].kill()
    assert made.ended(run) != "finished:completed"
    made.submit_again(run)
    check(made, run, before)


def stranger(made: Federation, name: str, **files: bytes) -> Program:
    """A node like the first one, with other files in the place of its key or its authority."""
    folder = made.folder / name
    folder.mkdir()
    text = (made.site(0) / "fedlr-supernode.service").read_text()
    for file, content in files.items():
        path = folder / file
        path.write_bytes(content)
        path.chmod(0o600)
        original = "ca.crt" if file == "ca" else file
        text = text.replace(str(made.site(0) / "node" / original), str(path))
    text = re.sub(r"--port \d+", f"--port {free_port()}", text)
    unit = folder / "node.service"
    unit.write_text(text)
    return made.start(name, unit)


def test_a_key_that_is_not_registered_is_kept_out(made: Federation) -> None:
    private, _ = new_node_key()
    node = stranger(made, "unregistered", key=private)
    wait_for("the refusal", lambda: node.starts >= 2, 60)
    assert len(made.online()) == CLIENTS
    node.stop()


def test_a_server_of_another_authority_is_not_spoken_to(made: Federation) -> None:
    other = write_authority(made.folder, new_authority("other"), "other").read_bytes()
    node = stranger(made, "mistrusting", ca=other)
    time.sleep(10)
    wait_for("the refusal", lambda: "certificate" in node.text.lower(), 60)
    assert len(made.online()) == CLIENTS
    node.stop()


def test_a_ledger_that_is_damaged_keeps_its_agent_from_serving(made: Federation) -> None:
    agent = made.programs["agent-2"]
    agent.stop()
    ledger = made.site(2) / "ledger" / "site.sqlite"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[: len(whole) // 2])
    told = fedlr("agent", str(made.site(2) / "site.toml"), status=None, seconds=60)
    assert "ledger" in told
    assert "serving" not in told
    ledger.write_bytes(whole)
    agent.start()
    wait_for("the agent", lambda: agent.text.count("serving at") >= 2, 60)


def test_the_paths_of_a_site_are_named_as_the_guide_names_them(made: Federation) -> None:
    site = made.site(0)
    for path in ("site.toml", "ledger/site.sqlite", "node/key", "node/key.pub"):
        assert (site / Path(path)).exists()
