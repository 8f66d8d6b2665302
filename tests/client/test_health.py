"""Who serves is told from who does not, and from nobody."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.health import check
from fedlr.cli.main import main
from fedlr.errors import ConfigError, RunError
from tests.client.real_site import agent, place

STATES = health_pb2.HealthCheckResponse


@contextmanager
def answering(address: str, state: int) -> Iterator[str]:
    """A program that answers the question with ``state``; gives the address it is bound to."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", state)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield address.replace(":0", f":{port}")
    finally:
        server.stop(None).wait()


def test_an_agent_serves_while_it_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = place(tmp_path)
    with agent(site) as declaration:
        address = f"unix:{declaration.agent.socket}"
        assert main(["health", address]) == 0
        assert capsys.readouterr().out == f"{address} serves\n"
    assert main(["health", address, "--seconds", "2"]) == RunError.exit_code
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["127.0.0.1:0", "[::1]:0"])
def test_a_program_of_flower_is_asked_at_its_port(place: str) -> None:
    with answering(place, STATES.SERVING) as address:
        check(address)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with answering("127.0.0.1:0", STATES.SERVING) as address:
        check(address)


def test_who_says_no_is_told_from_silence() -> None:
    with (
        answering("127.0.0.1:0", STATES.NOT_SERVING) as address,
        pytest.raises(RunError, match="answers NOT_SERVING, not SERVING"),
    ):
        check(address)


def test_who_never_answers_is_not_waited_for() -> None:
    class Silent(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
        def Check(self, request: object, context: grpc.ServicerContext) -> object:
            over.wait(30)
            return STATES(status=STATES.SERVING)

    over, server = threading.Event(), grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(Silent(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(RunError, match="deadline_exceeded"):
            check(f"127.0.0.1:{port}", seconds=0.3)
    finally:
        over.set()
        server.stop(None).wait()


@pytest.mark.parametrize(
    "address", ["", "unix:", "unix:relative", "127.0.0.1", "http://h:1", "h:x", "dns:///h:1"]
)
def test_an_address_that_cannot_be_meant_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="must be unix:/path"):
        check(address)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_cannot_be_meant_are_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--seconds"):
        check("127.0.0.1:1", seconds)


def test_the_question_loads_nothing_heavy() -> None:
    probe = (
        "import sys\n"
        "from fedlr.cli.main import main\n"
        "main(['health', '127.0.0.1:1', '--seconds', '1'])\n"
        "heavy = {'torch', 'numpy', 'flwr', 'hydra', 'transformers'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
