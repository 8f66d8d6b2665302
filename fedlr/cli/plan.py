"""``fedlr plan``: noise and ε of a run, or of a sweep, before anything is trained."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.arguments import Parser
from fedlr.cli.compose import compose
from fedlr.cli.overrides import spread
from fedlr.config import RunConfig
from fedlr.errors import ConfigError, LedgerError
from fedlr.report import strict_json
from fedlr.report.plan import Composed, Plan, RunForecast, listed, plan_tables, run_notices

if TYPE_CHECKING:
    from fedlr.forecast import Bounds, Earlier, Planned
    from fedlr.planning import Terms
    from fedlr.privacy.limits import Declared, Limits

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
would in the run. Where a policy names a ledger over all runs, what that holds is counted,
and privacy.epsilon bounds the new run alone.

Overrides are those of `fedlr simulate`. Several values in one, such as
  fedlr plan privacy.epsilon=1,3,8 method=fedsvd,ffa_lora
are a sweep: every combination is planned, and ε of all of them on the same data is printed,
which is what choosing one of the runs by its result on these data costs."""


_CLIENTS = ("federation.clients", "federation.clients_per_round")


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
    from fedlr.forecast import check_units, compose_runs

    check_units(configs)
    planned, runs = _runs(configs, _varied(combinations), request, say)
    alike = len({_split(config) for config in configs}) == 1
    composed = None
    if len(configs) > 1:
        say(f"composing {len(configs)} runs")
        composed = compose_runs(planned, alike)
    notices = [*_about_ledgers(request, planned), *run_notices(runs)]
    if composed is not None:
        notices += _about_composition(composed, planned, alike)
    return Plan(runs=runs, composed=composed, notices=tuple(notices))


def _runs(
    configs: Sequence[RunConfig],
    varied: Sequence[tuple[str, ...]],
    request: Request,
    say: Callable[[str], None],
) -> tuple[list[Planned], tuple[RunForecast, ...]]:
    """Return every run with its forecast; ConfigError at once for all that does not fit."""
    from fedlr.forecast import Planned, forecast, read_ledgers
    from fedlr.planning import client_name, plan_sizes

    policies = _policies(configs)
    names = [client_name(i) for i in range(max(config.federation.clients for config in configs))]
    given = {} if request.ledgers is None else read_ledgers(request.ledgers, names)
    sizes = _all_sizes(configs, request.sizes, say)
    ledgers = _check(configs, policies, sizes, given)
    planned, runs = list[Planned](), list[RunForecast]()
    for number, (config, chosen) in enumerate(zip(configs, varied, strict=True), start=1):
        if len(configs) > 1:
            say(f"run {number} of {len(configs)}: {' '.join(chosen)}")
        tell = say if len(configs) == 1 else lambda _: None
        terms = plan_sizes(config, sizes[number - 1], say=tell)
        limits = policies[number - 1]
        bounds = {name: _bounds(limit) for name, limit in limits.items()}
        own = {n: ledgers[p.ledger] for n, p in limits.items() if p.ledger in ledgers}
        planned.append(Planned(config, terms, bounds, {**own, **given}))
        tell(f"composing ε of {config.federation.rounds} rounds")
        found = forecast(planned[-1], _cohorts(config))
        data = found.data if request.sizes is None else "clients of the given sizes"
        runs.append(replace(found, overrides=chosen, data=data))
    return planned, tuple(runs)


def _policies(configs: Sequence[RunConfig]) -> list[dict[str, Limits]]:
    """Return what operators allow in every run; ConfigError with all that is wrong."""
    from fedlr.orders import read_policies

    found, problems = [], list[str]()
    for config in configs:
        try:
            found.append(read_policies(config))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def _check(
    configs: Sequence[RunConfig],
    policies: Sequence[Mapping[str, Limits]],
    sizes: Sequence[tuple[int, ...]],
    given: Collection[str],
) -> dict[Path | None, Earlier]:
    """Hold every run against the policies, before any noise is calibrated for it.

    Args:
        configs: The runs.
        policies: Of each run, by client.
        sizes: Units of the clients of each run.
        given: Clients whose ledgers are given; those that their policies name do not count.

    Returns:
        What the ledgers that policies name hold, by path; without those that are not there.

    Raises:
        ConfigError: With everything that does not fit, of all clients and runs.
    """
    from fedlr.planning import client_name, plan_sizes

    problems: list[str] = []
    ledgers: dict[Path | None, Earlier] = {}
    for config, limits, counts in zip(configs, policies, sizes, strict=True):
        owners: dict[Path, str] = {}
        try:
            noise = {client_name(index): 1.0 for index in range(len(counts))}  # of no account here
            terms = [term for term in plan_sizes(config, counts, noise) if term.name in limits]
        except ConfigError as error:
            problems += error.problems
            continue
        for term in terms:
            policy = limits[term.name]
            problems += policy.conflicts(_declared(config, term, policy))
            if policy.ledger is None or term.name in given:
                continue
            if (other := owners.setdefault(policy.ledger, term.name)) != term.name:
                problems.append(
                    f"the policies of {other} and {term.name} name one ledger, {policy.ledger}; "
                    "give each client that of its own data"
                )
            elif policy.ledger not in ledgers:
                problems += _read_own(term.name, policy, ledgers)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return ledgers


def _declared(config: RunConfig, term: Terms, policy: Limits) -> Declared:
    """Return what the run says of a client; a label list that is not configured is not held
    against the policy's, for the data need not be there."""
    from fedlr.privacy.limits import Declared

    return Declared(
        client=term.name,
        mode=config.privacy.mode,
        declared_size=term.declared_size,
        unit=config.privacy.unit,
        delta=term.delta,
        method=config.method.name,
        labels=config.data.label_names or policy.labels or (),
    )


def _read_own(client: str, policy: Limits, ledgers: dict[Path | None, Earlier]) -> list[str]:
    """Put what the ledger of a policy holds into ``ledgers``; return what is wrong with it."""
    from fedlr.forecast import read_ledger
    from fedlr.privacy import witness

    path = policy.ledger
    if path is None or not (path.exists() or witness.beside(path).exists()):
        return []
    try:
        ledgers[path] = read_ledger(path, policy.source_id)
    except LedgerError as error:
        return [f"the policy of {client}: {error}"]
    return []


def _bounds(policy: Limits) -> Bounds:
    """Return the plain numbers of a policy; thirty days end today."""
    from fedlr.forecast import Bounds
    from fedlr.privacy.booking import DAY_S, MONTH_DAYS

    return Bounds(
        epsilon_total=policy.epsilon_total,
        epsilon_per_run=policy.epsilon_per_run,
        epsilon_per_month=policy.epsilon_per_month,
        month_start=int(time.time()) // DAY_S - MONTH_DAYS + 1,
        max_joins=policy.max_joins,
        own_ledger=policy.ledger is not None,
    )


def _all_sizes(
    configs: Sequence[RunConfig], sizes: tuple[int, ...] | None, say: Callable[[str], None]
) -> list[tuple[int, ...]]:
    """Return the units of the clients of every run; data that are split alike are read once."""
    known: dict[object, tuple[int, ...]] = {}
    for config in configs:
        if (key := _split(config)) not in known:
            known[key] = _read(config, say) if sizes is None else sizes
    return [known[_split(config)] for config in configs]


def _read(config: RunConfig, say: Callable[[str], None]) -> tuple[int, ...]:
    from fedlr.build import check_names, source_spec
    from fedlr.planning import read_sizes

    check_names(config)
    return read_sizes(config, source_spec(config), say)


def _split(config: RunConfig) -> object:
    """Return what decides which client holds which row."""
    units = (config.federation.clients, config.privacy.unit)
    return (config.seed, config.data, config.partition, *units)


def _cohorts(config: RunConfig) -> list[tuple[int, ...]]:
    """Return the clients of every round, as the server will draw them."""
    from server.cohort import cohort

    federation = config.federation
    return [
        cohort(config.seed, number, federation.clients, federation.clients_per_round)
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
                f"{_CLIENTS[0]}={named[_CLIENTS[0]]} but --sizes gives {count} clients; "
                "leave one of the two out"
            ]
        )
    return [*(f"{name}={count}" for name in _CLIENTS if name not in named), *words]


def _varied(combinations: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the overrides of each combination that are not those of all; of one alone, none."""
    columns = [len(set(column)) > 1 for column in zip(*combinations, strict=True)]
    return [tuple(itertools.compress(words, columns)) for words in combinations]


def _about_ledgers(request: Request, planned: Sequence[Planned]) -> list[str]:
    """Say what is not counted of earlier runs, and what the run itself would not know."""
    private = [run for run in planned if run.config.privacy.mode == "dp"]
    names = dict.fromkeys(term.name for run in private for term in run.terms)
    held = {name for run in private for name in run.earlier}
    own = {name for run in private for name, policy in run.bounds.items() if policy.own_ledger}
    missing, notices = [name for name in names if name not in held], list[str]()
    if missing and request.ledgers is None and not own:
        return [
            "earlier releases from the same data are not counted; --ledgers <run folder> adds "
            "what its ledgers hold"
        ]
    if missing:
        notices.append(f"no ledger of {listed(missing)}: nothing is counted there")
    if lacking := [name for name in missing if name in own]:
        notices.append(
            f"the ledger that the policy of {listed(lacking)} names does not exist: the run is "
            "refused until `fedlr ledger new` has made it"
        )
    if free := [name for name in names if name in held - own]:
        notices.append(
            f"a simulated run begins a ledger of its own for {listed(free)} and does not know "
            "what --ledgers hold; to be stopped there, name the ledger in the client's policy"
        )
    return notices


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
