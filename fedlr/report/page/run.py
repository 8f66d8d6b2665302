"""The page of a run: finished, interrupted or still going."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlr.report import command, places, promise
from fedlr.report.page import frame, geometry_figures, run_figures, table
from fedlr.report.page.frame import (
    Block,
    Code,
    Facts,
    Figures,
    Folded,
    Listing,
    Page,
    Section,
    Text,
)
from fedlr.report.page.run_files import RunFiles, read_run
from fedlr.report.page.table import Column, Table
from fedlr.report.spectra import SpectrumRecord
from fedlr.report.stops import BOUNDS, stops

_BLANKS = (places.RUN_FOLDER, "<folder>", "<file>", "<address>")

_CUT_OFF = (
    "The ε here is that of the closed rounds: a round that was cut off may have spent more; the "
    "ledgers count it."
)


def write(
    folder: Path,
    output: Path | None,
    default: Mapping[str, Any],
    figures: bool = True,
    ended: bool = False,
) -> Path:
    """Write ``report.html`` and ``figures/`` of a run and return the page's file.

    Args:
        folder: The run folder.
        output: An existing folder to write into; None takes the run folder.
        default: The configuration that ``fedlr simulate`` composes without a word: the
            command on the page holds what differs from it.
        figures: Whether to write every figure as SVG and PNG too.
        ended: As in `read_run`.

    Raises:
        RunError: ``folder`` is no run folder, or the report cannot be written.
    """
    return frame.write(page_of(read_run(folder, ended), default), output or folder, figures)


def page_of(files: RunFiles, default: Mapping[str, Any]) -> Page:
    """Return the page of a run as its files tell; what they do not hold is said, not left out.

    Args:
        files: A run folder, read.
        default: As in `write`.
    """
    facts = files.facts
    method = str(files.setting("method.name", files.summary.method if files.summary else "run"))
    sections = (
        Section("Results", _results(files)),
        Section("By round", _by_round(files)),
        Section("Privacy", _privacy(files)),
        Section("Where the updates point", _geometry(files)),
        Section("Repeat and use", _commands(files, default)),
        Section("What it was made of", _made_of(files)),
    )
    return Page(
        title=f"{method} on {files.called(facts.data).strip('()')}",
        subtitle=f"{files.called(facts.model)}, {len(facts.clients)} clients · run {facts.run}",
        sections=sections,
        notices=_notices(files),
    )


def _notices(files: RunFiles) -> tuple[str, ...]:
    total = files.setting("federation.rounds")
    done = f"{files.completed} of {total} rounds" if total else f"{files.completed} rounds"
    state: tuple[str, ...] = ()
    if files.running:
        state = (f"This run is still going: {done} so far. Make the report again when it is done.",)
    elif files.summary is None:
        state = (
            f"This run was interrupted after {done}; the command below, under Repeat and use, goes "
            "on after the last whole one.",
        )
    told = files.summary.notices if files.summary else files.facts.notices
    return tuple(map(files.public, (*state, *files.problems, *told)))


def _results(files: RunFiles) -> tuple[Block, ...]:
    summary, records = files.summary, files.records
    rows = [
        ("Accuracy", table.share(summary.accuracy if summary else _last_accuracy(files))),
        ("Before training", table.share(summary.accuracy_start if summary else None)),
        ("Majority class", table.share(files.facts.majority)),
    ]
    if files.private != "none":
        spent = summary.epsilon_max if summary else (records[-1].epsilon_max if records else None)
        of_rounds = "ε of the closed rounds, largest of the clients"
        name = "ε, largest of the clients" if summary else of_rounds
        largest = max((client.delta for client in files.facts.clients), default=None)
        rows += [(name, table.epsilon(spent)), ("δ", table.number(largest))]
    rows.append(("Rounds", table.number(summary.rounds if summary else files.completed)))
    if summary is not None:
        rows += [
            ("Up, per client and round", table.size(summary.bytes_up)),
            ("Down, per client and round", table.size(summary.bytes_down)),
            ("Wall time", table.seconds(summary.wall_s)),
            ("of it aggregation", table.seconds(summary.server_s)),
        ]
    else:
        rows.append(("Wall time of the rounds", table.seconds(sum(r.wall_s for r in records))))
    unfinished = summary is None and files.private == "dp"
    return (Facts(tuple(rows), prominent=True), *((Text(_CUT_OFF),) if unfinished else ()))


def _by_round(files: RunFiles) -> tuple[Block, ...]:
    if not files.records:
        return (Text("No round is closed yet."),)
    drawings = tuple(
        drawing
        for draw in (
            run_figures.accuracy,
            run_figures.epsilon,
            run_figures.traffic,
            run_figures.time,
        )
        if (drawing := draw(files)) is not None
    )
    missing = {
        "none": "There is no figure of ε: the updates of this run were not protected.",
        "dry": "There is no figure of ε: a dry run adds no noise, so that ε = ∞.",
    }
    told = (Text(missing[files.private]),) if files.private in missing else ()
    return (*told, Figures(drawings), Folded("The numbers of every round", (_round_table(files),)))


def _round_table(files: RunFiles) -> Table:
    names = ("accuracy", "loss", "ε, largest", "joined", "down", "up", "seconds", "aggregation, s")
    return Table(
        "Closed rounds",
        (
            Column("round", True),
            *(Column(name, True) for name in names),
            Column("stayed out, and why"),
        ),
        tuple(
            (
                table.number(r.round),
                table.share(r.accuracy),
                table.number(r.loss, 4),
                table.epsilon(r.epsilon_max),
                table.Cell(f"{r.accepted} of {len(r.cohort)}", r.accepted),
                table.size(r.bytes_down),
                table.size(r.bytes_up),
                table.number(r.wall_s),
                table.number(r.server_s),
                table.word(", ".join(f"{x.client}: {x.code}" for x in r.refused) or "—"),
            )
            for r in files.records
        ),
    )


def _privacy(files: RunFiles) -> tuple[Block, ...]:
    if files.private in promise.UNPROTECTED:
        return (Text(promise.UNPROTECTED[files.private]), _client_table(files))
    summary = files.summary
    unit = str((summary.unit if summary else None) or files.setting("privacy.unit", "example"))
    if files.private != "dp" or unit not in promise.UNITS:
        return (Text("What was promised cannot be told: the configuration cannot be read."),)
    accountant = (summary.accountant if summary else None) or files.setting("privacy.accountant")
    said = (
        promise.GUARANTEE,
        promise.ADVERSARY,
        f"Unit: {unit}. Add or remove: {promise.neighbours(unit)}.",
        f"Accountant: {accountant}.",
        promise.SCOPE,
        promise.NOT_COVERED,
    )
    return (Listing(said), _client_table(files))


def _client_table(files: RunFiles) -> Table:
    stopped = stops(files.records)
    ends = {client.client: client for client in files.summary.clients} if files.summary else {}
    latest = dict(files.records[-1].epsilon_by_client) if files.records else {}
    rows = []
    for client in files.facts.clients:
        name, end = client.client, ends.get(client.client)
        number, code = stopped.get(name, (None, None))
        rows.append(
            (
                table.word(name),
                table.number(client.declared_size),
                table.number(end.joins if end else _joins(files, name)),
                table.number(end.steps if end else None),
                table.number(client.noise_multiplier, 4),
                table.epsilon(end.epsilon if end else latest.get(name)),
                table.number(number),
                table.word(f"{BOUNDS[code]} ({code})" if code else "—"),
            )
        )
    spent = "ε spent" if files.summary else "ε of the closed rounds"
    names = ("declared size", "rounds joined", "steps", "σ", spent, "stopped before round")
    columns = (Column("client"), *(Column(name, True) for name in names), Column("why it stopped"))
    return Table("Clients", columns, tuple(rows))


def _geometry(files: RunFiles) -> tuple[Block, ...]:
    records = files.spectra
    if not records or not records[-1].sites:
        return (Text(_no_spectra(files)),)
    found = files.intruders
    drawings = (
        geometry_figures.spectrum_by_site(records[-1]),
        geometry_figures.effective_rank(records),
        geometry_figures.angles(records),
        geometry_figures.intruders(found) if found else None,
        geometry_figures.spectrum_by_round(records),
    )
    notes = (
        "Everything here is computed from the model that the server publishes: it costs no ε.",
        *(("The update is zero so far: it has no spectrum.",) if drawings[0] is None else ()),
        *_about_intruders(files),
    )
    return (
        *(Text(note) for note in notes),
        Figures(tuple(drawing for drawing in drawings if drawing is not None)),
        Folded("The numbers of every layer", (_layer_table(files, records[-1]),)),
    )


def _no_spectra(files: RunFiles) -> str:
    if not files.completed:
        return "No round has changed the model yet."
    return (
        "Nothing is recorded of it: the run was made by an earlier version of fedlr, or its "
        "method has no pair of factors."
    )


def _about_intruders(files: RunFiles) -> tuple[str, ...]:
    found = files.intruders
    if found is None:
        when = "once the run has ended" if files.summary is None else "when the run ended"
        done = "are" if files.summary is None else "were not"
        return (f"Intruder dimensions {done} looked at {when}.",)
    total = sum(found.count(site) for site in found.sites)
    sentence = (
        f"Intruder dimensions (Shuttleworth et al., arXiv 2410.21228): {total}, over "
        f"{len(found.sites)} of {found.of_sites} layers. One is a left singular vector of "
        f"W + s·B·A, among the {found.leading} leading ones, whose largest cosine with those of "
        f"W is below {found.threshold:g}."
    )
    return (sentence,) if found.missing is None else (sentence, found.missing)


def _layer_table(files: RunFiles, last: SpectrumRecord) -> Table:
    found = files.intruders
    counts = {site.site: found.count(site) for site in found.sites} if found else {}
    names = ("largest singular value", "smallest", "effective rank", "angle, degrees", "intruders")
    rows = tuple(
        (
            table.word(site.site),
            table.number(max(site.singular_values, default=None)),
            table.number(min(site.singular_values, default=None)),
            table.number(site.effective_rank),
            table.number(None if site.angle_rad is None else math.degrees(site.angle_rad)),
            table.number(counts.get(site.site)),
        )
        for site in last.sites
    )
    columns = (Column("layer"), *(Column(name, True) for name in names))
    return Table(f"Layers after round {last.round}", columns, rows)


def _commands(files: RunFiles, default: Mapping[str, Any]) -> tuple[Block, ...]:
    folder = places.RUN_FOLDER
    blocks: list[Code] = []
    if files.config:
        stand_ins = {name: f"<{kind}>" for name, kind in files.withheld.items()}
        words = command.overrides(files.config, default, stand_ins)
        again = command.shell(["fedlr", "simulate", *words])
        blocks.append(Code("Run the same configuration again:", again))
    if files.summary is None and not files.running:
        resume = command.shell(["fedlr", "simulate", f"resume={folder}"])
        blocks.append(Code("Go on where it stopped:", resume))
    if files.completed:
        text = "a text to classify"
        blocks += [
            Code("Classify a text:", command.shell(["fedlr", "predict", folder, text])),
            Code(
                "Write a whole model, which needs neither PEFT nor fedlr:",
                command.shell(["fedlr", "export", folder, "--merge"]),
            ),
        ]
    if files.loader is not None:
        blocks.append(
            Code("Load the adapter without fedlr, from the folder adapter:", _loader(files))
        )
    if not blocks:
        return (Text("There is nothing to repeat: the configuration is missing."),)
    blanks = [name for name in _BLANKS if any(name in block.text for block in blocks)]
    fill = (
        f"This page names no place of the machine that the run was made on. Fill in "
        f"{' and '.join(blanks)} before a command is run."
    )
    return (*((Text(fill),) if blanks else ()), *blocks)


def _loader(files: RunFiles) -> str:
    """Return the Python that loads the adapter; the model's folder is left to be filled in."""
    text = files.loader or ""
    for model in (files.facts.model, files.setting("model.name", "")):
        if files.called(model) != model:
            text = text.replace(json.dumps(model, ensure_ascii=False), '"<folder>"')
    return text


def _made_of(files: RunFiles) -> tuple[Block, ...]:
    facts = files.facts
    items = (
        ("Model", files.called(facts.model)),
        ("Data", files.called(facts.data)),
        ("Labels", ", ".join(facts.label_names)),
        ("Git revision", files.revision or "not run from a checkout"),
        ("Base weights, sha256", facts.base),
        ("Tokenizer, sha256", facts.tokenizer),
        ("Data, sha256", facts.data_sha256),
        ("Configuration, sha256", facts.config_sha256),
    )
    versions = tuple((table.word(k), table.word(v)) for k, v in sorted(files.versions.items()))
    hidden = {name: places.WORDS[kind] for name, kind in files.withheld.items()}
    rows = tuple((table.word(k), table.word(v)) for k, v in command.settings(files.config, hidden))
    inner: list[Block] = [
        Folded("Versions", (Table("Packages", (Column("package"), Column("version")), versions),)),
        Folded("Configuration", (Table("Settings", (Column("setting"), Column("value")), rows),)),
    ]
    return (Facts(items), *inner)


def _last_accuracy(files: RunFiles) -> float | None:
    found = [r.accuracy for r in files.records if r.accuracy is not None]
    return found[-1] if found else None


def _joins(files: RunFiles, client: str) -> int:
    """Rounds in which an update of the client was aggregated."""
    return sum(
        bool(record.accepted)
        and client in record.cohort
        and client not in {refusal.client for refusal in record.refused}
        for record in files.records
    )
