"""Flower's command line, called with a coordinator's settings, and what it answers."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlr.deploy.coordinator import CONNECTION, Coordinator, program
from fedlr.errors import RunError
from fedlr.report import strict_json
from fedlr.report.records import write_atomically
from fedlr.report.units import printable

CALL_S = 120.0
"""Seconds that a call may take; Flower itself would wait longer for a silent server."""


@dataclass(frozen=True)
class Submitted:
    """A run of ours that is one of Flower's.

    Attributes:
        flower_run: Flower's id of it.
        run: Its name, as in the order.
        folder: Its run folder.
    """

    flower_run: str
    run: str
    folder: str


def environment(coordinator: Coordinator) -> dict[str, str]:
    """Return the variables of this process with those of the coordinator."""
    return {**os.environ, **coordinator.environment()}


def call(coordinator: Coordinator, *words: str) -> dict[str, Any]:
    """Call ``flwr`` and return the object it prints.

    Raises:
        RunError: It failed; the message holds its own reason.
    """
    shown = f"flwr {' '.join(words[:2])}"
    try:
        done = subprocess.run(
            [program("flwr"), *words, "--format", "json"],
            env=environment(coordinator),
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"`{shown}` gave no answer in {CALL_S:g} s; is the SuperLink up?") from error
    except OSError as error:
        raise RunError(f"`{shown}` cannot be started: {error.strerror or error}") from error
    found = _object(done.stdout)
    if found is None or not found.get("success", False):
        raise RunError(f"`{shown}` failed: {_reason(found, done.stdout, done.stderr)}")
    return found


def run_status(coordinator: Coordinator, flower_run: str) -> tuple[str, str]:
    """Return the status of one of Flower's runs (``finished:completed``, …), and its details."""
    found = call(coordinator, "list", CONNECTION, "--run-id", flower_run)["runs"]
    if not found:
        raise RunError(f"the SuperLink knows no run {flower_run}")
    return str(found[0].get("status", "")), str(found[0].get("status-details", "") or "")


def remember(coordinator: Coordinator, submitted: Submitted) -> None:
    """Keep which of Flower's runs is which of ours."""
    coordinator.submitted.mkdir(exist_ok=True)
    path = coordinator.submitted / f"{submitted.flower_run}.json"
    write_atomically(path, (strict_json.encode(submitted) + "\n").encode())


def all_submitted(coordinator: Coordinator) -> list[Submitted]:
    """Return what was submitted from here, the oldest first; damaged files are left out."""
    found: list[tuple[float, Submitted]] = []
    for path in coordinator.submitted.glob("*.json"):
        try:
            one = strict_json.decode(Submitted, path.read_text(encoding="utf-8"))
            found.append((path.stat().st_mtime, one))
        except (OSError, ValueError):
            continue
    return [one for _, one in sorted(found, key=lambda item: item[0])]


def names_of_nodes(coordinator: Coordinator) -> dict[str, str]:
    """Return the names under which sites were registered, by Flower's node id."""
    found = {}
    for path in sorted(coordinator.sites.glob("*.node")):
        found[path.read_text(encoding="utf-8").strip()] = path.stem
    return found


def node_file(coordinator: Coordinator, name: str) -> Path:
    """Return the file that holds the node id of a registered site."""
    return coordinator.sites / f"{name}.node"


def _object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a program's output, which may say more before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _reason(found: dict[str, Any] | None, *outputs: str) -> str:
    if found and (told := found.get("error-message") or found.get("error")):
        return printable(str(told).strip())[:500]
    lines = [line.strip(" │╭╮╰╯─") for output in outputs for line in output.splitlines()]
    told_lines = [line for line in lines if line]
    return printable(told_lines[-1])[:500] if told_lines else "it printed nothing"
