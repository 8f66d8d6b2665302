"""The ClientApp of a real site passes jobs and answers on, and holds nothing of its own."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from flwr.app import UserConfig

import client.main
from client import proxy
from fedlr.adapters.codec import ARRAYS_RECORD, HEADER_RECORD
from fedlr.build import Workbench, build
from fedlr.methods.method import Layout, Parts
from fedlr.methods.shared import factor_pairs
from fedlr.training.jobs import Abstention
from server.grid import InProcessGrid
from server.messages import read_outcome, status_query, train_messages
from server.outcome import Outcome
from server.session import first, strategy_config
from server.strategy import FederatedStrategy
from tests.client.real_site import RUN, agent, first_job, place, sites_like
from tests.integration.test_equivalence import difference

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 2


def federated(bench: Workbench, grid: InProcessGrid, run: str) -> Outcome:
    settings = strategy_config(bench.config, run)
    start = first(bench)
    return FederatedStrategy(settings, bench.method, start, bench.provenance).run(grid)


def products(layout: Layout, parts: Parts) -> dict[str, torch.Tensor]:
    return {site: pair.product() for site, pair in factor_pairs(layout, parts).items()}


def test_the_records_are_those_of_the_codec() -> None:
    assert (proxy.ARRAYS_RECORD, proxy.HEADER_RECORD) == (ARRAYS_RECORD, HEADER_RECORD)


def test_the_app_loads_no_torch() -> None:
    code = "import sys, client.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_three_dry_rounds_are_those_of_a_simulation(tmp_path: Path) -> None:
    words = ["privacy=dry", "data.public=true", "optimizer.learning_rate=0.5"]
    (tmp_path / "home").mkdir()
    home = place(tmp_path / "home", *words)
    bench = build(home.config())
    from client.simulation import make_sites
    from fedlr.cli.simulate import local_grid

    simulated = federated(bench, local_grid(bench.config, make_sites(bench, None)), "simulated")
    for index in range(CLIENTS):
        (tmp_path / f"site-{index}").mkdir()
    real = sites_like(bench, tmp_path, words, home.key)
    with ExitStack() as stack:
        nodes: dict[int, UserConfig] = {}
        for index, site in enumerate(real):
            declaration = stack.enter_context(agent(site))
            nodes[index + 7] = {proxy.AGENT: str(declaration.agent.socket)}
        order = home.signed()
        grid = InProcessGrid(client.main.app, nodes, run_config={proxy.ORDER: order})
        deployed = federated(build(home.config()), grid, RUN)
    assert [record.accepted for record in deployed.records] == [CLIENTS] * 3
    assert deployed.epsilon == dict.fromkeys(("client-000", "client-001"), float("inf"))
    found = products(bench.layout, deployed.parts), products(bench.layout, simulated.parts)
    assert difference(*found) < 1e-6
    assert max(float(value.norm()) for value in found[1].values()) > 1e-3


@pytest.mark.parametrize("config", [{}, {proxy.ORDER: "{}"}])
def test_without_an_order_the_site_only_refuses(tmp_path: Path, config: UserConfig) -> None:
    site = place(tmp_path)
    job = first_job(site)
    with agent(site) as declaration:
        nodes: dict[int, UserConfig] = {7: {proxy.AGENT: str(declaration.agent.socket)}}
        grid = InProcessGrid(client.main.app, nodes, run_config=config)
        (answer,) = grid.send_and_receive(train_messages(job, {7: "n"}, None))
        (told,) = grid.send_and_receive([status_query(7, 30.0)])
    assert read_outcome(answer) == Abstention("client-000", "unsigned")
    assert dict(told.content[HEADER_RECORD]) == {"code": "unsigned"}


def test_without_an_agent_the_answer_is_a_code(tmp_path: Path) -> None:
    site = place(tmp_path)
    job = first_job(site)
    nodes: dict[int, UserConfig] = {7: {proxy.AGENT: str(tmp_path / "none.sock")}}
    grid = InProcessGrid(client.main.app, nodes, run_config={proxy.ORDER: site.signed()})
    (answer,) = grid.send_and_receive(train_messages(job, {7: "n"}, ttl=2.0))
    assert read_outcome(answer) == Abstention("", "failed")
    (told,) = grid.send_and_receive([status_query(7, 2.0)])
    assert dict(told.content[HEADER_RECORD]) == {"code": "failed"}
