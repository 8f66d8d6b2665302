"""Reading copies, writing all or nothing, training exactly what is chosen."""

from __future__ import annotations

import pytest
import torch

from fedlr.methods.method import Layout, PartKey, Role
from fedlr.methods.shared import factor_pairs
from tests.models import CLASSES, MOVABLE, RANK, WIDTH, tiny


def test_the_movable_arrays_are_both_factors_of_every_site_and_the_head() -> None:
    model = tiny()
    shapes = {key: tuple(value.shape) for key, value in model.adapted.parameters().items()}
    assert len(model.adapted.sites) == 4  # query and value of two layers
    expected: dict[PartKey, tuple[int, ...]] = {
        PartKey("head.output.weight", Role.HEAD): (CLASSES, WIDTH),
        PartKey("head.output.bias", Role.HEAD): (CLASSES,),
    }
    for site in model.adapted.sites:
        expected[PartKey(site.name, Role.A)] = (RANK, WIDTH)
        expected[PartKey(site.name, Role.B)] = (WIDTH, RANK)
    assert shapes == expected


@pytest.mark.parametrize("roles", [{Role.B}, {Role.A, Role.HEAD}, set[Role](), {Role.CORE}])
def test_reading_gives_copies_of_the_roles(roles: set[Role]) -> None:
    model = tiny()
    found = model.adapted.read(roles)
    assert {key.role for key in found} == roles & MOVABLE
    before = model.parts()
    for value in found.values():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        value.fill_(7.0)
    after = model.parts()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_writing_and_reading_are_inverse_and_alias_nothing() -> None:
    model = tiny()
    new = {key: torch.randn_like(value) for key, value in model.parts().items()}
    model.adapted.write(new)
    found = model.parts()
    assert all(torch.equal(found[key], new[key]) for key in new)
    next(iter(new.values())).zero_()
    again = model.parts()
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_what_is_not_written_stays() -> None:
    model = tiny()
    before = model.parts()
    one = next(iter(before))
    model.adapted.write({one: torch.zeros_like(before[one])})
    after = model.parts()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [one]


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (PartKey("head.output.weight", Role.HEAD), (WIDTH, CLASSES), "has shape"),
        (PartKey("head.output.weight", Role.B), (CLASSES, WIDTH), "no array head.output.weight/b"),
        (PartKey("nowhere", Role.A), (RANK, WIDTH), "no array nowhere/a"),
    ],
)
def test_one_bad_array_and_nothing_is_written(
    key: PartKey, shape: tuple[int, ...], message: str
) -> None:
    model = tiny()
    before = model.parts()
    good = {name: torch.zeros_like(value) for name, value in before.items() if name != key}
    with pytest.raises(ValueError, match=message):
        model.adapted.write({**good, key: torch.zeros(shape)})
    after = model.parts()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_exactly_the_selected_arrays_require_a_gradient() -> None:
    model = tiny()
    for roles in ({Role.B}, {Role.A, Role.HEAD}, {Role.B}):
        trained = model.adapted.select_trained(roles)
        assert {key.role for key in trained} == roles
        wanted = {id(value) for value in trained.values()}
        for parameter in model.classifier.parameters():
            assert parameter.requires_grad is (id(parameter) in wanted)
            assert parameter.grad is None
            parameter.grad = torch.zeros_like(parameter) if id(parameter) in wanted else None


def test_the_factors_make_up_the_layer_s_update() -> None:
    """Layer output − base output = x·(s·B·A)ᵀ."""
    model = tiny()
    factors = factor_pairs(Layout(model.adapted.sites), model.parts())
    inputs = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    for site in model.adapted.sites:
        layer = model.adapted.encoder.get_submodule(f"base_model.model.{site.name}")
        base = layer.get_submodule("base_layer")
        with torch.no_grad():
            update = layer(inputs) - base(inputs)
        assert torch.allclose(update, inputs @ factors[site.name].product().T, atol=1e-5)
        assert float(update.abs().max()) > 0.1
