"""The engine ``ray``: Flower's simulation engine, every client in a process of a Ray cluster.

Flower runs the ServerApp in a thread of this process and hands each message to one
of a pool of actors. What it leaves open is settled here: a dead actor is started
anew, Ctrl-C and a crash of the engine end the ServerApp at once, no cluster is
joined by accident, and the process is left as it was found.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fedlr import checks
from fedlr.errors import RunError
from server.environment import OFFLINE
from server.watched import Stopped, WatchedGrid

CONNECT_S = 5.0
"""Seconds a cluster's head may take to accept a connection; Ray itself tries for minutes."""

STARTED_BY_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
"""Variables of Ray's own processes: no usage reports, no upload of the working folder."""

QUIET_ACTORS = {"FLWR_LOG_LEVEL": "CRITICAL", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""What an actor prints comes to this console: the site's own lines and nothing else."""

PASSED_ON = (*OFFLINE, *QUIET_ACTORS, "HF_HUB_OFFLINE")
"""Variables that actors get as they are here, where they are set."""

_log = logging.getLogger("fedlr.simulation")


@dataclass(frozen=True)
class RaySettings:
    """Where clients run and what each of them gets.

    Attributes:
        address: ``host:port`` of an existing cluster's head; None starts a cluster of
            this machine for the run. All machines need the same Python environment.
        cpus_per_client: CPUs of one client at a time, ≥ 1: torch's threads there.
        gpus_per_client: GPUs of one client at a time, ≥ 0; 0.5 lets two share one,
            and 0 hides the GPUs from clients.

    Raises:
        ValueError: A value outside its range.
    """

    address: str | None = None
    cpus_per_client: int = 1
    gpus_per_client: float = 0.0

    def __post_init__(self) -> None:
        checks.at_least("cpus_per_client", self.cpus_per_client, 1)
        checks.non_negative("gpus_per_client", self.gpus_per_client)


def check_ray() -> None:
    """Raise RunError, naming the extra, unless Ray is installed; loads nothing."""
    if importlib.util.find_spec("ray") is None:
        raise RunError(
            'federation=ray needs Ray, which is not installed; pip install "fedlr[ray]", or use '
            "federation=local"
        )


def run_on_ray(
    server_app: ServerApp, client_app: ClientApp, clients: int, settings: RaySettings
) -> None:
    """Run a federation of ``clients`` simulated nodes and return when it has ended.

    Node i has the config ``{"partition-id": i, "num-partitions": clients}``. From the
    main thread, the first Ctrl-C ends the run after the jobs that are being done; the
    second one ends the process at once (the ledgers stand).

    Args:
        server_app: Runs in a thread of this process.
        client_app: Travels to the actors by cloudpickle, so what it holds must too.
        clients: Number of nodes, ≥ 1.
        settings: Where they run.

    Raises:
        RunError: Ray is missing or in use, no cluster is at the address, its machines
            are too small for one client, or the engine broke down.
        KeyboardInterrupt: Ctrl-C; the ServerApp has ended.
        Exception: Whatever ``server_app`` raised.

    Guarantees:
        A job that dies with its actor is given once more; a private site has booked it
        and forfeits it. Environment, Flower's identity and signal handlers stay as before.
    """
    checks.at_least("clients", clients, 1)
    check_ray()
    with _restored(), _quiet():
        for name, value in STARTED_BY_RAY.items():
            os.environ.setdefault(name, value)
        import ray

        if ray.is_initialized():
            raise RunError("Ray is already in use in this process; call ray.shutdown() first")
        try:
            _connect(clients, settings)
            _check_capacity(ray.nodes(), settings)
            _simulate(server_app, client_app, clients, settings)
        finally:
            ray.shutdown()


def _connect(clients: int, settings: RaySettings) -> None:
    """Start a cluster of this machine, or join the one at the address."""
    import ray

    # Actors inherit no changes of sys.path, and on other machines no variables either.
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    paths = os.pathsep.join(filter(None, sys.path))
    variables = {**QUIET_ACTORS, **kept, "PYTHONPATH": paths}
    arguments: dict[str, Any] = {
        "include_dashboard": False,
        "logging_level": "ERROR",
        "log_to_driver": True,
        "runtime_env": {"env_vars": variables},
    }
    if settings.address is not None:
        _check_address(settings.address)
        arguments["address"] = settings.address
    else:
        # Not None: that would join a cluster that RAY_ADDRESS names or that is found running.
        arguments["address"] = "local"
        wanted = clients * settings.cpus_per_client
        if wanted < _cpus():
            arguments["num_cpus"] = wanted  # Flower fills every CPU with an actor
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        place = "on this machine" if settings.address is None else f"at {settings.address}"
        raise RunError(
            f"Ray cannot be used {place}: {_first_line(error)}. federation=local needs no Ray"
        ) from error
    finally:
        # Ray's own handler would wait for jobs that are being done.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _cpus() -> int:
    """Return the CPUs of this process: what it may run on, within a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(count or 1, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # another system, or "max": no quota
        return count or 1


def _check_address(address: str) -> None:
    """Raise RunError at once where nothing listens: Ray would try for minutes, then exit."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise RunError(
            f"federation.address = {address!r}: no Ray cluster answers there ({error}); start one "
            "with `ray start --head --port=<port>`, or leave the address out to use this machine"
        ) from error


def _check_capacity(nodes: Sequence[Mapping[str, Any]], settings: RaySettings) -> None:
    """Raise RunError unless at least one machine can hold one client."""
    found = [node["Resources"] for node in nodes if node["Resources"]]
    cpus, gpus = settings.cpus_per_client, settings.gpus_per_client
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in found):
        return
    largest = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in found)
    raise RunError(
        f"no machine of the Ray cluster can hold a client of federation.cpus_per_client = {cpus} "
        f"and federation.gpus_per_client = {gpus:g} (found: {largest or 'none'}); lower them"
    )


def _simulate(
    server_app: ServerApp, client_app: ClientApp, clients: int, settings: RaySettings
) -> None:
    """Call Flower's engine; it returns when the ServerApp has ended."""
    from flwr.simulation import run_simulation

    stop, ended = threading.Event(), threading.Event()
    raised: list[Exception] = []
    watched = ServerApp()

    @watched.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            server_app(WatchedGrid(grid, stop), context)
        except Stopped:
            pass
        except Exception as error:
            raised.append(error)
            raise
        finally:
            ended.set()

    resources: dict[str, Any] = {
        "num_cpus": settings.cpus_per_client,
        "num_gpus": settings.gpus_per_client,
        # Handed on to the actors' options: without it a dead one fails all its later jobs,
        # and those that come while it restarts.
        "max_restarts": -1,
        "max_task_retries": 1,
    }
    with _interrupted_by_ctrl_c(stop):
        try:
            run_simulation(
                watched, client_app, clients, backend_config={"client_resources": resources}
            )
        except Exception as error:
            stop.set()
            ended.wait(timeout=30.0)
            if error in raised:
                raise
            raise RunError(
                f"Flower's simulation engine broke down: {_root_cause(error)}; the run can be "
                "resumed, or started anew with federation=local"
            ) from error
    if stop.is_set():
        raise KeyboardInterrupt


@contextmanager
def _interrupted_by_ctrl_c(stop: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set ``stop`` and the second one end the process.

    An exception in the main thread would not do: Flower waits there for its threads,
    and these wait for the actors.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()
        os.write(
            2, b"\nfedlr: stopping after the jobs that are being done; Ctrl-C again: at once\n"
        )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _restored() -> Iterator[None]:
    """Put back the environment and Flower's identity of the process, which the engine changes."""
    names = ("_task_id", "_run_id", "_node_id")
    identity = {name: getattr(TaskIdentity, name) for name in names}
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name, value in identity.items():
            setattr(TaskIdentity, name, value)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop Flower's log but for the reasons of failed jobs, each one once and in one line."""
    told: set[str] = set()

    def tell(record: logging.LogRecord) -> bool:
        if isinstance(record.msg, Exception) and (reason := _first_line(record.msg)) not in told:
            told.add(reason)
            _log.warning("a client's process gave no answer: %s", reason)
        return False

    logger = logging.getLogger("flwr")
    logger.addFilter(tell)
    try:
        yield
    finally:
        logger.removeFilter(tell)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
