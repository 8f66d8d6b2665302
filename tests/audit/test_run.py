"""The audit passes an honest site, and fails one for each planted bug.

Chance of a wrong verdict, by the law of the scores: included canaries add Binomial(T, q)
draws to N(0, σ²T), T = 16, q = 0.6, in units of C. At a claimed ε = 1 (σ = 10) the bound
exceeds it from 157 right guesses of 200 on. A guess is right with probability 0.604 where
the noise is honest and 0.994 where it is a tenth (20,000 simulated audits each, whose
counts spread as binomial ones): P[Binomial(200, 0.604) ≥ 157] = 4e-8, and
P[Binomial(200, 0.994) < 157] < 1e-40. Without noise or clip a guess is wrong where no step
draws an included canary, (1 - q)^16 = 4e-7, or where the site's own gradients, or noise of
less than a fifth of the smallest likely signal, hide it; 44 of them must be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from client.site import Site
from fedlr.audit.canaries import toss
from fedlr.audit.run import Answering, Subject, attack, first_job
from fedlr.audit.trainer import CanaryTrainer
from fedlr.errors import ConfigError, RunError
from fedlr.kernels.clipped_sum import naive
from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.method import ClientUpdate, Layout, Role
from fedlr.privacy.ledger import SqliteLedger
from fedlr.privacy.noise import Stream, secret_stream
from fedlr.training.jobs import Abstention, Job
from tests.audit import harness
from tests.audit.harness import audited

Patch = pytest.MonkeyPatch


def weaken_noise(patch: Patch) -> None:
    """Noise × 0.1."""
    real = Stream.gaussian
    patch.setattr(Stream, "gaussian", lambda self, shape, sd: real(self, shape, 0.1 * sd))


def repeat_noise(patch: Patch) -> None:
    """The same noise in every round, under fresh draws of the units."""
    key = secret_stream()._key
    streams = lambda site, job: (secret_stream(), Stream(key, secret=True))  # noqa: E731
    patch.setattr(Site, "_streams", streams)


def remove_clip(patch: Patch) -> None:
    """No clip: every factor is one."""
    patch.setattr(naive, "clip_factors", lambda squared, bound: torch.ones_like(squared))


@pytest.mark.parametrize("bug", [weaken_noise, repeat_noise, remove_clip])
def test_a_planted_bug_fails_the_audit(
    bug: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    report = audited(1.0, tmp_path)
    assert 0.9 < report.claim.epsilon <= 1.0
    assert report.exceeded
    assert report.bound > 2.0


@pytest.mark.parametrize("claimed", [1.0, 3.0])
def test_an_honest_site_passes(claimed: float, tmp_path: Path) -> None:
    report = audited(claimed, tmp_path)
    assert 0.9 * claimed < report.claim.epsilon <= claimed < report.ceiling
    assert not report.exceeded


def test_an_honest_site_of_large_epsilon_shows_much_of_it(tmp_path: Path) -> None:
    # 0.937 of the guesses are right; fewer than 157 of 200 are with probability 1e-12.
    report = audited(8.0, tmp_path)
    assert 1.0 < report.bound < report.claim.epsilon
    assert report.ceiling < report.claim.epsilon


def test_a_ledger_that_books_nothing_fails_the_audit(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(SqliteLedger, "spent", lambda _: ())
    report = audited(8.0, tmp_path)
    assert report.claim.epsilon == 0.0
    assert report.exceeded


def test_a_site_that_abstains_gives_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"round 8 with the code 'max_joins'"):
        audited(1.0, tmp_path, rounds=harness.ROUNDS + 1)


class Answers:
    """A site that sends back NaN."""

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        parts = {key: value * math.nan for key, value in jobs[0].parts.items()}
        return [ClientUpdate("client-000", parts, 1)]


def subject(rank: int, site: Answering) -> Subject:
    real, parts = harness.trainer(rank)
    trained = harness.TRAINED
    job = Job("run", 0, 0, "none", trained, trained, parts, harness.PROVENANCE)
    return Subject(site, CanaryTrainer(real), job, 2, harness.CLIP, harness.RATE)


def test_an_update_that_is_not_finite_gives_no_verdict() -> None:
    with pytest.raises(RunError, match=r"round 0 is not finite"):
        attack(subject(harness.RANK, Answers()), toss(100))


def test_more_canaries_than_coordinates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"canaries = 200 must be ≤ 115.*adapter\.rank"):
        attack(subject(1, Answers()), toss(200))


def test_fewer_than_a_hundred_canaries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"canaries = 99 must be ≥ 100"):
        attack(subject(harness.RANK, Answers()), toss(99))


def test_the_first_job_trains_and_asks_for_all_that_the_private_phase_trains() -> None:
    method = FedSVD(orthonormal)
    layout = Layout((AdapterSite("layer", 6, 5, 2, 1.0),))
    job = first_job(method, layout, 0, harness.PROVENANCE)
    assert job.train == job.send == frozenset({Role.B})
    assert {key.role for key in job.parts} == {Role.A, Role.B}
