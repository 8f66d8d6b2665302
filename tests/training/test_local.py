"""One client, one round: what trains, what stays, and that only public settings shape it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.data.batching import UnitIndex
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.dpsgd import ClipGroup, Mechanism, clip_groups
from fedlr.privacy.noise import public_stream, secret_stream
from fedlr.training.local import LARGEST_HEAD, LARGEST_UPDATE, LocalTask, draw_rows
from tests.models import LONGEST, MOVABLE, Tiny, rows, settings, tiny, units_of

B, HEAD, ALL = frozenset({Role.B}), frozenset({Role.B, Role.HEAD}), MOVABLE
DATA = rows([5, 3, LONGEST, 7, 2, 9, 4, 6, 3, 8])
UNITS = units_of([1, 2, 3, 1, 3])
CLIP, BATCH = 3.0, 4


def task(model: Tiny, train: frozenset[Role] = HEAD, **changes: Any) -> LocalTask:
    keys = [key for key in model.adapted.parameters() if key.role in train]
    base = LocalTask(
        parts=model.parts(),
        train=train,
        sample_rate=1.0,
        mechanism=Mechanism(CLIP, clip_groups(keys, CLIP, None), 0.0, BATCH),
        sampling=public_stream("sampling", 1),
        noise=public_stream("noise", 1),
    )
    return replace(base, **changes)


def noisy(model: Tiny, train: frozenset[Role] = HEAD, sigma: float = 1.0) -> LocalTask:
    plain = task(model, train)
    assert plain.mechanism is not None
    return replace(
        plain,
        mechanism=replace(plain.mechanism, noise_multiplier=sigma),
        sampling=secret_stream(),
        noise=secret_stream(),
    )


def whole_gradients(model: Tiny, units: UnitIndex, train: frozenset[Role]) -> list[list[Tensor]]:
    """The gradient of each unit by torch, in a batch of its own rows."""
    trained = model.adapted.select_trained(train)
    found = []
    for unit in range(units.count):
        mine, _ = units.rows_of(np.array([unit]))
        loss = model.classifier.losses(DATA.batch(mine)).sum()
        found.append(list(torch.autograd.grad(loss, list(trained.values()))))
    return found


def by_hand(model: Tiny, units: UnitIndex, train: frozenset[Role]) -> dict[PartKey, Tensor]:
    """B − Σ_u min(1, C/‖G_u‖)·G_u / L: one full-batch clipped step of size 1."""
    keys = [key for key in model.adapted.parameters() if key.role in train]
    total = [torch.zeros_like(model.parts()[key]) for key in keys]
    for gradients in whole_gradients(model, units, train):
        norm = math.sqrt(sum(float(value.double().pow(2).sum()) for value in gradients))
        for place, value in zip(total, gradients, strict=True):
            place += value * min(1.0, CLIP / norm)
    start = model.parts()
    return {key: start[key] - value / BATCH for key, value in zip(keys, total, strict=True)}


def assert_close(found: dict[PartKey, Tensor], expected: dict[PartKey, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-5, atol=2e-6), key


@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize("gradients", ["captured", "autograd"])
@pytest.mark.parametrize("train", [B, HEAD, ALL], ids=len)
def test_a_step_without_noise_is_the_clipped_full_batch_step(
    size: int, gradients: str, train: frozenset[Role]
) -> None:
    """Units 1, 2 and 4 have rows in several physical batches where those are small."""
    model = tiny()
    expected = by_hand(model, UNITS, train)
    norms = [torch.cat([v.flatten() for v in g]).norm() for g in whole_gradients(model, UNITS, B)]
    assert min(norms) < CLIP < max(norms)  # where B trains alone, some units are clipped
    trainer = model.trainer(DATA, physical_batch=size, gradients=gradients)
    assert_close(trainer.train(task(model, train), UNITS), expected)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert"])
def test_other_families_take_the_same_step(family: str) -> None:
    model = tiny(family)
    expected = by_hand(model, UNITS, HEAD)
    assert_close(model.trainer(DATA, physical_batch=2).train(task(model), UNITS), expected)


def test_several_steps_do_not_depend_on_the_physical_batch() -> None:
    found = []
    for size in (1, 2, 3, 64):
        model = tiny()
        trainer = model.trainer(DATA, physical_batch=size, steps=4, momentum=0.5)
        found.append(trainer.train(task(model, sample_rate=0.6), UNITS))
    for other in found[1:]:
        assert_close(other, found[0])


def test_a_dry_round_repeats_bit_for_bit_and_depends_on_its_stream() -> None:
    model = tiny()
    trainer = model.trainer(DATA, steps=5)
    start = model.parts()

    def run(seed: int) -> dict[PartKey, Tensor]:
        stream = public_stream("sampling", seed)
        return trainer.train(task(model, parts=start, sample_rate=0.5, sampling=stream), UNITS)

    first, second, other = run(1), run(1), run(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_only_b_moves_when_only_b_trains() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    found = model.trainer(DATA, steps=3).train(noisy(model, B), UNITS)
    after = model.classifier.state_dict()
    assert {key.role for key in found} == {Role.B}
    for name, value in after.items():
        assert torch.equal(value, before[name]) is ("lora_B" not in name), name
    buffers = dict(model.classifier.named_buffers())
    assert buffers
    assert all(torch.equal(value, before[name]) for name, value in buffers.items() if name in after)


def test_the_result_is_a_copy() -> None:
    model = tiny()
    found = model.trainer(DATA).train(task(model), UNITS)
    kept = {key: value.clone() for key, value in found.items()}
    model.adapted.write({key: torch.zeros_like(value) for key, value in found.items()})
    assert all(torch.equal(found[key], kept[key]) for key in found)


@pytest.mark.parametrize("train", [HEAD, ALL], ids=len)
def test_every_trained_array_gets_noise_of_its_own(train: frozenset[Role]) -> None:
    """No data, one step of size 1: B − B' is σC/L·N(0, 1), also for A where A trains.

    Σx²/s² of n draws is χ² with deviation √(2n): six of them either way.
    """
    model = tiny()
    start = model.parts()
    found = model.trainer(DATA).train(noisy(model, train, sigma=3.0), units_of([]))
    assert {key.role for key in found} == train
    for role in train:
        noise = torch.cat([(start[k] - v).flatten() for k, v in found.items() if k.role is role])
        squares = float((noise / (3.0 * CLIP / BATCH)).pow(2).sum())
        assert abs(squares - len(noise)) < 6 * math.sqrt(2 * len(noise))
        assert len(set(noise.tolist())) > 0.9 * len(noise)


def test_an_empty_client_takes_noise_only_steps_and_dry_ones_stay() -> None:
    model = tiny()
    trainer, start = model.trainer(DATA, steps=4), model.parts()
    dry = trainer.train(task(model), units_of([]))
    assert all(torch.equal(value, start[key]) for key, value in dry.items())
    private = trainer.train(replace(noisy(model), parts=start), units_of([]))
    assert all(not torch.equal(value, start[key]) for key, value in private.items())


def test_a_batch_without_a_unit_is_a_step_too() -> None:
    """At q = 0 nothing is drawn: four steps of noise, deviation √4·σC/L."""
    model = tiny()
    start = model.parts()
    some = replace(noisy(model, B), sample_rate=0.0)
    found = model.trainer(DATA, steps=4).train(some, UNITS)
    noise = torch.cat([(start[key] - value).flatten() for key, value in found.items()])
    squares = float((noise / (2.0 * CLIP / BATCH)).pow(2).sum())
    assert abs(squares - len(noise)) < 6 * math.sqrt(2 * len(noise))


def test_a_client_of_one_class_learns_it() -> None:
    model = tiny()
    labels = np.full(len(DATA), 2)
    data = replace(DATA, labels=labels)
    loss = float(model.classifier.losses(data.batch(np.arange(len(data)))).sum().detach())
    found = model.trainer(data, steps=20, learning_rate=0.5).train(task(model), UNITS)
    model.adapted.write(found)
    with torch.no_grad():
        after = float(model.classifier.losses(data.batch(np.arange(len(data)))).sum())
    assert math.isfinite(after)
    assert after < 0.5 * loss


def test_plain_training_is_torch_s_own_gradient_step() -> None:
    model = tiny()
    trained = model.adapted.select_trained(HEAD)
    loss = model.classifier.losses(DATA.batch(UNITS.rows)).mean()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    expected = {
        key: value.detach() - gradient
        for (key, value), gradient in zip(trained.items(), gradients, strict=True)
    }
    for size in (3, 64):
        other = tiny()
        trainer = other.trainer(DATA, physical_batch=size)
        assert_close(trainer.train(task(other, mechanism=None), UNITS), expected)
    still = tiny()
    found = still.trainer(DATA).train(task(still, mechanism=None), units_of([]))
    assert all(torch.equal(found[key], still.parts()[key]) for key in found)


def test_adam_takes_one_step_of_the_learning_rate() -> None:
    """The first step of Adam is lr·g/(|g| + 1e-8·√…): the sign, wherever |g| ≫ 1e-8."""
    model = tiny()
    start = model.parts()
    direction = {k: start[k] - v for k, v in by_hand(model, UNITS, HEAD).items()}
    trainer = model.trainer(
        DATA, optimizer="adam", learning_rate=0.01, head_learning_rate=0.1, steps=1
    )
    found = trainer.train(task(model, parts=start), UNITS)
    for key, value in found.items():
        step = 0.1 if key.role is Role.HEAD else 0.01
        clear = direction[key].abs() > 1e-5
        assert clear.float().mean() > 0.9
        moved = (start[key] - value)[clear]
        assert torch.allclose(moved, step * direction[key].sign()[clear], rtol=5e-3, atol=1e-6)


def test_head_and_adapters_have_their_own_step_sizes() -> None:
    model = tiny()
    start = model.parts()
    whole = {k: start[k] - v for k, v in by_hand(model, UNITS, HEAD).items()}
    trainer = model.trainer(DATA, learning_rate=0.5, head_learning_rate=0.25)
    found = trainer.train(task(model, parts=start), UNITS)
    scales = {Role.B: 0.5, Role.HEAD: 0.25}
    expected = {key: start[key] - scales[key.role] * value for key, value in whole.items()}
    assert_close(found, expected)


def test_optimiser_state_does_not_survive_a_round() -> None:
    model = tiny()
    trainer, start = model.trainer(DATA, momentum=0.9, steps=3), model.parts()
    first = trainer.train(task(model, parts=start), UNITS)
    second = trainer.train(task(model, parts=start, sampling=public_stream("sampling", 1)), UNITS)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_mechanism_that_leaves_an_array_unclipped_is_refused() -> None:
    model = tiny()
    some = task(model, ALL)
    assert some.mechanism is not None
    partial = frozenset(key for key in some.mechanism.keys if key.role is not Role.A)
    narrow = replace(some.mechanism, groups=(ClipGroup(partial, CLIP),))
    with pytest.raises(ValueError, match="clip groups"):
        model.trainer(DATA).train(replace(some, mechanism=narrow), UNITS)


@pytest.mark.parametrize("stream", ["sampling", "noise"])
def test_a_private_step_needs_secret_streams(stream: str) -> None:
    model = tiny()
    trainer = model.trainer(DATA)
    trainer.train(noisy(model), UNITS)
    spoiled = replace(noisy(model), **{stream: public_stream("t")})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="secret_stream"):
        trainer.train(spoiled, UNITS)


def test_check_wants_every_array_that_trains() -> None:
    model = tiny()
    trainer, parts = model.trainer(DATA), model.parts()
    trainer.check(parts, HEAD)
    trainer.check({key: value for key, value in parts.items() if key.role in HEAD}, HEAD)
    one = next(key for key in parts if key.role is Role.B)
    spoiled: list[tuple[dict[PartKey, Tensor], frozenset[Role], str]] = [
        ({k: v for k, v in parts.items() if k != one}, HEAD, "parts lack .*/b, which would train"),
        ({}, HEAD, "lack"),
        ({**parts, PartKey("nowhere", Role.B): torch.zeros(1)}, HEAD, "no array nowhere"),
        ({**parts, one: torch.zeros(1, 1)}, HEAD, "shape"),
        ({**parts, one: torch.full_like(parts[one], math.nan)}, HEAD, "NaN"),
        ({**parts, one: torch.full_like(parts[one], -math.inf)}, HEAD, "NaN"),
        (parts, frozenset({Role.B, Role.CORE}), "core"),
    ]
    for bad, train, message in spoiled:
        with pytest.raises(ValueError, match=message):
            trainer.check(bad, train)


def test_a_round_depends_on_its_own_broadcast_and_on_no_earlier_round() -> None:
    """What is not broadcast starts as the trainer found it, whoever trained in between."""
    model = tiny()
    trainer = model.trainer(DATA)
    head = task(model, frozenset({Role.HEAD}))
    head = replace(head, parts={k: v for k, v in head.parts.items() if k.role is Role.HEAD})
    first = trainer.train(head, UNITS)
    trainer.train(task(model, ALL), UNITS)
    second = trainer.train(head, UNITS)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"head_learning_rate": math.nan},
        {"momentum": 1.0},
        {"steps": 0},
        {"physical_batch": 0},
        {"gradients": "magic"},
        {"rows_per_user": 0},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        settings(**change)


@pytest.mark.parametrize("role", [Role.A, Role.B])
def test_a_broadcast_large_enough_to_amplify_rounding_is_refused(role: Role) -> None:
    """s·‖B‖·‖A‖ may reach LARGEST_UPDATE·‖W‖ at each site, and no more."""
    model = tiny()
    trainer = model.trainer(DATA)
    parts = model.parts()
    site, norm = next(iter(model.adapted.base_norms().items()))
    other = PartKey(site.name, Role.A if role is Role.B else Role.B)
    parts[other] = torch.randn(parts[other].shape, generator=torch.Generator().manual_seed(0))
    key = PartKey(site.name, role)
    unit = torch.ones_like(parts[key])
    at_bound = LARGEST_UPDATE * norm / (site.scaling * float(unit.norm() * parts[other].norm()))
    trainer.check({**parts, key: unit * at_bound * 0.999}, B)
    with pytest.raises(ValueError, match="must be ≤"):
        trainer.check({**parts, key: unit * at_bound * 1.001}, B)


def test_a_huge_head_is_refused() -> None:
    model = tiny()
    trainer, parts = model.trainer(DATA), model.parts()
    key = next(key for key in parts if key.role is Role.HEAD)
    head = torch.zeros_like(parts[key])
    head.view(-1)[0] = LARGEST_HEAD
    trainer.check({**parts, key: head}, HEAD)
    with pytest.raises(ValueError, match="head"):
        trainer.check({**parts, key: head * 1.001}, HEAD)


def test_without_a_cap_the_stream_is_left_to_the_poisson_draws() -> None:
    some, twin = task(tiny(), sample_rate=0.5), public_stream("sampling", 1)
    for _ in range(5):
        expected = UNITS.rows_of(twin.poisson_sample(UNITS.count, 0.5))
        assert all(map(np.array_equal, draw_rows(some, UNITS, None), expected))


@pytest.mark.parametrize("limit", [1, 2])
def test_each_subset_of_a_user_s_rows_is_drawn_equally_often_and_afresh(limit: int) -> None:
    """4000 draws of ``limit`` of five rows: five binomial deviations, √(n·p·(1 − p))."""
    some, units = task(tiny()), units_of([5, 1])
    drawn = [tuple(draw_rows(some, units, limit)[0].tolist()) for _ in range(4000)]
    share = 1 / math.comb(5, limit)
    counts = [drawn.count((*subset, 5)) for subset in combinations(range(5), limit)]
    assert sum(counts) == 4000
    repeats = sum(one == next_one for one, next_one in pairwise(drawn))
    far = max(abs(count - 4000 * share) for count in [*counts, repeats])
    assert far < 5 * math.sqrt(4000 * share * (1 - share))


def test_the_rows_of_one_user_move_neither_the_rows_of_others_nor_later_draws() -> None:
    """User 1 has 3, 1 or 9 rows: the masks, and what is used of user 2, stay."""
    found = []
    for size in (3, 1, 9):
        units = units_of([2, size, 4])
        some = task(tiny(), sample_rate=0.7)
        steps = [draw_rows(some, units, 2) for _ in range(20)]
        found.append([(rows[rows >= 2 + size] - size).tolist() for rows, _ in steps])
    assert found[0] == found[1] == found[2]


def test_a_capped_step_is_the_step_of_the_chosen_rows() -> None:
    """Their gradients are summed and clipped as one unit; the others' rows count for nothing."""
    model = tiny()
    rows, _ = draw_rows(task(model), UNITS, 2)
    expected = by_hand(model, UnitIndex(rows, np.cumsum([0, 1, 2, 2, 1, 2])), HEAD)
    for size in (1, 3, 64):
        trainer = tiny().trainer(DATA, physical_batch=size, rows_per_user=2)
        assert_close(trainer.train(task(model), UNITS), expected)


def test_a_cap_that_no_user_exceeds_changes_nothing_and_an_empty_draw_stays_one() -> None:
    model = tiny()
    start, capped = model.parts(), model.trainer(DATA, rows_per_user=3)
    whole = model.trainer(DATA).train(task(model), UNITS)
    found = capped.train(task(model, parts=start), UNITS)
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    for units, rate in ((UNITS, 0.0), (units_of([]), 1.0)):
        still = capped.train(task(model, parts=start, sample_rate=rate), units)
        assert all(torch.equal(value, start[key]) for key, value in still.items())
