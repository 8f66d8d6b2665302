"""Studies: the files of ``conf/sweep``, each a question and the grid that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlr import checks
from fedlr.errors import ConfigError
from fedlr.report.tuning import Tuning, slug, tuning_of

GROUP = "sweep"
"""Folder of the studies in ``conf``, and the word that chooses one."""

_KEYS = ("about", "hydra", "search", "without_privacy", "variants", "tune")


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
        variants: Overrides by name: each is a row of the table, crossed with ``params``.
        tune: What is chosen for every combination before it is run; None for nothing.
    """

    name: str
    about: str
    params: Mapping[str, str] = field(default_factory=dict)
    search: Search | None = None
    without_privacy: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tune: Tuning | None = None

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
        _only("the file", content, _KEYS)
        hydra = _only("hydra", content.get("hydra") or {}, ("sweeper",))
        params = _only("hydra.sweeper", hydra.get("sweeper") or {}, ("params",)).get("params") or {}
        search = None if content.get("search") is None else _search(content["search"])
        variants = _variants(content.get("variants") or {})
        several = any("," in str(v) or "(" in str(v) for v in params.values()) or len(variants) > 1
        if (search is None) is (not several):
            raise ValueError("it needs several values in hydra.sweeper.params, or search: one")
        words = {str(name): _word(value) for name, value in params.items()}
        unbounded = content.get("without_privacy") or {}
        study = Study(
            name=path.stem,
            about=str(content["about"]),
            params=words,
            search=search,
            without_privacy={str(name): _word(value) for name, value in unbounded.items()},
            variants=variants,
            tune=None if content.get("tune") is None else _tune(content["tune"]),
        )
        _check(study)
        return study
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


def _tune(values: object) -> Tuning:
    known = _only("tune", values, ("setting", "values", "without_privacy", "seed"))
    unbounded = known.get("without_privacy")
    return tuning_of(
        str(known["setting"]),
        str(known["values"]),
        str(known["seed"]),
        None if unbounded is None else str(unbounded),
    )


def _variants(values: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(values, dict):
        raise ValueError("variants must be a section: a name, and its overrides, a line each")
    found = {str(name): tuple(_word(words).split()) for name, words in values.items()}
    if bare := [name for name, words in found.items() if not all("=" in word for word in words)]:
        raise ValueError(f"variants.{bare[0]} must be overrides, such as method=fedsvd")
    slugs = [slug(name) for name in found]
    if twice := [name for name in found if not slug(name) or slugs.count(slug(name)) > 1]:
        raise ValueError(f"variants.{twice[0]} is named like another one; choose another name")
    return found


def _check(study: Study) -> None:
    """Raise ValueError where one setting is given a value in two places of a study."""
    axes = {name for name, value in study.params.items() if "," in value or "(" in value}
    own = {word.partition("=")[0] for words in study.variants.values() for word in words}
    if study.search is not None and (study.variants or study.tune):
        raise ValueError("search goes with neither variants nor tune; leave those away")
    if clash := sorted((axes | {"seed", "output", "name"}) & own):
        raise ValueError(f"variants set {clash[0]}, which varies or is the sweep's own")
    if study.tune is None:
        return
    setting = study.tune.setting
    if setting in own | set(study.params) | set(study.without_privacy) | {"seed"}:
        raise ValueError(f"tune.setting = {setting} has a value elsewhere in the file too")


def _only(where: str, values: object, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a section; ValueError where it has other keys."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a section")
    if unknown := [str(key) for key in values if key not in keys]:
        raise ValueError(f"{where} has {', '.join(unknown)}; it takes {', '.join(keys)}")
    return values
