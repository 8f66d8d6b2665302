"""Parts ↔ named NumPy arrays: the wire form, with a schema version.

An array travels as little-endian float32 under the name ``<site>/<role>``. The
schema name goes into the message beside the arrays; a reader refuses any other.
A message has two records, whose names both ends take from here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedlr.errors import BadUpdate
from fedlr.methods.method import PartKey, Parts, Role

SCHEMA = "fedlr.parts.v1"
"""Name and version of the wire form; any change of meaning takes a new one."""

ARRAYS_RECORD = "arrays"
"""Name of the record that holds the arrays of a message."""

HEADER_RECORD = "header"
"""Name of the record that holds its flat values: schema, round, nonce and the like."""


def encode(parts: Parts) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of ``parts`` by wire name, in sorted order.

    Guarantees:
        ``decode(encode(parts))`` equals ``parts`` bit for bit when those are
        float32; the input is not aliased.

    Example:
        >>> encode({PartKey("layer.0.query", Role.B): torch.zeros(2, 1)})["layer.0.query/b"].shape
        (2, 1)
    """
    return {
        f"{key.site}/{key.role.value}": np.array(
            value.detach().cpu().numpy(), dtype="<f4", order="C", copy=True
        )
        for key, value in sorted(parts.items())
    }


def decode(
    arrays: Mapping[str, NDArray[np.float32]], schema: str = SCHEMA
) -> dict[PartKey, torch.Tensor]:
    """Return the parts in ``arrays``.

    Args:
        arrays: Wire name → array.
        schema: The schema named by the sender.

    Raises:
        BadUpdate: Another schema (``schema``), a name that is not
            ``<site>/<role>`` (``names``), or a dtype other than float32
            (``dtype``).
    """
    if schema != SCHEMA:
        raise BadUpdate("schema", f"schema = {schema!r}, this program reads {SCHEMA!r}")
    parts: dict[PartKey, torch.Tensor] = {}
    roles = {role.value: role for role in Role}
    for name, array in arrays.items():
        site, _, role = name.rpartition("/")
        if not site or role not in roles:
            raise BadUpdate("names", f"array name {name!r} is not <site>/<role>")
        if array.dtype != np.float32:
            raise BadUpdate("dtype", f"{name} has dtype {array.dtype}, expected float32")
        parts[PartKey(site, roles[role])] = torch.from_numpy(np.array(array, copy=True))
    return parts


def size_in_bytes(parts: Parts) -> int:
    """Return the payload of ``parts`` on the wire: 4 bytes an element, names not counted."""
    return 4 * sum(value.numel() for value in parts.values())
