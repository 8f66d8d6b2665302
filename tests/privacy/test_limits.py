"""What an operator allows: read strictly, and held against what a run declares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlr.errors import ConfigError
from fedlr.methods.method import Role
from fedlr.privacy.limits import Declared, Limits, read_limits

WHOLE = """
client = "client-000"
declared_size = 8
unit = "example"
rows_per_user = 5
labels = ["no", "yes"]
source_id = "ward-7"
ledger = "kept/ward-7.sqlite"

[budget]
delta = 1e-3
epsilon_total = 10
epsilon_per_run = 8.0
epsilon_per_month = 9.0
max_joins = 2

[allow]
methods = ["fedsvd"]
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
        labels=("no", "yes"),
        source_id="ward-7",
        ledger=tmp_path.resolve() / "kept" / "ward-7.sqlite",
        delta=1e-3,
        epsilon_total=10.0,
        epsilon_per_run=8.0,
        epsilon_per_month=9.0,
        max_joins=2,
        methods=frozenset({"fedsvd"}),
        train=frozenset({Role.B, Role.HEAD}),
        bases=frozenset({"base"}),
    )
    assert read_limits(written(tmp_path, "")) == Limits()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epsilon = 3", ["there is no epsilon; known are client"]),
        ("[budget]\nepsilon_totl = 3", ["there is no budget.epsilon_totl"]),
        ("[allow]\nlabels = ['a']", ["there is no allow.labels"]),
        ("[allow]\nmethods = 'fedsvd'", ["methods = 'fedsvd' must be a list of texts"]),
        (
            "ledger = 'a.sqlite'",
            ["needs source_id beside it", "needs budget.epsilon_total", "needs budget.delta"],
        ),
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


RUN = Declared("client-000", "dp", 8, "example", 1e-5, "fedsvd", ("no", "yes"))


def test_a_run_that_fits_has_no_conflict(tmp_path: Path) -> None:
    assert read_limits(written(tmp_path, WHOLE)).conflicts(RUN) == []
    assert Limits().conflicts(RUN) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"client": "another"}, "says client = 'client-000', the run 'another'"),
        ({"declared_size": 9}, "says declared_size = 8, the run 9"),
        ({"unit": "user"}, "says unit = 'example', the run 'user'"),
        ({"labels": ("yes", "no")}, "says labels = ['no', 'yes'], the run ['yes', 'no']"),
        ({"method": "ffa_lora"}, "allows the methods fedsvd, the run has ffa_lora"),
        ({"delta": 1e-2}, "allows δ ≤ 0.001, the run promises at 0.01"),
        ({"mode": "none"}, "the run has privacy.mode = none; set privacy=dp"),
        ({"mode": "dry"}, "the run has privacy.mode = dry; set privacy=dp"),
    ],
    ids=str,
)
def test_a_declaration_that_does_not_fit_the_policy_is_named(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (problem,) = read_limits(written(tmp_path, WHOLE)).conflicts(replace(RUN, **changes))
    assert says in problem


def test_a_method_that_gives_all_columns_to_every_client_needs_a_policy_that_allows_them() -> None:
    few, run = Limits(max_rank=2), replace(RUN, method="fed_sb", columns=8)
    (problem,) = few.conflicts(run)
    assert "client-000 allows max_rank = 2, but method fed_sb gives every client all 8" in problem
    assert "set adapter.rank=2" in problem
    for fits in (replace(run, columns=2), replace(run, columns=None)):
        assert few.conflicts(fits) == []
    assert Limits().conflicts(run) == []


def test_a_label_list_that_is_not_known_is_not_held_against_the_policy(tmp_path: Path) -> None:
    assert read_limits(written(tmp_path, WHOLE)).conflicts(replace(RUN, labels=None)) == []


def test_all_conflicts_are_told_at_once(tmp_path: Path) -> None:
    run = replace(RUN, declared_size=9, unit="user", method="flora")
    assert len(read_limits(written(tmp_path, WHOLE)).conflicts(run)) == 3
