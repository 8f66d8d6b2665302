"""``fedlr sweep``: a grid of runs, or a search, in one folder; what is finished stays finished."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlr.cli import cells as grid
from fedlr.cli import tuned
from fedlr.cli.cells import VARIANT, Planned
from fedlr.cli.compose import compose, compose_mapping, configuration_folder, listed_choices
from fedlr.cli.launch import BASIC, LAUNCHERS, Launcher, launch
from fedlr.cli.studies import GROUP, Search, Study, read_studies
from fedlr.errors import ConfigError, FedlrError, RunError
from fedlr.report.chosen import is_complete
from fedlr.report.folder import check_name, check_output, output_folder
from fedlr.report.live import say
from fedlr.report.sweep import (
    CELL_FILE,
    SWEEPS,
    CellFacts,
    SweepFacts,
    hold,
    is_sweep,
    read_sweep,
    write_cell,
    write_sweep_facts,
)
from fedlr.report.sweeping import failures, show_settings, show_sweep

_USAGE = """\
usage: fedlr sweep sweep=<study> [overrides]
       fedlr sweep <setting>=<value>,<value>,… [overrides] [name=<name>]

Runs every combination of several values, each as `fedlr simulate` would, in the folder
<output>/sweeps/<name>, and prints that folder as its last line. The same command again does
what is missing: finished cells are left alone, interrupted ones go on, failed ones are retried.
More values of a setting may be added later. Each combination has all seeds. A page of it,
report.html, is written beside sweep.json; `fedlr report <folder>` writes it while it goes on.

studies (sweep=<name>); several values of your own for a setting take the place of the study's:
{studies}

options:
  --plan            print cells, noise, ε of each and of all together, and time; train nothing
  --json            with --plan: one JSON object instead of tables
  launcher=<name>   where cells run: {launchers};
                    hydra.launcher.<setting>=<value> is a setting of its own, such as
                    launcher=joblib hydra.launcher.n_jobs=4
  search.trials=<n> of a study that searches: how many cells there are to be
  tune.values=<…>   of a study that tunes: what is tried for every combination, on a seed of its
                    own, before the runs that are reported; tune.without_privacy and tune.seed
  variant=<…>       of a study with variants: some of them, as fedsvd,ffa-lora-kaiming-a
  privacy.epsilon=inf among others is no privacy at all (privacy=none)

choices (section=choice):
{choices}"""

Work = Callable[[], None]
"""What is left to do, once everything is checked."""

_PLAN, _JSON = "--plan", "--json"
_TRIALS = "search.trials"


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        words: Overrides, several values in one allowed.
        study: The chosen study; None for a grid of one's own.
        name: Name of the folder; None takes the study's.
        launcher: Where cells run.
        trials: Cells of a search; None takes the study's number.
        tune: What the command line changes of the study's tuning, by word.
        variants: Names of variants, apart by commas; None takes all of the study.
    """

    words: tuple[str, ...]
    study: Study | None = None
    name: str | None = None
    launcher: Launcher = field(default_factory=Launcher)
    trials: int | None = None
    tune: Mapping[str, str] = field(default_factory=dict)
    variants: str | None = None

    @property
    def search(self) -> Search | None:
        """What is searched; None for a grid."""
        found = None if self.study is None else self.study.search
        return found if found is None or self.trials is None else replace(found, trials=self.trials)


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: As in ``fedlr sweep --help``.

    Returns:
        0; the exit code of a RunError where cells have failed. Other errors are raised as
        `fedlr.errors.FedlrError`.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_help())
        return 0
    options = {word for word in words if word in (_PLAN, _JSON)}
    request = read_request([word for word in words if word not in options])
    if options == {_JSON}:
        raise ConfigError([f"{_JSON} is for {_PLAN}: a sweep prints its table and its folder"])
    if options:
        from fedlr.cli.budget import print_plan

        facts, folder = settle(request)
        print_plan(facts, folder, request.search, _JSON in options)
        return 0
    try:
        return sweep(request)
    except KeyboardInterrupt:
        say(f"stopped; `fedlr sweep {shlex.join(words)}` goes on with what is missing")
        raise


def sweep(request: Request) -> int:
    """Run what is missing of the sweep, show all of it, and return the exit status."""
    request.launcher.check()
    facts, folder = settle(request)
    if request.search is None and facts.tuning is None:
        prepared = _gridded(request, facts, folder)
    elif request.search is None:
        prepared = _tuned(request, facts, folder)
    else:
        prepared = _searched(request, request.search, facts, folder)
    check_output(folder.parent.parent, facts.name)
    folder.mkdir(parents=True, exist_ok=True)
    problem: RunError | None = None
    with hold(folder):
        if is_sweep(folder) and widen(read_sweep(folder).facts, facts) != facts:
            raise RunError(f"{folder} was changed meanwhile; give the command again")
        write_sweep_facts(folder, facts)
        try:
            try:
                prepared()
            except RunError as error:
                problem = error
            found = read_sweep(folder)
            show_sweep(found, sys.stdout)
            for line in failures(found):
                say(line)
            _draw(folder)
        finally:
            print(folder, flush=True)
    if problem is not None:
        raise problem
    return 0 if is_complete(found) else RunError.exit_code


def _draw(folder: Path) -> None:
    """Show settings and page of the sweep; where that fails, the cells are there all the same."""
    from fedlr.cli.report import report

    try:
        show_settings(read_sweep(folder), sys.stdout)
        say(f"the page of the sweep is {report(folder)}")
    except FedlrError as error:
        say(f"no page of the sweep: {error}")
    except Exception as error:  # a mistake of ours: the cells are finished all the same
        traceback.print_exception(error)
        kind = type(error).__name__
        say(f"no page of the sweep ({kind}, shown above); report this. The cells are there")


def _gridded(request: Request, facts: SweepFacts, folder: Path) -> Work:
    """Check every cell of a grid; return what runs those that are missing."""
    planned = planned_cells(facts, folder)
    grid.check_libraries(planned)
    return lambda: _run(planned, folder, request.launcher)


def _tuned(request: Request, facts: SweepFacts, folder: Path) -> Work:
    """Check every cell of both stages of a tuned grid; return what runs those that are missing."""
    known = tuned.stages(facts, read_sweep(folder) if is_sweep(folder) else None)
    grid.check_libraries((*known.tuning, *known.runs, *known.open))
    return lambda: tuned.work(
        facts,
        lambda: read_sweep(folder),
        lambda planned: _run(planned, folder, request.launcher),
    )


def _run(planned: Sequence[Planned], folder: Path, launcher: Launcher) -> None:
    """Write the cells that are not there, and run those of them that have not finished."""
    for cell in planned:
        place = cell.folder(folder)
        if not (place / CELL_FILE).exists():
            place.mkdir(parents=True, exist_ok=True)
            write_cell(place, cell.facts)
    finished = {cell.facts.cell for cell in read_sweep(folder).of("finished")}
    left = grid.in_running_order([cell for cell in planned if cell.facts.cell not in finished])
    if len(left) < len(planned):
        say(f"{len(planned) - len(left)} of {len(planned)} cells are finished")
    if left:
        launch(folder, [cell.facts.cell for cell in left], launcher)


def _searched(request: Request, wanted: Search, facts: SweepFacts, folder: Path) -> Work:
    """Check a search; return what carries it on."""
    from fedlr.cli.search import Searching, check_bounds, check_optuna, search

    check_optuna()
    if request.launcher.name != BASIC:
        raise ConfigError(
            [
                f"launcher = {request.launcher.name}: a search runs one trial after the other; "
                "leave the launcher away"
            ]
        )
    seed = compose([word for word in facts.fixed if word.startswith("seed=")]).seed
    task = Searching(folder, facts, wanted, seed)
    check_bounds(task)
    return lambda: search(task)


def read_request(words: Sequence[str]) -> Request:
    """Tell the words of the sweep from those of its runs; ConfigError with all that are wrong."""
    own: dict[str, str] = {}
    rest, settings, problems = list[str](), list[str](), list[str]()
    aliases = {"hydra/launcher": "launcher"}
    for word in words:
        name, _, value = word.lstrip("+").partition("=")
        name = aliases.get(name, name)
        if name.startswith("hydra.launcher."):
            settings.append(word.lstrip("+"))
        elif name not in (GROUP, "launcher", _TRIALS, "name", VARIANT, *tuned.WORDS):
            rest.append(word)
        elif name in own:
            problems.append(f"{word}: {name} is chosen already; give it once")
        else:
            own[name] = value
    studies = read_studies(configuration_folder())
    if GROUP in own and own[GROUP] not in studies:
        problems.append(f"sweep={own[GROUP]}: sweep must be one of {', '.join(studies)}")
    trials = own.get(_TRIALS)
    if trials is not None and not (trials.isascii() and trials.isdecimal() and int(trials)):
        problems.append(f"{_TRIALS} = {trials!r} must be a whole number ≥ 1")
    if problems:
        raise ConfigError(problems)
    launcher = Launcher(own.get("launcher", BASIC), tuple(settings))
    study = studies[own[GROUP]] if GROUP in own else None
    if trials is not None and (study is None or study.search is None):
        raise ConfigError([f"{_TRIALS} is for a study that searches, such as sweep=learning_rate"])
    return Request(
        words=tuple(rest),
        study=study,
        name=own.get("name"),
        launcher=launcher,
        trials=None if trials is None else int(trials),
        tune={name: own[name] for name in tuned.WORDS if name in own},
        variants=own.get(VARIANT),
    )


def settle(request: Request) -> tuple[SweepFacts, Path]:
    """Return what the sweep is, with what its folder holds already, and that folder.

    Raises:
        ConfigError: It has no values to vary, or differs from the sweep that is there.
    """
    study = request.study
    fixed, axes = grid.sort_words(request.words, () if study is None else study.words)
    if request.search is not None:
        if axes:
            raise ConfigError(
                [f"{', '.join(axes)}: a search takes one value of each setting; leave one"]
            )
        axes = dict.fromkeys(request.search.parameters, ())
    axes = {**tuned.variants_for(study, request.variants), **axes}
    _check_axes(axes)
    outputs = [word for word in fixed if word.startswith("output=")]
    name = request.name or (study.name if study is not None else grid.default_name(axes))
    check_name(name)
    facts = SweepFacts(
        name=name,
        study=None if study is None else study.name,
        about="" if study is None else study.about,
        fixed=tuple(word for word in fixed if word not in outputs),
        axes=axes,
        search=request.search is not None,
        without_privacy=_without_privacy(study, set(map(_name, request.words))),
        trials=None if request.search is None else request.search.trials,
        variants={} if study is None else study.variants,
        tuning=tuned.tuning_for(study, request.tune),
    )
    tuned.check_words(facts, request.words)
    folder = output_folder(str(compose_mapping(outputs)["output"])) / SWEEPS / name
    if not is_sweep(folder):
        return facts, folder
    return widen(read_sweep(folder).facts, facts), folder


def _without_privacy(study: Study | None, given: Collection[str]) -> tuple[str, ...]:
    """Return the study's overrides of cells without privacy, less what the user has chosen."""
    found = {} if study is None else study.without_privacy
    return tuple(f"{name}={value}" for name, value in found.items() if name not in given)


def _name(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def widen(old: SweepFacts, new: SweepFacts) -> SweepFacts:
    """Return the sweep in a folder with the values, or the trials, that ``new`` asks for.

    Raises:
        ConfigError: They differ in anything else.
    """
    problems = []
    if old.study != new.study:
        problems.append(f"sweep={new.study or 'none'}, and it was begun with {old.study or 'none'}")
    before, now = set(_last(old.fixed)), set(_last(new.fixed))
    gone, come = sorted(before - now), sorted(now - before)
    if gone or come:
        problems.append(
            f"{' '.join(come) or 'nothing'} is given, and it was begun with "
            f"{' '.join(gone) or 'nothing of that'}"
        )
    if set(old.axes) != set(new.axes):
        problems.append(
            f"{', '.join(new.axes)} {'varies' if len(new.axes) == 1 else 'vary'}, and it was "
            f"begun with {', '.join(old.axes)}"
        )
    if old.tuning != new.tuning:
        problems.append("what is tuned differs from what it was begun with")
    problems += [
        f"the variant {name} is no longer {' '.join(words)}"
        for name, words in old.variants.items()
        if new.variants.get(name, words) != words
    ]
    if problems:
        way = "give the overrides it was begun with, or another name=<name>"
        raise ConfigError([f"the sweep {new.name!r}: {problem}; {way}" for problem in problems])
    return replace(
        old,
        axes=grid.widened(old.axes, new.axes),
        trials=new.trials,
        variants={**old.variants, **new.variants},
    )


def _last(words: Sequence[str]) -> list[str]:
    """Return the word that decides each setting: the last of its name."""
    return list({_name(word): word.lstrip("+") for word in words}.values())


def planned_cells(facts: SweepFacts, folder: Path) -> list[Planned]:
    """Compose and check every cell, those in ``folder`` under the names they have."""
    known: list[CellFacts] = []
    if is_sweep(folder):
        known = [cell.facts for cell in read_sweep(folder).cells]
    return grid.plan_cells(facts, grid.combinations(facts.axes), known)


def _check_axes(axes: grid.Axes) -> None:
    """Refuse a sweep of nothing, and of what names the sweep itself."""
    if not axes:
        raise ConfigError(
            [
                "nothing varies: choose sweep=<study>, or give several values of a setting, such "
                "as method=fedsvd,ffa_lora seed=0,1; `fedlr sweep --help` lists the studies"
            ]
        )
    if own := [name for name in ("name", "output") if name in axes]:
        raise ConfigError([f"{own[0]} takes one value: it is the sweep's own"])


def _help() -> str:
    studies = read_studies(configuration_folder()).values()
    listed = "\n".join(f"  {study.name:<16} {study.about}" for study in studies)
    return _USAGE.format(studies=listed, launchers=", ".join(LAUNCHERS), choices=listed_choices())
