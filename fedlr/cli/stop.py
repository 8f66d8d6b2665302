"""``fedlr stop``: end a run of real sites."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedlr.cli.arguments import Parser
from fedlr.cli.flower import all_submitted, call, run_status
from fedlr.deploy.coordinator import CONNECTION, read_coordinator
from fedlr.errors import ConfigError
from fedlr.report.live import say

_ABOUT = """\
End a run after what is being done. What its sites have spent stays spent; the run can go on
later with `fedlr submit <folder> --resume <run>`."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: A coordinator's folder and a run, or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("stop", _ABOUT)
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("run", help="the run's name, as `fedlr status` shows it")
    given = parser.parse(words)
    if given is None:
        return 0
    coordinator = read_coordinator(given.folder)
    known = [one for one in all_submitted(coordinator) if one.run == given.run]
    if not known:
        raise ConfigError([f"no run {given.run!r} was submitted from here; see `fedlr status`"])
    status, _ = run_status(coordinator, known[-1].flower_run)
    if status.startswith("finished"):
        say(f"{given.run} has ended already: {status}")
        return 0
    call(coordinator, "stop", known[-1].flower_run, CONNECTION)
    again = shlex.join(["fedlr", "submit", str(coordinator.folder), "--resume", given.run])
    say(f"stopped {given.run}; `{again}` goes on after its last whole round")
    return 0
