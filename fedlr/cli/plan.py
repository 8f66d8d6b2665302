"""``fedlr plan``: noise and ε of a run, or of a sweep, before anything is trained."""

from __future__ import annotations

import itertools
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
from fedlr.report.plan import Plan, RunForecast, plan_tables

if TYPE_CHECKING:
    from fedlr.planning import Terms

MOST_RUNS = 200
"""Combinations of one sweep; composing more takes minutes and is most likely a slip."""

_ABOUT = """\
Print what a run would cost, before it is trained: for each client N, δ, q, σ, steps and
joins, and ε after every round. Nothing is trained and no model is loaded; the data are read
to be split over the clients, unless --sizes gives their sizes.

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
    parser.add_argument("--sizes", metavar="N,N,…", help="units of each client, instead of data")
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
    sizes = None if given.sizes is None else _sizes(given.sizes)
    found = plan(Request(tuple(given.overrides), sizes, given.ledgers), _say)
    print(strict_json.encode(found) if given.json else plan_tables(found).rstrip("\n"))
    return 0


def plan(request: Request, say: Callable[[str], None] = lambda _: None) -> Plan:
    """Return the plan of a run or a sweep.

    Args:
        request: What to plan.
        say: Told what is being done.

    Raises:
        FedlrError: The configuration does not hold together, the data or a ledger
            cannot be read, or no noise reaches a target.
    """
    combinations = list(itertools.islice(spread(_with_clients(request)), MOST_RUNS + 1))
    if len(combinations) > MOST_RUNS:
        raise ConfigError([f"the sweep has more than {MOST_RUNS} runs; plan it in parts"])
    configs = [compose(combination) for combination in combinations]
    from fedlr.forecast import check_units, compose_runs, forecast, read_ledgers
    from fedlr.planning import client_name

    check_units(configs)
    names = [client_name(i) for i in range(max(config.federation.clients for config in configs))]
    spent = {} if request.ledgers is None else read_ledgers(request.ledgers, names)
    terms = _terms(configs, request.sizes, say)
    runs = tuple(
        _named(forecast(config, own, _cohorts(config), spent, say), chosen, request)
        for config, own, chosen in zip(configs, terms, _varied(combinations), strict=True)
    )
    alike = request.sizes is not None or len({_split(config) for config in configs}) == 1
    composed = None
    if len(configs) > 1:
        say(f"composing {len(configs)} runs")
        composed = compose_runs(list(zip(configs, terms, strict=True)), alike, spent)
    notices = [*_about_ledgers(request, names, spent), *_about_bounds(runs)]
    if composed is not None and not alike:
        notices.append(
            "the runs deal the data differently, so any client of a run may hold a given unit: "
            "each run is composed at the least σ and the largest q of its clients"
        )
    return Plan(runs=runs, composed=composed, notices=tuple(notices))


def _named(run: RunForecast, overrides: tuple[str, ...], request: Request) -> RunForecast:
    """Return ``run`` with what it changes, and with what its sizes come from."""
    data = run.data if request.sizes is None else "clients of the given sizes"
    return replace(run, overrides=overrides, data=data)


def _terms(
    configs: Sequence[RunConfig], sizes: tuple[int, ...] | None, say: Callable[[str], None]
) -> list[tuple[Terms, ...]]:
    """Return the clients of every run; data that are split alike are read once."""
    from fedlr.planning import plan_sizes

    known: dict[object, tuple[int, ...]] = {}
    found = []
    for config in configs:
        key = _split(config)
        if key not in known:
            known[key] = _read(config, say) if sizes is None else sizes
        found.append(plan_sizes(config, known[key], say=say))
    return found


def _read(config: RunConfig, say: Callable[[str], None]) -> tuple[int, ...]:
    from fedlr.build import check_names, source_spec
    from fedlr.planning import read_sizes

    check_names(config)
    return read_sizes(config, source_spec(config), say)


def _split(config: RunConfig) -> object:
    """Return what decides which client holds which row."""
    return (
        config.seed,
        config.data,
        config.partition,
        config.federation.clients,
        config.privacy.unit,
    )


def _cohorts(config: RunConfig) -> list[tuple[int, ...]]:
    """Return the clients of every round, as the server will draw them."""
    from server.cohort import cohort

    federation = config.federation
    return [
        cohort(config.seed, number, federation.clients, federation.clients_per_round)
        for number in range(federation.rounds)
    ]


def _sizes(text: str) -> tuple[int, ...]:
    """Return the numbers of ``--sizes``; ConfigError where one is no size."""
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


def _about_ledgers(
    request: Request, names: Sequence[str], spent: Mapping[str, object]
) -> list[str]:
    """Say what is not counted of earlier runs."""
    if request.ledgers is None:
        return [
            "earlier releases from the same data are not counted; --ledgers <run folder> adds "
            "what its ledgers hold"
        ]
    missing = [name for name in names if name not in spent]
    return [f"no ledger of {', '.join(missing)}: nothing is counted there"] if missing else []


def _about_bounds(runs: Sequence[RunForecast]) -> list[str]:
    """Say where another accountant than the wanted one gave the number."""
    clients = sorted(
        {
            client.client
            for run in runs
            for client in run.clients
            if run.privacy_mode == "dp" and client.accountant != run.accountant
        }
    )
    if not clients:
        return []
    return [f"PRV failed, or was no better, for {', '.join(clients)}: ε there is the Rényi bound"]


def _say(line: str) -> None:
    print(f"fedlr: {line}", file=sys.stderr, flush=True)
