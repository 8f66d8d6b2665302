"""The round loop over the in-process grid, against plain Python that uses no Flower."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.adapters import codec
from fedlr.errors import RunError
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.averaging import average
from fedlr.methods.combine import NO_REFERENCE, WeightedMean
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.method import ClientUpdate, PartKey, Parts, Role
from fedlr.report.records import RoundLog, RoundRecord, read_rounds
from server.cohort import cohort
from server.hooks import Hooks
from server.outcome import Checkpoint
from server.strategy import FederatedStrategy
from tests.server.toys import (
    BUILDERS,
    PROVENANCE,
    STEPS,
    assert_same_parts,
    by_hand,
    config,
    evaluate,
    first_state,
    grid_of,
    method,
    run,
    strategy,
    toy_sites,
)


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"head_only", "lowering"}))
@pytest.mark.parametrize("weights", ["uniform", "declared"])
def test_a_run_equals_the_loop_by_hand_bit_for_bit(name: str, weights: str) -> None:
    outcome = run(toy_sites(), config(weights=weights), name)
    expected = by_hand(name, toy_sites(), 3, 3, declared=weights == "declared")[-1]
    assert outcome.stopped_reason is None
    assert (outcome.state.round, outcome.state.phase) == (3, 0)
    assert_same_parts(outcome.state.parts, expected.parts)
    assert_same_parts(outcome.parts, expected.parts)


def test_updates_reach_the_method_in_client_order_whatever_the_order_of_replies() -> None:
    seen: list[list[str]] = []

    class Spy(WeightedMean):
        def __call__(
            self,
            updates: Sequence[ClientUpdate],
            weights: Sequence[float],
            reference: Parts = NO_REFERENCE,
        ) -> dict[PartKey, Tensor]:
            seen.append([update.client for update in updates])
            assert weights == [10.0 * (1 + int(name[-2:])) for name in seen[-1]]
            return super().__call__(updates, weights, reference)

    spied = FedSVD(orthonormal, Spy())
    weighted = config(weights="declared")
    grid = grid_of(toy_sites(), order=[3, 1, 0, 2], tamper=lambda replies: replies[::-1])
    FederatedStrategy(weighted, spied, first_state(), PROVENANCE).run(grid)
    drawn = [[f"client-{i:02d}" for i in cohort(5, number, range(4), 3)] for number in range(3)]
    assert seen == drawn


def test_training_lowers_the_loss() -> None:
    outcome = run(toy_sites(1), config(clients=1, clients_per_round=1, rounds=8))
    assert outcome.loss is not None
    assert outcome.loss < 0.8 * evaluate(first_state().parts)[1]


def test_the_order_of_the_nodes_does_not_change_a_bit() -> None:
    expected = strategy().run(grid_of(toy_sites()))
    shuffled = strategy().run(grid_of(toy_sites(), order=[2, 0, 3, 1]))
    assert_same_parts(shuffled.parts, expected.parts)
    assert (
        list(shuffled.statuses) == list(expected.statuses) == [f"client-{i:02d}" for i in range(4)]
    )


def test_the_order_and_repetition_of_replies_do_not_change_a_bit() -> None:
    def mix(replies: list[Message]) -> list[Message]:
        stranger = Message(replies[0].content, reply_to=replies[0])
        return [stranger, *reversed(replies), *replies]

    expected = strategy().run(grid_of(toy_sites()))
    found = strategy().run(grid_of(toy_sites(), tamper=mix))
    assert_same_parts(found.parts, expected.parts)
    assert [r.accepted for r in found.records] == [3, 3, 3]


def test_epsilon_is_the_latest_of_each_client_and_its_maximum() -> None:
    outcome = run(toy_sites(epsilon=0.5))
    joined = dict.fromkeys((f"client-{i:02d}" for i in range(4)), 0)
    for number, record in enumerate(outcome.records):
        for index in cohort(5, number, range(4), 3):
            joined[f"client-{index:02d}"] += 1
        spent = {client: 0.5 * count for client, count in joined.items() if count}
        assert record.epsilon_by_client == spent
        assert record.epsilon_max == max(spent.values())
    assert outcome.epsilon == outcome.records[-1].epsilon_by_client
    assert outcome.joins == joined
    assert outcome.steps == {client: STEPS * count for client, count in joined.items()}


def test_without_privacy_there_is_no_epsilon() -> None:
    for record in run(toy_sites()).records:
        assert (record.epsilon_max, record.epsilon_by_client) == (None, {})


def test_bytes_are_the_float32_payload_of_all_clients() -> None:
    # B is 6·3 and 5·2, A 3·8 and 2·8, the head 2·3 floats of 4 bytes.
    up, down = 4 * (18 + 10 + 6), 4 * (18 + 10 + 24 + 16 + 6)
    for record in run(toy_sites()).records:
        assert (record.bytes_up, record.bytes_down) == (3 * up, 3 * down)
        assert 0 < record.server_s <= record.wall_s


class Recorder:
    """A display and a journal that remember what they were told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.checkpoints: list[Checkpoint] = []
        self.nonces: list[str] = []

    def start(self, total_rounds: int, title: str) -> None:
        self.events.append(f"start {total_rounds}")

    def round_started(self, round: int, cohort: Sequence[str]) -> None:
        self.events.append(f"round {round} of {len(cohort)}")

    def client_finished(self, client: str, steps: int) -> None:
        self.events.append(f"{client} {steps}")

    def round_finished(self, record: RoundRecord) -> None:
        self.events.append(f"finished {record.round}")

    def finish(self) -> None:
        self.events.append("finish")

    def sending(self, round: int, phase: int, nonces: dict[str, str]) -> dict[str, str]:
        self.nonces += nonces.values()
        return {client: f"{nonce}-journaled" for client, nonce in nonces.items()}

    def finished(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)

    def asked(self, round: int) -> frozenset[str]:
        return frozenset()

    def abandoned(self, refused: Collection[str]) -> None:
        self.events.append(f"abandoned {sorted(refused)}")


def hooks_with(recorder: Recorder, log: RoundLog | None = None) -> Hooks:
    return Hooks(evaluate, log, recorder, recorder)  # type: ignore[arg-type]


def test_log_display_and_journal_hear_of_every_round(tmp_path: Path) -> None:
    recorder, log = Recorder(), RoundLog(tmp_path / "rounds.jsonl")
    outcome = run(
        toy_sites(2),
        config(clients=2, clients_per_round=2, rounds=2),
        hooks=hooks_with(recorder, log),
    )
    one_round = ["client-00 4", "client-01 4"]
    assert recorder.events == [
        "start 2",
        *("round 1 of 2", *one_round, "finished 1"),
        *("round 2 of 2", *one_round, "finished 2"),
        "finish",
    ]
    assert tuple(read_rounds(log.path)) == outcome.records
    assert [c.state.round for c in recorder.checkpoints] == [1, 2]
    assert [len(c.records) for c in recorder.checkpoints] == [1, 2]


def test_the_display_ends_even_when_the_start_fails() -> None:
    recorder = Recorder()
    with pytest.raises(RunError):
        run(toy_sites(1), hooks=hooks_with(recorder))
    assert recorder.events == ["finish"]


def test_nonces_are_unique_journaled_first_and_sent() -> None:
    recorder, sites = Recorder(), toy_sites()
    run(sites, name="two_phase", hooks=hooks_with(recorder))
    sent = [job.nonce for site in sites for job in site.jobs]
    # Three rounds of two phases with three clients each.
    assert len(set(sent)) == len(sent) == 3 * 2 * 3
    assert sorted(sent) == sorted(f"{nonce}-journaled" for nonce in recorder.nonces)
    assert {len(nonce) for nonce in recorder.nonces} == {32}
    assert {job.run for site in sites for job in site.jobs} == {"run-1"}


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(done: int) -> None:
    recorder = Recorder()
    whole = run(toy_sites(epsilon=0.5), config(average_rounds=2), hooks=hooks_with(recorder))
    sites = toy_sites(epsilon=0.5)
    checkpoint = recorder.checkpoints[done - 1]
    for site in sites:
        site.joins = checkpoint.joins.get(site.client, 0)
    resumed = FederatedStrategy(
        config(average_rounds=2), method(), checkpoint, PROVENANCE, Hooks(evaluate)
    ).run(grid_of(sites))
    assert_same_parts(resumed.parts, whole.parts)
    assert resumed.joins == whole.joins
    assert resumed.epsilon == whole.epsilon
    assert resumed.accuracy_start == whole.accuracy_start
    assert [r.round for r in resumed.records] == [1, 2, 3]


@settings(max_examples=12, deadline=None)
@given(rounds=st.integers(1, 7), every=st.integers(1, 4))
def test_the_schedule_of_evaluations(rounds: int, every: int) -> None:
    seen: list[Parts] = []

    def count(parts: Parts) -> tuple[float, float]:
        seen.append(parts)
        return evaluate(parts)

    outcome = run(
        toy_sites(1),
        config(clients=1, clients_per_round=1, rounds=rounds, evaluate_every=every),
        hooks=Hooks(count),
    )
    due = [number for number in range(1, rounds + 1) if number % every == 0 or number == rounds]
    assert [r.round for r in outcome.records if r.accuracy is not None] == due
    # Once at the start, once a due round; the last one is not measured again.
    assert len(seen) == 1 + len(due)
    assert_same_parts(seen[0], first_state().parts)
    assert outcome.accuracy_start == evaluate(seen[0])[0]
    assert (outcome.accuracy, outcome.loss) == evaluate(outcome.parts)
    assert outcome.records[-1].accuracy == outcome.accuracy


def test_without_an_evaluation_nothing_is_claimed() -> None:
    outcome = run(toy_sites(), hooks=Hooks())
    assert (outcome.accuracy_start, outcome.accuracy, outcome.loss) == (None, None, None)


def test_a_diverged_model_is_recorded_as_an_infinite_loss() -> None:
    outcome = run(toy_sites(), hooks=Hooks(lambda parts: (0.5, math.nan)))
    assert outcome.loss == math.inf
    assert [r.loss for r in outcome.records] == [math.inf] * 3


@pytest.mark.parametrize("last", [2, 3, 9])
def test_the_result_is_the_average_of_the_last_states_and_is_evaluated(last: int) -> None:
    outcome = run(toy_sites(), config(average_rounds=last))
    states = by_hand("fedsvd", toy_sites(), 3, 3)
    assert_same_parts(outcome.parts, average(states[-last:]))
    assert_same_parts(outcome.state.parts, states[-1].parts)
    assert (outcome.accuracy, outcome.loss) == evaluate(outcome.parts)
    assert outcome.accuracy != outcome.records[-1].accuracy


def test_states_of_a_growing_residual_are_averaged() -> None:
    outcome = run(toy_sites(), config(average_rounds=2), "folding")
    states = by_hand("folding", toy_sites(), 3, 3)
    assert_same_parts(outcome.parts, average(states[-2:]))


def test_a_state_that_cannot_be_averaged_is_refused_before_the_run() -> None:
    state = first_state()
    odd = {**state.parts, PartKey("block.0.query", Role.ROTATION): torch.eye(3)}
    two = config(average_rounds=2)
    with pytest.raises(RunError, match="set it to 1"):
        FederatedStrategy(two, method(), replace(state, parts=odd), PROVENANCE)


def test_flowers_own_loop_gives_the_same_model() -> None:
    ours = strategy().run(grid_of(toy_sites()))
    driven = strategy()
    result = driven.start(grid_of(toy_sites()), ArrayRecord(), num_rounds=5)
    assert_same_parts(driven.checkpoint.state.parts, ours.state.parts)
    arrays = {name: array.numpy() for name, array in result.arrays.items()}
    assert_same_parts(codec.decode(arrays), ours.state.parts)
    assert [m["accepted"] for m in result.train_metrics_clientapp.values()] == [3, 3, 3]
    assert not result.evaluate_metrics_clientapp
