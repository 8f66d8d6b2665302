"""Append-only files of one JSON record per line.

A line is committed by its newline: a crash in the middle of a write costs at most the
line that was being written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from fedlr.errors import RunError
from fedlr.report import strict_json


class OfRound(Protocol):
    """A record of one round."""

    @property
    def round(self) -> int:
        """Number of the round, ≥ 1."""
        ...


R = TypeVar("R", bound=OfRound)


@dataclass(frozen=True)
class Lines(Generic[R]):
    """What a file holds as far as it can be read.

    Attributes:
        records: In rising order of their rounds.
        problem: Which line is damaged, and how; None where all could be read. What stands
            behind that line is not in ``records``.
    """

    records: tuple[R, ...]
    problem: str | None = None


class LineLog(Generic[R]):
    """Appends records, one durable line each.

    Opening an existing log continues it: a line that a crash left without its newline is
    cut off first, so that the next one starts on its own line.

    Args:
        path: The file; its folder must exist.

    Raises:
        RunError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("ab+") as file:
                file.seek(0)
                committed = file.read().rfind(b"\n") + 1
                file.truncate(committed)
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error

    def append(self, record: R) -> None:
        """Write one line and wait until it is on the disk.

        Raises:
            RunError: The line could not be written whole; none of it is kept.
        """
        line = strict_json.encode(record).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                before = os.fstat(file.fileno()).st_size
                try:
                    written = file.write(line)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
                if written != len(line):
                    file.truncate(before)
                    raise OSError(None, "the disk is full")
        except OSError as error:
            raise RunError(f"cannot append to {self.path}: {error.strerror}") from error


def read_lines(path: Path, kind: type[R]) -> Lines[R]:
    """Return the committed records of a log up to the first damaged line.

    A last line without its newline was being written when the run stopped and is left out.
    A round that appears again was repeated by a resumed run: the later line replaces the
    earlier one and everything after that.

    Raises:
        RunError: The file cannot be read.
    """
    try:
        committed = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    records: list[R] = []
    for number, line in enumerate(committed, start=1):
        try:
            record = strict_json.decode(kind, line.decode())
        except ValueError as error:
            return Lines(tuple(records), f"{path}, line {number} is damaged: {error}")
        while records and records[-1].round >= record.round:
            records.pop()
        records.append(record)
    return Lines(tuple(records))
