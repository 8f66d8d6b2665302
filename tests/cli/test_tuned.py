"""Tuned sweeps: one value per combination, chosen once, by runs that nothing else counts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from fedlr.cli import launch
from fedlr.cli.composed import _compose, composed, read_spent
from fedlr.cli.main import main
from fedlr.cli.studies import read_studies
from fedlr.errors import ConfigError, RunError
from fedlr.methods.registry import METHODS
from fedlr.report.chosen import choices_of
from fedlr.report.page.sweep_cells import read_grid
from fedlr.report.page.sweep_summary import markdown
from fedlr.report.sweep import Cell, Sweep, read_sweep
from fedlr.report.tuning import tuning_of
from fedlr.report.units import privacy_loss
from tests.cli.small import small
from tests.cli.test_cells import STUDIES
from tests.cli.test_sweep import planned, result, sweep, times

KAIMING = "FFA-LoRA (Kaiming A)"
STUDY = ("sweep=methods", "variant=fedsvd,ffa-lora-kaiming-a", "federation.rounds=1")
_FEW = ("privacy.epsilon=8", "seed=0,1", "tune.values=0.5,0.1,8")
DRY = (*STUDY, "privacy=dry", "data.public=true", *_FEW)

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Data and a model; overrides without ``output`` and rounds."""
    words = small(tmp_path_factory.mktemp("place"))
    return [word for word in words if not word.startswith(("output=", "federation.rounds="))]


@pytest.fixture(scope="module")
def whole(place: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Sweep]:
    """A finished sweep of ten cells, six of them for tuning; without noise."""
    given = [*place, *DRY, f"output={tmp_path_factory.mktemp('whole')}"]
    return given, sweep(given)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Let the runs of the cells with these numbers fail."""
    numbers: set[int] = set()
    real = launch.run_cell

    def failing(config: Any, folder: Path, *rest: Any) -> Any:
        if int(folder.parent.name.partition("-")[0]) in numbers:
            raise RunError("the machine is on fire; put it out")
        return real(config, folder, *rest)

    monkeypatch.setattr(launch, "run_cell", failing)
    return numbers


def alone(words: list[str]) -> list[str]:
    """The sweep of the first variant."""
    return [word if word != STUDY[1] else "variant=fedsvd" for word in words]


def tuning(found: Sweep) -> list[Cell]:
    return [cell for cell in found.cells if cell.facts.tuning]


def runs(found: Sweep) -> list[Cell]:
    return [cell for cell in found.cells if not cell.facts.tuning]


def accuracy(cell: Cell) -> float:
    assert cell.summary is not None
    assert cell.summary.accuracy is not None
    return cell.summary.accuracy


def test_every_combination_runs_at_the_best_of_its_values(whole: tuple[list[str], Sweep]) -> None:
    _, found = whole
    assert {cell.facts.values["seed"] for cell in tuning(found)} == {"100"}
    assert {cell.facts.values["seed"] for cell in runs(found)} == {"0", "1"}
    for variant in ("FedSVD", KAIMING):
        tried = [cell for cell in tuning(found) if cell.facts.values["variant"] == variant]
        assert [cell.facts.tuned for cell in tried] == ["0.1", "0.5", "8"]
        best = max(map(accuracy, tried))
        smallest = next(cell.facts.tuned for cell in tried if accuracy(cell) == best)
        mine = [cell for cell in runs(found) if cell.facts.values["variant"] == variant]
        assert [cell.facts.values["seed"] for cell in mine] == ["0", "1"]
        assert {cell.facts.tuned for cell in mine} == {smallest}
        for cell in (*tried, *mine):
            assert cell.summary is not None
            assert cell.summary.method == ("fedsvd" if variant == "FedSVD" else "ffa_lora")
            assert f"optimizer.learning_rate={cell.facts.tuned}" in cell.facts.overrides
            assert ("subspace=kaiming" in cell.facts.overrides) is (variant == KAIMING)
            assert not any(word.startswith("variant=") for word in cell.facts.overrides)


def test_the_same_command_does_nothing_and_more_seeds_keep_the_choice(
    whole: tuple[list[str], Sweep], capfd: pytest.CaptureFixture[str]
) -> None:
    given, found = whole
    before = times(found.folder / "cells")
    assert main(["sweep", *given]) == 0
    printed = capfd.readouterr()
    assert times(found.folder / "cells") == before
    assert "finished, tuning" in printed.out
    assert "which is in no mean" in " ".join(printed.out.split())
    wider = sweep([word if word != "seed=0,1" else "seed=0,1,2" for word in given])
    after = times(found.folder / "cells")
    assert {path: after[path] for path in before} == before
    assert len(runs(wider)) == len(runs(found)) + 2
    assert len(tuning(wider)) == len(tuning(found))
    by_variant = {(cell.facts.values["variant"], cell.facts.tuned) for cell in runs(wider)}
    assert len(by_variant) == 2


@pytest.mark.parametrize("killed_at", [2, 4])
def test_stopped_in_either_stage_it_goes_on_and_chooses_the_same(
    whole: tuple[list[str], Sweep],
    place: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    given = alone([*place, *DRY, f"output={tmp_path}"])
    real, begun = launch.run_cell, itertools.count()

    def stopping(*words: Any) -> Any:
        if next(begun) == killed_at:
            raise KeyboardInterrupt
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run_cell", stopping)
        cut = sweep(given, status=130)
    assert len(cut.of("finished")) == killed_at
    assert bool(runs(cut)) is (killed_at > 3)
    before = {cell.facts.cell: times(cell.folder) for cell in cut.of("finished")}
    after = sweep(given)
    for name, was in before.items():
        assert times(after.folder / "cells" / name) == was
    expected = {cell.facts.config: cell for cell in whole[1].cells}
    assert len(after.cells) == 5
    for cell in after.cells:
        assert result(cell.run) == result(expected[cell.facts.config].run)
        assert cell.facts.tuned == expected[cell.facts.config].facts.tuned


def test_a_failed_value_loses_and_is_not_tried_again_once_another_is_chosen(
    place: list[str], tmp_path: Path, broken: set[int], capfd: pytest.CaptureFixture[str]
) -> None:
    given = alone([*place, *DRY, f"output={tmp_path}"])
    broken |= {0, 1}
    found = sweep(given)
    assert [cell.state for cell in tuning(found)] == ["failed", "failed", "finished"]
    assert {cell.facts.tuned for cell in runs(found)} == {"8"}
    assert "000-FedSVD-8-100-0.1: failed: the machine is on fire" in capfd.readouterr().err
    assert "partial report" not in (found.folder / "report.html").read_text(encoding="utf-8")
    broken.clear()
    before = times(found.folder / "cells")
    assert [cell.state for cell in tuning(sweep(given))] == ["failed", "failed", "finished"]
    assert times(found.folder / "cells") == before


def test_where_every_value_fails_the_others_go_on_and_it_is_told(
    place: list[str], tmp_path: Path, broken: set[int], capfd: pytest.CaptureFixture[str]
) -> None:
    given = [*place, *DRY, f"output={tmp_path}"]
    broken |= {0, 1, 2}  # all of FedSVD's
    found = sweep(given, status=7)
    assert {cell.facts.values["variant"] for cell in runs(found)} == {KAIMING}
    assert len(runs(found)) == 2
    assert [choice.failed for choice in choices_of(found)] == [True, False]
    printed = capfd.readouterr()
    assert "FedSVD, 8: every tuning run failed, so nothing is reported of it" in printed.err
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "FedSVD, ε 8: every tuning run failed" in page
    assert main(["report", str(found.folder), "--markdown"]) == 0
    assert "| FedSVD | none of 0.1, 0.5, 8: all failed |" in capfd.readouterr().out
    broken.clear()
    after = sweep(given)
    assert len(runs(after)) == 4
    assert all(choice.value is not None for choice in choices_of(after))


def test_a_choice_costs_what_tuning_spent_too(place: list[str], tmp_path: Path) -> None:
    slowly = ("tune.values=0.01,0.02", "variant=fedsvd", "privacy.epsilon=8", "seed=0,1")
    given = [*place, "sweep=methods", "federation.rounds=1", *slowly, f"output={tmp_path}"]
    found = sweep(given)
    assert [cell.facts.tuning for cell in found.cells] == [True, True, False, False]
    paid = composed(found)
    assert paid.runs == 4
    every, reported = (
        _compose([read_spent(cell) for cell in cells])[1] for cells in (found.cells, runs(found))
    )
    assert paid.epsilon_max == every > 1.1 * reported
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "2 runs were there to tune" in page
    told = f"ε of this choice is {privacy_loss(every)} at δ"
    assert told in page
    assert told in markdown(read_grid(found), paid)


def test_the_plan_shows_both_stages(
    whole: tuple[list[str], Sweep],
    place: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [*place, *DRY, f"output={tmp_path}"]
    plan = planned(given, capfd)
    assert (plan.cells, plan.tuning, plan.finished) == (10, 6, ())
    assert plan.time is not None
    shown = [run.overrides for run in plan.plan.runs]
    assert [words[0] == "tuning" for words in shown] == [True] * 6 + [False] * 4
    assert shown[0][-1] == "optimizer.learning_rate=0.1"
    assert {words[-1] for words in shown[6:]} == {"optimizer.learning_rate=<tuned>"}
    assert not list(tmp_path.iterdir())
    done = planned(whole[0], capfd)
    assert done.time is None
    chosen = {cell.facts.tuned for cell in runs(whole[1])}
    assert {run.overrides[-1].partition("=")[2] for run in done.plan.runs[6:]} == chosen


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("seed=0,100",), "tune.seed = 100 is among the seeds that are reported (0, 100)"),
        (("tune.seed=0",), "tune.seed = 0 is among the seeds"),
        (("seed=0,1_00",), "tune.seed = 100 is among the seeds that are reported (0, 100)"),
        (("seed=100",), "tune.seed = 100 is among the seeds that are reported (100)"),
        (("tune.seed=-3",), "must be a whole number ≥ 0"),
        (("tune.values=1",), "must be at least two different numbers"),
        (("tune.values=1,1.0",), "must be at least two different numbers"),
        (("tune.values=1,fast",), "'fast' must be a finite number"),
        (("tune.without_privacy=inf,1",), "'inf' must be a finite number"),
        (("optimizer.learning_rate=1",), "this study tunes optimizer.learning_rate"),
        (("optimizer.learning_rate=1,2",), "this study tunes optimizer.learning_rate"),
        (("variant=fedsdv",), "variant must be one of fedsvd, ffa-lora-orthonormal-a"),
        (("subspace=principal",), "the variant FFA-LoRA (Kaiming A) sets subspace"),
        (("method=fedsvd",), "method=fedsvd: the variant FedSVD and 1 more sets method"),
        (("tune.values=1,2", "tune.values=3,4"), "tune.values is chosen already"),
        (("tune.values=0,1",), "optimizer.learning_rate = 0.0 must be > 0"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    place: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    says: str,
) -> None:
    few = () if given[0].startswith("variant=") else STUDY[1:2]
    assert main(["sweep", "sweep=methods", *few, *place, *given, f"output={tmp_path}"]) == 2
    printed = capfd.readouterr().err
    assert says in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sweep", "seed=0,1", "tune.values=1,2"), "is for a study that tunes"),
        (("sweep", "seed=0,1", "variant=fedsvd"), "only a study has variants"),
        (("sweep", "sweep=ranks", "variant=fedsvd"), "only a study has variants"),
        (("simulate", "tune.values=1"), "is for `fedlr sweep`"),
        (("simulate", "variant=fedsvd"), "is for `fedlr sweep`"),
        (("report", "--markdown", "--output", "x", "y"), "leave --output away"),
    ],
)
def test_words_of_a_study_are_for_a_study(
    capfd: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert main(list(words)) == 2
    assert says in capfd.readouterr().err


def test_another_tuning_is_not_mixed_in(
    whole: tuple[list[str], Sweep], capfd: pytest.CaptureFixture[str]
) -> None:
    given, found = whole
    before = times(found.folder)
    assert main(["sweep", *[w.replace("0.5,0.1,8", "0.5,1") for w in given]]) == 2
    assert "what is tuned differs from what it was begun with" in capfd.readouterr().err
    assert times(found.folder) == before


def test_the_table_for_a_readme_is_printed_alone(
    whole: tuple[list[str], Sweep], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = whole[1].folder
    assert main(["report", str(folder), "--markdown"]) == 0
    printed = capfd.readouterr()
    found = read_sweep(folder)
    assert printed.out == markdown(read_grid(found), composed(found))
    assert printed.out.startswith("| variant | learning rate | accuracy (95 % interval) |")
    assert main(["report", str(whole[1].cells[0].run), "--markdown"]) == 7
    assert "is the table of a sweep" in capfd.readouterr().err


BASE = "about: Which?\nvariants: {A: method=fedsvd, B: method=ffa_lora}\n"
TUNE = "tune: {setting: optimizer.learning_rate, values: '1,2', seed: 9}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BASE.replace("method=ffa_lora", "ffa_lora"), "variants.B must be overrides"),
        (BASE.replace("B:", "a:"), "variants.A is named like another one"),
        (BASE + TUNE.replace("'1,2'", "1"), "tune.values = 1 must be at least two"),
        (BASE + TUNE.replace("9", "-1"), "must be a whole number ≥ 0"),
        (BASE + TUNE.replace("seed", "sead"), "tune has sead"),
        (BASE + TUNE.replace(", seed: 9", ""), "seed"),
        (BASE + TUNE.replace("optimizer.learning_rate", "method"), "has a value elsewhere"),
        (BASE + TUNE + "without_privacy: {optimizer.learning_rate: 1}", "has a value elsewhere"),
        (BASE + "hydra: {sweeper: {params: {method: 'a,b'}}}", "variants set method, which varies"),
        (BASE + "search: {trials: 1, parameters: {x: {low: 0, high: 1}}}", "search"),
        ("about: Which?\n" + TUNE, "it needs several values"),
        ("about: Which?\nvariants: [a]\n", "variants must be a section"),
    ],
)
def test_a_study_that_is_no_study_says_why(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_studies(tmp_path)
    (problem,) = caught.value.problems
    assert says in problem
    assert "is no study" in problem


def test_a_study_of_variants_and_a_tuning_is_read(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(BASE + TUNE, encoding="utf-8")
    study = read_studies(tmp_path)["mine"]
    assert study.variants == {"A": ("method=fedsvd",), "B": ("method=ffa_lora",)}
    assert study.tune == tuning_of("optimizer.learning_rate", "2,1", 9)


def test_the_table_of_methods_leaves_none_out() -> None:
    own = [
        dict(word.split("=") for word in words) for words in STUDIES["methods"].variants.values()
    ]
    assert {words["method"] for words in own} == set(METHODS)
