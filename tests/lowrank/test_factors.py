import math

import pytest
import torch

from fedlr.lowrank.factors import AdapterSite, Factors, stack


def pair(m: int, n: int, r: int, scaling: float, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        b=torch.randn(m, r, generator=generator, dtype=torch.float64),
        a=torch.randn(r, n, generator=generator, dtype=torch.float64),
        scaling=scaling,
    )


def test_stacked_product_is_the_sum_of_the_products() -> None:
    pairs = [pair(5, 7, 2, 0.5, 0), pair(5, 7, 3, 2.0, 1)]
    stacked = stack(pairs)
    assert stacked.rank == 5
    torch.testing.assert_close(stacked.product(), pairs[0].product() + pairs[1].product())


def test_scale_multiplies_the_product_and_keeps_a() -> None:
    factors = pair(4, 6, 2, 0.5, 2)
    scaled = factors.scale(-3.0)
    assert torch.equal(scaled.a, factors.a)
    torch.testing.assert_close(scaled.product(), -3.0 * factors.product())


def test_truncation_keeps_the_leading_outer_products() -> None:
    factors = pair(4, 6, 3, 2.0, 3)
    leading = 2.0 * sum(torch.outer(factors.b[:, i], factors.a[i]) for i in range(2))
    torch.testing.assert_close(factors.truncate(2).product(), leading)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"rank = {rank} must be in \[1, 3\]"):
            factors.truncate(rank)


def test_mismatching_factors_are_refused() -> None:
    b, a = torch.ones(3, 2), torch.ones(2, 4)
    for wrong in (torch.ones(3, 4), torch.ones(2, 2, 4), a.double()):
        with pytest.raises(ValueError, match=r"a is|a has|a has shape"):
            Factors(b=b, a=wrong)
    for scaling in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scaling"):
            Factors(b=b, a=a, scaling=scaling)


def test_site_rank_is_bounded_by_both_dimensions() -> None:
    AdapterSite("q", out_features=3, in_features=8, rank=3, scaling=1.0)
    with pytest.raises(ValueError, match="lower the rank"):
        AdapterSite("q", out_features=3, in_features=8, rank=4, scaling=1.0)
