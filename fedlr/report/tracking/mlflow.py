"""MLflow: a SQLite file beside the runs by default, or the server at ``tracking.uri``.

Works without a network on ``<output>/mlflow.db``; look at it with
``mlflow ui --backend-store-uri sqlite:///<output>/mlflow.db`` (the page itself comes with the
package ``mlflow``; ``mlflow-skinny`` is enough to write). A server is asked for by
``tracking.uri=https://…``, its password or token in MLflow's own environment variables.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedlr.report.records import RoundRecord, Summary
from fedlr.report.tracking.memory import Memory, recall, remember
from fedlr.report.tracking.tracker import TrackedRun, closing, promise, series

if TYPE_CHECKING:
    from mlflow import MlflowClient

_T = TypeVar("_T")

DATABASE = "mlflow.db"
"""Name of the SQLite file in the output folder."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Set before MLflow loads, where the user has not: it reports nothing to its makers, does not
list every migration of a new database, and does not try for minutes."""

WAIT_S = 30
"""Seconds a write waits for another process that writes to the same file."""

_SQLITE = "sqlite:///"

MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000
"""Bounds of one request, and of one value."""


class MLflow:
    """Writes to MLflow; see `fedlr.report.tracking.tracker.Tracker`.

    The run there is ``RUNNING`` until it is ``FINISHED``, or ``KILLED`` when it was
    interrupted; a resumed run goes on in it.

    Args:
        uri: ``sqlite:///…`` or ``http(s)://…``; None is `DATABASE` in the output folder.
        project: Name of the experiment.
    """

    def __init__(self, uri: str | None, project: str) -> None:
        self._uri = uri
        self._project = project
        self._client: MlflowClient | None = None
        self._folder = Path()
        self._id = ""
        self._last = 0
        self._finished = False

    def start(self, run: TrackedRun) -> None:
        """Make the run, or find it again by ``tracking.json``."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        uri = self._uri or f"{_SQLITE}{(run.output / DATABASE).absolute()}"
        if uri.startswith(_SQLITE) and "?" not in uri:
            _make(Path(uri.removeprefix(_SQLITE)))
            uri = f"{uri}?timeout={WAIT_S}"
        self._client = MlflowClient(tracking_uri=uri)
        memory = recall(run.folder, "mlflow")
        self._folder = run.folder
        if memory is None or not self._resume(self._client, memory.id):
            self._begin(self._client, run)
        remember(run.folder, Memory(kind="mlflow", id=self._id))
        for record in run.earlier:
            self.round(record)

    def round(self, record: RoundRecord) -> None:
        """Send the metrics of a round at its step, unless they are there."""
        if record.round > self._last:
            self._log(series(record), record.round)
            self._last = record.round

    def finish(self, summary: Summary) -> None:
        """Send the result as metrics, and what it means as tags."""
        from mlflow.entities import RunTag

        tags = [RunTag(f"fedlr.{name}", word) for name, word in promise(summary).items()]
        if self._client is not None:
            self._log(closing(summary), summary.rounds)
            self._client.log_batch(self._id, tags=tags)
            self._client.set_terminated(self._id, "FINISHED")
            self._finished = True
            remember(self._folder, Memory(kind="mlflow", id=self._id, finished=True))

    def close(self) -> None:
        """Say that the run was interrupted, unless it has finished."""
        if self._client is not None and self._id and not self._finished:
            self._client.set_terminated(self._id, "KILLED")
        self._client = None

    def _begin(self, client: MlflowClient, run: TrackedRun) -> None:
        """Make a run with its configuration."""
        from mlflow.entities import Param, RunTag

        made = client.create_run(_experiment(client, self._project), run_name=run.run)
        self._id = made.info.run_id
        settings = {**run.settings, "fedlr.rounds": run.rounds}
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in settings.items()]
        for some in _chunks(params, MOST_PARAMS):
            client.log_batch(self._id, params=some)
        client.log_batch(self._id, tags=[RunTag("fedlr.run", run.run)])

    def _resume(self, client: MlflowClient, known: str) -> bool:
        """Return whether the run is there; its last round then is known, and it is running."""
        from mlflow.exceptions import MlflowException

        try:
            client.get_run(known)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self._id = known
        steps = (metric.step for metric in client.get_metric_history(known, "accepted"))
        self._last = max(steps, default=0)
        client.update_run(known, status="RUNNING")
        return True

    def _log(self, values: dict[str, float], step: int) -> None:
        """Send metrics, as few requests as allowed."""
        from mlflow.entities import Metric

        if self._client is not None:
            now = time.time_ns() // 1_000_000
            metrics = [Metric(key_of(name), value, now, step) for name, value in values.items()]
            for some in _chunks(metrics, MOST_METRICS):
                self._client.log_batch(self._id, metrics=some)


def key_of(name: str) -> str:
    """Return ``name`` as MLflow takes it; other characters become ``:<code point>:``.

    Example:
        >>> key_of("epsilon/client-000"), key_of("epsilon/a+b")
        ('epsilon/client-000', 'epsilon/a:2b:b')
    """
    return re.sub(r"[^/\w.\- ]", lambda found: f":{ord(found[0]):x}:", name)


def _make(database: Path) -> None:
    """Make a new SQLite file, whole or not at all.

    MLflow makes it in some fifty steps, and neither bears another process that begins the
    same meanwhile nor goes on where it was killed.
    """
    if database.exists():
        return
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    new = database.with_name(f".{database.name}.{secrets.token_hex(8)}.tmp")
    try:
        MlflowClient(tracking_uri=f"{_SQLITE}{new.absolute()}")
        try:
            os.link(new, database)
        except OSError:  # another run was faster, or this file system knows no links
            if not database.exists():
                new.replace(database)
    finally:
        new.unlink(missing_ok=True)


def _experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment; two runs may make it at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _chunks(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Yield ``values`` in pieces of at most ``size``."""
    for first in range(0, len(values), size):
        yield values[first : first + size]
