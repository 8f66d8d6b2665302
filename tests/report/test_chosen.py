"""What tuning chooses: the best accuracy, of equals the smaller value, and only whole runs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.report.chosen import Choice, Try, best, choices_of, is_complete, left
from fedlr.report.sweep import Cell, CellFacts, CellState, Sweep, SweepFacts
from fedlr.report.tuning import Tuning, slug, tuning_of
from tests.report.samples import RECORD, SUMMARY

TUNING = tuning_of("optimizer.learning_rate", "1,2,4", 100)
FACTS = SweepFacts(name="s", study=None, about="", fixed=(), axes={"method": ("a",)}, tuning=TUNING)


def cell(
    number: int, value: str, accuracy: float | None, state: CellState = "finished", seed: int = 100
) -> Cell:
    """A cell of one method: for tuning where its seed is the tuning's."""
    facts = CellFacts(
        cell=f"{number:03d}",
        number=number,
        values={"method": "a", "seed": str(seed)},
        overrides=(),
        rounds=2,
        config=str(number),
        tuned=value,
        tuning=seed == 100,
    )
    done = state == "finished"
    summary = replace(SUMMARY, rounds=2, accuracy=accuracy) if done else None
    return Cell(facts, Path(f"{number:03d}"), state, None, summary)


def choice(cells: Sequence[Cell]) -> Choice:
    (found,) = choices_of(Sweep(FACTS, Path("s"), tuple(cells)))
    return found


def test_the_choice_is_that_of_trying_all_in_every_order() -> None:
    draws = random.Random(0)
    for _ in range(300):
        values = draws.sample(["0.5", "1", "2", "10", "3e1"], draws.randint(2, 5))
        known = {value: draws.choice([None, 0.25, 0.5, 0.75]) for value in values}
        expected = None
        for value in sorted(values, key=float):
            accuracy = known[value]
            if accuracy is not None and (expected is None or accuracy > (known[expected] or 0)):
                expected = value
        tries = [Try(value, accuracy, True) for value, accuracy in known.items()]
        draws.shuffle(tries)
        assert best(tries) == expected


def test_what_failed_diverged_or_ended_early_loses() -> None:
    whole, early, diverged = cell(0, "1", 0.5), cell(1, "2", 0.9), cell(2, "4", 0.8)
    assert early.summary is not None
    early = replace(early, summary=replace(early.summary, rounds=1))
    diverged = replace(diverged, rounds=(replace(RECORD, accuracy=0.8, loss=math.inf),))
    assert choice([whole, early, diverged]).value == "1"
    assert choice([whole, cell(1, "2", 0.9), diverged]).value == "2"
    assert choice([whole, cell(1, "2", None, "failed"), cell(2, "4", None)]).value == "1"
    assert choice([early, diverged, cell(0, "1", None, "failed")]).failed


@pytest.mark.parametrize("state", ["waiting", "running", "interrupted", "damaged"])
def test_nothing_is_chosen_before_all_have_ended(state: CellState) -> None:
    cells = [cell(0, "1", 0.5), cell(1, "2", None, state)]
    found = choice(cells)
    assert (found.value, found.failed) == (None, False)
    sweep = Sweep(FACTS, Path("s"), tuple(cells))
    assert [one.facts.number for one in left(sweep)] == [1]
    assert not is_complete(sweep)


def test_a_choice_that_runs_rest_on_stays() -> None:
    tried = [cell(0, "1", 0.5), cell(1, "2", 0.9)]
    reported = cell(2, "1", 0.4, seed=0)  # chosen while the other value had failed
    assert choice(tried).value == "2"
    assert choice([*tried, reported]).value == "1"
    broken = [tried[0], cell(1, "2", None, "failed"), reported]
    sweep = Sweep(FACTS, Path("s"), tuple(broken))
    assert left(sweep) == ()
    assert is_complete(sweep)
    assert not is_complete(Sweep(FACTS, Path("s"), (*tried, replace(reported, state="failed"))))


@pytest.mark.parametrize(
    ("accuracies", "edge"),
    [((0.9, 0.5, 0.5), "smallest"), ((0.5, 0.9, 0.5), None), ((0.5, 0.6, 0.7), "largest")],
)
def test_a_best_value_at_the_edge_is_told(accuracies: tuple[float, ...], edge: str | None) -> None:
    values = zip(("1", "2", "4"), accuracies, strict=True)
    found = choice([cell(n, value, one) for n, (value, one) in enumerate(values)])
    assert found.edge == edge


def test_values_without_privacy_are_their_own_or_the_same() -> None:
    assert TUNING.offered(True) == TUNING.offered(False) == ("1", "2", "4")
    own = tuning_of("x", "1,2", 0, "0.3,0.1")
    assert (own.offered(True), own.offered(False)) == (("0.1", "0.3"), ("1", "2"))
    with pytest.raises(ValueError, match="at least two different numbers"):
        Tuning(setting="x", values=("2", "1"), seed=0)
    with pytest.raises(ValueError, match=r"tune.setting is empty"):
        tuning_of("", "1,2", 0)


def test_names_of_variants_are_words() -> None:
    assert slug("  FedSVD, head trained ½ ") == "fedsvd-head-trained"
