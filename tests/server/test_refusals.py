"""Sites that abstain, fail or lie cost the run themselves and nothing else."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, RecordDict
from numpy.lib.format import write_array_header_1_0

from client.app import SiteLike
from fedlr.errors import RunError
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods import combiners
from fedlr.methods.combine import Combiner
from fedlr.methods.combiners import COMBINERS
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.method import ClientUpdate, PartKey, Role
from fedlr.methods.nearness import GeometricMedian, Krum
from fedlr.methods.refresh import Merging
from fedlr.methods.robust import CoordinateMedian
from fedlr.report.records import Refusal
from fedlr.training.jobs import Abstention, Job
from server.checking import LARGEST_NORM
from server.outcome import Outcome
from server.strategy import FederatedStrategy
from tests.server.toys import (
    BUILDERS,
    FIRST_NODE,
    LAYOUT,
    PROVENANCE,
    SECRET,
    ToySite,
    Wrapped,
    assert_same_parts,
    by_hand,
    config,
    evaluate,
    first_state,
    grid_of,
    run,
    strategy,
    toy_sites,
    with_parts,
)

Change = Callable[[ClientUpdate, Job], ClientUpdate | Abstention]
B_SHAPE = (LAYOUT.sites[0].out_features, LAYOUT.sites[0].rank)


def spoiled(change: Change, victim: int = 1, epsilon: float | None = None) -> list[SiteLike]:
    """Four sites of which one answers wrongly in every round."""
    sites = toy_sites(epsilon=epsilon)
    return [Wrapped(site, change) if i == victim else site for i, site in enumerate(sites)]


def unreadable(update: ClientUpdate, job: Job) -> ClientUpdate:
    return with_parts(update, b=torch.zeros(B_SHAPE).to(torch.bfloat16))


def raising(update: ClientUpdate, job: Job) -> ClientUpdate:
    raise RuntimeError(SECRET)


FAULTS: list[tuple[str, Change]] = [
    ("not_finite", lambda u, j: with_parts(u, b=torch.full(B_SHAPE, math.nan))),
    ("shape", lambda u, j: with_parts(u, b=torch.zeros(2, 2))),
    ("names", lambda u, j: with_parts(u, core=torch.zeros(2, 2))),
    ("names", lambda u, j: replace(u, client="client-02")),
    ("names", lambda u, j: replace(u, steps=-1)),
    ("norm", lambda u, j: with_parts(u, b=torch.full(B_SHAPE, 1e3))),
    ("norm", lambda u, j: with_parts(u, b=torch.full(B_SHAPE, 3e38))),
    ("not_finite", lambda u, j: replace(u, epsilon=math.nan)),
    ("budget", lambda u, j: Abstention(u.client, "budget")),
    ("failed", unreadable),
    ("failed", raising),
]


@pytest.mark.parametrize(("code", "change"), FAULTS)
def test_a_bad_update_is_refused_and_the_run_equals_one_without_that_client(
    code: str, change: Change
) -> None:
    full = config(clients_per_round=4, update_norm_bound=100.0)
    outcome = run(spoiled(change), full)
    sites = toy_sites()
    others = config(clients=3, clients_per_round=3)
    expected = run([sites[0], sites[2], sites[3]], others)
    assert outcome.stopped_reason is None
    assert_same_parts(outcome.parts, expected.parts)
    assert [r.refused for r in outcome.records] == [(Refusal("client-01", code),)] * 3
    assert [r.accepted for r in outcome.records] == [3, 3, 3]
    assert outcome.joins == {"client-00": 3, "client-01": 0, "client-02": 3, "client-03": 3}
    assert outcome.steps["client-01"] == 0


def edited(**header: str | float) -> Callable[[list[Message]], list[Message]]:
    """Change the header of client-01's reply on the way."""

    def tamper(replies: list[Message]) -> list[Message]:
        for reply in replies:
            if reply.metadata.src_node_id == FIRST_NODE + 1:
                reply.content.config_records["header"].update(header)
        return replies

    return tamper


def emptied(replies: list[Message]) -> list[Message]:
    replies[1].content = RecordDict()
    return replies


def garbled(replies: list[Message]) -> list[Message]:
    arrays = replies[1].content.array_records["arrays"]
    for name in list(arrays):
        arrays[name] = Array("float32", (6, 3), "numpy.ndarray", b"not an array")
    return replies


def announcing(replies: list[Message]) -> list[Message]:
    """Announce arrays that no memory holds, and send nothing of them."""
    file = io.BytesIO()
    header = {"shape": (1 << 40, 1 << 20), "fortran_order": False, "descr": "<f4"}
    write_array_header_1_0(file, header)  # type: ignore[arg-type]
    arrays = replies[1].content.array_records["arrays"]
    for name in list(arrays):
        arrays[name] = Array("float32", (6, 3), "numpy.ndarray", file.getvalue())
    return replies


def doubled(replies: list[Message]) -> list[Message]:
    arrays = replies[1].content.array_records["arrays"]
    for name in list(arrays):
        arrays[name] = Array(arrays[name].numpy().astype(np.float64))
    return replies


TAMPERED: list[tuple[str, Callable[[list[Message]], list[Message]]]] = [
    ("schema", edited(codec="fedlr.parts.v2")),
    ("names", edited(code="something else")),
    ("names", edited(steps=math.inf)),
    ("names", edited(steps="many")),
    ("names", edited(client="client-00")),
    ("names", emptied),
    ("names", garbled),
    ("names", announcing),
    ("dtype", doubled),
    ("no_answer", lambda replies: [replies[0], *replies[2:]]),
    ("no_answer", lambda replies: [*replies[2:], replies[0]]),
]


@pytest.mark.parametrize(("code", "tamper"), TAMPERED)
def test_a_damaged_or_lost_message_costs_only_its_sender(
    code: str, tamper: Callable[[list[Message]], list[Message]]
) -> None:
    outcome = strategy(config(clients_per_round=4)).run(grid_of(toy_sites(), tamper=tamper))
    sites = toy_sites()
    expected = run([sites[0], sites[2], sites[3]], config(clients=3, clients_per_round=3))
    assert [r.refused for r in outcome.records] == [(Refusal("client-01", code),)] * 3
    assert_same_parts(outcome.parts, expected.parts)


def leaving(after: int, code: str) -> Change:
    """Abstain with ``code`` once ``after`` rounds are done."""
    return lambda update, job: update if job.round < after else Abstention(update.client, code)


@pytest.mark.parametrize("code", ["budget", "max_joins"])
def test_when_all_abstain_the_run_ends_cleanly(code: str) -> None:
    sites = [Wrapped(site, leaving(2, code)) for site in toy_sites()]
    outcome = run(sites, config(rounds=5))
    assert outcome.stopped_reason is not None
    assert "round 3: 0 of 3 clients" in outcome.stopped_reason
    assert f"{code}: 3" in outcome.stopped_reason
    assert outcome.state.round == 2
    assert_same_parts(outcome.parts, by_hand("fedsvd", toy_sites(), 2, 3)[-1].parts)
    assert [r.accepted for r in outcome.records] == [3, 3, 0]
    assert {refusal.code for refusal in outcome.records[2].refused} == {code}
    assert (outcome.accuracy, outcome.loss) == evaluate(outcome.parts)
    assert sum(outcome.joins.values()) == 6


def test_below_the_quorum_the_model_stays_and_nothing_counts_as_joined() -> None:
    sites: list[SiteLike] = [*toy_sites(epsilon=0.5)]
    sites[1:] = [Wrapped(site, leaving(1, "failed")) for site in toy_sites()[1:]]
    outcome = run(sites, config(rounds=5, clients_per_round=4, min_clients=2))
    assert outcome.state.round == 1
    assert_same_parts(outcome.parts, by_hand("fedsvd", toy_sites(), 1, 4)[-1].parts)
    last = outcome.records[-1]
    assert (last.round, last.accepted, last.steps) == (2, 0, 0)
    assert Refusal("client-00", "quorum") in last.refused
    assert outcome.joins["client-00"] == 1
    # Its second update was released all the same, so its ε is spent.
    assert outcome.epsilon == {"client-00": 1.0}
    # The others failed without telling theirs, which nobody knows then.
    unknown = dict.fromkeys(("client-01", "client-02", "client-03"), math.inf)
    assert last.epsilon_by_client == {"client-00": 1.0, **unknown}


def test_updates_without_any_declared_weight_end_the_run() -> None:
    sites = [replace(site, size=0) for site in toy_sites()]
    outcome = run(sites, config(weights="declared"))
    assert outcome.stopped_reason is not None
    assert outcome.state.round == 0
    assert run(sites, config(weights="uniform")).stopped_reason is None


def test_only_those_that_released_are_asked_to_project() -> None:
    sites = toy_sites()

    def fails_first(update: ClientUpdate, job: Job) -> ClientUpdate | Abstention:
        return Abstention(update.client, "failed") if job.train else update

    def fails_second(update: ClientUpdate, job: Job) -> ClientUpdate | Abstention:
        return update if job.train else Abstention(update.client, "no_release")

    wrapped: list[SiteLike] = [
        Wrapped(sites[0], fails_first),
        Wrapped(sites[1], fails_second),
        *sites[2:],
    ]
    outcome = run(wrapped, config(clients_per_round=4, rounds=1), "two_phase")
    assert [len(site.jobs) for site in sites] == [1, 2, 2, 2]
    assert outcome.records[0].refused == (
        Refusal("client-00", "failed"),
        Refusal("client-01", "no_release"),
    )
    assert outcome.records[0].accepted == 2
    # client-01's release went into the basis, so it has joined; client-00 has not.
    assert outcome.joins == {"client-00": 0, "client-01": 1, "client-02": 1, "client-03": 1}


def test_epsilon_of_a_refused_update_is_still_spent() -> None:
    huge: Change = lambda u, j: with_parts(u, b=torch.full(B_SHAPE, 3e38))  # noqa: E731
    outcome = run(spoiled(huge, epsilon=0.5), config(clients_per_round=4))
    assert outcome.epsilon["client-01"] == 1.5
    assert outcome.joins["client-01"] == 0


def test_the_text_of_an_exception_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def listen(replies: list[Message]) -> list[Message]:
        heard.extend(repr(reply) for reply in replies)
        return replies

    grid = grid_of(spoiled(raising), tamper=listen)
    outcome = strategy(config(clients_per_round=4)).run(grid)
    assert len(heard) == 3 * 4
    assert "client-01" in "".join(heard)
    for text in ("".join(heard), repr(outcome.records)):
        assert SECRET not in text
        assert "RuntimeError" not in text
    assert SECRET in caplog.text


def test_the_head_alone_may_be_wrong_too() -> None:
    key = PartKey("head.weight", Role.HEAD)
    bad: Change = lambda u, j: replace(u, parts={**u.parts, key: torch.zeros(3, 2)})  # noqa: E731
    outcome = run(spoiled(bad), config(clients_per_round=4, rounds=1))
    assert outcome.records[0].refused == (Refusal("client-01", "shape"),)


def with_combiner(combine: Combiner, sites: list[SiteLike], **changes: object) -> Outcome:
    settings = config(**{"clients_per_round": 4, "rounds": 2, **changes})
    one = FedSVD(orthonormal, combine)
    return FederatedStrategy(settings, one, first_state(), PROVENANCE).run(grid_of(sites))


def test_fewer_updates_than_the_combiner_needs_end_the_run_and_not_the_program() -> None:
    refuse: Change = lambda update, job: Abstention(update.client, "budget")  # noqa: E731
    sites = toy_sites()
    two_left: list[SiteLike] = [*sites[:2], *(Wrapped(site, refuse) for site in sites[2:])]
    outcome = with_combiner(CoordinateMedian(), two_left)
    assert outcome.stopped_reason is not None
    assert "at least 3 with a positive weight are needed" in outcome.stopped_reason
    assert (outcome.state.round, outcome.records[0].accepted) == (0, 0)
    three_left: list[SiteLike] = [*sites[:3], Wrapped(sites[3], refuse)]
    assert with_combiner(CoordinateMedian(), three_left).stopped_reason is None


def test_updates_without_weight_are_not_enough_for_a_combiner() -> None:
    sites = toy_sites()
    sites[0].size = sites[1].size = 0
    outcome = with_combiner(GeometricMedian(), [*sites], weights="declared")
    assert outcome.stopped_reason is not None
    sites[0].size = 10
    assert with_combiner(GeometricMedian(), [*sites], weights="declared").stopped_reason is None


def test_no_client_stops_the_round_of_the_others_by_the_noise_that_it_announces() -> None:
    sites = toy_sites(epsilon=0.5)
    sites[0].sigma = 1e-200
    outcome = with_combiner(GeometricMedian(), [*sites], weights="inverse_variance")
    assert (outcome.stopped_reason, outcome.state.round) == (None, 2)


def test_too_few_admitted_for_the_combiner_are_refused_before_a_site_pays() -> None:
    sites = toy_sites()
    for site in sites[:2]:
        site.provenance = replace(PROVENANCE, base="another")
    with pytest.raises(RunError, match=r"2 clients were admitted, .* 3 updates .* another base"):
        with_combiner(CoordinateMedian(), [*sites])
    assert not any(site.jobs for site in sites)


def test_a_cohort_too_small_for_the_combiner_is_refused_before_the_run() -> None:
    with pytest.raises(RunError, match=r"krum needs 5 updates a round, .* = 4; raise it"):
        with_combiner(Krum(1), [*toy_sites()])
    wrapped = Merging(FedSVD(orthonormal, CoordinateMedian()), orthonormal)
    with pytest.raises(RunError, match="median needs 3 updates"):
        FederatedStrategy(config(clients_per_round=2), wrapped, first_state(), PROVENANCE)


def filled(value: float) -> Change:
    """Every array sent holds one value, or as much of it as passes the server's checks."""

    def change(update: ClientUpdate, job: Job) -> ClientUpdate:
        parts = {}
        for key, array in update.parts.items():
            largest = 0.99 * LARGEST_NORM / max(1.0, math.sqrt(array.numel()))
            parts[key] = torch.full_like(array, math.copysign(min(abs(value), largest), value))
        return replace(update, parts=parts)

    return change


@pytest.mark.parametrize("value", [math.inf, 1e-45, -0.0])
@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"head_only"}))
def test_no_accepted_update_can_make_a_method_raise(name: str, value: float) -> None:
    sites = [*spoiled(filled(value))[:2], ToySite("client-02", seed=2)]
    outcome = run(sites, config(clients=3, rounds=3), name)
    assert outcome.records[0].accepted == 3
    for state in (outcome.state.parts, outcome.state.memory):
        assert all(bool(array.isfinite().all()) for array in state.values())


@pytest.mark.parametrize("value", [math.inf, 1e-45, -0.0])
@pytest.mark.parametrize("kind", sorted(COMBINERS))
def test_no_accepted_update_can_make_a_combiner_raise(kind: str, value: float) -> None:
    sites = [*spoiled(filled(value)), ToySite("client-04", seed=4)]
    sites[0].rank = 1  # type: ignore[attr-defined]
    outcome = with_combiner(combiners.build(kind), sites, clients=5, clients_per_round=5, rounds=3)
    assert outcome.records[0].accepted == 5
    assert all(bool(array.isfinite().all()) for array in outcome.state.parts.values())
