"""The cells of a sweep: every combination of its axes as one checked configuration."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from fedlr.cli.compose import compose
from fedlr.cli.overrides import values_of
from fedlr.config import RunConfig, from_mapping, to_json
from fedlr.errors import ConfigError
from fedlr.report.sweep import CELLS, CellFacts, SweepFacts

MOST_CELLS = 1000
"""Cells of one sweep; more are most likely a slip."""

SEED = "seed"
"""The axis that varies fastest: every other combination has each of its values."""

EPSILON, PRIVACY = "privacy.epsilon", "privacy"

VARIANT = "variant"
"""The axis whose values are names of overrides that belong together."""

Axes = dict[str, tuple[str, ...]]
"""Values by setting, as on the command line."""

_OWN = ("name", "output")
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Wanted:
    """A cell that is asked for.

    Attributes:
        values: Value by axis.
        tuned: Value of the setting that the sweep tunes; None where none is.
        tuning: Whether the cell is there to choose that value.
    """

    values: Mapping[str, str]
    tuned: str | None = None
    tuning: bool = False


@dataclass(frozen=True)
class Planned:
    """A cell and what it runs.

    Attributes:
        facts: As in ``cell.json``.
        config: Its configuration, without the sweep's own ``output`` and ``name``.
    """

    facts: CellFacts
    config: RunConfig

    def folder(self, sweep: Path) -> Path:
        """Return its folder in that of the sweep."""
        return sweep / CELLS / self.facts.cell


def sort_words(words: Iterable[str], study: Iterable[str]) -> tuple[tuple[str, ...], Axes]:
    """Tell what all cells share from what varies.

    Args:
        words: Overrides of the command line, several values in one allowed.
        study: Those of the study; a word of the same name takes their place.

    Returns:
        (overrides of all cells, values by axis). Axes are in the order of the study, those
        of one's own behind them, and the seed last.

    Raises:
        ConfigError: A setting has several values, and is given twice.
    """
    given = [(*values_of(word), word.lstrip("+")) for word in words]
    _refuse_twice(given)
    replaced = {name for name, _, _ in given}
    axes: dict[str, tuple[str, ...]] = {}
    fixed: list[str] = []
    for name, values, word in [(*values_of(word), word) for word in study]:
        if values is not None:
            axes[name] = () if name in replaced else values
        elif name not in replaced:
            fixed.append(word)
    for name, values, word in given:
        if values is not None:
            axes[name] = values
        elif name in axes:
            axes[name] = (word.partition("=")[2],)
        else:
            fixed.append(word)
    if SEED in axes:
        axes[SEED] = axes.pop(SEED)
    unique = {name: tuple(_distinct(values)) for name, values in axes.items()}
    return tuple(fixed), unique


def _refuse_twice(given: Iterable[tuple[str, tuple[str, ...] | None, str]]) -> None:
    """Raise ConfigError where a setting that varies is given twice: one would be forgotten."""
    problems = []
    seen: dict[str, tuple[bool, str]] = {}
    for name, values, word in given:
        varies, other = seen.get(name, (False, ""))
        if other and (varies or values is not None):
            problems.append(f"{word}: {name} is given already by {other}; give it once")
        seen[name] = (values is not None, word)
    if problems:
        raise ConfigError(problems)


def widened(old: Mapping[str, tuple[str, ...]], new: Mapping[str, tuple[str, ...]]) -> Axes:
    """Return the axes of ``old`` with the values that ``new`` adds behind them."""
    return {name: tuple(_distinct((*values, *new[name]))) for name, values in old.items()}


def combinations(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return value by axis of every combination, the last axis varying fastest.

    Raises:
        ConfigError: There are more than `MOST_CELLS`.
    """
    count = math.prod(map(len, axes.values()))
    if count > MOST_CELLS:
        raise ConfigError(
            [f"the sweep has more than {MOST_CELLS} cells; take values away, or split it"]
        )
    return [dict(zip(axes, found, strict=True)) for found in itertools.product(*axes.values())]


def plan_cells(
    facts: SweepFacts, values: Sequence[Mapping[str, str]], known: Sequence[CellFacts] = ()
) -> list[Planned]:
    """Compose and check every cell of a sweep.

    Args:
        facts: What all cells have in common.
        values: Value by axis of each cell.
        known: Cells that are there already: they keep name and number, whatever the
            order of the axes; new ones are numbered behind them.

    Returns:
        In the order of ``values``; two combinations with one configuration are one cell.

    Raises:
        ConfigError: Everything that is wrong in any of them, before the first starts.
    """
    return plan_wanted(facts, [Wanted(chosen) for chosen in values], known)


def plan_wanted(
    facts: SweepFacts, wanted: Sequence[Wanted], known: Sequence[CellFacts] = ()
) -> list[Planned]:
    """Do what `plan_cells` does for cells that may have a tuned value."""
    configs = _composed(facts, wanted)
    old = {identity(cell.config): cell for cell in known}
    number = 1 + max((cell.number for cell in known), default=-1)
    planned: dict[str, Planned] = {}
    for one, words, config in configs:
        text = neutral(config)
        if text in planned:
            continue
        if text in old:
            planned[text] = Planned(old[text], config)
            continue
        tried = (one.tuned,) if one.tuning and one.tuned is not None else ()
        made = CellFacts(
            cell=cell_name(number, (*one.values.values(), *tried)),
            number=number,
            values=one.values,
            overrides=words,
            rounds=config.federation.rounds,
            config=text,
            tuned=one.tuned,
            tuning=one.tuning,
        )
        planned[text] = Planned(made, config)
        number += 1
    return list(planned.values())


def _composed(
    facts: SweepFacts, wanted: Sequence[Wanted]
) -> list[tuple[Wanted, tuple[str, ...], RunConfig]]:
    """Return every cell with its overrides and configuration; ConfigError with all problems."""
    problems: dict[str, list[str]] = {}
    found = []
    for one in wanted:
        words = words_of(facts, one)
        try:
            found.append((one, words, _compose(words)))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(_shown(one.values))
    _refuse(problems, len(wanted))
    return found


@lru_cache(maxsize=4 * MOST_CELLS)
def _compose(words: tuple[str, ...]) -> RunConfig:
    """Return `compose`, once per cell: a sweep of two stages plans all of them three times."""
    return compose(words)


def words_of(facts: SweepFacts, wanted: Wanted) -> tuple[str, ...]:
    """Return the overrides of a cell: its variant is spelt out, and its tuned value in place."""
    chosen = dict(wanted.values)
    own = facts.variants[chosen.pop(VARIANT)] if VARIANT in chosen else ()
    if facts.tuning is not None and wanted.tuned is not None:
        own = (*own, f"{facts.tuning.setting}={wanted.tuned}")
    names = {word.partition("=")[0] for word in own}
    fixed = [word for word in facts.fixed if word.lstrip("+").partition("=")[0] not in names]
    return overrides_of((*fixed, *own), chosen, facts.without_privacy)


def is_unbounded(facts: SweepFacts, values: Mapping[str, str]) -> bool:
    """Return whether a combination is at ``privacy.epsilon=inf``: no privacy at all."""
    own = facts.variants.get(values.get(VARIANT, ""), ())
    words = (*facts.fixed, *own, *(f"{name}={value}" for name, value in values.items()))
    return any(map(_is_unbounded, words))


def check_libraries(planned: Sequence[Planned]) -> None:
    """Check what only libraries, operators and the engine know; ConfigError with all of it."""
    from fedlr.build import check_data, check_names
    from fedlr.cli.simulate import check_early

    problems: dict[str, list[str]] = {}
    for cell in planned:
        for check in (check_names, check_early):
            try:
                check(cell.config)
            except ConfigError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(_shown(cell.facts.values))
    _refuse(problems, len(planned))
    for cell in planned:
        check_data(cell.config)


def shares(config: RunConfig) -> tuple[object, ...]:
    """Return what cells must have in common to share data, tokens and frozen layers."""
    adapter = config.adapter
    return (config.seed, config.data, config.model, adapter.layers, adapter.modules)


def in_running_order(planned: Sequence[Planned]) -> list[Planned]:
    """Return the cells with those behind one another that can share most; else as they were."""
    groups: dict[object, list[Planned]] = {}
    for cell in planned:
        groups.setdefault(shares(cell.config), []).append(cell)
    return [cell for group in groups.values() for cell in group]


def overrides_of(
    fixed: Sequence[str], chosen: Mapping[str, str], without_privacy: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the overrides of one cell; ``privacy.epsilon=inf`` becomes ``privacy=none``.

    Args:
        fixed: Those of all cells.
        chosen: Value by axis.
        without_privacy: Those of a cell without privacy, in place of others of their name.
    """
    words = [*fixed, *(f"{name}={value}" for name, value in chosen.items())]
    unbounded = [word for word in words if _is_unbounded(word)]
    if unbounded:
        words = [word for word in words if not _is_unbounded(word)]
        added = [f"{PRIVACY}=none", *without_privacy]
        replaced = {word.partition("=")[0] for word in added}
        words = [word for word in words if word.partition("=")[0] not in replaced]
        words += added
    return tuple(words)


def _is_unbounded(word: str) -> bool:
    name, _, value = word.partition("=")
    return name == EPSILON and _number(value) == math.inf


def neutral(config: RunConfig) -> str:
    """Return the canonical JSON of a configuration without ``output`` and ``name``."""
    values = json.loads(to_json(config))
    kept = {key: value for key, value in values.items() if key not in _OWN}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)


def config_of(facts: CellFacts) -> RunConfig:
    """Return the configuration of a cell, with the default ``output`` and ``name``."""
    return from_mapping(json.loads(facts.config))


def identity(config: str) -> str:
    """Return what `neutral` says today of a configuration that may be an older version's."""
    try:
        return neutral(from_mapping(json.loads(config)))
    except (ValueError, ConfigError):  # a setting that is no more
        return config


def named(config: RunConfig, name: str, output: str) -> RunConfig:
    """Return ``config`` as the run of a cell: with the sweep's name and output."""
    return replace(config, name=name, output=output)


def cell_name(number: int, values: Iterable[str]) -> str:
    """Return the name of a cell's folder, at most 80 characters.

    Example:
        >>> cell_name(3, ["fedsvd", "0.5", "[query,value]"])
        '003-fedsvd-0.5-query-value'
    """
    slugs = (re.sub(r"[^A-Za-z0-9._]+", "-", value).strip("-.") for value in values)
    return "-".join((f"{number:03d}", *filter(None, slugs)))[:_LONGEST_NAME].rstrip("-.")


def default_name(axes: Iterable[str]) -> str:
    """Return the name of a grid that has none: the last parts of its axes' names.

    Example:
        >>> default_name(["method", "privacy.epsilon", "seed"])
        'method-epsilon-seed'
    """
    return "-".join(re.split(r"[./]", axis)[-1] for axis in axes)[:_LONGEST_NAME]


def _distinct(values: Iterable[str]) -> list[str]:
    """Return ``values`` without those that repeat one; 1 and 1.0 are the same number."""
    found: list[str] = []
    for value in values:
        number = _number(value)
        same = (
            other == value or (number is not None and _number(other) == number) for other in found
        )
        if not any(same):
            found.append(value)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shown(chosen: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in chosen.items())


def _refuse(problems: Mapping[str, Sequence[str]], count: int) -> None:
    """Raise ConfigError with every problem and, where not all cells have it, one that does."""
    if problems:
        raise ConfigError(
            [
                problem if len(cells) == count else f"{problem} ({_where(cells, count)})"
                for problem, cells in problems.items()
            ]
        )


def _where(cells: Sequence[str], count: int) -> str:
    more = "" if len(cells) == 1 else f"in {len(cells)} of {count} cells, first "
    return f"{more or 'in the cell '}{cells[0]}"
