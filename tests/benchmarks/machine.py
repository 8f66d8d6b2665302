"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlr.report.folder import git_revision, versions

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
        "gpu": _gpu(),
        "clock": clock(),
        "memory_bytes": _memory(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "revision": git_revision(),
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
        *([] if machine.get("gpu") is None else [str(machine["gpu"])]),
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


def _gpu() -> str | None:
    """Name, memory and toolkit of the CUDA device; None without one, or without torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = f"{found.major}.{found.minor}"
    toolkit = f"CUDA {torch.version.cuda}, capability {capability}"
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {toolkit}"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
