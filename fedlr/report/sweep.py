"""A sweep's folder: what was asked for, cell by cell, and how far each cell is.

::

    <output>/sweeps/<name>/
      sweep.json                 `SweepFacts`: the study and its axes
      lock                       held by the one process that works at it
      search.db                  Optuna's trials, where values are searched
      cells/<cell>/cell.json     `CellFacts`: one configuration
      cells/<cell>/failure.json  `Failure`, where the last try failed
      cells/<cell>/run/          the run folder, as of `fedlr simulate`

A cell's state is what its files say, never a note that a killed process could leave
wrong. Nothing private is in any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from fedlr import checks
from fedlr.errors import RunError
from fedlr.report import strict_json
from fedlr.report.facts import FACTS_FILE
from fedlr.report.records import (
    ROUNDS_FILE,
    SUMMARY_FILE,
    RoundRecord,
    Summary,
    read_rounds,
    read_summary,
    write_atomically,
)
from fedlr.report.traces import trace
from fedlr.report.tuning import Tuning

SWEEPS = "sweeps"
"""Folder of all sweeps, in the output folder of runs."""

SWEEP_FILE, CELLS, CELL_FILE, FAILURE_FILE, RUN = (
    "sweep.json",
    "cells",
    "cell.json",
    "failure.json",
    "run",
)

SWEEP_LOCK = "lock"
"""The file that a process holds locked while it works at the sweep, in the sweep's folder."""

LOCK = Path("journal") / "lock"
"""The file that a process holds locked while it carries a run on, in the run folder."""

_UNTUNED_SWEEP: Mapping[str, object] = {"variants": {}, "tuning": None}
_UNTUNED_CELL: Mapping[str, object] = {"tuned": None, "tuning": False}
"""What ``sweep.json`` and ``cell.json`` are taken to say that were written before sweeps tuned."""

_MOST_NAMED = 12
"""Numbers of lost cells that one sentence names."""

_LOOK_S = 0.5
"""A report that looks whether a run is going on holds the lock for less."""

CellState = Literal["waiting", "running", "interrupted", "failed", "finished", "damaged"]
"""``waiting``: no run yet. ``interrupted``: a run that no process carries on. ``damaged``:
a file cannot be read; the reason is in `Cell.problem`."""


@dataclass(frozen=True, kw_only=True)
class SweepFacts:
    """What all cells have in common: the content of ``sweep.json``.

    Attributes:
        name: Name of the folder.
        study: Name of the file in ``conf/sweep``; None for a grid of one's own.
        about: The question that the study answers, one sentence.
        fixed: Overrides of all cells, as on the command line.
        axes: Values by setting, as on the command line, in the order of the study;
            ``privacy.epsilon`` may have the value ``inf``, which is no privacy at all.
        search: Whether values were chosen one after the other, by their results.
        without_privacy: Overrides of the cells at ``privacy.epsilon=inf`` alone, in place
            of those of the same name: steps that are not clipped need another size.
        trials: Cells that a search is to have; None for a grid.
        variants: Overrides by name, of the study: the values of the axis ``variant``.
        tuning: What is chosen for every combination first; None where nothing is.
    """

    name: str
    study: str | None
    about: str
    fixed: tuple[str, ...]
    axes: Mapping[str, tuple[str, ...]]
    search: bool = False
    without_privacy: tuple[str, ...] = ()
    trials: int | None = None
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tuning: Tuning | None = None


@dataclass(frozen=True, kw_only=True)
class CellFacts:
    """One configuration of a sweep: the content of ``cell.json``.

    Attributes:
        cell: Name of its folder.
        number: Its place in the sweep, from 0.
        values: Value by axis, as on the command line; numbers in the order of the axes.
        overrides: All overrides, as ``fedlr simulate`` takes them.
        rounds: Rounds it is to run, ≥ 1.
        config: Canonical JSON of its configuration, without ``output`` and ``name``: two
            cells with one text are one cell.
        tuned: Value of the setting that the sweep tunes: the one that is tried, or the
            one that was chosen; None where nothing is tuned.
        tuning: Whether the cell is there to choose that value, and for nothing else.
    """

    cell: str
    number: int
    values: Mapping[str, str]
    overrides: tuple[str, ...]
    rounds: int
    config: str
    tuned: str | None = None
    tuning: bool = False

    def __post_init__(self) -> None:
        checks.at_least("number", self.number, 0)
        checks.at_least("rounds", self.rounds, 1)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why the last try of a cell failed: the content of ``failure.json``.

    Attributes:
        kind: Name of the error's class.
        message: What the user was told.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class Cell:
    """One cell and how far it is.

    Attributes:
        facts: What it is.
        folder: Its folder.
        state: See `CellState`.
        problem: Why it failed or cannot be read; None where neither happened.
        summary: Its result; None until it has finished.
        rounds: The closed rounds so far, in rising order.
    """

    facts: CellFacts
    folder: Path
    state: CellState
    problem: str | None = None
    summary: Summary | None = None
    rounds: tuple[RoundRecord, ...] = ()

    @property
    def run(self) -> Path:
        """The run folder, whether it exists or not."""
        return self.folder / RUN


@dataclass(frozen=True)
class Sweep:
    """A sweep as its folder tells.

    Attributes:
        facts: What was asked for.
        folder: The folder.
        cells: In the order of their numbers.
    """

    facts: SweepFacts
    folder: Path
    cells: tuple[Cell, ...]

    def of(self, state: CellState) -> tuple[Cell, ...]:
        """Return the cells in one state."""
        return tuple(cell for cell in self.cells if cell.state == state)


def is_sweep(folder: Path) -> bool:
    """Return whether ``folder`` is a sweep's."""
    return (folder / SWEEP_FILE).is_file()


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder.

    A cell of whose run a file cannot be read is ``damaged``, not left out. What has no
    ``cell.json`` at all is no cell; `strays` tells of those that were one.

    Raises:
        RunError: ``folder`` is no sweep, or its ``sweep.json`` or a ``cell.json`` is damaged.
    """
    facts = read_sweep_facts(folder)
    places = sorted((folder / CELLS).glob(f"*/{CELL_FILE}"))
    cells = [read_cell(path.parent) for path in places]
    return Sweep(facts, folder, tuple(sorted(cells, key=lambda cell: cell.facts.number)))


def strays(sweep: Sweep) -> tuple[str, ...]:
    """Say which runs of a sweep its cells do not tell of, a sentence each; none where all is well.

    Cells are numbered without gaps, and a cell that has begun has a ``cell.json``.
    """
    told, named = list[str](), set[str]()
    for run in sorted((sweep.folder / CELLS).glob(f"*/{RUN}")):
        lost = not (run.parent / CELL_FILE).exists()
        if lost and ((run / FACTS_FILE).exists() or trace(run) is not None):
            named.add(run.parent.name.partition("-")[0])
            told.append(
                f"{run.parent.name} has a run and no {CELL_FILE}, so what it spent is not known; "
                f"bring {CELL_FILE} back from a copy"
            )
    numbers = {cell.facts.number for cell in sweep.cells}
    missing = sorted(set(range(max(numbers, default=-1))) - numbers)
    if gone := [name for number in missing if (name := f"{number:03d}") not in named]:
        listed = ", ".join(gone[:_MOST_NAMED])
        more = "" if len(gone) <= _MOST_NAMED else f" and {len(gone) - _MOST_NAMED} more"
        told.append(
            f"of the cells numbered {listed}{more} nothing is there, so what they spent is not "
            "known; bring their folders back from a copy"
        )
    return tuple(told)


def read_sweep_facts(folder: Path) -> SweepFacts:
    """Return ``sweep.json``.

    Raises:
        RunError: It is missing or damaged.
    """
    path = folder / SWEEP_FILE
    try:
        return strict_json.decode(SweepFacts, path.read_text(encoding="utf-8"), _UNTUNED_SWEEP)
    except OSError as error:
        raise RunError(
            f"{str(folder)!r} is no sweep: {SWEEP_FILE} cannot be read "
            f"({error.strerror or error}); give the folder that `fedlr sweep` printed last"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; restore it from a copy") from error


def read_cell(folder: Path) -> Cell:
    """Return a cell and its state; what is damaged is told in the result.

    Raises:
        RunError: ``cell.json`` is missing or damaged: nothing says what the cell is.
    """
    path = folder / CELL_FILE
    try:
        facts = strict_json.decode(CellFacts, path.read_text(encoding="utf-8"), _UNTUNED_CELL)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: {error}; bring it back from a copy. If there is none, and its "
            "folder is moved away, what the cell has spent is no longer counted"
        ) from error
    run = folder / RUN
    try:
        log = run / ROUNDS_FILE
        rounds = tuple(read_rounds(log)) if log.exists() else ()
        summary = read_summary(run / SUMMARY_FILE) if (run / SUMMARY_FILE).exists() else None
        if summary is not None and summary.rounds and not is_running(run):
            return Cell(facts, folder, "finished", None, summary, rounds)
        failure = _read_failure(folder)
    except RunError as error:
        return Cell(facts, folder, "damaged", str(error))
    if is_running(run):
        return Cell(facts, folder, "running", None, None, rounds)
    if failure is not None:
        return Cell(facts, folder, "failed", failure.message, None, rounds)
    return Cell(facts, folder, "interrupted" if run.exists() else "waiting", None, None, rounds)


def is_running(run: Path) -> bool:
    """Return whether a process on this machine carries the run in ``run`` on."""
    path = run / LOCK
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that may only be read: nobody here can be writing
        return False


@contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Keep other processes of this machine from working at what lies in ``run``.

    Raises:
        RunError: One does already, or the folder cannot be written.
    """
    with _held(
        run,
        LOCK,
        _LOOK_S,
        f"another process works at {str(run)!r}; wait for it",
        "make it writable for this user, or choose a folder of your own",
    ):
        yield


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from working at the sweep in ``folder``.

    Raises:
        RunError: One does already, or the folder cannot be written.
    """
    with _held(
        folder,
        SWEEP_LOCK,
        0.0,
        f"another `fedlr sweep` works at {str(folder)!r}; wait for it, or choose another "
        "name=<name>",
        "choose a folder of your own with output=<folder>",
    ):
        yield


@contextmanager
def _held(folder: Path, name: str | Path, wait_s: float, busy: str, way_out: str) -> Iterator[None]:
    """Hold the lock ``name`` in ``folder``; RunError: ``busy``, or unwritable and the way out."""
    path = folder / name
    lock = FileLock(path, thread_local=False)
    try:
        path.parent.mkdir(exist_ok=True)
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise RunError(busy) from error
    except OSError as error:
        raise RunError(
            f"{str(folder)!r} cannot be written: {error.strerror or error}; {way_out}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_sweep_facts(folder: Path, facts: SweepFacts) -> None:
    """Write ``sweep.json``, whole or not at all; the folder must exist."""
    _write(folder / SWEEP_FILE, facts)


def write_cell(folder: Path, facts: CellFacts) -> None:
    """Write ``cell.json``; the folder must exist."""
    _write(folder / CELL_FILE, facts)


def write_failure(folder: Path, failure: Failure) -> None:
    """Write ``failure.json``; the folder must exist."""
    _write(folder / FAILURE_FILE, failure)


def clear_failure(folder: Path) -> None:
    """Forget why the last try failed: another begins."""
    (folder / FAILURE_FILE).unlink(missing_ok=True)


def _read_failure(folder: Path) -> Failure | None:
    path = folder / FAILURE_FILE
    if not path.exists():
        return None
    try:
        return strict_json.decode(Failure, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}; delete it, and the cell is retried") from error


def _write(path: Path, record: object) -> None:
    write_atomically(path, (strict_json.encode(record, indent=2) + "\n").encode())
