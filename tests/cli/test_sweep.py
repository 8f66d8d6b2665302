"""``fedlr sweep``: finished cells stay, interrupted ones go on, failed ones are retried."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlr.cli import launch
from fedlr.cli.budget import SweepPlan
from fedlr.cli.main import main
from fedlr.config import RunConfig
from fedlr.errors import DataError, RunError
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report import strict_json
from fedlr.report.facts import read_facts
from fedlr.report.records import read_summary
from fedlr.report.sweep import Cell, Sweep, hold, read_sweep
from fedlr.reuse import Reuse
from server.session import _examine
from tests.cli.small import small

DRY = ("privacy=dry", "data.public=true", "federation.rounds=2")
SLOWLY = "optimizer.learning_rate=0.01"
"""Under noise a larger step leaves, in few rounds, what a site accepts."""

GRID = ("method=fedsvd,ffa_lora", "seed=0,1")


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def result(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def sweep(words: list[str] | tuple[str, ...], status: int = 0) -> Sweep:
    """Call the verb, and read the sweep it made."""
    assert main(["sweep", *words]) == status
    output = next(word for word in words if word.startswith("output=")).removeprefix("output=")
    (folder,) = (Path(output) / "sweeps").iterdir()
    return read_sweep(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Data and a model; overrides without ``output``."""
    return [w for w in small(tmp_path_factory.mktemp("place")) if not w.startswith("output=")]


@pytest.fixture
def words(place: list[str], tmp_path: Path) -> list[str]:
    return [*place, f"output={tmp_path / 'runs'}"]


@pytest.fixture(scope="module")
def dry(place: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Sweep]:
    """A finished sweep of four cells, whose frozen layer is computed once."""
    output = tmp_path_factory.mktemp("dry")
    given = [*place, *DRY, *GRID, "adapter.layers=[-1]", f"output={output}", "name=mine"]
    return given, sweep(given)


def test_every_combination_is_a_run_of_its_own(
    dry: tuple[list[str], Sweep], capfd: pytest.CaptureFixture[str]
) -> None:
    given, found = dry
    assert found.folder.name == "mine"
    assert [cell.facts.cell for cell in found.cells] == [
        "000-fedsvd-0",
        "001-fedsvd-1",
        "002-ffa_lora-0",
        "003-ffa_lora-1",
    ]
    assert {cell.state for cell in found.cells} == {"finished"}
    for cell in found.cells:
        assert cell.summary is not None
        assert cell.summary.method == cell.facts.values["method"]
        assert cell.facts.rounds == len(cell.rounds) == 2
        assert result(cell.run)
    before = times(found.folder / "cells")
    capfd.readouterr()
    assert main(["sweep", *given]) == 0
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1] == str(found.folder)
    assert printed.out.count("finished") == 4
    assert "4 of 4 cells are finished" in printed.err
    assert times(found.folder / "cells") == before


def test_sharing_changes_no_bit(dry: tuple[list[str], Sweep], tmp_path: Path) -> None:
    _, found = dry
    for cell in found.cells[1:3]:  # both methods, both seeds; each after another one
        output = tmp_path / cell.facts.cell
        assert main(["simulate", *cell.facts.overrides, f"output={output}"]) == 0
        (alone,) = output.rglob("run.json")
        assert result(cell.run) == result(alone.parent)
        assert cell.summary is not None
        assert cell.summary.accuracy == read_summary(alone.parent / "summary.json").accuracy


def test_more_values_add_cells_and_leave_the_others(
    dry: tuple[list[str], Sweep], words: list[str]
) -> None:
    given, found = dry
    before = times(found.folder / "cells")
    wider = [word if word != "seed=0,1" else "seed=2,1" for word in given]
    after = sweep(wider)
    assert {
        path: when for path, when in times(found.folder / "cells").items() if path in before
    } == before
    assert after.facts.axes == {"method": ("fedsvd", "ffa_lora"), "seed": ("0", "1", "2")}
    assert [cell.facts.cell for cell in after.cells[4:]] == ["004-fedsvd-2", "005-ffa_lora-2"]
    assert {cell.state for cell in after.cells} == {"finished"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("federation.rounds=2", "federation.rounds=3"), "federation.rounds=3 is given"),
        (("seed=0,1", "seed=0,1 privacy.clip_norm=1,2"), "begun with method, seed"),
        (("seed=0,1", "sweep=ranks"), "sweep=ranks, and it was begun with none"),
    ],
)
def test_another_sweep_is_not_mixed_in(
    dry: tuple[list[str], Sweep],
    capfd: pytest.CaptureFixture[str],
    change: tuple[str, str],
    says: str,
) -> None:
    given, found = dry
    before = times(found.folder)
    other = [
        part for word in given for part in (change[1].split() if word == change[0] else [word])
    ]
    assert main(["sweep", *other]) == 2
    printed = capfd.readouterr().err
    assert says in printed
    assert "another name=<name>" in printed
    assert times(found.folder) == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("method=fedsvd",), "nothing varies: choose sweep=<study>"),
        (("sweep=metods",), "sweep must be one of heterogeneity"),
        (("sweep=methods", "sweep=ranks"), "sweep is chosen already"),
        (("seed=0,1", "launcher=slurm"), "launcher = 'slurm' must be one of basic"),
        (("seed=0,1", "name=a,b"), "name = 'a,b' must be letters"),
        (("seed=0,1", "name=.."), "name = '..' is a folder"),
        (("seed=0,1", "name=.", "--plan"), "name = '.' is a folder"),
        (("seed=0,1", "output=a,b"), "output takes one value"),
        (("seed=0,1", "search.trials=3"), "is for a study that searches"),
        (("seed=0,1", "--json"), "--json is for --plan"),
        (("seed=0,1", "--fast"), "--fast is not an option"),
        (("sweep=learning_rate", "seed=0,1"), "a search takes one value"),
        (("sweep=learning_rate", "launcher=joblib"), "leave the launcher away"),
        (("sweep=learning_rate", "search.trials=none"), "must be a whole number"),
        (("seed=0,1", "method=none"), "method must be one of"),
        (("seed=0,1", "method=none,fedsvd"), "in 2 of 4 cells, first method=none seed=0"),
        (("seed=0,1", "hydra.launcher.n_jobs=2"), "launcher = basic hydra.launcher.n_jobs=2: "),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *given]) in (2, 7)
    printed = capfd.readouterr().err
    assert says in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.rglob("run"))


def test_a_missing_plugin_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_is_installed", lambda _: False)
    for name, extra in (("joblib", "joblib"), ("ray", "ray-launcher"), ("submitit", "submitit")):
        assert main(["sweep", "seed=0,1", f"launcher={name}"]) == 2
        assert f"pip install 'fedlr[{extra}]'" in capfd.readouterr().err


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the runs of the named cells fail."""
    names: list[str] = []
    real = launch.run_cell

    def failing(config: Any, folder: Path, *rest: Any) -> Any:
        if folder.parent.name in names:
            raise RunError("the machine is on fire; put it out")
        return real(config, folder, *rest)

    monkeypatch.setattr(launch, "run_cell", failing)
    return names


def test_a_failed_cell_is_told_and_retried(
    words: list[str], broken: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    broken.append("001-1")
    given = [*words, *DRY, "seed=0,1,2", "federation.rounds=1"]
    given.remove("federation.rounds=2")
    found = sweep(given, status=7)
    assert [cell.state for cell in found.cells] == ["finished", "failed", "finished"]
    assert found.cells[1].problem == "the machine is on fire; put it out"
    printed = capfd.readouterr()
    assert "001-1: failed: the machine is on fire" in printed.err
    assert "2 of 3 cells are finished" in printed.err
    assert printed.out.splitlines()[-1] == str(found.folder)
    before = times(found.cells[0].folder)
    broken.clear()
    after = sweep(given)
    assert {cell.state for cell in after.cells} == {"finished"}
    assert times(found.cells[0].folder) == before


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("error", [DataError, ValueError])
def test_a_private_row_is_told_on_the_console_alone(
    words: list[str],
    public: bool,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: Any) -> None:
        raise error("row 6: label 'HIV positive' is not in the label list")

    monkeypatch.setattr(launch, "run_cell", failing)
    found = sweep([*words, "seed=0,1", f"data.public={public}".lower()], status=7)
    printed = capfd.readouterr()
    assert "HIV positive" in printed.err
    files = [path for path in found.folder.rglob("*") if path.is_file()]
    assert {"failure.json", "report.html"} <= {path.name for path in files}
    telling = [path.name for path in files if b"HIV positive" in path.read_bytes()]
    assert bool(telling) is public
    assert ("HIV positive" in str(found.cells[0].problem)) is public
    assert error.__name__ in str(found.cells[0].problem) or public


def test_a_mistake_in_the_page_hides_no_result(
    words: list[str],
    broken: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    broken.extend(["000-0", "001-1"])

    def failing(*_: Any) -> None:
        raise KeyError("seed")

    monkeypatch.setattr("fedlr.cli.report.report", failing)
    found = sweep([*words, *DRY, "seed=0,1"], status=7)
    printed = capfd.readouterr()
    assert "no page of the sweep (KeyError" in printed.err
    assert "Traceback" in printed.err
    assert "0 of 2 cells are finished" in printed.err
    assert printed.out.splitlines()[-1] == str(found.folder)


def test_what_is_wrong_with_one_cell_does_not_stop_the_others(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(config: Any, folder: Path, *_: Any) -> None:
        raise RunError(f"{folder.parent.name} failed")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(launch, "run_cell", failing)
    folder = sweep([*words, *DRY, "seed=0,1,2"], status=7).folder
    monkeypatch.setattr(launch, "write_failure", full)
    (folder / "cells" / "000-0" / "cell.json").write_text("{")
    run = folder / "cells" / "001-1" / "run"
    run.mkdir()
    (run / "summary.json").write_text("{")
    names = ["000-0", "001-1", "002-2"]
    capfd.readouterr()
    for position in range(3):
        task = {"folder": str(folder), "order": names, "position": position, "quiet": False}
        launch.run_task(SimpleNamespace(**task))
    printed = capfd.readouterr().err
    assert "000-0 cannot be run" in printed
    assert "002-2 failed: 002-2 failed" in printed
    assert "002-2: why it failed could not be written: no space" in printed


def test_ctrl_c_says_how_to_go_on(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run_cell", stop)
        found = sweep([*words, *DRY, "seed=0,1", "name=cut"], status=130)
    assert [cell.state for cell in found.cells] == ["waiting", "waiting"]
    said = capfd.readouterr().err
    assert f"stopped; `fedlr sweep {words[0]}" in said
    assert "goes on with what is missing" in said
    (found.folder / "cells" / "001-1" / "cell.json").unlink()  # killed while it was made
    assert {c.state for c in sweep([*words, *DRY, "seed=0,1", "name=cut"]).cells} == {"finished"}


def test_what_a_user_cannot_have_meant_fails_its_cell_alone(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    # Only the data tell that a δ is too large.
    found = sweep([*words, "privacy.delta=0.01,0.4", "federation.rounds=1"], status=7)
    assert [cell.state for cell in found.cells] == ["finished", "failed"]
    assert "must be < 1/N" in str(found.cells[1].problem)
    assert "Traceback" not in capfd.readouterr().err
    assert not found.cells[1].run.exists()


def test_what_privacy_rests_on_is_examined_once_for_what_it_depends_on(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips: list[float] = []

    def examine(workbench: Any) -> None:
        clips.append(workbench.config.privacy.clip_norm)

    monkeypatch.setattr("server.session.quick", examine)
    axes = ("privacy.epsilon=3,8", "privacy.clip_norm=1,2")
    found = sweep([*(w for w in words if "rounds=" not in w), "federation.rounds=1", SLOWLY, *axes])
    assert len(found.of("finished")) == 4
    assert clips == [1.0, 2.0]


def test_what_privacy_rests_on_is_examined_again_for_other_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []

    def examine(bench: Any) -> None:
        seen.append((bench.trainer.settings.physical_batch, torch.get_num_threads()))

    monkeypatch.setattr("server.session.quick", examine)
    reuse, threads = Reuse(), torch.get_num_threads()
    # A measured number of rows is not in the configuration.
    for rows, count in ((8, threads), (8, threads), (4, threads), (4, threads + 1)):
        trainer = SimpleNamespace(settings=SimpleNamespace(physical_batch=rows), device="cpu")
        data, base = SimpleNamespace(label_names=("a", "b")), SimpleNamespace(base="0")
        bench: Any = SimpleNamespace(
            config=RunConfig(), trainer=trainer, data=data, provenance=base
        )
        try:
            torch.set_num_threads(count)
            _examine(bench, reuse)
        finally:
            torch.set_num_threads(threads)
    assert seen == [(8, threads), (4, threads), (4, threads + 1)]


def test_one_process_at_a_time(
    dry: tuple[list[str], Sweep], capfd: pytest.CaptureFixture[str]
) -> None:
    given, found = dry
    with hold(found.folder):
        assert main(["sweep", *given]) == 7
    assert "another `fedlr sweep` works at" in capfd.readouterr().err


def spent(cell: Cell) -> list[int]:
    """Releases in the ledger of each client."""
    found = []
    for path in sorted((cell.run / "ledgers").glob("*.sqlite")):
        ledger = SqliteLedger(path)
        found.append(sum(event.steps for event in ledger.spent()))
        ledger.close()
    return found


@pytest.mark.slow
def test_killed_in_the_middle_only_what_is_missing_is_done(
    words: list[str], tmp_path: Path
) -> None:
    given = [
        *(w for w in words if "rounds=" not in w),
        "federation.rounds=20",
        "seed=0,1,2",
        SLOWLY,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlr.cli.main", "sweep", *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if "cell 2 of 3" in "".join(said) and line.startswith("round 3/20"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    found = read_sweep(folder)
    assert [cell.state for cell in found.cells] == ["finished", "interrupted", "waiting"], said
    before, run = times(found.cells[0].folder), read_facts(found.cells[1].run).run
    paid = spent(found.cells[1])
    assert all(2 <= steps < 20 for steps in paid)
    after = sweep(given)
    assert {cell.state for cell in after.cells} == {"finished"}
    assert times(found.cells[0].folder) == before
    assert read_facts(after.cells[1].run).run == run
    # A round that was cut short is paid for; none is paid for twice.
    assert spent(after.cells[1]) == [20, 20]
    assert all(client.joins in (19, 20) for client in after.cells[1].summary.clients)  # type: ignore[union-attr]


def test_a_folder_without_a_run_starts_anew(words: list[str]) -> None:
    given = [*words, *DRY, "seed=0,1"]
    found = sweep(given)
    run = found.cells[0].run
    shutil.rmtree(run)
    run.mkdir()
    (run / "left.txt").write_text("by a process that was killed before the run began")
    assert read_sweep(found.folder).cells[0].state == "interrupted"
    after = sweep(given)
    assert after.cells[0].state == "finished"
    assert not (run / "left.txt").exists()
    # The way out that is told for a damaged summary: the run's journal has all of it.
    summary = after.cells[1].run / "summary.json"
    accuracy = read_summary(summary).accuracy
    summary.write_text("{")
    assert sweep(given, status=7).cells[1].state == "damaged"
    summary.unlink()
    assert sweep(given).cells[1].state == "finished"
    assert read_summary(summary).accuracy == accuracy


@pytest.mark.slow
def test_cells_in_other_processes(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    given = [*words, *DRY, "method=fedsvd,ffa_lora", "launcher=joblib", "hydra.launcher.n_jobs=2"]
    found = sweep(given)
    assert {cell.state for cell in found.cells} == {"finished"}
    alone = simulated(found.cells[1], found.folder.parent.parent / "alone")
    assert result(found.cells[1].run) == result(alone)


def simulated(cell: Cell, output: Path) -> Path:
    assert main(["simulate", *cell.facts.overrides, f"output={output}"]) == 0
    (facts,) = output.rglob("run.json")
    return facts.parent


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ray", "submitit"])
def test_cells_on_a_cluster(words: list[str], launcher: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher", reason="the extra is missing")
    found = sweep([*words, *DRY, "method=fedsvd,ffa_lora", f"launcher={launcher}"])
    assert {cell.state for cell in found.cells} == {"finished"}


def test_the_plan_says_what_the_sweep_will_cost(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    given = [*words, "federation.rounds=1", "privacy.epsilon=3,inf"]
    given.remove("federation.rounds=3")
    plan = planned(given, capfd)
    assert (plan.cells, plan.finished) == (2, ())
    assert plan.time is not None
    assert plan.time.source.startswith("one measured client task")
    assert [run.privacy_mode for run in plan.plan.runs] == ["dp", "none"]
    assert plan.plan.composed is not None
    assert plan.plan.composed.epsilon_max == plan.plan.runs[0].epsilon_max <= 3
    assert any("1 run without noise is left out" in text for text in plan.plan.notices)
    assert not Path(plan.folder).exists()
    found = sweep([*given[:-1], "privacy.epsilon=3,8"])
    assert [cell.summary.epsilon_max for cell in found.cells if cell.summary] == [
        run.epsilon_max for run in planned([*given[:-1], "privacy.epsilon=3,8"], capfd).plan.runs
    ]
    later = planned([*given[:-1], "privacy.epsilon=3,8,10"], capfd)
    assert later.finished == ("000-3", "001-8")
    assert later.cells == 3
    assert later.time is not None
    assert later.time.source == "2 finished cells of this sweep"
    assert main(["sweep", *given[:-1], "privacy.epsilon=3,8,10", "--plan"]) == 0
    shown = capfd.readouterr().out
    assert "cells     3, of them finished 2" in shown
    assert "all 3 runs composed" in shown


def planned(given: list[str], capfd: pytest.CaptureFixture[str]) -> SweepPlan:
    capfd.readouterr()
    assert main(["sweep", *given, "--plan", "--json"]) == 0
    return strict_json.decode(SweepPlan, capfd.readouterr().out)


def test_help_lists_the_studies(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help"]) == 0
    shown = capfd.readouterr().out
    assert "privacy_budget   What does ε cost" in shown
    assert all(len(line) <= 100 for line in shown.splitlines())
