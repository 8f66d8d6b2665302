"""What a run remembers on the disk, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fedlr.errors import RunError
from fedlr.methods.method import ClientUpdate, PartKey, Role
from fedlr.report.records import ROUNDS_FILE, RoundLog, RoundRecord, read_rounds
from fedlr.training.jobs import Abstention, Job
from server.hooks import Hooks
from server.journal import FileJournal, read_checkpoint, read_head, write_head
from server.outcome import Checkpoint, Outcome
from server.strategy import FederatedStrategy
from tests.server.toys import (
    LAYOUT,
    PROVENANCE,
    ToySite,
    Wrapped,
    assert_same_parts,
    config,
    evaluate,
    first_state,
    grid_of,
    method,
    strategy,
    toy_sites,
)


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Fuse:
    """Ends the process at the n-th moment; counts the moments where n is −1."""

    left: int = -1
    moments: int = 0

    def tick(self) -> None:
        self.moments += 1
        if self.left == 0:
            raise Killed
        self.left -= 1


class FusedSite(ToySite):
    fuse: Fuse

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        self.fuse.tick()
        return super().answer(job)


class FusedJournal(FileJournal):
    def __init__(self, folder: Path, fuse: Fuse) -> None:
        super().__init__(folder)
        self.fuse = fuse

    def sending(self, round: int, phase: int, nonces: Mapping[str, str]) -> Mapping[str, str]:
        self.fuse.tick()
        found = super().sending(round, phase, nonces)
        self.fuse.tick()
        return found

    def finished(self, checkpoint: Checkpoint) -> None:
        self.fuse.tick()
        super().finished(checkpoint)
        self.fuse.tick()


class FusedLog(RoundLog):
    def __init__(self, path: Path, fuse: Fuse) -> None:
        super().__init__(path)
        self.fuse = fuse

    def append(self, record: RoundRecord) -> None:
        self.fuse.tick()
        super().append(record)
        self.fuse.tick()


def go_on(folder: Path, name: str, fuse: Fuse, **changes: object) -> Outcome:
    """Run what is left of the run in `folder`, in what would be a new process."""
    journal = FusedJournal(folder, fuse)
    try:
        start = journal.checkpoint(LAYOUT) or Checkpoint(first_state(name))
        sites = toy_sites(epsilon=0.5)
        fused: list[Any] = [FusedSite(**vars(site)) for site in sites]
        for site in fused:
            site.fuse = fuse
            site.joins = start.joins.get(site.client, 0)
        hooks = Hooks(evaluate, FusedLog(folder / ROUNDS_FILE, fuse), journal=journal)
        averaged = ("fedsvd", "folding", "flora")
        settings = config(average_rounds=2 if name in averaged else 1, **changes)
        return FederatedStrategy(settings, method(name), start, PROVENANCE, hooks).run(
            grid_of(fused)
        )
    finally:
        journal.close()


def without_times(outcome: Outcome, name: str = "") -> list[RoundRecord]:
    """What is the same in a run that was stopped: new sites are sent the basis once more."""
    found = [replace(record, wall_s=0.0, server_s=0.0) for record in outcome.records]
    if name == "fedsvd_rotation":
        return [replace(record, bytes_down=0) for record in found]
    return found


KEPT = {
    "fedsvd": "the last states",
    "two_phase": "a state inside a round",
    "folding": "a residual whose rank grows, in states of different rank",
    "fedsvd_rotation": "memory, and who holds the basis",
    "lowering": "ranks of clients",
}
"""Methods by what a resume needs of their states that others do not."""


@pytest.mark.parametrize("name", KEPT)
def test_a_run_that_is_stopped_at_any_moment_goes_on_as_if_it_were_not(
    name: str, tmp_path: Path
) -> None:
    whole_folder = tmp_path / "whole"
    whole_folder.mkdir()
    count = Fuse()
    whole = go_on(whole_folder, name, count)
    assert count.moments > 20
    for moment in range(count.moments):
        folder = tmp_path / str(moment)
        folder.mkdir()
        with pytest.raises(Killed):
            go_on(folder, name, Fuse(moment))
        resumed = go_on(folder, name, Fuse())
        assert_same_parts(resumed.parts, whole.parts)
        assert list(resumed.parts) == list(whole.parts)
        assert without_times(resumed, name) == without_times(whole, name)
        assert resumed.state.ranks == whole.state.ranks
        assert (resumed.joins, resumed.epsilon) == (whole.joins, whole.epsilon)
        assert tuple(read_rounds(folder / ROUNDS_FILE)) == resumed.records


def test_a_run_that_is_stopped_while_it_sends_the_basis_again_goes_on_too(tmp_path: Path) -> None:
    name, begun, whole_folder = "fedsvd_rotation", tmp_path / "begun", tmp_path / "whole"
    begun.mkdir()
    go_on(begun, name, Fuse(), rounds=1, clients_per_round=4)
    # The sites are new ones: all lack what the server believes they hold, and are asked twice.
    shutil.copytree(begun, whole_folder)
    count = Fuse()
    whole = go_on(whole_folder, name, count, rounds=2, clients_per_round=4)
    answers, writes = 2 * 4, 6
    assert count.moments == answers + writes
    for moment in range(count.moments):
        folder = Path(shutil.copytree(begun, tmp_path / str(moment)))
        with pytest.raises(Killed):
            go_on(folder, name, Fuse(moment), rounds=2, clients_per_round=4)
        resumed = go_on(folder, name, Fuse(), rounds=2, clients_per_round=4)
        assert_same_parts(resumed.parts, whole.parts)
        assert resumed.epsilon == whole.epsilon
        assert [record.accepted for record in resumed.records] == [4, 4]
        # Nothing is written between the two exchanges: the nonces are those of the first.
        for kept in (folder, whole_folder):
            sent = json.loads((kept / "journal" / "sending.json").read_text())
            assert set(sent["phases"]) == {"0"}


def test_a_finished_run_goes_on_to_nothing(tmp_path: Path) -> None:
    whole = go_on(tmp_path, "fedsvd", Fuse())
    again = Fuse()
    outcome = go_on(tmp_path, "fedsvd", again)
    assert again.moments == 0
    assert_same_parts(outcome.parts, whole.parts)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    go_on(tmp_path, "fedsvd", Fuse())
    written = read_checkpoint(tmp_path, LAYOUT)
    assert written is not None
    shared = torch.arange(6.0).reshape(2, 3)
    keys = [PartKey("z", Role.B), PartKey("a", Role.A), PartKey("m", Role.HEAD)]
    odd = replace(
        written.state,
        parts={keys[0]: shared.T, keys[1]: shared, keys[2]: torch.tensor(float("inf"))},
        memory={
            keys[1]: torch.zeros(0, 4, dtype=torch.float64),
            PartKey("residual", Role.SEED): torch.tensor([2**63 - 1]),
        },
        ranks={"client-00": 2, "client-01": 1},
    )
    checkpoint = replace(
        written,
        state=odd,
        recent=(written.recent[0], odd),
        epsilon={"c": float("inf")},
        holders={"client-00": "ab" * 32, "client-01": ""},
    )
    journal = FileJournal(tmp_path)
    journal.finished(checkpoint)
    found = journal.checkpoint(LAYOUT)
    journal.close()
    assert found is not None
    assert list(found.state.parts) == keys
    for kind in ("parts", "memory"):
        ours, theirs = getattr(found.state, kind), getattr(odd, kind)
        assert_same_parts(ours, theirs)
        assert [v.dtype for v in ours.values()] == [v.dtype for v in theirs.values()]
    assert (found.state.ranks, found.holders) == (odd.ranks, checkpoint.holders)
    assert_same_parts(found.recent[0].parts, written.recent[0].parts)
    assert found.recent[0].ranks == {}
    assert len(found.recent) == 2
    assert (found.epsilon, found.joins, found.records) == (
        checkpoint.epsilon,
        checkpoint.joins,
        checkpoint.records,
    )


def test_a_phase_is_asked_again_under_its_nonces_until_the_round_is_closed(tmp_path: Path) -> None:
    first = FileJournal(tmp_path)
    assert first.sending(0, 0, {"a": "1", "b": "2"}) == {"a": "1", "b": "2"}
    assert first.sending(0, 1, {"a": "3"}) == {"a": "3"}
    first.close()
    second = FileJournal(tmp_path)
    assert second.sending(0, 0, {"b": "4", "c": "5"}) == {"b": "2", "c": "5"}
    assert second.sending(0, 1, {"a": "6"}) == {"a": "3"}
    assert second.asked(0) == {"a", "b", "c"}
    assert second.asked(1) == set()
    second.abandoned(["b"])
    assert second.sending(0, 0, {"a": "7", "b": "9"}) == {"a": "1", "b": "9"}
    assert second.sending(1, 0, {"a": "8"}) == {"a": "8"}
    second.close()


def test_who_refused_in_a_later_phase_keeps_the_nonce_of_the_one_it_paid_for(
    tmp_path: Path,
) -> None:
    journal = FileJournal(tmp_path)
    journal.sending(0, 0, {"a": "1", "b": "2"})
    journal.sending(0, 1, {"a": "3"})
    journal.abandoned(["a", "b"])
    assert journal.sending(0, 0, {"a": "4", "b": "5"}) == {"a": "1", "b": "5"}
    assert journal.sending(0, 1, {"a": "6"}) == {"a": "6"}
    journal.close()


@pytest.mark.parametrize(
    ("code", "anew"),
    [("forfeited", True), ("policy", True), ("failed", False), ("ledger", False)],
)
def test_a_round_that_was_given_up_is_asked_anew_where_nothing_was_paid_unheard(
    tmp_path: Path, code: str, anew: bool
) -> None:
    """Who failed may have paid: the same nonce brings the update, or `forfeited`, for nothing."""
    journal = FileJournal(tmp_path)
    lazy = Wrapped(toy_sites(1)[0], lambda update, job: Abstention(update.client, code))
    hooks = Hooks(evaluate, RoundLog(tmp_path / ROUNDS_FILE), journal=journal)
    settings = config(clients=1, clients_per_round=1)
    start = Checkpoint(first_state())
    FederatedStrategy(settings, method(), start, PROVENANCE, hooks).run(grid_of([lazy]))
    journal.close()
    assert [record.accepted for record in read_rounds(tmp_path / ROUNDS_FILE)] == [0]
    asked = FileJournal(tmp_path).sending(0, 0, {"client-00": "new"})["client-00"]
    assert (asked == "new") is anew


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = FileJournal(tmp_path)
    with pytest.raises(RunError, match="another process"):
        FileJournal(tmp_path)
    first.close()
    FileJournal(tmp_path).close()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def foreign(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"fedlr.journal.3", b"fedlr.journal.9"))


LATER = {1: ("ranks", "holders", "unheard"), 2: ("unheard",)}
"""What each earlier schema had no word for."""


def as_written_before(path: Path, schema: int) -> None:
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["header"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {name: value for name, value in header.items() if name not in LATER[schema]}
    header["schema"] = f"fedlr.journal.{schema}"
    safetensors.torch.save_file(arrays, path, metadata={"header": json.dumps(header)})


@pytest.mark.parametrize("schema", LATER)
def test_a_checkpoint_of_an_earlier_schema_is_read(tmp_path: Path, schema: int) -> None:
    go_on(tmp_path, "fedsvd", Fuse())
    written = read_checkpoint(tmp_path, LAYOUT)
    as_written_before(tmp_path / "journal" / "checkpoint.safetensors", schema)
    found = read_checkpoint(tmp_path, LAYOUT)
    assert found is not None
    assert written is not None
    assert (found.state.ranks, found.holders) == ({}, {})
    # Nobody wrote who was not heard.
    assert found.unheard == set(written.epsilon) != set()
    assert_same_parts(found.state.parts, written.state.parts)
    assert (found.records, found.joins) == (written.records, written.joins)


def test_a_server_that_is_started_again_knows_who_holds_the_basis(tmp_path: Path) -> None:
    whole = strategy(config(clients_per_round=4, rounds=4), "fedsvd_rotation")
    expected = whole.run(grid_of(toy_sites()))
    sites = toy_sites()
    for rounds in (2, 4):
        journal = FileJournal(tmp_path)
        start = journal.checkpoint(LAYOUT) or Checkpoint(first_state("fedsvd_rotation"))
        hooks = Hooks(evaluate, RoundLog(tmp_path / ROUNDS_FILE), journal=journal)
        settings = config(clients_per_round=4, rounds=rounds)
        one = FederatedStrategy(settings, method("fedsvd_rotation"), start, PROVENANCE, hooks)
        outcome = one.run(grid_of(sites))
        journal.close()
    assert without_times(outcome) == without_times(expected)
    assert_same_parts(outcome.state.parts, expected.state.parts)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("journal/checkpoint.safetensors", cut, "damaged"),
        ("journal/checkpoint.safetensors", foreign, "fedlr.journal.9"),
        (ROUNDS_FILE, lambda path: path.write_bytes(b""), "tells of 0 rounds"),
        (ROUNDS_FILE, lambda path: path.unlink(), "tells of 0 rounds"),
        ("journal/checkpoint.safetensors", lambda path: path.unlink(), "is gone, though 3 rounds"),
    ],
)
def test_damage_is_named(
    name: str, damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    go_on(tmp_path, "fedsvd", Fuse())
    damage(tmp_path / name)
    with pytest.raises(RunError, match=says) as error:
        read_checkpoint(tmp_path, LAYOUT)
    assert Path(name).name in str(error.value)


def test_damaged_nonces_are_named(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    journal.sending(0, 0, {"a": "1"})
    journal.close()
    cut(tmp_path / "journal" / "sending.json")
    with pytest.raises(RunError, match=r"sending\.json is damaged"):
        FileJournal(tmp_path)


def test_the_head_is_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"head\.safetensors"):
        read_head(tmp_path)
    FileJournal(tmp_path).close()
    weight = torch.randn(3, 2)
    write_head(tmp_path, {"head.weight": weight, "head.twin": weight})
    assert all(torch.equal(value, weight) for value in read_head(tmp_path).values())
