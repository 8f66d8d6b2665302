"""A hub on this machine's loopback that knows nothing, or is down; and a cache filled by hand."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Knows no repository; the front page answers with ``status``.

    Attributes:
        asked: Paths that were asked for, in order.
    """

    daemon_threads = True

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status = status
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        hub.asked.append(self.path)
        front = self.path == "/"
        self.send_response(hub.status if front or hub.status >= 500 else 404)
        if not front:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815
    do_POST = do_HEAD  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve(status: int = 200) -> Iterator[Hub]:
    """Serve a `Hub` until the block ends."""
    hub = Hub(status)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@contextmanager
def closed_endpoint() -> Iterator[str]:
    """Yield an address where a connection is refused: a bound port that nobody listens on."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


def ask_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the hub's client, which reads its environment but once, at an address."""
    constants = pytest.importorskip("huggingface_hub").constants
    rest = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + rest)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def snapshot(cache: Path, name: str) -> Path:
    """Make the folder of a model's files in the client's cache and return it, empty."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(REVISION)
    folder = home / "snapshots" / REVISION
    folder.mkdir(parents=True)
    return folder
