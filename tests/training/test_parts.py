"""What a broadcast may hold beside whole factors: residuals, cores, leading columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.adapters.forward import use_kernel
from fedlr.data.batching import UnitIndex
from fedlr.kernels.clipped_sum import naive as naive_sum
from fedlr.kernels.lora_linear import merged as merged_linear
from fedlr.kernels.lora_linear import naive as naive_linear
from fedlr.methods.method import MODEL_ROLES, PartKey, Role
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream, secret_stream
from fedlr.training.classifier import Classifier
from fedlr.training.fused import train_together
from fedlr.training.local import LARGEST_UPDATE, LocalTask
from fedlr.training.prefix import cache_prefix, find_prefix
from tests.adapters.test_residual import residual
from tests.models import LONGEST, Tiny, cored, of_rank, rows, tiny, units_of

DATA = rows([LONGEST, 3, 5, 7, 2, 9, 4, 6, 3, 8])
UNITS = units_of([1, 2, 3, 1, 3])
CLIP, BATCH, RANK = 3.0, 4, 4
B, HEAD = frozenset({Role.B}), frozenset({Role.B, Role.HEAD})
BOTH = frozenset({Role.A, Role.B, Role.HEAD})
CORE = frozenset({Role.CORE, Role.HEAD})
Arrays = dict[PartKey, Tensor]


def task(parts: Arrays, train: frozenset[Role], clip: float = CLIP, **changes: Any) -> LocalTask:
    keys = [key for key in parts if key.role in train]
    base = LocalTask(
        parts=parts,
        train=train,
        sample_rate=1.0,
        mechanism=Mechanism(clip, clip_groups(keys, clip, None), 0.0, BATCH),
        sampling=public_stream("sampling"),
        noise=public_stream("noise"),
    )
    return replace(base, **changes)


def cut(parts: Mapping[PartKey, Tensor], rank: int) -> Arrays:
    """The leading ``rank`` columns of B, rows of A and both of a core."""
    places: dict[Role, Any] = {
        Role.A: np.s_[:rank],
        Role.B: np.s_[:, :rank],
        Role.CORE: np.s_[:rank, :rank],
    }
    return {k: v[places[k.role]].clone() if k.role in places else v for k, v in parts.items()}


def assert_close(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].shape == expected[key].shape, key
        assert torch.allclose(found[key], expected[key], rtol=1e-5, atol=2e-6), key


def far(found: Arrays, start: Arrays) -> bool:
    return all(float((found[key] - start[key]).norm()) > 1e-3 for key in found)


@pytest.mark.parametrize("gradients", ["captured", "opacus", "autograd"])
@pytest.mark.parametrize("train", [B, HEAD, BOTH], ids=len)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_client_of_rank_k_is_one_of_a_model_of_rank_k(
    gradients: str, train: frozenset[Role], rank: int
) -> None:
    """Units of one and of several rows, in several physical batches, with momentum."""
    model, small = of_rank(RANK), of_rank(rank)
    parts = cut(model.parts(), rank)
    settings = {"steps": 3, "physical_batch": 4, "momentum": 0.5, "gradients": gradients}
    expected = small.trainer(DATA, **settings).train(task(parts, train), UNITS)
    found = model.trainer(DATA, **settings).train(task(parts, train), UNITS)
    assert_close(found, expected)
    assert far(found, parts)


@pytest.mark.parametrize("operation", [naive_linear, merged_linear], ids=["naive", "merged"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_kernels_take_any_rank(rank: int, operation: Any) -> None:
    """One operation a layer, and norms and sums straight from δ and z."""
    model = of_rank(RANK)
    use_kernel(model.adapted.encoder, model.adapted.sites, operation)
    parts = cut(model.parts(), rank)
    expected = of_rank(rank).trainer(DATA, steps=2).train(task(parts, HEAD), UNITS)
    for kernel in (None, naive_sum):
        trainer = model.trainer(DATA, steps=2, kernel=kernel)
        assert_close(trainer.train(task(parts, HEAD), UNITS), expected)


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_a_base_in_fewer_bits_takes_any_rank(precision: str) -> None:
    """Against one backward pass a unit; bfloat16 computes each row in a shape of its own."""
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="4-bit weights are in the extra '4bit'")
    model = tiny(precision=precision)
    parts = cut(model.parts(), 1)
    settings = {"physical_batch": 3, "own_shapes": LONGEST if precision == "bfloat16" else None}
    found = model.trainer(DATA, **settings).train(task(parts, HEAD), UNITS)
    slow = model.trainer(DATA, gradients="autograd", **settings).train(task(parts, HEAD), UNITS)
    rounding = 2e-2 if precision == "bfloat16" else 1e-5
    for key in found:
        apart, moved = float((found[key] - slow[key]).norm()), (found[key] - parts[key]).norm()
        assert apart <= rounding * float(moved), key
    assert {value.shape for key, value in found.items() if key.role is Role.B} == {(16, 1)}


def test_the_scaling_stays_that_of_the_site() -> None:
    """With scaling α/k the step would be another one."""
    model, small = of_rank(RANK), of_rank(1)
    assert {site.scaling for site in (*model.adapted.sites, *small.adapted.sites)} == {2.0}
    model.adapted.write(cut(model.parts(), 1))
    small.adapted.write(cut(of_rank(RANK).parts(), 1))
    batch = DATA.batch(UNITS.rows)
    assert torch.allclose(model.classifier(batch), small.classifier(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [of_rank, lambda r: of_rank(r, cores=True)], ids=["b", "core"])
def test_a_task_of_full_rank_does_not_notice_one_of_a_smaller_rank_before(model: Any) -> None:
    one, other = model(RANK), model(RANK)
    parts = one.adapted.read(MODEL_ROLES)
    roles = frozenset(key.role for key in parts)
    head = {key: value for key, value in parts.items() if key.role is Role.HEAD}
    used, unused = one.trainer(DATA, steps=2), other.trainer(DATA, steps=2)
    used.train(task(cut(parts, 2), roles), UNITS)
    assert one.adapted.sites == other.adapted.sites
    for following, train in ((parts, roles), (head, frozenset({Role.HEAD}))):
        expected = unused.train(task(following, train), UNITS)
        found = used.train(task(following, train), UNITS)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        used.check(following, train)
    used.train(task(cut(parts, 1), roles), UNITS)
    one.adapted.write(parts)
    assert all(torch.equal(v, parts[k]) for k, v in one.adapted.read(MODEL_ROLES).items())


def test_sites_may_have_different_ranks() -> None:
    model = of_rank(RANK)
    parts, half = model.parts(), cut(model.parts(), 2)
    first = model.adapted.sites[0].name
    mixed = {key: half[key] if key.site == first else value for key, value in parts.items()}
    found = model.trainer(DATA).train(task(mixed, HEAD), UNITS)
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in mixed.items() if k.role in HEAD
    }


def test_noise_falls_on_the_columns_that_train_and_no_others() -> None:
    """An empty client of rank k: k columns of noise, of the size that C and σ say."""
    model = of_rank(RANK)
    start = cut(model.parts(), 3)
    plain = task(start, B)
    assert plain.mechanism is not None
    noisy = replace(plain.mechanism, noise_multiplier=2.0)
    private = replace(plain, mechanism=noisy, sampling=secret_stream(), noise=secret_stream())
    found = model.trainer(DATA).train(private, units_of([]))
    moved = torch.cat([(found[key] - start[key]).flatten() for key in found])
    assert moved.numel() == 3 * 16 * len(model.adapted.sites)
    expected = 2.0 * CLIP / BATCH
    deviation = float(moved.std())
    assert abs(deviation / expected - 1) < 5 / math.sqrt(2 * moved.numel())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Role.A: 2}, "a of rank 2, b of rank 4; send all"),
        ({Role.B: 3}, "a of rank 4, b of rank 3; send all"),
        ({Role.A: 0, Role.B: 0}, "has shape"),
    ],
)
def test_ranks_that_disagree_are_refused_and_nothing_is_written(
    change: dict[Role, int], message: str
) -> None:
    model = of_rank(RANK)
    parts, before = model.parts(), model.parts()
    spoiled = {
        key: cut({key: value}, change[key.role])[key] if key.role in change else value + 1
        for key, value in parts.items()
    }
    trainer = model.trainer(DATA)
    for refuses in (model.adapted.write, lambda p: trainer.check(p, HEAD)):
        with pytest.raises(ValueError, match=message):
            refuses(spoiled)
    assert all(torch.equal(value, before[key]) for key, value in model.parts().items())


def test_more_columns_than_the_site_has_are_refused() -> None:
    model, larger = of_rank(2), of_rank(3)
    with pytest.raises(ValueError, match="has shape"):
        model.trainer(DATA).check(larger.parts(), HEAD)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_step_on_cores_is_the_clipped_full_batch_step(size: int) -> None:
    model = cored()
    parts = model.adapted.read(MODEL_ROLES)
    trained = model.adapted.select_trained(CORE)
    total = {key: torch.zeros_like(value) for key, value in trained.items()}
    norms = []
    for unit in range(UNITS.count):
        mine, _ = UNITS.rows_of(np.array([unit]))
        loss = model.classifier.losses(DATA.batch(mine)).sum()
        own = torch.autograd.grad(loss, list(trained.values()))
        norms.append(math.sqrt(sum(float(value.double().pow(2).sum()) for value in own)))
        for place, value in zip(total.values(), own, strict=True):
            place += value * min(1.0, CLIP / norms[-1])
    assert max(norms) > CLIP
    expected = {key: parts[key] - value / BATCH for key, value in total.items()}
    found = model.trainer(DATA, physical_batch=size).train(task(parts, CORE), UNITS)
    assert_close(found, expected)


def test_a_job_without_a_core_is_one_on_the_factors_alone() -> None:
    """Whatever cores an earlier task left."""
    model, plain = cored(), tiny()
    parts = tiny().parts()
    model.adapted.write({key: torch.eye(2) for key in model.adapted.read({Role.CORE})})
    trainer = model.trainer(DATA)
    everything = {**parts, **cored().adapted.read({Role.CORE})}
    trainer.train(task(everything, CORE), UNITS)
    found = trainer.train(task(parts, HEAD), UNITS)
    assert_close(found, plain.trainer(DATA).train(task(parts, HEAD), UNITS))


@pytest.mark.parametrize("role", [Role.A, Role.B, Role.CORE])
def test_a_core_so_large_that_rounding_is_amplified_is_refused(role: Role) -> None:
    """s·‖B‖₂·‖R‖·‖A‖₂ may reach LARGEST_UPDATE·‖W‖, whatever the product is."""
    model = cored()
    parts, trainer = model.adapted.read(MODEL_ROLES), model.trainer(DATA)
    site, norm = next(iter(model.adapted.base_norms().items()))
    b, core, a = (parts[PartKey(site.name, r)] for r in (Role.B, Role.CORE, Role.A))
    sizes = (torch.linalg.svdvals(b)[0], core.norm(), torch.linalg.svdvals(a)[0])
    bound = LARGEST_UPDATE * norm / (site.scaling * math.prod(map(float, sizes)))
    key = PartKey(site.name, role)
    trainer.check({**parts, key: parts[key] * bound * 0.999}, CORE)
    with pytest.raises(ValueError, match="must be ≤"):
        trainer.check({**parts, key: parts[key] * bound * 1.001}, CORE)


@pytest.mark.parametrize("zero", [Role.B, Role.CORE, Role.HEAD])
@pytest.mark.parametrize("fused", [False, True])
def test_arrays_that_training_makes_too_large_take_no_further_step(zero: Role, fused: bool) -> None:
    """From 0 the first step is within the bound; what huge arrays make of it is not."""
    model = cored() if zero is Role.CORE else tiny()
    start, train = model.adapted.read(MODEL_ROLES), frozenset({zero})
    huge = {Role.A: 1e8} if zero is Role.B else {Role.A: 1e4, Role.B: 1e4}
    parts = {
        key: value * (0.0 if key.role is zero else huge.get(key.role, 1.0))
        for key, value in start.items()
    }
    if zero is Role.HEAD:  # whose gradient is clipped: a large step is what it takes
        parts = start
    rate = 1e4 if zero is Role.HEAD else 1.0
    for steps in (1, 2):
        trainer = model.trainer(DATA, steps=steps, learning_rate=rate, head_learning_rate=rate)
        trainer.check(parts, train)
        tasks = [task(parts, train)] * (1 + fused)
        if steps == 1:
            assert far(train_together(trainer, tasks, [UNITS] * len(tasks))[0], parts)
            continue
        with pytest.raises(ValueError, match="must be ≤"):
            train_together(trainer, tasks, [UNITS] * len(tasks))


def test_what_trains_plainly_has_no_bound_on_its_way() -> None:
    """Without clipping there is no sensitivity that rounding could lift."""
    model = tiny()
    parts = model.parts()
    trainer = model.trainer(DATA, steps=2, learning_rate=1e6)
    trainer.train(replace(task(parts, B), mechanism=None), UNITS)
    with pytest.raises(ValueError, match="must be ≤"):
        trainer.train(task(parts, B), UNITS)


def test_cores_train_in_shapes_of_their_own() -> None:
    """bfloat16: each row in a shape of its own; the paths agree as without cores."""
    model = cored(precision="bfloat16")
    parts = model.adapted.read(MODEL_ROLES)
    settings = {"own_shapes": LONGEST, "physical_batch": 3}
    whole = model.trainer(DATA, **settings).train(task(parts, CORE), UNITS)
    slow = model.trainer(DATA, gradients="autograd", **settings).train(task(parts, CORE), UNITS)
    for key in whole:
        apart = float((whole[key] - slow[key]).norm())
        assert apart <= 2e-2 * float((whole[key] - parts[key]).norm()), key


def with_changed_weights(parts: Arrays) -> Tiny:
    """A model of whose base weights W there are W + R_b·R_a, and that knows no residual."""
    model = tiny()
    with torch.no_grad():
        for site in model.adapted.sites:
            layer = model.adapted.encoder.get_submodule(f"base_model.model.{site.name}.base_layer")
            b, a = (parts[PartKey(site.name, r)] for r in (Role.RESIDUAL_B, Role.RESIDUAL_A))
            layer.get_parameter("weight").add_(b @ a)
    return model


@pytest.mark.parametrize("gradients", ["captured", "autograd"])
@pytest.mark.parametrize("train", [HEAD, BOTH], ids=len)
def test_a_residual_is_part_of_the_base_for_its_round(
    gradients: str, train: frozenset[Role]
) -> None:
    model, start = tiny(), tiny().parts()
    added = residual(model, 3)
    settings = {"steps": 2, "gradients": gradients}
    trainer = model.trainer(DATA, **settings)
    before = trainer.train(task(start, train), UNITS)
    found = trainer.train(task({**start, **added}, train), UNITS)
    after = trainer.train(task(start, train), UNITS)
    expected = (
        with_changed_weights(added).trainer(DATA, **settings).train(task(start, train), UNITS)
    )
    assert_close(found, expected)
    assert far(found, before)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_frozen_prefix_stays_what_it_was() -> None:
    """Its layers have no site: the states that were kept are those of any residual."""
    on, parts = [1, 2], tiny(layers=3, on=[1, 2]).parts()
    plain, model = tiny(layers=3, on=on), tiny(layers=3, on=on)
    prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
    assert prefix is not None
    cached = cache_prefix(model.adapted.encoder, prefix, DATA, 3, 1)
    assert cached.hidden is not None
    head = model.classifier.head
    replayed = replace(model, classifier=Classifier(model.adapted.encoder, head, prefix).eval())
    whole = task({**parts, **residual(model, 3)}, HEAD)
    expected = plain.trainer(DATA, steps=2).train(whole, UNITS)
    assert_close(replayed.trainer(cached, steps=2).train(whole, UNITS), expected)
    without = plain.trainer(DATA, steps=2).train(task(parts, HEAD), UNITS)
    assert far(expected, without)


def test_update_and_residual_are_bounded_together() -> None:
    model = tiny()
    trainer, parts = model.trainer(DATA), {**model.parts(), **residual(model, 2)}
    site, norm = next(iter(model.adapted.base_norms().items()))
    keys = {role: PartKey(site.name, role) for role in Role}
    own = site.scaling * float(parts[keys[Role.B]].norm() * parts[keys[Role.A]].norm())
    product = parts[keys[Role.RESIDUAL_B]] @ parts[keys[Role.RESIDUAL_A]]
    bound = (LARGEST_UPDATE * norm - own) / float(product.norm())
    assert bound > 1
    left = keys[Role.RESIDUAL_B]
    trainer.check({**parts, left: parts[left] * bound * 0.999}, HEAD)
    with pytest.raises(ValueError, match="must be ≤"):
        trainer.check({**parts, left: parts[left] * bound * 1.001}, HEAD)
    spoiled = parts[left].clone()
    spoiled[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        trainer.check({**parts, left: spoiled}, HEAD)
    with pytest.raises(ValueError, match="residual_b"):
        trainer.check(parts, frozenset({Role.RESIDUAL_B}))


CASES: dict[str, tuple[Any, frozenset[Role]]] = {
    "rank": (lambda: (of_rank(RANK), cut(of_rank(RANK).parts(), 2)), HEAD),
    "core": (lambda: (cored(), cored().adapted.read(MODEL_ROLES)), CORE),
    "residual": (lambda: (tiny(), {**tiny().parts(), **residual(tiny(), 3)}), HEAD),
}


@pytest.mark.parametrize("rows_per_unit", [1, 2])
@pytest.mark.parametrize("case", list(CASES))
def test_a_unit_moves_the_sum_by_at_most_the_clip(case: str, rows_per_unit: int) -> None:
    """Units of privacy of one row and of several; each is removed in turn, the longest too."""
    build, train = CASES[case]
    model, parts = build()
    clip = 0.5
    trainer = model.trainer(DATA, physical_batch=3, learning_rate=100, head_learning_rate=100)
    sizes = [rows_per_unit] * (len(DATA) // rows_per_unit)
    whole, largest = units_of(sizes), 0.0
    full = trainer.train(task(parts, train, clip), whole)
    for unit in range(len(sizes)):
        kept = np.delete(np.arange(whole.count), unit)
        mine, index = whole.rows_of(kept)
        left = UnitIndex(mine, np.cumsum([0, *np.bincount(index)]).astype(np.int64))
        less = trainer.train(task(parts, train, clip), left)
        change = sum(float((full[k] - less[k]).double().pow(2).sum()) for k in full)
        moved = math.sqrt(change) * BATCH / 100
        assert moved <= clip * (1 + 1e-4)
        largest = max(largest, moved)
    assert largest >= 0.99 * clip
