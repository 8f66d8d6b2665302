"""NumPy's file form, as Flower's arrays have it, read from whoever sent it.

NumPy itself allocates what a header announces before it looks whether that came. Only NumPy is
loaded: a ClientApp is a fresh process for every message.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read(data: bytes) -> NDArray[Any]:
    """Return the array in ``data``, read-only and without a copy.

    Raises:
        ValueError: It is no array, one of objects, or its header announces another size than
            what follows; nothing of that size was allocated.

    Example:
        >>> file = io.BytesIO()
        >>> np.save(file, np.ones((2, 3), np.float32))
        >>> read(file.getvalue()).shape
        (2, 3)
    """
    file = io.BytesIO(data)
    reader = _READERS.get(npy.read_magic(file))
    if reader is None:
        raise ValueError("the array is of a version of NumPy's form that nobody writes")
    shape, by_column, dtype = reader(file)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"the array's dtype {dtype} holds no numbers")
    content = memoryview(data)[file.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(
            f"an array of shape {shape} and dtype {dtype} has not {len(content)} bytes"
        )
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")
