"""A network of its own for one program, joined to another by a wire that can be cut."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Wire:
    """Two networks and what joins them; nothing else is reached from either.

    Attributes:
        name: Of both networks, with an end.
        here: Address at the server's end.
    """

    name: str
    here: str = "10.200.0.1"

    def at(self, end: str) -> list[str]:
        """Words before a command that runs it at the end ``server`` or ``site``."""
        return ["ip", "netns", "exec", f"{self.name}-{end}"]

    @contextmanager
    def inside(self, end: str) -> Iterator[None]:
        """Let this thread, and the threads and processes that it starts, be at one end."""
        with Path("/proc/thread-self/ns/net").open() as before:
            with Path("/run/netns", f"{self.name}-{end}").open() as there:
                enter(there.fileno())
            try:
                yield
            finally:
                enter(before.fileno())

    def set(self, state: str) -> None:
        """Set the wire ``down`` or ``up``."""
        subprocess.run([*self.at("server"), "ip", "link", "set", "wire", state], check=True)


def enter(handle: int) -> None:
    """Move this thread to the network of an open file."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(handle, CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), "the network cannot be entered")


def missing() -> str:
    """Why there can be no such networks here; empty where there can."""
    if os.geteuid() != 0:
        return "only root can make networks"
    if shutil.which("ip") is None:
        return "`ip` of iproute2 is not here"
    name = f"fedlr-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "no network can be made here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@contextmanager
def wire() -> Iterator[Wire]:
    """Make two networks, and take both away in any case."""
    made = Wire(f"fedlr-{secrets.token_hex(3)}")
    server, site = f"{made.name}-server", f"{made.name}-site"
    peer = ["peer", "name", "wire", "netns", site]
    steps = [
        *(["ip", "netns", "add", name] for name in (server, site)),
        ["ip", "link", "add", "wire", "netns", server, "type", "veth", *peer],
    ]
    for end, address in (("server", made.here), ("site", "10.200.0.2")):
        steps += [
            [*made.at(end), "ip", "address", "add", f"{address}/30", "dev", "wire"],
            [*made.at(end), "ip", "link", "set", "wire", "up"],
            [*made.at(end), "ip", "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            subprocess.run(step, check=True)
        yield made
    finally:
        for name in (server, site):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
