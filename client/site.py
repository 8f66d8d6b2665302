"""The site: the trust boundary that owns data, ledger, noise and policy.

Jobs come in, noised updates or fixed codes go out; nothing else. The same object
is called directly in a simulation and behind an agent on a real node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import safetensors.numpy

from client.policy import SitePolicy
from fedlr.adapters import codec
from fedlr.data.batching import UnitIndex
from fedlr.errors import LedgerError, LedgerMoved
from fedlr.methods.method import ClientUpdate, PartKey, Parts, Role
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.booking import DAY_S, MONTH_DAYS, Booking, History, JobKey, Ledger
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.events import Release
from fedlr.privacy.noise import Stream, task_streams
from fedlr.training.downlink import Basis, completed
from fedlr.training.jobs import Abstention, Job, Provenance, SiteStatus, job_digest
from fedlr.training.local import LocalTask, LocalTrainer

__all__ = ["Prepared", "Site", "SitePolicy"]

_log = logging.getLogger("fedlr.site")

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A job that is booked and waits to be trained.

    Attributes:
        client: Whose it is.
        job: The job.
        task: What to train, with streams of its own.
        epsilon: ε spent with it; None where privacy is off.
    """

    client: str
    job: Job
    task: LocalTask
    epsilon: float | None


class Site:
    """One participant.

    Attributes:
        policy: What its operator declares.
        trainer: The resident model.
        units: Its rows by unit of privacy.

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
        self.units = units
        self.trainer = trainer
        self._ledger = ledger
        self._provenance = provenance
        self._released: tuple[tuple[str, int], Parts] | None = None
        self._basis: Basis | None = None

    def status(self) -> SiteStatus:
        """Announce the site; every field is public."""
        return self.policy.status(self._provenance)

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
        found = self.prepare(job)
        if not isinstance(found, Prepared):
            return found
        trained = self._guarded(lambda: self.trainer.train(found.task, self.units))
        return trained if isinstance(trained, Abstention) else self.complete(found, trained)

    def prepare(self, job: Job) -> Prepared | ClientUpdate | Abstention:
        """Check and book a job: all that comes before its first gradient.

        Returns:
            What is to be trained and then handed to `complete`, booked already; or the
            answer, where nothing is to be trained.
        """
        return self._guarded(lambda: self._prepare(job))

    def complete(self, prepared: Prepared, trained: Parts) -> ClientUpdate | Abstention:
        """Commit what was trained for a job that `prepare` booked; return what leaves the site."""
        return self._guarded(lambda: self._complete(prepared, trained))

    def failed(self) -> Abstention:
        """Answer a job that `prepare` booked and nobody could train: it is spent."""
        return self._abstain("failed")

    def _guarded(self, work: Callable[[], T]) -> T | Abstention:
        try:
            return work()
        except LedgerError as error:
            _log.error("%s: the ledger refuses: %s", self.policy.client, error)
            return self._abstain("ledger")
        except Exception:
            _log.exception("%s: the round failed", self.policy.client)
            return self._abstain("failed")

    def _prepare(self, job: Job) -> Prepared | ClientUpdate | Abstention:
        if job.provenance != self._provenance:
            return self._abstain("provenance")
        if job.rotated is not None:
            return self._complete_job(job)
        released = {} if job.train else self._released_in(job)
        if released is None:
            return self._abstain("no_release")
        if problem := self._problem(job, released):
            return self._bad_job(problem)
        if refusal := self.policy.refuses(job):
            _log.error("%s: the policy does not allow it: %s", self.policy.client, refusal)
            return self._abstain("policy")
        return self._booked(job) if job.train else self._project(job, released)

    def _complete_job(self, job: Job) -> Prepared | ClientUpdate | Abstention:
        """Go on with the job whose A's the rotations stand for; nothing is booked before."""
        try:
            # Before the product: a basis of another shape could make it as large as memory.
            basis = {key: value for key, value in job.parts.items() if key.role is Role.A}
            self.trainer.check(basis, frozenset())
            found = completed(job, self._basis)
        except ValueError as error:
            return self._bad_job(error)
        if found is None:
            return self._abstain("no_base")
        whole, used = found
        answer = self._prepare(whole)
        if not isinstance(answer, Abstention) or answer.code not in ("bad_job", "policy"):
            self._basis = used
        return answer

    def _bad_job(self, problem: object) -> Abstention:
        _log.error("%s: the job does not fit: %s", self.policy.client, problem)
        return self._abstain("bad_job")

    def _problem(self, job: Job, released: Parts) -> str | None:
        """Say what is wrong with a job, before anything is reserved for it."""
        try:
            if job.train:
                self._key(job)
                self.trainer.check(job.parts, job.train)
                if not job.send or job.send - job.train:
                    return f"send = {sorted(job.send)} must be among train = {sorted(job.train)}"
            else:
                self._check_projection(job, released)
        except ValueError as error:
            return str(error)
        return None

    def _booked(self, job: Job) -> Prepared | ClientUpdate | Abstention:
        """Reserve; stop before a round that would exceed the budget."""
        policy = self.policy
        if policy.mode == "none":
            return Prepared(policy.client, job, self._task(job, None), None)
        key, digest = self._key(job), job_digest(job)
        booking = self._ledger.recall(key)
        if booking is not None and (policy.mode == "dp" or booking.committed):
            return self._repeat(job, digest, booking)
        mechanism = self._mechanism(job)
        if booking is None:
            self._ledger.check_room(codec.size_in_bytes(_trained(job)))
            spent = self._book(job.run, key, self._release(), digest)
            if isinstance(spent, str):
                return self._abstain(spent)
        else:
            # A dry job that was cut short has nothing to pay: it is done again.
            spent = self._epsilon()
        return Prepared(policy.client, job, self._task(job, mechanism), spent)

    def _complete(self, prepared: Prepared, trained: Parts) -> ClientUpdate:
        """Commit what was trained, and only then let it leave."""
        if prepared.client != self.policy.client:
            raise ValueError(f"the job was booked by {prepared.client}, not by this site")
        if self.policy.mode != "none":
            update = safetensors.numpy.save(codec.encode(trained))
            self._ledger.commit(self._key(prepared.job), self._release(), update)
        return self._update(prepared.job, trained, prepared.epsilon)

    def _release(self) -> Release:
        """Return the events of one round."""
        policy, steps = self.policy, self.trainer.settings.steps
        return Release(policy.noise_multiplier, policy.sample_rate, steps, policy.unit)

    def _book(self, run: str, key: JobKey, release: Release, digest: str) -> float | str:
        """Reserve a release and return ε with it, or the code of the bound that forbids it.

        ε is computed outside any lock; if another process booked something meanwhile,
        it is computed again, so that two of them cannot exceed a budget jointly.
        """
        policy = self.policy
        while True:
            history = self._ledger.history()
            if self._ledger.joins(run) >= policy.max_joins:
                return "max_joins"
            spent = self._epsilon_of(history.events(), release)
            if policy.mode == "dp" and (code := self._over_budget(history, run, release, spent)):
                return code
            try:
                total = policy.max_joins_total
                booked = self._ledger.reserve(key, release, total, digest, history.head)
            except LedgerMoved:
                continue
            return spent if booked else "max_joins"

    def _over_budget(
        self, history: History, run: str, release: Release, spent: float
    ) -> str | None:
        """Return the code of the first budget that ``release`` would exceed."""
        policy = self.policy
        if spent > policy.epsilon:
            return "budget"
        of_run, month = policy.epsilon_per_run, policy.epsilon_per_month
        if of_run is not None and self._epsilon_of(history.events(run=run), release) > of_run:
            return "run_budget"
        since = int(time.time()) // DAY_S - MONTH_DAYS + 1
        if month is not None and self._epsilon_of(history.events(since=since), release) > month:
            return "month_budget"
        return None

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
        return self._update(job, _decoded(booking.update), self._epsilon())

    def _update(self, job: Job, trained: Parts, spent: float | None) -> ClientUpdate:
        """Return what leaves the site; what it does not send stays for a projecting phase."""
        self._released = ((job.run, job.round), trained)
        sent = {key: value for key, value in trained.items() if key.role in job.send}
        steps = self.trainer.settings.steps
        return ClientUpdate(client=self.policy.client, parts=sent, steps=steps, epsilon=spent)

    def _mechanism(self, job: Job) -> Mechanism:
        policy = self.policy
        return Mechanism(
            clip_norm=policy.clip_norm,
            groups=clip_groups(list(_trained(job)), policy.clip_norm, policy.head_share),
            noise_multiplier=policy.noise_multiplier,
            expected_batch=policy.expected_batch,
        )

    def _epsilon(self) -> float:
        """Return ε of everything in the ledger."""
        return self._epsilon_of(self._ledger.spent())

    def _epsilon_of(self, events: Sequence[Release], *planned: Release) -> float:
        """Return ε of some events and of what is planned."""
        return epsilon((*events, *planned), self.policy.delta, self.policy.accountant)

    def _task(self, job: Job, mechanism: Mechanism | None) -> LocalTask:
        sampling, noise = self._streams(job)
        return LocalTask(
            parts=job.parts,
            train=job.train,
            sample_rate=self.policy.sample_rate,
            mechanism=mechanism,
            sampling=sampling,
            noise=noise,
            rows_per_user=self.policy.rows_per_user,
        )

    def _streams(self, job: Job) -> tuple[Stream, Stream]:
        """Two streams of this task alone: secret under dp, public otherwise."""
        policy = self.policy
        labels = (policy.public_seed, policy.client, job.round, job.phase)
        return task_streams(policy.mode == "dp", *labels)

    def _project(self, job: Job, released: Parts) -> ClientUpdate:
        """Answer a projecting phase: rotationᵀ·B of what was released in this round."""
        cores = {
            PartKey(key.site, Role.CORE): rotation.T @ released[PartKey(key.site, Role.B)]
            for key, rotation in job.parts.items()
        }
        return ClientUpdate(client=self.policy.client, parts=cores, steps=0)

    def _check_projection(self, job: Job, released: Parts) -> None:
        """Raise ValueError unless the job asks for cores of released B's, and of nothing else."""
        if job.send != frozenset({Role.CORE}) or not job.parts:
            raise ValueError("a projecting phase brings rotations and sends cores")
        for key, rotation in job.parts.items():
            b = released.get(PartKey(key.site, Role.B))
            if key.role is not Role.ROTATION or b is None:
                raise ValueError(f"{key.site}/{key.role} projects nothing that was released")
            if rotation.ndim != 2 or rotation.shape[0] != b.shape[0]:
                raise ValueError(f"{key.site}/{key.role} has shape {tuple(rotation.shape)}")

    def _released_in(self, job: Job) -> Parts | None:
        """Return what was released in the job's round, by this process or an earlier one."""
        if self._released is not None and self._released[0] == (job.run, job.round):
            return self._released[1]
        if self.policy.mode == "none":
            return None
        saved = self._ledger.released(job.run, job.round, self.policy.client)
        return _decoded(saved) if saved else None

    def _key(self, job: Job) -> JobKey:
        return JobKey(job.run, job.round, self.policy.client, job.nonce)

    def _abstain(self, code: str) -> Abstention:
        """Answer with a code and the ε spent, which a round that was cut short has raised."""
        spent = None
        if self.policy.mode != "none":
            try:
                spent = self._epsilon() or None
            except LedgerError as error:
                _log.error("%s: the ledger cannot be read: %s", self.policy.client, error)
            except Exception:
                _log.exception("%s: ε cannot be computed", self.policy.client)
        return Abstention(self.policy.client, code, spent)


def _trained(job: Job) -> Parts:
    return {key: value for key, value in job.parts.items() if key.role in job.train}


def _decoded(update: bytes) -> Parts:
    """Return the parts of an update as the ledger keeps it, in the wire form."""
    return codec.decode(safetensors.numpy.load(update))
