"""What a site keeps to in one run: the terms of the run, and what its operator allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from fedlr import checks
from fedlr.config import RunConfig
from fedlr.methods.method import PartKey, Role
from fedlr.planning import ClientPlan, max_joins
from fedlr.privacy.accounting import Accountant
from fedlr.privacy.limits import Limits
from fedlr.training.jobs import Job, Provenance, SiteStatus


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
        epsilon: ε that no round may take this site above, over everything in its ledger.
        epsilon_per_run: The same for one run; None sets no bound of its own.
        epsilon_per_month: The same for the last thirty days; None likewise.
        unit: Unit of privacy.
        max_joins: Rounds of one run that this site may join before it stops.
        accountant: Accountant of the reported ε.
        public_seed: Seed of Poisson draws where ``mode`` is not ``dp``.
        max_joins_total: Rounds of all runs in its ledger that it may join; None has no
            bound of its own.
        train: Roles that jobs may train; None allows all.
        bases: sha256 of base weights that jobs may be made for; None allows all.
        rows_per_user: Rows of one user that a step uses at most; None has no bound of
            its own.
        max_rank: Most columns of a B (rows of an A) that it trains, ≥ 1; None has no bound.
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
    epsilon_per_run: float | None = None
    epsilon_per_month: float | None = None
    max_joins_total: int | None = None
    train: frozenset[Role] | None = None
    bases: frozenset[str] | None = None
    rows_per_user: int | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        checks.one_of("mode", self.mode, ("dp", "dry", "none"))
        checks.at_least("declared_size", self.declared_size, 0)
        checks.at_least("expected_batch", self.expected_batch, 1)
        checks.positive("clip_norm", self.clip_norm)
        checks.non_negative("noise_multiplier", self.noise_multiplier)
        checks.at_least("max_joins", self.max_joins, 1)
        checks.positive("epsilon", self.epsilon)
        if self.max_rank is not None:
            checks.at_least("max_rank", self.max_rank, 1)
        for name in ("epsilon_per_run", "epsilon_per_month"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        if (self.mode == "dp") != (self.noise_multiplier > 0):
            raise ValueError(
                f"noise_multiplier = {self.noise_multiplier} does not fit mode = {self.mode!r}: it "
                "must be > 0 in mode dp and 0 in the others"
            )

    @property
    def sample_rate(self) -> float:
        """q = min(1, L/N); 1 where nothing is declared."""
        return min(1.0, self.expected_batch / max(1, self.declared_size))

    def status(self, provenance: Provenance) -> SiteStatus:
        """Return what the site announces of itself, given what it holds; every field is public."""
        return SiteStatus(
            client=self.client,
            declared_size=self.declared_size,
            noise_multiplier=self.noise_multiplier,
            delta=0.0 if self.mode == "none" else self.delta,
            provenance=provenance,
            rank=self.max_rank,
        )

    def refuses(self, job: Job) -> str | None:
        """Say why ``job`` is not allowed, None if it is; budgets are the ledger's matter."""
        if self.train is not None and (extra := job.train - self.train):
            return f"train = {sorted(extra)} is not among {sorted(self.train)}"
        if self.bases is not None and job.provenance.base not in self.bases:
            return f"base = {job.provenance.base} is not among the allowed base models"
        widest = max((_columns(key, value) for key, value in job.parts.items()), default=0)
        if self.max_rank is not None and widest > self.max_rank:
            return f"the job has {widest} columns, of which {self.max_rank} are allowed"
        return None


def terms_of_run(config: RunConfig, client: ClientPlan, max_rank: int | None = None) -> SitePolicy:
    """Return the terms of a run for one of its clients, before its operator tightens them."""
    privacy = config.privacy
    return SitePolicy(
        client=client.name,
        mode=privacy.mode,
        declared_size=client.declared_size,
        expected_batch=config.optimizer.expected_batch,
        clip_norm=privacy.clip_norm,
        head_share=privacy.head_share,
        noise_multiplier=client.noise_multiplier,
        delta=client.delta,
        epsilon=privacy.epsilon,
        unit=privacy.unit,
        max_joins=max_joins(config),
        accountant=privacy.accountant,
        public_seed=config.seed,
        max_rank=max_rank,
    )


def tighten(policy: SitePolicy, limits: Limits) -> SitePolicy:
    """Return ``policy`` with the smaller of each bound.

    A site with a ledger over all runs keeps to the operator's bounds in all of it, and
    to the run's own within the run.
    """
    of_run = limits.epsilon_per_run
    total = _least(policy.epsilon, limits.epsilon_total)
    if limits.ledger is not None:
        of_run = _least(policy.epsilon, of_run)
        total = _least(math.inf, limits.epsilon_total)
    return replace(
        policy,
        epsilon=total,
        epsilon_per_run=of_run,
        epsilon_per_month=limits.epsilon_per_month,
        max_joins_total=limits.max_joins,
        rows_per_user=limits.rows_per_user,
        train=limits.train,
        bases=limits.bases,
        max_rank=_least(policy.max_rank, limits.max_rank),
    )


def _columns(key: PartKey, value: Tensor) -> int:
    """Return the rank that an array gives its site, 0 for one that gives none."""
    axis = {Role.A: 0, Role.B: 1, Role.CORE: 1}.get(key.role)
    return 0 if axis is None or value.ndim != 2 else value.shape[axis]


def _least(one: Any, other: Any) -> Any:
    return min((bound for bound in (one, other) if bound is not None), default=None)
