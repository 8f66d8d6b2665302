"""One audit: the auditor is the server of a real site, sees what it releases, and guesses."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedlr import checks
from fedlr.audit.attack import Observer, Quota, guess, signs
from fedlr.audit.bound import Guesses, epsilon_lower_bound, largest_bound
from fedlr.audit.canaries import Directions
from fedlr.audit.trainer import CanaryTrainer
from fedlr.errors import ConfigError, RunError
from fedlr.methods.method import ClientUpdate, Layout, Method
from fedlr.privacy.accounting import Accountant, epsilon
from fedlr.privacy.ledger import SqliteLedger
from fedlr.training.jobs import Abstention, Job, Provenance

FEWEST_CANARIES = 100

NORM = 100.0
"""Norm of a canary's gradient in units of C, so that a missing clip is a hundredfold signal."""


class Answering(Protocol):
    """A site, as its server sees it."""

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        """Answer each job with an update or a code."""
        ...


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        site: Its units are `fedlr.audit.canaries.CanaryUnits`, its trainer is ``trainer``.
        trainer: Where the canaries' gradients come from.
        job: What is asked of it in every round, round and nonce apart (`first_job`).
        rounds: Number of rounds, ≥ 1.
        clip_norm: C.
        sample_rate: q, which with the number of steps decides what is worth a guess.
    """

    site: Answering
    trainer: CanaryTrainer
    job: Job
    rounds: int
    clip_norm: float
    sample_rate: float

    def quota(self, canaries: int) -> Quota:
        """Return how many canaries will be guessed; a function of public numbers alone."""
        rounds = sum(map(abs, signs(self.rounds)))
        steps = rounds * self.trainer.settings.steps
        return Quota.of(canaries, (1.0 - self.sample_rate) ** steps)


@dataclass(frozen=True)
class Claim:
    """What the ledger says was spent: (ε, δ)."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Report:
    """The result of an audit.

    Attributes:
        claim: What the bound is compared with.
        found: Canaries, guesses and right guesses.
        confidence: Of the bound.
        bound: Lower bound on ε at the claim's δ.
        ceiling: The bound if every guess had been right; a claim above it cannot fail.
    """

    claim: Claim
    found: Guesses
    confidence: float
    bound: float
    ceiling: float

    @property
    def exceeded(self) -> bool:
        """Whether the bound contradicts the claim."""
        return self.bound > self.claim.epsilon


def first_job(
    method: Method, layout: Layout, seed: int, provenance: Provenance, rank: int | None = None
) -> Job:
    """Return the job of the method's private phase in round 0, as its server would send it.

    Everything that trains is asked for, whatever the method itself would have sent.

    Args:
        method: The federated method.
        layout: What it adapts.
        seed: Public seed of the initial A.
        provenance: Digests that the site expects.
        rank: Most columns that the site trains; None has no bound.
    """
    state = method.init(layout, torch.Generator().manual_seed(seed))
    phases = method.plan(state).phases
    index = next(index for index, phase in enumerate(phases) if phase.private)
    full = max((site.rank for site in layout.sites), default=1)
    return Job(
        run=secrets.token_hex(8),
        round=0,
        phase=index,
        nonce="none",
        train=phases[index].train,
        send=phases[index].train,
        parts=method.broadcast(
            replace(state, phase=index), None if rank is None or rank >= full else rank
        ),
        provenance=provenance,
    )


def attack(
    subject: Subject, coins: npt.NDArray[np.bool_], say: Callable[[str], None] = lambda _: None
) -> Guesses:
    """Have the site train, watch what it releases, and guess who was in its data.

    Every round starts from the same broadcast: a server may do that, and then the
    rounds differ in nothing but the draws, the noise and the canaries' sign.

    Args:
        subject: What is audited; its trainer's directions and scale are set.
        coins: Whether each of m ≥ 100 canaries is among the site's units; looked at last.
        say: Told before each round.

    Raises:
        ConfigError: Fewer coordinates train than there are canaries.
        RunError: The site abstains, or releases something that is not finite.
    """
    canaries = checks.at_least("canaries", len(coins), FEWEST_CANARIES)
    quota = subject.quota(canaries)
    job, trainer = subject.job, subject.trainer
    shapes = {key: value.shape for key, value in job.parts.items() if key.role in job.train}
    try:
        directions = Directions.draw(shapes, canaries)
    except ValueError as error:
        raise ConfigError([f"{error}; ask for fewer canaries or raise adapter.rank"]) from error
    observer = Observer(directions, trainer.settings)
    trainer.directions = directions
    for round_number, sign in enumerate(signs(subject.rounds)):
        say(f"round {round_number + 1} of {subject.rounds}")
        trainer.scale = sign * NORM * subject.clip_norm
        asked = replace(job, round=round_number, nonce=secrets.token_hex(16))
        (answer,) = subject.site.train_many([asked])
        if isinstance(answer, Abstention):
            raise RunError(
                f"the site abstained in round {round_number} with the code {answer.code!r}, so "
                "there is nothing to audit; mend what its log names, then audit again"
            )
        if not all(bool(torch.isfinite(value).all()) for value in answer.parts.values()):
            raise RunError(
                f"the update of round {round_number} is not finite, so there is nothing to audit; "
                "lower optimizer.learning_rate"
            )
        observer.see(job.parts, answer.parts, sign)
    return guess(observer.scores, coins, quota)


def claim_of(ledger: Path, delta: float, accountant: Accountant) -> Claim:
    """Return what the ledger in a file adds up to, by the production accountant."""
    opened = SqliteLedger(ledger)
    try:
        return Claim(epsilon(opened.spent(), delta, accountant), delta)
    finally:
        opened.close()


def judge(found: Guesses, claim: Claim, confidence: float = 0.95) -> Report:
    """Bound ε by what was guessed, at the claim's δ and at ``confidence`` in [0.5, 1)."""
    return Report(
        claim=claim,
        found=found,
        confidence=confidence,
        bound=epsilon_lower_bound(found, claim.delta, confidence),
        ceiling=largest_bound(found.canaries, found.guesses, claim.delta, confidence),
    )
