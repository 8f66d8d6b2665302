"""Weights are public, finite, and of least variance where they are to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlr.errors import BadUpdate, RunError
from fedlr.methods.combine import normalised
from fedlr.training.jobs import SiteStatus, decode_status, encode_status
from server.membership import Member
from server.weights import Weights, check_weights, weights_of
from tests.server.toys import PROVENANCE, config, run, toy_sites

KINDS: list[Weights] = ["uniform", "declared", "inverse_variance"]


def members(sigmas: Sequence[float], sizes: Sequence[int] | None = None) -> list[Member]:
    return [
        Member(i, i, SiteStatus(f"client-{i:02d}", size, sigma, 1e-5, PROVENANCE))
        for i, (sigma, size) in enumerate(zip(sigmas, sizes or [10] * len(sigmas), strict=True))
    ]


def test_the_known_weights() -> None:
    found = members([1.0, 2.0, 0.5], [5, 0, 20])
    assert weights_of(found, "uniform") == [1.0, 1.0, 1.0]
    assert weights_of(found, "declared") == [5.0, 0.0, 20.0]
    # 1/σ² is 1, 1/4 and 4, here in units of the largest.
    assert weights_of(found, "inverse_variance") == [0.25, 0.0625, 1.0]
    assert weights_of(members([0.0, 0.0]), "inverse_variance") == [1.0, 1.0]


@given(
    sigmas=st.lists(st.floats(0.01, 100.0), min_size=2, max_size=6),
    other=st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6),
)
def test_no_other_weights_have_less_variance(sigmas: list[float], other: list[float]) -> None:
    def variance(weights: list[float]) -> float:
        shares = normalised(weights)
        return sum((p * s) ** 2 for p, s in zip(shares, sigmas, strict=True))

    best = variance(weights_of(members(sigmas), "inverse_variance"))
    # The least value, 1 / Σ 1/σ², is that of Cauchy and Schwarz.
    assert best == pytest.approx(1 / sum(s**-2 for s in sigmas), rel=1e-9)
    if any(other[: len(sigmas)]):
        assert best <= variance(other[: len(sigmas)]) * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least", [5e-324, 1e-200, 1e300])
def test_whatever_a_site_announces_its_weights_are_finite(kind: Weights, least: float) -> None:
    found = weights_of(members([least, 1.0], [2**63 - 1, 1]), kind)
    assert all(math.isfinite(weight) and weight >= 0 for weight in found)
    assert math.fsum(normalised(found)) == 1.0


@pytest.mark.parametrize("least", [5e-324, 1e-200])
def test_a_tiny_sigma_leaves_the_others_a_weight(least: float) -> None:
    found = weights_of(members([least, 1.0, 1e300]), "inverse_variance")
    assert min(found) > 0
    assert normalised(found)[0] == 1.0


@pytest.mark.parametrize("size", [2**63, 10**400, -1])
def test_a_size_that_is_none_is_no_status(size: int) -> None:
    header = encode_status(SiteStatus("client-00", 1, 0.0, 0.0, PROVENANCE))
    with pytest.raises(BadUpdate):
        decode_status({**header, "declared_size": size})


def test_some_without_noise_are_refused_and_all_without_it_are_not() -> None:
    check_weights(members([0.0, 0.0]), "inverse_variance")
    check_weights(members([0.0, 1.0]), "declared")
    with pytest.raises(RunError, match=r"client-00 announce σ = 0 .* set method\.weights=uniform"):
        check_weights(members([0.0, 1.0]), "inverse_variance")


def test_a_run_uses_the_weights_that_its_sites_announce() -> None:
    equal, unequal = toy_sites(epsilon=0.5), toy_sites(epsilon=0.5)
    unequal[0].sigma = 1e-12
    settings = config(clients_per_round=4, weights="inverse_variance", rounds=1)
    alone = run(toy_sites(1), config(clients=1, clients_per_round=1, rounds=1))
    uniform = run(toy_sites(), config(clients_per_round=4, rounds=1))
    for key, value in run(equal, settings).state.parts.items():
        assert value.equal(uniform.state.parts[key])
    for key, value in run(unequal, settings).state.parts.items():
        assert (value - alone.state.parts[key]).abs().max() <= 1e-6
    unequal[0].sigma = 0.0
    with pytest.raises(RunError, match="inverse_variance"):
        run(unequal, settings)
