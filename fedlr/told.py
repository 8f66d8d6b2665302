"""What sites are told of a run's configuration, and where a server keeps what they are not.

A site checks the whole configuration that a coordinator signed, and an operator reads it before
approving. Places and addresses of the server are no part of what is asked: they are replaced
before it is signed, and the ServerApp reads them from a file of the server's own.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fedlr.config import RunConfig, TrackingConfig, from_json, to_json
from fedlr.errors import ConfigError, RunError
from fedlr.report.records import write_atomically

KEPT = "FEDLR_KEPT"
"""Variable of the server's programs: the folder of `keep`."""

ROWS, TEXT = "(the server's rows)", "(the server's text)"
"""What stands for ``data.path`` and ``subspace.public``; settings that need them stay valid."""


def for_sites(config: RunConfig) -> RunConfig:
    """Return ``config`` as sites are told: without places and addresses of the server.

    Without ``output``, ``data.cache`` and ``tracking``, which get their defaults; in the place
    of ``data.path`` and ``subspace.public`` (a file or folder) stands that they are the
    server's; of a base model or data set in a folder (a path from ``/``, ``.`` or ``~``) only the
    folder's own name. Nothing that a site takes from a run's configuration
    (`client.resident.local_config`) is touched.

    Guarantees:
        Told again it is the same: ``for_sites(for_sites(config)) == for_sites(config)``.
    """
    data, subspace, model = config.data, config.subspace, config.model
    if data.path is not None:
        data = replace(data, path=ROWS)
    if subspace.public not in (None, "stdlib"):
        subspace = replace(subspace, public=TEXT)
    if data.name is not None:
        data = replace(data, name=_without_place(data.name))
    model = replace(model, name=_without_place(model.name))
    return replace(
        config,
        output=RunConfig.output,
        data=replace(data, cache=None),
        subspace=subspace,
        model=model,
        tracking=TrackingConfig(),
    )


def _without_place(name: str) -> str:
    """Return a hub's name as it is, and of a folder's path its last part."""
    return Path(name).name or "folder" if name.startswith(("/", ".", "~")) else name


def keep(folder: Path, run: str, config: RunConfig) -> None:
    """Keep the whole configuration of a run; RunError where it cannot be written."""
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be made: {error.strerror or error}; use the user who owns the folder "
            "above it"
        ) from error
    write_atomically(folder / f"{run}.json", f"{to_json(config)}\n".encode())


def kept(folder: Path, run: str) -> RunConfig | None:
    """Return the whole configuration of a run, None where none is kept.

    Raises:
        RunError: It cannot be read.
    """
    path = folder / f"{run}.json"
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ConfigError, ValueError) as error:
        raise RunError(f"{path} cannot be used: {error}; bring it back from a copy") from error


def whole(run: str, signed: RunConfig) -> RunConfig:
    """Return the configuration that a server runs, given what it signed.

    Args:
        run: Name of the run.
        signed: The configuration of its order.

    Returns:
        What `keep` kept in the folder that the variable `KEPT` names; ``signed`` itself where
        there is no such variable.

    Raises:
        RunError: Nothing is kept for the run, or something else than was signed.
    """
    place = os.environ.get(KEPT)
    if place is None:
        return signed
    found = kept(Path(place), run)
    if found is None:
        raise RunError(f"no settings of the run {run} are kept in {place}; use `fedlr submit`")
    if for_sites(found) != signed:
        raise RunError(
            f"what is kept in {place} for the run {run} is not what was signed; start a new run"
        )
    return found
