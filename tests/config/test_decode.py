"""Mapping ↔ `RunConfig` ↔ canonical JSON, exactly; every problem in one error."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlr.config import (
    FederationConfig,
    HeadConfig,
    ModelConfig,
    PrivacyConfig,
    RunConfig,
    from_json,
    from_mapping,
    to_json,
)
from fedlr.errors import ConfigError


def problems(values: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        from_mapping(values)
    return caught.value.problems


def test_nothing_given_is_the_defaults() -> None:
    assert from_mapping({}) == RunConfig()
    assert from_mapping({"model": {"head": {}}}) == RunConfig()


configs = st.builds(
    lambda seed, rate, share, texts, layers, name: from_mapping(
        {
            "seed": seed,
            "name": name,
            "optimizer": {"learning_rate": rate},
            "privacy": {"head_share": share},
            "model": {"head": {"label_texts": texts, "trained": True}},
            "adapter": {"layers": layers},
        }
    ),
    st.integers(0, 2**70),
    st.floats(1e-300, 1e300),
    st.none() | st.floats(0.001, 0.999),
    st.none() | st.lists(st.text(max_size=4), max_size=3),
    st.none() | st.lists(st.integers(-9, 9), min_size=1, max_size=3),
    st.text(max_size=8),
)


@given(configs)
def test_json_round_trips_exactly(config: RunConfig) -> None:
    text = to_json(config)
    assert from_json(text) == config
    assert to_json(from_json(text)) == text
    assert from_mapping(asdict(config)) == config


@pytest.mark.parametrize(("text", "indices"), [("top:1", (-1,)), ("top:3", (-3, -2, -1))])
def test_top_k_is_another_spelling_of_a_list(text: str, indices: tuple[int, ...]) -> None:
    spelt = from_mapping({"adapter": {"layers": text}})
    assert spelt == from_mapping({"adapter": {"layers": list(indices)}})
    assert spelt.adapter.layers == indices
    assert from_json(to_json(spelt)) == spelt


def test_json_is_canonical() -> None:
    text = to_json(RunConfig())
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    shuffled = json.dumps(dict(reversed(json.loads(text).items())), indent=2)
    assert to_json(from_json(shuffled)) == text


@pytest.mark.parametrize("text", ["", "{", "NaN", "[]", "3", '"x"', "null", "{}x"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        from_json(text)


def test_numbers_take_the_forms_that_yaml_and_json_give_them() -> None:
    found = from_mapping({"privacy": {"delta": "1e-5", "epsilon": 3}})
    assert (found.privacy.delta, found.privacy.epsilon) == (1e-5, 3.0)
    assert isinstance(found.privacy.epsilon, float)
    assert from_mapping({"data": {"text_columns": ["a", "b"]}}).data.text_columns == ("a", "b")


ILL_TYPED: list[tuple[str, str, Any, str]] = [
    ("optimizer", "steps", "8", "an integer"),
    ("optimizer", "steps", 1.0, "an integer"),
    ("optimizer", "steps", True, "an integer"),
    ("optimizer", "learning_rate", "fast", "a number"),
    ("optimizer", "learning_rate", False, "a number"),
    ("optimizer", "learning_rate", [1.0], "a number"),
    ("optimizer", "learning_rate", 10**400, "a number"),
    ("optimizer", "head_learning_rate", "fast", "a number or null"),
    ("optimizer", "name", "lion", "one of sgd, adam"),
    ("optimizer", "name", ["sgd"], "one of sgd, adam"),
    ("privacy", "mode", True, "one of dp, dry, none"),
    ("data", "public", 1, "true or false"),
    ("data", "public", "true", "true or false"),
    ("data", "path", 3, "a text or null"),
    ("data", "text_columns", "text", "a list"),
    ("data", "text_columns", ["a", 1], "a list, each a text"),
    ("adapter", "layers", [0, "x"], "a list, each an integer or null"),
    *(
        ("adapter", "layers", value, "top:k (1 ≤ k ≤ 99), a list or null")
        for value in (3, "2", "top", "top:0", "top:-1", "top: 2", "TOP:2", "top:100", "top:1٣")
    ),
]


@pytest.mark.parametrize(("section", "name", "value", "wanted"), ILL_TYPED)
def test_a_wrong_type_is_named(section: str, name: str, value: Any, wanted: str) -> None:
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    assert problems({section: {name: value}}) == (f"{section}.{name} = {shown} must be {wanted}",)


def test_a_setting_that_needs_a_value_says_which_one() -> None:
    assert problems({"optimizer": {"steps": None}}) == (
        "optimizer.steps is missing; give optimizer.steps=<an integer>",
    )
    assert problems({"model": {"name": None}}) == (
        "model.name is missing; model=encoder needs model.name=<hub name or local folder>",
    )


@pytest.mark.parametrize("value", [None, 3, "adam", []])
def test_a_section_must_be_a_section(value: Any) -> None:
    shown = "null" if value is None else repr(value)
    assert problems({"optimizer": value}) == (f"optimizer = {shown} must be a section",)


def test_unknown_keys_are_named_at_every_depth_with_what_is_known() -> None:
    found = problems({"sed": 1, "model": {"nam": 2, "head": {"kid": 3}}})
    assert [text.split(" ")[0] for text in found] == ["sed", "model.nam", "model.head.kid"]
    assert all("is not a setting; " in text and " known here: " in text for text in found)
    assert "did you mean seed?" in found[0]
    assert "did you mean model.head.kind?" in found[2]
    assert "kind, trained" in found[2]


def test_every_problem_is_told_at_once() -> None:
    """An unknown key, a value out of range and two contradictions in one error."""
    found = problems(
        {
            "bogus": 1,
            "privacy": {"epsilon": -1.0},
            "federation": {"clients": 3, "clients_per_round": 4, "min_clients": 5},
        }
    )
    assert len(found) == 4
    for text, start in zip(
        found,
        ("bogus", "privacy.epsilon", "federation.clients_per_round", "federation.min_clients"),
        strict=True,
    ):
        assert text.startswith(start)


def test_a_default_in_the_place_of_a_bad_value_contradicts_nothing() -> None:
    """clients = "many" stands as 6 while the rest is judged: no word of 9 > 6, but of what is."""
    found = problems(
        {
            "name": 3,
            "federation": {"clients": "many", "clients_per_round": 9, "average_rounds": 99},
            "privacy": {"epsilon": 0},
            "data": {"kind": "hub"},
        }
    )
    assert [text.split(" ")[0] for text in found] == [
        *("name", "federation.clients", "privacy.epsilon"),
        *("federation.average_rounds", "data.name"),
    ]


def test_configurations_are_frozen_values() -> None:
    one = RunConfig(privacy=PrivacyConfig(epsilon=3.0))
    assert one == RunConfig(privacy=PrivacyConfig(epsilon=3.0)) != RunConfig()
    assert hash(one) == hash(replace(one))
    with pytest.raises(AttributeError):
        one.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        FederationConfig(6)  # type: ignore[call-arg, arg-type]
    assert ModelConfig().head == HeadConfig()
