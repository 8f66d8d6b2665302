"""A bound on the tokens of a pass changes how a logical batch is cut, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.methods.method import PartKey, Parts, Role
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream
from fedlr.training.local import LocalTask
from tests.models import LONGEST, rows, settings, tiny, units_of

LENGTHS = [5, 3, LONGEST, 7, 2, 9, 4, 6, 3, 3, 8, LONGEST]
DATA = rows(LENGTHS)
ROLES = frozenset({Role.B, Role.HEAD})
BUDGETS = (None, 1, LONGEST, 20, 30, 10**6)
USERS = units_of([1, 4, 2, 5])
EXAMPLES = units_of([1] * len(LENGTHS))


def task(start: Parts, private: bool = True, rate: float = 0.6) -> LocalTask:
    """A clip that binds, so that clipping piece by piece would show."""
    keys = [key for key in start if key.role in ROLES]
    mechanism = Mechanism(0.05, clip_groups(keys, 0.05, None), 0.0, 1) if private else None
    stream = public_stream("budget")
    return LocalTask(start, ROLES, rate, mechanism, stream, stream)


def difference(left: dict[PartKey, Tensor], right: dict[PartKey, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)


@pytest.mark.parametrize("units", [EXAMPLES, USERS], ids=["example", "user"])
@pytest.mark.parametrize("changes", [{}, {"rows_per_user": 3}, {"gradients": "opacus"}], ids=str)
def test_a_release_is_the_same_under_every_budget(units: Any, changes: dict[str, Any]) -> None:
    model = tiny()
    start = model.parts()
    expected = model.trainer(DATA, steps=3, **changes).train(task(start), units)
    assert difference(expected, {key: start[key] for key in expected}) > 1e-3
    for budget in BUDGETS:
        trainer = model.trainer(DATA, steps=3, tokens_per_batch=budget, **changes)
        assert difference(trainer.train(task(start), units), expected) < 1e-5


def test_plain_training_is_the_same_under_every_budget() -> None:
    model = tiny()
    start = model.parts()
    expected = model.trainer(DATA, steps=3).train(task(start, private=False), EXAMPLES)
    for budget in BUDGETS:
        trainer = model.trainer(DATA, steps=3, tokens_per_batch=budget)
        found = trainer.train(task(start, private=False), EXAMPLES)
        assert difference(found, expected) < 1e-5


def test_no_pass_is_larger_than_both_bounds_allow() -> None:
    """20 tokens: 12, 12, 9+8, then rows of 7, 6 (two), 5, 4, 3 (three) under at most four rows."""
    trainer = tiny().trainer(DATA, physical_batch=4, tokens_per_batch=20)
    every = np.arange(len(LENGTHS))
    passes = list(trainer.physical(every, every))
    shapes = [tuple(batch.input_ids.shape) for _, batch in passes]
    assert shapes == [(1, 12), (1, 12), (2, 9), (2, 7), (4, 5), (2, 3)]
    assert sorted(np.concatenate([rows for rows, _ in passes]).tolist()) == every.tolist()
    with pytest.raises(ValueError, match="tokens_per_batch = 0 must be ≥ 1"):
        settings(tokens_per_batch=0)


def test_units_over_several_batches_are_clipped_once() -> None:
    """One user of five rows, each in a pass of its own: the release moves by C."""
    model = tiny()
    start = model.parts()
    trainer = model.trainer(DATA, tokens_per_batch=1)
    moved = trainer.train(task(start, rate=1.0), units_of([5]))
    change = torch.cat([(moved[key] - start[key]).flatten() for key in moved])
    assert float(change.norm()) == pytest.approx(0.05, rel=1e-4)
