"""A real ``fedlr agent``: a process of its own, as its operator starts it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FEDLR = str(Path(sys.executable).parent / "fedlr")


@dataclass
class Running:
    """An agent that serves.

    Attributes:
        process: Its process, or what was put around it.
        log: Gets all that it says.
    """

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def memory(self) -> int:
        """Resident bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmRSS"))
        return 1024 * int(line.split()[1])

    @property
    def handles(self) -> int:
        """Open files and connections."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def running(
    policy: Path,
    log: Path,
    around: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Start an agent, wait until it serves, and end it in any case.

    Args:
        policy: The operator's file.
        log: Gets its output.
        around: Words before the command, such as those that change the user.
        environment: All of its variables; None passes those of the tests on.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*around, FEDLR, "agent", str(policy)], stdout=output, stderr=output, env=environment
        )
    made = Running(process, log)
    try:
        deadline = time.monotonic() + 120
        while "serving at" not in made.text:
            assert process.poll() is None, made.text
            assert time.monotonic() < deadline, made.text
            time.sleep(0.1)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)
