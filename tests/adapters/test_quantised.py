"""Linear layers in 4 bits compute with the weights that their bits stand for, and nothing else."""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlr.adapters import quantised
from fedlr.adapters.forward import use_kernel
from fedlr.adapters.inject import inject
from fedlr.adapters.quantised import dense_weight, dequantise, is_quantised, quantise
from fedlr.errors import ConfigError, ModelError
from fedlr.kernels.lora_linear import merged
from fedlr.training.base import weights_digest
from tests.models import FAMILIES, RANK, encoder, rows, tiny

needs_package = pytest.mark.skipif(
    quantised.missing_package() is not None, reason="bitsandbytes is in the extra '4bit'"
)
BATCH = rows([5, 3, 8]).batch(torch.arange(3).numpy())


def features(model: nn.Module) -> Tensor:
    found: Tensor = model(**BATCH.inputs()).last_hidden_state
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@needs_package
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_and_nothing_else_is_stored(family: str) -> None:
    whole, stored = encoder(family), encoder(family)
    quantise(stored)
    for name, layer in linear_layers(whole).items():
        found = stored.get_submodule(name)
        assert is_quantised(found)
        weight, dense = layer.get_parameter("weight"), dense_weight(found)
        assert found.get_parameter("weight").dtype == torch.uint8
        assert found.get_parameter("weight").numel() == weight.numel() // 2
        apart = float((dense - weight).norm() / weight.norm())
        assert 0.05 <= apart <= 0.12  # normal values in NF4: 0.09; in 3 bits twice that
    packed = {f"{name}.weight" for name in linear_layers(whole)}
    for name, value in whole.named_parameters():
        if name not in packed:
            assert torch.equal(stored.get_parameter(name), value), name
            assert stored.get_parameter(name).dtype == torch.float32


@needs_package
@pytest.mark.parametrize("family", FAMILIES)
def test_written_out_it_computes_the_same_bits(family: str) -> None:
    stored = encoder(family)
    quantise(stored)
    dense = copy.deepcopy(stored)
    dequantise(dense)
    assert not any(map(is_quantised, dense.modules()))
    assert {value.dtype for value in dense.parameters()} == {torch.float32}
    assert sorted(dense.state_dict()) == sorted(encoder(family).state_dict())
    assert any(map(is_quantised, stored.modules()))  # the copy was changed, and this was not
    with torch.no_grad():  # where bitsandbytes' own product would take another kernel
        quiet = features(stored)
    assert torch.equal(quiet, features(dense))
    assert torch.equal(quiet, features(stored))


@needs_package
def test_gradients_flow_through_as_through_the_dense_layer() -> None:
    layer, draws = nn.Sequential(nn.Linear(8, 16)), torch.Generator().manual_seed(0)
    layer.requires_grad_(False)
    quantise(layer)
    x = torch.randn(2, 4, 8, generator=draws, requires_grad=True)
    delta = torch.randn(2, 4, 16, generator=draws)
    (found,) = torch.autograd.grad(layer(x), [x], delta)
    assert torch.equal(found, delta @ dense_weight(layer[0]))


@needs_package
@pytest.mark.parametrize("sides", [(16, 16), (64, 96), (312, 1200), (384, 312), (64, 100)])
def test_any_sides_are_near_what_was_stored(sides: tuple[int, int]) -> None:
    """bitsandbytes itself writes rows of 96 and 1200 out with scales of other blocks."""
    layer = nn.Sequential(nn.Linear(sides[1], sides[0])).requires_grad_(False)
    nn.init.normal_(layer[0].weight, generator=torch.Generator().manual_seed(0))
    weight = layer[0].weight.clone()
    quantise(layer)
    assert float((dense_weight(layer[0]) - weight).norm() / weight.norm()) <= 0.12


@needs_package
def test_part_of_a_block_stays_in_float32() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(8, 8)).requires_grad_(False)
    quantise(model)
    assert [is_quantised(layer) for layer in model] == [False, True]


@needs_package
def test_what_is_not_what_was_given_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    true = quantised.dense_weight
    monkeypatch.setattr(quantised, "dense_weight", lambda layer: 1.3 * true(layer))
    with pytest.raises(ModelError, match=r"0\.output is not what .* was given"):
        quantise(nn.ModuleDict({"0": nn.ModuleDict({"output": nn.Linear(8, 8)})}))
    monkeypatch.undo()
    broken = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    broken[0].weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        quantise(broken)


@needs_package
def test_adapters_are_pefts_for_such_layers() -> None:
    from peft.tuners.lora.bnb import Linear4bit

    base = encoder("bert")
    quantise(base)
    model, sites = inject(base, ["query", "value"], None, RANK, 2.0)
    for site in sites:
        layer = model.get_submodule(f"base_model.model.{site.name}")
        assert isinstance(layer, Linear4bit)
        assert (site.out_features, site.in_features) == (16, 16)
    with pytest.raises(ValueError, match="stored in 4 bits"):
        use_kernel(model, sites, merged)  # type: ignore[arg-type]


@needs_package
def test_a_rank_above_the_layers_sides_is_refused_by_the_sides_of_the_layer() -> None:
    base = encoder("bert")
    quantise(base)
    with pytest.raises(ConfigError, match=r"≤ 16, the smaller side .* \(16 × 16\)"):
        inject(base, ["query"], None, 17, 2.0)


@needs_package
def test_norms_are_of_the_weights_that_are_computed_with() -> None:
    model = tiny(precision="nf4")
    for site, norm in model.adapted.base_norms().items():
        layer = model.adapted.encoder.get_submodule(f"base_model.model.{site.name}.base_layer")
        assert norm == float(dense_weight(layer).norm())


@needs_package
def test_a_copy_has_the_digest_of_the_original() -> None:
    base = encoder("bert")
    quantise(base)
    twin = copy.deepcopy(base)
    assert weights_digest(twin) == weights_digest(base)
    for one, other in zip(base.modules(), twin.modules(), strict=True):
        if is_quantised(one):  # the copy computes with its own bits
            assert vars(other)["forward"].args == (other,)
            assert other.weight.data_ptr() != one.weight.data_ptr()
    changed = encoder("bert", seed=1)
    quantise(changed)
    assert weights_digest(changed) != weights_digest(base)


@needs_package
def test_what_transformers_keeps_in_float32_stays() -> None:
    base: Any = encoder("bert")
    base._keep_in_fp32_modules = {"pooler"}
    base._keep_in_fp32_modules_strict = {"intermediate.dense.weight"}
    quantise(base)
    assert not is_quantised(base.pooler.dense)
    assert not is_quantised(base.encoder.layer[0].intermediate.dense)
    assert is_quantised(base.encoder.layer[0].output.dense)


@needs_package
def test_no_binary_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes imports ``kernels``, which downloads one, as soon as it is imported."""
    fetcher = object()
    monkeypatch.setitem(sys.modules, "kernels", fetcher)
    seen: list[Any] = []
    monkeypatch.setattr(
        "builtins.__import__",
        lambda name, *rest, ordinary=__import__: (
            seen.append(sys.modules["kernels"]) if name == "bitsandbytes" else None,
            ordinary(name, *rest),
        )[1],
    )
    quantised.load_package.__wrapped__()
    assert seen == [None]
    assert sys.modules["kernels"] is fetcher


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    base = encoder("bert")
    with pytest.raises(ConfigError, match=r"pip install 'fedlr\[4bit\]'.*model\.precision=float32"):
        quantise(base)
    assert not any(map(is_quantised, base.modules()))


@needs_package
def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(ConfigError, match=r"has none \(torch\.nn\.Linear\); set model\.precision"):
        quantise(nn.Sequential(Conv1D(4, 4), nn.LayerNorm(4)))
