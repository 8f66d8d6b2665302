"""``fedlr simulate``: a federation on this machine, from configuration to run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.compose import choices, compose, compose_mapping
from fedlr.config import RunConfig, to_json
from fedlr.report.folder import check_output, create_run_folder, write_config
from fedlr.report.live import LiveProgress
from fedlr.report.plots import curves
from fedlr.report.records import ClientSummary, RoundLog, Summary, write_summary
from fedlr.report.tables import show_closing

if TYPE_CHECKING:
    from flwr.app import UserConfig

    from fedlr.build import Workbench
    from server.outcome import Outcome

_USAGE = """\
usage: fedlr simulate [overrides]

Runs a federation on this machine and prints the run folder's path as its last line.

choices (section=choice):
{choices}

any single value can be overridden too, for example
  fedlr simulate privacy.epsilon=3 federation.rounds=20 adapter.rank=16
  fedlr simulate data=file data.path=my/folder model=encoder model.name=my/model
`fedlr simulate --cfg [overrides]` prints the composed configuration and stops."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: Hydra overrides, or ``--help``, or ``--cfg`` and overrides.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    if any(word in ("-h", "--help") for word in words):
        listed = "\n".join(f"  {name:<13} {', '.join(files)}" for name, files in choices().items())
        print(_USAGE.format(choices=listed))
        return 0
    overrides = [word for word in words if word != "--cfg"]
    if "--cfg" in words:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(compose_mapping(overrides))), end="")
        return 0
    print(simulate(compose(overrides)))
    return 0


def simulate(config: RunConfig) -> Path:
    """Run the federation that ``config`` describes and return its run folder.

    Args:
        config: A checked configuration; ``federation.engine`` is ``local``.

    Raises:
        FedlrError: The run cannot be built or started; what had been written
            stays, nothing of another run is touched.
    """
    from fedlr.build import build

    started = time.monotonic()
    check_output(Path(config.output))
    workbench = build(config, _say)
    folder = create_run_folder(Path(config.output), config.name, datetime.now())
    write_config(folder, to_json(config))
    outcome = run_federation(workbench, folder)
    summary = summarise(workbench, outcome, time.monotonic() - started)
    _write_results(workbench, outcome, summary, folder)
    show_closing(summary, outcome.records, sys.stdout)
    return folder


def run_federation(workbench: Workbench, folder: Path) -> Outcome:
    """Run the rounds on the in-process engine, logging into ``folder``."""
    import torch

    from client.app import make_client_app
    from client.simulation import make_sites
    from server.app import make_server_app, run_in_process
    from server.grid import InProcessGrid
    from server.hooks import Hooks
    from server.outcome import StrategyConfig
    from server.strategy import FederatedStrategy

    config, federation = workbench.config, workbench.config.federation
    sites = make_sites(workbench, folder / "ledgers")
    private = config.privacy.mode == "dp"
    hooks = Hooks(
        evaluate=workbench.evaluator,
        log=RoundLog(folder / "rounds.jsonl"),
        progress=LiveProgress(config.privacy.epsilon if private else None),
    )
    settings = StrategyConfig(
        run=folder.name,
        seed=config.seed,
        rounds=federation.rounds,
        clients=federation.clients,
        clients_per_round=federation.clients_per_round,
        min_clients=federation.min_clients,
        evaluate_every=federation.evaluate_every,
        average_rounds=federation.average_rounds,
        weights=config.method.weights,
        update_norm_bound=config.method.update_norm_bound,
    )
    start = workbench.method.init(workbench.layout, torch.Generator().manual_seed(config.seed))
    finished: list[Outcome] = []
    server = make_server_app(
        lambda _: FederatedStrategy(settings, workbench.method, start, workbench.provenance, hooks),
        finished.append,
    )
    count = len(sites)
    client = make_client_app(lambda context: sites[int(context.node_config["partition-id"])])
    nodes: dict[int, UserConfig] = {
        index + 1: {"partition-id": index, "num-partitions": count} for index in range(count)
    }
    run_in_process(server, InProcessGrid(client, nodes))
    return finished[0]


def summarise(workbench: Workbench, outcome: Outcome, wall_s: float) -> Summary:
    """Return the summary of a run; every number in it is public."""
    config, records = workbench.config, outcome.records
    private = config.privacy.mode != "none"
    sent = max(1, sum(len(record.cohort) for record in records))
    accepted = max(1, sum(record.accepted for record in records))
    clients = tuple(
        ClientSummary(
            client=plan.name,
            joins=outcome.joins.get(plan.name, 0),
            steps=outcome.steps.get(plan.name, 0),
            noise_multiplier=plan.noise_multiplier if private else None,
            epsilon=_spent(outcome.epsilon, plan.name) if private else None,
        )
        for plan in workbench.clients
    )
    stopped = (outcome.stopped_reason,) if outcome.stopped_reason else ()
    return Summary(
        method=config.method.name,
        model=workbench.base.name,
        data=config.data.name or config.data.path or config.data.kind,
        data_sha256=workbench.data.publishable_sha256,
        label_names=workbench.data.label_names,
        majority=workbench.majority,
        rounds=len(records),
        privacy_mode=config.privacy.mode,
        bytes_up=sum(record.bytes_up for record in records) // accepted,
        bytes_down=sum(record.bytes_down for record in records) // sent,
        wall_s=wall_s,
        server_s=sum(record.server_s for record in records),
        clients=clients,
        accuracy_start=outcome.accuracy_start,
        accuracy=outcome.accuracy,
        unit=config.privacy.unit if private else None,
        accountant=config.privacy.accountant if private else None,
        epsilon_max=max((client.epsilon or 0.0 for client in clients), default=0.0)
        if private
        else None,
        epsilon_budget=config.privacy.epsilon if config.privacy.mode == "dp" else None,
        delta=max(plan.delta for plan in workbench.clients) if private else None,
        notices=(*workbench.notices, *outcome.notices, *stopped),
    )


def _spent(epsilon: Mapping[str, float], client: str) -> float:
    return epsilon.get(client, 0.0)


def _write_results(workbench: Workbench, outcome: Outcome, summary: Summary, folder: Path) -> None:
    from fedlr.build import save_result

    save_result(workbench, outcome.parts, folder / "adapter")
    curves(outcome.records, summary, folder / "curves.png")
    write_summary(folder / "summary.json", summary)


def _say(line: str) -> None:
    print(f"fedlr: {line}", file=sys.stderr, flush=True)
