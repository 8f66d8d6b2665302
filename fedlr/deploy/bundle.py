"""The app that Flower ships to every node: two lines that import the installed fedlr.

No code of a run travels: what a node executes is what its operator installed. (Whoever reaches
the SuperLink's control interface can ship another app; a site's agent expects that.)
"""

from __future__ import annotations

import json
from pathlib import Path

from fedlr import __version__

_PROJECT = """\
[project]
name = "fedlr-run"
version = "{version}"
description = "A run of fedlr, which every node has installed"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = []

[tool.flwr.app]
publisher = "fedlr"
fab-include = ["fedlr_run/*.py"]

[tool.flwr.app.components]
serverapp = "fedlr_run.server:app"
clientapp = "fedlr_run.client:app"

[tool.flwr.app.config]
order = ""
"""

# Flower looks for a plain assignment of ``app`` in the source.
_SIDE = '''\
"""The {side}'s part of the installed fedlr."""

from {package} import app as _app

app = _app
'''


def write_app(folder: Path) -> Path:
    """Write the app into an empty folder and return its place."""
    package = folder / "fedlr_run"
    package.mkdir()
    (folder / "pyproject.toml").write_text(_PROJECT.format(version=__version__), encoding="utf-8")
    (package / "__init__.py").write_text('"""A run of fedlr."""\n', encoding="utf-8")
    for side in ("server", "client"):
        text = _SIDE.format(side=side, package=f"{side}.main")
        (package / f"{side}.py").write_text(text, encoding="utf-8")
    return folder


def write_run_config(path: Path, order: str) -> Path:
    """Write the run config that carries a signed order; every JSON text is a TOML text."""
    path.write_text(f"order = {json.dumps(order)}\n", encoding="utf-8")
    return path
