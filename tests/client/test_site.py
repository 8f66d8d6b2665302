"""The trust boundary: what it refuses, what it books and when, and what leaves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from client.site import Site, SitePolicy
from fedlr.data.batching import UnitIndex
from fedlr.errors import LedgerError
from fedlr.methods.downlink import Compact
from fedlr.methods.method import ClientUpdate, PartKey, Parts, Role
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, MemoryLedger
from fedlr.training import jobs
from fedlr.training.downlink import shortened
from fedlr.training.jobs import Abstention, Job, Provenance, SiteStatus
from fedlr.training.local import LocalTask, LocalTrainer
from tests.models import LONGEST, MOVABLE, RANK, WIDTH, Tiny, rows, tiny, units_of

PROVENANCE = Provenance("base", "tokenizer", "labels")
DATA = rows([5, 3, LONGEST, 7, 2, 9, 4, 6, 3, 8])
UNITS = units_of([1, 2, 3, 1, 3])
BOTH = frozenset({Role.B, Role.HEAD})
SIGMA, STEPS, SECRET = 1.2, 2, "row 17 says: the patient is Ada"


def policy(**changes: Any) -> SitePolicy:
    values: dict[str, Any] = {
        "client": "client-000",
        "mode": "dp",
        "declared_size": 8,
        "expected_batch": 4,
        "clip_norm": 0.5,
        "head_share": None,
        "noise_multiplier": SIGMA,
        "delta": 1e-3,
        "epsilon": 1e6,
        "unit": "example",
        "max_joins": 3,
        "accountant": "rdp",
        "public_seed": 0,
    }
    if changes.get("mode", "dp") != "dp":
        values["noise_multiplier"] = 0.0
    return SitePolicy(**(values | changes))


@dataclass
class SpyLedger(MemoryLedger):
    """Notes what is called, in one list with the spying trainer."""

    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def reserve(
        self,
        key: JobKey,
        event: Release,
        max_joins: int | None = None,
        job: str = "",
        head: int | None = None,
    ) -> bool:
        self.calls.append("reserve")
        return super().reserve(key, event, max_joins, job, head)

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        self.calls.append("commit")
        super().commit(key, event, update)


@dataclass
class SpyTrainer:
    """A trainer that notes its calls and, if told to, raises after training."""

    real: LocalTrainer
    calls: list[str]
    error: BaseException | None = None
    tasks: list[LocalTask] = field(default_factory=list)

    @property
    def settings(self) -> Any:
        return self.real.settings

    def check(self, parts: Parts, train: frozenset[Role]) -> None:
        self.real.check(parts, train)

    def train(self, task: LocalTask, units: UnitIndex) -> dict[PartKey, Tensor]:
        self.calls.append("train")
        self.tasks.append(task)
        found = self.real.train(task, units)
        if self.error is not None:
            raise self.error
        return found


def job_for(parts: Parts, **changes: Any) -> Job:
    """The first phase of round 0, which trains B and head."""
    values: dict[str, Any] = {
        "run": "run",
        "round": 0,
        "phase": 0,
        "nonce": "nonce-0",
        "train": BOTH,
        "send": BOTH,
        "parts": parts,
        "provenance": PROVENANCE,
    }
    return Job(**(values | changes))


@dataclass
class Bench:
    """A site and everything it is made of."""

    site: Site
    model: Tiny
    ledger: SpyLedger
    trainer: SpyTrainer
    calls: list[str]

    def job(self, **changes: Any) -> Job:
        return job_for(**{"parts": self.parts, **changes})

    @property
    def parts(self) -> Parts:
        return dict(self.trainer.real._fresh)

    def ask(self, **changes: Any) -> ClientUpdate | Abstention:
        (outcome,) = self.site.train_many([self.job(**changes)])
        return outcome

    def says(self, code: str) -> Abstention:
        """The abstention with everything in the ledger as spent."""
        return Abstention("client-000", code, epsilon(self.ledger.spent(), 1e-3, "rdp") or None)

    def update(self, **changes: Any) -> ClientUpdate:
        outcome = self.ask(**changes)
        assert isinstance(outcome, ClientUpdate)
        return outcome


def bench(units: UnitIndex = UNITS, error: BaseException | None = None, **changes: Any) -> Bench:
    model = tiny()
    ledger = SpyLedger()
    trainer = SpyTrainer(model.trainer(DATA, steps=STEPS, learning_rate=0.1), ledger.calls, error)
    site = Site(policy(**changes), units, cast(LocalTrainer, trainer), ledger, PROVENANCE)
    return Bench(site, model, ledger, trainer, ledger.calls)


RELEASE = Release(SIGMA, 0.5, STEPS, "example")


def test_a_round_is_reserved_before_it_trains_and_committed_before_it_leaves() -> None:
    one = bench()
    update = one.update()
    assert one.calls == ["reserve", "train", "commit"]
    assert one.ledger.spent() == (RELEASE,)
    assert update.client == "client-000"
    assert update.steps == STEPS
    assert update.epsilon == epsilon([RELEASE], 1e-3, "rdp")
    assert {key.role for key in update.parts} == BOTH
    assert update.parts.keys() == {key for key in one.parts if key.role in BOTH}


def test_epsilon_is_that_of_everything_this_site_ever_released() -> None:
    one = bench()
    spent = [one.update(round=r, nonce=f"n{r}").epsilon for r in range(3)]
    wanted = [epsilon([replace(RELEASE, steps=STEPS * k)], 1e-3, "rdp") for k in (1, 2, 3)]
    assert spent == wanted
    assert wanted == sorted(set(wanted))


ERRORS: list[Exception] = [
    RuntimeError(SECRET),
    ValueError(SECRET),
    KeyError(SECRET),
    MemoryError(SECRET),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_round_that_breaks_counts_whole_and_says_only_failed(error: Exception) -> None:
    one = bench(error=error)
    outcome = one.ask()
    # What was booked is spent, and the server must know: δ as in `policy`.
    assert outcome == Abstention("client-000", "failed", epsilon([RELEASE], 1e-3, "rdp"))
    assert SECRET not in repr(outcome) + repr(jobs.encode_outcome(outcome))
    assert one.calls == ["reserve", "train"]
    assert one.ledger.spent() == (RELEASE,)
    assert one.ledger.joins() == 1
    one.trainer.error = None
    assert one.update(nonce="nonce-1").epsilon == epsilon([RELEASE, RELEASE], 1e-3, "rdp")


def test_a_round_that_would_exceed_the_budget_is_refused_before_it_is_booked() -> None:
    one_round, two_rounds = (epsilon([RELEASE] * count, 1e-3, "rdp") for count in (1, 2))
    one = bench(epsilon=(one_round + two_rounds) / 2)
    assert one.update().epsilon == one_round
    assert one.ask(nonce="nonce-1") == one.says("budget")
    assert one.ledger.joins() == 1
    assert one.ledger.spent() == (RELEASE,)


def test_each_budget_stops_the_site_before_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    one_round, two_rounds = (epsilon([RELEASE] * count, 1e-3, "rdp") for count in (1, 2))
    between = (one_round + two_rounds) / 2
    now = 100 * 86_400
    monkeypatch.setattr("time.time", lambda: now)
    for budget, code in (("epsilon_per_run", "run_budget"), ("epsilon_per_month", "month_budget")):
        one = bench(max_joins=9, **{budget: between})
        one.update(nonce="a")
        before = list(one.calls)
        assert one.ask(nonce="b") == one.says(code)
        assert one.calls == before
        # Another run does not share the one; thirty days later the other is whole again.
        later = now + 29 * 86_400
        monkeypatch.setattr("time.time", lambda later=later: later)
        other_run = one.ask(run="other", nonce="c")
        assert isinstance(other_run, ClientUpdate) == (budget == "epsilon_per_run")
        monkeypatch.setattr("time.time", lambda later=later: later + 86_400)
        if budget == "epsilon_per_month":
            one.update(nonce="d")
        assert one.update(run="third", nonce="e") if budget == "epsilon_per_run" else True
        monkeypatch.setattr("time.time", lambda: now)


@pytest.mark.parametrize("bound", [None, 2])
def test_the_sites_own_bound_on_rows_reaches_its_training(bound: int | None) -> None:
    one = bench(rows_per_user=bound)
    one.update()
    assert [task.rows_per_user for task in one.trainer.tasks] == [bound]


def test_a_job_that_the_policy_does_not_allow_books_nothing() -> None:
    for allowed in ({"train": frozenset({Role.B})}, {"bases": frozenset({"other"})}):
        one = bench(**allowed)
        assert one.ask() == Abstention("client-000", "policy")
        assert one.calls == []
    one = bench(train=BOTH, bases=frozenset({"base"}))
    one.update()


def test_a_budget_is_computed_again_when_something_was_booked_meanwhile() -> None:
    one_round, two_rounds = (epsilon([RELEASE] * count, 1e-3, "rdp") for count in (1, 2))
    one = bench(epsilon=(one_round + two_rounds) / 2, max_joins=9)
    real, other = one.ledger.reserve, JobKey("run", 0, "twin", "nonce")

    def late(*arguments: Any) -> bool:
        one.ledger.reserve = real  # type: ignore[method-assign]
        real(other, RELEASE)  # another process was faster
        return real(*arguments)

    one.ledger.reserve = late  # type: ignore[method-assign, assignment]
    assert one.ask() == one.says("budget")
    assert one.ledger.spent() == (RELEASE,)
    assert "train" not in one.calls


def test_an_interrupted_round_counts_whole() -> None:
    one = bench(error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        one.ask()
    assert one.ledger.spent() == (RELEASE,)


def test_a_commit_that_fails_releases_nothing() -> None:
    one = bench()

    def broken(key: JobKey, event: Release, update: bytes = b"") -> None:
        raise LedgerError(SECRET)

    one.ledger.commit = broken  # type: ignore[method-assign]
    assert one.ask() == one.says("ledger")
    assert one.ledger.spent() == (RELEASE,)
    assert one.ask(train=frozenset(), send=frozenset({Role.CORE})) == (one.says("no_release"))


def restarted(one: Bench) -> Bench:
    """The same site in a new process: only its ledger is left."""
    other = bench()
    site = Site(one.site.policy, UNITS, cast(LocalTrainer, other.trainer), one.ledger, PROVENANCE)
    other.trainer.calls = one.calls
    return replace(one, site=site, trainer=other.trainer)


@pytest.mark.parametrize("send", [BOTH, frozenset({Role.B})])
def test_a_job_that_was_answered_gets_the_same_update_and_pays_once(send: frozenset[Role]) -> None:
    one = bench()
    first = one.update(send=send)
    two = restarted(one)
    again = two.update(send=send)
    assert again.parts.keys() == first.parts.keys()
    assert all(torch.equal(again.parts[key], first.parts[key]) for key in first.parts)
    assert (again.steps, again.epsilon) == (first.steps, first.epsilon)
    assert one.calls == ["reserve", "train", "commit"]
    assert one.ledger.spent() == (RELEASE,)
    # What the second process remembers of the round serves its projecting phase.
    rotation = {PartKey(key.site, Role.ROTATION): torch.eye(first.parts[key].shape[0])
                for key in first.parts if key.role is Role.B}  # fmt: skip
    projected = two.update(
        phase=1, train=frozenset(), send=frozenset({Role.CORE}), parts=rotation
    ).parts
    for key, value in projected.items():
        assert torch.equal(value, first.parts[PartKey(key.site, Role.B)])
    two.update(nonce="nonce-1", send=send)
    assert one.ledger.joins() == 2


def test_a_nonce_with_another_job_is_refused() -> None:
    one = bench()
    one.update()
    other = {key: value + 1 for key, value in one.parts.items()}
    for changes in ({"parts": other}, {"send": frozenset({Role.B})}):
        assert one.ask(**changes) == one.says("ledger")
    assert one.ledger.spent() == (RELEASE,)
    # The update of an earlier round is gone once a later one was paid for.
    one.update(round=1, nonce="nonce-1")
    assert one.ask() == one.says("ledger")
    assert one.calls.count("train") == 2


def test_a_job_that_was_cut_short_is_forfeited_under_dp_and_done_again_when_dry() -> None:
    for mode in ("dp", "dry"):
        one = bench(error=KeyboardInterrupt(), mode=mode)
        with pytest.raises(KeyboardInterrupt):
            one.ask()
        two = restarted(one)
        if mode == "dp":
            assert two.ask() == two.says("forfeited")
            assert one.calls == ["reserve", "train"]
            assert one.ledger.spent() == (RELEASE,)
        else:
            whole = bench(mode="dry").update().parts
            again = two.update().parts
            assert all(torch.equal(again[key], whole[key]) for key in whole)
            assert one.ledger.joins() == 1


def test_it_stops_after_the_rounds_that_its_noise_is_calibrated_for() -> None:
    one = bench(max_joins=2)
    one.update(nonce="a")
    one.trainer.error = RuntimeError(SECRET)
    one.ask(nonce="b")  # a round that failed was a round
    one.trainer.error = None
    before = list(one.calls)
    assert one.ask(nonce="c") == one.says("max_joins")
    assert one.calls == before
    assert one.ledger.joins() == 2


@pytest.mark.parametrize("name", ["base", "tokenizer", "labels", "codec"])
def test_a_job_made_for_other_weights_is_refused(name: str) -> None:
    one = bench()
    other = replace(PROVENANCE, **{name: "other"})
    assert one.ask(provenance=other) == Abstention("client-000", "provenance")
    assert one.calls == []


def spoil(
    change: Callable[[PartKey, Tensor], Mapping[PartKey, Tensor]],
) -> Callable[[Parts], Parts]:
    """Replace the first B by what ``change`` makes of it."""

    def spoiled(parts: Parts) -> Parts:
        key = next(key for key in parts if key.role is Role.B)
        return {**{k: v for k, v in parts.items() if k != key}, **change(key, parts[key])}

    return spoiled


def cut(parts: Parts, rank: int) -> dict[PartKey, Tensor]:
    """The leading ``rank`` columns of every B and rows of every A."""
    sliced: dict[Role, Any] = {Role.A: np.s_[:rank], Role.B: np.s_[:, :rank]}
    return {key: value[sliced.get(key.role, ...)].clone() for key, value in parts.items()}


def residual(parts: Parts, size: float) -> dict[PartKey, Tensor]:
    """A residual of rank 1 at every site, of that size in every entry."""
    sites = {key.site for key in parts if key.role is Role.A}
    left = {PartKey(site, Role.RESIDUAL_B): torch.full((WIDTH, 1), size) for site in sites}
    return left | {PartKey(site, Role.RESIDUAL_A): torch.ones(1, WIDTH) for site in sites}


HOSTILE: dict[str, Callable[[Parts], dict[str, Any]]] = {
    "unknown site": lambda p: {"parts": {**p, PartKey("nowhere", Role.B): torch.zeros(1)}},
    "wrong shape": lambda p: {"parts": spoil(lambda k, v: {k: v.T})(p)},
    "one dimension too many": lambda p: {"parts": spoil(lambda k, v: {k: v[None]})(p)},
    "nan": lambda p: {"parts": spoil(lambda k, v: {k: v * math.nan})(p)},
    "infinite": lambda p: {"parts": spoil(lambda k, v: {k: v + math.inf})(p)},
    "a trained site is not broadcast": lambda p: {"parts": spoil(lambda k, v: {})(p)},
    "a trained role is not broadcast": lambda p: {
        "train": MOVABLE,
        "send": MOVABLE,
        "parts": {k: v for k, v in p.items() if k.role is not Role.A},
    },
    "no parts": lambda p: {"parts": {}},
    "half a residual": lambda p: {
        "parts": {**p, PartKey(next(iter(p)).site, Role.RESIDUAL_A): torch.zeros(1, WIDTH)}
    },
    "a residual that is too large": lambda p: {"parts": {**p, **residual(p, 1e5)}},
    "a core": lambda p: {"parts": {**p, PartKey(next(iter(p)).site, Role.CORE): torch.eye(RANK)}},
    "another rank of b than of a": lambda p: {"parts": spoil(lambda k, v: {k: v[:, :1]})(p)},
    "no columns": lambda p: {"parts": cut(p, 0)},
    "a role without arrays": lambda p: {"train": BOTH | {Role.CORE}, "send": BOTH},
    "sends what did not train": lambda p: {"send": frozenset({Role.A})},
    "sends more than trained": lambda p: {"send": MOVABLE},
    "sends nothing": lambda p: {"send": frozenset()},
    "no nonce": lambda p: {"nonce": ""},
    "no run": lambda p: {"run": ""},
}


@pytest.mark.parametrize("mode", ["dp", "dry", "none"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_job_that_does_not_fit_costs_nothing(name: str, mode: str) -> None:
    one = bench(mode=mode)
    assert one.ask(**HOSTILE[name](one.parts)) == one.says("bad_job")
    assert one.calls == []
    assert one.ledger.joins() == 0
    one.update()


def test_a_round_number_that_the_ledger_cannot_hold_releases_nothing() -> None:
    one = bench()
    job = one.job()
    object.__setattr__(job, "round", -1)
    assert one.site.train_many([job]) == [Abstention("client-000", "bad_job")]
    assert one.calls == []


def test_a_bad_job_does_not_stop_the_next() -> None:
    one = bench()
    bad, good = one.job(parts={}), one.job()
    first, second = one.site.train_many([bad, good])
    assert first == Abstention("client-000", "bad_job")
    assert isinstance(second, ClientUpdate)


def test_a_client_of_a_smaller_rank_sends_that_rank() -> None:
    """Its update has the rank of its job, and the next one that of its own."""
    one = bench(units=units_of([]))
    small = cut(one.parts, 1)
    update = one.update(parts=small)
    assert {k: v.shape for k, v in update.parts.items()} == {
        k: v.shape for k, v in small.items() if k.role in BOTH
    }
    assert all(not torch.equal(v, small[k]) for k, v in update.parts.items())  # noise on each
    whole = one.update(nonce="whole")
    assert all(v.shape == one.parts[k].shape for k, v in whole.parts.items())


def test_a_residual_is_trained_over_and_does_not_come_back() -> None:
    dry = bench(mode="dry")
    plain = dry.update()
    found = dry.update(parts={**dry.parts, **residual(dry.parts, 0.05)}, nonce="folded")
    assert found.parts.keys() == plain.parts.keys()
    assert not all(torch.equal(found.parts[key], plain.parts[key]) for key in plain.parts)
    again = dry.update(nonce="again")
    assert all(torch.equal(again.parts[key], plain.parts[key]) for key in plain.parts)


def test_a_job_that_trains_a_is_private_in_a_too() -> None:
    """FedAvg-LoRA: one clip over A, B and head, and noise on every coordinate of each.

    Without rows a step of size 0.1 moves an array by noise of 0.1·σC/L·√steps alone.
    """
    one = bench(units=units_of([]))
    update = one.update(train=MOVABLE, send=MOVABLE)
    (task,) = one.trainer.tasks
    assert task.mechanism is not None
    assert task.mechanism.keys == set(one.parts)
    assert len(task.mechanism.groups) == 1
    for role, step in ((Role.A, 0.1), (Role.B, 0.1), (Role.HEAD, 1.0)):
        noise = torch.cat(
            [(v - one.parts[k]).flatten() for k, v in update.parts.items() if k.role is role]
        )
        squares = float((noise / (step * SIGMA * 0.5 / 4 * math.sqrt(STEPS))).pow(2).sum())
        assert abs(squares - len(noise)) < 6 * math.sqrt(2 * len(noise))


def test_the_head_s_share_is_the_policy_s() -> None:
    one = bench(head_share=0.36)
    one.update()
    (task,) = one.trainer.tasks
    assert task.mechanism is not None
    bounds = {
        frozenset(key.role for key in group.keys): group.bound for group in task.mechanism.groups
    }
    assert bounds == {
        frozenset({Role.B}): pytest.approx(0.4),
        frozenset({Role.HEAD}): pytest.approx(0.3),
    }


def test_noise_never_repeats_whatever_the_job_and_the_public_seed() -> None:
    """The same job at twin sites of one public seed, and again under a new nonce."""
    first, twin = bench(), bench()
    found = [first.update(), first.update(nonce="again"), twin.update()]
    for key in found[0].parts:
        values = [update.parts[key] for update in found]
        assert not torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
    for task in [*first.trainer.tasks, *twin.trainer.tasks]:
        assert task.sampling.secret
        assert task.noise.secret
    streams = {id(s) for t in first.trainer.tasks for s in (t.sampling, t.noise)}
    assert len(streams) == 4


def test_a_dry_run_repeats_and_is_booked_as_no_privacy() -> None:
    first, twin = bench(mode="dry"), bench(mode="dry")
    left, right = first.update(), twin.update()
    assert all(torch.equal(left.parts[key], right.parts[key]) for key in left.parts)
    assert left.epsilon == math.inf
    assert first.calls == ["reserve", "train", "commit"]
    other = first.update(round=1, nonce="n1")
    assert any(not torch.equal(left.parts[key], other.parts[key]) for key in left.parts)
    assert bench(mode="dry", client="client-001").update().parts.keys() == left.parts.keys()


def test_without_privacy_nothing_is_booked_or_claimed() -> None:
    one = bench(mode="none")
    update = one.update()
    assert update.epsilon is None
    assert one.calls == ["train"]
    assert one.ledger.spent() == ()
    assert one.trainer.tasks[0].mechanism is None
    assert "epsilon" not in jobs.encode_outcome(update)[1]


@pytest.mark.parametrize("mode", ["dp", "dry", "none"])
def test_nothing_leaves_but_arrays_steps_and_epsilon(mode: str) -> None:
    one = bench(mode=mode)
    update = one.update(send=frozenset({Role.B}))
    arrays, header = jobs.encode_outcome(update)
    expected = {"client", "steps", "codec"} | ({"epsilon"} if mode != "none" else set())
    assert set(header) == expected
    assert set(arrays) == {f"{key.site}/b" for key in one.parts if key.role is Role.B}
    assert all(array.dtype == "float32" for array in arrays.values())


@pytest.mark.parametrize("units", [units_of([]), units_of([1]), UNITS], ids=lambda u: u.count)
def test_what_is_public_does_not_depend_on_the_rows(units: UnitIndex) -> None:
    one, reference = bench(units=units), bench()
    left, right = one.update(), reference.update()
    assert jobs.encode_outcome(left)[1] == jobs.encode_outcome(right)[1]
    assert {k: v.shape for k, v in left.parts.items()} == {
        k: v.shape for k, v in right.parts.items()
    }
    assert one.site.status() == reference.site.status()
    assert one.ledger.spent() == reference.ledger.spent()


def rotations(one: Bench) -> dict[PartKey, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {
        PartKey(site.name, Role.ROTATION): torch.linalg.qr(
            torch.randn(WIDTH, RANK, generator=draws)
        ).Q
        for site in one.model.adapted.sites
    }


PROJECT = {"train": frozenset[Role](), "send": frozenset({Role.CORE}), "phase": 1, "nonce": "p"}


def test_a_projecting_phase_sends_rotated_released_b_and_costs_nothing() -> None:
    one = bench()
    released, turns = one.update(), rotations(one)
    spent, calls = one.ledger.spent(), list(one.calls)
    found = one.update(**PROJECT, parts=turns)
    assert found.parts.keys() == {PartKey(key.site, Role.CORE) for key in turns}
    for key, turn in turns.items():
        expected = turn.T @ released.parts[PartKey(key.site, Role.B)]
        assert torch.equal(found.parts[PartKey(key.site, Role.CORE)], expected)
    assert (found.steps, found.epsilon) == (0, None)
    assert (one.ledger.spent(), one.calls) == (spent, calls)


@pytest.mark.parametrize("change", [{}, {"round": 1}, {"run": "other"}], ids=str)
def test_without_a_release_of_this_round_there_is_nothing_to_project(
    change: dict[str, Any],
) -> None:
    one = bench()
    if change:
        one.update()
    outcome = one.ask(**PROJECT, parts=rotations(one), **change)
    assert outcome == one.says("no_release")


BAD_PROJECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "asks for B": lambda one: {"send": frozenset({Role.B})},
    "asks for nothing": lambda one: {"send": frozenset()},
    "no rotation": lambda one: {"parts": {}},
    "something else": lambda one: {"parts": one.parts},
    "unknown site": lambda one: {"parts": {PartKey("nowhere", Role.ROTATION): torch.eye(2)}},
    "wrong rows": lambda one: {"parts": {k: v[:-1] for k, v in rotations(one).items()}},
    "a vector": lambda one: {"parts": {k: v[:, 0] for k, v in rotations(one).items()}},
    "a stack": lambda one: {"parts": {k: v[None] for k, v in rotations(one).items()}},
}


@pytest.mark.parametrize("name", BAD_PROJECTIONS)
def test_a_projection_that_does_not_fit_is_refused(name: str) -> None:
    one = bench()
    one.update()
    values = {**PROJECT, "parts": rotations(one), **BAD_PROJECTIONS[name](one)}
    assert one.ask(**values) == one.says("bad_job")


def test_a_site_that_released_no_b_projects_none() -> None:
    one = bench()
    head = frozenset({Role.HEAD})
    one.update(train=head, send=head)
    outcome = one.ask(**PROJECT, parts=rotations(one))
    assert outcome == one.says("bad_job")


def test_the_status_is_what_the_operator_declares() -> None:
    assert bench().site.status() == SiteStatus("client-000", 8, SIGMA, 1e-3, PROVENANCE)
    assert bench(mode="none").site.status() == SiteStatus("client-000", 8, 0.0, 0.0, PROVENANCE)


@pytest.mark.parametrize(("size", "rate"), [(8, 0.5), (4, 1.0), (2, 1.0), (0, 1.0), (1000, 0.004)])
def test_the_sampling_rate_follows_the_declared_size(size: int, rate: float) -> None:
    one = bench(declared_size=size)
    one.update()
    assert one.site.policy.sample_rate == rate
    assert one.trainer.tasks[0].sample_rate == rate
    assert one.ledger.spent() == (replace(RELEASE, sample_rate=rate),)


BAD_POLICIES: list[tuple[dict[str, Any], str]] = [
    ({"mode": "on"}, "mode"),
    ({"mode": "dp", "noise_multiplier": 0.0}, "noise_multiplier"),
    ({"mode": "dry", "noise_multiplier": 1.0}, "noise_multiplier"),
    ({"mode": "none", "noise_multiplier": 1.0}, "noise_multiplier"),
    ({"noise_multiplier": math.nan}, "noise_multiplier"),
    ({"noise_multiplier": math.inf}, "noise_multiplier"),
    ({"declared_size": -1}, "declared_size"),
    ({"expected_batch": 0}, "expected_batch"),
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"max_joins": 0}, "max_joins"),
]


@pytest.mark.parametrize(("change", "name"), BAD_POLICIES, ids=str)
def test_a_policy_that_promises_nothing_is_refused(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        policy(**change)


def rotated(one: Bench, basis: bool, **changes: Any) -> Job:
    """The job of `Bench.job` with Q = I and the model's own A in the place of A."""
    job = one.job(**changes)
    factors = {key: value for key, value in job.parts.items() if key.role is Role.A}
    turns = {PartKey(key.site, Role.ROTATION): torch.eye(len(a)) for key, a in factors.items()}
    return shortened(job, Compact(turns, factors), basis)


def answer(one: Bench, job: Job) -> ClientUpdate | Abstention:
    return one.site.train_many([job])[0]


def test_a_job_without_its_basis_books_nothing_and_is_trained_once_it_has_it() -> None:
    one = bench()
    assert answer(one, rotated(one, basis=False)) == Abstention("client-000", "no_base")
    assert one.calls == []
    first = answer(one, rotated(one, basis=True))
    assert isinstance(first, ClientUpdate)
    assert one.calls == ["reserve", "train", "commit"]
    assert {key.role for key in one.trainer.tasks[0].parts} == MOVABLE
    later = rotated(one, basis=False, round=1, nonce="nonce-1")
    assert isinstance(answer(one, later), ClientUpdate)


def test_the_whole_job_is_a_retry_of_the_rotated_one() -> None:
    one = bench()
    first = answer(one, rotated(one, basis=True))
    assert isinstance(first, ClientUpdate)
    for again in (rotated(one, basis=False), one.job(), rotated(one, basis=True)):
        found = answer(one, again)
        assert isinstance(found, ClientUpdate)
        assert all(torch.equal(found.parts[key], value) for key, value in first.parts.items())
    assert one.calls == ["reserve", "train", "commit"]
    # A process that was started anew has its ledger and no basis.
    two = restarted(one)
    assert answer(two, rotated(one, basis=False)) == two.says("no_base")
    assert isinstance(answer(two, rotated(one, basis=True)), ClientUpdate)
    assert one.ledger.spent() == (RELEASE,)


def test_a_basis_of_another_run_is_not_answered_for() -> None:
    one = bench()
    assert isinstance(answer(one, rotated(one, basis=True)), ClientUpdate)
    foreign = rotated(one, basis=False, run="other", nonce="nonce-1")
    assert answer(one, foreign) == one.says("no_base")
    assert one.calls.count("reserve") == 1


def test_a_basis_that_fits_no_model_is_a_bad_job_and_is_not_kept() -> None:
    one = bench()
    job = rotated(one, basis=True)
    key = next(key for key in job.parts if key.role is Role.ROTATION)
    wide = replace(job, parts={**job.parts, key: torch.eye(RANK + 1)})
    assert answer(one, wide) == Abstention("client-000", "bad_job")
    unknown = {PartKey(f"x.{k.site}", k.role): v for k, v in one.parts.items() if k.role is Role.A}
    turns = {PartKey(k.site, Role.ROTATION): torch.eye(len(a)) for k, a in unknown.items()}
    whole = one.job(parts={**one.parts, **unknown})
    strange = shortened(
        whole, Compact({**turns, **rotated(one, basis=False).parts}, unknown), basis=True
    )
    assert isinstance(answer(one, strange), Abstention)
    assert one.site._basis is None
    assert one.calls == []


@pytest.mark.parametrize("shape", [(1, 10**6), (64, WIDTH), (RANK, WIDTH + 1)], ids=str)
def test_no_product_is_formed_with_a_basis_that_does_not_fit_the_model(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two short arrays can have a product that is larger than the memory."""

    def never(rotation: Tensor, base: Tensor) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("fedlr.training.downlink.rotate", never)
    one = bench()
    job = rotated(one, basis=True)
    sites = {key.site for key in job.parts if key.role is Role.A}
    basis = {PartKey(site, Role.A): torch.zeros(shape) for site in sites}
    turns = {PartKey(site, Role.ROTATION): torch.zeros(shape[0], shape[0]) for site in sites}
    parts = {**job.parts, **basis, **turns}
    told = jobs.Rotated(jobs.digest_of(basis), "result")
    assert answer(one, replace(job, parts=parts, rotated=told)) == Abstention(
        "client-000", "bad_job"
    )
    assert one.calls == []


def narrow(parts: Parts, rank: int) -> dict[PartKey, Tensor]:
    cuts = {Role.A: (slice(rank),), Role.B: (slice(None), slice(rank))}
    return {key: value[cuts.get(key.role, ())].contiguous() for key, value in parts.items()}


def test_a_site_trains_no_more_columns_than_its_operator_allows() -> None:
    one = bench(max_rank=1)
    assert one.site.status().rank == 1
    assert bench().site.status().rank is None
    assert one.ask() == Abstention("client-000", "policy")
    assert answer(one, rotated(one, basis=True)) == Abstention("client-000", "policy")
    assert (one.calls, one.site._basis) == ([], None)
    update = one.update(parts=narrow(one.parts, 1))
    for key, value in update.parts.items():
        assert value.shape[1:2] == ((1,) if key.role is Role.B else value.shape[1:2])
    assert one.calls == ["reserve", "train", "commit"]
