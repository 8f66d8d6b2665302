"""Every word of a command line is a choice or a setting, or a sentence that says what is near."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedlr.config import setting_names

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OPTIONS = ("--help", "--cfg")
"""What a verb takes beside overrides."""

SWEEP_WORDS = (
    *("sweep", "launcher", "hydra/launcher", "search.trials", "variant"),
    *("tune.values", "tune.without_privacy", "tune.seed"),
)
"""Words that only a sweep has."""

_ALL = "`fedlr simulate --cfg` prints every setting, `--help` every choice"


def sort_out(
    words: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[str]]:
    """Tell the words that Hydra can apply from those it cannot.

    Args:
        words: Overrides of a command line. A leading ``+`` or ``++`` is dropped:
            every setting exists already.
        groups: Choices by group, ``model/head`` for a group within one.

    Returns:
        (the words that can be applied, one sentence for each that cannot).
    """
    good: list[str] = []
    problems: list[str] = []
    chosen: dict[str, str] = {}
    for word in words:
        plain = word.lstrip("+")
        override, problem = _parse(plain)
        if override is not None:
            name = override.key_or_group
            problem = _problem_of(override, plain, groups)
            if problem is None and name in chosen:
                problem = f"{plain}: {name} is chosen already by {chosen[name]}; give it once"
            elif problem is None and name in groups:
                chosen[name] = plain
                if override.value() is None:  # what it is anyway, and Hydra cannot be told
                    continue
        if problem is None:
            good.append(plain)
        else:
            problems.append(problem)
    return good, problems


MOST_VALUES = 1000
"""Values that one override may have; of more, one beyond them is kept, for the refusal."""


def spread(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield one list of overrides per combination of a sweep, the last word varying fastest.

    Several values are written as Hydra's sweeps are: ``privacy.epsilon=1,3``, or
    ``seed=range(0,3)``. Words that cannot be read stay as they are, for `sort_out`.
    """
    yield from map(list, itertools.product(*map(_values, words)))


def values_of(word: str) -> tuple[str, tuple[str, ...] | None]:
    """Return (setting, its values) of a word with several; (setting, None) of any other.

    Example:
        >>> values_of("seed=range(0,3)"), values_of("seed=1")
        (('seed', ('0', '1', '2')), ('seed', None))
    """
    plain = word.lstrip("+")
    override, _ = _parse(plain)
    if override is None:
        return plain.partition("=")[0], None
    name = override.key_or_group
    if not override.is_sweep_override():
        return name, None
    found = _values(plain)
    return name, None if found == [word] else tuple(v.partition("=")[2] for v in found)


def _values(word: str) -> list[str]:
    """Return a word with each of its values; of too many, one more than `MOST_VALUES`."""
    from hydra.errors import HydraException

    override, _ = _parse(word.lstrip("+"))
    if override is None or not override.is_sweep_override():
        return [word]
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1))
    except HydraException:  # an interval, or a pattern: no list of values
        return [word]
    return [f"{word.partition('=')[0]}={value}" for value in values]


def _parse(word: str) -> tuple[Override | None, str | None]:
    """Return (the parsed override, None) or (None, why it is none)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if word.startswith("-"):
        return None, f"{word} is not an option of this command; it has {' and '.join(OPTIONS)}"
    name, equals, value = word.partition("=")
    if not name or not (equals or word.startswith("~")):
        example = name if re.fullmatch(r"[\w./]+", name) else "<setting>"
        return None, f"{word!r} is not an override; write {example}=<value>. {_ALL}"
    try:
        return OverridesParser.create().parse_override(word), None
    except HydraException:
        quoted = value.replace('"', '\\"')
        return None, (
            f"{word} cannot be read as {name}=<value>; close every bracket and quote, and put a "
            "text with one of ()[]{}:=,\"' or a letter beyond ASCII in quotes, for a shell as "
            f"'{name}=\"{quoted}\"'"
        )


def _problem_of(override: Override, word: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    """Return why a well-formed override does not fit the configuration, or None."""
    name, settings = override.key_or_group, setting_names()
    if name in SWEEP_WORDS:
        return f"{word} is for `fedlr sweep`, not for a single run: write `fedlr sweep {word}`"
    if name not in groups and name not in settings:
        return f"{word}: there is no setting {name}{_nearest(name, groups, settings)} {_ALL}"
    if override.is_delete():
        return f"{word}: a setting cannot be removed, only changed; write {name}=<value>"
    if override.is_sweep_override():
        value = word.partition("=")[2]
        return (
            f"{word} gives several values, but a run takes one; write {name}=<value>, a list as "
            f"{name}=[{value}], or quote a text with a comma in it: '{name}=\"{value}\"'"
        )
    value = override.value()
    if name in groups:
        return _choice_problem(name, value, word, groups[name])
    group = name.replace(".", "/")
    if group in groups and not isinstance(value, Mapping):
        return f"{word}: {name} is a section; choose it with {group}=<{'|'.join(groups[group])}>"
    return None


def _choice_problem(name: str, value: object, word: str, choices: Sequence[str]) -> str | None:
    """Return why ``value`` is no choice of the group ``name``, or None."""
    optional = name.replace("/", ".") not in setting_names()
    if value in choices or (value is None and optional):
        return None
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {name}={near[0]}?" if near else f"; write {name}=<choice>"
    listed = ", ".join((*choices, "null") if optional else choices)
    return f"{word}: {name} must be one of {listed}{hint}"


def _nearest(name: str, groups: Mapping[str, Sequence[str]], settings: Sequence[str]) -> str:
    """Say which names are spelt like ``name``, those of its section first; or what that has."""
    known = [*groups, *(other for other in settings if other.replace(".", "/") not in groups)]
    section, leaf = _split(name)
    siblings = [other for other in known if _split(other)[0] == section]
    below = [other for other in known if _split(other)[0].split(".")[0] == section.split(".")[0]]
    near = _spelt_like(leaf, siblings, 0.6) or _spelt_like(leaf, below, 0.8)
    near = near or _spelt_like(leaf, known, 0.8)
    if near:
        nearest = sorted(near, key=lambda other: -_likeness(name, other))[:3]
        return f"; did you mean {' or '.join(nearest)}?"
    if section and siblings:
        return f"; {section} has {', '.join(_split(other)[1] for other in siblings)}."
    return "."


def _split(name: str) -> tuple[str, str]:
    """Return (section, last part), dotted: a group is named like the section it fills."""
    section, _, leaf = name.replace("/", ".").rpartition(".")
    return section, leaf


def _spelt_like(leaf: str, names: Sequence[str], cutoff: float) -> list[str]:
    """Return the names whose last part is like ``leaf``, and about as like as the likest."""
    likeness = {name: _likeness(leaf, _split(name)[1]) for name in names}
    best = max(likeness.values(), default=0.0)
    return [name for name, ratio in likeness.items() if ratio >= max(cutoff, best - 0.17)]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
