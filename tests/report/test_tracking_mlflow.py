"""An MLflow run on a SQLite file, read back by MLflow's own client; no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedlr.report.tracking import mlflow
from fedlr.report.tracking.guard import Guarded
from fedlr.report.tracking.memory import Memory, recall
from fedlr.report.tracking.mlflow import DATABASE, ENVIRONMENT, MLflow
from fedlr.report.tracking.tracker import closing, series
from tests.report.samples import SUMMARY
from tests.report.tracked import ROUNDS, RUN, announced, interrupted, resumed

if TYPE_CHECKING:
    from mlflow import MlflowClient

for _package in ("mlflow", "sqlalchemy", "alembic"):
    pytest.importorskip(_package, reason="MLflow is in the extra 'mlflow'")


@pytest.fixture(scope="module", autouse=True)
def quick_and_alone() -> Iterator[None]:
    """Do not wait for the disk at each of MLflow's migrations; let nothing out."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def relax(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    def connect(self: socket.socket, address: Any) -> None:
        if address[0] != "127.0.0.1":
            raise AssertionError(f"a test asked for the network: {address}")
        real(self, address)

    real = socket.socket.connect
    event.listen(Engine, "connect", relax)
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.delenv(name, raising=False)
        patch.setattr(socket.socket, "connect", connect)
        yield
    event.remove(Engine, "connect", relax)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was interrupted and resumed."""
    folder = tmp_path_factory.mktemp("output")
    interrupted(MLflow(None, "fedlr"), folder)
    killed = run_of(client(folder))
    assert killed.info.status == "KILLED"
    again = MLflow(None, "fedlr")
    again.start(announced(folder, ROUNDS[:2]))
    assert run_of(client(folder)).info.status == "RUNNING"
    again.close()
    resumed(MLflow(None, "fedlr"), folder)
    return folder


def client(folder: Path) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder / DATABASE}")


def run_of(found: MlflowClient) -> Any:
    """The one run of the experiment."""
    experiment = found.get_experiment_by_name("fedlr")
    assert experiment is not None
    (run,) = found.search_runs([experiment.experiment_id])
    return run


def test_a_resumed_run_is_the_same_run_with_every_round_once(tracked: Path) -> None:
    found = client(tracked)
    run = run_of(found)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == RUN
    for name in series(ROUNDS[0]):
        history = found.get_metric_history(run.info.run_id, name)
        seen = [(metric.step, metric.value) for metric in history]
        assert seen == [(record.round, series(record)[name]) for record in ROUNDS], name


def test_the_configuration_and_the_result_are_there(tracked: Path) -> None:
    run = run_of(client(tracked))
    assert run.data.params["optimizer.learning_rate"] == "4.0"
    assert {name: run.data.metrics[name] for name in closing(SUMMARY)} == closing(SUMMARY)
    assert run.data.tags["fedlr.privacy_mode"] == "dp"


def test_nothing_is_told_of_machine_or_user(tracked: Path) -> None:
    run = run_of(client(tracked))
    assert set(run.data.tags) == {
        *("mlflow.runName", "fedlr.run", "fedlr.privacy_mode", "fedlr.unit", "fedlr.accountant")
    }
    assert run.info.user_id == "unknown"
    whole = Memory(kind="mlflow", id=run.info.run_id, finished=True)
    assert recall(tracked / "run", "mlflow") == whole


def test_names_that_mlflow_would_refuse_are_told_otherwise(tracked: Path) -> None:
    spent = {"a+b": 1.0, "ä é": 1.0}
    tracker = MLflow(None, "other")
    (tracked / "second").mkdir()
    tracker.start(replace(announced(tracked), folder=tracked / "second", rounds=1))
    tracker.round(replace(ROUNDS[0], epsilon_by_client=spent))
    tracker.close()
    found = client(tracked)
    experiment = found.get_experiment_by_name("other")
    assert experiment is not None
    (run,) = found.search_runs([experiment.experiment_id])
    assert {"epsilon/a:2b:b", "epsilon/ä é"} <= set(run.data.metrics)


def test_many_clients_and_long_settings_fit(tracked: Path) -> None:
    (tracked / "third").mkdir()
    run = replace(announced(tracked), folder=tracked / "third")
    settings = {**{f"setting.{number}": number for number in range(150)}, "long": "x" * 9000}
    tracker = MLflow(None, "third")
    tracker.start(replace(run, settings=settings))
    spent = {f"client-{number:04d}": 1.0 for number in range(1100)}
    tracker.round(replace(ROUNDS[0], epsilon_by_client=spent))
    tracker.close()
    found = client(tracked)
    experiment = found.get_experiment_by_name("third")
    assert experiment is not None
    (there,) = found.search_runs([experiment.experiment_id])
    assert len(there.data.metrics) == 1100 + 9
    assert len(there.data.params) == 152


def test_a_server_that_is_gone_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Guarded(MLflow("http://127.0.0.1:9", "fedlr"), "mlflow")
    tracker.start(announced(tmp_path))
    tracker.round(ROUNDS[0])
    tracker.close()
    assert capfd.readouterr().err.count("tracking=mlflow failed") == 1


def test_a_file_that_cannot_be_made_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    tracker = Guarded(MLflow(f"sqlite:///{tmp_path}/file/x.db", "fedlr"), "mlflow")
    tracker.start(announced(tmp_path))
    tracker.round(ROUNDS[0])
    tracker.close()
    assert capfd.readouterr().err.count("tracking=mlflow failed") == 1


@pytest.mark.parametrize("linked", [True, False])
def test_a_new_file_is_made_whole_by_one_of_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    database = tmp_path / "absent" / DATABASE

    def make(content: str, other: str | None = None) -> Any:
        def client(tracking_uri: str) -> None:
            Path(tracking_uri.removeprefix("sqlite:///")).write_text(content)
            if other is not None:
                database.write_text(other)

        return client

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    if not linked:
        monkeypatch.setattr(mlflow.os, "link", refuse)
    monkeypatch.setattr("mlflow.MlflowClient", make("ours", other="theirs"))
    mlflow._make(database)
    assert database.read_text() == "theirs"
    database.unlink()
    monkeypatch.setattr("mlflow.MlflowClient", make("ours"))
    mlflow._make(database)
    mlflow._make(database)
    assert database.read_text() == "ours"
    assert list(database.parent.iterdir()) == [database]


def test_a_file_whose_making_is_interrupted_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(tracking_uri: str) -> None:
        Path(tracking_uri.removeprefix("sqlite:///")).write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr("mlflow.MlflowClient", client)
    with pytest.raises(OSError, match="full"):
        mlflow._make(tmp_path / DATABASE)
    assert list(tmp_path.iterdir()) == []
