"""Accuracy and loss against a direct computation, whatever the physical batch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlr.methods.method import PartKey, Role
from fedlr.training.evaluate import Evaluator
from tests.models import CLASSES, CPU, LONGEST, Tiny, cored, rows, tiny

DATA = rows([5, 3, LONGEST, 7, 2, 9, 4, 6, 3, 8, 5])


def evaluator(model: Tiny, size: int = 4) -> Evaluator:
    return Evaluator(model.classifier, model.adapted, DATA, size, CPU)


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_it_is_the_mean_over_rows_taken_one_by_one(size: int) -> None:
    model = tiny()
    right, nats = 0, 0.0
    with torch.no_grad():
        for row in range(len(DATA)):
            logits = model.classifier(DATA.batch(np.array([row])))[0].double()
            label = int(DATA.labels[row])
            right += int(logits.argmax()) == label
            nats += float(torch.logsumexp(logits, 0) - logits[label])
    accuracy, loss = evaluator(model, size)(model.parts())
    assert accuracy == right / len(DATA)
    assert loss == pytest.approx(nats / len(DATA), rel=1e-5)


def test_it_evaluates_the_parts_that_it_is_given() -> None:
    model = tiny()
    measure, parts = evaluator(model), model.parts()
    zero = {key: torch.zeros_like(value) for key, value in parts.items() if key.role is Role.HEAD}
    before = measure(parts)
    accuracy, loss = measure({**parts, **zero})
    assert loss == pytest.approx(math.log(CLASSES), rel=1e-6)
    assert accuracy == float((DATA.labels == 0).mean())  # ties go to the first class
    other = {**parts, PartKey("head.output.bias", Role.HEAD): torch.tensor([0.0, 0.0, 50.0])}
    assert measure(other)[0] == float((DATA.labels == 2).mean())
    assert measure({**parts, PartKey("x", Role.ROTATION): torch.zeros(1)}) == before


def test_residuals_and_cores_are_evaluated() -> None:
    """A residual that takes s·B·A away, and a core of zeros, leave what B = 0 gives."""
    model, with_cores = tiny(), cored()
    parts = model.parts()
    zero = {k: torch.zeros_like(v) if k.role is Role.B else v for k, v in parts.items()}
    expected, there = evaluator(model)(zero)[1], evaluator(model)(parts)[1]
    assert abs(expected - there) > 1e-3
    against = dict(parts)
    for site in model.adapted.sites:
        b, a = parts[PartKey(site.name, Role.B)], parts[PartKey(site.name, Role.A)]
        against[PartKey(site.name, Role.RESIDUAL_B)] = -site.scaling * b
        against[PartKey(site.name, Role.RESIDUAL_A)] = a
    assert evaluator(model)(against)[1] == pytest.approx(expected, rel=1e-4)
    assert evaluator(model)(parts)[1] == there  # and is gone again
    cores = {k: v * 0 for k, v in with_cores.adapted.read({Role.CORE}).items()}
    assert evaluator(with_cores)({**parts, **cores})[1] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_diverged_has_an_infinite_loss() -> None:
    model = tiny()
    key = PartKey("head.output.bias", Role.HEAD)
    assert evaluator(model)({key: torch.full((CLASSES,), math.nan)})[1] == math.inf


def test_no_rows_are_refused() -> None:
    model = tiny()
    empty = replace(rows([]))
    nothing = Evaluator(model.classifier, model.adapted, empty, 4, CPU)
    with pytest.raises(ValueError, match="validation rows"):
        nothing({})
