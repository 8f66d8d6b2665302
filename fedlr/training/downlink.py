"""Jobs that bring rotations in the place of A, and how a site completes them.

A rotation Q and a basis A₀ give A = Q·A₀ bit for bit (`fedlr.lowrank.rotation`). The job
that travels has Q and not A; A₀ goes with it where the site is not known to hold it. The
site books and trains the *completed* job, which is the one that would have been sent with
A itself: the same digest, so that either is a retry of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from fedlr.lowrank.rotation import rotate
from fedlr.methods.downlink import Compact
from fedlr.methods.method import Parts, Role
from fedlr.training.jobs import Job, Rotated, digest_of


@dataclass(frozen=True)
class Basis:
    """An A₀ that a site keeps between the rounds of a run.

    Attributes:
        run: The run that brought it; of another run nothing is kept, nor answered for.
        digest: `fedlr.training.jobs.digest_of` its parts.
        parts: A₀ by (site, ``A``), shape (r, n).
    """

    run: str
    digest: str
    parts: Parts


_KNOWN: WeakValueDictionary[tuple[str, str], Basis] = WeakValueDictionary()
"""What sites of this process hold, by run and digest: simulated ones hold it once."""


def shortened(job: Job, compact: Compact, basis: bool) -> Job:
    """Return what travels in the place of ``job``.

    Args:
        job: With the A's that ``compact`` gives.
        compact: Their rotations and basis.
        basis: Whether A₀ goes with them.
    """
    factors = {key: value for key, value in job.parts.items() if key.role is Role.A}
    others = {key: value for key, value in job.parts.items() if key.role is not Role.A}
    rotated = Rotated(digest_of(compact.basis), digest_of(factors))
    parts = {**others, **compact.rotations, **(compact.basis if basis else {})}
    return replace(job, parts=parts, rotated=rotated)


def completed(job: Job, held: Basis | None) -> tuple[Job, Basis] | None:
    """Return the job with its A's, and the basis they were made of.

    Args:
        job: As it came; `Job.rotated` is set.
        held: What the site has.

    Returns:
        None where there is no such basis, or where another A than the server's comes out.

    Raises:
        ValueError: Rotations and basis are not of the same sites, or do not fit, or a
            rotation has more rows than columns: A would be larger than all that was sent.
    """
    if job.rotated is None:
        raise ValueError("job.rotated is None; the job has all its parts")
    sent = {key: value for key, value in job.parts.items() if key.role is Role.A}
    if sent:
        held = _basis(job.run, sent)
    if held is None or (held.run, held.digest) != (job.run, job.rotated.basis):
        return None
    rotations = {key.site: v for key, v in job.parts.items() if key.role is Role.ROTATION}
    if rotations.keys() != {key.site for key in held.parts}:
        raise ValueError(f"rotations of {sorted(rotations)} are not those of the basis")
    for site, rotation in rotations.items():
        if rotation.ndim != 2 or rotation.shape[0] > rotation.shape[1]:
            shape = tuple(rotation.shape)
            raise ValueError(f"{site}/rotation has shape {shape}, expected (k, r) with k ≤ r")
    factors = {key: rotate(rotations[key.site], a) for key, a in held.parts.items()}
    if digest_of(factors) != job.rotated.result:
        return None
    others = {k: v for k, v in job.parts.items() if k.role not in (Role.A, Role.ROTATION)}
    # In the order in which the wire gives the parts of a job that needs no completion.
    return replace(job, parts=dict(sorted({**others, **factors}.items())), rotated=None), held


def _basis(run: str, parts: Parts) -> Basis:
    """Return the basis of ``parts``, the same object for all sites of this process."""
    digest = digest_of(parts)
    return _KNOWN.setdefault((run, digest), Basis(run, digest, parts))
