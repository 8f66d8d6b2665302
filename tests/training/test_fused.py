"""Clients that share their passes through the model are trained as if each were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlr.data.batching import UnitIndex
from fedlr.methods.method import MODEL_ROLES, PartKey, Role
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream, secret_stream
from fedlr.training.fused import RowWise, can_fuse, train_together
from fedlr.training.local import LocalTask
from tests.models import LONGEST, MOVABLE, RANK, WIDTH, Tiny, cored, rows, tiny, units_of

B, HEAD, ALL = frozenset({Role.B}), frozenset({Role.B, Role.HEAD}), MOVABLE
CORES = frozenset({Role.CORE, Role.HEAD})
DATA = rows([5, 3, LONGEST, 7, 2, 9, 4, 6, 3, 8, 5, 5])
UNITS = [
    units_of([1, 2, 1]),
    units_of([], first=4),
    units_of([1, 1, 1, 1, 1], first=4),
    units_of([3], 9),
]
RATES = (0.7, 1.0, 0.5, 1.0)


def tasks(model: Tiny, train: frozenset[Role] = HEAD, **changes: Any) -> list[LocalTask]:
    """One task a client, each with its own streams, rate and clip."""
    keys = [key for key in model.adapted.parameters() if key.role in train]
    return [
        replace(
            LocalTask(
                parts=model.parts(),
                train=train,
                sample_rate=rate,
                mechanism=Mechanism(clip, clip_groups(keys, clip, None), 0.0, 4),
                sampling=public_stream("sampling", number),
                noise=public_stream("noise", number),
            ),
            **changes,
        )
        for number, (rate, clip) in enumerate(zip(RATES, (3.0, 1.0, 0.5, 2.0), strict=True))
    ]


def alone(model: Tiny, todo: list[LocalTask], **settings: Any) -> list[dict[PartKey, Tensor]]:
    trainer = model.trainer(DATA, **settings)
    return [trainer.train(*pair) for pair in zip(todo, UNITS, strict=True)]


def assert_same(
    found: list[dict[PartKey, Tensor]],
    expected: list[dict[PartKey, Tensor]],
    start: dict[PartKey, Tensor],
) -> None:
    """Equal to 1e-5 of the largest update of each client; the updates differ from each other."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        size = max(float((other[key] - start[key]).norm()) for key in other)
        for key in other:
            assert float((one[key] - other[key]).norm()) <= 1e-5 * size + 1e-9, key
    moved = [float((other[key] - start[key]).norm()) for other in expected for key in other]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("train", [B, HEAD, ALL], ids=len)
def test_fused_is_one_after_the_other(size: int, train: frozenset[Role]) -> None:
    """Units with rows in several physical batches, an empty client, own rates and clips."""
    model = tiny()
    settings = {"physical_batch": size, "steps": 3, "momentum": 0.5, "head_learning_rate": 0.5}
    expected = alone(tiny(), tasks(model, train), **settings)
    trainer = model.trainer(DATA, **settings)
    assert can_fuse(trainer, tasks(model, train))
    assert_same(train_together(trainer, tasks(model, train), UNITS), expected, tiny().parts())


@pytest.mark.parametrize("train", [CORES, frozenset({Role.A, Role.B, Role.CORE})], ids=len)
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_cores_are_each_client_s_own(family: str, train: frozenset[Role]) -> None:
    model, start = cored(family), cored(family).adapted.read(MODEL_ROLES)
    expected = alone(cored(family), tasks(model, train, parts=start), steps=3)
    trainer, todo = model.trainer(DATA, steps=3), tasks(model, train, parts=start)
    assert can_fuse(trainer, todo)
    assert_same(train_together(trainer, todo, UNITS), expected, start)


def cut(parts: dict[PartKey, Tensor], rank: int) -> dict[PartKey, Tensor]:
    """The leading ``rank`` columns of every B and rows of every A."""
    kept = {Role.A: lambda value: value[:rank], Role.B: lambda value: value[:, :rank]}
    return {key: kept.get(key.role, lambda value: value)(value) for key, value in parts.items()}


def test_clients_of_one_rank_share_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 1, 2, 1, 2: two passes for four clients, and each gets back its own rank."""
    model, start = tiny(), tiny().parts()
    ranks = (1, RANK, 1, RANK)
    todo = [
        replace(task, parts=cut(start, rank))
        for task, rank in zip(tasks(model), ranks, strict=True)
    ]
    settings = {"steps": 2, "physical_batch": 4}
    expected = alone(tiny(), [replace(t, **fresh(n)) for n, t in enumerate(todo)], **settings)
    together: list[int] = []
    fused = RowWise.of
    monkeypatch.setattr(
        RowWise, "of", lambda self, arrays: (together.append(len(arrays)), fused(self, arrays))[1]
    )
    trainer = model.trainer(DATA, **settings)
    assert not can_fuse(trainer, todo)
    found = train_together(trainer, todo, UNITS)
    assert set(together) == {2}
    for first, rank in enumerate(ranks[:2]):
        assert_same(found[first::2], expected[first::2], cut(start, rank))


def fresh(number: int) -> dict[str, Any]:
    """The streams of a client's task, from their beginning."""
    return {
        "sampling": public_stream("sampling", number),
        "noise": public_stream("noise", number),
    }


def test_a_residual_is_shared_or_keeps_clients_apart() -> None:
    model = tiny()
    base, names = tiny().parts(), [site.name for site in model.adapted.sites]
    draws = torch.Generator().manual_seed(3)
    for name in names:
        base[PartKey(name, Role.RESIDUAL_B)] = 0.1 * torch.randn(WIDTH, 3, generator=draws)
        base[PartKey(name, Role.RESIDUAL_A)] = torch.randn(3, WIDTH, generator=draws)
    expected = alone(tiny(), tasks(model, parts=base), steps=2)
    without = alone(tiny(), tasks(model, parts=tiny().parts()), steps=2)
    trainer = model.trainer(DATA, steps=2)
    assert can_fuse(trainer, tasks(model, parts=base))
    found = train_together(trainer, tasks(model, parts=base), UNITS)
    assert_same(found, expected, base)
    key = next(iter(found[0]))
    assert not torch.allclose(found[0][key], without[0][key], rtol=0, atol=1e-4)
    moved = {k: v + 0.1 if k.role is Role.RESIDUAL_B else v for k, v in base.items()}
    first, *others = tasks(model, parts=base)
    assert not can_fuse(trainer, [replace(first, parts=moved), *others])


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert"])
def test_every_family_can_be_fused(family: str) -> None:
    model = tiny(family)
    expected = alone(tiny(family), tasks(model), physical_batch=4, steps=2)
    trainer = model.trainer(DATA, physical_batch=4, steps=2)
    assert_same(train_together(trainer, tasks(model), UNITS), expected, tiny(family).parts())


def test_adam_keeps_a_state_for_each_client() -> None:
    model = tiny()
    expected = alone(tiny(), tasks(model), optimizer="adam", learning_rate=0.01, steps=3)
    trainer = model.trainer(DATA, optimizer="adam", learning_rate=0.01, steps=3)
    found = train_together(trainer, tasks(model), UNITS)
    for one, other in zip(found, expected, strict=True):
        for key in other:  # Adam divides by the gradient's size, and rounding with it
            assert torch.allclose(one[key], other[key], atol=1e-4)


def test_a_cap_on_the_rows_of_a_user_draws_the_same_rows() -> None:
    model = tiny()
    expected = alone(tiny(), tasks(model, rows_per_user=1), steps=3)
    found = train_together(model.trainer(DATA, steps=3), tasks(model, rows_per_user=1), UNITS)
    assert_same(found, expected, tiny().parts())


def test_the_model_is_as_usual_afterwards() -> None:
    model = tiny()
    batch = DATA.batch(units_of([2]).rows)
    train_together(model.trainer(DATA, steps=1), tasks(model), UNITS)
    model.adapted.write(tiny().parts())
    before = tiny().classifier(batch)
    assert torch.equal(model.classifier(batch), before)


def test_noise_is_each_client_s_own() -> None:
    """Without rows an update is noise alone, and no two of them are alike."""
    model = tiny()
    empty = [UnitIndex.of(None, units.rows[:0], "example") for units in UNITS]
    todo = []
    for task in tasks(model, B):
        assert task.mechanism is not None
        noisy = replace(task.mechanism, noise_multiplier=1.0)
        todo.append(replace(task, mechanism=noisy, sampling=secret_stream(), noise=secret_stream()))
    found = train_together(model.trainer(DATA, steps=1), todo, empty)
    start = tiny().parts()
    first = next(iter(found[0]))
    updates = [one[first] - start[first] for one in found]
    for number, update in enumerate(updates):
        for other in updates[number + 1 :]:
            cosine = torch.nn.functional.cosine_similarity(update.flatten(), other.flatten(), 0)
            assert float(update.norm()) > 0
            assert not torch.equal(update, other)
            assert abs(float(cosine)) < 1 - 1e-6


def different(model: Tiny) -> dict[str, list[LocalTask]]:
    first, *others = tasks(model, B)
    key = next(key for key in first.parts if key.role is Role.A)
    moved = {**first.parts, key: first.parts[key] + 1}
    return {
        "one alone": [first],
        "not private": [replace(first, mechanism=None), *others],
        "other roles": [tasks(model, HEAD)[0], *others],
        "other A": [replace(first, parts=moved), *others],
        "fewer parts": [
            replace(first, parts={k: v for k, v in first.parts.items() if k != key}),
            *others,
        ],
    }


@pytest.mark.parametrize(
    "why", ["one alone", "not private", "other roles", "other A", "fewer parts"]
)
def test_what_cannot_be_fused_is_trained_one_after_the_other(why: str) -> None:
    model = tiny()
    expected = alone(tiny(), different(model)[why][:1] + tasks(model, B)[1:], steps=2)[:1]
    trainer = model.trainer(DATA, steps=2)
    todo = different(model)[why]
    assert not can_fuse(trainer, todo)
    found = train_together(trainer, todo, UNITS[: len(todo)])
    assert len(found) == len(todo)
    assert all(torch.equal(found[0][key], expected[0][key]) for key in expected[0])


def test_only_captured_gradients_can_be_fused() -> None:
    model = tiny()
    assert not can_fuse(model.trainer(DATA, gradients="autograd"), tasks(model))


def test_a_task_that_does_not_fit_is_refused_as_alone() -> None:
    model = tiny()
    first, *others = tasks(model)
    assert first.mechanism is not None
    noisy = replace(first, mechanism=replace(first.mechanism, noise_multiplier=1.0))
    with pytest.raises(ValueError, match="public stream"):
        train_together(model.trainer(DATA), [noisy, *others], UNITS)


def test_what_fails_while_rows_get_their_arrays_leaves_the_model_as_it_was() -> None:
    model = tiny()
    shared = model.adapted.select_trained(B)
    stacked = {key: torch.stack([value.detach()] * 2) for key, value in shared.items()}
    last = max(stacked)
    rowwise, owner = RowWise(model.classifier, shared), torch.zeros(3, dtype=torch.int64)
    with (
        pytest.raises(IndexError),
        rowwise.each_its_own({**stacked, last: stacked[last][:0]}, owner),
    ):
        pass
    assert not any("forward" in vars(module) for module in model.classifier.modules())
