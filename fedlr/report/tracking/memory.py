"""``tracking.json`` in a run folder: with it a resumed run goes on under the same name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedlr.errors import RunError
from fedlr.report import strict_json
from fedlr.report.records import write_atomically

TRACKING_FILE = "tracking.json"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is known of a run in another tool.

    Attributes:
        kind: Name of the tool, as in ``tracking=``.
        id: The run's identifier there.
        sent: Number of the last round that the tool has; 0 if none, or if it is asked itself.
        finished: Whether it has the result too.
    """

    kind: str
    id: str
    sent: int = 0
    finished: bool = False


def recall(folder: Path, kind: str) -> Memory | None:
    """Return what ``folder`` remembers of the tool ``kind``; None if nothing.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / TRACKING_FILE
    try:
        memory = strict_json.decode(Memory, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: {error}; delete it, and the run is tracked as a new one"
        ) from error
    return memory if memory.kind == kind else None


def remember(folder: Path, memory: Memory) -> None:
    """Write ``tracking.json``, whole or not at all.

    Raises:
        RunError: It cannot be written.
    """
    text = strict_json.encode(memory, indent=2) + "\n"
    write_atomically(folder / TRACKING_FILE, text.encode())


class Sent:
    """Which rounds a tool has, for one that cannot be asked itself.

    Args:
        folder: The run folder.
        kind: Name of the tool.
        run: The run's identifier there, where it is new.

    Raises:
        RunError: As `recall`.
    """

    def __init__(self, folder: Path, kind: str, run: str) -> None:
        self._folder = folder
        self._memory = recall(folder, kind) or Memory(kind=kind, id=run)

    @property
    def id(self) -> str:
        """The run's identifier in the tool."""
        return self._memory.id

    def lacks(self, round: int) -> bool:
        """Return whether the tool was not sent this round, nor a later one."""
        return round > self._memory.sent

    def keep(self) -> None:
        """Write what is known; RunError as `remember`."""
        remember(self._folder, self._memory)

    def add(self, round: int) -> None:
        """Remember that the tool has the rounds up to this one, and not yet the result."""
        self._memory = replace(self._memory, sent=round, finished=False)
        self.keep()

    def finish(self) -> None:
        """Remember that it has the result."""
        self._memory = replace(self._memory, finished=True)
        self.keep()
