"""The size budget and the other rules that a parser can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT, generated, modules, parse

FILE_LINES, BODY_LINES, KERNEL_LINES = 400, 60, 120
PARAMETERS, KERNEL_PARAMETERS = 6, 16
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Check = Callable[[Path], Iterator[str]]


def functions(path: Path) -> Iterator[Function]:
    """Yield every function of a file, nested ones and methods too."""
    return (node for node in ast.walk(parse(path)) if isinstance(node, Function))


def file_length(path: Path) -> Iterator[str]:
    """Complain about a file that is too long."""
    count = len(path.read_text(encoding="utf-8").splitlines())
    if count > FILE_LINES:
        yield f"{count} lines, at most {FILE_LINES}"


def body_length(path: Path) -> Iterator[str]:
    """Complain about function bodies that are too long, docstring not counted."""
    limit = KERNEL_LINES if path.name == "triton.py" else BODY_LINES
    for node in functions(path):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body and (count := (body[-1].end_lineno or 0) - body[0].lineno + 1) > limit:
            yield f"{node.name}: {count} lines, at most {limit}"


def parameter_count(path: Path) -> Iterator[str]:
    """Complain about functions with too many named parameters."""
    for node in functions(path):
        count = len(named_parameters(node))
        limit = KERNEL_PARAMETERS if is_kernel(path, node) else PARAMETERS
        if count > limit:
            yield f"{node.name}: {count} parameters, at most {limit}"


def is_kernel(path: Path, node: Function) -> bool:
    """Return whether ``node`` runs on the device: pointers and strides cannot be one argument."""
    compiled = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    return path.name == "triton.py" and compiled


def named_parameters(node: Function) -> list[ast.arg]:
    """Return positional and keyword-only parameters without ``self`` and ``cls``."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    return named + arguments.kwonlyargs


def assertions(path: Path) -> Iterator[str]:
    """Complain about ``assert``, which vanishes under ``python -O``."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert; raise instead"


def docstrings(path: Path) -> Iterator[str]:
    """Complain about public modules, classes and functions without a docstring."""
    if path.stem.startswith("_") and path.stem != "__init__":
        return
    pending: list[tuple[str, ast.Module | ast.ClassDef | Function]] = [("module", parse(path))]
    while pending:
        name, node = pending.pop()
        if ast.get_docstring(node) is None:
            yield f"{name}: no docstring"
        if isinstance(node, Function):
            continue
        for child in node.body:
            if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
                pending.append((child.name, child))


def annotated(path: Path) -> Iterator[str]:
    """Complain about functions that are not fully annotated."""
    for node in functions(path):
        extra = [arg for arg in (node.args.vararg, node.args.kwarg) if arg is not None]
        bare = [arg.arg for arg in (*named_parameters(node), *extra) if arg.annotation is None]
        if node.returns is None:
            bare.append("return")
        if bare:
            yield f"{node.name}: no annotation of {', '.join(bare)}"


def unfinished(path: Path) -> Iterator[str]:
    """Complain about markers of unfinished work."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if match := UNFINISHED.search(line):
            yield f"line {number}: {match[0]}"


def printing(path: Path) -> Iterator[str]:
    """Complain about ``print`` outside the command line."""
    if path.parent.name == "cli":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "builtins.print"):
            yield f"line {node.lineno}: print; only the command line talks"


CHECKS: list[Check] = [
    file_length,
    body_length,
    parameter_count,
    assertions,
    docstrings,
    annotated,
    unfinished,
    printing,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_file_keeps_the_rule(check: Check) -> None:
    files = [path for path in modules(ROOT).values() if not generated(path)]
    assert len(files) > 10
    assert [f"{p.relative_to(ROOT)}: {found}" for p in files for found in check(p)] == []


DOC = '"""Something."""\n'
LONG = "    x = 1\n"

BREACHES: list[tuple[Check, str, str, str]] = [
    (file_length, "a.py", "\n" * 400, "\n" * 401),
    (body_length, "a.py", f"def f():\n    {DOC}" + LONG * 60, "def f():\n" + LONG * 61),
    (body_length, "triton.py", "def f():\n" + LONG * 120, "def f():\n" + LONG * 121),
    (
        parameter_count,
        "a.py",
        "class C:\n    def f(self, a, b, c, d, *e, f, g, **h): ...\n",
        "def f(a, b, /, c, d, *, e, f, g): ...\n",
    ),
    (
        parameter_count,
        "triton.py",
        f"@triton.jit\ndef f({', '.join('abcdefghijklmnop')}): ...\n",
        f"def f({', '.join('abcdefghijklmnop')}): ...\n",
    ),
    (assertions, "a.py", "raise ValueError\n", "def f():\n    assert x\n"),
    (docstrings, "a.py", DOC + "def _f(): ...\n", "x = 1\n"),
    (docstrings, "__init__.py", DOC, ""),
    (docstrings, "a.py", DOC + "class _C:\n    def f(self): ...\n", DOC + "class C: ...\n"),
    (
        docstrings,
        "a.py",
        DOC + f"class C:\n    {DOC}    def __init__(self): ...\n",
        DOC + f"class C:\n    {DOC}    def f(self): ...\n",
    ),
    (annotated, "a.py", "def f(x: int) -> int: ...\n", "def f(x) -> int: ...\n"),
    (
        annotated,
        "a.py",
        "class C:\n    def f(self, *x: int) -> None: ...\n",
        "class C:\n    def f(self, *x) -> None: ...\n",
    ),
    (annotated, "a.py", "lambda x: x\n", "def f(): ...\n"),
    (unfinished, "a.py", "TODOS = 1\n", "# TO" + "DO later\n"),
    (printing, "a.py", "pprint(x)\n", "print(x)\n"),
    (printing, "cli/a.py", "print(x)\n", "def f():\n    builtins.print(x)\n"),
]


@pytest.mark.parametrize(("check", "name", "good", "bad"), BREACHES)
def test_every_rule_can_fail(tmp_path: Path, check: Check, name: str, good: str, bad: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(good)
    assert list(check(path)) == []
    broken = tmp_path / path.name
    broken.write_text(bad)
    assert len(list(check(broken))) == 1
