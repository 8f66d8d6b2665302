"""The engine ``ray`` gives what the engine in one process gives, and ends when it should."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from client.app import make_client_app
from fedlr.errors import RunError
from fedlr.methods.method import ClientUpdate, Parts
from fedlr.report.records import Refusal
from fedlr.training.jobs import Abstention, Job
from server import simulation
from server.app import make_server_app
from server.grid import identify_process
from server.hooks import Hooks
from server.membership import gather
from server.messages import status_query
from server.outcome import Outcome
from server.simulation import RaySettings, check_ray, run_on_ray
from server.watched import Stopped, WatchedGrid
from tests.server.toys import (
    PROVENANCE,
    ToySite,
    assert_same_parts,
    config,
    evaluate,
    grid_of,
    run,
    strategy,
    toy_sites,
)

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is in the extra 'ray'"
)

MANY = 100


@dataclass
class Mortal(ToySite):
    """Fails in round 1, in a process of its own by taking that down."""

    main: int = 0

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        if job.round == 0:
            if os.getpid() != self.main:
                os._exit(1)
            raise MemoryError
        return super().answer(job)


def many_sites() -> list[ToySite]:
    """New ones for each engine: what they remember would travel with every message."""
    return [*toy_sites(MANY - 1), Mortal("client-99", seed=99, main=os.getpid())]


def on_ray(
    sites: Sequence[ToySite], settings: Any, hooks: Hooks | None = None, engine: Any = None
) -> Outcome:
    finished: list[Outcome] = []
    server = make_server_app(lambda _: strategy(settings, hooks=hooks), finished.append)
    client = make_client_app(lambda context: sites[int(context.node_config["partition-id"])])
    run_on_ray(server, client, len(sites), engine or RaySettings())
    return finished[0]


@pytest.mark.slow  # 15 s
@needs_ray
def test_a_hundred_clients_and_a_dead_process_are_as_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The start waits for all nodes; a dead process costs its own client one round, no more."""
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:1")  # reserved: would never answer
    settings = config(rounds=2, clients=MANY, clients_per_round=MANY, start_timeout_s=120.0)
    expected = run(many_sites(), settings)
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    identity = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    found = on_ray(many_sites(), settings)
    assert [record.accepted for record in found.records] == [MANY - 1, MANY]
    assert found.records[0].refused == (Refusal("client-99", "failed"),)
    assert_same_parts(found.parts, expected.parts)
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGINT) is handler
    assert identity == (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    said = capfd.readouterr()
    assert "DEPRECATED" not in said.err + said.out


@pytest.mark.slow
@needs_ray
def test_ctrl_c_ends_a_run_on_ray() -> None:
    measured = 0

    def interrupt(parts: Parts) -> tuple[float, float]:
        nonlocal measured
        measured += 1
        if measured == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(parts)

    with pytest.raises(KeyboardInterrupt):
        on_ray(toy_sites(), config(rounds=10**6, start_timeout_s=60.0), Hooks(interrupt))
    assert measured < 10**4
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"fedlr\[ray\]"):
        check_ray()


@needs_ray
def test_an_address_without_a_cluster_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RunError, match=rf"127\.0\.0\.1:{port}.*no Ray cluster"):
        on_ray(toy_sites(), config(), engine=RaySettings(address=f"127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        (RaySettings(cpus_per_client=4), True),
        (RaySettings(cpus_per_client=5), False),
        (RaySettings(gpus_per_client=0.5), True),
        (RaySettings(cpus_per_client=2, gpus_per_client=0.5), False),
    ],
)
def test_some_machine_must_hold_a_whole_client(settings: RaySettings, fits: bool) -> None:
    """Four CPUs here, one CPU and a GPU there, and a machine that has left."""
    nodes = [
        {"Resources": {"CPU": 4.0}},
        {"Resources": {"CPU": 1.0, "GPU": 1.0}},
        {"Resources": {}},
    ]
    if fits:
        simulation._check_capacity(nodes, settings)
        return
    with pytest.raises(RunError, match=r"cpus_per_client = .* lower them"):
        simulation._check_capacity(nodes, settings)


@pytest.mark.parametrize("wrong", [{"cpus_per_client": 0}, {"gpus_per_client": -0.5}])
def test_settings_have_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RaySettings(**wrong)


class Mute:
    """A grid of one node that never answers."""

    def get_node_ids(self) -> list[int]:
        return [7]

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        return [f"id-{index}" for index, _ in enumerate(messages)]

    def pull_messages(self, ids: set[str]) -> list[Message]:
        return []


def engine(then: Callable[[], None]) -> Callable[..., None]:
    """Flower's engine in small: the ServerApp in a thread, `then` in the main one."""

    def run_simulation(app: ServerApp, client: Any, clients: int, backend_config: Any) -> None:
        problems: list[Exception] = []
        identify_process()

        def serve() -> None:
            try:
                app(Mute(), None)  # type: ignore[arg-type]
            except Exception as error:
                problems.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        then()
        thread.join()
        for problem in problems:
            raise problem

    return run_simulation


def simulate(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[Grid, Context], None], then: Callable[[], None]
) -> None:
    app = ServerApp()
    app.main()(main)
    monkeypatch.setattr("flwr.simulation.run_simulation", engine(then))
    simulation._simulate(app, make_client_app(lambda _: toy_sites(1)[0]), 1, RaySettings())


def waits_for_ever(grid: Grid, _: Context) -> None:
    gather(grid, config(clients=1, clients_per_round=1, start_timeout_s=1e6), PROVENANCE)


def test_ctrl_c_ends_a_server_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(monkeypatch, waits_for_ever, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_crash_of_the_engine_ends_a_server_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()

    def crash() -> None:
        raise RuntimeError("Simulation Runtime crashed.") from ValueError("no memory\nfor plasma")

    with pytest.raises(RunError, match=r"broke down: no memory; .* federation=local"):
        simulate(monkeypatch, waits_for_ever, crash)
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_error_of_the_server_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(grid: Grid, context: Context) -> None:
        raise RunError("too few clients")

    with pytest.raises(RunError, match=r"^too few clients$"):
        simulate(monkeypatch, fails, lambda: None)


def test_replies_are_handed_over_as_they_come_until_the_deadline() -> None:
    """One message is answered at the first look, the other one never."""
    inner = grid_of(toy_sites(1))
    stop = threading.Event()
    grid = WatchedGrid(inner, stop)
    (node,) = grid.get_node_ids()
    known, unknown = status_query(node, 5.0), status_query(node, 5.0)
    replies = grid.send_and_receive([known, unknown], timeout=0.05)
    inner._replies.pop(unknown.metadata.message_id)
    assert [reply.metadata.reply_to_message_id for reply in replies] == [known.metadata.message_id]
    stop.set()
    for call in (grid.get_node_ids, lambda: grid.push_messages([]), lambda: grid.pull_messages([])):
        with pytest.raises(Stopped):
            call()
