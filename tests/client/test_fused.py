"""Sites that train together book, pay and answer as if each were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from client.fused import train_fused
from client.site import Prepared, Site
from fedlr.config import KernelsConfig, OptimizerConfig, PrivacyConfig, RunConfig
from fedlr.methods.method import ClientUpdate
from fedlr.planning import clients_together
from fedlr.training.jobs import Abstention, Job
from fedlr.training.local import LocalTrainer
from tests.client.test_site import PROVENANCE, STEPS, SpyLedger, job_for, policy
from tests.models import LONGEST, Tiny, rows, tiny, units_of

DATA = rows([5, 3, LONGEST, 7, 2, 9, 4, 6, 3, 8, 5, 5])
UNITS = [units_of([1, 1, 2]), units_of([1, 1], 4), units_of([], 6), units_of([1, 1, 1, 1], 6)]


def sites(model: Tiny, **changes: Any) -> list[tuple[Site, SpyLedger]]:
    trainer = model.trainer(DATA, steps=STEPS, learning_rate=0.1, physical_batch=4)
    found = []
    for number, units in enumerate(UNITS):
        ledger = SpyLedger()
        own = policy(client=f"client-{number:03d}", **changes)
        found.append((Site(own, units, trainer, ledger, PROVENANCE), ledger))
    return found


def jobs_for(model: Tiny, **changes: Any) -> list[Job]:
    parts = model.parts()
    return [
        job_for(parts, **{"nonce": f"nonce-{number}", **changes}) for number in range(len(UNITS))
    ]


def test_in_dry_mode_updates_and_ledgers_are_those_of_training_one_after_the_other() -> None:
    alone, together = sites(tiny(), mode="dry"), sites(tiny(), mode="dry")
    jobs = jobs_for(tiny())
    expected = [site.train_many([job])[0] for (site, _), job in zip(alone, jobs, strict=True)]
    found = train_fused([(site, job) for (site, _), job in zip(together, jobs, strict=True)])
    for one, other, start in zip(found, expected, jobs, strict=True):
        assert isinstance(one, ClientUpdate)
        assert isinstance(other, ClientUpdate)
        assert (one.client, one.steps, one.epsilon) == (other.client, other.steps, other.epsilon)
        assert one.parts.keys() == other.parts.keys()
        size = max(float((other.parts[key] - start.parts[key]).norm()) for key in other.parts)
        for key in other.parts:
            assert float((one.parts[key] - other.parts[key]).norm()) <= 1e-5 * size + 1e-9
    for (_, ledger), (_, single) in zip(together, alone, strict=True):
        assert ledger.history() == single.history()
    moved = found[0].parts.items() if isinstance(found[0], ClientUpdate) else ()
    assert any(not torch.equal(value, jobs[0].parts[key]) for key, value in moved)


def test_every_site_books_before_the_first_gradient_and_commits_its_own_update() -> None:
    members = sites(tiny())
    found = train_fused(list(zip([s for s, _ in members], jobs_for(tiny()), strict=True)))
    assert all(isinstance(outcome, ClientUpdate) for outcome in found)
    for (site, ledger), job in zip(members, jobs_for(tiny()), strict=True):
        assert ledger.calls == ["reserve", "commit"]
        again = site.train_many([job])[0]  # paid already: the same update, nothing booked
        assert isinstance(again, ClientUpdate)
        first = next(o for o in found if o.client == again.client)
        assert isinstance(first, ClientUpdate)
        assert all(torch.equal(first.parts[key], again.parts[key]) for key in first.parts)
        assert ledger.calls == ["reserve", "commit"]


def test_a_site_that_may_not_take_part_abstains_and_the_others_train() -> None:
    members = sites(tiny())
    stopped, _ = members[1]
    stopped.policy = replace(stopped.policy, epsilon=1e-9)
    jobs = jobs_for(tiny())
    jobs[2] = replace(jobs[2], provenance=replace(PROVENANCE, base="another"))
    found = train_fused(list(zip([s for s, _ in members], jobs, strict=True)))
    codes = [o.code if isinstance(o, Abstention) else "trained" for o in found]
    assert codes == ["trained", "budget", "provenance", "trained"]
    assert [ledger.calls for _, ledger in members] == [
        ["reserve", "commit"],
        [],
        [],
        ["reserve", "commit"],
    ]


def test_training_that_breaks_is_spent_by_all_that_were_booked() -> None:
    class Broken:
        """Fits everything, and cannot train."""

        def __init__(self, real: LocalTrainer) -> None:
            self.settings, self.check = real.settings, real.check

        def begin(self, task: object) -> None:
            raise RuntimeError("a private row")

    members = sites(tiny())
    for site, _ in members:
        site.trainer = cast(LocalTrainer, Broken(site.trainer))
    found = train_fused(list(zip([s for s, _ in members], jobs_for(tiny()), strict=True)))
    for (_, ledger), outcome in zip(members, found, strict=True):
        assert isinstance(outcome, Abstention)
        assert outcome.code == "failed"
        assert outcome.epsilon
        assert ledger.joins() == 1


def test_what_one_site_booked_is_not_completed_by_another() -> None:
    (first, _), (second, ledger), *_ = sites(tiny())
    job = jobs_for(tiny())[0]
    found, own = first.prepare(job), second.prepare(job)
    assert isinstance(found, Prepared)
    assert isinstance(own, Prepared)
    outcome = second.complete(found, job.parts)
    assert isinstance(outcome, Abstention)
    assert outcome.code == "failed"
    assert ledger.calls == ["reserve"]


def test_nobody_to_train_is_nothing_to_do() -> None:
    assert train_fused([]) == []


@pytest.mark.parametrize(
    ("kernels", "batch", "mode", "expected"),
    [
        ({}, 128, "dp", 1),
        ({}, 32, "dp", 1),
        ({}, 16, "dp", 2),
        ({}, 5, "dry", 6),
        ({}, 8, "none", 1),
        ({"gradients": "opacus"}, 8, "dp", 1),
        ({"physical_batch": 64}, 8, "dp", 8),
        ({"fused_clients": 3}, 128, "dp", 3),
        ({"fused_clients": 1}, 8, "dp", 1),
        ({"physical_batch": None}, 8, "dp", 1),
    ],
)
def test_as_many_clients_share_a_pass_as_fill_a_physical_batch(
    kernels: dict[str, Any], batch: int, mode: Any, expected: int
) -> None:
    config = RunConfig(
        kernels=KernelsConfig(**kernels),
        optimizer=OptimizerConfig(expected_batch=batch),
        privacy=PrivacyConfig(mode=mode),
    )
    assert clients_together(config) == expected
    ray = replace(config, federation=replace(config.federation, engine="ray"))
    assert clients_together(ray) == 1
