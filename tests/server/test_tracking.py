"""A run tracked by the server: every completed round once, nothing that names a place."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from client.site import Site
from fedlr.cli.main import main
from fedlr.config import RunConfig, from_mapping, setting_names
from fedlr.errors import ConfigError
from fedlr.methods.method import ClientUpdate
from fedlr.report.facts import RunFacts
from fedlr.report.live import SilentProgress
from fedlr.report.places import FILES, NAMES, PLACES
from fedlr.report.records import RoundLog, RoundRecord, Summary, read_rounds, read_summary
from fedlr.report.tracking import build as building
from fedlr.report.tracking.build import Target
from fedlr.report.tracking.memory import TRACKING_FILE, Memory, remember
from fedlr.report.tracking.tensorboard import FOLDER
from fedlr.report.tracking.tracker import NoTracker, TrackedRun, Tracker, closing, series
from server import session, tracking
from server.hooks import Hooks
from server.tracking import TrackedProgress, public_settings
from tests.cli import small
from tests.report.samples import SUMMARY
from tests.server.toys import config, evaluate, grid_of, run, strategy, toy_sites


class Kept(NoTracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.runs: list[TrackedRun] = []
        self.rounds: list[RoundRecord] = []
        self.summaries: list[Summary] = []
        self.closed = 0

    def start(self, run: TrackedRun) -> None:
        self.runs.append(run)

    def round(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def finish(self, summary: Summary) -> None:
        self.summaries.append(summary)

    def close(self) -> None:
        self.closed += 1

    def beside(self, target: Target) -> Tracker:
        """A tracker that tells the real one what it keeps."""
        return Both(self, building.build(target))


@dataclass
class Both:
    first: Tracker
    second: Tracker

    def start(self, run: TrackedRun) -> None:
        self.first.start(run)
        self.second.start(run)

    def round(self, record: RoundRecord) -> None:
        self.first.round(record)
        self.second.round(record)

    def finish(self, summary: Summary) -> None:
        self.first.finish(summary)
        self.second.finish(summary)

    def close(self) -> None:
        self.first.close()
        self.second.close()


def test_every_completed_round_is_told() -> None:
    kept = Kept()
    hooks = Hooks(evaluate, progress=TrackedProgress(SilentProgress(), kept))
    outcome = run(toy_sites(epsilon=0.5), hooks=hooks)
    assert tuple(kept.rounds) == outcome.records
    assert len(kept.rounds) == 3


def test_an_abandoned_round_is_not_told() -> None:
    kept = Kept()
    hooks = Hooks(evaluate, progress=TrackedProgress(SilentProgress(), kept))
    sites = toy_sites()
    for site in sites:
        site.answer = refuse  # type: ignore[method-assign]
    outcome = strategy(config(), hooks=hooks).run(grid_of(sites))
    assert [record.accepted for record in outcome.records] == [0]
    assert kept.rounds == []


def test_a_resumed_run_tells_no_abandoned_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, facts = Kept(), cast("RunFacts", SimpleNamespace(run="run-1"))
    monkeypatch.setattr(tracking, "build", lambda target: kept)
    records = run(toy_sites()).records
    given = replace(records[-1], accepted=0)
    tracking.open_tracker(RunConfig(), tmp_path, facts, [*records[:-1], given])
    (told,) = kept.runs
    assert (told.run, told.earlier, told.rounds) == ("run-1", records[:-1], 8)


def test_the_end_that_a_tool_was_never_told_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, facts = Kept(), cast("RunFacts", SimpleNamespace(run="run-1"))
    monkeypatch.setattr(tracking, "build", lambda target: kept)
    config = from_mapping({"tracking": {"kind": "mlflow"}})
    records = run(toy_sites()).records
    log = RoundLog(tmp_path / "rounds.jsonl")
    for record in records:
        log.append(record)
    memories = (Memory(kind="wandb", id="a"), Memory(kind="mlflow", id="a", finished=True))
    tracking.tell_end(config, tmp_path, facts, SUMMARY)
    for memory in memories:
        remember(tmp_path, memory)
        tracking.tell_end(config, tmp_path, facts, SUMMARY)
    assert kept.runs == []
    remember(tmp_path, Memory(kind="mlflow", id="a"))
    tracking.tell_end(config, tmp_path, facts, SUMMARY)
    (told,) = kept.runs
    assert (told.earlier, kept.summaries, kept.closed) == (records, [SUMMARY], 1)


def refuse(job: Any) -> ClientUpdate:
    raise RuntimeError("no answer")


def test_the_display_is_told_what_it_always_was() -> None:
    class Display(SilentProgress):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def start(self, total_rounds: int, title: str) -> None:
            self.calls.append("start")

        def round_started(self, round: int, cohort: Sequence[str]) -> None:
            self.calls.append("round_started")

        def client_finished(self, client: str, steps: int) -> None:
            self.calls.append("client_finished")

        def round_finished(self, record: RoundRecord) -> None:
            self.calls.append("round_finished")

        def finish(self) -> None:
            self.calls.append("finish")

    plain, tracked = Display(), Display()
    run(toy_sites(), hooks=Hooks(evaluate, progress=plain))
    run(toy_sites(), hooks=Hooks(evaluate, progress=TrackedProgress(tracked, NoTracker())))
    assert tracked.calls == plain.calls
    assert len(plain.calls) == 2 + 3 * (1 + 3 + 1)


@dataclass(frozen=True)
class Story:
    """A run on TensorBoard: interrupted in its second round, refused once, then resumed."""

    outside: Path
    folder: Path
    kept: Kept
    at_interruption: tuple[int, int, int]
    refusal: str
    refused_changes: set[Path]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    pytest.importorskip("tensorboard", reason="TensorBoard is in the extra 'tensorboard'")
    outside, kept, real = tmp_path_factory.mktemp("ward-7"), Kept(), Site._complete

    def cut(site: Site, *given: Any) -> ClientUpdate:
        if next(outside.rglob("rounds.jsonl")).read_text().count("\n") == 1:
            raise KeyboardInterrupt
        return real(site, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "build", kept.beside)
        words = ("tracking=tensorboard", "kernels.fused_clients=1", "federation.rounds=2")
        with patch.context() as inner:
            inner.setattr(Site, "_complete", cut)
            folder = small.simulate(outside, *words, status=130)
        so_far = (len(kept.rounds), len(kept.summaries), kept.closed)
        before = {*folder.rglob("*")}
        with patch.context() as inner:
            inner.setattr(building, "_installed", lambda _: False)
            with pytest.raises(ConfigError) as refusal:
                session.resume(folder, lambda said: pytest.fail(f"work was begun: {said}"))
        changes = before ^ {*folder.rglob("*")}
        assert main(["simulate", f"resume={folder}"]) == 0
    return Story(outside, folder, kept, so_far, str(refusal.value), changes)


def test_an_interrupted_run_is_closed_and_its_rest_is_told_after_a_resume(story: Story) -> None:
    kept, folder = story.kept, story.folder
    assert story.at_interruption == (1, 0, 1)
    first, second = kept.runs
    assert (first.run, first.folder, first.rounds) == (second.run, folder, 2)
    assert (first.earlier, second.earlier) == ((), tuple(kept.rounds[:1]))
    assert kept.rounds == read_rounds(folder / "rounds.jsonl")
    assert kept.summaries == [read_summary(folder / "summary.json")]
    assert kept.closed == 2


def test_a_missing_package_ends_a_resume_before_anything_is_built(story: Story) -> None:
    assert "pip install 'fedlr[tensorboard]'" in story.refusal
    assert story.refused_changes == set()


def test_tensorboard_reads_back_what_the_folder_holds(story: Story) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(story.folder / FOLDER), size_guidance={"scalars": 0})
    found.Reload()
    records = read_rounds(story.folder / "rounds.jsonl")
    names = series(records[0]).keys()
    for name in names:
        expected = [(record.round, pytest.approx(series(record)[name])) for record in records]
        assert [(event.step, event.value) for event in found.Scalars(name)] == expected
    result = closing(read_summary(story.folder / "summary.json"))
    assert set(found.Tags()["scalars"]) == {*names, *result}


def test_a_resume_of_a_finished_run_tells_an_end_that_was_not_told(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    monkeypatch.setattr(tracking, "build", lambda target: kept)
    summary = read_summary(story.folder / "summary.json")
    assert session.finished(story.folder) == summary
    assert kept.summaries == []
    remember(story.folder, Memory(kind="tensorboard", id="x"))
    assert session.finished(story.folder) == summary
    (story.folder / TRACKING_FILE).unlink()
    assert (kept.summaries, kept.closed) == ([summary], 1)


def test_no_folder_is_told_to_the_tool(story: Story) -> None:
    """Model, data, output and policies are folders below this one."""
    files = [path.read_bytes() for path in (story.folder / FOLDER).iterdir()]
    assert len(files) == 2
    assert b"adapter.rank" in files[0]
    assert not [content for content in files if b"ward-7" in content]


TEXTS = {
    *("output", "name", "model.name", "model.revision", "model.sha256"),
    *("model.head.label_texts", "data.path", "data.name", "data.subset", "data.text_columns"),
    *("data.label_column", "data.user_column", "data.label_names", "data.train_split"),
    *("data.validation_split", "data.cache", "adapter.modules", "method.name"),
    *("privacy.policies", "federation.address", "tracking.uri", "tracking.project"),
    "subspace.public",
}
"""Settings that are free texts. A new one is added here once it is known what it can name: a
place, then also to `fedlr.report.places.PLACES`."""


def texts_of(kind: type[Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, hint in typing.get_type_hints(kind).items():
        if is_dataclass(hint):
            found |= texts_of(cast("type[Any]", hint), f"{prefix}{name}.")
        elif "str" in str(hint).replace("<class 'str'>", "str").split("Literal")[0]:
            found.add(f"{prefix}{name}")
    return found


def test_it_is_decided_of_every_text_whether_it_is_told() -> None:
    assert texts_of(RunConfig) == TEXTS
    assert {*PLACES, *FILES, *NAMES} <= {*setting_names()}


def test_no_place_is_told(tmp_path: Path) -> None:
    secret = str(tmp_path / "oncology")
    (tmp_path / "oncology").mkdir()
    values = {
        "output": secret,
        "model": {"name": secret},
        "data": {"kind": "file", "path": secret, "cache": secret, "train_split": "oncology"},
        "privacy": {"policies": secret},
        "tracking": {"kind": "mlflow", "uri": f"sqlite:///{secret}/x.db"},
    }
    told = public_settings(from_mapping(values))
    assert "oncology" not in repr(told)
    assert told["data.kind"] == "file"
    assert told["adapter.modules"] == "query,value,dense"
    assert not [value for value in told.values() if value is None]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        *(("embedded", True), ("bert-base-uncased", True), ("intfloat/e5-small", True)),
        *(("./model", False), ("/models/x", False), ("~/x", False), ("a/b/c", False)),
        *(("here", False), ("../x", False)),
    ],
)
def test_model_and_data_are_named_only_where_they_are_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    plain = RunConfig()
    data = replace(plain.data, kind="hub", name=name)
    found = public_settings(replace(plain, model=replace(plain.model, name=name), data=data))
    assert ("model.name" in found, "data.name" in found) == (told, told)
