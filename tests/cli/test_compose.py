"""Every file under conf/ composes into a valid configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.cli.compose import choices, compose, configuration_folder
from fedlr.config import RunConfig, from_json, from_mapping, to_json
from fedlr.errors import ConfigError

NEEDED = {
    "data=file": "data.path=some/folder",
    "data=hub": "data.name=owner/set",
    "model=encoder": "model.name=owner/model",
    "method=head_only": "model/head=linear",
    "experiment=sst2": "data.path=some/folder",
}
CASES = [f"{group}={name}" for group, names in choices().items() for name in names]


def test_every_file_is_a_case() -> None:
    files = [path for path in configuration_folder().rglob("*.yaml") if path.name != "config.yaml"]
    assert len(CASES) == len(files) > 20


@pytest.mark.parametrize("case", CASES)
def test_choice_composes_and_round_trips(case: str) -> None:
    extra = [NEEDED[case]] if case in NEEDED else []
    config = compose([case, *extra])
    assert from_json(to_json(config)) == config


def test_yaml_and_dataclasses_name_the_same_settings() -> None:
    """A key that YAML forgets would hide a default in code, against rule 7.

    Values agree too, but for one: ``conf/`` declares the embedded data public, by
    name, while a default in code must declare nothing public.
    """
    from dataclasses import fields, is_dataclass

    from fedlr.cli.compose import compose_mapping

    def compare(kind: type, mapping: object, where: str) -> None:
        assert isinstance(mapping, dict), where
        assert {item.name for item in fields(kind)} == set(mapping), where
        default = kind()
        for item in fields(kind):
            value = getattr(default, item.name)
            if is_dataclass(value):
                compare(type(value), mapping[item.name], f"{where}{item.name}.")

    composed = compose_mapping([])
    compare(RunConfig, composed, "")
    declared = from_mapping(composed)
    assert declared.data.public
    assert replace(declared, data=replace(declared.data, public=False)) == RunConfig()


def test_unknown_override_names_it() -> None:
    with pytest.raises(ConfigError, match="rounds_typo"):
        compose(["federation.rounds_typo=3"])


def test_configuration_folder_is_the_checkout_or_the_package() -> None:
    assert (configuration_folder() / "config.yaml").is_file()
    assert Path(configuration_folder()).is_dir()
