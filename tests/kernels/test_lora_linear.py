"""The LoRA layer and its gradients: twin and kernel against exact low-rank terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.kernels.clipped_sum.naive import unit_gradients
from fedlr.kernels.lora_linear import merged, naive
from tests.kernels.execution import Machine, differentiate
from tests.kernels.parity import Layer, layer

CPU = torch.device("cpu")
SIZES = [  # leading dimensions, (n, m, r)
    ((1,), (1, 1, 1)),
    ((3, 11), (70, 33, 5)),
    ((33,), (64, 65, 16)),
    ((2, 3, 5), (7, 130, 17)),
    ((2, 0), (5, 4, 2)),
]
CASES = pytest.mark.parametrize(("lead", "sizes"), SIZES, ids=str)


@CASES
def test_the_kernel_is_exact_up_to_rounding(
    machine: Machine, dtype: torch.dtype, lead: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
    case = layer(lead, sizes, dtype)
    found = machine.run("linear", case.cotangent, *case.arguments)
    assert [v.dtype for v in found] == [dtype, torch.float32, dtype, torch.float32]
    case.check(found, machine.device)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_twin_is_exact_up_to_rounding(
    dtype: torch.dtype, lead: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
    case = layer(lead, sizes, dtype)
    found = differentiate(naive.lora_linear, case.cotangent, *case.arguments)
    assert [v.dtype for v in found] == [dtype, torch.float32, dtype, torch.float32]
    case.check(found, CPU)


@CASES
def test_the_merged_product_is_exact_up_to_rounding(
    lead: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
    case = layer(lead, sizes, torch.float32)
    found = differentiate(merged.lora_linear, case.cotangent, *case.arguments)
    case.check(found, CPU)


@pytest.mark.parametrize("which", ["x", "weight", "bias", "a", "b"])
def test_the_merged_product_is_for_float32_and_frozen_weights(which: str) -> None:
    case = layer((3,), (5, 4, 2), torch.float32)
    names = ("x", "weight", "bias", "a", "b")
    arguments = {**dict(zip(names, case.arguments, strict=False)), "bias": torch.ones(4)}
    half = {**arguments, which: arguments[which].bfloat16()}
    with pytest.raises(ValueError, match=f"{which} has dtype"):
        merged.lora_linear(*(half[name] for name in names), 1.0)
    if which in ("weight", "bias", "a"):
        trained = {**arguments, which: arguments[which].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{which} requires a gradient"):
            merged.lora_linear(*(trained[name] for name in names), 1.0)


def test_the_merged_product_keeps_no_merged_weight() -> None:
    case = layer((64,), (48, 40, 2), torch.float32)
    x, *others = case.arguments
    kept: list[int] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        merged.lora_linear(x.clone().requires_grad_(), *others)
    own = {value.data_ptr() for value in others if isinstance(value, Tensor)}
    assert len(set(kept) - own) <= 2  # z, and s·B


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20)),
)
@settings(derandomize=True, max_examples=10, deadline=None)
def test_any_shape(machine: Machine, lead: list[int], sizes: tuple[int, int, int]) -> None:
    case = layer(tuple(lead), sizes, torch.float32)
    case.check(machine.run("linear", case.cotangent, *case.arguments), machine.device)


def test_parameters_of_the_dtype_of_x(machine: Machine) -> None:
    case = layer((2, 9), (40, 20, 4), torch.float16)
    case = replace(case, a=case.a.half(), b=case.b.half())
    *found, gradient_b = machine.run("linear", case.cotangent, *case.arguments)
    assert gradient_b.dtype == torch.float16
    wide = machine.run("linear", case.cotangent, *replace(case, b=case.b.float()).arguments)
    assert torch.equal(gradient_b, wide[-1].half())
    case.check((*found, wide[-1]), machine.device)


def test_z_and_the_cotangent_give_the_private_gradient() -> None:
    """∂loss/∂B = s·Σ δᵀz: what a caller hands to the clipped sum."""
    case = layer((4, 6), (12, 9, 3), torch.float32)
    _, z, _, expected = differentiate(naive.lora_linear, case.cotangent, *case.arguments)
    per_row = unit_gradients(case.cotangent, z, torch.arange(4), 4)
    # 24 tokens of three float32 roundings each.
    assert torch.allclose(case.scaling * per_row.sum(0), expected, rtol=0, atol=1e-4)


def test_autograd_of_the_twin_is_the_derivative() -> None:
    case = layer((2, 3), (4, 5, 2), torch.float64)
    case = replace(case, a=case.a.double(), b=case.b.double())
    x, weight, bias, a, b, scaling = case.arguments
    for value in (x, a, b):
        assert isinstance(value, Tensor)
        value.requires_grad_()

    def y(*arguments: Tensor) -> Tensor:
        return naive.lora_linear(arguments[0], weight, bias, *arguments[1:], scaling)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(y, (x, a, b))


def test_shapes_that_disagree_are_refused(machine: Machine) -> None:
    case = layer((2,), (4, 5, 2), torch.float32)
    with pytest.raises(ValueError, match="b has shape"):
        machine.run("linear", case.cotangent, *replace(case, b=case.b[:, :1]).arguments)
    with pytest.raises(ValueError, match="b has shape"):
        naive.lora_linear(*replace(case, b=case.b[:, :1]).arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weight", "bias", "a"])
def test_the_kernel_refuses_a_gradient_it_does_not_have(name: str) -> None:
    kernel = pytest.importorskip("fedlr.kernels.lora_linear.triton")
    case = layer((2,), (4, 5, 3), torch.float32)
    getattr(case, name).requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name} requires a gradient"):
        kernel.lora_linear(*case.arguments)


Found = tuple[Tensor, ...]


def last_feature_lost(case: Layer, found: Found) -> Found:
    y = found[0].clone()
    y[..., -1] = torch.nn.functional.linear(case.x, case.weight, case.bias)[..., -1]
    return (y, *found[1:])


def last_token_lost(case: Layer, found: Found) -> Found:
    g = case.cotangent.clone()
    g[..., -1, :] = 0
    return (*found[:3], differentiate(naive.lora_linear, g, *case.arguments)[3])


def on(**changes: Callable[[Layer], Any]) -> Callable[[Layer, Found], Found]:
    def wrong(case: Layer, found: Found) -> Found:
        other = replace(case, **{name: change(case) for name, change in changes.items()})
        return differentiate(naive.lora_linear, case.cotangent, *other.arguments)

    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (last_feature_lost, "y"),
        (last_token_lost, "gradient of B"),
        (on(b=lambda c: c.b * torch.tensor([1.0] * 16 + [0.0])), "y"),
        (on(a=lambda c: c.a * (torch.arange(c.a.shape[1]) < c.a.shape[1] - 1)), "z"),
        (on(scaling=lambda c: c.scaling * 1.01), "y"),
        (lambda c, f: (*f[:2], torch.matmul(c.cotangent, c.weight), f[3]), "gradient of x"),
        (lambda c, f: (*f[:3], f[3] / c.scaling), "gradient of B"),
    ],
    ids=["feature", "token", "rank", "input", "scaling", "gradient of x", "unscaled gradient"],
)
def test_the_bounds_reject_a_wrong_kernel(
    dtype: torch.dtype, wrong: Callable[[Layer, Found], Found], name: str
) -> None:
    case = layer((3, 11), (70, 33, 17), dtype)
    found = differentiate(naive.lora_linear, case.cotangent, *case.arguments)
    case.check(found, CPU)
    with pytest.raises(AssertionError, match=rf"^{name}: "):
        case.check(wrong(case, found), CPU)
