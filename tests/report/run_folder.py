"""A run folder with everything a page shows, without a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from fedlr.config import RunConfig, to_json
from fedlr.report.facts import ClientFacts, RunFacts, write_facts
from fedlr.report.folder import write_config
from fedlr.report.records import (
    ROUNDS_FILE,
    SUMMARY_FILE,
    ClientSummary,
    Refusal,
    RoundLog,
    RoundRecord,
    Summary,
    write_summary,
)
from fedlr.report.spectra import (
    SPECTRA_FILE,
    Intruders,
    SiteSimilarity,
    SiteSpectrum,
    SpectrumLog,
    SpectrumRecord,
    write_intruders,
)
from tests.report.samples import SUMMARY

CLIENTS = tuple(f"client-{i:03d}" for i in range(6))
SITES = tuple(
    f"encoder.layer.{layer}.{name}"
    for layer in (4, 5)
    for name in (
        *("attention.self.query", "attention.self.value", "attention.output.dense"),
        *("intermediate.dense", "output.dense"),
    )
)
FACTS = RunFacts(
    run="2026-01-02-03-04-05-demo-0a1b2c3d",
    config_sha256="1" * 64,
    model="tiny-bert",
    data="demo",
    data_sha256="0" * 64,
    label_names=("no", "yes"),
    majority=0.375,
    base="2" * 64,
    tokenizer="3" * 64,
    labels="4" * 64,
    codec="fedlr.1",
    clients=tuple(
        ClientFacts(client=name, declared_size=100, delta=1e-5, noise_multiplier=0.8125)
        for name in CLIENTS
    ),
    notices=("The demo data are synthetic.",),
)
DEFAULT = json.loads(to_json(RunConfig()))


def record(number: int) -> RoundRecord:
    """Round ``number``: client-005 is over its budget from round 3 on."""
    spent = {name: 0.5 * number + 0.25 * i for i, name in enumerate(CLIENTS)}
    spent[CLIENTS[-1]] = min(spent[CLIENTS[-1]], 2.25)
    stopped = (Refusal(CLIENTS[-1], "budget"),) if number >= 3 else ()
    return RoundRecord(
        round=number,
        cohort=CLIENTS,
        accepted=len(CLIENTS) - len(stopped),
        refused=stopped,
        accuracy=0.5 + 0.05 * number if number % 2 == 0 else None,
        loss=0.6 if number % 2 == 0 else None,
        epsilon_max=max(spent.values()),
        epsilon_by_client=spent,
        bytes_down=300_000,
        bytes_up=200_000,
        wall_s=2.0 + 0.125 * number,
        server_s=0.25,
        steps=20,
    )


def spectrum(number: int) -> SpectrumRecord:
    """What round ``number`` left: the same for every layer but its scale."""
    return SpectrumRecord(
        round=number,
        sites=tuple(
            SiteSpectrum(
                site=name,
                singular_values=tuple(number * (i + 1) / 2**k for k in range(4)),
                effective_rank=2.5,
                angle_rad=0.01 * number,
            )
            for i, name in enumerate(SITES)
        ),
    )


RECORDS = tuple(record(number) for number in range(1, 5))
RESULT = replace(
    SUMMARY,
    rounds=4,
    accuracy=RECORDS[-1].accuracy,
    epsilon_max=RECORDS[-1].epsilon_max,
    clients=tuple(
        ClientSummary(
            client=name,
            joins=2 if name == CLIENTS[-1] else 4,
            steps=40 + i,
            noise_multiplier=0.8125,
            epsilon=RECORDS[-1].epsilon_by_client[name],
        )
        for i, name in enumerate(CLIENTS)
    ),
)
INTRUDERS = Intruders(
    leading=3,
    threshold=0.5,
    sites=tuple(SiteSimilarity(site=name, similarity=(0.2, 0.9, 1.0)) for name in SITES),
    of_sites=len(SITES),
)


def make(folder: Path, finished: bool = True, rounds: int = 4, spectra: bool = True) -> Path:
    """Write a run folder and return it."""
    folder.mkdir(parents=True)
    write_facts(folder, FACTS)
    write_config(folder, to_json(RunConfig()))
    log = RoundLog(folder / ROUNDS_FILE)
    for number in range(1, rounds + 1):
        log.append(record(number))
    if spectra:
        lines = SpectrumLog(folder / SPECTRA_FILE)
        for number in range(1, rounds + 1):
            lines.append(spectrum(number))
    if finished:
        write_intruders(folder, INTRUDERS)
        write_summary(folder / SUMMARY_FILE, RESULT)
    return folder


def with_mode(folder: Path, mode: str) -> Path:
    """Make a finished run one without a finite ε."""
    epsilon = math.inf if mode == "dry" else None
    clients = tuple(replace(client, epsilon=epsilon) for client in RESULT.clients)
    other: Summary = replace(
        RESULT,
        privacy_mode=mode,
        epsilon_max=epsilon,
        epsilon_budget=None,
        delta=1e-5 if mode == "dry" else None,
        clients=clients,
    )
    write_summary(folder / SUMMARY_FILE, other)
    (folder / ROUNDS_FILE).unlink()
    log = RoundLog(folder / ROUNDS_FILE)
    for number in range(1, 5):
        spent = dict.fromkeys(CLIENTS, math.inf) if mode == "dry" else {}
        log.append(replace(record(number), epsilon_max=epsilon, epsilon_by_client=spent))
    return folder
