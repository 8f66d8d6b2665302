"""Random numbers for privacy: ChaCha20 keystreams, Gaussian noise, Poisson samples.

What floating point leaves open. A double-precision Box-Muller draw reaches only
a sparse set of numbers, so a single one may betray the sum it was added to
(Mironov 2012, doi 10.1145/2382196.2382264; Holohan and Braghin 2021,
arXiv 2107.10138). Here every value is the sum of four independent draws over
two, computed in double precision and rounded once to float32: the inputs of an
output can no longer be enumerated, and the rounding hides the sparse low bits.
*Not* covered: the caller's float32 addition of noise to a sum. Where the two
nearly cancel, the low bits of the result depend on those of the sum; excluding
that needs exact noise on a public grid, which this module does not have. Nor is
there a defence against timing, or against copies of a whole virtual machine,
which continue with equal keys.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Generator, Tensor

from fedlr import checks

_DRAWS = 4
# 2¹⁵ words (256 KiB) stay in the second-level cache.
_CHUNK = 1 << 15
_ZEROS = bytes(8 * _CHUNK)
# ChaCha20 counts 64-byte blocks in 32 bits, and what happens beyond depends on
# the library behind `cryptography`; a new nonce after 2³⁰ bytes never gets there.
_SEGMENT_BYTES = 1 << 30
_STANDARD_DEVIATIONS = (1e-30, 1e30)


class Stream:
    """A stream of random numbers from the ChaCha20 keystream of one 256-bit key.

    Made by `secret_stream` or `public_stream`, never directly. Two secret
    streams share no key, a stream never repeats itself (a new nonce every 2³⁰
    bytes), and it cannot be copied, pickled, or used after a fork: each of these
    would draw the same noise twice, and equal noise cancels in a difference.

    Why not a `torch.Generator`: torch's CPU generator keeps only the low 32
    bits of its seed (``manual_seed(5)`` and ``manual_seed(5 + 2**32)`` give one
    stream), so whoever sees noise can try all seeds, and the generator behind
    it, the Mersenne Twister, is no cryptographic one. For the same reason the
    Poisson sampler of Opacus (``UniformWithReplacementSampler``), which takes
    such a generator, is not used; it is the twin in a distribution test.

    Attributes:
        secret: Whether the key came from the operating system's entropy.

    Guarantees:
        Thread-safe. Two equal sequences of calls on streams of equal key give
        equal numbers on every platform up to the last bits of log, sin, cos.
    """

    def __init__(self, key: bytes, *, secret: bool) -> None:
        if len(key) != 32:
            raise ValueError(f"key has {len(key)} bytes, ChaCha20 needs 32; use secret_stream()")
        self._key = key
        self._secret = secret
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._segment = 0
        self._left = _SEGMENT_BYTES
        self._cipher = self._encryptor()

    @property
    def secret(self) -> bool:
        """Whether the key came from the operating system's entropy."""
        return self._secret

    def gaussian(self, shape: Sequence[int], standard_deviation: float) -> Tensor:
        """Return independent N(0, standard_deviation²) draws.

        Each is the sum of four Box-Muller draws from 53-bit uniforms, divided
        by two: the same law, for the reason given in the module docstring.

        Args:
            shape: Dimensions, each ≥ 0; a zero gives an empty tensor.
            standard_deviation: σC, the deviation itself, not a multiplier: 0 or
                in [1e-30, 1e30], where float32 neither vanishes nor overflows.

        Returns:
            float32 on the CPU, of ``shape``. Zeros, taking nothing from the
            stream, for deviation 0. No value exceeds 17.2 deviations; the mass
            cut off is below 1e-16 per draw.

        Raises:
            ValueError: A dimension or the deviation is outside its range.
            RuntimeError: The process is not the one that made the stream.

        Example:
            >>> public_stream("docs").gaussian((2, 3), 1.0).shape
            torch.Size([2, 3])
        """
        size = tuple(checks.at_least("shape", dimension, 0) for dimension in shape)
        self._check_process()
        if checks.non_negative("standard_deviation", standard_deviation) == 0:
            return torch.zeros(size)
        checks.in_range("standard_deviation", standard_deviation, *_STANDARD_DEVIATIONS)
        out = torch.empty(math.prod(size), dtype=torch.float32)
        for start in range(0, len(out), _CHUNK):
            chunk = out[start : start + _CHUNK]
            total = self._normals(len(chunk))
            for _ in range(_DRAWS - 1):
                total += self._normals(len(chunk))
            chunk.copy_(total.mul_(standard_deviation / math.sqrt(_DRAWS)))
        return out.view(size)

    def poisson_sample(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Return the drawn indices out of ``range(count)``, each with probability ``rate``.

        Args:
            count: Number of units, ≥ 0.
            rate: q, in [0, 1]. A unit is drawn if its 53-bit uniform in [0, 1)
                is below q: at 0 none is, at 1 all are, and the probability is
                q rounded up to a multiple of 2⁻⁵³.

        Returns:
            int64, sorted, without repetition; often empty for small q·count,
            which is a valid draw and must not be drawn again.

        Raises:
            ValueError: ``count`` or ``rate`` is outside its range.
            RuntimeError: The process is not the one that made the stream.

        Example:
            >>> public_stream("docs").poisson_sample(3, 1.0).tolist()
            [0, 1, 2]
        """
        checks.at_least("count", count, 0)
        checks.in_range("rate", rate, 0.0, 1.0)
        self._check_process()
        drawn = [np.empty(0, dtype=np.int64)]
        for start in range(0, count, _CHUNK):
            uniform = self._integers(min(_CHUNK, count - start)) * 2.0**-53
            drawn.append(np.flatnonzero(uniform < rate).astype(np.int64) + start)
        return np.concatenate(drawn)

    def torch_generator(self) -> Generator:
        """Return a torch CPU generator seeded with 32 bits of this *public* stream.

        For public draws that need torch's distributions, such as the initial A.

        Raises:
            RuntimeError: The stream is secret (a generator would keep 32 bits
                of its key), or the process is not the one that made it.
        """
        if self._secret:
            raise RuntimeError(
                "a torch generator keeps 32 bits of its seed and is not secret; "
                "draw noise with gaussian() and samples with poisson_sample()"
            )
        generator = Generator()
        generator.manual_seed(int(self._integers(1)[0]) & 0xFFFFFFFF)
        return generator

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse copy, deepcopy and pickle."""
        raise TypeError(
            "a Stream cannot be copied or pickled, the copy would repeat its numbers; "
            "make a new one where it is needed"
        )

    def _check_process(self) -> None:
        """Raise if this is a fork of the process that made the stream."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"stream of process {self._process} used in process {os.getpid()}; both would "
                "draw the same numbers, make a new stream after the fork"
            )

    def _encryptor(self) -> CipherContext:
        """Return the cipher of the current segment: block counter 0, nonce = segment."""
        nonce = bytes(4) + self._segment.to_bytes(12, "little")
        return Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()

    def _integers(self, count: int) -> npt.NDArray[np.uint64]:
        """Return ``count`` ≤ 2¹⁵ independent uniform 53-bit integers."""
        self._check_process()
        size = 8 * count
        with self._lock:
            if size > self._left:
                self._segment += 1
                self._left = _SEGMENT_BYTES
                self._cipher = self._encryptor()
            self._left -= size
            words = self._cipher.update(_ZEROS[:size])
        return (np.frombuffer(words, dtype="<u8") >> np.uint64(11)).astype(np.uint64, copy=False)

    def _normals(self, count: int) -> Tensor:
        """Return ``count`` ≤ 2¹⁵ standard normals, float64, by Box-Muller."""
        half = (count + 1) // 2
        uniform = torch.from_numpy(self._integers(2 * half).astype(np.float64))
        # The radius from (0, 1], so that its logarithm is finite; the angle from [0, 1).
        radius = uniform[:half].add_(1).mul_(2.0**-53).log_().mul_(-2).sqrt_()
        angle = uniform[half:].mul_(2 * math.pi * 2.0**-53)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def secret_stream() -> Stream:
    """Return a stream under a fresh key from the operating system's entropy.

    The only kind that may be used where privacy is on; there is no seed.

    Example:
        >>> secret_stream().secret
        True
    """
    return Stream(os.urandom(32), secret=True)


def task_streams(secret: bool, *labels: str | int) -> tuple[Stream, Stream]:
    """Return two new streams of one task alone: for its sampling and for its noise.

    Args:
        secret: Whether they come from the operating system's entropy, as wherever privacy
            is on; ``labels`` then do not matter.
        labels: What makes the task's public streams its own: the seed, the client, the round.

    Example:
        >>> sampling, noise = task_streams(True, "seed", 0)
        >>> sampling.secret, noise.secret, sampling is noise
        (True, True, False)
    """
    if secret:
        return secret_stream(), secret_stream()
    return public_stream("sampling", *labels), public_stream("noise", *labels)


def public_stream(*labels: str | int) -> Stream:
    """Return the stream that everyone who knows ``labels`` can reproduce.

    For public draws and for the twins of ``privacy.mode=dry`` only. The key is
    SHA-256 over each label's type, length and value, so ``("ab", "c")``,
    ``("a", "bc")``, ``("1",)`` and ``(1,)`` give four streams.

    Args:
        labels: At least one: what the stream is for, the seed, the round, the
            client. Different purposes need different labels.

    Raises:
        ValueError: No label, or one that is neither a string nor an integer.

    Example:
        >>> public_stream("batches", 7).secret
        False
    """
    if not labels:
        raise ValueError("labels is empty; name the purpose of the public stream")
    digest = hashlib.sha256(b"fedlr public stream 1")
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"label = {label!r} must be a string or an integer")
        value = str(label).encode("utf-8")
        kind = b"s" if isinstance(label, str) else b"i"
        digest.update(kind + len(value).to_bytes(8, "little") + value)
    return Stream(digest.digest(), secret=False)
