from __future__ import annotations

import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from fedlr.data import stdlib
from fedlr.errors import DataError

ROOT = Path(sysconfig.get_paths()["stdlib"])

LEFT_OUT = {
    *("antigravity", "this", "encodings", "pydoc_data", "sitecustomize", "usercustomize"),
    *("aifc", "asynchat", "asyncore", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr"),
    *("imp", "lib2to3", "mailcap", "nntplib", "pipes", "smtpd", "sndhdr", "sre_compile"),
    *("sre_constants", "sre_parse", "sunau", "telnetlib", "test", "uu", "xdrlib", "msilib"),
}


def write(root: Path, name: str, source: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def numbered(count: int, word: str) -> str:
    """Source of ``count`` functions with different docstrings of six words."""
    return "".join(
        f'def f{row}():\n    """The {word} number {row} of many."""\n' for row in range(count)
    )


def test_every_module_is_either_in_an_area_or_left_out_on_purpose() -> None:
    names = {path.stem for path in ROOT.glob("*.py")}
    names |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    public = {name for name in names if not name.startswith("_")}
    assert public - set(stdlib.AREA_OF_MODULE) - LEFT_OUT == set()
    assert set(stdlib.AREA_OF_MODULE).isdisjoint(LEFT_OUT)


def test_areas_and_label_texts_agree() -> None:
    assert set(stdlib.AREA_OF_MODULE.values()) == set(stdlib.LABEL_TEXTS)
    assert len(stdlib.LABEL_TEXTS) == 6
    assert sum(len(modules.split()) for modules in stdlib._MODULES.values()) == len(
        stdlib.AREA_OF_MODULE
    )


def test_the_embedded_data_of_this_python() -> None:
    stdlib.read_docstrings.cache_clear()
    start = time.perf_counter()
    loaded = stdlib.load(0.1, 0)
    assert time.perf_counter() - start < 300  # five on an idle machine
    labels = np.concatenate([loaded.train.labels, loaded.validation.labels])
    texts = loaded.train.texts + loaded.validation.texts
    assert loaded.declared_public is True
    assert len(set(texts)) == len(texts)
    assert all(len(text) <= 300 and text == " ".join(text.split()) for text in texts)
    assert len(loaded.validation) == round(0.1 * len(texts))
    if loaded.notices or sys.version_info >= (3, 14):
        pytest.skip("the figures below are for a whole CPython 3.11, 3.12 or 3.13")
    assert loaded.label_names == tuple(stdlib.LABEL_TEXTS)
    assert 6_100 <= len(texts) <= 6_700
    assert 0.22 <= np.bincount(labels).max() / len(labels) <= 0.27


def test_users_are_modules_and_fix_the_class() -> None:
    train = stdlib.load(0.1, 0).train
    names = tuple(stdlib.LABEL_TEXTS)
    assert train.users is not None
    pairs = set(zip(train.users, train.labels.tolist(), strict=True))
    assert len(pairs) == len({user for user, _ in pairs})
    assert ("email", names.index("network")) in pairs
    assert ("tkinter", names.index("graphical interfaces")) in pairs


def test_the_seed_moves_the_cut_and_nothing_else() -> None:
    first, again, other = (stdlib.load(0.1, seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert {*first.train.texts, *first.validation.texts} == {
        *other.train.texts,
        *other.validation.texts,
    }


def test_what_is_read_and_in_which_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        "json.py",
        '"""The module   says\n\n  five words here."""\n'
        "class C:\n"
        '    """A class that says something too."""\n'
        "    async def f(self):\n"
        '        """A coroutine that says something too."""\n'
        '        def inner():\n            """A nested function says something too."""\n'
        "def g():\n"
        '    """Only four words here."""\n'
        "def h():\n"
        '    """A class that says something too."""\n'
        "if True:\n"
        '    def k():\n        """' + "long word " * 40 + '"""\n',
    )
    write(tmp_path, "csv.py", '"""First by path, not by table."""\n')
    write(tmp_path, "json/test/test_it.py", '"""A test package is left out."""\n')
    write(tmp_path, "unknown.py", '"""A module that no table knows."""\n')
    write(tmp_path, "re.py", "def broken(:\n")
    (tmp_path / "html.py").write_bytes(b'"""Not \xff UTF-8 in this file."""\n')
    assert [tuple(example) for example in stdlib.read_docstrings(tmp_path)] == [
        ("First by path, not by table.", "csv"),
        ("The module says five words here.", "json"),
        ("A class that says something too.", "json"),
        ("A coroutine that says something too.", "json"),
        ("A nested function says something too.", "json"),
        (("long word " * 40)[:300].rstrip(), "json"),
    ]


def test_nothing_is_imported(tmp_path: Path) -> None:
    write(tmp_path, "json.py", '"""This module must never be run."""\nraise SystemExit(1)\n')
    assert len(stdlib.read_docstrings(tmp_path)) == 1


def test_a_small_class_is_dropped_with_a_notice(tmp_path: Path) -> None:
    write(tmp_path, "tkinter/__init__.py", numbered(99, "widget"))
    write(tmp_path, "socket.py", numbered(100, "socket"))
    write(tmp_path, "json.py", numbered(150, "string"))
    loaded = stdlib._load_from(tmp_path, 0.1, 0)
    assert loaded.label_names == ("network", "text and markup")
    assert len(loaded.train) + len(loaded.validation) == 250
    assert any("'graphical interfaces' has 99 examples" in notice for notice in loaded.notices)
    labels = np.concatenate([loaded.train.labels, loaded.validation.labels])
    assert np.bincount(labels).tolist() == [100, 150]


@pytest.mark.parametrize("name", ["python311.zip", "empty"])
def test_a_python_without_sources_gives_a_way_out(tmp_path: Path, name: str) -> None:
    if name == "empty":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DataError, match=r"comes without its sources\. Use data=file"):
        stdlib._load_from(tmp_path / name, 0.1, 0)
