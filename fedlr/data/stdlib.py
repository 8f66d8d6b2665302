"""``data=stdlib``, the embedded default: what the standard library says about itself.

One example per docstring of the running Python's standard library, to be
sorted into six areas by the module it is from. Sources are read with ``ast``,
never imported, so it works offline, on every machine, in a few seconds.

The natural id (user) of an example is its top-level module: client data then
differ in size and in class, as those of real sites do.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from fedlr.data.dataset import LoadedData, TextDataset, split_validation
from fedlr.errors import DataError

LABEL_TEXTS = {
    "network": "networking: sockets, HTTP, e-mail, event loops and internet protocols",
    "text and markup": "text processing: strings, encodings, XML, JSON, CSV and option parsing",
    "developer tools": "tools for developers: testing, debugging, profiling, importing, logging",
    "numbers, types and time": "numbers, data types, collections, functions, dates and calendars",
    "files, processes and operating system": (
        "the operating system: files, paths, archives, threads and processes"
    ),
    "graphical interfaces": "graphical user interfaces: windows, widgets, menus and drawing",
}
"""Class name → the longer phrase that a label-text head embeds; index order."""

# Python 3.11 to 3.14. Left out: names with an underscore (twins of another module),
# `encodings` (a hundred copies of one sentence), and what 3.12 and 3.13 removed, so
# that the task is the same on every version.
_MODULES = {
    "network": """
        asyncio email ftplib http imaplib ipaddress mailbox mimetypes netrc nturl2path poplib
        selectors smtplib socket socketserver ssl urllib uuid webbrowser wsgiref xmlrpc""",
    "text and markup": """
        argparse base64 codecs configparser csv difflib getopt gettext html json locale optparse
        plistlib pprint quopri re reprlib shlex string stringprep textwrap tomllib xml""",
    "developer tools": """
        annotationlib ast bdb cProfile cmd code codeop compileall dis doctest ensurepip importlib
        inspect keyword linecache logging modulefinder opcode pdb pickletools pkgutil profile
        pstats py_compile pyclbr pydoc rlcompleter runpy site symtable sysconfig tabnanny timeit
        token tokenize trace traceback tracemalloc unittest venv warnings zipapp zipimport""",
    "numbers, types and time": """
        abc bisect calendar collections colorsys contextlib contextvars copy copyreg dataclasses
        datetime decimal enum fractions functools graphlib hashlib heapq hmac numbers operator
        random sched secrets statistics struct types typing weakref zoneinfo""",
    "files, processes and operating system": """
        bz2 compression concurrent ctypes curses dbm filecmp fileinput fnmatch genericpath getpass
        glob gzip io lzma multiprocessing ntpath os pathlib pickle platform posixpath pty queue
        shelve shutil signal sqlite3 stat subprocess tarfile tempfile threading tty wave
        zipfile""",
    "graphical interfaces": "idlelib tkinter turtle turtledemo",
}
AREA_OF_MODULE = {module: area for area, modules in _MODULES.items() for module in modules.split()}
"""Top-level module → area; a module that is not in the table is left out."""

MINIMUM_PER_CLASS = 100
"""A class with fewer examples is dropped (a Python without Tk has no widgets)."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
MINIMUM_WORDS = 5
MAXIMUM_CHARACTERS = 300


class Docstring(NamedTuple):
    """One docstring: its text on one line and the top-level module it is from."""

    text: str
    module: str


def load(validation_fraction: float, seed: int, by_user: bool = False) -> LoadedData:
    """Read the embedded data of the running Python.

    Args:
        validation_fraction: Part set aside as public validation rows, in (0, 1).
        seed: Public seed of that cut, ≥ 0.
        by_user: Cut by module rather than by row.

    Returns:
        Train and validation rows, declared public, users = module names. The
        rows before the cut are in the order of file path and line, whatever
        order the file system lists.

    Raises:
        DataError: The sources are not on disk (a zipped or stripped Python).
    """
    return _load_from(source_root(), validation_fraction, seed, by_user)


def source_root() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _load_from(
    root: Path, validation_fraction: float, seed: int, by_user: bool = False
) -> LoadedData:
    """`load` for the standard library at ``root``."""
    examples = read_docstrings(root)
    areas = [AREA_OF_MODULE[example.module] for example in examples]
    kept = tuple(name for name in LABEL_TEXTS if areas.count(name) >= MINIMUM_PER_CLASS)
    if len(kept) < 2:
        raise DataError(
            f"data=stdlib found {len(examples)} docstrings at {root}: this Python comes without "
            "its sources. Use data=file or data=hub, or a Python installed with its .py files."
        )
    notices = tuple(
        f"The class {name!r} has {areas.count(name)} examples in this Python's standard library, "
        f"fewer than {MINIMUM_PER_CLASS}, and is dropped."
        for name in LABEL_TEXTS
        if name not in kept
    )
    rows = [row for row, area in enumerate(areas) if area in kept]
    dataset = TextDataset(
        texts=tuple(examples[row].text for row in rows),
        pairs=None,
        labels=np.array([kept.index(areas[row]) for row in rows], dtype=np.int64),
        users=tuple(examples[row].module for row in rows),
    )
    train, validation = split_validation(dataset, validation_fraction, seed, by_user)
    return LoadedData(train, validation, kept, declared_public=True, notices=notices)


Owner: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
"""What has a docstring, beside a module."""

_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
"""Where a statement, a handler or a case has further statements."""


@lru_cache(maxsize=1)
def read_docstrings(root: Path) -> tuple[Docstring, ...]:
    """Return every docstring of the modules in `AREA_OF_MODULE` under ``root``.

    Docstrings of modules, classes, functions and coroutines, white space
    normalised, five words or more, cut at 300 characters, each text once.
    Test packages are left out and files that do not parse are skipped.
    """
    found: dict[str, Docstring] = {}
    for path, module in source_files(root):
        for docstring in _docstrings(path):
            text = " ".join(docstring.split())
            if len(text.split()) < MINIMUM_WORDS:
                continue
            text = text[:MAXIMUM_CHARACTERS].rstrip()
            found.setdefault(text, Docstring(text, module))
    return tuple(found.values())


def source_files(root: Path) -> list[tuple[Path, str]]:
    """Return the ``.py`` files of the known modules, tests left out, and their modules.

    Sorted by path under ``root``, whatever order the file system lists.
    """
    found: dict[str, Path] = {}
    for module in AREA_OF_MODULE:
        paths = [path for path in (root / f"{module}.py",) if path.is_file()]
        for path in (*paths, *(root / module).rglob("*.py")):
            relative = path.relative_to(root)
            if not _SKIPPED_FOLDERS.intersection(relative.parts):
                found[relative.as_posix()] = path
    return [
        (found[relative], relative.split("/")[0].removesuffix(".py")) for relative in sorted(found)
    ]


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one file from the first line to the last."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in (tree, *sorted(_owners(tree), key=lambda owner: (owner.lineno, owner.col_offset))):
        docstring = ast.get_docstring(node)
        if docstring is not None:
            yield docstring


def _owners(tree: ast.Module) -> Iterator[Owner]:
    """Yield the classes and functions of a file, in any order.

    Statements stand in statements alone: going through expressions too, as `ast.walk`
    does, would take most of the time of reading the data.
    """
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for name in _BLOCKS:
            left.extend(getattr(node, name, ()))
