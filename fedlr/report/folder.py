"""The run folder: where everything that happened is kept, and nothing private."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlr import __version__
from fedlr.errors import RunError
from fedlr.report.records import write_atomically

CONFIG_FILE = "config.json"

PACKAGES = ("torch", "flwr", "opacus", "transformers", "peft", "flwr-datasets", "hydra-core")
"""Whose versions are written beside the configuration."""


def output_folder(output: str) -> Path:
    """Return the folder that the configuration's ``output`` means; ``~`` is the user's home."""
    return Path(output).expanduser()


def check_output(output: Path, name: str) -> None:
    """Raise RunError now if `create_run_folder` would refuse; leaves nothing."""
    _check_name(name)
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
    _check_name(name)
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


def _check_name(name: str) -> None:
    if not name or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise RunError(f"name = {name!r} must be letters, digits, '.', '_' or '-'; change it")


def write_config(folder: Path, config_json: str) -> None:
    """Write ``config.json``: the configuration, package versions and the code's revision.

    Args:
        folder: The run folder.
        config_json: Canonical JSON of the configuration.
    """
    content: Mapping[str, Any] = {
        "config": json.loads(config_json),
        "versions": {"fedlr": __version__, "python": platform.python_version(), **_versions()},
        "git_revision": _git_revision(),
    }
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
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
