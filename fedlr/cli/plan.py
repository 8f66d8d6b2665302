"""``fedlr plan``: noise and ε of a run, or of a sweep, before anything is trained."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.arguments import Parser
from fedlr.cli.compose import compose
from fedlr.cli.overrides import spread
from fedlr.config import RunConfig
from fedlr.errors import ConfigError
from fedlr.report import strict_json
from fedlr.report.plan import Composed, Plan, RunForecast, listed, plan_tables, run_notices

if TYPE_CHECKING:
    from fedlr.forecast import Planned
    from fedlr.planning import Split
    from fedlr.privacy.earlier import Earlier

MOST_RUNS = 200
"""Combinations of one sweep; composing more takes minutes and is most likely a slip."""

_ABOUT = """\
Print what a run would cost, before it is trained: for each client N, δ, q, σ, steps and
joins, and ε after every round. Nothing is trained and no model is loaded; the data are read
to be split over the clients, unless --sizes gives their sizes.

  N      declared size: units of the client, above 99 rounded down to two digits
  q      sampling rate, L/N with L = optimizer.expected_batch
  σ      standard deviation of the noise, in units of the clip norm
  steps  noised steps of one joined round
  joins  rounds it joins: at most (σ is calibrated for them), on average, with this seed

What the operators' policies allow (privacy.policies=<folder>) ends a client's part as it
would in the run, and what they refuse is refused. Where a policy names a ledger over all
runs, what that holds is counted, not one of --ledgers, and privacy.epsilon bounds the new
run alone.

Overrides are those of `fedlr simulate`. Several values in one, such as
  fedlr plan privacy.epsilon=1,3,8 method=fedsvd,ffa_lora
are a sweep: every combination is planned, and ε of all of them on the same data is printed,
which is what choosing one of the runs by its result on these data costs."""


_CLIENTS = ("federation.clients", "federation.clients_per_round")
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        overrides: Hydra overrides, several values in one allowed.
        sizes: Units of each client; None reads the data.
        ledgers: Folder with the ledgers of earlier runs on the same data.
    """

    overrides: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = None
    ledgers: Path | None = None


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: Hydra overrides, and ``--sizes``, ``--ledgers``, ``--json`` or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("plan", _ABOUT)
    parser.add_argument("overrides", metavar="overrides", nargs="*", default=[])
    parser.add_argument(
        "--sizes",
        metavar="N,N,…",
        help="units of each client, instead of data: 1200,800 are two clients",
    )
    parser.add_argument(
        "--ledgers",
        metavar="<folder>",
        type=Path,
        help="a run folder, or one of <client>.sqlite: earlier releases from the same data",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    given = parser.parse(words)
    if given is None:
        return 0
    sizes = None if given.sizes is None else _sizes(given.sizes, given.overrides)
    found = plan(Request(tuple(given.overrides), sizes, given.ledgers), _say)
    print(strict_json.encode(found) if given.json else plan_tables(found).rstrip("\n"))
    return 0


def plan(request: Request, say: Callable[[str], None] = lambda _: None) -> Plan:
    """Return the plan of a run or a sweep.

    Args:
        request: What to plan.
        say: Told what is being done.

    Raises:
        FedlrError: The configuration does not hold together or does not fit an
            operator's policy, the data or a ledger cannot be read, or no noise reaches a
            target.
    """
    combinations = list(itertools.islice(spread(_with_clients(request)), MOST_RUNS + 1))
    if len(combinations) > MOST_RUNS:
        raise ConfigError([f"the sweep has more than {MOST_RUNS} runs; plan it in parts"])
    configs = [compose(combination) for combination in combinations]
    return plan_runs(configs, _varied(combinations), request, say)


def plan_runs(
    configs: Sequence[RunConfig],
    varied: Sequence[tuple[str, ...]],
    request: Request,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return the plan of runs that are composed already.

    Args:
        configs: At least one.
        varied: What is shown as each run's own.
        request: Sizes and ledgers; its overrides have no part in it.
        say: Told what is being done.

    Raises:
        FedlrError: As `plan`.
    """
    from fedlr.cli.operators import about_ledgers
    from fedlr.forecast import check_units, compose_runs

    check_units(configs)
    given = _read_given(configs, request.ledgers)
    planned, runs = _runs(configs, varied, request, given or {}, say)
    notices = [*about_ledgers(planned, given), *run_notices(runs)]
    # One that promises nothing would make all of them promise nothing.
    private = [run for run in planned if run.config.privacy.mode == "dp"]
    composed = None
    if len(configs) > 1 and private:
        alike = len({_dealt(run.config) for run in private}) == 1
        say(f"composing {len(private)} runs")
        composed = compose_runs(private, alike)
        notices += _about_composition(composed, private, alike)
        if bare := len(planned) - len(private):
            notices.append(
                f"{_counted(bare, 'run')} without noise {'is' if bare == 1 else 'are'} left out of "
                "the composition: nothing bounds what they release of the same data"
            )
    return Plan(runs=runs, composed=composed, notices=tuple(notices))


def _runs(
    configs: Sequence[RunConfig],
    varied: Sequence[tuple[str, ...]],
    request: Request,
    given: Mapping[str, Earlier],
    say: Callable[[str], None],
) -> tuple[list[Planned], tuple[RunForecast, ...]]:
    """Return every run with its forecast; ConfigError at once for all that does not fit."""
    from fedlr.cli.operators import bounds_of, hold, policies_of
    from fedlr.forecast import Planned, forecast
    from fedlr.planning import plan_sizes

    policies = policies_of(configs)
    splits = _splits(configs, request.sizes, say)
    earlier = hold(configs, policies, splits, given)
    planned, runs = list[Planned](), list[RunForecast]()
    for number, (config, chosen) in enumerate(zip(configs, varied, strict=True)):
        if len(configs) > 1:
            say(f"run {number + 1} of {len(configs)}: {' '.join(chosen)}")
        tell = say if len(configs) == 1 else lambda _: None
        terms = plan_sizes(config, splits[number].sizes, say=tell)
        planned.append(Planned(config, terms, bounds_of(policies[number]), earlier[number]))
        tell(f"composing ε of {_counted(config.federation.rounds, 'round')}")
        found = forecast(planned[-1], _cohorts(config))
        data = found.data if request.sizes is None else "clients of the given sizes"
        runs.append(replace(found, overrides=chosen, data=data))
    return planned, tuple(runs)


def _read_given(configs: Sequence[RunConfig], folder: Path | None) -> dict[str, Earlier] | None:
    """Return what the ledgers of ``--ledgers`` hold, by client; None without that option."""
    from fedlr.planning import client_name
    from fedlr.privacy.earlier import read_ledgers

    if folder is None:
        return None
    most = max(config.federation.clients for config in configs)
    return read_ledgers(folder, [client_name(index) for index in range(most)])


def _splits(
    configs: Sequence[RunConfig], sizes: tuple[int, ...] | None, say: Callable[[str], None]
) -> list[Split]:
    """Return how the data fall in every run; data that are split alike are read once."""
    from fedlr.planning import Split

    if sizes is not None:  # the data need not be there: labels are those that are configured
        return [Split(sizes, config.data.label_names) for config in configs]
    known: dict[object, Split] = {}
    for config in configs:
        if (key := _dealt(config)) not in known:
            known[key] = _read(config, say)
    return [known[_dealt(config)] for config in configs]


def _read(config: RunConfig, say: Callable[[str], None]) -> Split:
    from fedlr.build import check_names, source_spec
    from fedlr.planning import read_split

    check_names(config)
    return read_split(config, source_spec(config), say)


def _dealt(config: RunConfig) -> object:
    """Return what decides which client holds which row."""
    units = (config.federation.clients, config.privacy.unit)
    return (config.seed, config.data, config.partition, *units)


def _cohorts(config: RunConfig) -> list[tuple[int, ...]]:
    """Return the clients of every round, as the server will draw them."""
    from server.cohort import cohort

    federation = config.federation
    return [
        cohort(config.seed, number, range(federation.clients), federation.clients_per_round)
        for number in range(federation.rounds)
    ]


def _sizes(text: str, others: Sequence[str] = ()) -> tuple[int, ...]:
    """Return the numbers of ``--sizes``; ConfigError where one is no size, or stands alone."""
    if more := [word for word in others if word.strip(",").isdecimal()]:
        raise ConfigError(
            [f"--sizes {text} {more[0]}: write the sizes as one word, --sizes 1200,800"]
        )
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not (word.isascii() and word.isdecimal() and int(word))]
    if wrong:
        raise ConfigError(
            [f"--sizes {text}: {wrong[0]!r} must be a whole number ≥ 1; write --sizes 1200,800"]
        )
    return tuple(map(int, words))


def _with_clients(request: Request) -> list[str]:
    """Return the overrides; with sizes, as many clients as those, unless they say it themselves."""
    words = list(request.overrides)
    if request.sizes is None:
        return words
    count = len(request.sizes)
    named = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in words}
    if named.get(_CLIENTS[0], str(count)) != str(count):
        raise ConfigError(
            [
                f"{_CLIENTS[0]}={named[_CLIENTS[0]]} but --sizes gives "
                f"{_counted(count, 'client')}; leave one of the two out"
            ]
        )
    return [*(f"{name}={count}" for name in _CLIENTS if name not in named), *words]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _varied(combinations: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the overrides of each combination that are not those of all; of one alone, none."""
    columns = [len(set(column)) > 1 for column in zip(*combinations, strict=True)]
    return [tuple(map(_as_typed, itertools.compress(words, columns))) for words in combinations]


def _as_typed(word: str) -> str:
    """Return an override without the escape that Hydra gives a colon and does not need.

    Within quotes and brackets a backslash may be one, and stays.

    Example:
        >>> _as_typed("adapter.layers=top\\\\:1"), _as_typed("data.path='x:1'")
        ('adapter.layers=top:1', "data.path='x:1'")
    """
    name, _, value = word.partition("=")
    if value.startswith(("'", '"', "[", "{")):
        return word
    # Pair by pair: the second of two backslashes escapes nothing.
    shown = _ESCAPED.sub(lambda pair: ":" if pair[1] == ":" else pair[0], value)
    return f"{name}={shown}"


def _about_composition(composed: Composed, planned: Sequence[Planned], alike: bool) -> list[str]:
    """Say how a sweep was composed, and where a policy would not let all of it happen."""
    notices = []
    if not alike:
        notices.append(
            "the runs deal the data differently, so any client of a run may hold a given unit: "
            "each run is composed at the least σ and the largest q of its clients; for sites "
            "whose rows stay where they are that is an upper bound"
        )
    over = {
        name
        for run in planned
        for name, bounds in run.bounds.items()
        if bounds.epsilon_total is not None
        and composed.by_client.get(name, composed.epsilon_max) > bounds.epsilon_total
    }
    if over:
        notices.append(
            f"all runs composed cost more than policy.epsilon_total of {listed(over)}: with one "
            "ledger over all runs the later ones stop early, without one nothing stops them"
        )
    return notices


def _say(line: str) -> None:
    print(f"fedlr: {line}", file=sys.stderr, flush=True)
