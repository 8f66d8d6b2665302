"""Records ↔ frozen values: exact round trips, and nothing else is read or written."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlr.errors import BadUpdate
from fedlr.methods.method import ClientUpdate, PartKey, Parts, Role
from fedlr.training import jobs
from fedlr.training.jobs import ABSTENTION_CODES, Abstention, Job, Provenance, SiteStatus

PROVENANCE = Provenance("base", "tokenizer", "labels")
PARTS: Parts = {
    PartKey("layer.0.query", Role.B): torch.tensor([[1.5, -0.0]]),
    PartKey("layer.0.query", Role.A): torch.tensor([[math.pi]]),
}
JOB = Job(
    run="run",
    round=3,
    phase=1,
    nonce="nonce",
    train=frozenset({Role.B, Role.HEAD}),
    send=frozenset({Role.B}),
    parts=PARTS,
    provenance=PROVENANCE,
)
UPDATE = ClientUpdate("client", PARTS, steps=4, epsilon=0.25)
STATUS = SiteStatus("client", 10, 1.25, 1e-5, PROVENANCE)

texts = st.text(max_size=8)
roles = st.frozensets(st.sampled_from(list(Role)))


def same_parts(left: Parts, right: Parts) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@given(texts, st.integers(0, 2**62), st.integers(0, 9), texts, roles, roles)
def test_jobs_round_trip(
    run: str, number: int, phase: int, nonce: str, train: frozenset[Role], send: frozenset[Role]
) -> None:
    job = Job(run, number, phase, nonce, train, send, PARTS, PROVENANCE)
    arrays, header = jobs.encode_job(job)
    found = jobs.decode_job(arrays, header)
    assert same_parts(found.parts, PARTS)
    assert replace(found, parts={}) == replace(job, parts={})
    assert set(header) == {
        *("run", "round", "phase", "nonce", "train", "send"),
        *("base", "tokenizer", "labels", "codec"),
    }


@pytest.mark.parametrize("epsilon", [None, 0.0, 0.1, math.inf])
def test_updates_round_trip_and_carry_nothing_else(epsilon: float | None) -> None:
    arrays, header = jobs.encode_outcome(replace(UPDATE, epsilon=epsilon))
    found = jobs.decode_outcome(arrays, header)
    assert isinstance(found, ClientUpdate)
    assert same_parts(found.parts, PARTS)
    assert (found.client, found.steps, found.epsilon) == ("client", 4, epsilon)
    optional = set() if epsilon is None else {"epsilon"}
    assert set(header) == {"client", "steps", "codec"} | optional
    assert set(arrays) == {"layer.0.query/a", "layer.0.query/b"}


@pytest.mark.parametrize("code", ABSTENTION_CODES)
def test_abstentions_round_trip(code: str) -> None:
    arrays, header = jobs.encode_outcome(Abstention("client", code))
    assert arrays == {}
    assert header == {"client": "client", "code": code}
    assert jobs.decode_outcome(arrays, header) == Abstention("client", code)


def test_codes_are_a_fixed_list() -> None:
    assert len(ABSTENTION_CODES) == len(set(ABSTENTION_CODES)) == 17
    with pytest.raises(ValueError, match="code"):
        Abstention("client", "row 17 has no label")


@given(texts, st.integers(0, 2**62), st.floats(0, 1e9), st.floats(0, 1))
def test_statuses_round_trip(client: str, size: int, sigma: float, delta: float) -> None:
    status = SiteStatus(client, size, sigma, delta, PROVENANCE)
    assert jobs.decode_status(jobs.encode_status(status)) == status


NUMBERS = ["three", None, math.nan, math.inf, [1]]

BAD_JOB: list[dict[str, Any]] = [
    *({"round": value} for value in [*NUMBERS, -1]),
    *({"phase": value} for value in [*NUMBERS, -1]),
    *({role: value} for role in ("train", "send") for value in ("everything", "b,x", None, 3)),
    {"codec": "fedlr.parts.v0"},
]


@pytest.mark.parametrize("change", BAD_JOB, ids=str)
def test_a_job_with_a_bad_field_is_refused(change: dict[str, Any]) -> None:
    arrays, header = jobs.encode_job(JOB)
    with pytest.raises(BadUpdate):
        jobs.decode_job(arrays, {**header, **change})


@pytest.mark.parametrize("name", sorted(jobs.encode_job(JOB)[1]))
def test_a_job_without_a_field_is_refused(name: str) -> None:
    arrays, header = jobs.encode_job(JOB)
    del header[name]
    with pytest.raises(BadUpdate) as caught:
        jobs.decode_job(arrays, header)
    assert caught.value.code == "names"


BAD_OUTCOME: list[dict[str, Any]] = [
    *({"steps": value} for value in [*NUMBERS, -1]),
    *({"epsilon": value} for value in ("much", [1])),
    {"codec": "other"},
    {"code": "because"},
    {"code": ["failed"]},
]


@pytest.mark.parametrize("change", BAD_OUTCOME, ids=str)
def test_an_outcome_with_a_bad_field_is_refused(change: dict[str, Any]) -> None:
    arrays, header = jobs.encode_outcome(UPDATE)
    with pytest.raises(BadUpdate):
        jobs.decode_outcome(arrays, {**header, **change})


@pytest.mark.parametrize("name", ["client", "steps", "codec"])
def test_an_outcome_without_a_field_is_refused(name: str) -> None:
    arrays, header = jobs.encode_outcome(UPDATE)
    del header[name]
    with pytest.raises(BadUpdate):
        jobs.decode_outcome(arrays, header)


@pytest.mark.parametrize(
    ("name", "array"), [("b", np.zeros(1, np.float32)), ("x/b", np.zeros(1, np.float64))]
)
def test_bad_arrays_are_refused(name: str, array: Any) -> None:
    with pytest.raises(BadUpdate):
        jobs.decode_outcome({name: array}, jobs.encode_outcome(UPDATE)[1])
    with pytest.raises(BadUpdate):
        jobs.decode_job({name: array}, jobs.encode_job(JOB)[1])


BAD_STATUS: list[dict[str, Any]] = [
    *({"declared_size": value} for value in [*NUMBERS, -1]),
    *({"noise_multiplier": value} for value in [*NUMBERS, -0.1]),
    *({"delta": value} for value in [*NUMBERS, 1.5]),
]


@pytest.mark.parametrize("change", BAD_STATUS, ids=str)
def test_a_status_with_a_bad_field_is_refused(change: dict[str, Any]) -> None:
    header = jobs.encode_status(STATUS)
    with pytest.raises(BadUpdate):
        jobs.decode_status({**header, **change})


@pytest.mark.parametrize("name", sorted(jobs.encode_status(STATUS)))
def test_a_status_without_a_field_is_refused(name: str) -> None:
    header = jobs.encode_status(STATUS)
    del header[name]
    with pytest.raises(BadUpdate):
        jobs.decode_status(header)


def test_a_job_of_a_negative_round_cannot_be_made() -> None:
    for change in ({"round": -1}, {"phase": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(JOB, **change)  # type: ignore[arg-type]
