"""What a site's operator allows. A job can only ask for less: whoever may submit one could
otherwise burn a site's lifetime budget with it.

A policy file is TOML, written by the operator and read by nobody else::

    client = "hospital-a"
    declared_size = 11000            # N; must be what the run declares for this client
    unit = "user"                    # or "example"
    rows_per_user = 16               # rows of one user that a step uses at most

    [budget]
    delta = 1e-6                     # largest δ that a run may promise at
    epsilon_total = 10.0             # over everything in the ledger
    epsilon_per_run = 8.0
    epsilon_per_month = 9.0          # the last thirty days
    max_joins = 40

    [allow]
    train = ["b", "head"]            # roles that jobs may train
    bases = ["53aa51…"]              # sha256 of base weights
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedlr import checks
from fedlr.errors import ConfigError
from fedlr.methods.method import Role
from fedlr.privacy.accounting import Accountant
from fedlr.privacy.events import UNITS
from fedlr.training.jobs import Job


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
        max_joins: Rounds this site may join before it stops.
        accountant: Accountant of the reported ε.
        public_seed: Seed of Poisson draws where ``mode`` is not ``dp``.
        train: Roles that jobs may train; None allows all.
        bases: sha256 of base weights that jobs may be made for; None allows all.
        rows_per_user: Rows of one user that a step uses at most; None has no bound of
            its own.
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
    train: frozenset[Role] | None = None
    bases: frozenset[str] | None = None
    rows_per_user: int | None = None

    def __post_init__(self) -> None:
        checks.one_of("mode", self.mode, ("dp", "dry", "none"))
        checks.at_least("declared_size", self.declared_size, 0)
        checks.at_least("expected_batch", self.expected_batch, 1)
        checks.positive("clip_norm", self.clip_norm)
        checks.non_negative("noise_multiplier", self.noise_multiplier)
        checks.at_least("max_joins", self.max_joins, 1)
        checks.positive("epsilon", self.epsilon)
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

    def refuses(self, job: Job) -> str | None:
        """Say why ``job`` is not allowed, None if it is; budgets are the ledger's matter."""
        if self.train is not None and (extra := job.train - self.train):
            return f"train = {sorted(extra)} is not among {sorted(self.train)}"
        if self.bases is not None and job.provenance.base not in self.bases:
            return f"base = {job.provenance.base} is not among the allowed base models"
        return None


_TOP = ("client", "declared_size", "unit", "rows_per_user", "budget", "allow")
_BUDGET = ("delta", "epsilon_total", "epsilon_per_run", "epsilon_per_month", "max_joins")
_ALLOW = ("train", "bases")


@dataclass(frozen=True)
class Limits:
    """The content of a policy file; None where it says nothing.

    Attributes:
        client: Whose policy it is.
        declared_size: N.
        unit: Unit of privacy.
        rows_per_user: Rows of one user that a step uses at most.
        delta: Largest δ.
        epsilon_total: Largest ε over everything in the ledger.
        epsilon_per_run: Largest ε of one run.
        epsilon_per_month: Largest ε of thirty days.
        max_joins: Most rounds in the ledger.
        train: Roles that may be trained.
        bases: sha256 of base weights that may be trained on.
    """

    client: str | None = None
    declared_size: int | None = None
    unit: str | None = None
    rows_per_user: int | None = None
    delta: float | None = None
    epsilon_total: float | None = None
    epsilon_per_run: float | None = None
    epsilon_per_month: float | None = None
    max_joins: int | None = None
    train: frozenset[Role] | None = None
    bases: frozenset[str] | None = None


def read_limits(path: Path) -> Limits:
    """Return what a policy file allows.

    Raises:
        ConfigError: It cannot be read, is no TOML, or has a key or value that is not
            known; all problems at once. A key that is ignored could be the one that counts.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"policy {path} cannot be read: {error.strerror or error}"]) from error
    except ValueError as error:
        raise ConfigError([f"policy {path} is no TOML: {error}; correct it"]) from error
    flat, problems = _flatten(values)
    for name, check in _CHECKS.items():
        if name in flat:
            try:
                flat[name] = check(name, flat[name])
            except (ValueError, TypeError) as error:
                problems.append(str(error))
    if problems:
        raise ConfigError([f"policy {path}: {problem}" for problem in problems])
    return Limits(**flat)


def tighten(policy: SitePolicy, limits: Limits) -> SitePolicy:
    """Return ``policy`` with the smaller of each bound.

    Raises:
        ConfigError: The run is not private, or the file is another client's, declares
            another size or unit than the run, or a smaller δ: noise was calibrated for
            the run's.
    """
    problems = []
    if policy.mode != "dp":
        problems.append(
            f"the policy of {policy.client} allows private training alone, the run has "
            f"privacy.mode = {policy.mode}; set privacy=dp, or take the file away"
        )
    for name in ("client", "declared_size", "unit"):
        wanted, found = getattr(limits, name), getattr(policy, name)
        if wanted is not None and wanted != found:
            problems.append(
                f"the policy of {policy.client} says {name} = {wanted!r}, the run {found!r}; make "
                "them agree"
            )
    if limits.delta is not None and policy.delta > limits.delta:
        problems.append(
            f"the policy of {policy.client} allows δ ≤ {limits.delta:g}, the run promises at "
            f"{policy.delta:g}; lower privacy.delta"
        )
    if problems:
        raise ConfigError(problems)
    return replace(
        policy,
        epsilon=_least(policy.epsilon, limits.epsilon_total),
        epsilon_per_run=limits.epsilon_per_run,
        epsilon_per_month=limits.epsilon_per_month,
        max_joins=_least(policy.max_joins, limits.max_joins),
        rows_per_user=limits.rows_per_user,
        train=limits.train,
        bases=limits.bases,
    )


def _least(one: Any, other: Any) -> Any:
    return one if other is None else min(one, other)


def _flatten(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all sections by name, and what is not known."""
    flat, problems = {}, []
    for place, known in (("", _TOP), ("budget", _BUDGET), ("allow", _ALLOW)):
        section = values.get(place, {}) if place else values
        if not isinstance(section, Mapping):
            problems.append(f"{place} = {section!r} must be a section, [{place}]")
            continue
        for name, value in section.items():
            if name not in known:
                label = f"{place}.{name}" if place else name
                problems.append(f"there is no {label}; known are {', '.join(known)}")
            elif name not in ("budget", "allow"):
                flat[name] = value
    return flat, problems


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {value!r} must be a text")
    return value


def _texts(name: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{name} = {value!r} must be a list of texts, not empty")
    return frozenset(value)


def _roles(name: str, value: Any) -> frozenset[Role]:
    known = [role.value for role in Role]
    return frozenset(Role(checks.one_of(name, text, known)) for text in _texts(name, value))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r} must be an integer")
    return checks.at_least(name, value, 1)


def _bound(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} = {value!r} must be a number")
    return checks.positive(name, float(value))


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "client": _text,
    "declared_size": _whole,
    "unit": lambda name, value: checks.one_of(name, value, UNITS),
    "rows_per_user": _whole,
    "delta": lambda name, value: checks.in_range(name, _bound(name, value), 0.0, 0.5),
    "epsilon_total": _bound,
    "epsilon_per_run": _bound,
    "epsilon_per_month": _bound,
    "max_joins": _whole,
    "train": _roles,
    "bases": _texts,
}
