"""What a site's operator allows, in a file of their own. A job can only ask for less: whoever
may submit one could otherwise burn a site's lifetime budget with it.

A policy file is TOML, written by the operator and read by nobody else::

    client = "hospital-a"
    declared_size = 11000            # N; must be what the run declares for this client
    unit = "user"                    # or "example"
    rows_per_user = 16               # rows of one user that a step uses at most
    labels = ["no", "yes"]           # the label list, in order
    source_id = "ward-7"             # of which data the ledger tells
    ledger = "ward-7.sqlite"         # beside this file; holds every release of these data, over
                                     # all runs. `fedlr ledger new` makes one. Without it a
                                     # simulated run has a ledger of its own.

    [budget]
    delta = 1e-6                     # largest δ that a run may promise at
    epsilon_total = 10.0             # over everything in the ledger
    epsilon_per_run = 8.0
    epsilon_per_month = 9.0          # the last thirty days
    max_joins = 40                   # rounds in the ledger

    [allow]
    methods = ["fedsvd"]
    train = ["b", "head"]            # roles that jobs may train
    bases = ["53aa51…"]              # sha256 of base weights
    max_rank = 4                     # columns of an adapter that jobs may train
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlr import checks
from fedlr.errors import ConfigError
from fedlr.methods.method import Role
from fedlr.privacy.events import UNITS

_TOP = (
    *("client", "declared_size", "unit", "rows_per_user", "labels", "source_id", "ledger"),
    *("budget", "allow"),
)
_BUDGET = ("delta", "epsilon_total", "epsilon_per_run", "epsilon_per_month", "max_joins")
_ALLOW = ("methods", "train", "bases", "max_rank")


@dataclass(frozen=True)
class Declared:
    """What a run says of one of its clients, to be held against the client's policy.

    Attributes:
        client: Its name.
        mode: ``dp``, ``dry`` or ``none``.
        declared_size: N.
        unit: Unit of privacy.
        delta: δ.
        method: Name of the method.
        labels: The label list, in order; None where it is not known yet, and no policy's
            list is held against it.
        columns: Columns of an adapter that every client must train; None where the method
            gives a client as many as it can train.
    """

    client: str
    mode: str
    declared_size: int
    unit: str
    delta: float
    method: str
    labels: tuple[str, ...] | None
    columns: int | None = None


@dataclass(frozen=True)
class Limits:
    """The content of a policy file; None where it says nothing.

    Attributes:
        client: Whose policy it is.
        declared_size: N.
        unit: Unit of privacy.
        rows_per_user: Rows of one user that a step uses at most.
        labels: The label list.
        source_id: Identifier of the data, as in their ledger.
        ledger: Absolute path of the ledger of these data, over all runs.
        delta: Largest δ.
        epsilon_total: Largest ε over everything in the ledger.
        epsilon_per_run: Largest ε of one run.
        epsilon_per_month: Largest ε of thirty days.
        max_joins: Most rounds in the ledger.
        methods: Methods that may be run.
        train: Roles that may be trained.
        bases: sha256 of base weights that may be trained on.
        max_rank: Most columns of an adapter that may be trained.
    """

    client: str | None = None
    declared_size: int | None = None
    unit: str | None = None
    rows_per_user: int | None = None
    labels: tuple[str, ...] | None = None
    source_id: str | None = None
    ledger: Path | None = None
    delta: float | None = None
    epsilon_total: float | None = None
    epsilon_per_run: float | None = None
    epsilon_per_month: float | None = None
    max_joins: int | None = None
    methods: frozenset[str] | None = None
    train: frozenset[Role] | None = None
    bases: frozenset[str] | None = None
    max_rank: int | None = None

    def canonical(self) -> tuple[tuple[str, object], ...]:
        """Return every value by name, sets in sorted order: equal exactly for equal limits."""
        return tuple(
            (name, sorted(value) if isinstance(value, frozenset) else value)
            for name, value in vars(self).items()
        )

    def conflicts(self, run: Declared) -> list[str]:
        """Return why a run cannot be had under this policy, one sentence each; empty if it can.

        The run is not private, or the file is another client's, declares another size,
        unit or label list, allows other methods, fewer columns than the method can do
        with, or a smaller δ: the run's noise was calibrated for its own.
        """
        problems = []
        if run.mode != "dp":
            problems.append(
                f"the policy of {run.client} allows private training alone, the run has "
                f"privacy.mode = {run.mode}; set privacy=dp, or take the file away"
            )
        for name in ("client", "declared_size", "unit", "labels"):
            wanted, found = getattr(self, name), getattr(run, name)
            if None not in (wanted, found) and wanted != found:
                problems.append(
                    f"the policy of {run.client} says {name} = {_shown(wanted)}, the run "
                    f"{_shown(found)}; make them agree"
                )
        if self.methods is not None and run.method not in self.methods:
            problems.append(
                f"the policy of {run.client} allows the methods {', '.join(sorted(self.methods))}, "
                f"the run has {run.method}; choose another method"
            )
        if self.max_rank is not None and run.columns is not None and self.max_rank < run.columns:
            problems.append(
                f"the policy of {run.client} allows max_rank = {self.max_rank}, but method "
                f"{run.method} gives every client all {run.columns} columns; take a method that "
                f"mixes ranks, such as fedsvd, or set adapter.rank={self.max_rank}"
            )
        if self.delta is not None and run.delta > self.delta:
            problems.append(
                f"the policy of {run.client} allows δ ≤ {self.delta:g}, the run promises at "
                f"{run.delta:g}; lower privacy.delta"
            )
        return problems


def read_limits(path: Path) -> Limits:
    """Return what a policy file allows.

    Raises:
        ConfigError: As `read_toml` and `limits_of`.
    """
    return limits_of(read_toml(path), path)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a policy file; ConfigError where it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"policy {path} cannot be read: {error.strerror or error}"]) from error
    except ValueError as error:
        raise ConfigError([f"policy {path} is no TOML: {error}; correct it"]) from error


def limits_of(values: Mapping[str, Any], path: Path) -> Limits:
    """Return what the content of a policy file allows.

    Args:
        values: The content.
        path: The file, beside which a relative ledger lies.

    Raises:
        ConfigError: A key or value that is not known; all problems at once. A key that is
            ignored could be the one that counts.
    """
    flat, problems = _flatten(values)
    for name, check in _CHECKS.items():
        if name in flat:
            try:
                flat[name] = check(name, flat[name])
            except (ValueError, TypeError) as error:
                problems.append(str(error))
    problems += _about_ledger(flat)
    if problems:
        raise ConfigError([f"policy {path}: {problem}" for problem in problems])
    if "ledger" in flat:
        flat["ledger"] = (path.absolute().parent / flat["ledger"]).resolve()
    return Limits(**flat)


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


def _about_ledger(flat: Mapping[str, Any]) -> list[str]:
    """Return what a policy lacks that names a ledger: whose it is, and how much it may hold."""
    if "ledger" not in flat:
        return []
    needed = {
        "source_id": "source_id",
        "epsilon_total": "budget.epsilon_total",
        "delta": "budget.delta",  # or a run's own δ would decide what the budget means
    }
    return [
        f"ledger = {str(flat['ledger'])!r} needs {label} beside it; add it"
        for name, label in needed.items()
        if name not in flat
    ]


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {value!r} must be a text")
    return value


def _texts(name: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{name} = {value!r} must be a list of texts, not empty")
    return frozenset(value)


def _in_order(name: str, value: Any) -> tuple[str, ...]:
    _texts(name, value)
    return tuple(value)


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
    "labels": _in_order,
    "source_id": _text,
    "ledger": lambda name, value: Path(_text(name, value)).expanduser(),
    "delta": lambda name, value: checks.in_range(name, _bound(name, value), 0.0, 0.5),
    "epsilon_total": _bound,
    "epsilon_per_run": _bound,
    "epsilon_per_month": _bound,
    "max_joins": _whole,
    "methods": _texts,
    "train": _roles,
    "bases": _texts,
    "max_rank": _whole,
}
