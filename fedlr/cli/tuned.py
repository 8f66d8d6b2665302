"""Tuned sweeps: one value is chosen for every combination, by runs on a seed of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlr.cli import cells as grid
from fedlr.cli.cells import SEED, VARIANT, Planned, Wanted
from fedlr.cli.studies import Study
from fedlr.errors import ConfigError
from fedlr.report.chosen import Choice, choice_by_key, key_of
from fedlr.report.live import say
from fedlr.report.sweep import CellFacts, Sweep, SweepFacts
from fedlr.report.tuning import Tuning, slug, tuning_of

WORDS = ("tune.values", "tune.without_privacy", "tune.seed")
"""What a command line may change of a study that tunes."""

_GONE = "leave it away, or change tune.values"


@dataclass(frozen=True)
class Stages:
    """The two stages of a tuned sweep, checked and composed.

    Attributes:
        tuning: Cells that choose.
        runs: Cells to be reported whose value is known.
        open: The others, each at the first value it is tuned over: what a plan shows.
    """

    tuning: tuple[Planned, ...]
    runs: tuple[Planned, ...]
    open: tuple[Planned, ...]


def tuning_for(study: Study | None, given: Mapping[str, str]) -> Tuning | None:
    """Return what a sweep tunes: that of its study, with what the command line changes.

    Args:
        study: The chosen study; None for a grid of one's own.
        given: Value by word, of `WORDS`.

    Raises:
        ConfigError: The study tunes nothing, or a value is no list of numbers.
    """
    found = None if study is None else study.tune
    if found is None:
        if given:
            raise ConfigError(
                [f"{next(iter(given))} is for a study that tunes, such as sweep=methods"]
            )
        return None
    unbounded = given.get("tune.without_privacy") or ",".join(found.without_privacy) or None
    values = given.get("tune.values") or ",".join(found.values)
    try:
        return tuning_of(found.setting, values, given.get("tune.seed") or found.seed, unbounded)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def variants_for(study: Study | None, given: str | None) -> grid.Axes:
    """Return the axis of variants: those of the study, or the named ones; empty without any.

    Args:
        study: The chosen study.
        given: Names apart by commas, as `fedlr.report.tuning.slug` writes them; None takes all.

    Raises:
        ConfigError: The study has none, or one of the names is not among them.
    """
    known = {} if study is None else {slug(name): name for name in study.variants}
    if given is None:
        return {VARIANT: tuple(known.values())} if known else {}
    if not known:
        raise ConfigError([f"{VARIANT}={given}: only a study has variants, such as sweep=methods"])
    slugs = [slug(part) for part in given.split(",")]
    if strange := [part for part in slugs if part not in known]:
        raise ConfigError([f"{VARIANT}={strange[0]}: {VARIANT} must be one of {', '.join(known)}"])
    return {VARIANT: tuple(dict.fromkeys(known[part] for part in slugs))}


def check_words(facts: SweepFacts, given: Sequence[str]) -> None:
    """Refuse words of a command line that a variant or the tuning would take the place of.

    Args:
        facts: The sweep.
        given: Words of the command line.

    Raises:
        ConfigError: All that clash.
    """
    names = {word.lstrip("+").partition("=")[0]: word for word in given}
    problems = []
    for name, word in names.items():
        own = [label for label in facts.axes.get(VARIANT, ()) if _sets(facts, label, name)]
        if own:
            others = f" and {len(own) - 1} more" if own[1:] else ""
            problems.append(
                f"{word}: the variant {own[0]}{others} sets {name}; leave it away, or choose other "
                f"variants with {VARIANT}=<name>,<name>"
            )
    if facts.tuning is not None and (setting := facts.tuning.setting) in names:
        problems.append(f"{names[setting]}: this study tunes {setting}; {_GONE}")
    if problems:
        raise ConfigError(problems)


def _sets(facts: SweepFacts, label: str, name: str) -> bool:
    return any(word.partition("=")[0] == name for word in facts.variants[label])


def stages(facts: SweepFacts, there: Sweep | None) -> Stages:
    """Compose and check every cell of both stages, as far as it is known.

    Args:
        facts: What is asked for; it tunes.
        there: The sweep as its folder is; None where there is none yet.

    Raises:
        ConfigError: Everything that is wrong in any of them, before the first starts; or the
            seed of the tuning is one that is reported.
    """
    known = [] if there is None else [cell.facts for cell in there.cells]
    chosen = {} if there is None else choice_by_key(there)
    tuning = grid.plan_wanted(facts, _tries(facts), known)
    # Two combinations of one configuration are one: the first.
    kept = dict.fromkeys(key_of(cell.facts.values) for cell in tuning)
    wanted, later = list[Wanted](), list[Wanted]()
    for values in grid.combinations(facts.axes):
        key = key_of(values)
        if key not in kept:
            continue
        found = chosen.get(key)
        if found is not None and found.value is not None:
            wanted.append(Wanted(values, found.value))
        else:
            later.append(Wanted(values, _offered(facts, values)[0]))
    numbered = [*known, *(cell.facts for cell in tuning if cell.facts not in known)]
    runs = grid.plan_wanted(facts, wanted, numbered) if wanted else []
    numbered += [cell.facts for cell in runs if cell.facts not in numbered]
    rest = grid.plan_wanted(facts, later, numbered) if later else []
    _check_seeds(facts, [*runs, *rest])
    return Stages(tuple(tuning), tuple(runs), tuple(rest))


def _check_seeds(facts: SweepFacts, reported: Sequence[Planned]) -> None:
    """Raise ConfigError where a run to be reported has the seed that its value was chosen on."""
    seeds = sorted({cell.config.seed for cell in reported})
    if facts.tuning is not None and facts.tuning.seed in seeds:
        raise ConfigError(
            [
                f"tune.seed = {facts.tuning.seed} is among the seeds that are reported "
                f"({', '.join(map(str, seeds))}); choose another tune.seed"
            ]
        )


def work(
    facts: SweepFacts,
    read: Callable[[], Sweep],
    run: Callable[[Sequence[Planned]], None],
) -> None:
    """Run what is missing of both stages.

    Args:
        facts: What is asked for.
        read: Reads the sweep's folder, which exists.
        run: Runs cells that have not finished, and writes those that are not there yet.

    Guarantees:
        No cell that is to be reported starts before its combination's choice, and a tuning
        run that failed is tried again only where nothing was chosen.
    """
    before = read()
    settled = {key for key, one in choice_by_key(before).items() if one.value is not None}
    tuning = stages(facts, before).tuning
    missing = [cell for cell in tuning if key_of(cell.facts.values) not in settled]
    if missing:
        run(missing)
    found = read()
    for choice in choice_by_key(found).values():
        say(told(facts, choice))
    run(stages(facts, found).runs)


def told(facts: SweepFacts, choice: Choice) -> str:
    """Return what was chosen for a combination, in a line."""
    setting = "" if facts.tuning is None else facts.tuning.setting
    where = ", ".join(choice.values.values()) or "all cells"
    tried = ", ".join(one.value for one in choice.tries)
    if choice.value is None:
        why = "every run failed" if choice.failed else "not all runs have ended"
        return f"{where}: no {setting} of {tried} is chosen: {why}"
    edge = "" if choice.edge is None else f", the {choice.edge}: one beyond may be better"
    return f"{where}: {setting}={choice.value} of {tried}{edge}"


def shown(facts: SweepFacts, cell: CellFacts, chosen: bool) -> tuple[str, ...]:
    """Return what a plan shows as a cell's own, of both stages.

    Args:
        facts: The sweep.
        cell: One of its cells.
        chosen: Whether its value is known; a plan shows one that is not as such.
    """
    words = tuple(f"{name}={value}" for name, value in cell.values.items())
    if facts.tuning is None:
        return words
    value = cell.tuned if chosen else "<tuned>"
    return (*(("tuning",) if cell.tuning else ()), *words, f"{facts.tuning.setting}={value}")


def _tries(facts: SweepFacts) -> list[Wanted]:
    """Return every combination with each value that it is tuned over."""
    if facts.tuning is None:
        return []
    axes = {name: values for name, values in facts.axes.items() if name != SEED}
    seed = {SEED: str(facts.tuning.seed)}
    return [
        Wanted({**values, **seed}, value, tuning=True)
        for values in (grid.combinations(axes) if axes else [{}])
        for value in _offered(facts, values)
    ]


def _offered(facts: SweepFacts, values: Mapping[str, str]) -> tuple[str, ...]:
    if facts.tuning is None:
        return ()
    return facts.tuning.offered(grid.is_unbounded(facts, values))
