"""kill −9 anywhere between a job and its update: the ledger covers all that left the process."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from client.site import Site
from fedlr.methods.method import ClientUpdate
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.ledger import SqliteLedger
from fedlr.training.local import LocalTrainer
from tests.client.test_site import PROVENANCE, RELEASE, STEPS, UNITS, Bench, bench, policy

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DELTA = 1e-3
POINTS = [
    f"{when} {what}"
    for what in ("reserve", "train", "commit", "send")
    for when in ("before", "after")
]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads do not survive a fork; a child that waits for them never ends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def die(at: str, point: str) -> None:
    if at == point:
        os.kill(os.getpid(), signal.SIGKILL)


def serve(one: Bench, path: Path, pipe: int, first: int, at: str | None) -> None:
    """Answer jobs from round `first` on, one after the other; what leaves goes into the pipe."""
    ledger = SqliteLedger(path, source_id="s")
    now = first

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            armed = at is not None and now == first + 1
            die(at or "", f"before {name}" if armed else "never")
            found = call(*arguments, **named)
            die(at or "", f"after {name}" if armed else "never")
            return found

        return wrapped

    for name in ("reserve", "commit"):
        setattr(ledger, name, watched(name, getattr(ledger, name)))
    trainer = one.trainer
    trainer.train = watched("train", trainer.train)  # type: ignore[method-assign]
    allowed = policy(max_joins=10**6, epsilon=1e9)
    site = Site(allowed, UNITS, cast(LocalTrainer, trainer), ledger, PROVENANCE)
    send = watched("send", lambda update: os.write(pipe, struct.pack("<i", update.steps)))
    while True:
        (outcome,) = site.train_many([one.job(round=now, nonce=f"{os.getpid()}-{now}")])
        if isinstance(outcome, ClientUpdate):
            send(outcome)
        now += 1


def life(one: Bench, path: Path, first: int, at: str | None, delay_s: float) -> int:
    """Run `serve` in a process that is killed; return the steps that it sent."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            serve(one, path, write, first, at)
        finally:
            os._exit(1)
    os.close(write)
    if at is None:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    sent = b""
    while chunk := os.read(read, 65536):
        sent += chunk
    os.close(read)
    return sum(struct.unpack(f"<{len(sent) // 4}i", sent))


def check(path: Path, sent: int) -> int:
    """The ledger opens, and covers what was sent; returns the steps in it."""
    ledger = SqliteLedger(path, source_id="s")
    spent = ledger.spent()
    booked = sum(event.steps for event in spent)
    assert booked >= sent
    truth = epsilon([replace(RELEASE, steps=sent)] if sent else [], DELTA, "rdp")
    assert epsilon(spent, DELTA, "rdp") >= truth
    ledger.close()
    return booked


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(point: str, tmp_path: Path) -> None:
    path, one = tmp_path / "ledger.sqlite", bench()
    with one_thread():
        sent = life(one, path, 0, point, 0.0)
        booked = check(path, sent)
        # Round 0 was sent whole; round 1 counts from its reservation on, sent or not.
        assert sent == STEPS * (2 if point == "after send" else 1)
        assert booked == STEPS * (1 if point == "before reserve" else 2)
        # The next start works, and goes on from there.
        sent += life(one, path, 2, "before send", 0.0)
        assert check(path, sent) == booked + 2 * STEPS


@pytest.mark.slow
def test_killed_at_two_hundred_random_moments(tmp_path: Path) -> None:
    path, one = tmp_path / "ledger.sqlite", bench()
    draws, sent, booked, ends = random.Random(3), 0, 0, set()
    with one_thread():
        one.update(nonce="what is imported by a round is imported before the forks")
        for turn in range(200):
            sent += life(one, path, turn * 10_000, None, draws.uniform(0.02, 0.2))
            booked = check(path, sent)
            ends.add(booked - sent)
    assert sent > 200 * STEPS
    # Some lives ended between reservation and send: there was something to get wrong.
    assert len(ends) > 5
    assert booked > sent
