import math

import pytest
import torch
from scipy import stats

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import SUBSPACES, Subspace, kaiming, orthonormal


def site(n: int = 32, r: int = 4) -> AdapterSite:
    return AdapterSite("q", out_features=max(r, 8), in_features=n, rank=r, scaling=1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("policy", SUBSPACES.values(), ids=SUBSPACES)
def test_shape_dtype_and_determinism(policy: Subspace) -> None:
    a = policy(site(), seeded(0))
    assert a.shape == (4, 32)
    assert a.dtype == torch.float32
    assert a.is_contiguous()
    assert torch.equal(a, policy(site(), seeded(0)))
    assert not torch.equal(a, policy(site(), seeded(1)))


@pytest.mark.parametrize("policy", SUBSPACES.values(), ids=SUBSPACES)
def test_two_sites_of_one_generator_differ_and_the_global_stream_is_untouched(
    policy: Subspace,
) -> None:
    before = torch.random.get_rng_state()
    generator = seeded(0)
    assert not torch.equal(policy(site(), generator), policy(site(), generator))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("n", "r"), [(1, 1), (4, 4), (32, 4), (300, 8)])
def test_orthonormal_rows(n: int, r: int) -> None:
    a = orthonormal(site(n, r), seeded(3))
    torch.testing.assert_close(a @ a.T, torch.eye(r), atol=1e-6, rtol=0)


def test_kaiming_rows_are_not_orthonormal() -> None:
    a = kaiming(site(300, 8), seeded(3))
    assert float((a @ a.T - torch.eye(8)).abs().max()) > 0.5


def test_kaiming_is_uniform_with_the_stated_bound_and_not_with_another() -> None:
    n = 1000
    a = kaiming(site(n, 20), seeded(4))
    bound = 1 / math.sqrt(n)
    assert float(a.abs().max()) <= bound
    values = a.flatten().double().numpy()
    right = stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue
    # PEFT's a = √5 left out would give the bound √(6/n), 2.4 times wider.
    wider = bound * math.sqrt(6)
    wrong = stats.kstest(values, stats.uniform(-wider, 2 * wider).cdf).pvalue
    assert right > 1e-3
    assert wrong < 1e-12


def test_kaiming_equals_torch_initialiser_in_law() -> None:
    reference = torch.empty(20, 1000)
    torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=seeded(5))
    found = kaiming(site(1000, 20), seeded(6))
    same = stats.ks_2samp(reference.flatten().numpy(), found.flatten().numpy()).pvalue
    other = stats.ks_2samp(1.1 * reference.flatten().numpy(), found.flatten().numpy()).pvalue
    assert same > 1e-3
    assert other < 1e-6


def test_orthonormal_is_haar_and_not_the_sign_biased_qr() -> None:
    # In dimension n a Haar unit vector has squared entries of law Beta(1/2, (n−1)/2), and
    # by symmetry each entry is positive half of the time: 400 draws, 5 standard deviations.
    n, draws = 6, 400
    generator = seeded(7)
    first = torch.stack([orthonormal(site(n, 2), generator)[:, 0] for _ in range(draws)])
    assert (
        stats.kstest(first[:, 0].square().numpy(), stats.beta(0.5, (n - 1) / 2).cdf).pvalue > 1e-3
    )
    positive = int((first[:, 0] > 0).sum())
    assert abs(positive - draws / 2) < 5 * math.sqrt(draws) / 2
    # The same test rejects a QR whose signs are left to Householder's convention.
    raw = [torch.linalg.qr(torch.randn(n, 2, generator=generator)).Q[0, 0] for _ in range(draws)]
    assert abs(sum(int(x > 0) for x in raw) - draws / 2) > 5 * math.sqrt(draws) / 2
