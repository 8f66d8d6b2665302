"""Cells of a sweep through Hydra's launchers: here, in processes, on Ray, or on a cluster."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlr.cli.cells import config_of, named
from fedlr.cli.simulate import run_cell
from fedlr.errors import ConfigError, DataError, FedlrError, RunError
from fedlr.report import units
from fedlr.report.live import say
from fedlr.report.records import SUMMARY_FILE, Summary, read_summary
from fedlr.report.sweep import (
    CELLS,
    FAILURE_FILE,
    RUN,
    Cell,
    Failure,
    clear_failure,
    read_cell,
    write_failure,
)

if TYPE_CHECKING:
    from fedlr.reuse import Reuse

BASIC = "basic"

LAUNCHERS = {
    BASIC: BASIC,
    "joblib": "joblib",
    "ray": "ray",
    "submitit": "submitit_local",
    "submitit_local": "submitit_local",
    "submitit_slurm": "submitit_slurm",
}
"""What ``launcher=`` takes → Hydra's name of it.

``submitit_slurm`` submits to a Slurm cluster, which no test has: it is untested. Its plugin, and
all that is ours, is the same as that of ``submitit``, which is tested.
"""

_PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "ray": ("hydra_ray_launcher", "ray-launcher"),
    "submitit_local": ("hydra_submitit_launcher", "submitit"),
    "submitit_slurm": ("hydra_submitit_launcher", "submitit"),
}
"""Hydra's name → (module below ``hydra_plugins``, extra that installs it)."""

_CONFIG = "fedlr_sweep"
_SCRATCH = ".hydra"

_ELSEWHERE = "the reason was shown on the console of the process that ran it"


@dataclass(frozen=True)
class Launcher:
    """Where cells run.

    Attributes:
        name: A key of `LAUNCHERS`.
        settings: Overrides of it, ``hydra.launcher.n_jobs=4`` and the like.
    """

    name: str = BASIC
    settings: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ConfigError where there is no such launcher, or its package is missing."""
        if self.name not in LAUNCHERS:
            known = ", ".join(LAUNCHERS)
            raise ConfigError([f"launcher = {self.name!r} must be one of {known}"])
        plugin, extra = _PLUGINS.get(LAUNCHERS[self.name], (None, ""))
        if plugin is not None and not _is_installed(plugin):
            raise ConfigError(
                [
                    f"launcher = {self.name} needs the package {plugin.replace('_', '-')}; install "
                    f"it with pip install 'fedlr[{extra}]', or leave the launcher away"
                ]
            )


def launch(folder: Path, cells: Sequence[str], launcher: Launcher) -> None:
    """Run cells, each once; how each went is in its folder.

    Args:
        folder: The sweep's folder.
        cells: Names of cells, in the order in which they start.
        launcher: Where they run.

    Raises:
        ConfigError: The launcher does not take its settings.
        RunError: It failed; what the cells' folders hold counts.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    node = {"folder": str(folder.resolve()), "order": list(cells), "position": 0}
    node["quiet"] = LAUNCHERS[launcher.name] != BASIC
    ConfigStore.instance().store(name=_CONFIG, node=node)
    words = [
        f"position={','.join(map(str, range(len(cells))))}",
        f"hydra/launcher={LAUNCHERS[launcher.name]}",
        *launcher.settings,
        *("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"),
        f'hydra.sweep.dir="{_quoted(folder.resolve() / _SCRATCH)}"',
        *("hydra.sweep.subdir=.", "hydra.job.chdir=false"),
    ]
    GlobalHydra.instance().clear()
    try:
        with _command_line(["--multirun", *words]):
            hydra.main(config_path=None, config_name=_CONFIG, version_base="1.3")(run_task)()
    except (HydraException, OmegaConfBaseException) as error:
        shown = " ".join((launcher.name, *launcher.settings))
        raise ConfigError([f"launcher = {shown}: {_first_line(error)}"]) from error
    except Exception as error:  # of any plugin and what it stands on
        raise RunError(
            f"the launcher {launcher.name} failed: {_first_line(error)}; the same command goes on "
            "with what is missing"
        ) from error
    finally:
        GlobalHydra.instance().clear()
        shared.cache_clear()


def run_task(config: Any) -> None:
    """Run the cell at ``config.position`` of ``config.order``, in whatever process this is."""
    name = config.order[config.position]
    folder = Path(config.folder)
    place = f"cell {config.position + 1} of {len(config.order)}: {name}"
    say(f"{place}{_left(folder, list(config.order), config.position)}")
    run_one(folder, str(name), shared(), bool(config.quiet))


def run_one(sweep: Path, name: str, reuse: Reuse, quiet: bool = False) -> Cell | None:
    """Run or go on with one cell, unless it is finished; never raise for what it met.

    Args:
        sweep: The sweep's folder.
        name: The cell.
        reuse: What other cells of this process have made.
        quiet: Whether others run beside it.

    Returns:
        The cell as it is now; where it failed, ``failure.json`` says why. None where its
        ``cell.json`` cannot be read.
    """
    folder = sweep / CELLS / name
    cell = _read(folder)
    if cell is None or cell.state in ("finished", "running", "damaged"):
        return cell
    public = False  # until its configuration says so
    try:
        clear_failure(folder)
        config = named(config_of(cell.facts), sweep.name, str(sweep.parent.parent))
        public = config.data.public
        with _own_threads():
            summary = run_cell(config, cell.run, reuse, quiet)
    except Exception as error:
        _fail(folder, error, public)
    else:
        say(f"{name}: {_result(summary)}")
    return _read(folder)


def _read(folder: Path) -> Cell | None:
    """Return the cell in ``folder``; None, and a word on it, where nothing says what it is."""
    try:
        return read_cell(folder)
    except RunError as error:
        say(f"{folder.name} cannot be run: {error}")
        return None


@cache
def shared() -> Reuse:
    """Return what the cells of this process share."""
    from fedlr.reuse import Reuse

    return Reuse()


def _fail(folder: Path, error: Exception, public: bool) -> None:
    """Tell why a cell failed: all of it here, and in its folder what may be read by others.

    Of data that are not declared public, what names a row stays on this console: messages
    of `DataError` quote rows, and those of other packages may. A page is made of the file.
    """
    kind = type(error).__name__
    message = str(error)
    if not isinstance(error, FedlrError):
        traceback.print_exception(error)
        message = f"{kind}: {_first_line(error)}"
    say(f"{folder.name} failed: {message}")
    if not public and (isinstance(error, DataError) or not isinstance(error, FedlrError)):
        message = f"{kind}; {_ELSEWHERE}"
    try:
        write_failure(folder, Failure(kind=kind, message=message))
    except (RunError, OSError) as problem:  # a full disk, which the next cell may survive
        say(f"{folder.name}: why it failed could not be written: {problem}")


def _result(summary: Summary) -> str:
    accuracy, spent = units.percent(summary.accuracy), units.privacy_loss(summary.epsilon_max)
    promise = "no privacy" if summary.epsilon_max is None else f"ε {spent}"
    return f"accuracy {accuracy}, {promise}, {units.duration(summary.wall_s)}"


def _left(folder: Path, order: Sequence[str], position: int) -> str:
    """Say how long what has not started will take, where finished cells tell it."""
    spent = list(_durations(folder))
    if not spent:
        return ""
    done = sum((folder / CELLS / name / RUN / SUMMARY_FILE).exists() for name in order[:position])
    failed = sum((folder / CELLS / name / FAILURE_FILE).exists() for name in order[:position])
    beside = max(1, position + 1 - done - failed)
    # The median: the first cell of a process makes what the others share.
    left = (len(order) - position) * statistics.median(spent) / beside
    return f", about {units.duration(left)} left"


def _durations(folder: Path) -> Iterator[float]:
    """Yield the seconds of every finished cell whose summary can be read."""
    for path in (folder / CELLS).glob(f"*/{RUN}/{SUMMARY_FILE}"):
        try:
            yield read_summary(path).wall_s
        except RunError:  # told of that cell, at the end
            continue


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin of Hydra at all
        return False


@contextmanager
def _own_threads() -> Iterator[None]:
    """Bring torch's number of threads back: the next cell may leave it to torch."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """Let Hydra see ``words`` as its command line, and raise what it would print."""
    before, name = sys.argv, "HYDRA_FULL_ERROR"
    shown = os.environ.get(name)
    sys.argv = [before[0] if before else "fedlr", *words]
    os.environ[name] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if shown is None:
            del os.environ[name]
        else:
            os.environ[name] = shown


def _quoted(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace('"', '\\"')


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
