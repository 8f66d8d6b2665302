"""The kernels' path: gradients kept as factors, and adapted layers by one operation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlr.adapters.forward import use_kernel
from fedlr.kernels.clipped_sum import naive as naive_sum
from fedlr.kernels.lora_linear import merged as merged_linear
from fedlr.kernels.lora_linear import naive as naive_linear
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.factored import Factored, FactoredGradients, dense
from fedlr.privacy.gradients import AutogradGradients
from fedlr.training.fused import train_together
from tests.models import LONGEST, MOVABLE, Tiny, cored, rows, settings, tiny, units_of
from tests.training.test_local import task

B, HEAD, ALL = frozenset({Role.B}), frozenset({Role.B, Role.HEAD}), MOVABLE
DATA = rows([5, 3, LONGEST, 7, 2, 9, 4, 6, 3, 8])
UNITS = units_of([1, 2, 3, 1, 3])
FAMILIES = ["bert", "roberta", "distilbert", "electra", "albert"]


def trained(model: Tiny, roles: frozenset[Role], **changes: Any) -> dict[PartKey, Tensor]:
    return model.trainer(DATA, steps=2, **changes).train(task(model, roles), UNITS)


def assert_close(found: dict[PartKey, Tensor], expected: dict[PartKey, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-5, atol=2e-6), key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("roles", [B, HEAD, ALL], ids=len)
def test_factors_are_the_gradients_of_each_unit(family: str, roles: frozenset[Role]) -> None:
    """Also of a layer that is called twice (ALBERT), and of biases, which stay arrays."""
    model = tiny(family)
    trained = model.adapted.select_trained(roles)
    batch, index = DATA.batch(UNITS.rows), torch.tensor([0, 1, 1, 2, 2, 2, 3, 4, 4, 4])
    kept = FactoredGradients(model.classifier, trained, naive_sum)
    found = kept.factored(lambda rows: model.classifier.losses(batch, rows), index, 5)
    expected = AutogradGradients(model.classifier, trained)(
        lambda rows: model.classifier.losses(batch, rows), index, 5
    )
    assert any(isinstance(value, Factored) for value in found.values())
    assert_close(dense(found), expected)
    for key, value in found.items():
        if isinstance(value, Factored):
            norms = expected[key].flatten(1).pow(2).sum(1)
            assert torch.allclose(value.squared_norms(), norms, rtol=1e-4, atol=1e-6)
            factors = torch.rand(5)
            whole = torch.einsum("u,umr->mr", factors, expected[key])
            assert torch.allclose(value.clipped_sum(factors), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_round_on_cores_is_the_same_whether_or_not_gradients_are_formed(family: str) -> None:
    roles = frozenset({Role.CORE, Role.HEAD})
    expected = trained(cored(family), roles)
    assert_close(trained(cored(family), roles, kernel=naive_sum, physical_batch=3), expected)
    start = cored(family).adapted.read(roles)
    assert all(float((value - start[key]).norm()) > 1e-3 for key, value in expected.items())


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("roles", [B, HEAD, ALL], ids=len)
def test_a_round_is_the_same_whether_or_not_gradients_are_formed(
    size: int, roles: frozenset[Role]
) -> None:
    """Units with rows in several physical batches are formed after all, and clipped whole."""
    expected = trained(tiny(), roles, physical_batch=size)
    assert_close(trained(tiny(), roles, physical_batch=size, kernel=naive_sum), expected)


def test_an_empty_batch_has_no_factors() -> None:
    model = tiny()
    kept = FactoredGradients(model.classifier, model.adapted.select_trained(HEAD), naive_sum)
    found = kept.factored(lambda rows: rows, torch.zeros(0, dtype=torch.int64), 3)
    assert all(isinstance(value, Tensor) and not value.any() for value in found.values())
    assert {value.shape[0] for value in dense(found).values()} == {3}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", [naive_linear, merged_linear], ids=["naive", "merged"])
@pytest.mark.parametrize("gradients", ["captured", "autograd"])
@pytest.mark.parametrize("roles", [HEAD, ALL], ids=len)
def test_a_layer_by_one_operation_takes_the_same_step(
    family: str, operation: Any, gradients: str, roles: frozenset[Role]
) -> None:
    model = tiny(family)
    use_kernel(model.adapted.encoder, model.adapted.sites, operation)
    expected = trained(tiny(family), roles)
    assert_close(trained(model, roles, gradients=gradients), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_privacy_and_in_shared_passes_it_is_the_same_too(family: str) -> None:
    """Plain gradients need B's from the operation; rows with a B of their own bypass it."""
    model = tiny(family)
    use_kernel(model.adapted.encoder, model.adapted.sites, merged_linear)
    plain = replace(task(model, HEAD), mechanism=None)
    expected = tiny(family).trainer(DATA, steps=2).train(plain, UNITS)
    assert_close(model.trainer(DATA, steps=2).train(plain, UNITS), expected)
    model.adapted.write(tiny(family).parts())
    trainer = model.trainer(DATA, steps=2)
    together = train_together(trainer, [task(model, HEAD), task(model, HEAD)], [UNITS, UNITS])
    assert_close(together[0], trained(tiny(family), HEAD))


def test_the_operation_is_used_and_leaves_no_trace() -> None:
    class Counting:
        calls = 0

        def lora_linear(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return naive_linear.lora_linear(*arguments)

    model, counting = tiny(), Counting()
    batch = DATA.batch(UNITS.rows)
    before = model.classifier(batch)
    use_kernel(model.adapted.encoder, model.adapted.sites, counting)
    assert torch.allclose(model.classifier(batch), before, atol=1e-6)
    assert counting.calls == len(model.adapted.sites)
    state = model.adapted.encoder.state_dict()
    assert state.keys() == tiny().adapted.encoder.state_dict().keys()


def test_only_captured_gradients_have_factors() -> None:
    with pytest.raises(ValueError, match="kernel needs gradients = 'captured'"):
        settings(kernel=naive_sum, gradients="opacus")


def test_another_adapter_of_the_model_is_not_computed_with_ours() -> None:
    """A copy that loads a saved adapter, as the doctor's round trip does, or disables ours."""
    model: Any = tiny()
    batch = DATA.batch(UNITS.rows)
    use_kernel(model.adapted.encoder, model.adapted.sites, merged_linear)
    other = copy.deepcopy(model.classifier)
    assert torch.equal(other(batch), model.classifier(batch))
    with other.encoder.disable_adapter():
        off = other(batch)
    zero = tiny()
    zero.adapted.write(
        {key: value * 0 for key, value in zero.parts().items() if key.role is Role.B}
    )
    assert torch.allclose(off, zero.classifier(batch), atol=1e-6)
    assert not torch.allclose(off, other(batch), atol=1e-3)
    model.adapted.write({key: value * 0 for key, value in model.parts().items()})
    assert not torch.allclose(other(batch), model.classifier(batch), atol=1e-3)
