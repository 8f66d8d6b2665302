"""Where the disk under the ledger is full, a round is refused before it trains; nothing is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.orderbook import OrderBook, orders_folder
from client.site import Site
from fedlr.cli.main import main
from fedlr.methods.method import ClientUpdate
from fedlr.privacy.database import SPARE_BYTES
from fedlr.training.jobs import Abstention, Job, SiteStatus
from tests.client.real_site import Place, agent, ask, first_job, place, status

DISK = 1 << 20
"""Bytes of the disk: a few times what a round needs."""

PAGE = 4_096

LEFT = [0, *(PAGE * count for count in (1, 2, 4, 8, 16, 32)), SPARE_BYTES, SPARE_BYTES + 64 * PAGE]
"""Bytes that are left, one round each: from none at all to enough."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of `DISK` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode:
        pytest.skip("a file system of a size can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def site(tmp_path: Path, disk: Path) -> Place:
    words = [f"federation.rounds={len(LEFT)}", "adapter.rank=16"]
    return place(tmp_path, *words, top={"ledger": f"{disk.name}/ward.sqlite"})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for every job that is trained, whether or not it can be kept."""
    rounds, real = list[int](), Site.complete

    def counting(self: Site, *given: Any) -> Any:
        rounds.append(1)
        return real(self, *given)

    monkeypatch.setattr(Site, "complete", counting)
    return rounds


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes, in whole pages; return what takes the others."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)) == PAGE:
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - left))
    return path


def verified(site: Place, rounds: int) -> None:
    assert main(["ledger", "verify", str(site.ledger)]) == 0
    assert site.rounds_booked() == rounds
    drafts = [path.name for path in site.ledger.parent.iterdir() if path.name.startswith(".")]
    assert drafts == []


def code(answer: ClientUpdate | Abstention) -> str:
    return answer.code if isinstance(answer, Abstention) else ""


def test_however_little_is_left_no_round_is_lost(
    site: Place, disk: Path, trained: Sequence[int]
) -> None:
    job, order, codes = first_job(site), site.signed(), list[str]()
    with agent(site) as served:
        assert isinstance(status(served, order), SiteStatus)
        for number, left in enumerate(LEFT):
            mine = replace(job, round=number, nonce=f"n{number}")
            filler = fill(disk, left)
            codes.append(code(ask(served, order, mine)))
            spent = number + (codes[-1] == "")
            filler.unlink()
            verified(site, spent)
            assert len(trained) == spent, left
            assert code(ask(served, order, mine)) == "", left
            verified(site, number + 1)
    enough = sum(left >= SPARE_BYTES + 64 * PAGE for left in LEFT)
    assert codes == ["ledger"] * (len(LEFT) - enough) + [""] * enough
    assert len(trained) == len(LEFT)


def test_a_run_that_cannot_be_noted_is_noted_once_there_is_room(
    site: Place, disk: Path, trained: Sequence[int]
) -> None:
    job: Job = first_job(site)
    order = site.signed()
    with agent(site) as served:
        filler = fill(disk, 0)
        assert status(served, order) == "failed"
        assert code(ask(served, order, job)) == "failed"
        filler.unlink()
        verified(site, 0)
        assert OrderBook(orders_folder(served.ledger)).all() == []
        assert code(ask(served, order, job)) == ""
    verified(site, 1)
    assert len(trained) == 1
