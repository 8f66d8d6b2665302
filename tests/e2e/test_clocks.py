"""Sites whose clocks are minutes off: what Flower, the order and the ledger make of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from fedlr.report.records import read_rounds
from tests.cli.small import small
from tests.e2e.harness import Federation, Program, bring_up, fedlr, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("faketime") is None, reason="the package faketime is not here"),
]

ROUNDS = 2
WORDS = [
    *("federation.clients=2", "federation.clients_per_round=2", f"federation.rounds={ROUNDS}"),
    *("federation.start_timeout_s=20", "optimizer.expected_batch=4"),
]


def off_by(seconds: int) -> list[str]:
    """Words before a command whose clock is off; what measures durations stays as it is."""
    return ["env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f", f"{seconds:+d}s"]


@pytest.fixture(scope="module")
def around() -> dict[str, list[str]]:
    """Gets the words of a program before that is started anew."""
    return {}


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, around: dict[str, list[str]]
) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("clocks")
    words = [word for word in small(folder) if not word.startswith(("federation.", "output="))]
    found = Federation(folder, [*words, *WORDS], around=around)
    try:
        bring_up(found, 2, str(folder / "model"))
        yield found
    except BaseException:
        print(found.logs())
        raise
    finally:
        found.stop()


def again(made: Federation, name: str, words: list[str]) -> Program:
    """Start a program anew, with words before it."""
    before = made.programs[name]
    before.stop()
    before.around = words
    before.start()
    return before


@pytest.mark.parametrize("seconds", [600, -600])
def test_an_agent_ten_minutes_off_takes_part(made: Federation, seconds: int) -> None:
    before, served = made.booked(1), made.programs["agent-1"].text.count("serving at")
    agent = again(made, "agent-1", off_by(seconds))
    wait_for("the agent", lambda: agent.text.count("serving at") > served)
    run = made.begin()
    assert made.ended(run) == "finished:completed"
    assert made.booked(1) == before + ROUNDS


def test_an_agent_half_an_hour_behind_refuses_the_order(made: Federation) -> None:
    before, served = made.booked(1), made.programs["agent-1"].text.count("serving at")
    agent = again(made, "agent-1", off_by(-1_800))
    wait_for("the agent", lambda: agent.text.count("serving at") > served)
    run = made.begin()
    assert made.ended(run) != "finished:completed"
    assert "set the clock, or submit anew" in agent.text
    assert made.booked(1) == before
    fedlr("ledger", "verify", str(made.site(1) / "ledger" / "site.sqlite"))
    again(made, "agent-1", [])
    wait_for("the agent", lambda: agent.text.count("serving at") > served + 1)
    run = made.begin()
    assert made.ended(run) == "finished:completed"
    assert all(not record.refused for record in read_rounds(made.run_folder(run) / "rounds.jsonl"))


@pytest.mark.parametrize("seconds", [600, -600])
def test_a_node_ten_minutes_off_is_kept_out(made: Federation, seconds: int) -> None:
    node = again(made, "node-1", off_by(seconds))
    starts, length = node.starts, len(node.text)
    time.sleep(30)
    told = node.text[length:]
    print(f"{seconds:+d} s: {node.starts - starts} starts\n{told[-1500:]}")
    assert made.online() == ["site-0"]
    again(made, "node-1", [])
    wait_for("the node", lambda: len(made.online()) == 2, 150)
