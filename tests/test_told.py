"""Sites are told all of a run but the server's places, and take the same from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.declaration import Declaration, read_declaration
from client.resident import local_config
from fedlr.config import RunConfig, from_json, from_mapping, to_json
from fedlr.errors import RunError
from fedlr.told import KEPT, for_sites, keep, kept, whole
from tests.client.real_site import place

SECRET = "/srv/coordinator"

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"output": f"{SECRET}/runs"},
    "file": {
        "data": {"kind": "file", "path": f"{SECRET}/rows", "cache": f"{SECRET}/cache"},
        "model": {"name": f"{SECRET}/models/minilm"},
    },
    "text of its own": {
        "data": {"kind": "file", "path": f"{SECRET}/rows", "label_names": ["a", "b"]},
        "subspace": {"kind": "gradient", "public": f"{SECRET}/text"},
    },
    "text of the library": {"subspace": {"kind": "activations", "public": "stdlib"}},
    "hub": {"data": {"kind": "hub", "name": "org/set"}, "model": {"name": "org/model"}},
    "hub in a folder": {
        "data": {"kind": "hub", "name": f"{SECRET}/set"},
        "model": {"name": f"../..{SECRET}/models/minilm"},
    },
    "tracked": {"tracking": {"kind": "mlflow", "uri": f"https://coordinator{SECRET}"}},
}


def config(name: str) -> RunConfig:
    given = {"federation": {"engine": "deploy"}, "optimizer": {"steps": 7}, **RUNS[name]}
    return from_mapping({"output": f"{SECRET}/runs", **given})


@pytest.fixture(scope="module")
def declaration(tmp_path_factory: pytest.TempPathFactory) -> Declaration:
    return read_declaration(place(tmp_path_factory.mktemp("site")).policy)


@pytest.mark.parametrize("name", RUNS)
def test_sites_take_the_same_from_it_and_learn_no_place(
    name: str, declaration: Declaration
) -> None:
    asked = config(name)
    text = to_json(for_sites(asked))
    assert "coordinator" not in text
    told = from_json(text)  # a configuration that every rule lets pass
    assert for_sites(told) == told == for_sites(asked)
    assert local_config(told, declaration) == local_config(asked, declaration)
    sections = ("seed", "name", "adapter", "method", "combine", "partition", "privacy")
    for section in (*sections, "optimizer", "federation", "kernels"):
        assert getattr(told, section) == getattr(asked, section), section
    assert told.data.kind == asked.data.kind


def test_what_a_server_keeps_is_what_it_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config("file")
    signed = for_sites(asked)
    assert whole("run-1", signed) == signed
    monkeypatch.setenv(KEPT, str(tmp_path / "configs"))
    with pytest.raises(RunError, match="no settings of the run run-1 are kept"):
        whole("run-1", signed)
    keep(tmp_path / "configs", "run-1", asked)
    assert whole("run-1", signed) == asked
    other = replace(signed, seed=signed.seed + 1)
    with pytest.raises(RunError, match="not what was signed"):
        whole("run-1", other)
    (tmp_path / "configs" / "run-1.json").write_text("{")
    with pytest.raises(RunError, match="cannot be used"):
        whole("run-1", signed)
    assert kept(tmp_path / "configs", "run-2") is None
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        keep(tmp_path / "file" / "configs", "run-1", asked)
