"""What a run folder holds, as far as it can be read: the input of a run's page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedlr.errors import RunError
from fedlr.report import command, places
from fedlr.report.facts import RunFacts, read_facts
from fedlr.report.folder import CONFIG_FILE
from fedlr.report.lines import OfRound, read_lines
from fedlr.report.promise import UNITS
from fedlr.report.records import ROUNDS_FILE, SUMMARY_FILE, RoundRecord, Summary, read_summary
from fedlr.report.spectra import (
    SPECTRA_FILE,
    Intruders,
    SpectrumRecord,
    read_intruders,
)
from fedlr.report.sweep import is_running

T = TypeVar("T")
R = TypeVar("R", bound=OfRound)

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "privacy.mode": ("dp", "dry", "none"),
    "privacy.unit": tuple(UNITS),
    "privacy.accountant": ("prv", "rdp"),
}
_KINDS: Mapping[str, tuple[type, ...]] = {
    "privacy.epsilon": (int, float),
    "federation.rounds": (int,),
    "method.name": (str,),
    "model.name": (str,),
}

CARD = Path("adapter") / "README.md"
"""The model card, which has the code that loads the adapter."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of a run.

    Attributes:
        folder: Where they are.
        facts: What the run was made of.
        config: Its configuration as nested mappings; empty where it cannot be read.
        versions: Version by package.
        revision: Commit of the code; None where it was not run from a checkout.
        records: Closed rounds, in rising order.
        spectra: Where updates pointed after each completed round; empty in a folder of an
            earlier version.
        intruders: Against the base weights; None where they were not looked at.
        summary: The result; None until the run has ended, or while it goes on again.
        loader: Python that loads the adapter; None where there is none.
        running: Whether a process on this machine carries the run on.
        problems: What could not be read, a sentence each.
    """

    folder: Path
    facts: RunFacts
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    records: tuple[RoundRecord, ...] = ()
    spectra: tuple[SpectrumRecord, ...] = ()
    intruders: Intruders | None = None
    summary: Summary | None = None
    loader: str | None = None
    running: bool = False
    problems: tuple[str, ...] = ()

    def setting(self, name: str, otherwise: Any = None) -> Any:
        """Return a setting by its dotted name; ``otherwise`` where the file lacks it."""
        found: Any = self.config
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return otherwise
            found = found[part]
        return found

    @property
    def withheld(self) -> dict[str, places.Kind]:
        """The settings that name a place, which the page does not: it may be passed on."""
        return places.withheld(dict(command.leaves(self.config)))

    def public(self, text: str) -> str:
        """Return a sentence without places of this machine, and without marks of code."""
        folders = (self.folder, self.folder.absolute())
        text = places.without(text, folders, places.RUN_FOLDER)
        named = [self.setting(name) for name in self.withheld]
        return places.without(text, named, places.WORDS["folder"]).replace("`", "")

    def called(self, name: str) -> str:
        """Return what the facts call model or data, where it is not a place of this machine."""
        held = name in [self.setting(place) for place in self.withheld]
        return name if places.is_public(name) and not held else places.WORDS["folder"]

    @property
    def completed(self) -> int:
        """Rounds that changed the model."""
        return max((record.round for record in self.records if record.accepted), default=0)

    @property
    def private(self) -> str:
        """``privacy.mode``; ``unknown`` where neither summary nor configuration tells."""
        if self.summary is not None:
            return self.summary.privacy_mode
        return str(self.setting("privacy.mode", "unknown"))


def read_run(folder: Path, ended: bool = False) -> RunFiles:
    """Read a run folder; a file that is damaged is a problem in the result, not an error.

    Args:
        folder: The run folder.
        ended: Whether the run is known to have ended, by the process that still holds it.

    Raises:
        RunError: ``folder`` is no run folder, or the file that says what it is, is damaged.
    """
    facts = read_facts(folder)
    problems: list[str] = []
    records = _lines(folder / ROUNDS_FILE, RoundRecord, problems)
    running = not ended and is_running(folder)
    summary = None
    path = folder / SUMMARY_FILE
    if path.exists() and not running:
        summary = _tried(lambda: read_summary(path), problems)
    stored = _stored_config(folder / CONFIG_FILE, problems)
    revision = stored.get("git_revision")
    return RunFiles(
        folder=folder,
        facts=facts,
        config=_mapping(stored.get("config")),
        versions={str(k): str(v) for k, v in _mapping(stored.get("versions")).items()},
        revision=revision if isinstance(revision, str) else None,
        records=records,
        spectra=_lines(folder / SPECTRA_FILE, SpectrumRecord, problems),
        intruders=_tried(lambda: read_intruders(folder), problems),
        summary=summary,
        loader=_loader(folder / CARD),
        running=running,
        problems=tuple(problems),
    )


def _lines(path: Path, kind: type[R], problems: list[str]) -> tuple[R, ...]:
    """Return the records of a log up to a damaged line, which becomes a problem."""
    if not path.exists():
        return ()
    read = _tried(lambda: read_lines(path, kind), problems)
    if read is None:
        return ()
    if read.problem is not None:
        problems.append(
            f"{read.problem}. What follows that line is not in this report; restore the file from "
            "a copy."
        )
    return read.records


def _tried(read: Callable[[], T], problems: list[str]) -> T | None:
    """Return what ``read`` does; None where it fails, which becomes a problem."""
    try:
        return read()
    except RunError as error:
        problems.append(f"{error}.")
        return None


def _stored_config(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        stored = _mapping(json.loads(path.read_text(encoding="utf-8")))
        _check(dict(command.leaves(_mapping(stored.get("config")))))
        return stored
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(f"{path} cannot be read: {reason}; restore it from a copy.")
        return {}


def _check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a setting that the page relies on is none; one may be missing."""
    for name, allowed in _CHOICES.items():
        if name in settings and settings[name] not in allowed:
            raise ValueError(
                f"{name} = {settings[name]!r} is none of {', '.join(map(str, allowed))}"
            )
    for name, kinds in _KINDS.items():
        value = settings.get(name)
        if name in settings and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ValueError(f"{name} = {value!r} is no {kinds[-1].__name__}")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _loader(path: Path) -> str | None:
    """Return the Python of a model card; None where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found[1].rstrip() if found else None
