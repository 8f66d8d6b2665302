"""What an operator allows: read strictly, and only ever less than the run asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.policy import Limits, SitePolicy, read_limits, tighten
from fedlr.errors import ConfigError
from fedlr.methods.method import Role
from tests.client.test_site import policy

WHOLE = """
client = "client-000"
declared_size = 8
unit = "example"
rows_per_user = 5

[budget]
delta = 1e-3
epsilon_total = 10
epsilon_per_run = 8.0
epsilon_per_month = 9.0
max_joins = 2

[allow]
train = ["b", "head"]
bases = ["base"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "client-000.toml"
    path.write_text(text)
    return path


def test_a_policy_is_read_whole(tmp_path: Path) -> None:
    assert read_limits(written(tmp_path, WHOLE)) == Limits(
        client="client-000",
        declared_size=8,
        unit="example",
        rows_per_user=5,
        delta=1e-3,
        epsilon_total=10.0,
        epsilon_per_run=8.0,
        epsilon_per_month=9.0,
        max_joins=2,
        train=frozenset({Role.B, Role.HEAD}),
        bases=frozenset({"base"}),
    )
    assert read_limits(written(tmp_path, "")) == Limits()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epsilon = 3", ["there is no epsilon; known are client"]),
        ("[budget]\nepsilon_totl = 3", ["there is no budget.epsilon_totl"]),
        ("[allow]\nmethods = ['fedsvd']", ["there is no allow.methods"]),
        ("budget = 3", ["budget = 3 must be a section"]),
        ("[budget]\nepsilon_total = 0", ["epsilon_total = 0.0 must be > 0"]),
        ("[budget]\nepsilon_total = true", ["epsilon_total = True must be a number"]),
        ("[budget]\nepsilon_per_run = 'x'", ["epsilon_per_run = 'x' must be a number"]),
        ("[budget]\nmax_joins = 1.5", ["max_joins = 1.5 must be an integer"]),
        ("[budget]\ndelta = 0.7", ["delta = 0.7 must be"]),
        ("unit = 'row'\ndeclared_size = 0", ["declared_size = 0 must be ≥ 1", "unit = 'row'"]),
        ("[allow]\ntrain = ['c']", ["train = 'c' must be one of"]),
        ("[allow]\nbases = []", ["bases = [] must be a list of texts"]),
        ("client = 3", ["client = 3 must be a text"]),
        ("[budget", ["is no TOML"]),
    ],
)
def test_everything_that_is_not_understood_is_refused(
    text: str, says: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_limits(written(tmp_path, text))
    assert len(caught.value.problems) == len(says)
    for problem, part in zip(caught.value.problems, says, strict=True):
        assert part in problem
        assert "client-000.toml" in problem


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read"):
        read_limits(tmp_path / "absent.toml")


@pytest.mark.parametrize("asked", [2.0, 20.0])
def test_the_smaller_bound_counts(asked: float) -> None:
    run = policy(epsilon=asked, max_joins=3)
    limits = Limits(epsilon_total=10.0, max_joins=4, epsilon_per_run=1.0, rows_per_user=5)
    expected = {"epsilon": min(asked, 10.0), "epsilon_per_run": 1.0, "rows_per_user": 5}
    assert tighten(run, limits) == replace(run, **expected)
    assert tighten(run, Limits()) == run


@pytest.mark.parametrize("mode", ["none", "dry"])
def test_a_site_with_a_policy_trains_privately_or_not_at_all(mode: str) -> None:
    with pytest.raises(ConfigError, match=f"privacy.mode = {mode}"):
        tighten(policy(mode=mode), Limits())


@pytest.mark.parametrize(
    "changes",
    [{"client": "another"}, {"declared_size": 9}, {"unit": "user"}, {"delta": 1e-4}],
    ids=str,
)
def test_a_declaration_that_does_not_fit_the_run_is_refused(changes: dict[str, Any]) -> None:
    run: SitePolicy = policy()
    with pytest.raises(ConfigError, match="policy of client-000"):
        tighten(run, Limits(**changes))
