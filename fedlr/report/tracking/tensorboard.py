"""TensorBoard: event files in ``<run folder>/tensorboard``, its own records and checksums.

Look at them with ``tensorboard --logdir <output>``. Its scalars are float32: a number of
bytes above 2²⁴ is shown rounded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedlr.report.records import RoundRecord, Summary
from fedlr.report.tracking.tracker import TrackedRun, closing, promise, series

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary as Scalars
    from tensorboard.summary.writer.record_writer import RecordWriter

FOLDER = "tensorboard"
"""Name of the folder in the run folder."""

VERSION = "brain.Event:2"
"""What the first event of a file says of its format."""


class TensorBoard:
    """Writes event files; see `fedlr.report.tracking.tracker.Tracker`.

    A resumed run begins a file of its own. It first gives up the rounds that the run
    does not have any more, as the format provides, and adds those that a crash cost.
    """

    def __init__(self) -> None:
        self._writer: RecordWriter | None = None

    def start(self, run: TrackedRun) -> None:
        """Open an event file and write the configuration as a text."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.folder / FOLDER
        there = _steps(folder) if folder.exists() else frozenset()
        self._writer = RecordWriter(_new_file(folder))
        self._add(event_pb2.Event(wall_time=time.time(), file_version=VERSION))
        if there:
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            step = len(run.earlier) + 1
            self._add(event_pb2.Event(wall_time=time.time(), step=step, session_log=log))
        self._text("configuration", {"run": run.run, **run.settings})
        for record in run.earlier:
            if record.round not in there:
                self._numbers(series(record), record.round)
        self._writer.flush()

    def round(self, record: RoundRecord) -> None:
        """Write the scalars of a round through to the file."""
        self._numbers(series(record), record.round)
        self._flush()

    def finish(self, summary: Summary) -> None:
        """Write the result at the step of the last round."""
        self._numbers(closing(summary), summary.rounds)
        self._text("privacy", promise(summary))
        self._flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _numbers(self, values: Mapping[str, float], step: int) -> None:
        """Write one event with a scalar per value."""
        from tensorboard.compat.proto.summary_pb2 import Summary as Scalars

        scalars = [Scalars.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._summary(Scalars(value=scalars), step)

    def _text(self, tag: str, lines: Mapping[str, object]) -> None:
        """Write a table of names and values, as Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        rows = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in lines.items()]
        self._summary(text_pb(tag, "\n".join(["| | |", "| --- | --- |", *rows])), 0)

    def _summary(self, summary: Scalars, step: int) -> None:
        from tensorboard.compat.proto import event_pb2

        self._add(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Any) -> None:
        if self._writer is not None:
            self._writer.write(event.SerializeToString())

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()


def _new_file(folder: Path) -> IO[bytes]:
    """Open a file that its reader comes to after those that are there.

    TensorBoard's own writer puts the name of the machine into the file's.
    """
    folder.mkdir(exist_ok=True)
    earlier = len(list(folder.iterdir()))
    return (folder / f"events.out.tfevents.{int(time.time()):010d}.fedlr.{earlier:04d}").open("xb")


def _steps(folder: Path) -> frozenset[int]:
    """Return the rounds that the event files hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    if "accepted" not in found.Tags()["scalars"]:
        return frozenset()
    return frozenset(event.step for event in found.Scalars("accepted"))
