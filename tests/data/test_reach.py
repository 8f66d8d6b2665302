"""One question to the hub, answered soon; and what its client's errors mean to a user."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlr.data import reach
from fedlr.data.reach import cache_if_silent, silence_of_hub, verdict
from tests.hub import ask_at, closed_endpoint, serve

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Point the client at an address, online."""
    return lambda endpoint: ask_at(endpoint, monkeypatch)


def test_nothing_is_asked_for_a_folder(at: Callable[[str], None], tmp_path: Path) -> None:
    with serve(503) as server:
        at(server.endpoint)
        with cache_if_silent(str(tmp_path)) as silence:
            assert silence is None
            assert not hub.constants.is_offline_mode()
        assert server.asked == []


def test_nothing_is_asked_where_the_user_forbids_it(
    at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as server:
        at(server.endpoint)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        with cache_if_silent("owner/name") as silence:
            assert silence == "HF_HUB_OFFLINE is set"
        assert hub.constants.is_offline_mode()
        assert server.asked == []


@pytest.mark.parametrize("status", [200, 503])
def test_a_silent_hub_is_left_alone_until_the_end_of_the_block(
    at: Callable[[str], None], status: int
) -> None:
    with serve(status) as server:
        at(server.endpoint)
        with cache_if_silent("owner/name") as silence:
            assert (silence is not None) == (status == 503)
            assert hub.constants.is_offline_mode() == (status == 503)
        assert not hub.constants.is_offline_mode()


@pytest.mark.parametrize("status", [200, 307, 401, 404, 500, 503])
def test_one_answer_below_500_is_enough(at: Callable[[str], None], status: int) -> None:
    with serve(status) as server:
        at(server.endpoint)
        found = silence_of_hub()
        assert server.asked == ["/"]
    assert found == (None if status < 500 else f"{server.endpoint}: HTTP status {status}")


def test_a_refused_connection_names_the_address(at: Callable[[str], None]) -> None:
    with closed_endpoint() as endpoint:
        at(endpoint)
        found = silence_of_hub()
    assert found is not None
    assert found.startswith(f"{endpoint}: ")
    assert "refused" in found


def test_a_name_that_never_resolves_is_given_up(
    at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that hangs heeds no time-out of a request."""
    at("http://nowhere.invalid")
    hanging = threading.Event()

    class Session:
        def head(self, *_: object, **__: object) -> None:
            hanging.wait()
            raise OSError

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(reach, "PATIENCE_S", 0.1)
    try:
        assert silence_of_hub() == "http://nowhere.invalid: no answer in 0.1 s"
    finally:
        hanging.set()


def raised(cause: Exception) -> OSError:
    """As transformers wraps what the client raised."""
    error = OSError("something for a developer")
    error.__cause__ = cause
    return error


def test_what_the_client_raised_is_told_with_a_way_out() -> None:
    malformed = verdict(raised(hub.errors.HFValidationError("x")), "model", None)
    assert malformed is not None
    assert "neither an existing folder nor a name on the hub" in malformed
    absent = raised(hub.errors.LocalEntryNotFoundError("x"))
    silent = verdict(absent, "model", "HF_HUB_OFFLINE is set")
    assert silent is not None
    assert "cannot be reached (HF_HUB_OFFLINE is set); go online once" in silent
    lost = verdict(absent, "model", None)
    assert lost is not None
    assert "cannot be reached (x)" in lost
    assert verdict(OSError("a damaged file"), "model", None) is None
