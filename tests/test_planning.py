"""Sizes become public numbers: q, σ and δ follow from the declared size and nothing else."""

from __future__ import annotations

import math

import pytest

from fedlr.build import source_spec
from fedlr.config import RunConfig, from_mapping
from fedlr.data.sources import load
from fedlr.errors import ConfigError
from fedlr.forecast import Forecaster
from fedlr.planning import calibrate, declared_size, plan_clients, plan_sizes, read_split
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release

RDP = {"accountant": "rdp"}


def config(**sections: dict[str, object]) -> RunConfig:
    base: dict[str, dict[str, object]] = {"privacy": RDP, "data": {"max_examples": 90}}
    return from_mapping({**base, **sections})


def test_the_numbers_of_a_client_follow_from_its_declared_size() -> None:
    # 857 and 850 declare the same size, so their noise must not tell them apart.
    first, second, small = plan_sizes(config(), [857, 850, 40])
    assert first.declared_size == declared_size(857) == 850
    assert (first.sample_rate, first.noise_multiplier) == (128 / 850, second.noise_multiplier)
    assert (small.sample_rate, small.declared_size) == (1.0, 40)
    assert [term.name for term in (first, second, small)] == [f"client-00{i}" for i in range(3)]


def test_noise_is_calibrated_for_the_most_joins_and_stays_below_the_target() -> None:
    federation = {"rounds": 20, "clients": 2, "clients_per_round": 1}
    (whole,) = plan_sizes(config(federation=federation), [850])
    (few,) = plan_sizes(config(federation=federation, privacy={**RDP, "max_joins": 5}), [850])
    assert few.noise_multiplier < whole.noise_multiplier
    for term, joins in ((whole, 20), (few, 5)):
        event = Release(term.noise_multiplier, term.sample_rate, 5 * joins, "example")
        assert 0.98 * 8 <= epsilon([event], term.delta, "rdp") <= 8


@pytest.mark.parametrize("mode", ["dry", "none"])
def test_without_privacy_there_is_no_noise(mode: str) -> None:
    (term,) = plan_sizes(config(privacy={"mode": mode}), [850])
    assert term.noise_multiplier == 0.0


def test_delta_defaults_to_a_tenth_of_a_row_and_is_refused_above_one() -> None:
    small, large = plan_sizes(config(), [1000, 1_000_000])
    assert (small.delta, large.delta) == (1e-5, 1e-7)
    with pytest.raises(ConfigError, match=r"privacy.delta = 0.01 must be < 1/N = 0.005 of client-"):
        plan_sizes(config(privacy={**RDP, "delta": 0.01}), [20, 200])


def test_an_epsilon_out_of_reach_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"privacy.epsilon = 0.0001: .* cannot be reached"):
        calibrate(1e-4, 1e-5, 0.1, 5)


def test_reading_the_split_gives_the_clients_and_labels_of_the_run() -> None:
    federation = {"clients": 4, "clients_per_round": 4}
    partition = {"kind": "dirichlet", "alpha": 0.5}
    wanted = config(federation=federation, partition=partition)
    spec, said = source_spec(wanted), list[str]()
    split, data = read_split(wanted, spec, said.append), load(spec)
    sizes = split.sizes
    assert sum(sizes) == 90
    assert split.labels == data.label_names
    clients = plan_clients(wanted, data)
    assert [client.units.count for client in clients] == list(sizes)
    terms = plan_sizes(wanted, sizes)
    assert [client.noise_multiplier for client in clients] == [t.noise_multiplier for t in terms]
    assert [client.delta for client in clients] == [term.delta for term in terms]
    assert said == ["reading the data"]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([50], "the noise of 1 client"),
        ([50, 50], "the noise of 2 clients of one size"),
        ([50, 857, 850], "the noise of 3 clients of 2 different sizes"),
    ],
)
def test_it_is_said_how_many_sizes_need_noise(sizes: list[int], says: str) -> None:
    said = list[str]()
    plan_sizes(config(), sizes, say=said.append)
    assert said == [f"calibrating {says}"]


def test_known_noise_is_taken_as_it_is() -> None:
    noise = {"client-000": 1.5, "client-001": 2.5}
    terms = plan_sizes(config(), [100, 200], noise)
    assert [term.noise_multiplier for term in terms] == [1.5, 2.5]


PAPER = [
    (17_237, 7.74),
    pytest.param(7_586, 8.31, marks=pytest.mark.slow),
    pytest.param(4_811, 8.65, marks=pytest.mark.slow),
    pytest.param(1_264, 9.07, marks=pytest.mark.slow),
    (316, 9.06),
]


@pytest.mark.parametrize(("size", "expected"), PAPER)
def test_the_paper_s_first_release_re_accounted(size: int, expected: float) -> None:
    """Noise for (6, 1e-5) at q/2 over 1,000 steps, then 500 steps at q: more than 6 is spent.

    Halving q credits the sampling of clients, which the server sees. Clients of the
    authors' own partitions, logical batches of 128.
    """
    rate = 1 / math.ceil(size / 128)
    sigma = calibrate(6.0, 1e-5, rate / 2, 1000)
    join = Release(sigma, rate, 10, "example")
    spent = Forecaster(join, 1e-5).after(50).epsilon
    print(f"\nn = {size}: σ = {sigma:.3f}, ε = {spent:.3f}")
    assert spent == pytest.approx(expected, abs=0.05)
