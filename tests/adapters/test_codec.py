"""The wire form: bit for bit there and back, and nothing else is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedlr.adapters.codec import SCHEMA, decode, encode, size_in_bytes
from fedlr.errors import BadUpdate
from fedlr.methods.method import PartKey, Role

sites = st.text(min_size=1, max_size=12)
keys = st.builds(PartKey, sites, st.sampled_from(list(Role)))
float32 = arrays_of.arrays(
    np.dtype("<u4"), arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
).map(lambda bits: bits.view("<f4") if bits.ndim else bits.reshape(1).view("<f4").reshape(()))


@given(st.dictionaries(keys, float32, max_size=5))
def test_every_bit_pattern_comes_back(values: dict[PartKey, Any]) -> None:
    """NaN payloads, signed zeros and subnormals too."""
    parts = {key: torch.from_numpy(value.copy()) for key, value in values.items()}
    wire = encode(parts)
    assert list(wire) == [f"{key.site}/{key.role.value}" for key in sorted(parts)]
    found = decode(wire)
    assert found.keys() == parts.keys()
    for key, value in values.items():
        assert found[key].dtype == torch.float32
        assert found[key].numpy().shape == value.shape
        assert found[key].numpy().tobytes() == value.tobytes()
    assert size_in_bytes(parts) == sum(array.nbytes for array in wire.values())


def test_the_wire_does_not_alias_the_parts() -> None:
    key = PartKey("a", Role.B)
    source = torch.ones(2, requires_grad=True)
    wire = encode({key: source})
    wire["a/b"][:] = 5
    assert source.tolist() == [1, 1]
    found = decode(wire)
    wire["a/b"][:] = 6
    assert found[key].tolist() == [5, 5]


def test_strided_and_double_arrays_travel_as_dense_float32() -> None:
    key = PartKey("a", Role.B)
    value = torch.arange(6, dtype=torch.float64).reshape(2, 3).T
    array = encode({key: value})["a/b"]
    assert array.dtype == np.dtype("<f4")
    assert array.flags.c_contiguous
    assert array.tolist() == value.tolist()


@given(st.text(max_size=12))
def test_other_schemas_are_refused(schema: str) -> None:
    if schema == SCHEMA:
        assert decode({}, schema) == {}
        return
    with pytest.raises(BadUpdate) as caught:
        decode({}, schema)
    assert caught.value.code == "schema"


@given(st.text(max_size=8), st.text(max_size=4))
def test_other_names_are_refused(site: str, role: str) -> None:
    name = f"{site}/{role}"
    fits = name.rpartition("/")[0] and name.rpartition("/")[2] in {r.value for r in Role}
    wire: dict[str, Any] = {name: np.zeros(1, np.float32)}
    if fits:
        assert len(decode(wire)) == 1
        return
    with pytest.raises(BadUpdate) as caught:
        decode(wire)
    assert caught.value.code == "names"


@pytest.mark.parametrize("name", ["", "b", "/b", "layer/", "layer/B", "layer/b/"])
def test_names_that_look_nearly_right_are_refused(name: str) -> None:
    with pytest.raises(BadUpdate):
        decode({name: np.zeros(1, np.float32)})


@pytest.mark.parametrize("dtype", ["<f8", "<f2", "<i4", ">f4", "bool", "object", "<c8"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    wire: dict[str, Any] = {"a/b": np.zeros(1, np.dtype(dtype))}
    with pytest.raises(BadUpdate) as caught:
        decode(wire)
    assert caught.value.code == "dtype"
