"""One unit more or less moves the clipped sum by at most C, through the whole local step.

Neighbours are trained for one step of size 1 with σ = 0 and L = 1, every unit drawn:
the difference of the trained arrays is then the difference of the clipped sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.data.batching import UnitIndex
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.dpsgd import ClippedSum, Mechanism, clip_groups
from fedlr.privacy.noise import public_stream
from fedlr.training.local import LocalTask, LocalTrainer, draw_rows
from tests.models import LONGEST, MOVABLE, VOCABULARY, Tiny, rows, tiny

PAIRS = 50
SLACK = 1e-5
ROLES = frozenset({Role.B, Role.HEAD})

SIZES = [1, 3, 1, 2, 4, 1, 1, 2, 1, 1, 3, 1]
LENGTHS = np.random.default_rng(5).integers(2, LONGEST - 3, sum(SIZES)).tolist()
LENGTHS[0] = LONGEST  # unit 0: one row, longer than all others
DATA = rows(LENGTHS)
ENDS = np.cumsum([0, *SIZES])


def client(units: list[int]) -> UnitIndex:
    mine = [np.arange(ENDS[unit], ENDS[unit + 1]) for unit in units]
    sizes = [len(piece) for piece in mine]
    return UnitIndex(
        np.concatenate([np.empty(0, np.int64), *mine]),
        np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
    )


def everything(model: Mapping[PartKey, Tensor], one: Mechanism, label: int = 0) -> LocalTask:
    """A step that draws every unit; ``label`` decides the choice of rows."""
    return LocalTask(
        parts=model,
        train=frozenset(key.role for key in one.keys),
        sample_rate=1.0,
        mechanism=one,
        sampling=public_stream("t", label),
        noise=public_stream("t"),
    )


def clipped_sum(
    trainer: LocalTrainer,
    model: Mapping[PartKey, Tensor],
    one: Mechanism,
    units: UnitIndex,
    label: int = 0,
) -> dict[PartKey, Tensor]:
    found = trainer.train(everything(model, one, label), units)
    return {key: model[key].double() - value.double() for key, value in found.items()}


def moved(
    trainer: LocalTrainer, model: Tiny, one: Mechanism, units: list[int], removed: int
) -> dict[PartKey, Tensor]:
    parts = model.parts()
    whole = clipped_sum(trainer, parts, one, client(units))
    less = clipped_sum(trainer, parts, one, client([u for u in units if u != removed]))
    return {key: whole[key] - less[key] for key in whole}


def norm(arrays: Mapping[PartKey, Tensor]) -> float:
    return math.sqrt(sum(float(value.pow(2).sum()) for value in arrays.values()))


def mechanism(model: Tiny, roles: frozenset[Role], clip: float, share: float | None) -> Mechanism:
    keys = [key for key in model.adapted.parameters() if key.role in roles]
    return Mechanism(clip, clip_groups(keys, clip, share), 0.0, 1)


def pairs() -> list[tuple[list[int], int]]:
    """Subsets of the units (a Poisson mask) and the unit that the neighbour lacks."""
    draws = np.random.default_rng(11)
    found: list[tuple[list[int], int]] = []
    while len(found) < PAIRS:
        units = np.flatnonzero(draws.random(len(SIZES)) < 0.6).tolist()
        if units:
            found.append((units, units[len(found) % len(units)]))
    return found


@pytest.mark.parametrize("family", ["bert", "albert"])
@pytest.mark.parametrize(("clip", "share"), [(0.5, None), (4.0, 0.3), (4.0, None)])
@pytest.mark.parametrize("size", [3, 64])
def test_a_unit_moves_the_sum_by_at_most_the_clip(
    family: str, clip: float, share: float | None, size: int
) -> None:
    model = tiny(family)
    trainer, one = model.trainer(DATA, physical_batch=size), mechanism(model, ROLES, clip, share)
    cases = pairs()[: PAIRS // 2]
    removed = {unit for _, unit in cases}
    assert 0 in removed  # the longest example: without it the others are padded less
    assert {SIZES[unit] for unit in removed} >= {1, 2, 3}
    largest = 0.0
    for units, unit in cases:
        change = moved(trainer, model, one, units, unit)
        assert norm(change) <= clip * (1 + SLACK)
        for group in one.groups:
            assert norm({key: change[key] for key in group.keys}) <= group.bound * (1 + SLACK)
        largest = max(largest, norm(change))
    assert largest >= 0.99 * clip


def without(units: UnitIndex, removed: int) -> UnitIndex:
    """The same client without its unit number ``removed``."""
    kept, unit_index = units.rows_of(np.delete(np.arange(units.count), removed))
    sizes = np.bincount(unit_index, minlength=units.count - 1)
    return UnitIndex(kept, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def chosen(task: LocalTask, units: UnitIndex, limit: int | None) -> UnitIndex:
    """The client of the rows that a step of ``task`` uses: a cap leaves all of these."""
    kept, unit_index = draw_rows(task, units, limit)
    sizes = np.bincount(unit_index, minlength=units.count)
    return UnitIndex(kept, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


@pytest.mark.parametrize(
    ("kind", "limit"), [("example", None), ("user", None), ("user", 2)], ids=str
)
def test_five_hundred_neighbours_with_every_array_trained(kind: str, limit: int | None) -> None:
    """A, B and the head in one clip; each mask with every one of its units removed.

    With a cap, neighbours use the same rows of the units that both have, whichever
    the draw chose: the sensitivity is that of every choice.
    """
    model = tiny(layers=1)
    trainer = model.trainer(DATA, physical_batch=16, rows_per_user=limit)
    one, parts = mechanism(model, MOVABLE, 1.0, None), model.parts()
    draws = np.random.default_rng(11)
    count = len(SIZES) if kind == "user" else len(DATA)
    found: list[float] = []
    removed: set[int] = set()
    while len(found) < 500:
        mask = np.flatnonzero(draws.random(count) < 0.8).tolist()
        whole = client(mask) if kind == "user" else units_of_rows(mask)
        label = len(found)
        total = clipped_sum(trainer, parts, one, whole, label)
        used = chosen(everything(parts, one, label), whole, limit)
        for position, unit in enumerate(mask):
            less = clipped_sum(trainer, parts, one, without(used, position))
            found.append(norm({key: total[key] - less[key] for key in total}))
            removed.add(unit)
    assert removed == set(range(count))  # the longest example too, and users of 1 to 4 rows
    assert max(found) <= 1 + SLACK
    assert max(found) >= 0.99


def units_of_rows(mask: list[int]) -> UnitIndex:
    """Every row of ``mask`` as a unit of its own."""
    return UnitIndex.of(None, np.array(mask, dtype=np.int64), "example")


def test_choosing_the_rows_of_one_unit_by_those_of_another_would_be_caught() -> None:
    """What a shared choice costs: the rows of unit 4 change with unit 1, and the sum by 2C."""
    model = tiny()
    one, parts = mechanism(model, ROLES, 0.1, None), model.parts()
    trainer = model.trainer(DATA, rows_per_user=1)
    pair = client([1, 4])

    def change(rows_of_the_other: UnitIndex) -> float:
        whole = clipped_sum(trainer, parts, one, chosen(everything(parts, one), pair, 1))
        less = clipped_sum(trainer, parts, one, rows_of_the_other)
        return norm({key: whole[key] - less[key] for key in whole})

    kept = without(chosen(everything(parts, one), pair, 1), 0)
    assert change(kept) <= 0.1 * (1 + SLACK)
    others = [
        replace(kept, rows=np.array([row]))
        for row in range(ENDS[4], ENDS[5])
        if row not in kept.rows
    ]
    assert max(change(other) for other in others) > 0.1 * 1.1


def test_an_unclipped_unit_moves_the_sum_by_its_own_gradient() -> None:
    """With a clip that nothing reaches, neighbours differ by less than the clip."""
    model = tiny()
    trainer, one = model.trainer(DATA), mechanism(model, ROLES, 1e4, None)
    assert 0.1 < norm(moved(trainer, model, one, [0, 1, 2], 1)) < 1e3


@pytest.mark.parametrize("token", [VOCABULARY - 1, VOCABULARY - 2])
def test_a_unit_without_a_finite_gradient_moves_nothing(token: int) -> None:
    """One token's embedding is NaN, another's overflows; the other rows do not notice."""
    model = tiny()
    embeddings = model.adapted.encoder.get_submodule("base_model.model.embeddings.word_embeddings")
    with torch.no_grad():
        embeddings.get_parameter("weight")[VOCABULARY - 1] = torch.nan
        embeddings.get_parameter("weight")[VOCABULARY - 2] = torch.inf
    data = rows(LENGTHS)
    data.tokens[data.offsets[ENDS[4]]] = token  # the first of the four rows of unit 4
    for size in (2, 64):
        trainer, one = model.trainer(data, physical_batch=size), mechanism(model, ROLES, 1.0, None)
        change = moved(trainer, model, one, [0, 2, 4, 5], 4)
        assert norm(change) <= SLACK
        assert norm(clipped_sum(trainer, model.parts(), one, client([0, 2, 5]))) > 0.5
        assert norm(clipped_sum(trainer, model.parts(), one, client([4]))) == 0.0


def test_clipping_each_physical_batch_alone_would_be_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Piecewise(ClippedSum):
        def add(self, gradients: Mapping[PartKey, Tensor], units: object, last: object) -> None:
            count = len(next(iter(gradients.values())))
            super().add(gradients, range(count), [True] * count)

    model = tiny()
    trainer, one = model.trainer(DATA, physical_batch=1), mechanism(model, ROLES, 0.1, None)
    unit = UnitIndex(np.array([2, 2, 2]), np.array([0, 3]))  # three equal rows: pieces add up
    assert norm(clipped_sum(trainer, model.parts(), one, unit)) <= 0.1 * (1 + SLACK)
    monkeypatch.setattr("fedlr.training.local.ClippedSum", Piecewise)
    found = norm(clipped_sum(trainer, model.parts(), one, unit))
    assert found == pytest.approx(3 * 0.1, rel=SLACK)
