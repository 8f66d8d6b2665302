"""``fedlr methods``: its formulas are what methods send, whatever the shapes."""

from __future__ import annotations

import re

import pytest
import torch

from fedlr.cli.main import main
from fedlr.config import SubspaceConfig, from_mapping
from fedlr.errors import ConfigError
from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import orthonormal
from fedlr.method_facts import catalogue
from fedlr.methods.combiners import COMBINERS
from fedlr.methods.method import GlobalState, Layout, Method, Parts, Role
from fedlr.methods.registry import METHODS, build
from fedlr.report import strict_json
from fedlr.report.methods import Catalogue, text
from tests.methods.federation import clients

M, N, R, K = 41, 43, 3, 4
"""Other shapes than those that the formulas were read off."""


@pytest.fixture(scope="module")
def found() -> Catalogue:
    return catalogue({"kaiming": "PEFT's."})


def value(formula: str) -> int:
    """The number that a formula is at M, N, R and K."""
    total = 0
    for term in formula.split(" + "):
        product = 1
        for factor in re.findall(r"\(K[+−]1\)|r²|[Kmnr]|\d+", term):
            known = {"K": K, "m": M, "n": N, "r": R, "r²": R * R, "(K+1)": K + 1, "(K−1)": K - 1}
            product *= known.get(factor) or int(factor)
        total += product
    return total


def counted(method: Method, state: GlobalState) -> tuple[int, int, GlobalState]:
    """What one client sends up and gets in a round, and the state after it."""
    up = down = 0
    released: dict[str, Parts] = {}
    for phase in method.plan(state).phases:
        sent = method.broadcast(state)
        updates = [one.answer(state.layout, phase, sent, released) for one in clients(K)]
        down += sum(array.numel() for array in sent.values())
        up += sum(array.numel() for array in updates[0].parts.values())
        state = method.aggregate(state, updates, [1.0] * K)
    return up, down, state


@pytest.mark.parametrize("name", [name for name in METHODS if name != "head_only"])
def test_formulas_are_what_a_round_sends(found: Catalogue, name: str) -> None:
    row = next(row for row in found.methods if row.name == name)
    site = AdapterSite("q", out_features=M, in_features=N, rank=R, scaling=1.0)
    method = build(name, orthonormal)
    state = method.init(Layout(sites=(site,)), torch.Generator().manual_seed(1))
    _, _, state = counted(method, state)
    more = ", more every round"
    ups, downs = row.up.split(" | "), row.down.removesuffix(more).split(" | ")
    before = 0
    for turn in range(2):
        up, down, state = counted(method, state)
        assert up == value(ups[turn % len(ups)])
        if turn and row.down.endswith(more):
            assert down > before
        else:
            assert down == value(downs[turn % len(downs)])
        before = down


def test_every_choice_is_listed_with_its_facts(found: Catalogue) -> None:
    assert [row.name for row in found.methods] == list(METHODS)
    assert [row.name for row in found.combiners] == list(COMBINERS)
    for row in found.methods:
        facts = METHODS[row.name].facts
        assert (row.title, row.source, row.limit) == (facts.title, facts.source, facts.limit)
        flags = (row.exact, row.secure, row.combiners, row.refreshes, row.mixed_ranks, row.folds)
        assert flags == (
            *(facts.exact, facts.linear, facts.combiners, facts.refreshes, facts.mixed_ranks),
            facts.folds,
        )
        assert row.private_releases == 1
        roles = {"A": Role.A, "B": Role.B, "R": Role.CORE}
        assert {roles[one] for one in re.findall(r"[ABR]", row.trains)} == facts.trains
    assert [row.name for row in found.refreshes] == ["none", "merge", "alternate"]
    for policy in found.subspaces:
        try:
            from_mapping({"subspace": {"kind": policy.name}})
        except ConfigError:
            assert policy.looks_at == "public text"
        else:
            assert policy.looks_at in ("nothing", "base weights")
    assert SubspaceConfig().kind in [policy.name for policy in found.subspaces]


@pytest.mark.parametrize("width", [1, 30, 50, 95, 96, 110, 200])
def test_no_line_is_longer_than_the_terminal(found: Catalogue, width: int) -> None:
    shown = text(found, width)
    assert max(map(len, shown.splitlines())) <= max(width, 30)
    whole = "".join(shown.split())
    assert all(row.name in shown for row in (*found.methods, *found.combiners, *found.subspaces))
    assert "…" not in shown
    if width < 96:
        assert all("".join(row.limit.split()) in whole for row in found.methods)


def test_the_verb_prints_tables_or_json(
    found: Catalogue, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["methods"]) == 0
    assert max(map(len, capfd.readouterr().out.splitlines())) <= 40
    assert main(["methods", "--json"]) == 0
    decoded = strict_json.decode(Catalogue, capfd.readouterr().out)
    assert decoded.methods == found.methods
    assert all(policy.about for policy in decoded.subspaces)  # from the files of conf/
    assert main(["methods", "fedsvd"]) == 2
    assert "fedlr methods --help" in capfd.readouterr().err
