"""Trackio: its own folder on this machine; look at it with ``trackio show``.

The folder is ``TRACKIO_DIR``, by default in the cache of the Hugging Face hub. Trackio itself
asks the hub for the name of the user whose token is stored here, if there is one, and keeps
it in that folder; ``HF_HUB_OFFLINE=1`` prevents it.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fedlr.errors import ConfigError
from fedlr.report.records import RoundRecord, Summary
from fedlr.report.tracking.memory import Sent
from fedlr.report.tracking.tracker import TrackedRun, closing, promise, series

if TYPE_CHECKING:
    from trackio import Run

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Environment variables with which Trackio would send the run to another machine."""


class Trackio:
    """Writes to Trackio; see `fedlr.report.tracking.tracker.Tracker`.

    Args:
        project: Name of the project.
    """

    def __init__(self, project: str) -> None:
        self._project = project
        self._run: Run | None = None
        self._sent: Sent | None = None
        self._finished = False

    def start(self, run: TrackedRun) -> None:
        """Make the run, or go on with the one of its name."""
        import trackio

        self._sent = Sent(run.folder, "trackio", run.run)
        _print_to_stderr()
        self._run = trackio.init(
            project=self._project,
            name=self._sent.id,
            config={**run.settings, "fedlr.rounds": run.rounds},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._sent.keep()
        for record in run.earlier:
            self.round(record)

    def round(self, record: RoundRecord) -> None:
        """Write a row at the round's step, unless it was written before."""
        if self._run is None or self._sent is None or not self._sent.lacks(record.round):
            return
        self._run.log(series(record), step=record.round)
        self._sent.add(record.round)

    def finish(self, summary: Summary) -> None:
        """Write the result at the step of the last round."""
        if self._run is not None:
            self._run.log({**closing(summary), **promise(summary)}, step=summary.rounds)
            self._finished = True

    def close(self) -> None:
        """Wait until everything is written."""
        import trackio

        if self._run is not None:
            _print_to_stderr()
            trackio.finish()
            self._run = None
            if self._finished and self._sent is not None:
                self._sent.finish()


def _print_to_stderr() -> None:
    """Give Trackio's modules a ``print`` of their own.

    It has no option for it, and standard output belongs to the run folder's path; another
    standard output would hold for every thread of the process.
    """

    def to_stderr(*values: object, **_options: object) -> None:
        sys.stderr.write(f"{' '.join(map(str, values))}\n")

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":
            vars(module)["print"] = to_stderr


def check_local() -> None:
    """Raise ConfigError where the environment would send the run to another machine."""
    found = [name for name in ELSEWHERE if os.environ.get(name)]
    if found:
        raise ConfigError(
            [
                f"tracking = trackio keeps a run on this machine, but {' and '.join(found)} sends "
                "it elsewhere; unset it"
            ]
        )
