"""What a run may ask of a real site is a list; everything else is the operator's."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from client.declaration import Declaration
from client.resident import local_config
from fedlr.config import RunConfig, setting_names
from tests.client.real_site import Place, place

ASKED = (
    *("seed", "privacy", "optimizer", "method.name", "federation.rounds"),
    *("model.max_length", "model.random_weights", "model.precision", "model.head"),
    *("adapter.rank", "adapter.alpha", "adapter.modules", "adapter.layers"),
    *("subspace.refresh", "subspace.refresh_every"),
)
"""Settings that a coordinator decides; a new one belongs here only after a thought."""

OPERATORS = ("privacy.policies",)
"""Below `ASKED`, and not asked all the same."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def declaration(site: Place) -> Declaration:
    return site.declaration


@pytest.fixture(scope="module")
def asked(site: Place) -> RunConfig:
    return site.config()


def is_asked(name: str) -> bool:
    below = any(name == one or name.startswith(f"{one}.") for one in ASKED)
    return below and name not in OPERATORS


def leaves() -> list[str]:
    names = setting_names()
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def with_another(config: Any, name: str) -> Any:
    """The configuration with an unmistakable value in the place of one setting, unchecked."""
    first, _, rest = name.partition(".")
    if rest:
        return replace(config, **{first: with_another(getattr(config, first), rest)})
    return replace(config, **{first: f"another {name}"})


def value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", leaves())
def test_a_setting_is_the_coordinators_or_the_operators(
    declaration: Declaration, asked: RunConfig, name: str
) -> None:
    plain = local_config(asked, declaration)
    changed = local_config(with_another(asked, name), declaration)
    if is_asked(name):
        assert value(changed, name) == f"another {name.split('.')[-1]}"
    else:
        assert changed == plain


def test_the_operators_things_are_used(site: Place) -> None:
    found = local_config(RunConfig(), site.declaration)
    assert found.data.path == str(site.folder / "data")
    assert found.model.name == str(site.folder / "model")
    assert found.kernels.device == "cpu"
    assert found.tracking.kind == "none"
    assert all(
        is_dataclass(getattr(found, f.name)) or f.name in ("seed", "name", "output")
        for f in fields(found)
    )
    assert Path(found.data.path).is_dir()
