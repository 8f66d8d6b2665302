"""``fedlr simulate``: a federation on this machine, from configuration to run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.compose import compose, compose_mapping, listed_choices
from fedlr.cli.ended import check_ended
from fedlr.config import RunConfig
from fedlr.errors import ConfigError
from fedlr.report.command import shell
from fedlr.report.facts import FACTS_FILE, read_facts
from fedlr.report.folder import check_output, output_folder, remove_unbegun
from fedlr.report.live import say
from fedlr.report.records import ROUNDS_FILE, Summary, read_rounds
from fedlr.report.tables import show_closing

if TYPE_CHECKING:
    from flwr.app import UserConfig
    from flwr.serverapp import ServerApp

    from client.site import Site
    from fedlr.reuse import Reuse
    from server.grid import InProcessGrid
    from server.outcome import Outcome
    from server.session import Session

_USAGE = """\
usage: fedlr simulate [overrides]
       fedlr simulate resume=<run folder>

Runs a federation on this machine and prints the run folder's path as its last line.
A run that was stopped, by Ctrl-C or a crash, goes on with resume=<its folder>.
The exit status is 0 if it came to its last round, 12 if it ended early with a result.

choices (section=choice):
{choices}

any single value can be overridden too, for example
  fedlr simulate privacy.epsilon=3 federation.rounds=20 adapter.rank=16
  fedlr simulate data=file data.path=my/folder model=encoder model.name=my/model
`fedlr simulate --cfg [overrides]` prints the composed configuration and stops."""

RESUME = "resume="


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: Hydra overrides, or ``resume=<folder>``, or ``--help``, or ``--cfg`` and
            overrides.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`, and so is the early end of a run that
        has a result.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_USAGE.format(choices=listed_choices()))
        return 0
    overrides = [word for word in words if word != "--cfg"]
    if any(word.startswith(RESUME) for word in overrides):
        _show(resume(_folder_to_resume(list(words))))
        return 0
    if "--cfg" in words:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(compose_mapping(overrides))), end="")
        return 0
    _show(simulate(compose(overrides)))
    return 0


def _show(folder: Path) -> None:
    """Print a run folder; EndedEarly where not all its rounds are in it."""
    from server.session import read_config

    print(folder)
    rounds = read_config(folder, read_facts(folder)).federation.rounds
    check_ended(folder, rounds, f"`{shell(['fedlr', 'simulate', f'{RESUME}{folder}'])}`")


def simulate(config: RunConfig) -> Path:
    """Run the federation that ``config`` describes and return its run folder.

    Args:
        config: A checked configuration.

    Raises:
        FedlrError: The run cannot be built or started, or completed no round; what
            had been written stays, nothing of another run is touched.
    """
    from fedlr.build import build, check_data
    from server.session import begin

    began = time.monotonic()
    output = output_folder(config.output)
    check_output(output, config.name)
    check_early(config)
    check_data(config)
    return _complete(begin(build(config, say), began, say))


def resume(folder: Path) -> Path:
    """Continue the run in ``folder`` to its last round; nothing happens if that is done.

    Raises:
        FedlrError: As `server.session.resume` and `simulate`.
    """
    from server import session

    summary = session.finished(folder)
    if summary is None:
        return _complete(session.resume(folder, say))
    say("the run is finished; nothing is left to do")
    show_closing(summary, read_rounds(folder / ROUNDS_FILE), sys.stdout)
    return folder


def run_cell(config: RunConfig, folder: Path, reuse: Reuse, quiet: bool = False) -> Summary:
    """Run what is left of a run whose folder is given, and return its results.

    Args:
        config: Its configuration.
        folder: A run folder that is gone on with, or a place for one. What lies there
            without `FACTS_FILE` never was a run, has spent nothing, and is removed.
        reuse: What other runs of this process have made already.
        quiet: Whether to show nothing while it goes on: others run beside it.

    Raises:
        FedlrError: As `simulate` and `resume`.
    """
    from fedlr.build import build
    from server import session as sessions

    began, tell = time.monotonic(), _silent if quiet else say
    if (folder / FACTS_FILE).exists():
        session = sessions.resume(folder, tell, reuse)
    else:
        remove_unbegun(folder)
        workbench = build(config, tell, reuse=reuse)
        session = sessions.begin(workbench, began, tell, folder, reuse)
    session = replace(session, quiet=quiet)
    try:
        outcome = run_session(session)
        summary = session.finish(outcome)
    finally:
        session.close()
    session.check_progress(summary, outcome)
    return summary


def _silent(_line: str) -> None:
    """Say nothing."""


def run_session(session: Session) -> Outcome:
    """Run the rounds that are left on the engine of the configuration."""
    from server.app import make_server_app

    finished: list[Outcome] = []
    server = make_server_app(lambda _: session.strategy(), finished.append)
    engine = _run_on_ray if session.config.federation.engine == "ray" else _run_local
    engine(session, server)
    return finished[0]


def _run_local(session: Session, server: ServerApp) -> None:
    """Call server and clients in this process, on one resident model."""
    from client.simulation import make_sites
    from server.app import run_in_process

    sites = make_sites(session.workbench, session.simulated)
    run_in_process(server, local_grid(session.config, sites))


def local_grid(config: RunConfig, sites: Sequence[Site]) -> InProcessGrid:
    """Return the grid of the engine ``local``: node k + 1 is the k-th site.

    Sites share passes through the model where `fedlr.planning.clients_together` says so.
    """
    from client.app import make_batch_handler, make_client_app
    from client.fused import train_fused
    from fedlr.planning import clients_together
    from server.grid import InProcessGrid

    client = make_client_app(lambda context: sites[int(context.node_config["partition-id"])])
    nodes: dict[int, UserConfig] = {
        index + 1: {"partition-id": index, "num-partitions": len(sites)}
        for index in range(len(sites))
    }
    size = clients_together(config)
    by_node = {index + 1: site for index, site in enumerate(sites)}
    together = make_batch_handler(by_node, train_fused, size) if size > 1 else None
    return InProcessGrid(client, nodes, together)


def _run_on_ray(session: Session, server: ServerApp) -> None:
    """Call the server in this process and every client in an actor of a Ray cluster."""
    from client.app import make_client_app
    from client.simulation import site_in_actor
    from server.simulation import RaySettings, run_on_ray

    federation = session.config.federation
    settings = RaySettings(
        federation.address, federation.cpus_per_client, federation.gpus_per_client
    )
    client = make_client_app(partial(site_in_actor, session.simulated))
    where = federation.address or "this machine"
    say(f"starting Ray on {where}; each of its processes loads the model")
    run_on_ray(server, client, federation.clients, settings)


def _complete(session: Session) -> Path:
    """Run what is left, write and show the results, and return the run folder."""
    folder = session.folder
    try:
        outcome = run_session(session)
        summary = session.finish(outcome)
    except KeyboardInterrupt:
        say(f"stopped; `fedlr simulate {RESUME}{folder}` goes on after the last whole round")
        raise
    finally:
        session.close()
    show_closing(summary, outcome.records, sys.stdout)
    session.check_progress(summary, outcome)
    return folder


def check_early(config: RunConfig) -> None:
    """Raise ConfigError now where engine or tracker are not installed, or a policy is wrong."""
    from server.tracking import check_tracking

    check_tracking(config)
    if config.federation.engine == "deploy":
        raise ConfigError(
            [
                "federation.engine = deploy asks real sites: use `fedlr submit`, or "
                "federation=local to simulate them"
            ]
        )
    if config.privacy.policies is not None:
        from fedlr.orders import read_policies

        read_policies(config)
    if config.federation.engine == "ray":
        from server.simulation import check_ray

        check_ray()


def _folder_to_resume(words: list[str]) -> Path:
    """Return the folder of ``resume=<folder>``, which stands alone."""
    others = [word for word in words if not word.startswith(RESUME)]
    folder = words[0].removeprefix(RESUME) if len(words) == 1 else ""
    if others or not folder:
        raise ConfigError(
            [
                f"{' '.join(words)} cannot be combined: a resumed run keeps its configuration. "
                f"Give {RESUME}<run folder> alone, or start a new run without it"
            ]
        )
    return Path(folder).expanduser()
