"""What a policy reads off a model: weights, inputs of tokens alone, the gradient of autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlr.data.batching import TokenisedDataset
from fedlr.lowrank.subspace import principal_directions, singular_directions
from fedlr.methods.method import PartKey, Role
from fedlr.training.public import PublicModel, base_weights, input_moments, mean_gradients
from tests.models import CPU, FAMILIES, PAD, RANK, WIDTH, Tiny, rows, tiny

DATA = rows([5, 9, 2, 12, 7])


def started(family: str = "bert", **changes: Any) -> tuple[Tiny, PublicModel]:
    """A model whose B is 0, as before a first round."""
    model = tiny(family, **changes)
    zeros = {k: torch.zeros_like(v) for k, v in model.parts(frozenset({Role.B})).items()}
    model.adapted.write(zeros)
    return model, PublicModel.of(model.classifier, model.adapted, CPU)


def base_layer(model: Tiny, name: str) -> nn.Linear:
    layer = model.adapted.encoder.get_submodule(f"base_model.model.{name}.base_layer")
    assert isinstance(layer, nn.Linear)
    return layer


def names(model: Tiny) -> list[str]:
    return [site.name for site in model.adapted.sites]


def inputs_by_row(model: Tiny, name: str, data: TokenisedDataset) -> Tensor:
    """The slow way: row after row, without padding; (tokens, n)."""
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0][0].double())

    handle = base_layer(model, name).register_forward_pre_hook(look)
    with torch.no_grad():
        for row in range(len(data)):
            model.classifier.encoder(**data.batch(np.array([row])).inputs())
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_of_the_inputs_of_real_tokens(family: str) -> None:
    model, public = started(family)
    found = input_moments(public, DATA)
    assert list(found) == names(model)
    for name, moments in found.items():
        x = inputs_by_row(model, name, DATA)
        assert moments.count == len(x)
        torch.testing.assert_close(moments.total, x.sum(0), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(moments.squares, x.mT @ x, atol=1e-4, rtol=1e-5)
    # A layer that several passes share has seen every token in each.
    passes = {moments.count for moments in found.values()}
    assert passes == {int(DATA.lengths.sum()) * (2 if family == "albert" else 1)}


def test_padding_counts_for_nothing() -> None:
    """Its states are not zero: with them the moments would be others."""
    model, public = started()
    name = names(model)[0]
    wide = replace(DATA, pad_token_id=PAD + 3)
    batch = wide.batch(np.arange(len(wide)))
    assert int(batch.attention_mask.sum()) < batch.attention_mask.numel()
    for data in (DATA, wide):
        found, x = input_moments(public, data)[name], inputs_by_row(model, name, DATA)
        torch.testing.assert_close(found.squares, x.mT @ x, atol=1e-4, rtol=1e-5)


def test_a_planted_low_rank_input_is_found() -> None:
    """The layer below maps everything into three directions; those are the layer's inputs."""
    model, public = started()
    name = next(name for name in names(model) if "layer.1" in name)
    planted = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1))).Q
    below = model.adapted.encoder.get_submodule("base_model.model.encoder.layer.0")

    def project(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        low = states @ planted @ planted.mT + 7.0  # and an offset that all tokens share
        return (low, *output[1:]) if isinstance(output, tuple) else low

    handle = below.register_forward_hook(project)
    moments = input_moments(public, DATA)[name]
    handle.remove()
    found = principal_directions(moments, 3, 99).rows
    assert len(found) == 3
    assert float((found - found @ planted @ planted.mT).norm()) < 1e-4
    with pytest.raises(ValueError, match="rank = 4 must be ≤ 3"):
        principal_directions(moments, 4, 4)


def gradient_of(model: Tiny, name: str, data: TokenisedDataset) -> Tensor:
    """∂/∂W of the mean loss, by autograd on W itself; (m, n), float64."""
    layer = base_layer(model, name)
    layer.weight.requires_grad_(True)
    loss = model.classifier.losses(data.batch(np.arange(len(data)))).mean()
    (found,) = torch.autograd.grad(loss, [layer.weight])
    layer.weight.requires_grad_(False)
    return found.double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_autograd(family: str, checkpointing: bool) -> None:
    model, public = started(family, checkpointing=checkpointing)
    found = mean_gradients(public, DATA)
    assert list(found) == names(model)
    for name, gradient in found.items():
        wanted = gradient_of(model, name, DATA)
        assert float(wanted.norm()) > 1e-4
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)
        rows_found, rows_wanted = (
            singular_directions(value, RANK, RANK).rows for value in (gradient, wanted)
        )
        torch.testing.assert_close(rows_found, rows_wanted, atol=1e-3, rtol=0)


def test_the_way_rows_are_cut_into_passes_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, public = started()
    whole, tokens = mean_gradients(public, DATA), input_moments(public, DATA)
    monkeypatch.setattr("fedlr.training.public.DEFAULT_ROWS", 2)
    for name, value in mean_gradients(public, DATA).items():
        torch.testing.assert_close(value, whole[name], atol=1e-7, rtol=1e-4)
    for name, moments in input_moments(public, DATA).items():
        torch.testing.assert_close(moments.squares, tokens[name].squares, atol=1e-4, rtol=1e-5)


def test_along_the_gradient_s_own_rows_a_step_of_b_lowers_the_loss_most() -> None:
    """‖G·Aᵀ‖ is the slope that B has under A; no orthonormal A of that rank has a larger one."""
    model, public = started()
    name = names(model)[0]
    gradient = mean_gradients(public, DATA)[name]
    best = float((gradient @ singular_directions(gradient, RANK, RANK).rows.double().mT).norm())
    draws = torch.Generator().manual_seed(0)
    for _ in range(10):
        random = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=draws)).Q.double()
        assert float((gradient @ random).norm()) < best


def test_what_a_round_left_in_the_model_is_not_looked_at() -> None:
    """A resumed run computes directions when the model holds another state."""
    model, public = started()
    fresh, moments = mean_gradients(public, DATA), input_moments(public, DATA)
    draws = torch.Generator().manual_seed(3)
    state: dict[PartKey, Tensor] = {
        key: value + torch.randn(value.shape, generator=draws)
        for key, value in model.parts().items()
    }
    for site in model.adapted.sites:
        for role, shape in (
            (Role.RESIDUAL_B, (site.out_features, 1)),
            (Role.RESIDUAL_A, (1, site.in_features)),
        ):
            state[PartKey(site.name, role)] = torch.randn(shape, generator=draws)
    weights = {name: value.clone() for name, value in base_weights(model.adapted).items()}
    for again in (lambda: mean_gradients(public, DATA), lambda: input_moments(public, DATA)):
        model.adapted.write(state)
        for name, weight in base_weights(model.adapted).items():
            assert torch.equal(weight, weights[name])  # without what has been folded into it
        found: dict[str, Any] = dict(again())
        for name, value in found.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, fresh[name])
            else:
                assert torch.equal(value.squares, moments[name].squares)


def test_hooks_and_gradients_are_gone_afterwards() -> None:
    model, public = started()
    input_moments(public, DATA)
    mean_gradients(public, DATA)
    assert not any(value.requires_grad for value in model.adapted.encoder.parameters())
    for module in model.adapted.encoder.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_no_row_is_no_gradient_and_no_moment() -> None:
    _, public = started()
    none = rows([])
    assert {moments.count for moments in input_moments(public, none).values()} == {0}
    with pytest.raises(ValueError, match="data has no row"):
        mean_gradients(public, none)


def test_weights_are_those_that_are_multiplied_with() -> None:
    model, _ = started(precision="bfloat16")
    for name, weight in base_weights(model.adapted).items():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(weight, base_layer(model, name).weight)


def test_weights_in_four_bits_are_read_as_numbers() -> None:
    pytest.importorskip("bitsandbytes")
    from fedlr.adapters.inject import inject
    from fedlr.adapters.quantised import dense_weight, quantise
    from fedlr.adapters.surgery import AdaptedModel
    from tests.models import encoder, modules_of

    base = encoder("bert", hidden_size=64, intermediate_size=64)
    exact = {n: m.weight.clone() for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    quantise(base)
    model, sites = inject(base, modules_of("bert"), None, RANK, 1.0)
    found = base_weights(AdaptedModel(model, sites, {}))
    assert len(found) == 4
    for name, weight in found.items():
        assert weight.shape == (64, 64)
        layer = model.get_submodule(f"base_model.model.{name}.base_layer")
        assert torch.equal(weight, dense_weight(layer))
        assert 0 < float((weight - exact[name]).norm() / exact[name].norm()) < 0.2
