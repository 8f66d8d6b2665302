"""Imports point one way and every framework has one home; the table is in `rules`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.architecture import rules
from tests.architecture.tree import ROOT, modules, parse


class Import(NamedTuple):
    """One imported module: its dotted name, the line, and whether only for types."""

    target: str
    line: int
    types_only: bool


def imports(importer: str, path: Path, known: Collection[str]) -> Iterator[Import]:
    """Yield every import of a file, those inside functions and literal dynamic ones too."""
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    tree = parse(path)
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        for target in _targets(node, package, known):
            yield Import(target, getattr(node, "lineno", 0), id(node) in guarded)


def _targets(node: ast.AST, package: str, known: Collection[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        full = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in known else base for name in full]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def allowed(module: str, wanted: Import, own: tuple[str, ...]) -> bool:
    """Return whether ``module``, which may import ``own``, may import ``wanted``."""
    top = wanted.target.partition(".")[0]
    if top in rules.OWN:
        return rules.any_fits(own, wanted.target)
    if top in sys.stdlib_module_names or (wanted.types_only and top in rules.TYPES_ANYWHERE):
        return True
    return rules.any_fits(rules.HOMES.get(top, ()), module)


def violations(root: Path) -> list[str]:
    """Return one sentence per forbidden import or module without a rule."""
    found, tree = [], modules(root)
    for module, path in tree.items():
        own = rules.rule_of(module)
        if own is None:
            found.append(f"{module}: no rule covers it; add one to rules.py")
            continue
        for wanted in imports(module, path, tree):
            if not allowed(module, wanted, own):
                found.append(f"{module}:{wanted.line}: may not import {wanted.target}")
    return found


def test_the_tree_obeys_the_table() -> None:
    assert {"fedlr.errors", "fedlr.lowrank.factors", "fedlr.methods.method"} <= set(modules(ROOT))
    assert violations(ROOT) == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small tree that obeys the table."""
    for name in ("lowrank/factors", "methods/method", "methods/fedsvd", "privacy/ledger", "build"):
        write(tmp_path, f"fedlr/{name}.py", "import math\n")
    for name in ("__init__", "errors", "checks", "lowrank/__init__", "methods/__init__"):
        write(tmp_path, f"fedlr/{name}.py", "")
    write(tmp_path, "server/app.py", "from fedlr import build, __version__\nimport flwr.server\n")
    assert violations(tmp_path) == []
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


FORBIDDEN = [
    ("fedlr/lowrank/factors.py", "import fedlr.methods.method", "fedlr.methods.method"),
    ("fedlr/lowrank/factors.py", "from fedlr import build", "fedlr.build"),
    ("fedlr/lowrank/factors.py", "from ..methods import fedsvd", "fedlr.methods.fedsvd"),
    ("fedlr/lowrank/__init__.py", "from ..methods.fedsvd import x", "fedlr.methods.fedsvd"),
    ("fedlr/privacy/ledger.py", "from fedlr.methods.fedsvd import x", "fedlr.methods.fedsvd"),
    (
        "fedlr/methods/fedsvd.py",
        "def f():\n    import fedlr.privacy.ledger",
        "fedlr.privacy.ledger",
    ),
    ("fedlr/methods/fedsvd.py", "try:\n    import opacus.x\nexcept E:\n    pass", "opacus.x"),
    ("fedlr/errors.py", "import importlib\nimportlib.import_module('torch.nn')", "torch.nn"),
    ("fedlr/errors.py", "if not TYPE_CHECKING:\n    import torch", "torch"),
    ("fedlr/errors.py", "if TYPE_CHECKING:\n    import numpy", "numpy"),
    ("fedlr/errors.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "torch"),
    ("fedlr/build.py", "import hydra", "hydra"),
    ("fedlr/build.py", "import a_package_nobody_declared", "a_package_nobody_declared"),
    ("fedlr/build.py", "from server.app import x", "server.app"),
    ("fedlr/cli/main.py", "from fedlr.lowrank import factors", "fedlr.lowrank.factors"),
    ("client/site.py", "import flwr", "flwr"),
    ("client/site.py", "import server.app", "server.app"),
    ("fedlr/kernels/clip/naive.py", "import triton.language", "triton.language"),
    ("fedlr/report/records.py", "from fedlr.report import live", "fedlr.report.live"),
    ("fedlr/config.py", "from fedlr.methods.method import x", "fedlr.methods.method"),
    ("fedlr/__init__.py", "import torch", "torch"),
]


@pytest.mark.parametrize(("name", "text", "target"), FORBIDDEN)
def test_a_forbidden_import_is_reported(root: Path, name: str, text: str, target: str) -> None:
    write(root, "fedlr/report/live.py", "")
    write(root, name, text + "\n")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    (found,) = violations(root)
    assert found.startswith(f"{module}:")
    assert found.endswith(f"may not import {target}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "fedlr/errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        ),
        ("fedlr/privacy/ledger.py", "def f():\n    import opacus\n    from fedlr.lowrank import x"),
        ("fedlr/privacy/ledger.py", "from fedlr.methods.method import Parts"),
        ("fedlr/kernels/clip/triton.py", "import triton"),
        ("fedlr/methods/fedsvd.py", "from . import method\nfrom .method import Parts"),
        ("fedlr/cli/main.py", "import hydra, server.app\nfrom fedlr import build"),
    ],
)
def test_an_import_in_the_right_direction_is_not_reported(root: Path, name: str, text: str) -> None:
    write(root, name, text + "\n")
    assert violations(root) == []


@pytest.mark.parametrize("name", ["fedlr/utils/misc.py", "fedlr/helpers.py", "fedlr/methodsx.py"])
def test_a_module_without_a_rule_is_reported(root: Path, name: str) -> None:
    write(root, name, "")
    (found,) = violations(root)
    assert "no rule covers it" in found
