"""The run folder: where everything that happened is kept, and nothing private."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlr import __version__
from fedlr.errors import RunError
from fedlr.report.facts import FACTS_FILE
from fedlr.report.records import write_atomically
from fedlr.report.sweep import hold_run
from fedlr.report.traces import trace

CONFIG_FILE = "config.json"

PACKAGES = ("torch", "flwr", "opacus", "transformers", "peft", "flwr-datasets", "hydra-core")
"""Whose versions are written beside the configuration."""


def output_folder(output: str) -> Path:
    """Return the folder that the configuration's ``output`` means; ``~`` is the user's home."""
    return Path(output).expanduser()


def check_output(output: Path, name: str) -> None:
    """Raise RunError now if `create_run_folder` would refuse; leaves nothing."""
    check_name(name)
    existing = next(
        path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path)
    )
    if not existing.is_dir():
        raise RunError(
            f"output = {str(output)!r} cannot be made: {existing} is not a folder; choose "
            "another place with output=<folder>"
        )
    try:  # permission bits alone say little: read-only file systems, quotas, root
        with tempfile.TemporaryDirectory(prefix=".fedlr-", dir=existing):
            pass
    except OSError as error:
        raise RunError(
            f"output = {str(output)!r} cannot be written: in {existing}, {error.strerror or error}"
            "; choose a folder of your own with output=<folder>"
        ) from error


def create_run_folder(output: Path, name: str, now: datetime) -> Path:
    """Make ``<output>/<date>/<time>-<name>``.

    Args:
        output: Parent of all runs; made where it is missing.
        name: Last part of the folder's name; letters, digits, ``.``, ``_``, ``-``.
        now: Local time of the start.

    Returns:
        The new folder. A folder of the same second gets ``-2``, ``-3`` …: no
        run is ever written over another.

    Raises:
        RunError: The name has other characters, or the place cannot be written.
    """
    check_name(name)
    parent = output / now.strftime("%Y-%m-%d")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            suffix = "" if attempt == 1 else f"-{attempt}"
            folder = parent / f"{now.strftime('%H-%M-%S')}-{name}{suffix}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise RunError(
            f"output = {str(output)!r} cannot be written: {error.strerror or error}; choose a "
            "folder of your own with output=<folder>"
        ) from error
    raise RunError(f"{parent} holds 1000 runs of this second; wait, or change name=")


def make_run_folder(folder: Path) -> None:
    """Make ``folder`` and what is above it; RunError where it exists or cannot be made."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"the run folder {str(folder)!r} cannot be made: {error.strerror or error}; move what "
            "is there away, or choose a folder of your own"
        ) from error


def remove_unbegun(folder: Path) -> None:
    """Remove what a process that was killed before its run began has left in ``folder``.

    Raises:
        RunError: It cannot be removed, another process works at it, or it is a run, or
            was one: that is never removed.
    """
    if not folder.exists():
        return
    with hold_run(folder):
        if (folder / FACTS_FILE).exists():
            raise RunError(f"{str(folder)!r} is a run, with ledgers of what it spent; resume it")
        if (found := trace(folder)) is not None:
            raise RunError(
                f"{str(folder)!r} was a run, as {found} tells, and has lost {FACTS_FILE}; bring "
                f"{FACTS_FILE} back from a copy, or move the folder away and know that the ε "
                "which it has spent is no longer counted"
            )
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise RunError(
                f"{error.filename or folder} cannot be removed: {error.strerror or error}; remove "
                "the folder by hand"
            ) from error


def check_name(name: str) -> None:
    """Raise RunError where ``name`` cannot be the name of a folder."""
    if not name or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise RunError(f"name = {name!r} must be letters, digits, '.', '_' or '-'; change it")
    if name in (".", ".."):
        raise RunError(f"name = {name!r} is a folder that exists already; choose another name")


def write_config(folder: Path, config_json: str) -> None:
    """Write ``config.json``: the configuration, package versions and the code's revision.

    Args:
        folder: The run folder.
        config_json: Canonical JSON of the configuration.
    """
    content: Mapping[str, Any] = {
        "config": json.loads(config_json),
        "versions": {"fedlr": __version__, "python": platform.python_version(), **versions()},
        "git_revision": git_revision(),
    }
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the version of each of ``packages`` that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout this code runs from, ``+changes`` where it is edited; else None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", *arguments],
                cwd=root,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changes else head
