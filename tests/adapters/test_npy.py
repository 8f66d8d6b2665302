"""Arrays of strangers are read as NumPy would, and only where what is announced has come."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from numpy.lib import format as npy_form
from numpy.typing import NDArray

from fedlr.adapters import npy


def written(array: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def announcing(shape: tuple[int, ...], dtype: str = "<f4", content: bytes = b"") -> bytes:
    file = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": dtype}
    npy_form.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    return file.getvalue() + content


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.zeros((0, 4), np.float32),
    np.float32(1.5).reshape(()),
    np.arange(3, dtype=np.float64),
    np.array([np.nan, np.inf], ">f4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_an_array_comes_back_as_it_was(array: NDArray[np.float32]) -> None:
    found = npy.read(written(array))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array, equal_nan=True)


WRONG = {
    "nothing": b"",
    "noise": b"not an array",
    "an archive": b"PK\x03\x04" + bytes(40),
    "a version of the future": b"\x93NUMPY\x09\x00" + bytes(40),
    "a header without an end": announcing((2,))[:40],
    "too few bytes": announcing((3,), content=bytes(8)),
    "too many bytes": announcing((3,), content=bytes(16)),
    "more than any memory": announcing((1 << 40, 1 << 20)),
    "a negative axis": announcing((-1, -2), content=bytes(8)),
    "objects": announcing((1,), "|O", bytes(8)),
    "nothing in each": announcing((1 << 40,), "|V0"),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_what_is_no_whole_array_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        npy.read(data)


def test_nothing_is_allocated_for_what_did_not_come() -> None:
    data = announcing((1 << 28,))  # a gigabyte, which a machine would give
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"shape \(268435456,\) and dtype float32 has not 0"):
            npy.read(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
