"""The tracker of a run: what the server tells another tool, and what it keeps to itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlr.config import RunConfig
from fedlr.report.facts import RunFacts
from fedlr.report.folder import output_folder
from fedlr.report.live import Progress
from fedlr.report.records import RoundRecord
from fedlr.report.tracking.build import Target, build, check
from fedlr.report.tracking.tracker import Setting, TrackedRun, Tracker

PLACES = (
    *("output", "data.path", "data.cache", "privacy.policies", "federation.address"),
    "tracking",
)
"""Settings that name folders or machines: a folder's name can tell who is in the data."""

FILES = ("data.train_split", "data.validation_split")
"""Settings that name files where ``data.kind`` is ``file``."""

_ON_THE_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_tracking(config: RunConfig) -> None:
    """Raise ConfigError where the tool of ``config.tracking`` cannot be used here."""
    check(_target(config))


def open_tracker(
    config: RunConfig, folder: Path, facts: RunFacts, earlier: Sequence[RoundRecord] = ()
) -> Tracker:
    """Return the tracker of a run, started; it never raises and never holds the run up.

    Args:
        config: The configuration of the run.
        folder: The run folder.
        facts: What the run is made of.
        earlier: Its rounds before a resume.

    Raises:
        ConfigError: As `check_tracking`.
    """
    tracker = build(_target(config))
    run = TrackedRun(
        run=facts.run,
        folder=folder,
        output=output_folder(config.output),
        rounds=config.federation.rounds,
        settings=public_settings(config),
        earlier=tuple(record for record in earlier if _completed(record)),
    )
    tracker.start(run)
    return tracker


def public_settings(config: RunConfig) -> dict[str, Setting]:
    """Return the configuration by dotted name, without `PLACES`, unset values and local files.

    Lists are texts, their items joined by commas.
    """
    held = PLACES + (FILES if config.data.kind == "file" else ())
    if not _public_model(config.model.name):
        held += ("model.name",)
    found = _flat(asdict(config))
    return {
        name: value
        for name, value in found.items()
        if not any(name == place or name.startswith(f"{place}.") for place in held)
    }


class TrackedProgress:
    """A display that also tells a tracker each round that changed the model.

    A round that was abandoned is not told: a resumed run gives its number to another.

    Args:
        display: What a user sees.
        tracker: Gets the rounds.
    """

    def __init__(self, display: Progress, tracker: Tracker) -> None:
        self._display = display
        self._tracker = tracker

    def start(self, total_rounds: int, title: str) -> None:
        """See `Progress.start`."""
        self._display.start(total_rounds, title)

    def round_started(self, round: int, cohort: Sequence[str]) -> None:
        """See `Progress.round_started`."""
        self._display.round_started(round, cohort)

    def client_finished(self, client: str, steps: int) -> None:
        """See `Progress.client_finished`."""
        self._display.client_finished(client, steps)

    def round_finished(self, record: RoundRecord) -> None:
        """Show the round, and track it."""
        self._display.round_finished(record)
        if _completed(record):
            self._tracker.round(record)

    def finish(self) -> None:
        """See `Progress.finish`."""
        self._display.finish()


def _completed(record: RoundRecord) -> bool:
    return record.accepted > 0


def _target(config: RunConfig) -> Target:
    tracking = config.tracking
    return Target(
        kind=tracking.kind, uri=tracking.uri, project=tracking.project, mode=tracking.mode
    )


def _public_model(name: str) -> bool:
    """Return whether a model's name is one of the hub, and no folder of this machine."""
    return _ON_THE_HUB.fullmatch(name) is not None and not Path(name).is_dir()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    """Return nested values by dotted name; None is left out."""
    found: dict[str, Setting] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found[f"{prefix}{key}"] = ",".join(map(str, value))
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found
