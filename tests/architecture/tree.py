"""The shipped modules of a source tree, by dotted name."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedlr", "server", "client")


def modules(root: Path) -> dict[str, Path]:
    """Return path by dotted module name of every Python file of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def generated(path: Path) -> bool:
    """Return whether the gRPC compiler wrote the file."""
    return path.stem.endswith(("_pb2", "_pb2_grpc"))
