"""Peak memory of one side, in a process of its own: ``python -m tests.benchmarks.own_process``.

The peak is that of the whole process, interpreter, libraries and model too, while the
steps run (``VmHWM`` after a reset, Linux): loading a model holds it twice for a moment,
and would hide what follows. The steps' own part is that peak less what was resident
just before them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import ROOT

CALLS = 3


def run_alone(*words: str, module: str = __name__) -> Any:
    """Run ``python -m module words`` and return the JSON of its last line.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def growth_and_peak(side: str, rows: int, tokens: int) -> tuple[float, float]:
    """Return (what the steps add, peak while they run) of one side, in bytes."""
    growth, peak = run_alone(side, str(rows), str(tokens))
    return growth, peak


def peak_bytes() -> int:
    """Largest resident size that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """One size of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def measure(call: Callable[[], Any]) -> tuple[int, int]:
    """Call it a few times; return what that adds to memory, and the peak meanwhile."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM = VmRSS
    before = _status("VmRSS")
    for _ in range(CALLS):
        call()
    peak = _status("VmHWM")
    return peak - before, peak


def main(words: list[str]) -> None:
    """Measure the side, rows and tokens that ``words`` name."""
    from .steps import GhostSteps, OrdinarySteps, PrivateSteps, Shape

    shape = Shape(int(words[1]), int(words[2]))
    sides: dict[str, Callable[[Shape], Callable[[], Any]]] = {
        "private": PrivateSteps,
        "ordinary": OrdinarySteps,
        "ghost": GhostSteps,
    }
    print(json.dumps(measure(sides[words[0]](shape))))


if __name__ == "__main__":
    main(sys.argv[1:])
