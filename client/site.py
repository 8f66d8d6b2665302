"""The site: the trust boundary that owns data, ledger, noise and policy.

Jobs come in, noised updates or fixed codes go out; nothing else. The same object
is called directly in a simulation and behind an agent on a real node.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch

from fedlr import checks
from fedlr.data.batching import UnitIndex
from fedlr.errors import LedgerError
from fedlr.methods.method import ClientUpdate, PartKey, Parts, Role
from fedlr.privacy.accounting import Accountant, epsilon
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import Booking, JobKey, Ledger
from fedlr.privacy.noise import Stream, public_stream, secret_stream
from fedlr.training.jobs import Abstention, Job, Provenance, SiteStatus, job_digest
from fedlr.training.local import LocalTask, LocalTrainer

_log = logging.getLogger("fedlr.site")


@dataclass(frozen=True)
class SitePolicy:
    """What the operator declares; every number in it is public.

    Attributes:
        client: Stable public identifier.
        mode: ``dp``, ``dry`` or ``none``.
        declared_size: N, the declared number of units; shapes q, never counted
            from the rows at run time.
        expected_batch: L; q = min(1, L/N) and the divisor of the sum.
        clip_norm: C.
        head_share: Share of C² of a trained head; None clips jointly.
        noise_multiplier: σ, calibrated for ``max_joins``; 0 unless ``mode=dp``.
        delta: δ.
        epsilon: ε that no round may take this site above.
        unit: Unit of privacy.
        max_joins: Rounds this site may join before it stops.
        accountant: Accountant of the reported ε.
        public_seed: Seed of Poisson draws where ``mode`` is not ``dp``.
    """

    client: str
    mode: Literal["dp", "dry", "none"]
    declared_size: int
    expected_batch: int
    clip_norm: float
    head_share: float | None
    noise_multiplier: float
    delta: float
    epsilon: float
    unit: Literal["example", "user"]
    max_joins: int
    accountant: Accountant
    public_seed: int

    def __post_init__(self) -> None:
        checks.one_of("mode", self.mode, ("dp", "dry", "none"))
        checks.at_least("declared_size", self.declared_size, 0)
        checks.at_least("expected_batch", self.expected_batch, 1)
        checks.positive("clip_norm", self.clip_norm)
        checks.non_negative("noise_multiplier", self.noise_multiplier)
        checks.at_least("max_joins", self.max_joins, 1)
        checks.positive("epsilon", self.epsilon)
        if (self.mode == "dp") != (self.noise_multiplier > 0):
            raise ValueError(
                f"noise_multiplier = {self.noise_multiplier} does not fit mode = {self.mode!r}: it "
                "must be > 0 in mode dp and 0 in the others"
            )

    @property
    def sample_rate(self) -> float:
        """q = min(1, L/N); 1 where nothing is declared."""
        return min(1.0, self.expected_batch / max(1, self.declared_size))


class Site:
    """One participant.

    Args:
        policy: What its operator declares.
        units: Its rows by unit of privacy.
        trainer: The resident model; may be shared between simulated sites.
        ledger: Durable record of what it has released.
        provenance: Digests of what it holds.
    """

    def __init__(
        self,
        policy: SitePolicy,
        units: UnitIndex,
        trainer: LocalTrainer,
        ledger: Ledger,
        provenance: Provenance,
    ) -> None:
        self.policy = policy
        self._units = units
        self._trainer = trainer
        self._ledger = ledger
        self._provenance = provenance
        self._released: tuple[tuple[str, int], Parts] | None = None

    def status(self) -> SiteStatus:
        """Announce the site; every field is public."""
        policy = self.policy
        return SiteStatus(
            client=policy.client,
            declared_size=policy.declared_size,
            noise_multiplier=policy.noise_multiplier,
            delta=policy.delta if policy.mode == "dp" else 0.0,
            provenance=self._provenance,
        )

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        """Answer each job, in order, with an update or a code.

        Guarantees:
            In mode ``dp`` the round's events are durable in the ledger before
            the first gradient, and committed before the update is returned. An
            interrupted round counts as spent in full, and is not done again; a
            job that was answered before gets the same update. Whatever goes wrong, only
            a code of `fedlr.training.jobs.ABSTENTION_CODES` and the ε spent are
            returned; the reason is logged on the site's own console. Not to be
            called from two threads at once: the model is shared.
        """
        return [self._answer(job) for job in jobs]

    def _answer(self, job: Job) -> ClientUpdate | Abstention:
        try:
            if job.provenance != self._provenance:
                return self._abstain("provenance")
            if not job.train and not self._has_released(job):
                return self._abstain("no_release")
            if problem := self._problem(job):
                _log.error("%s: the job does not fit: %s", self.policy.client, problem)
                return self._abstain("bad_job")
            return self._train(job) if job.train else self._project(job)
        except LedgerError as error:
            _log.error("%s: the ledger refuses: %s", self.policy.client, error)
            return self._abstain("ledger")
        except Exception:
            _log.exception("%s: the round failed", self.policy.client)
            return self._fail()

    def _problem(self, job: Job) -> str | None:
        """Say what is wrong with a job, before anything is reserved for it."""
        try:
            if job.train:
                self._key(job)
                self._trainer.check(job.parts, job.train)
                if not job.send or job.send - job.train:
                    return f"send = {sorted(job.send)} must be among train = {sorted(job.train)}"
            else:
                self._check_projection(job)
        except ValueError as error:
            return str(error)
        return None

    def _train(self, job: Job) -> ClientUpdate | Abstention:
        """Reserve, train, commit; stop before a round that would exceed the budget."""
        policy = self.policy
        if policy.mode == "none":
            return self._update(job, self._run(job, None), None)
        key, digest = self._key(job), job_digest(job)
        booking = self._ledger.recall(key)
        if booking is not None and (policy.mode == "dp" or booking.committed):
            return self._repeat(job, digest, booking)
        mechanism = self._mechanism(job)
        steps = self._trainer.settings.steps
        release = Release(policy.noise_multiplier, policy.sample_rate, steps, policy.unit)
        if booking is None:
            if self._ledger.joins() >= policy.max_joins:
                return self._abstain("max_joins")
            spent = self._epsilon(release)
            if policy.mode == "dp" and spent > policy.epsilon:
                return self._abstain("budget")
            if not self._ledger.reserve(key, release, policy.max_joins, digest):
                return self._abstain("max_joins")
        else:
            # A dry job that was cut short has nothing to pay: it is done again.
            spent = self._epsilon()
        trained = self._run(job, mechanism)
        self._ledger.commit(key, release, safetensors.torch.save(_named(trained)))
        return self._update(job, trained, spent)

    def _repeat(self, job: Job, digest: str, booking: Booking) -> ClientUpdate | Abstention:
        """Answer a job that the ledger knows with what was already paid for, or not at all."""
        if booking.job != digest:
            _log.error("%s: another job has this nonce", self.policy.client)
            return self._abstain("ledger")
        if not booking.committed:
            return self._abstain("forfeited")
        if booking.update is None:
            _log.error("%s: a later round has replaced this update", self.policy.client)
            return self._abstain("ledger")
        saved = safetensors.torch.load(booking.update)
        trained = {key: saved[_name(key)] for key in self._trained_keys(job)}
        return self._update(job, trained, self._epsilon())

    def _update(self, job: Job, trained: Parts, spent: float | None) -> ClientUpdate:
        """Return what leaves the site; what it does not send stays for a projecting phase."""
        self._released = ((job.run, job.round), trained)
        sent = {key: value for key, value in trained.items() if key.role in job.send}
        steps = self._trainer.settings.steps
        return ClientUpdate(client=self.policy.client, parts=sent, steps=steps, epsilon=spent)

    def _mechanism(self, job: Job) -> Mechanism:
        policy = self.policy
        return Mechanism(
            clip_norm=policy.clip_norm,
            groups=clip_groups(self._trained_keys(job), policy.clip_norm, policy.head_share),
            noise_multiplier=policy.noise_multiplier,
            expected_batch=policy.expected_batch,
        )

    def _epsilon(self, *planned: Release) -> float:
        """Return ε of everything in the ledger and of what is planned."""
        events = (*self._ledger.spent(), *planned)
        return epsilon(events, self.policy.delta, self.policy.accountant)

    def _run(self, job: Job, mechanism: Mechanism | None) -> dict[PartKey, torch.Tensor]:
        sampling, noise = self._streams(job)
        task = LocalTask(
            parts=job.parts,
            train=job.train,
            sample_rate=self.policy.sample_rate,
            mechanism=mechanism,
            sampling=sampling,
            noise=noise,
        )
        return self._trainer.train(task, self._units)

    def _streams(self, job: Job) -> tuple[Stream, Stream]:
        """Two streams of this task alone: secret under dp, public otherwise."""
        if self.policy.mode == "dp":
            return secret_stream(), secret_stream()
        labels = (self.policy.public_seed, self.policy.client, job.round, job.phase)
        return public_stream("sampling", *labels), public_stream("noise", *labels)

    def _project(self, job: Job) -> ClientUpdate:
        """Answer a projecting phase: rotationᵀ·B of what was released in this round."""
        released = self._released_parts()
        cores = {
            PartKey(key.site, Role.CORE): rotation.T @ released[PartKey(key.site, Role.B)]
            for key, rotation in job.parts.items()
        }
        return ClientUpdate(client=self.policy.client, parts=cores, steps=0)

    def _check_projection(self, job: Job) -> None:
        """Raise ValueError unless the job asks for cores of released B's, and of nothing else."""
        released = self._released_parts()
        if job.send != frozenset({Role.CORE}) or not job.parts:
            raise ValueError("a projecting phase brings rotations and sends cores")
        for key, rotation in job.parts.items():
            b = released.get(PartKey(key.site, Role.B))
            if key.role is not Role.ROTATION or b is None:
                raise ValueError(f"{key.site}/{key.role} projects nothing that was released")
            if rotation.ndim != 2 or rotation.shape[0] != b.shape[0]:
                raise ValueError(f"{key.site}/{key.role} has shape {tuple(rotation.shape)}")

    def _has_released(self, job: Job) -> bool:
        return self._released is not None and self._released[0] == (job.run, job.round)

    def _released_parts(self) -> Parts:
        return {} if self._released is None else self._released[1]

    def _key(self, job: Job) -> JobKey:
        return JobKey(job.run, job.round, self.policy.client, job.nonce)

    def _trained_keys(self, job: Job) -> list[PartKey]:
        return [key for key in job.parts if key.role in job.train]

    def _abstain(self, code: str) -> Abstention:
        return Abstention(self.policy.client, code)

    def _fail(self) -> Abstention:
        """Answer ``failed`` with the ε spent: what was booked for the round stays paid."""
        if self.policy.mode == "none":
            return self._abstain("failed")
        try:
            return Abstention(self.policy.client, "failed", self._epsilon() or None)
        except LedgerError as error:
            _log.error("%s: the ledger cannot be read: %s", self.policy.client, error)
            return self._abstain("failed")


def _name(key: PartKey) -> str:
    return f"{key.site}|{key.role.value}"


def _named(parts: Parts) -> dict[str, torch.Tensor]:
    return {_name(key): value.detach().cpu().contiguous() for key, value in parts.items()}
