"""δᵀz ≡ Opacus' hooks ≡ one backward pass per unit, for every family of encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlr.errors import ModelError
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.gradients import (
    GRADIENTS,
    AutogradGradients,
    CapturedGradients,
    UnitGradients,
)
from tests.models import FAMILIES, LONGEST, RANK, WIDTH, Tiny, cored, rows, tiny

# A float32 sum of n products is off by at most n·eps relatively to Σ|·|; the longest
# ones here run over the tokens and the width of a row.
TOLERANCE = torch.finfo(torch.float32).eps * LONGEST * WIDTH

ROLES = [
    frozenset({Role.B}),
    frozenset({Role.B, Role.HEAD}),
    frozenset({Role.A, Role.B, Role.HEAD}),
]
CORES = [
    frozenset({Role.CORE}),
    frozenset({Role.CORE, Role.HEAD}),
    frozenset({Role.A, Role.B, Role.CORE, Role.HEAD}),
]
DATA = rows([5, LONGEST, 3, 7, 1, 4])


def compute(
    model: Tiny, kind: str, roles: frozenset[Role], drawn: Sequence[int], units: Sequence[int]
) -> dict[PartKey, Tensor]:
    trained = model.adapted.select_trained(roles)
    batch = DATA.batch(np.array(drawn, dtype=np.int64), np.array(units, dtype=np.int64))
    path: UnitGradients = GRADIENTS[kind](model.classifier, trained)
    count = max(units, default=-1) + 1
    found = path(partial(model.classifier.losses, batch), batch.unit_index, count)
    assert all(parameter.grad is None for parameter in trained.values())
    assert found.keys() == trained.keys()
    for key, value in found.items():
        assert value.shape == (count, *trained[key].shape)
        assert value.dtype == torch.float32
    return found


def assert_same(found: dict[PartKey, Tensor], expected: dict[PartKey, Tensor]) -> None:
    """Unit by unit and array by array, relatively to the norm of the unit's whole gradient."""
    whole = sum(value.flatten(1).pow(2).sum(1) for value in expected.values())
    assert isinstance(whole, Tensor)
    for key in expected:
        apart = (found[key] - expected[key]).flatten(1).norm(dim=1)
        assert (apart <= TOLERANCE * whole.sqrt()).all(), key


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("roles", ROLES, ids=lambda roles: "+".join(sorted(roles)))
@pytest.mark.parametrize("family", FAMILIES)
def test_three_paths_agree(family: str, roles: frozenset[Role]) -> None:
    model = tiny(family, layers=3)
    drawn, units = [0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0]
    expected = compute(model, "autograd", roles, drawn, units)
    assert min(float(value.flatten(1).norm(dim=1).min()) for value in expected.values()) > 0
    for kind in ("captured", "opacus"):
        assert_same(compute(model, kind, roles, drawn, units), expected)
    assert {key.role for key in expected} == roles


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("roles", CORES, ids=lambda roles: "+".join(sorted(roles)))
@pytest.mark.parametrize("family", FAMILIES)
def test_three_paths_agree_on_cores(family: str, roles: frozenset[Role]) -> None:
    """Also recomputed, and where A and B beside a core train: δ of A comes through it."""
    drawn, units = [0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0]
    expected = compute(cored(family), "autograd", roles, drawn, units)
    cores = [value for key, value in expected.items() if key.role is Role.CORE]
    assert {value.shape[1:] for value in cores} == {(RANK, RANK)}
    assert min(float(value.flatten(1).norm(dim=1).min()) for value in cores) > 0
    for kind in ("captured", "opacus"):
        for checkpointing in (False, True):
            model = cored(family, checkpointing=checkpointing)
            assert_same(compute(model, kind, roles, drawn, units), expected)


def test_the_gradient_of_a_core_is_that_of_its_place_between_a_and_b() -> None:
    """∂loss/∂R = Bᵀ·(∂loss/∂(B·R))·1: with R = 1 it is Bᵀ times the gradient of B."""
    model = cored()
    model.adapted.write({k: torch.eye(RANK) for k in model.adapted.read({Role.CORE})})
    roles = frozenset({Role.CORE, Role.B})
    found = compute(model, "captured", roles, [0, 1, 2], [0, 1, 1])
    for site in model.adapted.sites:
        b = model.parts()[PartKey(site.name, Role.B)]
        of_b = found[PartKey(site.name, Role.B)]
        core = found[PartKey(site.name, Role.CORE)]
        assert torch.allclose(b @ core, b @ b.T @ of_b, rtol=1e-4, atol=1e-5)
        assert torch.allclose(core, b.T @ of_b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", list(GRADIENTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_give_the_same_gradients(family: str, kind: str) -> None:
    """A layer's hooks fire again in its recomputation, which must not count twice."""
    drawn, units = [0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0]
    plain, model = tiny(family, layers=3), tiny(family, layers=3, checkpointing=True)
    expected = compute(plain, "autograd", ROLES[2], drawn, units)
    forwards: list[int] = []
    watched = next(m for name, m in model.classifier.named_modules() if name.endswith("lora_B"))
    watched["default"].register_forward_hook(lambda *_: forwards.append(1))
    assert_same(compute(model, kind, ROLES[2], drawn, units), expected)
    calls = (3 if family == "albert" else 1) * (3 if kind == "autograd" else 1)
    assert len(forwards) == 2 * calls  # it was recomputed


@pytest.mark.parametrize("kind", ["captured", "opacus", "autograd"])
@pytest.mark.parametrize(
    ("drawn", "units"), [([2], [0]), ([4], [0]), ([1, 1], [0, 1]), ([0, 3], [0, 0])]
)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_unit_is_the_gradient_of_its_own_rows(
    kind: str, drawn: list[int], units: list[int]
) -> None:
    """Against torch's own gradient of the unit's rows in a batch without any other."""
    model = tiny()
    found = compute(model, kind, ROLES[2], drawn, units)
    trained = model.adapted.select_trained(ROLES[2])
    for unit in range(max(units) + 1):
        mine = [row for row, owner in zip(drawn, units, strict=True) if owner == unit]
        loss = model.classifier.losses(DATA.batch(np.array(mine))).sum()
        wanted = torch.autograd.grad(loss, list(trained.values()))
        assert_same(
            {key: value[unit : unit + 1] for key, value in found.items()},
            {key: value.unsqueeze(0) for key, value in zip(trained, wanted, strict=True)},
        )


@pytest.mark.parametrize("kind", list(GRADIENTS))
@pytest.mark.parametrize("units", [0, 2])
def test_an_empty_batch_gives_zeros_and_runs_no_model(kind: str, units: int) -> None:
    model = tiny()
    trained = model.adapted.select_trained(ROLES[1])

    def never(_: Tensor) -> Tensor:
        raise AssertionError("the model ran")

    found = GRADIENTS[kind](model.classifier, trained)(
        never, torch.zeros(0, dtype=torch.int64), units
    )
    for key, value in found.items():
        assert torch.equal(value, torch.zeros(units, *trained[key].shape))


@pytest.mark.parametrize("kind", list(GRADIENTS))
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    compute(model, kind, ROLES[1], [0, 1], [0, 1])
    after = model.classifier.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for module in model.classifier.modules():
        assert not module.training
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not any(hasattr(value, "grad_sample") for value in module.parameters())


def test_a_row_that_is_no_number_leaves_the_other_rows_alone() -> None:
    model = tiny()
    embedding = model.adapted.encoder.get_submodule("base_model.model.embeddings.word_embeddings")
    poisoned = int(DATA.tokens[DATA.offsets[2]])
    clean = compute(model, "captured", ROLES[1], [4, 2], [0, 1])
    with torch.no_grad():
        embedding.get_parameter("weight")[poisoned] = torch.nan
    assert poisoned not in DATA.tokens[DATA.offsets[4] : DATA.offsets[5]]
    found = compute(model, "captured", ROLES[1], [4, 2], [0, 1])
    assert all(value[1].isnan().any() for value in found.values())
    assert_same(
        {key: value[:1] for key, value in found.items()},
        {key: value[:1] for key, value in clean.items()},
    )


class Mixing(nn.Module):
    """Hands its linear layer all tokens of all rows as one long row list."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = self.linear(inputs.flatten(0, 1) if self.flat else inputs)
        return (states * self.scale).reshape(inputs.shape[0], -1).sum(1)


def test_a_layer_that_mixes_rows_is_refused() -> None:
    inputs = torch.ones(2, 4, 3)
    for flat in (False, True):
        model = Mixing(flat)
        weight = model.linear.get_parameter("weight")
        path = CapturedGradients(model, {PartKey("linear", Role.HEAD): weight})

        def losses(positions: Tensor, model: Mixing = model) -> Tensor:
            out: Tensor = model(inputs[positions])
            return out

        if flat:
            with pytest.raises(ModelError, match="8 rows in a batch of 2"):
                path(losses, torch.arange(2), 2)
        else:
            path(losses, torch.arange(2), 2)


class Repeated(nn.Module):
    """One linear layer, twice over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = self.linear(torch.tanh(self.linear(inputs)))
        return states.square().sum((1, 2))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_weight_and_bias_of_a_repeated_layer_sum_over_tokens_and_calls() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = Repeated().eval(), torch.randn(4, 5, 3)
    trained = {PartKey(name, Role.HEAD): value for name, value in model.linear.named_parameters()}

    def losses(positions: Tensor) -> Tensor:
        out: Tensor = model(inputs[positions])
        return out

    index = torch.tensor([1, 0, 1, 2])
    expected = AutogradGradients(model, trained)(losses, index, 3)
    for kind in ("captured", "opacus"):
        assert_same(GRADIENTS[kind](model, trained)(losses, index, 3), expected)


def test_what_no_linear_layer_owns_needs_autograd() -> None:
    model = Mixing(flat=False)
    trained = {PartKey("scale", Role.HEAD): model.scale}
    with pytest.raises(ModelError, match=r"scale/head .* kernels\.gradients=autograd"):
        CapturedGradients(model, trained)
    inputs = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    found = AutogradGradients(model, trained)(
        lambda positions: model(inputs[positions]), torch.tensor([0, 1, 1]), 2
    )
    states = model.linear(inputs).detach().sum(1)  # ∂(Σ_t s·y_t)/∂s = Σ_t y_t
    assert torch.allclose(
        found[PartKey("scale", Role.HEAD)], torch.stack([states[0], states[1] + states[2]])
    )


def test_a_planted_bug_is_detected() -> None:
    """A path that forgets that a shared layer (ALBERT) is called several times."""
    model = tiny("albert", layers=3)
    expected = compute(model, "autograd", ROLES[0], [0, 1], [0, 1])

    class LastCallOnly(CapturedGradients):
        @contextmanager
        def _tapped(self, rows: int, add: Callable[..., None]) -> Iterator[Tensor]:
            seen: set[int] = set()

            def once(layer: int, z: Tensor, delta: Tensor) -> None:
                if layer not in seen:
                    seen.add(layer)
                    add(layer, z, delta)

            with super()._tapped(rows, once) as anchor:
                yield anchor

    trained = model.adapted.select_trained(ROLES[0])
    batch = DATA.batch(np.array([0, 1]))
    wrong = LastCallOnly(model.classifier, trained)(
        partial(model.classifier.losses, batch), batch.unit_index, 2
    )
    with pytest.raises(AssertionError):
        assert_same(wrong, expected)
