"""``fedlr export``: a finished and an interrupted run as folders, and every refusal a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client.site import Site
from fedlr.cli.export import load_run
from fedlr.cli.main import main
from fedlr.methods.averaging import average
from fedlr.methods.method import PartKey, Role
from fedlr.report.records import read_summary
from tests.cli.small import simulate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run."""
    return simulate(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that Ctrl-C stopped in its third round, whose result is a mean of two states."""
    calls = iter(range(1000))
    complete = Site._complete

    def stopped(site: Site, *given: Any) -> Any:
        if next(calls) == 5:  # two clients a round
            raise KeyboardInterrupt
        return complete(site, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "_complete", stopped)
        yield simulate(tmp_path_factory.mktemp("part"), "federation.average_rounds=2", status=130)


def export(capfd: pytest.CaptureFixture[str], *words: str) -> Path:
    assert main(["export", *words]) == 0
    return Path(capfd.readouterr().out.splitlines()[-1])


def test_a_finished_run_is_exported_as_it_left_its_adapter(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = export(capfd, str(run), "--output", str(tmp_path / "out"))
    assert found == tmp_path / "out"
    names = {path.name for path in found.iterdir()}
    assert names == {path.name for path in (run / "adapter").iterdir()}
    for name in names:
        assert (found / name).read_bytes() == (run / "adapter" / name).read_bytes(), name


def test_merge_writes_a_whole_model_beside_the_adapter(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = export(capfd, str(run), "--merge")
    assert found == run / "merged"
    assert {"config.json", "model.safetensors", "tokenizer.json", "head.safetensors"} <= {
        path.name for path in found.iterdir()
    }
    base = load_file(
        Path(json.loads((run / "config.json").read_text())["config"]["model"]["name"])
        / "model.safetensors"
    )
    merged = load_file(found / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all(name.endswith(("query.weight", "value.weight")) for name in changed)


def test_an_interrupted_run_is_exported_from_its_journal(
    interrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not (interrupted / "summary.json").exists()
    found = export(capfd, str(interrupted))
    assert found == interrupted / "adapter"
    _, checkpoint = load_run(interrupted)
    assert checkpoint.state.round == 2
    parts = average(checkpoint.recent)
    saved = load_file(found / "adapter_model.safetensors")
    for site in checkpoint.state.layout.sites:
        b = saved[f"base_model.model.{site.name}.lora_B.weight"]
        assert torch.equal(b, parts[PartKey(site.name, Role.B)])
    card = (found / "README.md").read_text(encoding="utf-8")
    assert "2 of 3 rounds" in card
    assert "stopped after 2 of 3 rounds" in card
    spent = max(checkpoint.epsilon.values())
    assert 0 < spent < 8
    assert "≤ 0.00" not in card
    assert "not measured" in card  # the mean of two states was never evaluated


def test_the_card_tells_the_summary(run: Path) -> None:
    summary = read_summary(run / "summary.json")
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert summary.accuracy is not None
    assert f"{100 * summary.accuracy:.1f} %" in card
    assert "3 of 3 rounds" in card
    assert "`rdp`" in card


def test_nothing_is_written_over(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (run / "adapter" / "README.md").stat().st_mtime_ns
    assert main(["export", str(run)]) == 7
    said = capfd.readouterr().err
    assert "adapter' is there already" in said
    assert "--output" in said
    assert (run / "adapter" / "README.md").stat().st_mtime_ns == before


def test_a_mistake_meets_a_sentence(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    young = tmp_path / "young"
    shutil.copytree(run, young)
    (young / "journal" / "checkpoint.safetensors").unlink()
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "journal" / "head.safetensors").write_bytes(b"{}")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    facts = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**facts, "base": "0" * 64}))
    out = ["--output", str(tmp_path / "out")]
    for words, status, says in (
        ([], 2, "required: <run>"),
        ([str(run), "--marge"], 2, "--marge"),
        ([str(run), "again"], 2, "again"),
        ([str(tmp_path / "absent")], 7, "is no run folder"),
        ([str(tmp_path / "empty")], 7, "is no run folder"),
        ([str(run / "run.json")], 7, "is no run folder"),
        ([str(young), *out], 7, "has finished no round"),
        ([str(damaged), *out], 7, "head.safetensors is damaged"),
        ([str(moved), *out], 7, "another base than"),
        ([str(run), "--output", str(run / "run.json")], 7, "is there already"),
    ):
        assert main(["export", *words]) == status, words
        said = capfd.readouterr()
        assert says in said.err
        assert "Traceback" not in said.err
        assert said.out == ""
    assert not (tmp_path / "out").exists()
