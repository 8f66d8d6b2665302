"""A run with real sites, from a signed order to a run folder; Flower's network alone is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from flwr.app import Message, UserConfig

import client.main
from client import proxy
from fedlr.build import build
from fedlr.cli.main import main
from fedlr.cli.simulate import simulate
from fedlr.config import RunConfig, to_json
from fedlr.errors import ConfigError, RunError
from fedlr.report.facts import read_facts
from fedlr.report.records import read_rounds, read_summary
from fedlr.signing import announced
from fedlr.told import KEPT, for_sites, keep
from server.deployment import folder_of, run_deployed, server_rows
from server.grid import InProcessGrid
from server.journal import read_checkpoint
from server.session import finished
from tests.client.real_site import RUN, Place, agent, place, sites_like
from tests.server.toys import assert_same_parts

DEPLOY = ("federation.engine=deploy", "federation.start_timeout_s=30")
PUBLIC = ("data.public=true",)
DRY = ("privacy=dry", "optimizer.learning_rate=0.5", *PUBLIC)


@dataclass(frozen=True)
class Federation:
    """Two real sites whose agents serve, and the coordinator."""

    home: Place
    sites: list[Place]
    nodes: dict[int, UserConfig]

    @property
    def config(self) -> RunConfig:
        return self.home.config(*DEPLOY)

    @property
    def folder(self) -> Path:
        return folder_of(self.home.order(), self.config)

    def order(self, config: RunConfig | None = None) -> str:
        return self.home.signed(config or self.config)

    def grid(self, order: str, kind: type[InProcessGrid] = InProcessGrid) -> InProcessGrid:
        return kind(client.main.app, self.nodes, run_config={proxy.ORDER: order})

    def run(self) -> Path:
        order = self.order()
        return run_deployed(self.grid(order), order)


@contextmanager
def federation(folder: Path, *words: str, approve: bool = False) -> Iterator[Federation]:
    (folder / "home").mkdir(parents=True)
    home = place(folder / "home", *words)
    bench = build(home.config())
    for index in range(len(bench.clients)):
        (folder / f"site-{index}").mkdir()
    sites = sites_like(bench, folder, list(words), home.key)
    # A server has no training rows.
    (home.folder / "data" / "train.jsonl").rename(folder / "rows-of-all")
    with ExitStack() as stack:
        nodes: dict[int, UserConfig] = {}
        for index, site in enumerate(sites):
            if approve:
                text = site.policy.read_text()
                site.policy.write_text(text.replace("[allow]", "[allow]\napprove = true"))
            declaration = stack.enter_context(agent(site))
            nodes[index + 7] = {proxy.AGENT: str(declaration.agent.socket)}
        yield Federation(home, sites, nodes)


def test_three_dry_rounds_are_those_of_a_simulation(tmp_path: Path) -> None:
    """The same model, round by round, though no row is on the server and σ, N come from sites."""
    with federation(tmp_path, *DRY) as made:
        folder = made.run()
        (tmp_path / "rows-of-all").rename(made.home.folder / "data" / "train.jsonl")
        simulated = simulate(made.home.config())
    facts, other = read_facts(folder), read_facts(simulated)
    assert facts.run == RUN
    assert folder.name == RUN
    assert facts.clients == other.clients
    bench = build(made.home.config())
    found, expected = (read_checkpoint(one, bench.layout) for one in (folder, simulated))
    assert found is not None
    assert expected is not None
    for key, value in expected.parts.items():
        assert (found.parts[key] - value).abs().max() <= 1e-6, key
    assert [r.accuracy for r in found.records] == [r.accuracy for r in expected.records]
    assert [r.accepted for r in read_rounds(folder / "rounds.jsonl")] == [2, 2, 2]


def test_epsilon_is_what_the_sites_report(tmp_path: Path) -> None:
    with federation(tmp_path) as made:
        folder = made.run()
        summary = read_summary(folder / "summary.json")
        booked = [site.rounds_booked() for site in made.sites]
    assert booked == [3, 3]
    assert summary.epsilon_budget == 8.0
    assert summary.epsilon_max is not None
    assert 7.0 < summary.epsilon_max <= 8.0
    assert any("what each site reported" in notice for notice in summary.notices)
    assert {client.joins for client in summary.clients} == {3}
    assert all(client.noise_multiplier for client in summary.clients)
    assert not (folder / "ledgers").exists()
    # Nothing of the sites is in it but what they announced.
    words = [path.read_text() for path in folder.glob("*.json*")]
    assert not any(str(site.ledger) in text for text in words for site in made.sites)
    assert (folder / "adapter" / "adapter_config.json").exists()


def test_the_server_s_own_settings_are_not_in_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEPT, str(tmp_path / "kept"))
    with federation(tmp_path, *DRY) as made:
        order = made.order(for_sites(made.config))
        assert str(tmp_path) not in order
        keep(tmp_path / "kept", RUN, made.config)
        folder = run_deployed(made.grid(order), order)
    assert folder == made.folder
    assert read_summary(folder / "summary.json").rounds == 3


def test_other_verbs_take_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with federation(tmp_path) as made:
        folder = made.run()
    assert main(["report", str(folder)]) == 0
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert main(["simulate", f"resume={folder}"]) == 0
    assert "the run is finished" in capsys.readouterr().err
    assert finished(folder) is not None


class Cut(InProcessGrid):
    """A network whose server dies while it waits for round 2."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        if any(message.metadata.group_id == "1" for message in found):
            raise KeyboardInterrupt
        return found


@pytest.mark.parametrize("words", [DRY, PUBLIC], ids=["dry", "private"])
def test_the_same_order_goes_on_where_the_run_stood(
    tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]
) -> None:
    # A short name: what a Unix socket may be called is bounded.
    place = tmp_path_factory.mktemp("on")
    with federation(place / "whole", *words) as made:
        whole = made.run()
        layout = build(made.home.config(), own=server_rows(made.config)).layout
    with federation(place / "cut", *words) as made:
        order = made.order()
        with pytest.raises(KeyboardInterrupt):
            run_deployed(made.grid(order, Cut), order)
        assert [r.round for r in read_rounds(made.folder / "rounds.jsonl")] == [1]
        assert [site.rounds_booked() for site in made.sites] == [2, 2]
        cut = made.run()
        # The round that was lost on its way is asked for under the same nonces, and paid once.
        assert [site.rounds_booked() for site in made.sites] == [3, 3]
    assert [r.round for r in read_rounds(cut / "rounds.jsonl")] == [1, 2, 3]
    if words == DRY:
        found, expected = (read_checkpoint(one, layout) for one in (cut, whole))
        assert found is not None
        assert expected is not None
        assert_same_parts(found.parts, expected.parts)


def test_another_configuration_does_not_go_on_with_the_run(tmp_path: Path) -> None:
    with federation(tmp_path, *DRY) as made:
        made.run()
        config = replace(made.config, optimizer=replace(made.config.optimizer, learning_rate=0.25))
        order = made.home.signed(to_json(config))
        with pytest.raises(RunError, match="0 of 2 clients"):
            run_deployed(made.grid(order), order)


def test_it_waits_for_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look at the run while the server waits, and then it begins."""
    monkeypatch.setattr("server.membership.ASK_AGAIN_S", 0.1)
    with federation(tmp_path, *DRY, approve=True) as made:
        asked: list[str] = []

        class Looking(InProcessGrid):
            def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
                found = list(super().pull_messages(message_ids))
                for site in made.sites if len(asked) < 2 else ():
                    if main(["site", "approve", str(site.policy), RUN]) == 0:
                        asked.append(site.policy.parent.name)
                return found

        order = made.order()
        folder = run_deployed(made.grid(order, Looking), order)
    assert sorted(asked) == ["site-0", "site-1"]
    assert len(read_rounds(folder / "rounds.jsonl")) == 3


def test_a_site_that_is_new_or_has_changed_is_left_out_of_a_run_that_goes_on(
    tmp_path: Path,
) -> None:
    with federation(tmp_path, *DRY) as made:
        order = made.order()
        with pytest.raises(KeyboardInterrupt):
            run_deployed(made.grid(order, Cut), order)
        facts = json.loads((made.folder / "run.json").read_text())
        facts["clients"][1]["declared_size"] += 1
        (made.folder / "run.json").write_text(json.dumps(facts))
        folder = run_deployed(made.grid(order), order)
        facts["clients"][0]["client"] = "client-900"
        (made.folder / "run.json").write_text(json.dumps(facts))
        with pytest.raises(
            RunError, match=r"0 clients of the run are left.*new to the run.*numbers"
        ):
            run_deployed(made.grid(order), order)
    summary = read_summary(folder / "summary.json")
    assert "Client 'client-001' is left out: it declares other numbers now." in summary.notices
    assert [r.accepted for r in read_rounds(folder / "rounds.jsonl")] == [2, 1, 1]


@pytest.mark.parametrize("text", ["", "{}", "x" * 70_000])
def test_without_an_order_there_is_no_run(text: str) -> None:
    with pytest.raises(ConfigError, match="fedlr submit"):
        announced(text)


def test_real_sites_are_not_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "federation=deploy"]) == 2
    assert "fedlr submit" in capsys.readouterr().err
