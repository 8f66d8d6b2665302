"""The list of combiners, its facts, Flower as an oracle, and what methods do with them."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg
from flwr.serverapp.strategy import Krum as FlowerKrum
from flwr.serverapp.strategy import MultiKrum as FlowerMultiKrum
from flwr.serverapp.strategy.fedavg import FedAvg

from fedlr.errors import ConfigError
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.combine import Combiner
from fedlr.methods.combiners import COMBINERS, build, problems_of
from fedlr.methods.method import ClientUpdate, Method, PartKey, Role
from fedlr.methods.registry import METHODS
from server.grid import identify_process
from tests.methods.cohorts import honest
from tests.methods.federation import LAYOUT, clients, effective, generator, run_round

KINDS = list(COMBINERS)


def by_flower(
    strategy: FedAvg, updates: list[ClientUpdate], weights: list[float]
) -> dict[PartKey, torch.Tensor]:
    """What a strategy makes of the updates, by part."""
    identify_process()
    replies = []
    for number, (update, weight) in enumerate(zip(updates, weights, strict=True), start=1):
        arrays = {"/".join(key): Array(value.numpy()) for key, value in update.parts.items()}
        answer = RecordDict(
            {
                "arrays": ArrayRecord(arrays),
                "metrics": MetricRecord({"num-examples": weight}),
            }
        )
        question = Message(RecordDict(), dst_node_id=number, message_type="train")
        replies.append(Message(answer, reply_to=question))
    found, _ = strategy.aggregate_train(1, replies)
    assert found is not None
    return {key: torch.from_numpy(found["/".join(key)].numpy()) for key in updates[0].parts}


ORACLES: list[tuple[Combiner, FedAvg, list[float]]] = [
    (build("coordinate_median"), FedMedian(), [1.0] * 8),
    (build("coordinate_median"), FedMedian(), [1.0] * 7),
    # It trims int(β·K) on each side: int(0.26 · 8) = 2.
    (build("trimmed_mean", malicious=2), FedTrimmedAvg(beta=0.26), [1.0] * 8),
    (build("krum", malicious=2), FlowerKrum(num_malicious_nodes=2), [1.0] * 9),
    (
        build("multi_krum", malicious=2),
        FlowerMultiKrum(num_malicious_nodes=2, num_nodes_to_select=9 - 2 - 2),
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "weights"), ORACLES)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_as_flower_s_strategy(
    ours: Combiner, theirs: FedAvg, weights: list[float], seed: int
) -> None:
    updates = honest(len(weights), seed, spread=1.0)
    expected = by_flower(theirs, updates, weights)
    for key, value in ours(updates, weights).items():
        # Both round numbers below 8 in float32 a few times.
        torch.testing.assert_close(value, expected[key], rtol=0, atol=4e-6)


def test_the_package_does_not_load_flower() -> None:
    code = "import sys, fedlr.methods.combiners; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_it_is_built_and_its_facts_are_its_own(self, kind: str) -> None:
        built, facts = build(kind), COMBINERS[kind]
        assert (built.name, built.linear) == (kind, facts.linear)
        assert build(kind, consensus=0.0).linear is False
        assert build(kind, consensus=0.5).minimum == built.minimum
        updates, unequal = honest(7), [1.0, 2, 3, 4, 5, 6, 7]
        if facts.weighted:
            built(updates, unequal)
        else:
            with pytest.raises(ValueError, match="uniform"):
                built(updates, unequal)

    def test_settings_that_it_has_not_are_refused(self, kind: str) -> None:
        facts = COMBINERS[kind]
        for has, settings in ((facts.malicious, (2, None)), (facts.bounded, (None, 1.5))):
            malicious, bound = settings
            found = problems_of(kind, malicious, bound, None, clients=99)
            assert (not found) == has
            if has:
                assert build(kind, malicious, bound).name == kind
                continue
            assert f"but combine.kind = {kind} has no such setting; set combine." in found[0]
            with pytest.raises(ConfigError):
                build(kind, malicious, bound)

    def test_a_cohort_that_is_too_small_is_told_before_a_run(self, kind: str) -> None:
        least = build(kind).minimum
        assert problems_of(kind, None, None, None, least) == []
        found = problems_of(kind, None, None, 0.5, least - 1)
        assert len(found) == 1
        assert f"combine.kind = {kind} needs {least} clients a round, but it may have" in found[0]
        # What is refused there is what the combiner itself refuses.
        with pytest.raises(ValueError, match=r"K = |empty"):
            build(kind)(honest(least - 1), [1.0] * (least - 1))


def test_problems_name_setting_value_and_way_out() -> None:
    (unknown,) = problems_of("x", None, None, None, 1)
    assert "is unknown; choose one of coordinate_median, flag" in unknown
    with pytest.raises(ConfigError, match="'x' is unknown"):
        build("x")
    (found,) = problems_of("krum", 3, None, None, 6)
    assert found == (
        "combine.kind = krum with combine.malicious = 3 needs 9 clients a round, but it may have "
        "6; take 9 clients a round or more, lower combine.malicious, or set combine=weighted_mean"
    )
    assert problems_of("krum", 0, None, None, 9) == ["combine.malicious = 0 must be ≥ 1"]
    assert problems_of("norm_bounded_mean", None, -1.0, None, 9) == [
        "combine.bound = -1.0 must be > 0"
    ]
    assert problems_of("flag", None, None, 1.5, 9) == [
        "combine.consensus = 1.5 must be in [0.0, 1.0]"
    ]
    assert len(problems_of("flag", 1, 1.0, None, 9)) == 2


COMPOSING = [name for name, kind in METHODS.items() if kind.facts.combiners]


def test_the_methods_that_train_b_compose() -> None:
    assert {"fedsvd", "ffa_lora", "head_only"} <= set(COMPOSING)


@pytest.mark.parametrize(("method", "kind"), product(COMPOSING, KINDS))
@pytest.mark.parametrize("consensus", [None, 0.3])
def test_every_combiner_works_through_every_method(
    method: str, kind: str, consensus: float | None
) -> None:
    made: Method = METHODS[method](orthonormal, build(kind, consensus=consensus))
    state = made.init(LAYOUT, generator())
    for round_ in range(2):
        state, _ = run_round(made, state, clients(5, seed=10 * round_), [1.0] * 5)
    assert state.round == 2
    for weight in effective(LAYOUT, state.parts).values():
        assert bool(torch.isfinite(weight).all())
    if method == "fedsvd":
        for site in LAYOUT.sites:
            a = state.parts[PartKey(site.name, Role.A)].double()
            eye = torch.eye(site.rank, dtype=torch.float64)
            torch.testing.assert_close(a @ a.mT, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not COMBINERS[kind].linear])
def test_columns_that_too_few_clients_trained_keep_the_server_s_value(kind: str) -> None:
    made = METHODS["ffa_lora"](orthonormal, build(kind))
    state, _ = run_round(made, made.init(LAYOUT, generator()), clients(5), [1.0] * 5)
    phase = made.plan(state).phases[0]
    least = build(kind).minimum
    for full in (least - 1, least):
        updates = [
            client.answer(LAYOUT, phase, made.broadcast(state, rank=None if i < full else 1), {})
            for i, client in enumerate(clients(7, seed=50))
        ]
        new = made.aggregate(state, updates, [1.0] * 7)
        key = PartKey("block.0.query", Role.B)
        moved = bool((new.parts[key][:, 1:] != state.parts[key][:, 1:]).any())
        assert moved == (full == least)
        assert bool((new.parts[key][:, :1] != state.parts[key][:, :1]).any())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not COMBINERS[kind].linear])
def test_clients_of_weight_zero_do_not_count_for_a_column(kind: str) -> None:
    made = METHODS["ffa_lora"](orthonormal, build(kind))
    state, _ = run_round(made, made.init(LAYOUT, generator()), clients(5), [1.0] * 5)
    phase = made.plan(state).phases[0]
    least = build(kind).minimum
    updates = [
        client.answer(LAYOUT, phase, made.broadcast(state, rank=None if i < least else 1), {})
        for i, client in enumerate(clients(12, seed=50))
    ]
    new = made.aggregate(state, updates, [0.0] + [1.0] * 11)
    key = PartKey("block.0.query", Role.B)
    assert torch.equal(new.parts[key][:, 1:], state.parts[key][:, 1:])
