"""Which layers are adapted, and what an adapted model is before anything trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedlr.adapters.inject import inject, matching_layers
from fedlr.errors import ConfigError, ModelError
from tests.models import FAMILIES, RANK, WIDTH, encoder, modules_of, rows

BATCH = rows([5, 3, 8]).batch(np.array([0, 1, 2])).inputs()


def names(modules: list[str], layers: list[int] | None) -> list[str]:
    return list(matching_layers(encoder("bert", layers=3), modules, layers))


def test_a_suffix_matches_whole_parts_of_a_name() -> None:
    query = [f"encoder.layer.{i}.attention.self.query" for i in range(3)]
    assert names(["query"], None) == query
    assert names(["self.query"], None) == query
    assert names(["query", "self.query"], None) == query
    assert set(names(["output.dense"], None)) == {
        *(f"encoder.layer.{i}.attention.output.dense" for i in range(3)),
        *(f"encoder.layer.{i}.output.dense" for i in range(3)),
    }
    with pytest.raises(ConfigError, match=r"'uery' matches no linear layer"):
        names(["uery"], None)


def test_layers_count_from_either_end() -> None:
    assert names(["query"], [0, -1]) == [f"encoder.layer.{i}.attention.self.query" for i in (0, 2)]
    assert names(["query"], [2, -1]) == ["encoder.layer.2.attention.self.query"]


def test_the_pooler_is_never_adapted() -> None:
    assert not any("pooler" in name for name in names(["dense"], None))
    with pytest.raises(ConfigError, match="matches no linear layer"):
        names(["pooler.dense"], None)


def test_what_matches_nothing_is_named_with_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        names(["quary", "valu", "query"], [3, -4, 0])
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "this model has: dense, key, query, value" in text
    assert "adapter.layers: 3, -4 are outside [-3, 2], the model has 3 layers; at most" in text
    for modules, layers in (([], None), (["query"], [])):
        with pytest.raises(ConfigError, match="matches nothing"):
            names(modules, layers)


class Mixed(nn.Module):
    """A query in the first layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(4, 4)}), nn.ModuleDict()])
        self.layer[1].add_module("key", nn.Linear(4, 4))


def test_modules_and_layers_that_never_meet_are_refused() -> None:
    assert list(matching_layers(Mixed(), ["query"], [0])) == ["layer.0.query"]
    with pytest.raises(ConfigError, match=r"\['query'\] matches nothing in .* \[1\]"):
        matching_layers(Mixed(), ["query"], [1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_frozen_and_changes_nothing(family: str) -> None:
    plain = encoder(family)
    expected = plain(**BATCH).last_hidden_state
    adapted, sites = inject(encoder(family), modules_of(family), None, RANK, 3.0)
    assert torch.equal(adapted(**BATCH).last_hidden_state, expected)
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    chosen = matching_layers(plain, modules_of(family), None)
    assert [site.name for site in sites] == list(chosen)
    for site in sites:
        assert (site.out_features, site.in_features, site.rank) == (WIDTH, WIDTH, RANK)
        assert site.scaling == 3.0 / RANK
        layer = adapted.get_submodule(f"base_model.model.{site.name}")
        assert layer.get_submodule("lora_A.default").get_parameter("weight").shape == (RANK, WIDTH)
        assert layer.get_submodule("lora_B.default").get_parameter("weight").shape == (WIDTH, RANK)


def test_the_base_weights_are_the_ones_that_were_given() -> None:
    model = encoder("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted, _ = inject(model, ["query"], None, RANK, 1.0)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in adapted.state_dict().items()
        if "lora" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_rank_above_a_layer_is_refused_with_the_smallest_layer() -> None:
    with pytest.raises(ConfigError) as caught:
        inject(encoder("bert", intermediate_size=8), ["query", "intermediate.dense"], None, 9, 1.0)
    assert len(caught.value.problems) == 1  # 8 × 16 twice; query is 16 × 16
    assert "adapter.rank = 9 must be ≤ 8, the smaller side of encoder.layer.0" in str(caught.value)
    inject(encoder("bert"), ["query"], None, WIDTH, 1.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_is_a_positive_number(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"adapter\.alpha"):
        inject(encoder("bert"), ["query"], None, RANK, alpha)


def test_what_peft_adapts_beyond_the_choice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder("bert")
    chosen = dict(list(matching_layers(model, ["query"], None).items())[:1])
    monkeypatch.setattr("fedlr.adapters.inject.matching_layers", lambda *_: {**chosen})
    inject(model, ["query"], None, RANK, 1.0)
    wide = {"query": encoder("bert").get_submodule("encoder.layer.0.attention.self.query")}
    monkeypatch.setattr("fedlr.adapters.inject.matching_layers", lambda *_: wide)
    with pytest.raises(ModelError, match="PEFT adapted"):
        inject(encoder("bert"), ["query"], None, RANK, 1.0)
