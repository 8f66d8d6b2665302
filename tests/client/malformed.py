"""Messages that are nearly right: streams and orders that were damaged in every way we know."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Pieces = list[bytes]
Mutation = Callable[[random.Random, Pieces], Pieces]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
_HUGE = b"\xff\xff\xff\xff\x0f"


def varint(number: int) -> bytes:
    """A whole number as protobuf writes it."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def delimited(field: int, content: bytes) -> bytes:
    """A field of protobuf that holds bytes."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def inner(piece: bytes) -> bytes:
    """What the one field of a piece holds: behind tag and length, which ends below 0x80."""
    end = next(at for at in range(1, len(piece)) if piece[at] < 0x80)
    return piece[end + 1 :]


def flipped(draws: random.Random, data: bytes) -> bytes:
    """Change one to eight bits."""
    found = bytearray(data)
    for _ in range(draws.randint(1, 8)):
        found[draws.randrange(len(found))] ^= 1 << draws.randrange(8)
    return bytes(found)


def cut(draws: random.Random, data: bytes) -> bytes:
    return data[: draws.randrange(len(data))]


def grown(draws: random.Random, data: bytes) -> bytes:
    at = draws.randrange(len(data))
    return data[:at] + draws.randbytes(draws.randint(1, 40)) + data[at:]


def claiming(draws: random.Random, data: bytes) -> bytes:
    """Put a length of four gigabytes somewhere."""
    at = draws.randrange(len(data))
    return data[:at] + _HUGE + data[at + len(_HUGE) :]


def unknown(draws: random.Random, data: bytes) -> bytes:
    return data + delimited(draws.randint(3, 15), draws.randbytes(20))


BYTES = (flipped, cut, grown, claiming, unknown)


def damaged(draws: random.Random, pieces: Pieces) -> Pieces:
    """Damage the bytes of one piece, the header as often as all others."""
    at = draws.choice((0, draws.randrange(len(pieces))))
    return [*pieces[:at], draws.choice(BYTES)(draws, pieces[at]), *pieces[at + 1 :]]


def shuffled(draws: random.Random, pieces: Pieces) -> Pieces:
    return draws.sample(pieces, len(pieces))


def repeated(draws: random.Random, pieces: Pieces) -> Pieces:
    at = draws.randrange(len(pieces))
    return [*pieces[:at], *[pieces[at]] * draws.randint(2, 5), *pieces[at + 1 :]]


def ended(draws: random.Random, pieces: Pieces) -> Pieces:
    """End, half closed, before the last piece."""
    return pieces[: draws.randrange(len(pieces))]


def endless(draws: random.Random, pieces: Pieces) -> Pieces:
    return [*pieces, *[b"\x12\x04\0\0\0\0"] * draws.randint(1, 50)]


def crowded(draws: random.Random, pieces: Pieces) -> Pieces:
    """Announce very many arrays, or fields, in a header of up to two megabytes."""
    field, entry = draws.choice(
        ((3, delimited(1, b"a/b")), (3, b""), (2, delimited(1, draws.randbytes(3).hex().encode())))
    )
    one = delimited(field, entry)
    return [delimited(1, one * draws.randint(5_000, 2_000_000 // len(one))), *pieces[1:]]


def shaped(draws: random.Random, pieces: Pieces) -> Pieces:
    """Announce an array of any shape, up to more than any memory holds."""
    axes = b"".join(varint(1 << draws.randrange(64)) for _ in range(draws.randint(1, 8)))
    spec = delimited(1, b"x/b") + delimited(2, axes)
    return [delimited(1, inner(pieces[0]) + delimited(3, spec)), *pieces[1:]]


def oversized(draws: random.Random, pieces: Pieces) -> Pieces:
    """More in one message than gRPC takes."""
    return [pieces[0], delimited(2, bytes(draws.randint(1 << 20, 4 << 20)))]


STREAMS: tuple[Mutation, ...] = (
    *(damaged, damaged, damaged, shuffled, repeated, ended, endless, crowded, shaped),
    *(damaged, oversized),
)


def order(draws: random.Random, text: str) -> str:
    """A signed order that says something else, or says it otherwise."""
    kind = draws.randrange(4)
    if kind == 0:
        return draws.choice((flipped, cut, grown))(draws, text.encode()).decode(errors="replace")
    content: dict[str, Any] = json.loads(text)
    if kind == 1:
        name = draws.choice(("run", "config", "issued", "expires"))
        old = content["order"][name]
        content["order"][name] = old + draws.randint(1, 9) if isinstance(old, int) else old + "0"
    elif kind == 2:
        name = draws.choice(("coordinator", "signature"))
        content[name] = draws.randbytes(len(content[name]) // 2).hex()
    else:
        del content[draws.choice(list(content))]
    return json.dumps(content)


def greeting(draws: random.Random) -> bytes:
    """What a raw connection begins with: noise, a preface, and frames of HTTP/2 without sense."""
    start = draws.choice((b"", PREFACE, PREFACE + EMPTY_SETTINGS, b"GET / HTTP/1.1\r\n\r\n"))
    frames = b""
    for _ in range(draws.randint(0, 6)):
        size = draws.choice((0, 4, 8, 30, 16_384))
        length = draws.choice((size, size, draws.randrange(1 << 24)))
        head = length.to_bytes(3, "big") + bytes([draws.randrange(12), draws.randrange(256)])
        frames += head + draws.randbytes(4) + draws.randbytes(size)
    return start + draws.choice((frames, draws.randbytes(draws.randint(1, 5_000))))
