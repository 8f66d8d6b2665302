"""What the audit plants is what the production step clips, sums and releases, no more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.audit.canaries import CanaryUnits, Directions
from fedlr.audit.trainer import CanaryTrainer
from fedlr.methods.method import PartKey, Parts
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream
from fedlr.training.local import LocalTask
from tests.audit.harness import CLIP, TRAINED, UNITS, trainer

BATCH = 7


def task(parts: Parts, rate: float = 1.0) -> LocalTask:
    keys = [key for key in parts if key.role in TRAINED]
    mechanism = Mechanism(CLIP, clip_groups(keys, CLIP, None), 0.0, BATCH)
    sampling, noise = public_stream("sampling"), public_stream("noise")
    return LocalTask(parts, TRAINED, rate, mechanism, sampling, noise)


def moved(
    before: Parts, after: Parts, rates: tuple[float, float] = (0.2, 0.1)
) -> dict[PartKey, Tensor]:
    """The released sum: one SGD step, its step sizes and the divisor undone."""
    return {
        key: (before[key] - value) * BATCH / rates[key.role.value == "head"]
        for key, value in after.items()
    }


@pytest.mark.parametrize("gradients", ["captured", "opacus", "autograd"])
@pytest.mark.parametrize("scale", [100.0, -100.0, 0.1, 0.0])
def test_the_step_releases_the_sites_sum_and_the_clipped_canaries(
    gradients: str, scale: float
) -> None:
    real, parts = trainer(steps=1, physical_batch=3, gradients=gradients)
    alone = moved(parts, real.train(task(parts), UNITS))
    planted = CanaryTrainer(real)
    coins = np.arange(40) % 3 == 0
    shapes = {key: value.shape for key, value in alone.items()}
    planted.directions, planted.scale = Directions.draw(shapes, 40), scale
    units = CanaryUnits.join(UNITS, coins, planted.shortest_row)
    found = moved(parts, planted.train(task(parts), units))
    clipped = np.sign(scale) * min(abs(scale), CLIP)
    included = torch.from_numpy(np.flatnonzero(coins))
    for key, value in alone.items():
        expected = value + clipped * planted.directions.gradients(key, included).sum(0)
        torch.testing.assert_close(found[key], expected, atol=1e-4, rtol=1e-4)


def test_only_drawn_canaries_contribute() -> None:
    real, parts = trainer(steps=1)
    planted = CanaryTrainer(real)
    shapes = {key: value.shape for key, value in parts.items() if key.role in TRAINED}
    planted.directions, planted.scale = Directions.draw(shapes, 100), 50.0
    coins = np.ones(100, dtype=np.bool_)
    units = CanaryUnits.join(UNITS, coins, planted.shortest_row)
    real_alone = CanaryUnits.join(UNITS, ~coins, planted.shortest_row)
    with_canaries = moved(parts, planted.train(task(parts, 0.3), units))
    # The stream gives the site's own units, which come first, the same draws.
    without = moved(parts, planted.train(task(parts, 0.3), real_alone))
    difference = {key: with_canaries[key] - without[key] for key in without}
    scores = planted.directions.project(difference)
    drawn = units.drawn[0][units.drawn[0] >= 0]
    expected = torch.zeros(100, dtype=torch.float64)
    expected[torch.from_numpy(drawn)] = CLIP
    assert 10 < len(drawn) < 60
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_a_step_that_draws_nobody_is_a_step() -> None:
    real, parts = trainer(steps=1)
    planted = CanaryTrainer(real)
    shapes = {key: value.shape for key, value in parts.items() if key.role in TRAINED}
    planted.directions, planted.scale = Directions.draw(shapes, 100), 50.0
    units = CanaryUnits.join(UNITS, np.ones(100, dtype=np.bool_), 0)
    after = planted.train(task(parts, 0.0), units)
    assert all(torch.equal(after[key], parts[key]) for key in after)


def test_ordinary_units_are_refused() -> None:
    real, parts = trainer()
    with pytest.raises(ValueError, match="CanaryUnits"):
        CanaryTrainer(real).train(task(parts), UNITS)


def test_a_training_that_goes_around_the_canaries_is_an_error() -> None:
    real, parts = trainer(steps=1)
    planted = CanaryTrainer(real)
    shapes = {key: value.shape for key, value in parts.items() if key.role in TRAINED}
    planted.directions = Directions.draw(shapes, 100)
    units = CanaryUnits.join(UNITS, np.ones(100, dtype=np.bool_), 0)
    with pytest.raises(RuntimeError, match="0 of 1 steps planted canaries"):
        planted.train(replace(task(parts), mechanism=None), units)
