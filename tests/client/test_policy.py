"""A site keeps to the smaller of each bound: its operator's, or the run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client.policy import tighten
from fedlr.privacy.limits import Limits
from tests.client.test_site import policy


@pytest.mark.parametrize("asked", [2.0, 20.0])
def test_the_smaller_bound_counts(asked: float) -> None:
    run = policy(epsilon=asked, max_joins=3)
    limits = Limits(epsilon_total=10.0, max_joins=4, epsilon_per_run=1.0, rows_per_user=5)
    expected = {"epsilon": min(asked, 10.0), "epsilon_per_run": 1.0, "rows_per_user": 5}
    assert tighten(run, limits) == replace(run, **expected, max_joins_total=4)
    assert tighten(run, Limits()) == run


@pytest.mark.parametrize(("asked", "of_run"), [(2.0, 2.0), (20.0, 8.0)])
def test_with_a_ledger_over_all_runs_the_runs_own_epsilon_bounds_the_run_alone(
    asked: float, of_run: float
) -> None:
    limits = Limits(ledger=Path("/x"), source_id="x", epsilon_total=10.0, epsilon_per_run=8.0)
    found = tighten(policy(epsilon=asked), limits)
    assert (found.epsilon, found.epsilon_per_run) == (10.0, of_run)
    assert tighten(policy(epsilon=asked), replace(limits, epsilon_per_run=None)).epsilon == 10.0
