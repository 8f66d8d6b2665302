"""A core between A and B: x·Wᵀ + s·x·(B·R·A)ᵀ, and what PEFT and the kernels make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlr.adapters.core import add_cores, has_core
from fedlr.adapters.forward import use_kernel
from fedlr.adapters.surgery import AdaptedModel
from fedlr.errors import ConfigError
from fedlr.kernels.dispatch import Call, choose
from fedlr.kernels.lora_linear import naive
from fedlr.lowrank.factors import AdapterSite
from fedlr.methods.effective import update_of
from fedlr.methods.method import MODEL_ROLES, PartKey, Role
from tests.models import CPU, FAMILIES, RANK, WIDTH, cored, of_rank, rows, tiny

BATCH = rows([5, 3, 8]).batch(torch.arange(3).numpy())
CORE = frozenset({Role.CORE})


def layer_of(adapted: AdaptedModel, site: AdapterSite) -> Any:
    return adapted.encoder.get_submodule(f"base_model.model.{site.name}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_core_changes_no_bit_and_draws_nothing(family: str) -> None:
    plain, model = tiny(family), tiny(family)
    before = torch.random.get_rng_state()
    add_cores(model.adapted.encoder, model.adapted.sites)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(model.classifier(BATCH), plain.classifier(BATCH))
    for value in model.adapted.read(CORE).values():
        assert torch.equal(value, torch.eye(RANK))
    assert not any(value.requires_grad for value in model.classifier.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_a_layer_computes_with_its_core(precision: str) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="4-bit weights are in the extra '4bit'")
    model = cored(precision=precision)
    parts = model.adapted.read(MODEL_ROLES)
    inputs = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    if precision == "bfloat16":
        inputs = inputs.bfloat16()
    for site in model.adapted.sites:
        layer = layer_of(model.adapted, site)
        b, core, a = (parts[PartKey(site.name, role)] for role in (Role.B, Role.CORE, Role.A))
        expected = site.scaling * inputs.float() @ (b @ core @ a).T
        with torch.no_grad():
            found = (layer(inputs) - layer.base_layer(inputs)).float()
        rounding = 2e-2 if precision == "bfloat16" else 1e-5
        assert torch.allclose(found, expected, rtol=rounding, atol=rounding * 10)
        assert float(expected.abs().max()) > 0.1
        update = update_of(site, parts)
        assert update is not None
        assert torch.allclose(update.product(), site.scaling * b @ core @ a, atol=1e-6)


def test_a_core_is_an_array_of_the_model_and_a_model_without_has_none() -> None:
    model = cored()
    keys = {key for key in model.adapted.parameters() if key.role is Role.CORE}
    assert keys == {PartKey(site.name, Role.CORE) for site in model.adapted.sites}
    new = {key: torch.randn(RANK, RANK) for key in keys}
    model.adapted.write(new)
    found = model.adapted.read(CORE)
    assert all(torch.equal(found[key], new[key]) for key in keys)
    trained = model.adapted.select_trained(CORE)
    wanted = {id(value) for value in trained.values()}
    assert len(wanted) == len(keys)
    for parameter in model.classifier.parameters():
        assert parameter.requires_grad is (id(parameter) in wanted)
    with pytest.raises(ValueError, match=r"the model has no array .*/core"):
        tiny().adapted.write(new)


def test_a_core_has_the_rank_of_its_site() -> None:
    model = cored()
    key = next(iter(model.adapted.read(CORE)))
    for shape, message in (
        ((RANK, RANK + 1), "has shape"),
        ((RANK,), "has shape"),
        ((1, 1), "same rank"),
        ((1, RANK), "same rank"),
    ):
        with pytest.raises(ValueError, match=message):
            model.adapted.check({key: torch.zeros(shape)})


def test_kernels_decline_where_there_is_a_core() -> None:
    model = cored()
    site = model.adapted.sites[0]
    assert has_core(layer_of(model.adapted, site))
    assert not has_core(layer_of(tiny().adapted, site))
    with pytest.raises(ValueError, match="has a core, and the kernels"):
        use_kernel(model.adapted.encoder, model.adapted.sites, naive)
    call = Call(CPU, rank=RANK, cored=True)
    assert choose("lora_linear", call).implementation == "naive"
    assert choose("lora_linear", Call(CPU, rank=RANK)).implementation == "merged"
    assert "core between A and B" in choose("lora_linear", call).reason
    with pytest.raises(ConfigError, match="core between A and B"):
        choose("lora_linear", call, "triton")
    assert "core" not in choose("clipped_sum", call).reason


def test_peft_takes_the_core_out_with_the_adapter() -> None:
    model: Any = of_rank(3, cores=True).adapted.encoder
    base = model.unload()
    assert not any("core" in name or "lora" in name for name, _ in base.named_modules())
