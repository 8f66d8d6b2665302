"""``fedlr report``: a run or a sweep as one page, and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedlr.cli.arguments import Parser
from fedlr.errors import ConfigError, RunError

_ABOUT = """\
Write a run or a sweep as one self-contained page, report.html, and its figures as PNG
and SVG beside it. The run may be finished, interrupted or still going. Prints the
page's file as its last line; with --markdown, the table of a sweep's settings instead."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: A folder, and ``--output <folder>``, ``--markdown`` or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("report", _ABOUT)
    parser.add_argument("folder", metavar="<run | sweep>", type=Path, help="its folder")
    parser.add_argument(
        "--output", metavar="<folder>", type=Path, help="where to write; default: that folder"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print a sweep's table for a README; write nothing"
    )
    given = parser.parse(words)
    if given is None:
        return 0
    if not given.markdown:
        print(report(given.folder, given.output))
    elif given.output is not None:
        raise ConfigError(["--markdown prints a table and writes nothing; leave --output away"])
    else:
        print(markdown(given.folder), end="")
    return 0


def markdown(folder: Path) -> str:
    """Return the settings of the sweep in ``folder`` as a Markdown table with its note.

    Raises:
        RunError: ``folder`` is no sweep, or none of its settings has a finished run.
    """
    from fedlr.cli.composed import composed
    from fedlr.report.page import sweep_summary
    from fedlr.report.page.sweep_cells import read_grid
    from fedlr.report.sweep import is_sweep, read_sweep

    folder = folder.expanduser()
    if not is_sweep(folder):
        _check_run(folder)
        raise RunError(
            f"{str(folder)!r} is a run, and --markdown is the table of a sweep; leave it away, or "
            "name the folder that `fedlr sweep` printed last"
        )
    grid = read_grid(read_sweep(folder))
    if not grid.settings:
        raise RunError(f"no cell of {str(folder)!r} to be reported has finished, so it has no rows")
    return sweep_summary.markdown(grid, composed(grid.sweep))


def report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of the run or the sweep in ``folder`` and return the page's file.

    Args:
        folder: A run folder or a sweep's.
        output: Made if missing; None writes into ``folder``.

    Raises:
        RunError: ``folder`` is neither, or the report cannot be written.
    """
    from fedlr.report.sweep import is_sweep, read_sweep

    folder = folder.expanduser()
    sweep = is_sweep(folder)
    if not sweep:
        _check_run(folder)
    target = _folder(output or folder)
    if sweep:
        from fedlr.cli.composed import composed
        from fedlr.report.page import sweep as sweep_page

        return sweep_page.write(folder, target, composed(read_sweep(folder)))
    from fedlr.cli.compose import compose
    from fedlr.config import to_json
    from fedlr.report.page import run as run_page

    return run_page.write(folder, target, json.loads(to_json(compose([]))))


def _check_run(folder: Path) -> None:
    """Raise RunError, with the way out, where ``folder`` is no run folder."""
    from fedlr.report.facts import FACTS_FILE
    from fedlr.report.sweep import SWEEP_FILE

    if (folder / FACTS_FILE).is_file():
        return
    if not folder.is_dir():
        raise RunError(
            f"{str(folder)!r} is not a folder; give the one that `fedlr simulate` or `fedlr sweep` "
            "printed last"
        )
    deeper = [f"*/{FACTS_FILE}", f"*/*/{FACTS_FILE}", f"*/{SWEEP_FILE}", f"sweeps/*/{SWEEP_FILE}"]
    inside = [path.parent for pattern in deeper for path in folder.glob(pattern)]
    if inside:
        newest = max(inside, key=lambda place: place.stat().st_mtime)
        raise RunError(
            f"{str(folder)!r} holds runs or sweeps and is none itself; name one, for "
            f"example {str(newest)!r}"
        )
    raise RunError(
        f"{str(folder)!r} is neither a run's folder nor a sweep's: it has no {FACTS_FILE} and no "
        f"{SWEEP_FILE}; give the one that `fedlr simulate` or `fedlr sweep` printed last"
    )


def _folder(place: Path) -> Path:
    """Return ``place`` after making it; RunError where a report cannot be written there."""
    import tempfile

    place = place.expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {str(place)!r}: {error.strerror or error}; choose "
            "another place with --output <folder>"
        ) from error
    return place
