"""Neighbouring data, the same messages: nothing but the values of noised arrays may differ.

A site is asked everything that a server can ask, through its ClientApp, once for each
of several data sets that differ from `BASE` in one row or one user. What is compared is
the Flower message: header, names, shapes and types of arrays, sizes in bytes, errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Message

from client.site import Site
from fedlr.adapters.codec import ARRAYS_RECORD, HEADER_RECORD
from fedlr.data.batching import TokenisedDataset, UnitIndex
from fedlr.methods.downlink import Compact
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.ledger import MemoryLedger
from fedlr.training.downlink import shortened
from fedlr.training.jobs import Job
from server.messages import status_query, train_messages
from tests.client.test_site import PROVENANCE, policy
from tests.models import LONGEST, MOVABLE, RANK, VOCABULARY, rows, tiny
from tests.server.toys import FIRST_NODE, grid_of

LENGTHS = [LONGEST, 3, 5, 7, 2, 9, 4, 6, 3, 8, 5, 4, 6]
ROWS = rows(LENGTHS)
USERS = ((0,), (1, 2), (3, 4, 5), (6,), (7, 8, 9, 10))
BOTH = frozenset({Role.B, Role.HEAD})


@dataclass(frozen=True)
class Data:
    """What a site holds."""

    users: tuple[tuple[int, ...], ...] = USERS
    rows: TokenisedDataset = ROWS

    @property
    def units(self) -> UnitIndex:
        sizes = [len(user) for user in self.users]
        flat = np.array([row for user in self.users for row in user], dtype=np.int64)
        return UnitIndex(flat, np.cumsum([0, *sizes], dtype=np.int64))


def with_token(row: int, token: int) -> TokenisedDataset:
    """The rows, with another first token in one of them."""
    tokens = ROWS.tokens.copy()
    tokens[ROWS.offsets[row]] = token
    return replace(ROWS, tokens=tokens)


BASE = Data()
NEIGHBOURS: Mapping[str, Data] = {
    "a user of many rows lacks one": Data((*USERS[:4], (7, 8, 9))),
    "a user has one row more": Data(((0,), (1, 2, 11), *USERS[2:])),
    "a user of one row is gone, the longest": Data(USERS[1:]),
    "a user of many rows is gone": Data(USERS[:4]),
    "a user more": Data((*USERS, (11, 12))),
    "another text": Data(rows=with_token(8, 5)),
    "another label": Data(rows=replace(ROWS, labels=(ROWS.labels + 1) % 3)),
    "a row without a finite gradient": Data(rows=with_token(4, VOCABULARY - 1)),
    "no row at all": Data(()),
}


@dataclass(frozen=True)
class Settings:
    """The public ones."""

    mode: str = "dry"
    unit: str = "user"
    rows_per_user: int | None = 2
    declared_size: int = 4  # with L = 4: every unit is in every step


def site_of(data: Data, settings: Settings) -> tuple[Site, MemoryLedger, dict[PartKey, Any]]:
    model = tiny()
    words = model.adapted.encoder.get_submodule("base_model.model.embeddings.word_embeddings")
    with torch.no_grad():
        words.get_parameter("weight")[VOCABULARY - 1] = math.nan
    trainer = model.trainer(
        data.rows, steps=2, learning_rate=0.1, rows_per_user=settings.rows_per_user
    )
    declared = policy(
        mode=settings.mode, unit=settings.unit, declared_size=settings.declared_size, max_joins=3
    )
    ledger = MemoryLedger()
    return Site(declared, data.units, trainer, ledger, PROVENANCE), ledger, model.parts(MOVABLE)


def questions(parts: dict[PartKey, Any]) -> list[tuple[Job, str]]:
    """Jobs and nonces that bring out every kind of answer of a working site."""
    first = Job("run", 0, 0, "", BOTH, BOTH, parts, PROVENANCE)
    turns = {
        PartKey(key.site, Role.ROTATION): torch.eye(value.shape[0], RANK)
        for key, value in parts.items()
        if key.role is Role.B
    }
    core = frozenset({Role.CORE})
    project = replace(first, phase=1, train=frozenset(), send=core, parts=turns)
    spoiled = {key: value * math.nan for key, value in parts.items()}
    basis = {key: value for key, value in parts.items() if key.role is Role.A}
    unit = {PartKey(key.site, Role.ROTATION): torch.eye(RANK) for key in basis}
    short, long = (shortened(first, Compact(unit, basis), brought) for brought in (False, True))
    return [
        (short, "a"),
        (project, "too early"),
        (first, "a"),
        (first, "a"),
        (short, "a"),
        (long, "a"),
        (short, "a"),
        (replace(first, send=frozenset({Role.B})), "a"),
        (project, "p"),
        (replace(first, parts=spoiled), "nan"),
        (replace(first, provenance=replace(PROVENANCE, base="other")), "other"),
        (replace(first, round=1, train=MOVABLE, send=MOVABLE), "b"),
        (first, "a"),
        (replace(first, round=2, train=frozenset({Role.HEAD}), send=frozenset({Role.HEAD})), "c"),
        (replace(first, round=3), "d"),
    ]


CODES = [
    *("no_base", "no_release", "", "", "no_base", "", "", "ledger", "", "bad_job", "provenance"),
    *("", "ledger", "", "max_joins"),
]
"""The code of each answer in modes ``dp`` and ``dry``; an empty one is an update."""


def conversation(data: Data, settings: Settings) -> tuple[list[Message], MemoryLedger]:
    site, ledger, parts = site_of(data, settings)
    grid = grid_of([site])
    replies = list(grid.send_and_receive([status_query(FIRST_NODE, ttl=5.0)]))
    for job, nonce in questions(parts):
        replies += grid.send_and_receive(train_messages(job, {FIRST_NODE: nonce}, ttl=None))
    return replies, ledger


def public(reply: Message) -> dict[str, Any]:
    """Everything in a message but the values of its arrays, and Flower's ids and times."""
    arrays = cast("Mapping[str, Array]", reply.content.get(ARRAYS_RECORD, {}))
    return {
        "records": sorted(reply.content),
        "header": dict(cast("ConfigRecord", reply.content[HEADER_RECORD])),
        "arrays": [(k, v.dtype, v.shape, v.stype, len(v.data)) for k, v in arrays.items()],
        "type": reply.metadata.message_type,
        "error": reply.has_error(),
    }


def values(replies: list[Message]) -> list[np.ndarray]:
    found = [cast("Mapping[str, Array]", reply.content.get(ARRAYS_RECORD, {})) for reply in replies]
    return [array.numpy() for arrays in found for array in arrays.values()]


CASES = {
    "dry, users, capped": Settings(),
    "dry, users": Settings(rows_per_user=None),
    "dry, examples": Settings(unit="example", rows_per_user=None),
    "dp, users, capped": Settings(mode="dp"),
    "dp, q = ½": Settings(mode="dp", declared_size=8),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_one_row_or_user_more_or_less_shows_in_no_message(settings: Settings) -> None:
    replies, ledger = conversation(BASE, settings)
    said = [public(reply) for reply in replies]
    assert [one["header"].get("code", "") for one in said[1:]] == CODES
    for name, data in NEIGHBOURS.items():
        others, booked = conversation(data, settings)
        assert [public(reply) for reply in others] == said, name
        assert booked.spent() == ledger.spent(), name
        # The rows do matter, so that a message that told of them would have been seen.
        pairs = zip(values(replies), values(others), strict=True)
        assert any(not np.array_equal(*pair) for pair in pairs), name


def test_a_step_that_draws_nobody_looks_like_any_other() -> None:
    """At q = 4e-9 nobody is ever drawn; in a dry run the arrays are then equal too."""
    never = Settings(declared_size=10**9)
    replies, _ = conversation(BASE, never)
    said = [public(reply) for reply in replies]
    shapes = [public(reply)["arrays"] for reply in conversation(BASE, Settings())[0]]
    assert [one["arrays"] for one in said] == shapes
    for data in NEIGHBOURS.values():
        others, _ = conversation(data, never)
        assert [public(reply) for reply in others] == said
        assert all(map(np.array_equal, values(replies), values(others)))


@pytest.mark.parametrize("told", ["count", "length"])
def test_a_header_that_told_of_the_rows_would_be_caught(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps counted by what was drawn; a declared size counted from the rows."""
    real = Site.train_many

    def leaky(site: Site, jobs: Any) -> Any:
        number = site.units.count if told == "count" else len(site.units.rows)
        return [
            replace(found, steps=number) if hasattr(found, "steps") else found
            for found in real(site, jobs)
        ]

    monkeypatch.setattr(Site, "train_many", leaky)
    said = [public(reply) for reply in conversation(BASE, Settings())[0]]
    user_gone = NEIGHBOURS["a user of many rows is gone"]
    assert [public(reply) for reply in conversation(user_gone, Settings())[0]] != said
