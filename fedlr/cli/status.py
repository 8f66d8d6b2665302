"""``fedlr status``: which sites are connected, and where the submitted runs stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlr.cli.arguments import Parser
from fedlr.cli.flower import all_submitted, call, names_of_nodes
from fedlr.deploy.coordinator import CONNECTION, Coordinator, read_coordinator
from fedlr.errors import RunError
from fedlr.report.records import ROUNDS_FILE, read_rounds
from fedlr.report.units import printable

_ABOUT = """\
Show the registered sites, whether they are connected, and the runs that were submitted."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: A coordinator's folder, or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("status", _ABOUT)
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    given = parser.parse(words)
    if given is None:
        return 0
    coordinator = read_coordinator(given.folder)
    found = {"sites": _sites(coordinator), "runs": _runs(coordinator)}
    if given.json:
        print(json.dumps(found))
        return 0
    lines = [f"site  {one['site']:<24} {one['status']}" for one in found["sites"]]
    lines += [
        f"run   {one['run']:<40} {one['status']:<20} {one['rounds']} rounds  {one['folder']}"
        for one in found["runs"]
    ]
    print("\n".join(map(printable, lines)) or "no site is registered, and no run was submitted")
    return 0


def _sites(coordinator: Coordinator) -> list[dict[str, Any]]:
    names = names_of_nodes(coordinator)
    nodes = call(coordinator, "supernode", "list", CONNECTION)["nodes"]
    known = {str(node["node-id"]): str(node["status"]) for node in nodes}
    rows = [
        {"site": name, "node": node, "status": known.get(node, "unknown to the SuperLink")}
        for node, name in names.items()
    ]
    strangers = [node for node in known if node not in names]
    return rows + [
        {"site": "(registered elsewhere)", "node": node, "status": known[node]}
        for node in strangers
    ]


def _runs(coordinator: Coordinator) -> list[dict[str, Any]]:
    """Return the runs, the oldest first; one that was gone on with has its latest state."""
    listed = call(coordinator, "list", CONNECTION)["runs"]
    states = {str(one["run-id"]): str(one["status"]) for one in listed}
    latest = {one.run: one for one in all_submitted(coordinator)}
    return [
        {
            "run": one.run,
            "flower_run": one.flower_run,
            "status": states.get(one.flower_run, "unknown to the SuperLink"),
            "rounds": _rounds(Path(one.folder)),
            "folder": one.folder,
        }
        for one in latest.values()
    ]


def _rounds(folder: Path) -> int:
    try:
        return sum(record.accepted > 0 for record in read_rounds(folder / ROUNDS_FILE))
    except RunError:  # it has not begun
        return 0
