"""The ClientApp turns messages into jobs and back; faults leave it as codes only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.app import SiteLike, make_batch_handler, make_client_app, one_by_one
from fedlr.methods.method import ClientUpdate, PartKey, Role
from fedlr.training import jobs
from fedlr.training.jobs import Abstention, Job, SiteStatus
from server.grid import BatchHandler, InProcessGrid
from server.messages import read_outcome, read_status, status_query, train_messages
from tests.server.toys import (
    FIRST_NODE,
    LAYOUT,
    PROVENANCE,
    SECRET,
    ToySite,
    assert_same_parts,
    first_state,
    grid_of,
    method,
    strategy,
    toy_sites,
)


def job() -> Job:
    state = first_state()
    phase = method().plan(state).phases[0]
    return Job("r", 0, 0, "", phase.train, phase.send, method().broadcast(state), PROVENANCE)


def messages(count: int) -> list[Message]:
    return train_messages(job(), {FIRST_NODE + i: f"nonce-{i}" for i in range(count)}, ttl=None)


def ask(grid: InProcessGrid, sent: list[Message]) -> list[Message]:
    return list(grid.send_and_receive(sent))


def outcomes(sites: Sequence[SiteLike], batch: BatchHandler | None = None) -> list[object]:
    return [read_outcome(m) for m in ask(grid_of(sites, batch), messages(len(sites)))]


def by_node(sites: Sequence[ToySite]) -> dict[int, ToySite]:
    return {FIRST_NODE + index: site for index, site in enumerate(sites)}


def test_the_status_arrives_as_the_site_gave_it() -> None:
    site = ToySite("client-00", seed=0, size=42, epsilon_per_round=0.5)
    (reply,) = ask(grid_of([site]), [status_query(FIRST_NODE, ttl=5.0)])
    assert read_status(reply) == site.status() == SiteStatus("client-00", 42, 1.5, 1e-5, PROVENANCE)


def test_a_job_arrives_as_it_was_sent_and_the_update_as_it_was_made() -> None:
    site, twin = ToySite("client-00", 0, epsilon_per_round=0.5), ToySite("client-00", 0)
    (found,) = outcomes([site])
    assert isinstance(found, ClientUpdate)
    expected = twin.answer(job())
    assert isinstance(expected, ClientUpdate)
    assert_same_parts(found.parts, expected.parts)
    assert (found.client, found.steps, found.epsilon) == ("client-00", expected.steps, 0.5)
    assert_same_parts(site.jobs[0].parts, job().parts)
    sent = site.jobs[0]
    assert (sent.run, sent.nonce, sent.train, sent.send, sent.provenance) == (
        *("r", "nonce-0", job().train, job().send, PROVENANCE),
    )


class Vandal(ToySite):
    """Spoils the arrays that it was given."""

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        for value in job.parts.values():
            value.fill_(math.nan)
        return Abstention(self.client, "budget")


@pytest.mark.parametrize("whole", [False, True])
def test_a_site_that_spoils_its_arrays_spoils_no_others(whole: bool) -> None:
    sites = [Vandal("client-00", 0), *toy_sites(3)[1:]]
    found = outcomes(sites, make_batch_handler(by_node(sites)) if whole else None)
    expected = outcomes(toy_sites(3))
    for index in (1, 2):
        one, other = found[index], expected[index]
        assert isinstance(one, ClientUpdate)
        assert isinstance(other, ClientUpdate)
        assert_same_parts(one.parts, other.parts)


class Broken(ToySite):
    """Raises in training."""

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        raise ValueError(SECRET)


class Silent(ToySite):
    """Gives no outcome at all."""

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        return []


class Half(ToySite):
    """Sends what the wire form cannot hold."""

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        key = PartKey(LAYOUT.sites[0].name, Role.B)
        return ClientUpdate(self.client, {key: torch.zeros(2, 2, dtype=torch.bfloat16)}, steps=1)


class Nameless(Broken):
    """Raises in everything."""

    def status(self) -> SiteStatus:
        raise OSError(SECRET)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("kind", "client"),
    [(Broken, "client-00"), (Silent, "client-00"), (Half, "client-00"), (Nameless, "")],
)
def test_a_fault_of_the_site_is_the_code_failed_and_the_others_go_on(
    kind: type[ToySite], client: str, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sites = [kind("client-00", 0), *toy_sites(2)[1:]]
    batch = make_batch_handler(by_node(sites)) if whole else None
    replies = ask(grid_of(sites, batch), messages(2))
    assert read_outcome(replies[0]) == Abstention(client, "failed")
    assert isinstance(read_outcome(replies[1]), ClientUpdate)
    assert not any(reply.has_error() for reply in replies)
    assert SECRET not in "".join(map(repr, replies))
    assert "Traceback" in caplog.text


def test_a_missing_site_fails_and_tells_nothing() -> None:
    def site_of(context: Context) -> SiteLike:
        raise KeyError(SECRET)

    grid = InProcessGrid(make_client_app(site_of), {FIRST_NODE: {}})
    (reply,) = ask(grid, messages(1))
    assert read_outcome(reply) == Abstention("", "failed")
    (status,) = ask(grid, [status_query(FIRST_NODE, ttl=5.0)])
    assert status.content.config_records["header"] == {"code": "failed"}
    assert SECRET not in repr(reply) + repr(status)


def header(**changes: Any) -> ConfigRecord:
    return ConfigRecord({**jobs.encode_job(job())[1], **changes})


def arrays() -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in jobs.encode_job(job())[0].items()})


GARBLED = ArrayRecord({"block.0.query/b": Array("float32", (6, 3), "numpy.ndarray", b"no array")})

MALFORMED: list[RecordDict] = [
    RecordDict(),
    RecordDict({"header": header()}),
    RecordDict({"arrays": arrays()}),
    RecordDict({"arrays": header(), "header": arrays()}),
    RecordDict({"arrays": GARBLED, "header": header()}),
    RecordDict({"arrays": arrays(), "header": header(round=-1)}),
    RecordDict({"arrays": arrays(), "header": header(round=math.inf)}),
    RecordDict({"arrays": arrays(), "header": header(codec="fedlr.parts.v0")}),
    RecordDict({"arrays": arrays(), "header": header(train="everything")}),
]


@pytest.mark.parametrize("content", MALFORMED)
@pytest.mark.parametrize("whole", [False, True])
def test_a_malformed_job_is_the_code_bad_job_and_reaches_no_site(
    content: RecordDict, whole: bool
) -> None:
    sites = toy_sites(2)
    batch = make_batch_handler(by_node(sites)) if whole else None
    sent = [Message(content, FIRST_NODE, "train"), messages(2)[1]]
    replies = ask(grid_of(sites, batch), sent)
    assert read_outcome(replies[0]) == Abstention("client-00", "bad_job")
    assert isinstance(read_outcome(replies[1]), ClientUpdate)
    assert sites[0].jobs == []


@pytest.mark.parametrize("name", ["fedsvd", "fedavg_lora", "two_phase"])
def test_a_cohort_handed_over_whole_gives_the_same_run(name: str) -> None:
    alone, sites = toy_sites(epsilon=0.5), toy_sites(epsilon=0.5)
    cohorts: list[int] = []

    def together(orders: Sequence[tuple[ToySite, Job]]) -> list[ClientUpdate | Abstention]:
        cohorts.append(len(orders))
        return one_by_one(orders)

    batch = make_batch_handler(by_node(sites), together)
    expected = strategy(name=name).run(grid_of(alone))
    found = strategy(name=name).run(grid_of(sites, batch))
    assert_same_parts(found.parts, expected.parts)
    assert found.epsilon == expected.epsilon
    assert cohorts == [3] * (6 if name == "two_phase" else 3)


def test_a_workbench_that_raises_costs_its_whole_cohort_and_is_not_asked_again() -> None:
    calls: list[int] = []

    def broken(orders: Sequence[tuple[ToySite, Job]]) -> list[ClientUpdate | Abstention]:
        calls.append(len(orders))
        raise RuntimeError(SECRET)

    sites = toy_sites(3)
    found = outcomes(sites, make_batch_handler(by_node(sites), broken))
    assert found == [Abstention(site.client, "failed") for site in sites]
    assert calls == [3]
    assert all(site.jobs == [] for site in sites)


def test_a_workbench_that_loses_an_outcome_costs_its_whole_cohort() -> None:
    sites = toy_sites(3)
    batch = make_batch_handler(by_node(sites), lambda orders: one_by_one(orders)[1:])
    assert outcomes(sites, batch) == [Abstention(site.client, "failed") for site in sites]


def test_a_node_without_a_site_fails_in_a_batch_too() -> None:
    sites = toy_sites(2)
    found = outcomes(sites, make_batch_handler({FIRST_NODE + 1: sites[1]}))
    assert found[0] == Abstention("", "failed")
    assert isinstance(found[1], ClientUpdate)
