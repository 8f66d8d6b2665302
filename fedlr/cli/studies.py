"""Studies: the files of ``conf/sweep``, each a question and the grid that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlr import checks
from fedlr.errors import ConfigError

GROUP = "sweep"
"""Folder of the studies in ``conf``, and the word that chooses one."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a searched number is looked for.

    Attributes:
        low: Smallest value.
        high: Largest value, > ``low``.
        log: Whether ratios count rather than differences; then ``low`` > 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        checks.finite("low", self.low)
        checks.finite("high", self.high)
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} must be < high = {self.high}")
        if self.log:
            checks.positive("low", self.low)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Values that are chosen one after the other, by their results.

    Attributes:
        trials: Number of cells, ≥ 1.
        parameters: Where to look, by setting.
    """

    trials: int
    parameters: Mapping[str, Range]

    def __post_init__(self) -> None:
        checks.at_least("trials", self.trials, 1)
        if not self.parameters:
            raise ValueError("parameters are empty; name at least one setting with low and high")


@dataclass(frozen=True, kw_only=True)
class Study:
    """One study.

    Attributes:
        name: Its file, without ending.
        about: The question it answers, one sentence.
        params: Values by setting, as on the command line; one value alone is the same
            in every cell.
        search: What is searched; None for a grid.
        without_privacy: Values by setting of the cells at ``privacy.epsilon=inf`` alone.
    """

    name: str
    about: str
    params: Mapping[str, str] = field(default_factory=dict)
    search: Search | None = None
    without_privacy: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """The study as words of a command line."""
        return tuple(f"{name}={value}" for name, value in self.params.items())


def read_studies(folder: Path) -> dict[str, Study]:
    """Return every study of the configuration folder, by name.

    Raises:
        ConfigError: A file is not written as a study; all such files at once.
    """
    found, problems = dict[str, Study](), list[str]()
    for path in sorted((folder / GROUP).glob("*.yaml")):
        try:
            found[path.stem] = _read(path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _read(path: Path) -> Study:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:  # interpolations stay: they are resolved in each cell
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        _only("the file", content, ("about", "hydra", "search", "without_privacy"))
        hydra = _only("hydra", content.get("hydra") or {}, ("sweeper",))
        params = _only("hydra.sweeper", hydra.get("sweeper") or {}, ("params",)).get("params") or {}
        search = None if content.get("search") is None else _search(content["search"])
        if (search is None) is (not any("," in str(v) or "(" in str(v) for v in params.values())):
            raise ValueError("it needs several values in hydra.sweeper.params, or search: one")
        words = {str(name): _word(value) for name, value in params.items()}
        unbounded = content.get("without_privacy") or {}
        return Study(
            name=path.stem,
            about=str(content["about"]),
            params=words,
            search=search,
            without_privacy={str(name): _word(value) for name, value in unbounded.items()},
        )
    except (OSError, OmegaConfBaseException, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            [f"{path} is no study: {reason}; write it as the others in {path.parent}"]
        ) from error


def _word(value: object) -> str:
    """Return a value of YAML as it is written on a command line."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def _search(values: object) -> Search:
    known = _only("search", values, ("trials", "parameters"))
    ranges = {
        str(name): Range(**_only(f"search.parameters.{name}", given, ("low", "high", "log")))
        for name, given in dict(known["parameters"]).items()
    }
    return Search(trials=known["trials"], parameters=ranges)


def _only(where: str, values: object, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a section; ValueError where it has other keys."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a section")
    if unknown := [str(key) for key in values if key not in keys]:
        raise ValueError(f"{where} has {', '.join(unknown)}; it takes {', '.join(keys)}")
    return values
