"""``fedlr simulate``: a federation on this machine, from configuration to run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.compose import choices, compose, compose_mapping
from fedlr.cli.results import summarise, write_results
from fedlr.config import RunConfig, to_json
from fedlr.errors import RunError
from fedlr.report.folder import check_output, create_run_folder, write_config
from fedlr.report.live import LiveProgress
from fedlr.report.records import RoundLog
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
        FedlrError: The run cannot be built or started, or completed no round; what
            had been written stays, nothing of another run is touched.
    """
    from fedlr.build import build

    started = time.monotonic()
    check_output(Path(config.output), config.name)
    workbench = build(config, _say)
    folder = create_run_folder(Path(config.output), config.name, datetime.now())
    write_config(folder, to_json(config))
    outcome = run_federation(workbench, folder)
    summary = summarise(workbench, outcome, time.monotonic() - started)
    write_results(workbench, outcome, summary, folder)
    show_closing(summary, outcome.records, sys.stdout)
    if summary.rounds == 0:
        raise RunError(
            f"no round was completed; {outcome.stopped_reason}. What was recorded is in {folder}"
        )
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


def _say(line: str) -> None:
    print(f"fedlr: {line}", file=sys.stderr, flush=True)
