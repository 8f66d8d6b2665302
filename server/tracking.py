"""The tracker of a run: what the server tells another tool, and what it keeps to itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlr.config import RunConfig
from fedlr.errors import FedlrError
from fedlr.report.facts import RunFacts
from fedlr.report.folder import output_folder
from fedlr.report.live import Progress, say
from fedlr.report.places import withheld
from fedlr.report.records import ROUNDS_FILE, RoundRecord, Summary, read_rounds
from fedlr.report.tracking.build import Target, build, check
from fedlr.report.tracking.memory import recall
from fedlr.report.tracking.tracker import Setting, TrackedRun, Tracker

OWN = "tracking"
"""Settings of the tool itself, which has them."""


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


def tell_end(config: RunConfig, folder: Path, facts: RunFacts, summary: Summary) -> None:
    """Tell a tool the result of a run that has ended, where it knows the run and not its end.

    The process may have died between the two, or the tool have been left. It never raises.
    """
    kind = config.tracking.kind
    try:
        memory = recall(folder, kind)
        if memory is None or memory.finished:
            return
        records = read_rounds(folder / ROUNDS_FILE)
        tracker = open_tracker(config, folder, facts, records)
    except FedlrError as error:
        say(f"tracking={kind} was not told how the run ended: {error}")
        return
    tracker.finish(summary)
    tracker.close()


def public_settings(config: RunConfig) -> dict[str, Setting]:
    """Return the configuration by dotted name, without unset values, `OWN` and what is `withheld`.

    Lists are texts, their items joined by commas.
    """
    found = _flat(asdict(config))
    held = withheld(found)
    return {
        name: value
        for name, value in found.items()
        if name not in held and not name.startswith(f"{OWN}.")
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
