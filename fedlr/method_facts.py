"""What there is to choose from, measured rather than told: methods, combiners, subspaces.

Every number comes from a method's own `plan` and `broadcast`, over some rounds of a federation
whose arrays are random: a table of methods cannot disagree with what is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

import torch

from fedlr.config import SubspaceConfig, from_mapping
from fedlr.errors import ConfigError
from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import SUBSPACES, orthonormal
from fedlr.methods.combiners import COMBINERS
from fedlr.methods.method import ClientUpdate, GlobalState, Layout, Method, PartKey, Phase, Role
from fedlr.methods.refresh import Alternating, Merging
from fedlr.methods.registry import METHODS, build
from fedlr.report.methods import Catalogue, CombinerRow, MethodRow, SubspaceRow

_M, _N, _R, _CLIENTS = 211, 173, 5, 7
"""m, n, r and K that share no factor, so that a shape tells which of them it is made of."""

_ROUNDS = 4
"""The first is a beginning (all residuals are empty); a method may alternate between two."""

_NAMES = {Role.A: "A", Role.B: "B", Role.CORE: "R"}
_SITE = AdapterSite("site", out_features=_M, in_features=_N, rank=_R, scaling=1.0)
_LAYOUT = Layout(sites=(_SITE,), head={"head": torch.zeros(13)})

_HEAD = "head"


@dataclass(frozen=True)
class _Round:
    """One round of a method: what it trains, and numbers per site in either direction."""

    trains: str
    up: str
    down: str
    down_count: int
    private: int
    exchanges: int


def catalogue(about: Mapping[str, str]) -> Catalogue:
    """Return everything that can be chosen.

    Args:
        about: What each subspace policy is, by its name; one that is missing has no words.
    """
    return Catalogue(
        methods=tuple(_method_row(name, build(name, orthonormal)) for name in METHODS),
        combiners=tuple(
            CombinerRow(
                name=name,
                title=facts.title,
                guarantee=facts.guarantee,
                breakdown=facts.breakdown,
                secure=facts.linear,
                source=facts.source,
            )
            for name, facts in COMBINERS.items()
        ),
        subspaces=tuple(
            SubspaceRow(name=name, about=about.get(name, ""), looks_at=_looks_at(name))
            for name in _choices("kind")
        ),
        refreshes=tuple(_refresh_row(name) for name in _choices("refresh")),
    )


def _refresh_row(name: str) -> MethodRow:
    """Return what a refresh makes of the first method that has a subspace to move."""
    inner = next(key for key, one in METHODS.items() if one.facts.refreshes)
    plain: Any = build(inner, orthonormal)
    made: dict[str, Method] = {
        "none": plain,
        "merge": Merging(plain, orthonormal),
        "alternate": Alternating(plain),
    }
    row = _method_row(name, made[name])
    return replace(row, title=f"{inner}, refresh {name}")


def _method_row(name: str, method: Method) -> MethodRow:
    rounds = _rounds(method)[1:]
    facts, grows = method.facts, rounds[0].down_count < rounds[1].down_count < rounds[2].down_count
    down = rounds[0].down if grows else _each([one.down for one in rounds])
    return MethodRow(
        name=name,
        title=facts.title,
        trains=_each([one.trains for one in rounds]),
        up=_each([one.up for one in rounds]),
        down=f"{down}, more every round" if grows else down,
        exchanges=max(one.exchanges for one in rounds),
        private_releases=max(one.private for one in rounds),
        exact=facts.exact,
        limit=facts.limit,
        secure=facts.linear,
        combiners=facts.combiners,
        refreshes=facts.refreshes,
        mixed_ranks=facts.mixed_ranks,
        folds=facts.folds,
        source=facts.source,
    )


def _rounds(method: Method) -> list[_Round]:
    """Return the first rounds of a federation whose clients send random arrays."""
    draws = torch.Generator().manual_seed(0)
    state, found = method.init(_LAYOUT, draws), []
    for _ in range(_ROUNDS):
        phases = method.plan(state).phases
        up, down, trained = list[str](), list[str](), set[Role]()
        count = 0
        for phase in phases:
            sent = method.broadcast(state)
            down += [_symbols(key, array.shape) for key, array in sent.items() if array.numel()]
            count += sum(array.numel() for array in sent.values())
            updates = [_update(number, phase, state, draws) for number in range(_CLIENTS)]
            up += [_symbols(key, array.shape) for key, array in updates[0].parts.items()]
            trained |= phase.train - {Role.HEAD}
            state = method.aggregate(state, updates, [1.0] * _CLIENTS)
        trains = ", ".join(_NAMES[role] for role in (Role.A, Role.B, Role.CORE) if role in trained)
        private = sum(phase.private for phase in phases)
        found.append(_Round(trains or _HEAD, _sum(up), _sum(down), count, private, len(phases)))
    return found


def _update(number: int, phase: Phase, state: GlobalState, draws: torch.Generator) -> ClientUpdate:
    """Return what a client sends, with random values: shapes are all that counts."""
    parts = {
        key: torch.randn(array.shape, generator=draws)
        for key, array in state.parts.items()
        if key.role in phase.send
    }
    return ClientUpdate(f"client-{number}", parts, steps=1)


def _symbols(key: PartKey, shape: torch.Size) -> str:
    """Return the numbers of an array in terms of m, n, r and K.

    Example:
        >>> _symbols(PartKey("site", Role.B), torch.Size([_M, _R]))
        'rm'
        >>> _symbols(PartKey("site", Role.RESIDUAL_A), torch.Size([_CLIENTS * _R, _N]))
        'K·rn'
    """
    if key.role is Role.HEAD:
        return _HEAD
    factors, letters = list[str](), list[str]()
    for size in shape:
        letter = {_M: "m", _N: "n"}.get(size)
        if letter is None and size % _R == 0:
            letter, times = "r", size // _R
            factors += [_times(times)] if times > 1 else []
        letters.append(letter or f"{size}·")
    product = "".join(sorted(letters, key="rmn".find)).replace("rr", "r²")
    return "·".join([*factors, product])


def _times(count: int) -> str:
    """Return how many clients' worth of something there is.

    Example:
        >>> _times(_CLIENTS), _times(_CLIENTS + 1), _times(2 * _CLIENTS), _times(2)
        ('K', '(K+1)', '2K', '2')
    """
    if abs(count - _CLIENTS) == 1:
        return "(K+1)" if count > _CLIENTS else "(K−1)"
    many, rest = divmod(count, _CLIENTS)
    if rest:
        return str(count)
    return "K" if many == 1 else f"{many}K"


def _sum(terms: list[str]) -> str:
    """Return a sum; the head is left out beside others: it goes wherever it is trained."""
    own = [term for term in terms if term != _HEAD] or terms
    counts = {term: own.count(term) for term in own}
    return " + ".join(term if n == 1 else f"{n}·{term}" for term, n in counts.items()) or "0"


def _each(found: list[str]) -> str:
    """Return what rounds have in common, or the kinds of rounds there are."""
    return " | ".join(dict.fromkeys(found))


def _looks_at(kind: str) -> str:
    """Return what a policy needs beside a seed, by what the configuration asks for."""
    if kind in SUBSPACES:
        return "nothing"
    try:
        from_mapping({"subspace": {"kind": kind}})
    except ConfigError:
        return "public text"
    return "base weights"


def _choices(field: str) -> tuple[str, ...]:
    return tuple(get_args(get_type_hints(SubspaceConfig)[field]))
