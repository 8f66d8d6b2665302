"""A job that brings rotations is the job with its A's, once it is completed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedlr.errors import BadUpdate
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.downlink import Compact
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.method import PartKey, Role
from fedlr.training.downlink import Basis, completed, shortened
from fedlr.training.jobs import (
    Job,
    Provenance,
    SiteStatus,
    decode_job,
    decode_status,
    digest_of,
    encode_job,
    encode_status,
    job_digest,
)
from tests.methods.federation import LAYOUT, clients, generator, run_round

METHOD = FedSVD(orthonormal, downlink="rotation")
SITE = LAYOUT.sites[0]


def both(rank: int | None = None) -> tuple[Job, Compact]:
    """The job of round 2 with its A's, and what stands for them."""
    state = METHOD.init(LAYOUT, generator())
    for turn in range(2):
        state, _ = run_round(METHOD, state, clients(3, seed=10 * turn), [1, 2, 3])
    phase, parts = METHOD.plan(state).phases[0], METHOD.broadcast(state, rank)
    provenance = Provenance("base", "tokenizer", "labels")
    compact = METHOD.compact(state, rank)
    assert compact is not None
    return Job("run", 2, 0, "n", phase.train, phase.send, parts, provenance), compact


def held(compact: Compact, run: str = "run") -> Basis:
    return Basis(run, digest_of(compact.basis), compact.basis)


def arrived(job: Job) -> Job:
    return decode_job(*encode_job(job))


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("sent", [True, False])
def test_a_completed_job_is_the_whole_one(rank: int | None, sent: bool) -> None:
    job, compact = both(rank)
    short = arrived(shortened(job, compact, basis=sent))
    found = completed(short, None if sent else held(compact))
    assert found is not None
    whole, basis = found
    assert whole.rotated is None
    assert list(whole.parts) == list(arrived(job).parts)
    assert all(torch.equal(whole.parts[key], value) for key, value in job.parts.items())
    assert job_digest(whole) == job_digest(arrived(job)) == job_digest(job)
    assert job_digest(short) != job_digest(job)
    assert basis.digest == digest_of(compact.basis)


def test_sites_of_one_process_hold_one_basis() -> None:
    job, compact = both()
    short = shortened(job, compact, basis=True)
    first, second = completed(arrived(short), None), completed(arrived(short), None)
    assert first is not None
    assert second is not None
    assert first[1] is second[1]
    other = completed(arrived(replace(short, run="other")), None)
    assert other is not None
    assert other[1] is not first[1]


def spoiled(job: Job, role: Role) -> Job:
    key = PartKey(SITE.name, role)
    value = job.parts[key].clone()
    value[0, 0] = torch.nextafter(value[0, 0], torch.tensor(9.0))
    return replace(job, parts={**job.parts, key: value})


def test_another_basis_or_another_result_is_no_basis() -> None:
    job, compact = both()
    short = shortened(job, compact, basis=False)
    assert completed(short, None) is None
    assert completed(short, held(compact, run="other")) is None
    assert completed(short, replace(held(compact), digest="0" * 64)) is None
    assert completed(spoiled(short, Role.ROTATION), held(compact)) is None
    assert completed(spoiled(shortened(job, compact, basis=True), Role.A), None) is None
    wrong = spoiled(replace(job, parts=compact.basis), Role.A).parts
    assert completed(short, replace(held(compact), parts=wrong)) is None


def without_rotation(job: Job) -> Job:
    parts = {k: v for k, v in job.parts.items() if k != PartKey(SITE.name, Role.ROTATION)}
    return replace(job, parts=parts)


def wide(job: Job) -> Job:
    key = PartKey(SITE.name, Role.ROTATION)
    return replace(job, parts={**job.parts, key: torch.eye(SITE.rank + 1)})


def flat(job: Job) -> Job:
    key = PartKey(SITE.name, Role.ROTATION)
    return replace(job, parts={**job.parts, key: torch.ones(SITE.rank)})


@pytest.mark.parametrize("spoil", [without_rotation, wide, flat])
def test_rotations_that_do_not_fit_the_basis_are_refused(spoil: Callable[[Job], Job]) -> None:
    job, compact = both()
    with pytest.raises(ValueError, match=r"rotation|base"):
        completed(spoil(shortened(job, compact, basis=False)), held(compact))
    with pytest.raises(ValueError, match="has all its parts"):
        completed(job, None)


def test_a_digest_is_of_names_shapes_and_values_in_any_order() -> None:
    _, compact = both()
    parts = compact.basis
    assert digest_of(dict(reversed(parts.items()))) == digest_of(parts)
    key = PartKey(SITE.name, Role.A)
    for other in (parts[key].reshape(-1), parts[key] + 1):
        assert digest_of({**parts, key: other}) != digest_of(parts)


def test_half_a_header_is_no_job() -> None:
    job, compact = both()
    arrays, header = encode_job(shortened(job, compact, basis=False))
    del header["rotated_result"]
    with pytest.raises(BadUpdate, match="rotated_result"):
        decode_job(arrays, header)


@pytest.mark.parametrize("rank", [None, 1, 64])
def test_a_status_tells_its_rank(rank: int | None) -> None:
    status = SiteStatus("client-00", 10, 1.0, 1e-5, Provenance("b", "t", "l"), rank)
    assert decode_status(encode_status(status)) == status
    with pytest.raises(BadUpdate, match="rank = 0 must be"):
        decode_status({**encode_status(status), "rank": 0})


def test_a_rotation_that_makes_more_than_was_sent_is_refused() -> None:
    """k + n numbers would become k·n: a few megabytes all the memory of a site."""
    job, compact = both()
    short = arrived(shortened(job, compact, basis=False))
    one = {key: value[:1] for key, value in compact.basis.items()}
    basis = Basis("run", digest_of(one), one)
    tall = {
        key: torch.ones(5, 1) if key.role is Role.ROTATION else value
        for key, value in short.parts.items()
    }
    assert short.rotated is not None
    asked = replace(short, parts=tall, rotated=replace(short.rotated, basis=basis.digest))
    with pytest.raises(ValueError, match="k ≤ r"):
        completed(asked, basis)
