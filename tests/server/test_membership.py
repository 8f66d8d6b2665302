"""Who is admitted: every configured client must answer, and only equals take part."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import pytest
from flwr.clientapp import ClientApp

from client.app import SiteLike
from fedlr.errors import RunError
from fedlr.training.jobs import Provenance, SiteStatus
from server import membership
from server.grid import InProcessGrid
from server.membership import gather
from tests.server.toys import (
    FIRST_NODE,
    PROVENANCE,
    SECRET,
    ToySite,
    assert_same_parts,
    config,
    grid_of,
    run,
    toy_sites,
)


class Mute(ToySite):
    """Cannot say what it is."""

    def status(self) -> SiteStatus:
        raise RuntimeError(SECRET)


def names(grid: InProcessGrid, **changes: object) -> list[str]:
    return [member.client for member in gather(grid, config(**changes), PROVENANCE).members]


def test_clients_are_numbered_by_name_whatever_the_order_of_nodes() -> None:
    found = gather(grid_of(toy_sites(), order=[3, 1, 0, 2]), config(), PROVENANCE)
    assert [(m.index, m.client) for m in found.members] == [
        (index, f"client-{index:02d}") for index in range(4)
    ]
    assert [m.node - FIRST_NODE for m in found.members] == [2, 1, 3, 0]
    assert found.notices == ()


def test_too_few_answers_are_refused_within_the_bound_and_named() -> None:
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"3 of 4 clients .* 0.3 s \(client-00, .*client-02\)"):
        gather(grid_of(toy_sites(3)), config(start_timeout_s=0.3), PROVENANCE)
    assert 0.3 <= time.monotonic() - begin < 3.0


def test_a_site_that_says_it_cannot_run_is_not_waited_for() -> None:
    sites: list[SiteLike] = [*toy_sites(3), Mute("client-03", seed=3)]
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"3 of 4 clients .*log of the others"):
        gather(grid_of(sites), config(start_timeout_s=60), PROVENANCE)
    assert time.monotonic() - begin < 30


def test_the_reason_of_a_mute_site_stays_at_the_site(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError) as caught:
        gather(
            grid_of([Mute("client-00", seed=0)]), config(clients=1, clients_per_round=1), PROVENANCE
        )
    assert SECRET not in str(caught.value)
    ours = [record.getMessage() for record in caplog.records if record.name == "fedlr.server"]
    assert ours
    assert SECRET not in "".join(ours)


class Late(InProcessGrid):
    """Shows one node more at each look."""

    looks = 0

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return list(super().get_node_ids())[: self.looks]


def test_it_waits_for_nodes_that_register_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "POLL_S", 0.01)
    grid = grid_of(toy_sites())
    grid.__class__ = Late
    assert len(names(grid, start_timeout_s=20.0)) == 4


def test_an_error_reply_to_the_query_is_no_answer() -> None:
    grid = InProcessGrid(ClientApp(), {1: {}})
    with pytest.raises(RunError, match=r"0 of 1 clients .* \(none\)"):
        gather(grid, config(clients=1, clients_per_round=1), PROVENANCE)


@pytest.mark.parametrize("digest", ["base", "tokenizer", "labels", "codec"])
def test_another_provenance_is_left_out_and_the_run_equals_one_without_it(digest: str) -> None:
    sites = toy_sites()
    other = replace(PROVENANCE, **{digest: "other"})
    strangers = [
        replace(site, provenance=other) if i == 1 else site for i, site in enumerate(sites)
    ]
    outcome = run(strangers)
    assert outcome.notices == (f"Client 'client-01' is left out: it holds another {digest}.",)
    assert list(outcome.statuses) == ["client-00", "client-02", "client-03"]
    assert strangers[1].jobs == []
    fresh = toy_sites()
    expected = run([fresh[0], fresh[2], fresh[3]], config(clients=3))
    assert_same_parts(outcome.parts, expected.parts)


def test_a_name_that_two_nodes_claim_admits_neither() -> None:
    sites = toy_sites()
    sites[3].client = "client-01"
    found = gather(grid_of(sites), config(), PROVENANCE)
    assert [member.client for member in found.members] == ["client-00", "client-02"]
    assert len(found.notices) == 2
    assert all("2 nodes call themselves 'client-01'" in notice for notice in found.notices)


def test_more_clients_than_configured_are_left_out_by_name() -> None:
    found = gather(grid_of(toy_sites(6), order=[5, 4, 3, 2, 1, 0]), config(), PROVENANCE)
    assert [member.client for member in found.members] == [f"client-{i:02d}" for i in range(4)]
    assert len(found.notices) == 2
    assert "'client-04'" in found.notices[0]


def test_too_few_admitted_clients_cannot_start() -> None:
    stranger = Provenance("x", "x", "x")
    sites = [replace(site, provenance=stranger) for site in toy_sites()[:3]] + toy_sites()[3:]
    assert names(grid_of(sites), min_clients=1) == ["client-03"]
    with pytest.raises(RunError, match="1 clients were admitted, at least 2"):
        gather(grid_of(sites), config(min_clients=2), PROVENANCE)


def test_one_that_refuses_does_not_end_the_wait_for_those_who_are_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "POLL_S", 0.01)
    monkeypatch.setattr(membership, "ASK_AGAIN_S", 0.01)
    asked: list[int] = []

    def answers(
        grid: InProcessGrid, nodes: list[int], timeout: float, broken: set[int]
    ) -> tuple[dict[int, SiteStatus], list[int]]:
        """Node 1 refuses, 2 answers, and 3 has to be approved first."""
        asked.append(len(nodes))
        broken |= {1} & set(nodes)
        ready = {2, 3} if len(asked) > 3 else {2}
        found = {n: ToySite(f"client-0{n}", n).status() for n in nodes if n in ready}
        return found, [n for n in nodes if n == 3 and n not in ready]

    class Three:
        def get_node_ids(self) -> list[int]:
            return [1, 2, 3]

    monkeypatch.setattr(membership, "_answers", answers)
    settings = config(clients=2, clients_per_round=2, start_timeout_s=30)
    found = gather(Three(), settings, PROVENANCE)  # type: ignore[arg-type]
    assert [member.node for member in found.members] == [2, 3]
