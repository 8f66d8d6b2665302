"""What travels between server and site, as frozen values and as plain records.

A record is a pair (arrays, header): named float32 arrays in the wire form of
`fedlr.adapters.codec`, and a flat mapping of texts, integers and floats. The
Flower apps put both into a message; nothing else crosses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlr import checks
from fedlr.adapters import codec
from fedlr.errors import BadUpdate
from fedlr.methods.method import ClientUpdate, Parts, Role

Arrays = dict[str, NDArray[np.float32]]
Header = dict[str, str | int | float]

ABSTENTION_CODES = (
    "max_joins",
    "budget",
    "run_budget",
    "month_budget",
    "policy",
    "provenance",
    "bad_job",
    "no_release",
    "no_base",
    "ledger",
    "forfeited",
    *("unsigned", "expired", "replayed", "unapproved", "busy"),
    "failed",
)
"""Every reason a site may give for not taking part; a fixed list, so that no text leaks.

``max_joins`` joined as often as its noise was calibrated for · ``budget`` the next
round would exceed its ε in all, ``run_budget`` in this run, ``month_budget`` in thirty
days · ``policy`` the operator does not allow it · ``provenance`` other base weights,
tokenizer, labels or codec · ``bad_job`` the job's names or shapes do not fit ·
``no_release`` a projecting phase without a release of this round · ``no_base`` the job
brings rotations of a basis that the site has not got: it is asked again, with the basis ·
``ledger`` the ledger refuses · ``forfeited`` the job was begun before and cut short: it is
spent, and not done again · of an agent: ``unsigned`` no coordinator that the operator trusts
asked for it, ``expired`` the order's time is over or has not come, ``replayed`` its run asked
for something else before, ``unapproved`` the operator has not approved it (yet), ``busy`` a
job trains and another one waits · ``failed`` anything else, explained on the operator's console
only.
"""


@dataclass(frozen=True)
class Provenance:
    """Digests that server and sites must agree on; averaging over other ones is nonsense.

    Attributes:
        base: sha256 of the base weights.
        tokenizer: sha256 of the tokenizer.
        labels: sha256 of the label list and of the configuration of head and
            adapters: what must agree for arrays of equal shape to mean the same.
        codec: Schema name of the arrays.
    """

    base: str
    tokenizer: str
    labels: str
    codec: str = codec.SCHEMA


@dataclass(frozen=True)
class Rotated:
    """That a job brings rotations Q in the place of A; see `fedlr.training.downlink`.

    Attributes:
        basis: `digest_of` the A₀ of all sites, which is in the job's parts or was before.
        result: `digest_of` the A = Q·A₀ that they give.
    """

    basis: str
    result: str


@dataclass(frozen=True)
class Job:
    """One phase of one round for one client.

    Attributes:
        run: Identifier of the federation run.
        round: Zero-based round.
        phase: Index of the phase in the round.
        nonce: Unique per (run, round, phase, client); a site books each one once.
        train: Roles to train; empty for a projecting phase.
        send: Roles to send back.
        parts: What the server broadcasts before the phase; what travels, where
            ``rotated`` is set.
        provenance: What the parts were made for.
        rotated: None for a job with all its parts.
    """

    run: str
    round: int
    phase: int
    nonce: str
    train: frozenset[Role]
    send: frozenset[Role]
    parts: Parts
    provenance: Provenance
    rotated: Rotated | None = None

    def __post_init__(self) -> None:
        checks.at_least("round", self.round, 0)
        checks.at_least("phase", self.phase, 0)


@dataclass(frozen=True)
class Abstention:
    """A site's refusal to take part in a round.

    Attributes:
        client: Stable public identifier of the client.
        code: One of `ABSTENTION_CODES`.
        epsilon: ε spent by this site so far: a round that was booked and cut short is
            spent too. None where nothing was booked, or the ledger cannot be read.
    """

    client: str
    code: str
    epsilon: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("code", self.code, ABSTENTION_CODES)


@dataclass(frozen=True)
class SiteStatus:
    """What a site says of itself before a run; all of it is public.

    Attributes:
        client: Stable public identifier.
        declared_size: N as the operator declares it.
        noise_multiplier: σ of its releases; 0.0 where privacy is off or dry.
        delta: δ of its guarantee; 0.0 where privacy is off.
        provenance: Digests of what it holds.
        rank: Most columns of a B (rows of an A) that it trains, ≥ 1; None has no bound.
    """

    client: str
    declared_size: int
    noise_multiplier: float
    delta: float
    provenance: Provenance
    rank: int | None = None


def encode_job(job: Job) -> tuple[Arrays, Header]:
    """Return the record of ``job``; `decode_job` is its inverse."""
    header: Header = {
        "run": job.run,
        "round": job.round,
        "phase": job.phase,
        "nonce": job.nonce,
        "train": _join(job.train),
        "send": _join(job.send),
        **_provenance_header(job.provenance),
    }
    if job.rotated is not None:
        header |= {"rotated_basis": job.rotated.basis, "rotated_result": job.rotated.result}
    return codec.encode(job.parts), header


def job_digest(job: Job) -> str:
    """Return sha256, hex, of everything in ``job`` but its nonce.

    Equal for two jobs exactly if a site would do the same for both; a nonce that comes
    with another job is a mistake, or an attempt to have a paid update replaced.
    """
    arrays, header = encode_job(job)
    return _sha256(json.dumps({**header, "nonce": ""}, sort_keys=True), arrays)


def digest_of(parts: Parts) -> str:
    """Return sha256, hex, of names, shapes and float32 values of ``parts``, in any order."""
    return _sha256("", codec.encode(parts))


def _sha256(start: str, arrays: Arrays) -> str:
    digest = hashlib.sha256(start.encode())
    for name in sorted(arrays):
        digest.update(f"\0{name}\0{arrays[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def decode_job(arrays: Arrays, header: Mapping[str, Any]) -> Job:
    """Return the job in a record.

    Raises:
        BadUpdate: A missing or malformed field (``names``) or array (see
            `fedlr.adapters.codec.decode`).
    """
    try:
        provenance = _provenance(header)
        return Job(
            run=str(header["run"]),
            round=int(header["round"]),
            phase=int(header["phase"]),
            nonce=str(header["nonce"]),
            train=_split(header["train"]),
            send=_split(header["send"]),
            parts=codec.decode(arrays, provenance.codec),
            provenance=provenance,
            rotated=_rotated(header),
        )
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise BadUpdate("names", f"the job's header is malformed: {error}") from error


def encode_outcome(outcome: ClientUpdate | Abstention) -> tuple[Arrays, Header]:
    """Return the record of an update or an abstention; `decode_outcome` is its inverse."""
    header: Header = {"client": outcome.client}
    if outcome.epsilon is not None:
        header["epsilon"] = float(outcome.epsilon)
    if isinstance(outcome, Abstention):
        return {}, {**header, "code": outcome.code}
    return codec.encode(outcome.parts), {
        **header,
        "steps": outcome.steps,
        "codec": codec.SCHEMA,
    }


def decode_outcome(arrays: Arrays, header: Mapping[str, Any]) -> ClientUpdate | Abstention:
    """Return the update or abstention in a record.

    Raises:
        BadUpdate: A missing or malformed field (``names``), or a bad array.
    """
    try:
        epsilon = header.get("epsilon")
        if "code" in header:
            spent = None if epsilon is None else float(epsilon)
            return Abstention(str(header["client"]), str(header["code"]), spent)
        return ClientUpdate(
            client=str(header["client"]),
            parts=codec.decode(arrays, str(header["codec"])),
            steps=checks.at_least("steps", int(header["steps"]), 0),
            epsilon=None if epsilon is None else float(epsilon),
        )
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise BadUpdate("names", f"the update's header is malformed: {error}") from error


def encode_status(status: SiteStatus) -> Header:
    """Return the header that announces a site; `decode_status` is its inverse."""
    header: Header = {
        "client": status.client,
        "declared_size": status.declared_size,
        "noise_multiplier": status.noise_multiplier,
        "delta": status.delta,
        **_provenance_header(status.provenance),
    }
    return header if status.rank is None else {**header, "rank": status.rank}


def decode_status(header: Mapping[str, Any]) -> SiteStatus:
    """Return the site's announcement; BadUpdate (``names``) where it is malformed or a code."""
    if "code" in header:
        raise BadUpdate("names", f"it answered {header['code']!r}; its own log says why")
    try:
        return SiteStatus(
            client=str(header["client"]),
            declared_size=_size(int(header["declared_size"])),
            noise_multiplier=checks.non_negative("sigma", float(header["noise_multiplier"])),
            delta=checks.in_range("delta", float(header["delta"]), 0.0, 1.0),
            provenance=_provenance(header),
            rank=checks.at_least("rank", int(header["rank"]), 1) if "rank" in header else None,
        )
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise BadUpdate("names", f"the site's status is malformed: {error}") from error


def _provenance_header(provenance: Provenance) -> Header:
    return {
        "base": provenance.base,
        "tokenizer": provenance.tokenizer,
        "labels": provenance.labels,
        "codec": provenance.codec,
    }


def _provenance(header: Mapping[str, Any]) -> Provenance:
    return Provenance(*(str(header[name]) for name in ("base", "tokenizer", "labels", "codec")))


def _rotated(header: Mapping[str, Any]) -> Rotated | None:
    if "rotated_basis" not in header:
        return None
    return Rotated(str(header["rotated_basis"]), str(header["rotated_result"]))


def _size(declared: int) -> int:
    """Return a declared size; ValueError where it is no size, or too large to be a weight."""
    if checks.at_least("declared_size", declared, 0) >= 2**63:
        raise ValueError("declared_size must be < 2**63; declare the number of units")
    return declared


def _join(roles: frozenset[Role]) -> str:
    return ",".join(sorted(role.value for role in roles))


def _split(text: Any) -> frozenset[Role]:
    return frozenset(Role(name) for name in str(text).split(",") if name)
