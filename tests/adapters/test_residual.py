"""A residual in live layers: computed once from W, in every path, and taken out without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fedlr.adapters.forward import use_kernel
from fedlr.adapters.residual import fold, original_weight, product_norm, residual_of
from fedlr.adapters.surgery import AdaptedModel
from fedlr.kernels.lora_linear import merged, naive
from fedlr.lowrank.factors import AdapterSite, Factors
from fedlr.methods.method import PartKey, Role
from fedlr.training.base import weights_digest
from tests.models import FAMILIES, WIDTH, Tiny, rows, tiny

BATCH = rows([5, 3, 8]).batch(torch.arange(3).numpy())


def residual(model: Tiny, rank: int, seed: int = 7) -> dict[PartKey, Tensor]:
    draws, found = torch.Generator().manual_seed(seed), {}
    for site in model.adapted.sites:
        left = 0.1 * torch.randn(site.out_features, rank, generator=draws)
        found[PartKey(site.name, Role.RESIDUAL_B)] = left
        found[PartKey(site.name, Role.RESIDUAL_A)] = torch.randn(
            rank, site.in_features, generator=draws
        )
    return found


def base_layer(adapted: AdaptedModel, site: AdapterSite) -> torch.nn.Module:
    return adapted.encoder.get_submodule(f"base_model.model.{site.name}.base_layer")


def weights(model: Tiny) -> dict[str, torch.nn.Parameter]:
    return {
        site.name: base_layer(model.adapted, site).get_parameter("weight")
        for site in model.adapted.sites
    }


@pytest.mark.parametrize("rank", [1, 3, WIDTH + 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_is_the_sum_rounded_once(family: str, rank: int) -> None:
    model = tiny(family)
    own, parts = weights(model), residual(model, rank)
    model.adapted.write(parts)
    for site in model.adapted.sites:
        b, a = (parts[PartKey(site.name, role)] for role in (Role.RESIDUAL_B, Role.RESIDUAL_A))
        exact = own[site.name].double() + b.double() @ a.double()
        found = base_layer(model.adapted, site).get_parameter("weight")
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert torch.allclose(found.double(), exact, rtol=2.0**-24 * 1.001, atol=0)


def test_weights_are_shared_so_they_are_put_aside_and_brought_back() -> None:
    model = tiny()
    own, digest = weights(model), weights_digest(model.adapted.encoder)
    copies = {name: value.clone() for name, value in own.items()}
    norms, size = model.adapted.base_norms(), model.adapted.base_bytes()
    before = model.classifier(BATCH)
    for seed in (1, 2):  # one upon another, and twice the same
        for _ in range(2):
            model.adapted.write(residual(model, 2, seed))
        assert not torch.allclose(model.classifier(BATCH), before, atol=1e-2)
        assert all(torch.equal(value, copies[name]) for name, value in own.items())
        assert all(value is not own[name] for name, value in weights(model).items())
        assert model.adapted.base_norms() == norms
    again = tiny()
    again.adapted.write(residual(again, 2, seed=2))
    assert torch.equal(again.classifier(BATCH), model.classifier(BATCH))
    model.adapted.write({})
    assert all(value is own[name] for name, value in weights(model).items())
    assert weights_digest(model.adapted.encoder) == digest
    assert torch.equal(model.classifier(BATCH), before)
    assert size == sum(4 * value.numel() for value in own.values())


def test_the_same_residual_is_not_computed_again_and_another_is() -> None:
    model = tiny()
    parts = residual(model, 2)
    model.adapted.write(parts)
    first = weights(model)
    model.adapted.write({key: value.clone() for key, value in parts.items()})
    assert all(value is first[name] for name, value in weights(model).items())
    next(iter(parts.values()))[0, 0] += 1  # what was given may change: the model's copy does not
    model.adapted.write(parts)
    changed = [name for name, value in weights(model).items() if value is not first[name]]
    assert changed == [model.adapted.sites[0].name]


@pytest.mark.parametrize("operation", [naive, merged], ids=["naive", "merged"])
def test_the_kernels_forward_computes_with_it(operation: object) -> None:
    plain, model = tiny(), tiny()
    use_kernel(model.adapted.encoder, model.adapted.sites, operation)  # type: ignore[arg-type]
    plain.adapted.write(residual(plain, 3))
    assert not torch.allclose(model.classifier(BATCH), plain.classifier(BATCH), atol=1e-2)
    model.adapted.write(residual(model, 3))
    assert torch.allclose(model.classifier(BATCH), plain.classifier(BATCH), rtol=0, atol=1e-5)


def test_rank_zero_is_no_residual() -> None:
    model = tiny()
    own = weights(model)
    model.adapted.write(residual(model, 0))
    assert all(value is own[name] for name, value in weights(model).items())
    assert residual_of(model.adapted.sites[0], residual(model, 0)) is None


def test_one_site_may_have_one_alone() -> None:
    model = tiny()
    own, first = weights(model), model.adapted.sites[0].name
    model.adapted.write({k: v for k, v in residual(model, 2).items() if k.site == first})
    assert [name for name, value in weights(model).items() if value is not own[name]] == [first]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (Role.RESIDUAL_A, None, "half a residual"),
        (Role.RESIDUAL_B, None, "half a residual"),
        (Role.RESIDUAL_A, torch.zeros(3, WIDTH), "residual_b has shape"),
        (Role.RESIDUAL_A, torch.zeros(2, WIDTH + 1), "residual_a has shape"),
        (Role.RESIDUAL_A, torch.zeros(()), "residual_a has shape"),
    ],
)
def test_a_residual_that_does_not_fit_is_refused_and_nothing_is_written(
    key: Role, change: Tensor | None, message: str
) -> None:
    model = tiny()
    parts, before = {**residual(model, 2), **model.parts()}, model.parts()
    place = PartKey(model.adapted.sites[-1].name, key)
    if change is None:
        del parts[place]
    else:
        parts[place] = change
    changed = {k: v + 1 if k.role is Role.B else v for k, v in parts.items()}
    own = weights(model)
    with pytest.raises(ValueError, match=message):
        model.adapted.write(changed)
    assert all(value is own[name] for name, value in weights(model).items())
    assert all(torch.equal(value, before[k]) for k, value in model.parts().items())
    with pytest.raises(ValueError, match="no array nowhere"):
        model.adapted.write({PartKey("nowhere", Role.RESIDUAL_A): torch.zeros(1, WIDTH)})


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_a_base_in_fewer_bits_holds_none(precision: str) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="4-bit weights are in the extra '4bit'")
    model = tiny(precision=precision)
    model.adapted.write(residual(model, 0))
    with pytest.raises(ValueError, match=r"set model\.precision=float32"):
        model.adapted.write(residual(model, 1))


def test_a_copy_of_a_layer_brings_its_own_weight_back() -> None:
    model = tiny()
    own = weights(model)
    model.adapted.write(residual(model, 2))
    site = model.adapted.sites[0]
    twin = copy.deepcopy(base_layer(model.adapted, site))
    assert torch.equal(original_weight(twin), own[site.name])
    fold(twin, None)
    assert torch.equal(twin.get_parameter("weight"), own[site.name])
    assert not torch.equal(base_layer(model.adapted, site).get_parameter("weight"), own[site.name])


@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_the_norm_is_that_of_the_product(rank: int) -> None:
    draws = torch.Generator().manual_seed(rank)
    pair = Factors(torch.randn(9, rank, generator=draws), torch.randn(rank, 7, generator=draws), 3)
    exact = float((3 * pair.b.double() @ pair.a.double()).norm())
    assert product_norm(pair) == pytest.approx(exact, rel=1e-12)
    opposed = Factors(torch.cat([pair.b, -pair.b], 1), torch.cat([pair.a, pair.a]))
    assert product_norm(opposed) <= 1e-6 * exact


def test_a_product_that_large_columns_nearly_cancel_is_seen() -> None:
    """The squares of both columns agree in all the bits that float64 has; the product is 5e11."""
    b, a = torch.zeros(9, 2), torch.zeros(2, 7)
    b[0], b[1, 1], a[:, 0] = 1e10, 50.0, torch.tensor([1e10, -1e10])
    pair = Factors(b, a)
    assert float((b.double() @ a.double()).norm()) == 5e11
    assert product_norm(pair) == pytest.approx(5e11, rel=1e-3)


def test_what_folding_may_round_to_is_counted() -> None:
    """b·a − b·a is 0, and in float64 no more exact than an ulp of b·a."""
    b, a = torch.full((9, 2), 1e20), torch.ones(2, 7)
    a[1] = -1.0
    assert float((b.double() @ a.double()).norm()) < 1e20 * 2.0**-52 * 9 * 7
    assert product_norm(Factors(b, a)) > 1e20 * 2.0**-52
