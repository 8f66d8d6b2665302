"""A site keeps to the smaller of each bound: its operator's, or the run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client.policy import tighten
from fedlr.errors import ConfigError
from fedlr.privacy.limits import Limits, read_limits
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


@pytest.mark.parametrize(
    ("of_run", "allowed", "found"), [(4, 2, 2), (2, 4, 2), (None, 3, 3), (3, None, 3)]
)
def test_the_smaller_rank_counts(
    of_run: int | None, allowed: int | None, found: int | None
) -> None:
    assert tighten(policy(max_rank=of_run), Limits(max_rank=allowed)).max_rank == found


def test_a_rank_below_one_is_no_policy() -> None:
    with pytest.raises(ValueError, match="max_rank = 0 must be ≥ 1"):
        policy(max_rank=0)


def test_the_file_of_an_operator_may_bound_the_rank(tmp_path: Path) -> None:
    path = tmp_path / "client-000.toml"
    path.write_text("[allow]\nmax_rank = 3\n")
    assert read_limits(path) == Limits(max_rank=3)
    for wrong in ("0", "2.5", "true"):
        path.write_text(f"[allow]\nmax_rank = {wrong}\n")
        with pytest.raises(ConfigError, match="max_rank"):
            read_limits(path)
