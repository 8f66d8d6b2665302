"""The observer: what its filter cancels, and guesses that are fixed in advance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlr.audit.attack import Observer, Quota, guess, signs
from fedlr.audit.canaries import Directions
from fedlr.methods.method import PartKey, Role
from tests.models import settings

B, HEAD = PartKey("x", Role.B), PartKey("head.weight", Role.HEAD)
SHAPES = {B: torch.Size([30, 2]), HEAD: torch.Size([20])}
DIRECTIONS = Directions.draw(SHAPES, 16)


@pytest.mark.parametrize("rounds", range(1, 10))
def test_the_signs_add_up_to_zero_and_few_rounds_are_left_out(rounds: int) -> None:
    found = signs(rounds)
    assert len(found) == rounds
    assert sum(found) == (1 if rounds == 1 else 0)
    assert found.count(0) == (rounds % 2 if rounds > 1 else 0)


def test_the_filter_undoes_both_step_sizes_and_cancels_what_all_rounds_share() -> None:
    # One step of SGD moves by -rate · gradient; the canary's gradient has the round's sign.
    public = settings(learning_rate=0.5, head_learning_rate=0.02)
    rates = {B: 0.5, HEAD: 0.02}
    draws = torch.Generator().manual_seed(0)
    before = {key: torch.randn(shape, generator=draws) for key, shape in SHAPES.items()}
    shared = {key: 10 * torch.randn(shape, generator=draws) for key, shape in SHAPES.items()}
    observer = Observer(DIRECTIONS, public)
    for sign in signs(4):
        gradient = {
            key: shared[key] + sign * 0.3 * DIRECTIONS.gradients(key, torch.tensor([5]))[0]
            for key in SHAPES
        }
        after = {key: before[key] - rates[key] * gradient[key] for key in SHAPES}
        observer.see(before, after, sign)
    expected = torch.zeros(16, dtype=torch.float64)
    expected[5] = 4 * 0.3
    torch.testing.assert_close(observer.scores, expected, atol=1e-3, rtol=0)


def test_low_scores_are_guessed_only_where_every_included_canary_is_drawn() -> None:
    assert Quota.of(250, never_drawn=0.01) == Quota(25, 25)
    assert Quota.of(250, never_drawn=0.03) == Quota(25, 0)


def test_guesses_are_the_extremes_and_the_rest_is_abstained_on() -> None:
    scores = torch.arange(10.0)
    coins = np.arange(10) >= 5
    assert guess(scores, coins, Quota(2, 3)).correct == 5
    assert guess(scores, ~coins, Quota(2, 3)).correct == 0
    assert guess(scores, ~coins, Quota(0, 0)).guesses == 0
    middle = coins.copy()
    middle[3:8] ^= True
    assert guess(scores, middle, Quota(2, 3)) == guess(scores, coins, Quota(2, 3))


def test_more_guesses_than_canaries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6 guesses, above canaries = 5"):
        guess(torch.zeros(5), np.zeros(5, dtype=np.bool_), Quota(3, 3))
