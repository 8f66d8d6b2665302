"""Overrides compose into a checked configuration, or into sentences that say what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from fedlr.cli.compose import compose, compose_mapping, configuration_folder
from fedlr.config import RunConfig, from_mapping
from fedlr.errors import ConfigError


def test_yaml_and_dataclasses_name_the_same_settings() -> None:
    """A key that YAML forgets would hide a default in code, against rule 7.

    Values agree too, but for one: ``conf/`` declares the embedded data public, by
    name, while a default in code must declare nothing public.
    """
    from dataclasses import fields, is_dataclass

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


def problems(*words: str) -> tuple[str, ...]:
    try:
        compose(words)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("++federation.rounds=3",),
        ("+debug=tiny",),
        ("debug=null", "+experiment=null"),
        ("seed=1", "seed=2"),
        ("output=some folder",),
        ('output="a=b, é"',),
        ("adapter.layers=[-1]",),
        ("model.head={label_scale: 2}",),
    ],
)
def test_what_hydra_can_apply_is_applied(words: tuple[str, ...]) -> None:
    assert problems(*words) == ()


def test_overrides_arrive() -> None:
    config = compose(["+debug=tiny", "++privacy.epsilon=3", "model.head={label_scale: 2}"])
    assert (config.name, config.privacy.epsilon) == ("tiny", 3.0)
    assert config.model.head == replace(compose([]).model.head, label_scale=2.0)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("federation.rounds=3", "method=ffa_lora", "seed=1", "seed=2"),
        ("optimizer.steps=7", "optimizer=adam", "model/head=linear", "model.max_length=9"),
        ("experiment=sst2", "privacy.epsilon=3", "data.path=some folder", "debug=tiny"),
        ("adapter.alpha=${adapter.rank}", "adapter.rank=3", "adapter.layers=[-1]"),
        ("model.head={label_scale: 2}", "data.label_names=[a,b]", 'output="a=b, é"'),
        ("adapter.rank_by_client=[8,2]", "optimizer.head_learning_rate=null"),
    ],
    ids=" ".join,
)
def test_it_is_what_hydra_composes(words: tuple[str, ...]) -> None:
    """Choices are composed once and shared; this is the way without."""
    compose_mapping([*words, "federation.clients=99"])  # nothing of it may stay
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        slow: Any = OmegaConf.to_container(hydra_compose("config", list(words)), resolve=True)
    expected = {key: value for key, value in slow.items() if key not in ("experiment", "debug")}
    assert compose_mapping(words) == expected


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("model.kind=linear",), "no setting model.kind; did you mean model.head.kind?"),
    (("fedration.rounds=3",), "did you mean federation.rounds"),
    (("model/hed=linear",), "no setting model/hed; did you mean model/head?"),
    (("adapter.layers.0=2",), "there is no setting adapter.layers.0. `fedlr"),
    (("hydra.run.dir=x",), "there is no setting hydra.run.dir. `fedlr"),
    (("zzz=1",), "zzz=1: there is no setting zzz. `fedlr"),
    (("method=null",), "method=null: method must be one of "),
    (("method={name: fedsvd}",), "method must be one of "),
    (("method=[fedsvd]",), "method=[fedsvd]: method must be one of "),
    (("federation=3",), "federation=3: federation must be one of "),
    (("debug=tinny",), "debug must be one of tiny, null; did you mean debug=tiny?"),
    (("method=fedsvd", "method=ffa_lora"), "method is chosen already by method=fedsvd; give"),
    (("~debug",), "a setting cannot be removed, only changed; write debug=<value>"),
    (("",), "'' is not an override; write <setting>=<value>"),
    (("=3",), "'=3' is not an override; write <setting>=<value>"),
    (("output=a=b",), "for a shell as 'output=\"a=b\"'"),
    (("data.label_names=a,b",), "a list as data.label_names=[a,b]"),
    (
        ("data.path=${nowhere}",),
        "cannot be composed: Interpolation key 'nowhere' not found; ",
    ),
    (("method@x=fedsvd",), "method@x=fedsvd cannot be composed: "),
    (("seed@x=1",), "seed@x=1 cannot be composed: "),
    (("seed=null",), "seed is missing; give seed=<an integer>"),
]


@pytest.mark.parametrize(("words", "says"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_what_it_cannot_is_one_sentence(words: tuple[str, ...], says: str) -> None:
    (found,) = problems(*words)
    assert says in found
    assert "\n" not in found
    assert "hydra.cc" not in found


def test_wrong_words_do_not_hide_what_is_wrong_in_the_others() -> None:
    found = problems("zzz=1", "data=hub", "privacy.epsilon=0")
    assert [text.split(" ")[0] for text in found] == ["zzz=1:", "privacy.epsilon", "data.name"]


def test_what_is_missing_is_shown_but_not_composed() -> None:
    assert compose_mapping(["model=encoder"])["model"]["name"] == "???"
    with pytest.raises(ConfigError, match="zzz"):
        compose_mapping(["zzz=1"])


def test_configuration_folder_is_the_checkout_or_the_package() -> None:
    assert (configuration_folder() / "config.yaml").is_file()
    assert Path(configuration_folder()).is_dir()
