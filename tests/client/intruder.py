"""What a stranger's app tries where it runs as the SuperNode's user: ``python -m … <file>``.

The file says where things are and what to send; one JSON object is printed, attempt by attempt.
One that was denied is named by its error, one that was answered by its code, any other is ``got``.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from client import wire
from client.agent_pb2 import Piece
from client.agent_pb2_grpc import AgentStub

GOT = "got"
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
PIDFD_OPEN, PIDFD_GETFD = 434, 438
CONNECTIONS = 100
FLOOD_S = 3.0

Attempts = dict[str, Callable[[], object]]


def files(paths: dict[str, str]) -> Attempts:
    """Read, write, list and replace what is the agent's."""
    found: Attempts = {}
    for name, text in paths.items():
        path = Path(text)
        found[f"read {name}"] = lambda path=path: read(path)
        found[f"write {name}"] = lambda path=path: write(path)
        found[f"unlink {name}"] = path.unlink
        found[f"chmod {name}"] = lambda path=path: path.chmod(0o777)
        found[f"chown {name}"] = lambda path=path: os.chown(path, os.getuid(), -1)
        found[f"link {name}"] = lambda path=path: os.link(path, f"/tmp/.{os.getpid()}.{path.name}")
    return found


def read(path: Path) -> None:
    """Read a file, or list a folder."""
    if path.is_dir():
        list(path.iterdir())
        return
    with path.open("rb") as file:
        file.read(1)


def write(path: Path) -> None:
    """Open a file for writing, or make one in a folder."""
    if path.is_dir():
        path.joinpath("new").touch()
        return
    os.close(os.open(path, os.O_WRONLY))


def process(pid: int) -> Attempts:
    """Look into the agent's process, stop it, or change it."""
    library = ctypes.CDLL(None, use_errno=True)

    def called(*words: Any) -> None:
        if library.syscall(*words) < 0:
            raise OSError(ctypes.get_errno(), "")

    def traced(request: int) -> None:
        if library.ptrace(request, pid, None, None) < 0:
            raise OSError(ctypes.get_errno(), "")

    def stolen() -> None:
        handle = library.syscall(PIDFD_OPEN, pid, 0)
        called(PIDFD_GETFD, handle, 3, 0)

    at = f"/proc/{pid}"
    found: Attempts = {
        f"read {name}": lambda name=name: read(Path(at, name))
        for name in ("mem", "environ", "maps", "fd", "map_files", "auxv", "stack", "io")
    }
    found |= {f"follow {name}": lambda name=name: Path(at, name).readlink() for name in LINKS}
    found |= {
        "enter its root": lambda: list(Path(at, "root").iterdir()),
        "attach to it": lambda: traced(PTRACE_ATTACH),
        "seize it": lambda: traced(PTRACE_SEIZE),
        "steal a handle": stolen,
        "bound its files": lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3)),
        "freeze it": lambda: os.kill(pid, signal.SIGSTOP),
        "stop it": lambda: os.kill(pid, signal.SIGTERM),
        "kill it": lambda: os.kill(pid, signal.SIGKILL),
    }
    return found


LINKS = ("root", "cwd", "exe")


def door(path: Path) -> Attempts:
    """Put another socket in the place of the agent's, or take it away."""

    def bound(at: Path) -> None:
        with socket.socket(socket.AF_UNIX) as mine:
            mine.bind(str(at))

    return {
        "unlink the socket": path.unlink,
        "chmod the socket": lambda: path.chmod(0o777),
        "move the socket": lambda: path.rename(path.with_name("old.sock")),
        "bind beside the socket": lambda: bound(path.with_name("other.sock")),
        "write beside the socket": lambda: path.with_name("file").touch(),
        "take the folder": lambda: path.parent.chmod(0o777),
        "move the folder": lambda: path.parent.rename(path.parent.with_name("old")),
        "move the folder above": lambda: path.parent.parent.rename("/tmp/old"),
        "put a folder beside": lambda: path.parent.with_name("new").mkdir(),
        "follow the socket's user": lambda: shutil.chown(path, os.getuid()),
    }


def messages(socket_path: str, sent: list[tuple[str, list[str]]]) -> Attempts:
    """Bring jobs; the code of an answer is raised as a refusal."""

    def bring(parts: list[str]) -> None:
        with grpc.insecure_channel(f"unix:{socket_path}", wire.CHANNEL_OPTIONS) as channel:
            train = channel.stream_stream("/fedlr.agent.v1.Agent/Train", None, Piece.FromString)
            first, *_ = list(train(map(bytes.fromhex, parts), timeout=120))
            fields = wire.fields_of(first.header.fields)
            if "code" in fields:
                raise Refused(str(fields["code"]))

    return {name: lambda parts=parts: bring(parts) for name, parts in sent}


class Refused(Exception):
    """The agent answered with a code."""


def flood(socket_path: str) -> str:
    """Open many connections at once, with a job on each that never comes, and leave."""
    over, channels = threading.Event(), list[grpc.Channel]()

    def never() -> Iterator[Piece]:
        over.wait()
        yield from ()

    for _ in range(CONNECTIONS):
        options = (("grpc.use_local_subchannel_pool", 1),)
        channels.append(grpc.insecure_channel(f"unix:{socket_path}", options))
        AgentStub(channels[-1]).Train(never())  # type: ignore[no-untyped-call]
    time.sleep(FLOOD_S)
    over.set()
    for channel in channels:
        channel.close()
    return GOT


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Refused as refused:
        return str(refused)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    except grpc.RpcError as error:
        return str(error.code().name)
    return GOT


def attempts(asked: dict[str, Any]) -> Attempts:
    """Everything that is asked for, the messages last."""
    found: Attempts = {}
    if "files" in asked:
        found |= files(asked["files"])
    if "pid" in asked:
        found |= process(int(asked["pid"]))
    if "door" in asked:
        found |= door(Path(asked["door"]))
    if "sent" in asked:
        found |= messages(asked["socket"], asked["sent"])
    if asked.get("flood"):
        found["flood"] = lambda: flood(asked["socket"])
    only = asked.get("only")
    return {name: one for name, one in found.items() if only is None or name in only}


def tried(asked: dict[str, Any]) -> dict[str, str]:
    """Try everything, and tell what came of it."""
    return {name: outcome(attempt) for name, attempt in attempts(asked).items()}


if __name__ == "__main__":
    print(json.dumps(tried(json.loads(Path(sys.argv[1]).read_text()))))
