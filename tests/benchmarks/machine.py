"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .ratios import clock

PACKAGES = ("torch", "numpy", "transformers", "peft", "opacus", "flwr", "ray")
ROOT = Path(__file__).resolve().parents[2]


def describe() -> dict[str, Any]:
    """Return the machine, the versions, the revision, the date and the load as plain values."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": _threads(),
        "clock": clock(),
        "memory_bytes": _memory(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "revision": _revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def line(machine: dict[str, Any]) -> str:
    """Return the description as one line for the head of the table."""
    memory = machine["memory_bytes"]
    cores, threads = machine["usable_cores"] or machine["cores"], machine["torch_threads"]
    parts = [
        str(machine["cpu"]),
        f"{cores} cores, {threads or '?'} threads",
        "memory unknown" if memory is None else f"{memory / 2**30:.0f} GiB",
        str(machine["os"]),
        f"Python {machine['python']}, torch {machine['versions'].get('torch', '?')}",
        f"revision {machine['revision'] or 'unknown'}",
        str(machine["date"]),
        f"{machine['clock']} time",
    ]
    if machine["load_average"] is not None:
        parts.append(f"load {machine['load_average'][0]:.1f}")
    return " · ".join(parts)


def _processor() -> str:
    """Name of the processor; its family and model too where the name says little."""
    found: dict[str, str] = {}
    try:
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = text.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _threads() -> int | None:
    """Threads of torch; None in a process that has not loaded it."""
    torch: Any = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _revision() -> str | None:
    """Commit of the checkout, ``+changes`` where it is edited; None outside of one."""
    words = (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
    try:
        head, changes = (
            subprocess.run(
                ["git", *arguments],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for arguments in words
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changes else head
