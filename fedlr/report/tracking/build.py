"""Name of a tool → its tracker; what must be installed is checked without loading it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedlr.errors import ConfigError
from fedlr.report.tracking import trackio, wandb
from fedlr.report.tracking.guard import Guarded
from fedlr.report.tracking.mlflow import MLflow
from fedlr.report.tracking.tensorboard import TensorBoard
from fedlr.report.tracking.tracker import NoTracker, Tracker

Kind = Literal["none", "tensorboard", "mlflow", "wandb", "trackio"]

MODULES: Mapping[Kind, tuple[str, ...]] = {
    "none": (),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""What a tool needs; the extra of fedlr has the tool's name."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a run is shown.

    Attributes:
        kind: The tool.
        uri: Address of its server; None is its place on this machine.
        project: What the tool collects runs under.
        mode: Whether ``wandb`` may use the network.
    """

    kind: Kind
    uri: str | None = None
    project: str = "fedlr"
    mode: wandb.Mode = "offline"


def check(target: Target) -> None:
    """Raise ConfigError where the tool cannot be used here; nothing is loaded for it."""
    absent = [name for name in MODULES[target.kind] if not _installed(name)]
    if absent:
        raise ConfigError(
            [
                f"tracking = {target.kind} needs {' and '.join(absent)}, not installed here; run "
                f"pip install 'fedlr[{target.kind}]', or set tracking=none"
            ]
        )
    if target.kind == "wandb" and target.mode == "online":
        wandb.check_key(target.uri)
    if target.kind == "trackio":
        trackio.check_local()


def build(target: Target) -> Tracker:
    """Return the tracker of ``target``, guarded; nothing is opened before its start.

    Raises:
        ConfigError: As `check`.
    """
    check(target)
    if target.kind == "none":
        return NoTracker()
    return Guarded(_plain(target), target.kind)


def _plain(target: Target) -> Tracker:
    """Return the tracker itself."""
    if target.kind == "tensorboard":
        return TensorBoard()
    if target.kind == "mlflow":
        return MLflow(target.uri, target.project)
    if target.kind == "wandb":
        return wandb.WandB(target.uri, target.project, target.mode)
    return trackio.Trackio(target.project)


def _installed(name: str) -> bool:
    """Return whether a package is here; a mere folder of its name, which it makes, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
