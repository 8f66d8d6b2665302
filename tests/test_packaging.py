"""What pyproject.toml ships is what the tree holds."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from pathlib import Path

import pytest

import client
import fedlr
import server

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    found.name
    for package in (fedlr, server, client)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def test_every_package_is_shipped_and_conf_with_them() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    tree = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("fedlr", "server", "client")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(settings["packages"]) == tree | {"fedlr.conf"}
    assert settings["package-dir"] == {"fedlr.conf": "conf"}
    assert settings["package-data"]["fedlr.conf"] == ["**/*.yaml"]
    assert (ROOT / "fedlr" / "py.typed").is_file()


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_version_is_stated_once() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == fedlr.__version__
