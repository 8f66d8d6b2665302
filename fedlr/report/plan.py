"""What a run will cost before it is trained: the records of ``fedlr plan`` and its tables."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedlr import checks
from fedlr.report import units

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class PathPoint:
    """ε of one client after one round; what earlier runs spent is in it.

    Attributes:
        round: Finished rounds, ≥ 1.
        maximum: ε if it joined every round so far (and stopped at its limit).
        expected: ε if it joined its expected share of them, rounded up to whole joins.
        scheduled: ε if it joined the rounds whose public cohorts it is in.
    """

    round: int
    maximum: float
    expected: float
    scheduled: float


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What ends a client's part before the last round; it takes no part in later ones.

    Attributes:
        by: The bound that does: ``privacy.epsilon`` or ``privacy.max_joins`` of the run, or
            ``policy.epsilon_total``, ``policy.epsilon_per_run``, ``policy.epsilon_per_month``
            or ``policy.max_joins`` of its operator.
        bound: The value of that bound.
        joins: Rounds it can join until then, ≥ 0; also the round after which it stops
            if it joins every round.
        scheduled_round: The round after which it stops with the public cohorts of this
            seed; 0 where it joins none, None where they never ask it too often.
    """

    by: str
    bound: float
    joins: int
    scheduled_round: int | None


@dataclass(frozen=True, kw_only=True)
class ClientForecast:
    """The public numbers of one client and what they cost.

    Attributes:
        client: Public identifier.
        declared_size: N.
        delta: δ.
        sample_rate: q.
        noise_multiplier: σ; 0 unless privacy is on.
        steps: Releases per joined round.
        max_joins: Rounds it may join at most: what σ is calibrated for.
        expected_joins: Mean number of rounds it joins, over the draws of cohorts.
        scheduled_joins: Rounds it joins with this seed, whose cohorts are public.
        affordable_joins: Rounds it can join until a bound ends its part: those of
            the run, and of its operator's policy.
        spent: ε of what its ledger holds already; 0.0 without one.
        left: The least that a budget leaves: it less ε of what counts against it, ≥ 0.
            Composed releases cost less than their sum, so ``affordable_joins`` says more
            exactly what it is good for.
        epsilon_max: ε after all rounds that it may join and can afford.
        epsilon_expected: ε after the expected number of them, rounded up.
        epsilon_scheduled: ε after those of this seed.
        accountant: Which accountant gave ``epsilon_max``.
        stop: What ends its part before the last round; None where nothing does.
        path: ε after some or all rounds, in order.
    """

    client: str
    declared_size: int
    delta: float
    sample_rate: float
    noise_multiplier: float
    steps: int
    max_joins: int
    expected_joins: float
    scheduled_joins: int
    affordable_joins: int
    spent: float
    left: float
    epsilon_max: float
    epsilon_expected: float
    epsilon_scheduled: float
    accountant: str
    stop: Stop | None = None
    path: tuple[PathPoint, ...]


@dataclass(frozen=True, kw_only=True)
class RunForecast:
    """One configuration.

    Attributes:
        overrides: What it changes, as on the command line.
        data: Name of the data source.
        method: Name of the federated method.
        privacy_mode: ``dp``, ``dry`` or ``none``.
        unit: Unit of privacy.
        accountant: The accountant that was asked for.
        budget: Target ε of every client, ``privacy.epsilon``.
        rounds: Number of rounds.
        clients_per_round: Cohort size.
        expected_batch: L, expected units per step.
        epsilon_max: Largest ``epsilon_max`` of any client: clients hold different
            units, so a federation costs its dearest client, no sum and no mean.
        epsilon_scheduled: Largest ``epsilon_scheduled`` of any client.
        clients: One entry per client, in client order.
    """

    overrides: tuple[str, ...]
    data: str
    method: str
    privacy_mode: str
    unit: str
    accountant: str
    budget: float
    rounds: int
    clients_per_round: int
    expected_batch: int
    epsilon_max: float
    epsilon_scheduled: float
    clients: tuple[ClientForecast, ...]


@dataclass(frozen=True, kw_only=True)
class Composed:
    """All runs of a sweep on the same data, and what earlier runs spent.

    Attributes:
        epsilon_max: Largest ε of any client, every run at its most joins.
        delta: δ of it, the smallest of the runs'.
        by_client: ε by client; empty where the runs deal the data differently.
    """

    epsilon_max: float
    delta: float
    by_client: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``fedlr plan`` answers.

    Attributes:
        runs: One or more configurations.
        composed: All of them together; None for a single one.
        notices: Sentences a reader of the numbers must know.
    """

    runs: tuple[RunForecast, ...]
    composed: Composed | None = None
    notices: tuple[str, ...] = ()


def run_notices(runs: Sequence[RunForecast]) -> list[str]:
    """Return what a reader of forecasts must know of how their numbers came about."""
    private = [run for run in runs if run.privacy_mode == "dp"]
    pairs = [(run, client) for run in private for client in run.clients]
    bounded = {client.client for run, client in pairs if client.accountant != run.accountant}
    whole = {client.client for _, client in pairs if client.sample_rate == 1}
    stops = {client.stop.by for _, client in pairs if client.stop is not None}
    notices = []
    if bounded:
        notices.append(
            f"PRV failed, or was no better, for {listed(bounded)}: ε there is the Rényi bound"
        )
    if "policy.epsilon_per_month" in stops:
        notices.append("the whole run is taken to fall into the thirty days that end today")
    if whole:
        notices.append(
            f"{listed(whole)}: N ≤ optimizer.expected_batch, so every step uses every unit (q = 1) "
            "and sampling hides none; a smaller expected_batch needs less noise"
        )
    return notices


def listed(names: Iterable[str]) -> str:
    """Return names in one line, however many.

    Example:
        >>> listed("ba"), listed("abcdef")
        ('a, b', 'a, b, c and 3 more')
    """
    ordered = sorted(names)
    if len(ordered) <= 4:
        return ", ".join(ordered)
    return f"{', '.join(ordered[:3])} and {len(ordered) - 3} more"


def plan_tables(plan: Plan, width: int = 100) -> str:
    """Return a plan as plain text: per run its clients and their ε by round, then the sweep.

    Args:
        plan: The plan.
        width: Longest line, in columns, ≥ 60.

    Raises:
        ValueError: ``width`` is below 60.
    """
    from rich.console import Console

    checks.at_least("width", width, 60)
    sink = io.StringIO()
    console = Console(file=sink, width=width, color_system=None, force_terminal=False)
    console.print(plan_view(plan))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"


def plan_view(plan: Plan) -> Group:
    """Return a plan for a rich console; of a sweep without ε by round."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Group | Table | Text] = []
    for run in plan.runs:
        parts += [Text(units.printable(_title(run))), Text(_facts(run)), _client_table(run)]
        parts += [*_spent(run), *_stops(run)]
        if len(plan.runs) == 1:
            parts += _paths(run)
    if plan.composed is not None:
        parts.append(Text("Choosing one of these runs by its result on the data costs them all."))
        parts.append(_sweep_table(plan.runs, plan.composed))
    parts += [Text(f"Note: {units.printable(notice)}") for notice in plan.notices]
    return Group(*parts)


_PATHS = {
    "maximum": "ε after round …, joining every round",
    "scheduled": "ε after round …, joining as the public cohorts of this seed fall",
    "expected": "ε after round …, joining the mean number of rounds",
}


def _title(run: RunForecast) -> str:
    return " ".join(run.overrides) or f"{run.method} on {run.data}"


def _facts(run: RunForecast) -> str:
    """Return one line on the whole run."""
    earlier = " with earlier runs" if any(client.spent for client in run.clients) else ""
    dearest = {
        "dp": f"ε max {units.privacy_loss(run.epsilon_max)} per {run.unit}{earlier}, budget "
        f"{units.privacy_loss(run.budget)}, accountant {run.accountant}",
        "dry": "ε = ∞: a dry run adds no noise",
        "none": "ε = ∞: privacy is off",
    }[run.privacy_mode]
    rounds = "1 round" if run.rounds == 1 else f"{run.rounds} rounds"
    return f"{rounds}, {run.clients_per_round} of {len(run.clients)} clients; {dearest}"


def _client_table(run: RunForecast) -> Table:
    """Return what each client's noise follows from, and its joins."""
    headings = ["N", "δ", "q", "σ", "steps", "joins\nmax", "mean", "seed"]
    table = _table("client", [*headings, "ε\nmax"])
    rows = []
    for client in run.clients:
        cells = [
            f"{client.declared_size:,}",
            f"{client.delta:.2g}",
            f"{client.sample_rate:.4g}",
            f"{client.noise_multiplier:.3f}",
            str(client.steps),
            str(client.max_joins),
            f"{client.expected_joins:.4g}",
            str(client.scheduled_joins),
        ]
        rows.append((client.client, [*cells, units.privacy_loss(client.epsilon_max)]))
    _add_alike(table, rows)
    return table


def _spent(run: RunForecast) -> list[Table | Text]:
    """Return what ledgers hold already, and what that leaves; nothing where they hold nothing."""
    from rich.text import Text

    if not any(client.spent for client in run.clients):
        return []
    table = _table("client", ["ε spent", "ε left", "joins left"])
    rows = []
    for client in run.clients:
        left = f"{math.floor(100 * client.left) / 100:.2f}"
        cells = [units.privacy_loss(client.spent), left, str(client.affordable_joins)]
        rows.append((client.client, cells))
    _add_alike(table, rows)
    return [Text("Ledgers hold earlier runs, which are in every ε here"), table]


def _stops(run: RunForecast) -> list[Table | Text]:
    """Return what ends clients' parts early, and after which round; nothing where none does."""
    from rich.text import Text

    stopped = [(client.client, client.stop) for client in run.clients if client.stop is not None]
    if not stopped:
        return []
    table = _table("client", ["bound", "last round,\njoining all", "last round,\nthis seed"])
    rows = [
        (name, [_bound(stop), _last(stop.joins), _last(stop.scheduled_round)])
        for name, stop in stopped
    ]
    _add_alike(table, rows)
    return [
        Text("A bound ends these clients' part before the last round"),
        table,
    ]


def _bound(stop: Stop) -> str:
    """Return name and value of the bound."""
    return f"{stop.by} = {stop.bound:g}"


def _last(number: int | None) -> str:
    """Return the last round of a client; it may join none, or never meet the bound."""
    return {None: "—", 0: "joins none"}.get(number, str(number))


def _paths(run: RunForecast) -> list[Table | Text]:
    """Return ε by client and round: at most, and the other ways where they differ."""
    from rich.text import Text

    points = [point for client in run.clients for point in client.path]
    same = all(point.maximum == point.scheduled == point.expected for point in points)
    parts: list[Table | Text] = []
    for name, title in _PATHS.items():
        if name == "maximum" or not same:
            parts += [Text(title), _path_table(run, name)]
    return parts


def _path_table(run: RunForecast, name: str) -> Table:
    """Return one way; ``name`` is a field of `PathPoint`."""
    table = _table("client", [str(point.round) for point in run.clients[0].path])
    values = [[getattr(point, name) for point in client.path] for client in run.clients]
    rows = [
        (client.client, [units.privacy_loss(value) for value in row])
        for client, row in zip(run.clients, values, strict=True)
    ]
    _add_alike(table, rows)
    if any(cells != rows[0][1] for _, cells in rows):
        largest = [max(column) for column in zip(*values, strict=True)]
        _add(table, "largest", [units.privacy_loss(value) for value in largest])
    return table


def _sweep_table(runs: Sequence[RunForecast], composed: Composed) -> Table:
    """Return ε of each run, and of all of them on the same data."""
    table = _table("run", ["ε max"])
    for run in runs:
        _add(table, _title(run), [units.privacy_loss(run.epsilon_max)])
    private = sum(run.privacy_mode == "dp" for run in runs)
    which = "all" if private == len(runs) else "the noised"
    name = f"{which} {private} runs composed, at δ = {composed.delta:.2g}"
    _add(table, name, [units.privacy_loss(composed.epsilon_max)])
    return table


def _table(first: str, others: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        # Folded, not cut: half a number would be another number.
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _add_alike(table: Table, rows: Sequence[tuple[str, list[str]]]) -> None:
    """Add rows, neighbours with equal cells as one: a hundred equal clients are one line."""
    for cells, group in itertools.groupby(rows, key=lambda row: row[1]):
        names = [name for name, _ in group]
        _add(table, names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", cells)


def _add(table: Table, name: str, cells: Sequence[str]) -> None:
    from rich.text import Text

    table.add_row(*(Text(units.printable(cell)) for cell in (name, *cells)))
