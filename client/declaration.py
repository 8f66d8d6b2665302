"""What the operator of a real site declares, in one TOML file that nobody else writes.

It is the policy of `fedlr.privacy.limits` with what an agent needs beside it::

    client = "hospital-a"
    declared_size = 11000
    unit = "example"
    labels = ["no", "yes"]
    source_id = "ward-7"
    ledger = "ward-7.sqlite"

    [budget]
    delta = 1e-6
    epsilon_total = 10.0
    epsilon_per_run = 4.0

    [allow]
    coordinators = ["8f0c…"]         # public keys; whoever holds one may ask
    approve = true                   # and I look at every run: fedlr site approve <run>
    dry = false                      # runs without noise, on public data alone; the ledger of a
                                     # site that took part in one allows no other run after it

    [data]                           # the settings of conf/data
    path = "ward-7"
    user_column = "patient"

    [model]                          # name, revision and sha256: where the base model is here
    name = "/srv/models/minilm"

    [kernels]                        # the settings of conf/kernels: device, threads, memory

    [agent]
    socket = "door/agent.sock"       # in a folder of its own, which the group below may enter
    group = "flower"                 # of the user who runs the SuperNode
    job_megabytes = 64               # largest job and largest update
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedlr import checks
from fedlr.config import DataConfig, KernelsConfig, ModelConfig, RunConfig, from_mapping
from fedlr.errors import ConfigError
from fedlr.privacy.limits import Limits, limits_of, read_toml
from fedlr.signing import check_public_key

LONGEST_SOCKET = 100
"""Bytes of the path of a Unix socket: Linux takes 107, other systems fewer."""

_SECTIONS = ("data", "model", "kernels", "agent")
_OWN_ALLOW = ("coordinators", "approve", "dry")

_DATA = (
    *("path", "text_columns", "label_column", "user_column"),
    *("train_split", "cache", "public"),
)
"""Settings of ``conf/data`` that a site has, which trains on every row of a file or a split; its
label list is that of the policy."""

_MODEL = ("name", "revision", "sha256")
"""Settings of ``conf/model`` that are a site's own; the others are the run's."""

_KERNELS = tuple(item.name for item in fields(KernelsConfig) if item.name != "fused_clients")

_NEEDED = {
    "client": "client",
    "declared_size": "declared_size",
    "unit": "unit",
    "labels": "labels",
    "source_id": "source_id",
    "ledger": "ledger",
    "delta": "budget.delta",
    "epsilon_total": "budget.epsilon_total",
}
"""What a real site must say, by field of `Limits`."""


@dataclass(frozen=True)
class AgentSettings:
    """How the agent of a site is reached, and how much it takes.

    Attributes:
        socket: Absolute path of its Unix socket, in a folder that holds nothing else; it is
            made, mode 0750, where it is missing.
        group: Group that may connect; None is the agent's own.
        job_megabytes: Largest payload of a job, and of an update, in units of 10⁶ bytes, ≥ 1.
    """

    socket: Path
    group: str | None = None
    job_megabytes: int = 64

    @property
    def job_bytes(self) -> int:
        """Largest payload in bytes."""
        return self.job_megabytes * 1_000_000


@dataclass(frozen=True)
class Declaration:
    """The content of a site's policy file.

    Attributes:
        path: The file, absolute.
        limits: What every run is held against.
        coordinators: Public keys of those who may ask.
        approve: Whether the operator looks at every run before it starts.
        dry: Whether runs without noise are taken, which needs ``data.public``.
        data: Where the rows are.
        model: Where the base model is; only `_MODEL` of it counts.
        kernels: How it is computed here.
        agent: How the agent is reached.
    """

    path: Path
    limits: Limits
    coordinators: frozenset[str]
    approve: bool
    dry: bool
    data: DataConfig
    model: ModelConfig
    kernels: KernelsConfig
    agent: AgentSettings

    @property
    def client(self) -> str:
        """Public name of the site."""
        return str(self.limits.client)

    @property
    def ledger(self) -> Path:
        """Absolute path of its ledger."""
        return Path(str(self.limits.ledger))


def read_declaration(path: Path) -> Declaration:
    """Return what the operator of a site declares.

    Raises:
        ConfigError: The file cannot be read, or something in it is wrong or missing; all
            problems at once.
    """
    return declaration_of(read_toml(path), path)


def declaration_of(values: Mapping[str, Any], path: Path) -> Declaration:
    """Return what the content of a policy file declares.

    Args:
        values: The content.
        path: The file, which need not be there yet; relative places are beside it.

    Raises:
        ConfigError: Something in it is wrong or missing; all problems at once.
    """
    path = path.absolute()
    problems: list[str] = []
    sections = {name: _section(name, values, problems) for name in _SECTIONS}
    allow = _section("allow", values, problems)
    own = {name: allow[name] for name in _OWN_ALLOW if name in allow}
    rest = {name: value for name, value in values.items() if name not in _SECTIONS}
    rest["allow"] = {name: value for name, value in allow.items() if name not in own}
    limits = _limits(rest, path, problems)
    run = _settings(sections, path, problems)
    coordinators = _coordinators(own.get("coordinators"), problems)
    approve, dry = (_flag(f"allow.{name}", own.get(name), problems) for name in ("approve", "dry"))
    if dry and not run.data.public:
        problems.append(
            "allow.dry = true takes runs without noise, but data.public is not true; set it where "
            "the data are public, or take allow.dry away"
        )
    if limits.unit == "user" and "user_column" not in sections["data"]:
        problems.append("unit = 'user' needs data.user_column, the column that tells users apart")
    agent = _agent(sections["agent"], path, problems)
    if problems:
        raise ConfigError([f"policy {path}: {problem}" for problem in problems])
    return Declaration(
        path=path,
        limits=limits,
        coordinators=coordinators,
        approve=approve,
        dry=dry,
        data=run.data,
        model=run.model,
        kernels=run.kernels,
        agent=agent,
    )


def _section(name: str, values: Mapping[str, Any], problems: list[str]) -> Mapping[str, Any]:
    found = values.get(name, {})
    if isinstance(found, Mapping):
        return found
    problems.append(f"{name} = {found!r} must be a section, [{name}]")
    return {}


def _limits(values: Mapping[str, Any], path: Path, problems: list[str]) -> Limits:
    """Return the limits; problems are added, of what a real site must say too."""
    try:
        limits = limits_of(values, path)
    except ConfigError as error:
        start = f"policy {path}: "
        problems += [problem.removeprefix(start) for problem in error.problems]
        return Limits()
    problems += [
        f"{label} is missing; a site that answers strangers must declare it"
        for name, label in _NEEDED.items()
        if getattr(limits, name) is None
    ]
    return limits


def _settings(
    sections: Mapping[str, Mapping[str, Any]], path: Path, problems: list[str]
) -> RunConfig:
    """Return a configuration with the site's own data, model and kernels."""
    for name, known in (("data", _DATA), ("model", _MODEL), ("kernels", _KERNELS)):
        problems += [
            f"there is no {name}.{key} of a site; known are {', '.join(known)}"
            for key in sections[name]
            if key not in known
        ]
    data = {"kind": "file", **sections["data"]}
    for name in ("path", "cache"):
        if isinstance(data.get(name), str):
            data[name] = str(path.parent / Path(data[name]).expanduser())
    model = dict(sections["model"])
    if isinstance(model.get("name"), str):
        beside = path.parent / Path(model["name"]).expanduser()
        model["name"] = str(beside) if beside.is_dir() else model["name"]
    wanted = {"data": data, "model": model, "kernels": sections["kernels"]}
    known_keys = {"data": ("kind", *_DATA), "model": _MODEL, "kernels": _KERNELS}
    kept = {
        name: {key: value for key, value in content.items() if key in known_keys[name]}
        for name, content in wanted.items()
    }
    try:
        return from_mapping(kept)
    except ConfigError as error:
        problems += error.problems
        return RunConfig()


def _coordinators(value: object, problems: list[str]) -> frozenset[str]:
    if not isinstance(value, list) or not value:
        problems.append(
            "allow.coordinators is missing; list the public keys of those who may ask for runs"
        )
        return frozenset()
    found = set[str]()
    for key in value:
        try:
            found.add(check_public_key("allow.coordinators", str(key)))
        except ValueError as error:
            problems.append(str(error))
    return frozenset(found)


def _flag(name: str, value: object, problems: list[str]) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    problems.append(f"{name} = {value!r} must be true or false")
    return False


def _agent(values: Mapping[str, Any], path: Path, problems: list[str]) -> AgentSettings:
    known = ("socket", "group", "job_megabytes")
    problems += [
        f"there is no agent.{key}; known are {', '.join(known)}"
        for key in values
        if key not in known
    ]
    for name in ("socket", "group"):
        if not isinstance(values.get(name, ""), str):
            problems.append(f"agent.{name} = {values[name]!r} must be a text")
    size = values.get("job_megabytes", 64)
    try:
        checks.at_least("agent.job_megabytes", size, 1)
    except ValueError as error:
        problems.append(str(error))
        size = 64
    socket = path.parent / Path(str(values.get("socket", "door/agent.sock"))).expanduser()
    if len(os.fsencode(socket)) > LONGEST_SOCKET:
        problems.append(
            f"agent.socket = {str(socket)!r} must have ≤ {LONGEST_SOCKET} bytes, which is what the "
            "system allows; give a shorter path"
        )
    group = values.get("group")
    return AgentSettings(socket, None if group is None else str(group), size)
