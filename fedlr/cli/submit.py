"""``fedlr submit``: ask real sites for a run, and follow it."""

from __future__ import annotations

import secrets
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fedlr.cli.arguments import Parser
from fedlr.cli.compose import compose
from fedlr.cli.ended import check_ended
from fedlr.cli.flower import (
    Submitted,
    all_submitted,
    call,
    environment,
    remember,
    run_status,
)
from fedlr.config import RunConfig, to_json
from fedlr.deploy.bundle import write_app, write_run_config
from fedlr.deploy.coordinator import CONNECTION, Coordinator, program, read_coordinator
from fedlr.errors import ConfigError, RunError
from fedlr.report.live import say
from fedlr.report.records import SUMMARY_FILE
from fedlr.signing import RunOrder, read_key, sign
from fedlr.told import for_sites, keep, kept

_ABOUT = """\
Sign a run with the coordinator's key, hand it to the SuperLink, and follow it to its end.

  fedlr submit <folder> [overrides]       a new run, with federation=deploy
  fedlr submit <folder> --resume <run>    go on with one that was stopped or lost its server,
                                          also before it began

The exit status is 0 if the run came to its last round, 12 if it ended early with a result, and
7 if it failed or has none. Ctrl-C stops following, not the run:
`fedlr status <folder>` shows it, `fedlr stop <folder> <run>` ends it."""

POLL_S = 3.0
"""Seconds between two questions for the state of a run: each starts a process."""

LOST_S = 180.0
"""Seconds without an answer of the SuperLink after which a run is no longer followed."""

_ENGINE = "deploy"


@dataclass(frozen=True)
class _Asked:
    """What is to be submitted."""

    run: str
    config: RunConfig
    days: float


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: A coordinator's folder, overrides and options, or ``--help``.

    Returns:
        0 if the run came to its last round (with ``--detach``: was submitted); errors are raised
        as `fedlr.errors.FedlrError`, and so is the early end of a run that has a result.
    """
    parser = Parser("submit", _ABOUT)
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("overrides", nargs="*", help="Hydra's, as for fedlr simulate")
    parser.add_argument("--resume", metavar="RUN", help="name of a run that is to go on")
    parser.add_argument("--days", type=float, default=7.0, help="days that the order is good")
    parser.add_argument("--detach", action="store_true", help="do not follow the run")
    given = parser.parse(words)
    if given is None:
        return 0
    coordinator = read_coordinator(given.folder)
    if given.resume is None:
        asked = _new(coordinator, given.overrides, given.days)
    elif given.overrides:
        raise ConfigError(["a run that goes on keeps its configuration; give --resume alone"])
    else:
        asked = _again(coordinator, given.resume, given.days)
    submitted = submit(coordinator, asked.run, asked.config, asked.days)
    say(f"submitted {submitted.run}, to be kept in {submitted.folder}")
    if given.detach:
        return 0
    follow(coordinator, submitted)
    print(submitted.folder)
    again = _hint("submit", coordinator, "--resume", submitted.run)
    check_ended(Path(submitted.folder), asked.config.federation.rounds, again)
    return 0


def submit(coordinator: Coordinator, run: str, config: RunConfig, days: float) -> Submitted:
    """Sign an order, keep what it does not tell the sites, and hand it to the SuperLink.

    Args:
        coordinator: Whose key and server.
        run: Name of the run.
        config: What is asked.
        days: For how long.

    Raises:
        FedlrError: The order cannot be signed, or the SuperLink does not take it.
    """
    now = int(time.time())
    try:
        order = RunOrder(run, to_json(for_sites(config)), now, now + int(days * 86_400))
        text = sign(order, read_key(coordinator.key))
    except ValueError as error:
        raise ConfigError([f"the order cannot be signed: {error}"]) from error
    keep(coordinator.configs, run, config)  # before a ServerApp can look for it
    with tempfile.TemporaryDirectory(prefix="fedlr-") as name:
        folder = Path(name)
        place = folder / "app"
        place.mkdir()
        settings = write_run_config(folder / "run.toml", text)
        app = write_app(place)
        found = call(coordinator, "run", str(app), CONNECTION, "--run-config", str(settings))
    made = Submitted(str(found["run-id"]), run, str(Path(config.output) / run))
    remember(coordinator, made)
    return made


def follow(coordinator: Coordinator, submitted: Submitted) -> None:
    """Show what the ServerApp says until the run has ended.

    Raises:
        RunError: It did not come to its end, or the SuperLink is silent for too long.
    """
    words = [program("flwr"), "log", submitted.flower_run, CONNECTION, "--stream"]
    log = subprocess.Popen(words, env=environment(coordinator), stderr=subprocess.DEVNULL)
    try:
        status, details = _ended(coordinator, submitted.flower_run)
        time.sleep(POLL_S)  # what it said last is on its way
    except KeyboardInterrupt:
        say(f"no longer followed; the run goes on: {_hint('status', coordinator)}")
        raise
    finally:
        log.terminate()
        log.wait()
    again = _hint("submit", coordinator, "--resume", submitted.run)
    if status != "finished:completed":
        raise RunError(
            f"the run ended as {status or 'unknown'}{f': {details}' if details else ''}; what it "
            f"said last is above. After the last whole round: {again}"
        )
    if not (Path(submitted.folder) / SUMMARY_FILE).exists():
        raise RunError(
            f"Flower says that the run was completed, but {submitted.folder} has no result; is it "
            "a folder that the SuperLink's programs can write to?"
        )


def _ended(coordinator: Coordinator, flower_run: str) -> tuple[str, str]:
    """Return status and details of a run once it has ended."""
    heard = time.monotonic()
    while True:
        try:
            status, details = run_status(coordinator, flower_run)
            heard = time.monotonic()
            if status.startswith("finished"):
                return status, details
        except RunError as error:  # a SuperLink that is started again
            if time.monotonic() - heard > LOST_S:
                raise RunError(f"the run can no longer be followed: {error}") from error
        time.sleep(POLL_S)


def _new(coordinator: Coordinator, overrides: Sequence[str], days: float) -> _Asked:
    words = list(overrides)
    if not any(word.startswith("federation=") for word in words):
        words.insert(0, f"federation={_ENGINE}")
    config = compose(words)
    if config.federation.engine != _ENGINE:
        raise ConfigError(
            [
                f"federation.engine = {config.federation.engine} asks no real sites; leave "
                "federation=… out, or use fedlr simulate"
            ]
        )
    if not any(word.startswith("output=") for word in words):
        config = replace(config, output=str(coordinator.runs))
    _check(config)
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    from fedlr.orders import absolute

    config = absolute(replace(config, output=str(Path(config.output).expanduser().absolute())))
    return _Asked(f"{now}-{config.name}-{secrets.token_hex(2)}", config, days)


def _check(config: RunConfig) -> None:
    """Find out now what the ServerApp would find out later."""
    from fedlr.build import check_names
    from server.deployment import check_rows
    from server.tracking import check_tracking

    check_tracking(config)
    check_names(config)
    check_rows(config)


def _again(coordinator: Coordinator, run: str, days: float) -> _Asked:
    from fedlr.report.facts import FACTS_FILE

    known = [one for one in all_submitted(coordinator) if one.run == run]
    if not known:
        names = ", ".join(dict.fromkeys(one.run for one in all_submitted(coordinator))) or "none"
        raise ConfigError([f"no run {run!r} was submitted from here; known: {names}"])
    status, _ = run_status(coordinator, known[-1].flower_run)
    if not status.startswith("finished"):
        raise RunError(f"the run {run} is {status}; {_hint('stop', coordinator, run)} ends it")
    # Not from the run's folder: a ServerApp writes there, and could have it signed.
    config = kept(coordinator.configs, run)
    if config is None:
        raise RunError(
            f"{coordinator.configs} does not tell what the run {run} is to be; bring it back from "
            "a copy, or start a new run"
        )
    if (Path(known[-1].folder) / FACTS_FILE).exists():
        return _Asked(run, config, days)
    say(f"the run {run} has not begun yet; its sites are asked again for the same")
    _check(config)
    return _Asked(run, config, days)


def _hint(verb: str, coordinator: Coordinator, *words: str) -> str:
    return f"`{shlex.join(['fedlr', verb, str(coordinator.folder), *words])}`"
