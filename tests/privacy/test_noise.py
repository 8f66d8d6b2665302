"""Laws of the noise and of the Poisson sample: accepted as stated, rejected when wrong.

Public streams make every statistical verdict reproducible; the secret ones run
the same code under another key.
"""

from __future__ import annotations

import copy
import os
import pickle
import struct
import threading
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from scipy import stats

from fedlr.privacy import noise
from fedlr.privacy.noise import Stream, public_stream, secret_stream

DEVIATION = 1.7
STREAMS = [pytest.param(lambda: public_stream("law", 1), id="public"), secret_stream]
# A true law is rejected by chance once in 10⁹ runs.
ALPHA = 1e-9


@pytest.mark.parametrize("make", STREAMS)
def test_gaussian_has_the_stated_deviation_and_no_other(make: Callable[[], Stream]) -> None:
    draws = make().gaussian((200_000,), DEVIATION).double().numpy()
    assert stats.kstest(draws, "norm", args=(0, DEVIATION)).pvalue > ALPHA
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(draws, "norm", args=(0, wrong * DEVIATION)).pvalue < ALPHA
    assert stats.kstest(draws, "norm", args=(0.05 * DEVIATION, DEVIATION)).pvalue < ALPHA


def test_gaussian_tail_and_kurtosis() -> None:
    n = 2_000_000
    draws = public_stream("tail").gaussian((n,), 1.0)
    # P(|z| > 4) = 6.334e-5; the count is binomial. Kurtosis of n normals: 3 ± √(24/n).
    expected = 2 * stats.norm.sf(4) * n
    assert abs((draws.abs() > 4).sum().item() - expected) < 5 * expected**0.5
    assert abs(stats.kurtosis(draws.double().numpy(), fisher=False) - 3) < 5 * (24 / n) ** 0.5


def test_gaussian_draws_are_independent_of_each_other() -> None:
    n = 1 << 19
    draws = public_stream("lags").gaussian((n,), 1.0).double()
    # Lags that a defect of Box-Muller halves or of chunks would show: neighbours,
    # half a chunk, a chunk. The correlation of independent normals is N(0, 1/n).
    for lag in (1, 2, noise._CHUNK // 2, noise._CHUNK):
        for power in (1, 2):
            values = draws**power
            pair = torch.corrcoef(torch.stack([values[:-lag], values[lag:]]))
            assert abs(pair[0, 1].item()) < 6 * n**-0.5


def test_gaussian_shapes_and_zero_deviation() -> None:
    stream = public_stream("shape")
    assert stream.gaussian((), 1.0).shape == ()
    assert stream.gaussian((3, 0, 2), 1.0).shape == (3, 0, 2)
    values = stream.gaussian((3, 5, 7), 1.0)
    assert (values.dtype, values.device.type) == (torch.float32, "cpu")
    assert len(set(values.flatten().tolist())) == values.numel()
    assert stream.gaussian((4,), 0.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("deviation", [-1.0, float("nan"), float("inf"), 1e-40, 1e38])
def test_a_deviation_that_float32_cannot_hold_is_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match="standard_deviation"):
        secret_stream().gaussian((1,), deviation)


def test_keystream_is_chacha20_and_segments_never_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(32))
    monkeypatch.setattr(noise, "_SEGMENT_BYTES", 64)
    stream = Stream(key, secret=False)
    words = np.concatenate([stream._integers(8) for _ in range(3)])
    for segment in range(3):
        # RFC 8439: block counter in the first 4 bytes of 16, nonce in the rest.
        nonce = struct.pack("<IIII", 0, segment, 0, 0)
        block = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64))
        expected = [word >> 11 for word in struct.unpack("<8Q", block)]
        assert words[8 * segment : 8 * segment + 8].tolist() == expected
    assert len(set(words.tolist())) == 24


def test_streams_are_independent() -> None:
    n = 100_000
    streams = [secret_stream(), secret_stream(), public_stream("a"), public_stream("b")]
    draws = torch.stack([stream.gaussian((n,), 1.0) for stream in streams]).double()
    off_diagonal = torch.corrcoef(draws) - torch.eye(4, dtype=torch.float64)
    assert off_diagonal.abs().max().item() < 6 * n**-0.5
    # The same test sees a shared stream.
    twins = [public_stream("a").gaussian((n,), 1.0) for _ in range(2)]
    assert torch.equal(*twins)


def _send_secret_draws(connection: Connection) -> None:
    # The parent's OpenMP threads do not survive a fork; work shared with them never ends.
    torch.set_num_threads(1)
    connection.send(secret_stream().gaussian((20_000,), 1.0).double().numpy())


def _receive(connection: Connection) -> Any:
    assert connection.poll(60), "the forked child sent nothing within 60 s"
    return connection.recv()


def _send_parent_stream_error(stream: Stream, connection: Connection) -> None:
    for draw in (lambda: stream.gaussian((1,), 1.0), lambda: stream.poisson_sample(0, 0.5)):
        try:
            draw()
            connection.send("drew")
        except RuntimeError as error:
            connection.send(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forks_draw_independent_noise_and_cannot_use_the_parents_stream() -> None:
    context = get_context("fork")
    stream = secret_stream()
    ends = [Pipe() for _ in range(3)]
    children = [context.Process(target=_send_secret_draws, args=(ends[i][1],)) for i in range(2)]
    children.append(context.Process(target=_send_parent_stream_error, args=(stream, ends[2][1])))
    for child in children:
        child.daemon = True  # a child that hangs must not keep pytest from ending
        child.start()
    draws = np.stack([_receive(ends[0][0]), _receive(ends[1][0]), stream.gaussian((20_000,), 1.0)])
    errors = [_receive(ends[2][0]) for _ in range(2)]
    for child in children:
        child.join(60)
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 6 * 20_000**-0.5
    assert all("fork" in error for error in errors)


def test_a_stream_cannot_be_duplicated() -> None:
    stream = secret_stream()
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="copied"):
            duplicate(stream)


def test_threads_never_draw_the_same_numbers() -> None:
    stream = secret_stream()
    parts: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: parts.append(stream.gaussian((50_000,), 1.0).double()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    correlation = torch.corrcoef(torch.stack(parts)) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max().item() < 6 * 50_000**-0.5


def test_public_labels_are_encoded_without_ambiguity() -> None:
    labels: list[tuple[str | int, ...]] = [
        ("ab", "c"), ("a", "bc"), ("abc",), ("1",), (1,), (-1,), (1, 1), (11,), ("",), ("", ""),
    ]  # fmt: skip
    first = [float(public_stream(*label).gaussian((1,), 1.0)) for label in labels]
    assert len(set(first)) == len(labels)
    for wrong in ((), (True,), (1.5,), (None,)):
        with pytest.raises(ValueError, match="label"):
            public_stream(*wrong)


def test_only_public_streams_give_a_torch_generator() -> None:
    assert secret_stream().secret
    assert not public_stream("a").secret
    first, second = (torch.rand(3, generator=public_stream("a").torch_generator()) for _ in "ab")
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="32 bits"):
        secret_stream().torch_generator()


def test_torch_generators_keep_32_bits_of_the_seed() -> None:
    """The stated reason for this module; if torch changes, the docstring must."""
    low, high = (torch.rand(4, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert torch.equal(low, high)


@pytest.mark.parametrize("make", STREAMS)
def test_poisson_sampling_rate(make: Callable[[], Stream]) -> None:
    stream, count, rate, repeats = make(), 2_000, 0.03, 300
    sizes = [len(stream.poisson_sample(count, rate)) for _ in range(repeats)]
    # The total is Binomial(count·repeats, rate); a rate 10 % off is 23 deviations away.
    total, trials = sum(sizes), count * repeats
    assert stats.binomtest(total, trials, rate).pvalue > ALPHA
    for wrong in (0.9 * rate, 1.1 * rate):
        assert stats.binomtest(total, trials, wrong).pvalue < ALPHA
    # Sizes vary as a binomial does; a fixed batch size has dispersion 0.
    dispersion = np.var(sizes, ddof=1) / (count * rate * (1 - rate))
    low, high = stats.chi2.ppf([ALPHA, 1 - ALPHA], repeats - 1) / (repeats - 1)
    assert low < dispersion < high


def test_poisson_draws_are_independent_over_units_and_steps() -> None:
    stream, count, rate, steps = public_stream("units"), 40, 0.3, 20_000
    drawn = np.zeros((steps, count))
    for row in drawn:
        row[stream.poisson_sample(count, rate)] = 1
    assert stats.binomtest(int(drawn[:, 0].sum()), steps, rate).pvalue > ALPHA
    assert stats.binomtest(int(drawn[:, -1].sum()), steps, rate).pvalue > ALPHA
    units = np.corrcoef(drawn.T) - np.eye(count)
    assert np.abs(units).max() < 6.5 * steps**-0.5
    flat = drawn.ravel()
    for lag in (1, count):
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 6 * flat.size**-0.5


def test_poisson_sizes_agree_with_the_sampler_of_opacus() -> None:
    count, rate, steps = 300, 0.02, 4_000
    stream, generator = public_stream("opacus"), torch.Generator().manual_seed(1)
    sampler = UniformWithReplacementSampler(
        num_samples=count, sample_rate=rate, generator=generator, steps=steps
    )
    theirs = np.bincount([len(batch) for batch in sampler], minlength=20)[:20]

    def sizes(q: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        drawn = [len(stream.poisson_sample(count, q)) for _ in range(steps)]
        return np.bincount(drawn, minlength=20)[:20]

    def homogeneous(ours: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
        table = np.stack([ours, theirs])
        return float(stats.chi2_contingency(table[:, table.sum(0) >= 10]).pvalue)

    assert homogeneous(sizes(rate)) > 1e-6
    assert homogeneous(sizes(1.15 * rate)) < 1e-6


def test_poisson_edges() -> None:
    stream = secret_stream()
    assert stream.poisson_sample(0, 0.5).tolist() == []
    assert stream.poisson_sample(70_000, 0.0).size == 0
    assert np.array_equal(stream.poisson_sample(70_000, 1.0), np.arange(70_000))
    drawn = stream.poisson_sample(100_000, 0.5)
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()
    for count, rate in ((-1, 0.5), (1, 1.5), (1, -0.1), (1, float("nan"))):
        with pytest.raises(ValueError, match=r"count|rate"):
            stream.poisson_sample(count, rate)
