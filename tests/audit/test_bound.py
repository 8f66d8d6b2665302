"""The bound on ε: its binomial tail, its δ-term, and its coverage on mechanisms of known ε."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedlr.audit.bound import Guesses, epsilon_lower_bound, largest_bound, p_value


def right(epsilon: float) -> float:
    """Probability that ε-private randomised response tells the truth."""
    return 1 / (1 + math.exp(-epsilon))


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "printed"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bounds_printed_in_the_paper(
    canaries: int, guesses: int, correct: int, delta: float, printed: float
) -> None:
    # Appendix D and section 7 of arXiv 2305.08846, version 1; the second is printed truncated.
    found = epsilon_lower_bound(Guesses(canaries, guesses, correct), delta, confidence=0.95)
    assert found == pytest.approx(printed, abs=1e-3)


@pytest.mark.parametrize("guesses", [1, 20, 300])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 9.0])
def test_without_delta_the_p_value_is_the_binomial_tail(guesses: int, epsilon: float) -> None:
    for correct in range(0, guesses + 1, max(1, guesses // 10)):
        found = p_value(Guesses(500, guesses, correct), epsilon, delta=0.0)
        tail = stats.binom.sf(correct - 1, guesses, right(epsilon))
        assert found == pytest.approx(tail, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [50, 200])
def test_randomised_response_is_exceeded_no_more_often_than_stated(
    epsilon: float, guesses: int
) -> None:
    # Its right guesses are exactly Binomial(r, e^ε/(1 + e^ε)): the law that the bound supposes.
    count = np.arange(guesses + 1)
    bounds = [epsilon_lower_bound(Guesses(guesses, guesses, int(v)), 0.0, 0.95) for v in count]
    law = stats.binom.pmf(count, guesses, right(epsilon))
    assert np.all(np.diff(bounds) >= 0)
    assert law[np.array(bounds) > epsilon].sum() <= 0.05
    deviation = 1 / math.sqrt(guesses * right(epsilon) * right(-epsilon))
    assert law[np.array(bounds) > epsilon - 3 * deviation].sum() > 0.5


def test_coverage_and_power_by_simulation() -> None:
    # 2000 audits of randomised response with ε = 1 on 100 of 1000 canaries: at most 5 % may
    # exceed it, 150 or more with probability 1e-6; the mean bound is 0.6 ± 0.01.
    draws = np.random.default_rng(0)
    coins = draws.random((2000, 100)) < 0.5
    truthful = draws.random((2000, 100)) < right(1.0)
    correct = ((coins == truthful) == coins).sum(1)
    bounds = {
        v: epsilon_lower_bound(Guesses(1000, 100, v), 0.0, 0.95) for v in set(correct.tolist())
    }
    found = np.array([bounds[v] for v in correct.tolist()])
    assert (found > 1.0).sum() < 150
    assert found.mean() > 0.5


@pytest.mark.parametrize("block", [1, 5, 20, 100])
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_delta_term_covers_a_mechanism_that_uses_all_of_delta(
    block: int, epsilon: float
) -> None:
    # With probability mδ/k it publishes the coins of a random block of k canaries, each of
    # which is so betrayed with probability δ, and it answers at random for the others.
    canaries, delta = 100, 1e-3
    betrayed = canaries * delta / block
    exceeds = []
    for correct in range(1, canaries + 1):
        usual = stats.binom.sf(correct - 1, canaries, right(epsilon))
        rest = stats.binom.sf(correct - block - 1, canaries - block, right(epsilon))
        exact = (1 - betrayed) * usual + betrayed * rest
        found = Guesses(canaries, canaries, correct)
        assert exact <= p_value(found, epsilon, delta) * (1 + 1e-9)
        exceeds.append(exact > p_value(found, epsilon, 0.0) * (1 + 1e-9))
    assert any(exceeds)  # the tail alone would not do


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_everything_below_the_bound_is_rejected_and_the_bound_is_not(delta: float) -> None:
    found = Guesses(300, 60, 55)
    bound = epsilon_lower_bound(found, delta, 0.95)
    assert all(p_value(found, float(e), delta) < 0.05 for e in np.linspace(0, bound, 200))
    assert p_value(found, bound + 1e-6, delta) >= 0.05


def test_more_confidence_more_delta_and_fewer_right_guesses_lower_the_bound() -> None:
    base = epsilon_lower_bound(Guesses(1000, 200, 180), 1e-5, 0.95)
    assert 1.5 < base < largest_bound(1000, 200, 1e-5, 0.95)
    assert epsilon_lower_bound(Guesses(1000, 200, 179), 1e-5, 0.95) < base
    assert epsilon_lower_bound(Guesses(1000, 200, 180), 1e-5, 0.99) < base
    assert epsilon_lower_bound(Guesses(1000, 200, 180), 1e-4, 0.95) < base


def test_no_guess_shows_nothing() -> None:
    assert epsilon_lower_bound(Guesses(100, 0, 0), 1e-5, 0.95) == 0.0


@pytest.mark.parametrize("numbers", [(0, 0, 0), (10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_numbers_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"canaries|guesses|correct"):
        Guesses(*numbers)


def test_an_impossible_confidence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"confidence = 1"):
        epsilon_lower_bound(Guesses(10, 10, 10), 0.0, 1.0)
