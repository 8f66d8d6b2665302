"""Simulated sites in actors: one model per process, and no ledger that starts there."""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from client import simulation
from client.main import site_of
from client.simulation import UnreachableLedger, make_sites, site_in_actor
from fedlr.config import PrivacyConfig, RunConfig, to_json
from fedlr.errors import ConfigError, LedgerError, RunError
from fedlr.methods.method import ClientUpdate, PartKey, Role
from fedlr.orders import SiteOrder, order_file, prepare, write_order
from fedlr.planning import ClientPlan
from fedlr.privacy.ledger import Ledger, SqliteLedger
from fedlr.training.jobs import Abstention, Job, Provenance
from tests.models import units_of

PROVENANCE = Provenance("base", "tokenizer", "labels")
SIGMA = {"client-000": 1.5, "client-001": 2.5}
KEY = PartKey("site", Role.B)


@dataclass
class Node:
    """Flower's Context, as far as it is read."""

    node_config: Mapping[str, Any]
    run_id: int = 0
    run_config: Mapping[str, Any] | None = None


def node(index: int, count: int = 2) -> Node:
    return Node({"partition-id": index, "num-partitions": count})


class Trainer:
    """Answers with zeros."""

    settings = SimpleNamespace(steps=2)

    def check(self, parts: object, train: object) -> None:
        """Anything fits."""

    def train(self, task: object, units: object) -> dict[PartKey, torch.Tensor]:
        return {KEY: torch.zeros(2, 1)}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Notes how often a workbench is built and looked over, and with what."""
    calls: list[dict[str, Any]] = []

    def build(config: RunConfig, noise: Mapping[str, float], evaluate: bool) -> Any:
        calls.append({"config": config, "noise": noise, "evaluate": evaluate})
        return bench(config, noise)

    monkeypatch.setattr(simulation, "build", build)
    monkeypatch.setattr(simulation, "quick", lambda bench: calls[-1].update(doctor=bench.config))
    level = logging.getLogger("flwr").level
    simulation._resident.cache_clear()
    yield calls
    simulation._resident.cache_clear()
    logging.getLogger("flwr").setLevel(level)


def bench(config: RunConfig, noise: Mapping[str, float]) -> Any:
    plans = [ClientPlan(name, units_of([1, 2]), 100, 1e-5, sigma) for name, sigma in noise.items()]
    return SimpleNamespace(
        config=config,
        clients=plans,
        trainer=Trainer(),
        provenance=PROVENANCE,
    )


def private() -> RunConfig:
    return RunConfig(privacy=PrivacyConfig(epsilon=1e6, accountant="rdp"))


def order_in(folder: Path, **changes: Any) -> SiteOrder:
    folder.mkdir(exist_ok=True)
    return replace(prepare(private(), "run-1", folder, SIGMA), **changes)


def job() -> Job:
    b = frozenset({Role.B})
    return Job("run-1", 0, 0, "nonce", b, b, {KEY: torch.zeros(2, 1)}, PROVENANCE)


def test_a_process_builds_once_with_the_noise_of_the_order(
    tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    order = order_in(tmp_path)
    first, second = site_in_actor(order, node(0)), site_in_actor(order, node(1))
    again = pickle.loads(pickle.dumps(order))
    assert site_in_actor(again, node(0)) is first
    assert [site.policy.client for site in (first, second)] == list(SIGMA)
    assert [site.policy.noise_multiplier for site in (first, second)] == list(SIGMA.values())
    made = {"config": private(), "noise": SIGMA, "evaluate": False, "doctor": private()}
    assert built == [made]
    site_in_actor(order_in(tmp_path / "other"), node(0))
    assert len(built) == 2


def test_another_number_of_nodes_is_refused(tmp_path: Path, built: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="num-partitions = 3 must be 2"):
        site_in_actor(order_in(tmp_path), node(0, 3))
    assert built == []


def test_an_actor_books_in_the_ledger_that_was_made_for_it(
    tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    order = order_in(tmp_path)
    (answer,) = site_in_actor(order, node(1)).train_many([job()])
    assert isinstance(answer, ClientUpdate)
    joins = [SqliteLedger(order.ledger(name), order.source(name)).joins() for name in SIGMA]
    assert joins == [0, 1]


def test_a_site_without_its_ledger_abstains_and_makes_none(
    tmp_path: Path, built: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    order = order_in(tmp_path)
    order.ledger("client-001").unlink()
    site = site_in_actor(order, node(1))
    assert site.status().client == "client-001"
    assert site.train_many([job()]) == [Abstention("client-001", "ledger")]
    assert "storage that all machines of the run share" in caplog.text
    assert not order.ledger("client-001").exists()
    (other,) = site_in_actor(order, node(0)).train_many([job()])
    assert isinstance(other, ClientUpdate)


def test_the_ledger_of_another_run_is_refused(tmp_path: Path, built: list[dict[str, Any]]) -> None:
    with pytest.raises(LedgerError, match="run-1/client-000"):
        site_in_actor(order_in(tmp_path, sources=("run-2/client-000",) * 2), node(0))


def test_policies_that_are_no_longer_those_of_the_run_stop_the_site(
    tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    """A file that is gone where an actor starts would leave the site without its limits."""
    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "client-000.toml").write_text("[budget]\nmax_joins = 1\n")
    privacy = PrivacyConfig(epsilon=1e6, accountant="rdp", policies=str(policies))
    config = RunConfig(privacy=privacy)
    order = prepare(config, "run-1", tmp_path / "ledgers", SIGMA)
    assert site_in_actor(order, node(0)).policy.max_joins_total == 1
    (policies / "client-000.toml").unlink()
    with pytest.raises(ConfigError, match="policies are not those"):
        make_sites(bench(config, SIGMA), order)


def test_every_call_of_an_unreachable_ledger_but_close_is_refused(tmp_path: Path) -> None:
    ledger: Ledger = UnreachableLedger(tmp_path / "x.sqlite")
    names = {name for name in vars(Ledger) if not name.startswith("_")} - {"close"}
    expected = {"reserve", "commit", "recall", "history", "released", "spent", "joins", "observe"}
    assert names == expected | {"check_room"}
    for name in names:
        call = getattr(ledger, name)
        needed = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty]
        with pytest.raises(LedgerError, match=r"x\.sqlite does not exist on this machine"):
            call(*(None for _ in needed))
    ledger.close()


def test_a_resumed_run_makes_no_ledger(tmp_path: Path) -> None:
    order = order_in(tmp_path)
    (tmp_path / "client-000.sqlite").unlink()
    lost, kept = make_sites(bench(private(), SIGMA), order)
    assert lost.train_many([job()]) == [Abstention("client-000", "ledger")]
    assert isinstance(kept.train_many([job()])[0], ClientUpdate)
    assert not (tmp_path / "client-000.sqlite").exists()


def test_a_run_may_go_on_with_the_other_engine(tmp_path: Path, built: list[dict[str, Any]]) -> None:
    """What an actor books is known to a site in this process, and the other way round."""
    order = order_in(tmp_path)
    (first,) = site_in_actor(order, node(0)).train_many([job()])
    sites = make_sites(bench(private(), SIGMA), order)
    (again,) = sites[0].train_many([job()])
    assert isinstance(first, ClientUpdate)
    assert isinstance(again, ClientUpdate)
    assert again.epsilon == first.epsilon
    assert SqliteLedger(order.ledger("client-000")).joins() == 1
    other = replace(order, sources=tuple(source.replace("1/", "2/") for source in order.sources))
    with pytest.raises(LedgerError, match="run-2/client-000"):
        make_sites(bench(private(), SIGMA), other)


def test_the_client_of_flwr_run_follows_the_order_of_the_server(
    tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    order = order_in(tmp_path)
    cfg = to_json(replace(private(), output=str(tmp_path)))
    context = replace(node(1), run_id=17, run_config={"cfg": cfg})
    with pytest.raises(RunError, match="all machines of the run share"):
        site_of(context)
    write_order(order_file(str(tmp_path), 17), order)
    assert site_of(context).policy.client == "client-001"
    with pytest.raises(RunError, match=r"18\.json"):
        site_of(replace(context, run_id=18))
