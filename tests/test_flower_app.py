"""What ``flwr run .`` finds in the checkout: two apps, the default configuration, code only."""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import client.main
import server.main
from fedlr.cli.compose import compose
from fedlr.config import to_json
from fedlr.errors import RunError
from server.main import count_nodes

ROOT = Path(__file__).resolve().parents[1]


def app_table() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["tool"]["flwr"]["app"]
    return table


def test_the_default_of_flwr_run_is_the_default_of_conf() -> None:
    """If this fails, put the left side into pyproject.toml, in single quotes."""
    assert to_json(compose([])) == app_table()["config"]["cfg"]
    assert list(app_table()["config"]) == ["cfg"]


def test_the_components_are_apps_that_a_parser_can_find() -> None:
    """Flower's check reads the source: `app` must be assigned at the top of the module."""
    components = app_table()["components"]
    assert components == {"serverapp": "server.main:app", "clientapp": "client.main:app"}
    assert isinstance(server.main.app, ServerApp)
    assert isinstance(client.main.app, ClientApp)
    for reference in components.values():
        path = ROOT / f"{reference.partition(':')[0].replace('.', '/')}.py"
        assigned = {
            target.id
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        assert "app" in assigned


def test_what_is_shipped_is_every_module_and_nothing_else() -> None:
    patterns = app_table()["fab-include"]
    shipped = {path for pattern in patterns for path in ROOT.glob(pattern)}
    modules = {path for top in ("fedlr", "server", "client") for path in (ROOT / top).rglob("*.py")}
    assert shipped == modules
    assert sum(path.stat().st_size for path in shipped) < 5e6  # Flower's limit is 10 MB


class Nodes:
    """A grid whose nodes register one after the other."""

    def __init__(self, counts: Iterator[int]) -> None:
        self.counts = counts

    def get_node_ids(self) -> list[int]:
        return list(range(next(self.counts)))


def growing(*counts: int) -> Iterator[int]:
    yield from counts
    while True:
        yield counts[-1]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times faster: a count must stand for 20 ms, at looks 2 ms apart."""
    monkeypatch.setattr(server.main, "SETTLED_S", 0.02)
    monkeypatch.setattr(server.main, "POLL_S", 0.002)


@pytest.mark.usefixtures("hurry")
def test_the_nodes_are_counted_when_no_more_of_them_come() -> None:
    assert count_nodes(Nodes(growing(0, 0, 1, 2, 2, 5)), 60.0) == 5  # type: ignore[arg-type]


@pytest.mark.usefixtures("hurry")
def test_a_number_that_never_stands_still_counts_when_time_is_up() -> None:
    restless = (1 + turn % 2 for turn in range(10**6))
    assert count_nodes(Nodes(restless), 0.05) in (1, 2)  # type: ignore[arg-type]


@pytest.mark.usefixtures("hurry")
def test_no_node_at_all_is_an_error_that_names_the_option() -> None:
    with pytest.raises(RunError, match="num-supernodes"):
        count_nodes(Nodes(growing(0)), 0.05)  # type: ignore[arg-type]


def test_the_default_is_one_text_that_toml_can_quote() -> None:
    text = app_table()["config"]["cfg"]
    assert "'" not in text
    assert json.loads(text)["federation"]["engine"] == "local"
