"""Every identity of the refactorisation, against the dense SVD of B·A."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.lowrank import svd
from fedlr.lowrank.factors import Factors, stack
from fedlr.lowrank.svd import (
    best_of_rank,
    best_of_rank_many,
    narrow,
    refactorise,
    refactorise_many,
    singular_values,
    tail_energy,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)).map(
    lambda s: (s[0], s[1], min(s))
)


def random_pair(
    m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64, scaling: float = 0.5
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(m, r, generator=generator, dtype=torch.float64)
    a = torch.randn(r, n, generator=generator, dtype=torch.float64)
    return Factors(b=b.to(dtype), a=a.to(dtype), scaling=scaling)


def distance(left: Tensor, right: Tensor) -> float:
    """Relative Frobenius distance."""
    return float((left.double() - right.double()).norm()) / max(float(right.norm()), 1e-300)


def gram(rows: Tensor) -> Tensor:
    return rows.double() @ rows.double().mT


def row_projector(a: Tensor) -> Tensor:
    """The orthogonal projector on row(A), A of full row rank: Aᵀ (A Aᵀ)⁻¹ A."""
    wide = a.double()
    projector: Tensor = wide.mT @ torch.linalg.solve(wide @ wide.mT, wide)
    return projector


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 10**6), dtype=st.sampled_from(list(TOLERANCE)))
def test_product_is_kept_and_a_is_orthonormal(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> None:
    factors = random_pair(*shape, seed=seed, dtype=dtype)
    new = refactorise(factors)
    assert new.b.dtype == new.a.dtype == dtype
    assert new.b.shape == factors.b.shape
    assert new.a.shape == factors.a.shape
    assert new.scaling == factors.scaling
    exact = factors.b.double() @ factors.a.double()
    assert distance(new.b.double() @ new.a.double(), exact) <= TOLERANCE[dtype]
    identity = torch.eye(factors.rank, dtype=torch.float64)
    torch.testing.assert_close(gram(new.a), identity, atol=TOLERANCE[dtype], rtol=0)


@settings(deadline=None, max_examples=40)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_columns_of_b_are_orthogonal_with_decreasing_norm(
    shape: tuple[int, int, int], seed: int
) -> None:
    new = refactorise(random_pair(*shape, seed=seed))
    square = new.b.mT @ new.b
    norms = square.diagonal()
    assert bool((norms[:-1] >= norms[1:]).all())
    torch.testing.assert_close(square, norms.diag(), atol=1e-11 * float(norms[0]), rtol=0)


def test_equals_the_dense_svd_up_to_sign() -> None:
    factors = random_pair(9, 7, 4, seed=1)
    left, sigma, right = torch.linalg.svd(factors.b @ factors.a, full_matrices=False)
    assert float((sigma[:3] - sigma[1:4]).min()) > 0.1  # distinct: the SVD is unique up to sign
    new = refactorise(factors)
    torch.testing.assert_close(new.a.abs(), right[:4].abs())
    torch.testing.assert_close(new.b.abs(), (left[:, :4] * sigma[:4]).abs())


def test_a_row_has_a_positive_largest_entry() -> None:
    new = refactorise(random_pair(9, 7, 4, seed=2))
    largest = new.a.gather(1, new.a.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())


def test_sign_of_the_inputs_does_not_change_the_result() -> None:
    # (−B)(−A) = BA, and distinct singular values with the sign rule fix the pair.
    factors = random_pair(9, 7, 4, seed=3)
    flipped = Factors(b=-factors.b, a=-factors.a, scaling=factors.scaling)
    torch.testing.assert_close(refactorise(flipped).a, refactorise(factors).a)
    torch.testing.assert_close(refactorise(flipped).b, refactorise(factors).b)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), kept=st.integers(0, 4))
def test_idempotent_as_far_as_the_singular_values_determine_the_pair(seed: int, kept: int) -> None:
    # Singular values 4, 3, 2, 1 of which the leading `kept` stay: B has rank `kept`.
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(10, 4, generator=generator, dtype=torch.float64)).Q
    mix = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    a = torch.linalg.qr(torch.randn(8, 4, generator=generator, dtype=torch.float64)).Q.mT
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    sigma[kept:] = 0
    once = refactorise(Factors(b=((left * sigma) @ mix.mT).float(), a=a.float()))
    twice = refactorise(once)
    torch.testing.assert_close(once.b.norm(dim=0), sigma.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(twice.b, once.b, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice.a[:kept], once.a[:kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(twice.a.mT @ twice.a, once.a.mT @ once.a, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), kept=st.integers(0, 4))
def test_row_space_is_that_of_a_whatever_the_rank_of_b(seed: int, kept: int) -> None:
    factors = random_pair(10, 8, 4, seed=seed)
    b = factors.b.clone()
    b[:, kept:] = 0
    new = refactorise(Factors(b=b, a=factors.a))
    torch.testing.assert_close(new.a.mT @ new.a, row_projector(factors.a), atol=1e-9, rtol=0)


def test_zero_b_gives_zero_b_and_a_basis_of_the_row_space() -> None:
    factors = random_pair(6, 5, 3, dtype=torch.float32)
    new = refactorise(Factors(b=torch.zeros(6, 3), a=factors.a))
    assert bool((new.b == 0).all())
    torch.testing.assert_close(
        new.a.double().mT @ new.a.double(), row_projector(factors.a), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("a_rank", [0, 1, 2])
def test_rank_deficient_a_still_gives_orthonormal_rows(a_rank: int) -> None:
    factors = random_pair(6, 5, 3, seed=4)
    a = factors.a.clone()
    a[a_rank:] = 0
    new = refactorise(Factors(b=factors.b, a=a))
    torch.testing.assert_close(gram(new.a), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(new.b @ new.a, factors.b @ a)
    # Every row of A lies in row(A'): projecting it there changes nothing.
    torch.testing.assert_close(a @ new.a.mT @ new.a, a)


def test_leading_dimensions_are_independent_sites() -> None:
    pairs = [random_pair(6, 5, 3, seed=seed) for seed in range(4)]
    batch = Factors(
        b=torch.stack([p.b for p in pairs]).reshape(2, 2, 6, 3),
        a=torch.stack([p.a for p in pairs]).reshape(2, 2, 3, 5),
    )
    new = refactorise(batch)
    for index, factors in enumerate(pairs):
        single = refactorise(factors)
        torch.testing.assert_close(new.a[index // 2, index % 2], single.a)
        torch.testing.assert_close(new.b[index // 2, index % 2], single.b)


def test_many_equals_one_by_one_keeps_order_and_owns_its_storage() -> None:
    pairs = {
        "q": random_pair(6, 5, 3, seed=0, scaling=2.0),
        "up": random_pair(9, 5, 3, seed=1),
        "v": random_pair(6, 5, 3, seed=2, scaling=0.25),
        "q32": random_pair(6, 5, 3, seed=3, dtype=torch.float32),
    }
    many = refactorise_many(pairs)
    assert list(many) == list(pairs)
    for name, factors in pairs.items():
        single = refactorise(factors)
        assert many[name].scaling == factors.scaling
        torch.testing.assert_close(many[name].a, single.a)
        torch.testing.assert_close(many[name].b, single.b)
        assert many[name].b.untyped_storage().nbytes() == factors.b.untyped_storage().nbytes()
    assert refactorise_many({}) == {}


def test_inputs_are_not_mutated_and_no_graph_is_kept() -> None:
    factors = random_pair(6, 5, 3)
    factors.b.requires_grad_()
    before = factors.b.detach().clone(), factors.a.clone()
    new = refactorise(factors)
    assert not new.b.requires_grad
    assert torch.equal(factors.b, before[0])
    assert torch.equal(factors.a, before[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_entries_are_refused(bad: float) -> None:
    factors = random_pair(4, 4, 2)
    b = factors.b.clone()
    b[0, 0] = bad
    with pytest.raises(ValueError, match="b holds NaN or infinite"):
        refactorise(Factors(b=b, a=factors.a))
    with pytest.raises(ValueError, match="sites q: b holds NaN"):
        refactorise_many({"q": Factors(b=b, a=factors.a)})
    with pytest.raises(ValueError, match="b holds NaN"):
        singular_values(Factors(b=b, a=factors.a))


def test_rank_above_a_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank = 4 must be ≤ min\(m, n\) = 3"):
        refactorise(Factors(b=torch.ones(3, 4), a=torch.ones(4, 8)))


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 9), n=st.integers(1, 9), r=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_singular_values_equal_those_of_the_dense_product(
    m: int, n: int, r: int, seed: int
) -> None:
    factors = random_pair(m, n, r, seed=seed, scaling=3.0)
    dense = torch.linalg.svdvals(factors.product())
    found = singular_values(factors)
    kept = min(m, n, r)
    assert found.shape == (kept,)
    torch.testing.assert_close(found, dense[:kept], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(dense[kept:], torch.zeros_like(dense[kept:]), atol=1e-10, rtol=0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4))
def test_tail_energy_is_the_error_of_the_truncated_refactorisation(seed: int, rank: int) -> None:
    factors = random_pair(8, 6, 4, seed=seed)
    cut = refactorise(factors).truncate(rank)
    error = (cut.product() - factors.product()).square().sum()
    torch.testing.assert_close(tail_energy(factors, rank), error, atol=1e-12, rtol=1e-9)


def test_no_truncation_of_that_rank_is_better() -> None:
    factors = random_pair(8, 6, 4, seed=7)
    best = float(tail_energy(factors, 2))
    unordered = (factors.truncate(2).product() - factors.product()).square().sum()
    assert float(unordered) > 1.01 * best


def test_tail_energy_edges() -> None:
    factors = random_pair(8, 6, 4, seed=8)
    torch.testing.assert_close(tail_energy(factors, 0), factors.product().square().sum())
    assert float(tail_energy(factors, 4)) == 0.0
    for rank in (-1, 5):
        with pytest.raises(ValueError, match=rf"rank = {rank} must be in \[0, 4\]"):
            tail_energy(factors, rank)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 6), n=st.integers(1, 6), k=st.integers(0, 14), seed=st.integers(0, 10**6))
def test_narrow_keeps_the_product_within_full_rank(m: int, n: int, k: int, seed: int) -> None:
    factors = random_pair(m, n, k, seed=seed)
    found = narrow(factors)
    assert found.rank == min(k, m, n)
    assert (found is factors) is (k <= min(m, n))
    torch.testing.assert_close(found.product(), factors.product())


@pytest.mark.parametrize(("m", "n"), [(5, 3), (3, 5), (4, 4)])
def test_adding_to_a_narrowed_pair_rounds_nothing_that_is_there(m: int, n: int) -> None:
    # (B·A, I) with zeros stacked on: entry times one plus zeros, bit for bit.
    full = narrow(random_pair(m, n, 9, dtype=torch.float32, scaling=1.0))
    more = Factors(b=torch.zeros(m, 2), a=torch.ones(2, n))
    assert torch.equal(narrow(stack([full, more])).product(), full.product())


@settings(deadline=None, max_examples=40)
@given(shape=shapes, count=st.integers(1, 4), seed=st.integers(0, 10**6), data=st.data())
def test_best_of_rank_has_the_error_of_eckart_and_young(
    shape: tuple[int, int, int], count: int, seed: int, data: st.DataObject
) -> None:
    m, n, r = shape
    stacked = stack([random_pair(m, n, r, seed=seed + index) for index in range(count)])
    rank = data.draw(st.integers(1, min(m, n, stacked.rank)))
    found = best_of_rank(stacked, rank)
    assert (found.b.shape, found.a.shape) == ((m, rank), (rank, n))
    sigma = torch.linalg.svdvals(stacked.product())
    error = (found.product() - stacked.product()).square().sum()
    torch.testing.assert_close(error, sigma[rank:].square().sum(), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(gram(found.a), torch.eye(rank, dtype=torch.float64))


def test_best_of_rank_is_computed_in_double_and_rounded_once() -> None:
    # 2⁻¹² squared is lost beside 1 in float32; a Gram matrix of float32 would show it.
    b = torch.tensor([[1.0, 0.0], [2.0**-12, 2.0**-24]])
    found = best_of_rank(Factors(b=b, a=torch.eye(2)), 2)
    assert found.b.dtype == torch.float32
    exact = torch.linalg.svdvals(b.double())
    torch.testing.assert_close(found.b.double().norm(dim=0), exact, atol=0, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_best_of_rank_refuses_a_rank_that_is_not_there(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank = {rank} must be in \[1, 3\]"):
        best_of_rank(random_pair(6, 5, 3), rank)


def test_best_of_many_equals_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {
        "q": random_pair(6, 5, 3, seed=0, scaling=2.0),
        "up": random_pair(9, 5, 7, seed=1),
        "v": random_pair(6, 5, 3, seed=2, scaling=0.25),
        "k": random_pair(6, 5, 3, seed=3),
    }
    ranks = {"q": 2, "up": 4, "v": 2, "k": 3}
    monkeypatch.setattr(svd, "_BATCH", 1)
    apart = best_of_rank_many(pairs, ranks)
    monkeypatch.undo()
    many = best_of_rank_many(pairs, ranks)
    assert list(many) == list(apart) == list(pairs)
    for name, factors in pairs.items():
        single = best_of_rank(factors, ranks[name])
        for found in (many[name], apart[name]):
            assert (found.scaling, found.rank) == (factors.scaling, ranks[name])
            torch.testing.assert_close(found.a, single.a)
            torch.testing.assert_close(found.b, single.b)
    with pytest.raises(ValueError, match=r"sites q, v: rank = 9"):
        best_of_rank_many(pairs, {**ranks, "q": 9, "v": 9})
