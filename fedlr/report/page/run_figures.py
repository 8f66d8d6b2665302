"""The figures of a run by round: accuracy, ε, bytes, time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedlr.report import units
from fedlr.report.page.drawing import SIZE, Drawing, Theme, draw, literal
from fedlr.report.page.run_files import RunFiles
from fedlr.report.stops import stops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[tuple[int, float], ...]
"""(round, value) pairs in rising order."""

_MOST_LINES = 6
_LONGEST_LABEL = 23
"""Characters of a label that leave room for a second one beside it."""

_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def accuracy(files: RunFiles) -> Drawing | None:
    """Draw accuracy over rounds, the untrained model and a constant answer; None without one."""
    points = [(r.round, r.accuracy) for r in files.records if r.accuracy is not None]
    start = files.summary.accuracy_start if files.summary else None
    if not points and start is None:
        return None
    majority = files.facts.majority
    line = ([(0, start)] if start is not None else []) + points

    def plot(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(
            [x for x, _ in line],
            [100 * y for _, y in line],
            color=theme.palette[0],
            marker="o",
            label="trained",
        )
        if start is not None:
            axes.plot(
                [0],
                [100 * start],
                linestyle="none",
                marker="o",
                markersize=9,
                markerfacecolor=theme.background,
                markeredgecolor=theme.palette[0],
                label=f"untrained, {units.percent(start)}",
            )
        label = f"majority class, {units.percent(majority)}"
        axes.axhline(100 * majority, color=theme.muted, linestyle="--", label=label)
        axes.set_ylabel("accuracy (%)")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2.0), min(high, 102.0))
        by_round(axes, _last_round(files))
        legend_below(figure, axes)

    last = points[-1] if points else (0, start or 0.0)
    return draw(
        "accuracy",
        "Accuracy on the public validation data. The dashed line is what a constant answer scores.",
        f"Line of accuracy by round: {_told(start, 'before training')}{units.percent(last[1])} "
        f"after round {last[0]}; the majority class is {units.percent(majority)}.",
        plot,
    )


def epsilon(files: RunFiles) -> Drawing | None:
    """Draw ε of each client over rounds, its budget and where it stopped; None without any."""
    series = _epsilon_series(files)
    if not series:
        return None
    budget = _budget(files)
    stopped = {c: number for c, (number, _) in stops(files.records).items() if c in series}
    groups = _grouped(series)
    largest = max(line[-1][1] for line in series.values())

    def plot(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        if len(groups) <= _MOST_LINES:
            for index, (clients, line) in enumerate(groups):
                x, y = zip(*line, strict=True)
                # Lines that meet are told apart by their widths: the first drawn is the widest.
                width = 1.6 + 1.1 * (len(groups) - 1 - index)
                label = _clients_label(clients)
                axes.plot(x, y, color=theme.palette[index], linewidth=width, label=label)
        else:
            _many_lines(axes, [line for _, line in groups], theme, len(series))
        if budget is not None:
            label = f"budget, {units.privacy_loss(budget)}"
            axes.axhline(budget, color=theme.muted, linestyle="--", label=label)
        _mark_stops(axes, series, stopped, theme)
        axes.set_ylabel("ε spent so far")
        axes.set_ylim(bottom=0.0)
        by_round(axes, _last_round(files))
        legend_below(figure, axes)

    rows = math.ceil((min(len(groups), _MOST_LINES) + 2) / 2)
    who = f"{len(stopped)} of them stopped because they had given what they may"
    return draw(
        "epsilon",
        f"ε that each client has spent, at δ = {_delta(files):.3g}."
        + (" A cross is where a client stopped, because it had given what it may." * bool(stopped)),
        f"Lines of ε by round for {len(series)} clients; the largest is "
        f"{units.privacy_loss(largest)}"
        + (f", the budget {units.privacy_loss(budget)}" if budget is not None else "")
        + (f"; {who}." if stopped else "."),
        plot,
        (SIZE[0], SIZE[1] + 0.21 * (rows - 1)),
    )


def traffic(files: RunFiles) -> Drawing | None:
    """Draw the bytes of each round, both ways; None without a round."""
    down: Series = tuple((r.round, float(r.bytes_down)) for r in files.records)
    up: Series = tuple((r.round, float(r.bytes_up)) for r in files.records)
    if not down:
        return None
    most = max(y for _, y in (*down, *up))
    scale, unit = next(pair for pair in _SIZES if most >= pair[0] or pair[0] == 1.0)

    def plot(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for index, (name, line) in enumerate((("down, to clients", down), ("up, to server", up))):
            scaled = tuple((x, y / scale) for x, y in line)
            _line(axes, scaled, theme.palette[index], name, "os"[index])
        axes.set_ylabel(f"payload of a round ({unit})")
        axes.set_ylim(bottom=0.0)
        by_round(axes, _last_round(files))
        legend_below(figure, axes)

    total = sum(y for _, y in down), sum(y for _, y in up)
    return draw(
        "bytes",
        "Encoded payload of all clients of a round, without what the transport adds.",
        f"Lines of bytes by round: {units.data_size(total[0])} down and "
        f"{units.data_size(total[1])} up in all.",
        plot,
    )


def time(files: RunFiles) -> Drawing | None:
    """Draw how long each round took, and what of it was aggregation; None without a round."""
    whole: Series = tuple((r.round, r.wall_s) for r in files.records)
    server: Series = tuple((r.round, r.server_s) for r in files.records)
    if not whole:
        return None

    def plot(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        rest = tuple((x, w - s) for (x, w), (_, s) in zip(whole, server, strict=True))
        _line(axes, rest, theme.palette[0], "training, transport, evaluation")
        _line(axes, server, theme.palette[1], "aggregation on the server", "s")
        axes.set_yscale("log")
        axes.set_ylabel("seconds of a round")
        by_round(axes, _last_round(files))
        legend_below(figure, axes)

    total, part = sum(y for _, y in whole), sum(y for _, y in server)
    return draw(
        "time",
        "Time of each round as the server measured it; the axis is logarithmic.",
        f"Lines of seconds by round: {units.duration(total)} in all rounds, of it "
        f"{units.duration(part)} aggregation.",
        plot,
    )


def by_round(axes: Axes, last: int) -> None:
    """Make the horizontal axis one of whole rounds from 0 to ``last``."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("closed rounds")
    axes.set_xlim(-0.03 * max(last, 1), 1.03 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend under the axes, where it can cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > _LONGEST_LABEL else 2
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10
    )


def _epsilon_series(files: RunFiles) -> dict[str, Series]:
    """Return ε by client after every closed round; 0 before its first release.

    A round after which it was unknown has no point; a client whose ε is unknown has no line.
    """
    names = sorted({client for record in files.records for client in record.epsilon_by_client})
    found: dict[str, Series] = {}
    for client in names:
        line, spent = [(0, 0.0)], 0.0
        for record in files.records:
            spent = record.epsilon_by_client.get(client, spent)
            if math.isfinite(spent):
                line.append((record.round, spent))
        if math.isfinite(spent):
            found[client] = tuple(line)
    return found


def _grouped(series: Mapping[str, Series]) -> list[tuple[list[str], Series]]:
    """Return clients that spent the same in every round together."""
    groups: dict[Series, list[str]] = {}
    for client, line in series.items():
        groups.setdefault(tuple((x, round(y, 6)) for x, y in line), []).append(client)
    return [(clients, series[clients[0]]) for clients in groups.values()]


def _clients_label(clients: Sequence[str]) -> str:
    if len(clients) <= 2:
        return literal(", ".join(clients))
    return literal(f"{clients[0]} and {len(clients) - 1} others")


def _many_lines(axes: Axes, lines: Sequence[Series], theme: Theme, clients: int) -> None:
    """Draw more lines than there are colours: all thin, the highest one on top."""
    highest = max(lines, key=lambda line: line[-1][1])
    for index, line in enumerate(lines):
        label = f"each of {clients} clients" if index == 0 else None
        axes.plot(*zip(*line, strict=True), color=theme.palette[0], linewidth=0.9, label=label)
    _line(axes, highest, theme.palette[1], "the client that spent most")


def _mark_stops(
    axes: Axes, series: Mapping[str, Series], stopped: Mapping[str, int], theme: Theme
) -> None:
    """Put a cross where a client last joined before it stopped."""
    marks = []
    for client, number in stopped.items():
        marks.append(max(point for point in series[client] if point[0] < max(number, 1)))
    if marks:
        axes.plot(
            *zip(*marks, strict=True),
            linestyle="none",
            marker="X",
            markersize=11,
            markerfacecolor=theme.palette[1],
            markeredgecolor=theme.background,
            label=f"stopped ({len(marks)} client{'s' * (len(marks) > 1)})",
        )


def _line(axes: Axes, line: Series, colour: str, label: str, marker: str = "o") -> None:
    x, y = [x for x, _ in line], [y for _, y in line]
    axes.plot(x, y, color=colour, marker=marker if len(x) <= 60 else "", label=label)


def _last_round(files: RunFiles) -> int:
    return files.records[-1].round if files.records else 0


def _budget(files: RunFiles) -> float | None:
    """Return the ε that a client may spend in the run; None where none is finite."""
    summary = files.summary
    found = summary.epsilon_budget if summary else files.setting("privacy.epsilon")
    usable = isinstance(found, int | float) and math.isfinite(found)
    return float(found) if usable and found is not None else None


def _delta(files: RunFiles) -> float:
    return max((client.delta for client in files.facts.clients), default=0.0)


def _told(share: float | None, when: str) -> str:
    return "" if share is None else f"{units.percent(share)} {when}, "
