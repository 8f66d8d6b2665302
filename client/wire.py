"""Records between a ClientApp and an agent: a header, then the bytes of its arrays.

Both ends read what a stranger may have sent: sizes are checked against a limit from the header
alone, before anything of that size is allocated, and nothing is unpickled. NumPy and the
generated messages are all that is loaded: a ClientApp is a fresh process for every message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.agent_pb2 import ArraySpec, Header, Piece, Value

Field = str | int | float
Fields = dict[str, Field]
Arrays = dict[str, NDArray[np.float32]]

PIECE_BYTES = 1 << 20
"""Most bytes of data in one piece."""

MESSAGE_BYTES = 2 << 20
"""Most bytes of one gRPC message: a header with its order, or a piece."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
)
"""Of both ends' gRPC channels."""

MOST_ARRAYS = 4_096
MOST_FIELDS = 64
LONGEST_NAME = 256
LONGEST_TEXT = 4_096
MOST_AXES = 4
LONGEST_AXIS = 1 << 31

_LAYOUT = np.dtype("<f4")
_WIDEST = 1 << 63


class WireError(ValueError):
    """What came is no record, or too large a one."""


@dataclass(frozen=True)
class Record:
    """What crosses in one direction.

    Attributes:
        fields: Flat header values by name.
        arrays: float32 arrays by name.
        order: The signed order; empty in an answer.
    """

    fields: Fields
    arrays: Arrays
    order: str = ""


def pieces(record: Record) -> Iterator[Piece]:
    """Yield ``record`` as pieces: the header, then data of at most `PIECE_BYTES` each.

    Raises:
        WireError: An array is not float32, or a field no text, whole number or number.
    """
    header = Header(order=record.order, arrays=[_spec(*item) for item in record.arrays.items()])
    for name, value in record.fields.items():
        header.fields[name].CopyFrom(_value(name, value))
    yield Piece(header=header)
    for array in record.arrays.values():
        data = np.ascontiguousarray(array, dtype=_LAYOUT).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), PIECE_BYTES):
            yield Piece(data=bytes(data[start : start + PIECE_BYTES]))


@dataclass(frozen=True)
class Opening:
    """The header of a record whose arrays are still to come.

    Attributes:
        fields: Flat header values by name.
        order: The signed order.
        shapes: Shapes by name, in the order of their bytes.
    """

    fields: Fields
    order: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return _LAYOUT.itemsize * sum(math.prod(shape) for shape in self.shapes.values())


def opening(stream: Iterator[Piece], limit: int) -> Opening:
    """Return the header of the record that ``stream`` brings.

    Args:
        stream: Pieces, of which one is read.
        limit: Most bytes of all arrays together.

    Raises:
        WireError: There is no header, or it announces more than the limits.
    """
    first = next(stream, None)
    if first is None or first.WhichOneof("content") != "header":
        raise WireError("the first piece is no header")
    header = first.header
    if len(header.arrays) > MOST_ARRAYS:
        raise WireError(f"{len(header.arrays)} arrays, at most {MOST_ARRAYS}")
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in header.arrays:
        if spec.name in shapes or not 0 < len(spec.name) <= LONGEST_NAME:
            raise WireError(f"an array's name is empty, repeated or has > {LONGEST_NAME} letters")
        if len(spec.shape) > MOST_AXES or max(spec.shape, default=0) > LONGEST_AXIS:
            raise WireError(f"an array has > {MOST_AXES} axes, or one of > {LONGEST_AXIS}")
        shapes[spec.name] = tuple(spec.shape)
    found = Opening(fields_of(header.fields), header.order, shapes)
    if found.size > limit:
        raise WireError(f"{found.size} bytes of arrays, at most {limit}")
    return found


def arrays_of(announced: Opening, stream: Iterator[Piece]) -> Arrays:
    """Return the arrays that follow a header.

    Args:
        announced: The header; its size was checked.
        stream: The rest of the pieces.

    Raises:
        WireError: More or fewer bytes than were announced, or no data.
    """
    size, at = announced.size, 0
    data = bytearray(size)
    for piece in stream:
        if piece.WhichOneof("content") != "data":
            raise WireError("a piece behind the header is no data")
        count = len(piece.data)
        if not 0 < count <= PIECE_BYTES or at + count > size:
            raise WireError(f"a piece of {count} bytes behind {at} of {size}")
        data[at : at + count] = piece.data
        at += count
    if at != size:
        raise WireError(f"{at} bytes came, {size} were announced")
    found, start = Arrays(), 0
    for name, shape in announced.shapes.items():
        count = math.prod(shape)
        flat = np.frombuffer(data, dtype=_LAYOUT, count=count, offset=start)
        found[name] = flat.reshape(shape)
        start += count * _LAYOUT.itemsize
    return found


def fields_of(values: Mapping[str, Value]) -> Fields:
    """Return header values; WireError where there are too many, or one is empty or too long."""
    if len(values) > MOST_FIELDS:
        raise WireError(f"{len(values)} fields, at most {MOST_FIELDS}")
    found = Fields()
    for name, value in values.items():
        kind = value.WhichOneof("kind")
        if kind is None or len(name) > LONGEST_NAME or len(value.text) > LONGEST_TEXT:
            raise WireError("a field is empty, or its name or text is too long")
        found[name] = getattr(value, kind)
    return found


def values_of(fields: Mapping[str, object]) -> dict[str, Value]:
    """Return header values as messages; WireError for one that is no text and no number."""
    return {name: _value(name, value) for name, value in fields.items()}


def _value(name: str, value: object) -> Value:
    if isinstance(value, str):
        return Value(text=value)
    if isinstance(value, int) and not isinstance(value, bool) and -_WIDEST <= value < _WIDEST:
        return Value(whole=value)
    if isinstance(value, float):
        return Value(real=value)
    raise WireError(f"the field {name} = {value!r} is no text, whole number or number")


def _spec(name: str, array: NDArray[np.float32]) -> ArraySpec:
    if array.dtype != _LAYOUT:
        raise WireError(f"{name} has dtype {array.dtype}, expected float32")
    return ArraySpec(name=name, shape=array.shape)
