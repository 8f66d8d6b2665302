"""An order arrives as it was given, and ledgers are made where a run starts, once."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.config import DataConfig, PrivacyConfig, RunConfig, from_json
from fedlr.errors import ConfigError, LedgerError, RunError
from fedlr.methods.registry import METHODS
from fedlr.orders import (
    check_policies,
    order_file,
    prepare,
    read_order,
    read_policies,
    write_order,
)
from fedlr.planning import ClientPlan
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger
from tests.models import units_of

SIGMA = {"client-000": 1.5, "client-001": 0.1 + 0.2}


def test_an_order_names_what_the_run_is_made_of(tmp_path: Path) -> None:
    order = prepare(RunConfig(seed=3), "run-1", tmp_path, SIGMA)
    assert from_json(order.config) == RunConfig(seed=3)
    assert dict(zip(order.clients, order.noise, strict=True)) == SIGMA
    assert sorted(tmp_path.iterdir()) == [order.ledger(name) for name in SIGMA]
    for name in SIGMA:
        assert order.ledger(name).is_absolute()
        assert order.is_own(name)
        assert SqliteLedger(order.ledger(name)).source_id == f"run-1/{name}"


def test_an_order_is_read_as_it_was_written(tmp_path: Path) -> None:
    order = prepare(RunConfig(), "run-1", tmp_path, SIGMA)
    path = order_file(str(tmp_path), 2**63 + 5)
    write_order(path, order)
    assert read_order(path) == order
    assert hash(read_order(path)) == hash(order)


def test_preparing_again_keeps_what_is_booked_and_another_run_is_refused(tmp_path: Path) -> None:
    before = prepare(RunConfig(), "run-1", tmp_path, SIGMA)
    assert prepare(RunConfig(), "run-1", tmp_path, SIGMA) == before
    with pytest.raises(LedgerError, match="run-1/client-000"):
        prepare(RunConfig(), "run-2", tmp_path, SIGMA)


def test_a_resumed_run_makes_no_ledger(tmp_path: Path) -> None:
    prepare(RunConfig(), "run-1", tmp_path, SIGMA, resumed=True)
    assert list(tmp_path.iterdir()) == []


def test_an_order_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    path = order_file(str(tmp_path), 7)
    with pytest.raises(RunError, match=r"7\.json .*all machines"):
        read_order(path)
    path.parent.mkdir()
    path.write_text('{"config": "{}"}')
    with pytest.raises(RunError, match="is damaged"):
        read_order(path)


def test_an_order_that_cannot_be_written_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    order = prepare(RunConfig(), "run-1", tmp_path, {})
    with pytest.raises(RunError, match="file/flower cannot be made"):
        write_order(order_file(str(tmp_path / "file"), 7), order)


def kept(folder: Path, client: str = "client-000", source: str = "ward-7") -> RunConfig:
    """A run whose one client has an operator with a ledger of their own."""
    folder.mkdir(exist_ok=True)
    (folder / f"{client}.toml").write_text(
        f'ledger = "ward.sqlite"\nsource_id = "{source}"\n'
        "[budget]\nepsilon_total = 9\ndelta = 0.1\n"
    )
    return RunConfig(privacy=PrivacyConfig(policies=str(folder)))


def plan(client: str, size: int = 8) -> ClientPlan:
    return ClientPlan(client, units_of([1]), size, 1e-5, 1.5)


def test_an_operators_own_ledger_is_used_and_never_made(tmp_path: Path) -> None:
    config = kept(tmp_path / "policies")
    order = prepare(config, "run-1", tmp_path / "ledgers", SIGMA)
    assert order.ledger("client-000") == tmp_path.resolve() / "policies" / "ward.sqlite"
    assert order.source("client-000") == "ward-7"
    assert [order.is_own(name) for name in SIGMA] == [False, True]
    assert list((tmp_path / "ledgers").iterdir()) == [order.ledger("client-001")]


def test_a_ledger_that_a_policy_names_must_be_there_and_be_its_own(tmp_path: Path) -> None:
    config, labels = kept(tmp_path), ("a", "b")
    with pytest.raises(
        ConfigError, match=r"ward\.sqlite, which does not exist.*--source-id ward-7"
    ):
        check_policies(config, [plan("client-000")], labels)
    SqliteLedger(tmp_path / "ward.sqlite", "ward-7").close()
    check_policies(config, [plan("client-000")], labels)
    kept(tmp_path, "client-001", "ward-8")
    with pytest.raises(ConfigError) as caught:
        check_policies(config, [plan("client-000"), plan("client-001")], labels)
    first, second = caught.value.problems
    assert "belongs to the data source 'ward-7', not to 'ward-8'" in first
    assert "client-000 and client-001 name one ledger" in second
    SqliteLedger(tmp_path / "ward-8.sqlite", "ward-7").close()
    text = (tmp_path / "client-000.toml").read_text()
    (tmp_path / "client-001.toml").write_text(text.replace("ward.sqlite", "ward-8.sqlite"))
    with pytest.raises(ConfigError, match="name one ledger or source id"):
        check_policies(config, [plan("client-000"), plan("client-001")], labels)


def test_a_ledger_of_another_unit_or_without_its_witness_is_refused_before_the_run(
    tmp_path: Path,
) -> None:
    config = kept(tmp_path)
    with closing(SqliteLedger(tmp_path / "ward.sqlite", "ward-7")) as ledger:
        key, event = JobKey("run-0", 0, "client-000", "n"), Release(1.0, 0.1, 1, "user")
        ledger.reserve(key, event)
        ledger.commit(key, event)
    with pytest.raises(ConfigError, match="holds releases of the unit user"):
        check_policies(config, [plan("client-000")], ("a", "b"))
    (tmp_path / "ward.sqlite.witness").unlink()
    with pytest.raises(ConfigError, match="--declare-loss"):
        check_policies(config, [plan("client-000")], ("a", "b"))


def test_a_policy_in_capitals_is_not_overlooked(tmp_path: Path) -> None:
    (tmp_path / "client-000.TOML").write_text("declared_size = 9\n")
    config = RunConfig(privacy=PrivacyConfig(policies=str(tmp_path)))
    with pytest.raises(ConfigError, match="in small letters; rename it"):
        read_policies(config)


def test_an_order_tells_of_the_policies_and_expands_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    kept(tmp_path / "policies")
    config = RunConfig(privacy=PrivacyConfig(policies="~/policies"))
    order = prepare(config, "run-1", tmp_path / "ledgers", SIGMA)
    assert from_json(order.config).privacy.policies == str(tmp_path / "policies")
    assert [bool(digest) for digest in order.policies] == [True, False]
    before = order.policies
    assert prepare(config, "run-1", tmp_path / "ledgers", SIGMA, resumed=True).policies == before
    with (tmp_path / "policies" / "client-000.toml").open("a") as file:
        file.write("max_joins = 3\n")
    assert prepare(config, "run-1", tmp_path / "ledgers", SIGMA, resumed=True).policies != before


def test_conflicts_of_all_clients_are_told_at_once(tmp_path: Path) -> None:
    for name in SIGMA:
        (tmp_path / f"{name}.toml").write_text("declared_size = 9\n")
    config = RunConfig(privacy=PrivacyConfig(policies=str(tmp_path)))
    with pytest.raises(ConfigError) as caught:
        check_policies(config, [plan(name) for name in SIGMA], ("a", "b"))
    for name, problem in zip(SIGMA, caught.value.problems, strict=True):
        assert f"the policy of {name} says declared_size = 9, the run 8" in problem


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_policy_of_few_columns_is_refused_where_the_method_cannot_do_with_them(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "client-001.toml").write_text("[allow]\nmax_rank = 2\n")
    config = RunConfig(privacy=PrivacyConfig(policies=str(tmp_path)))
    config = replace(config, method=replace(config.method, name=name))
    clients = [plan(client) for client in SIGMA]
    if METHODS[name].facts.mixed_ranks:
        check_policies(config, clients, ("a", "b"))
        return
    with pytest.raises(ConfigError, match=rf"client-001 allows max_rank = 2, but method {name}"):
        check_policies(config, clients, ("a", "b"))
    fitting = replace(config, adapter=replace(config.adapter, rank=2))
    check_policies(fitting, clients, ("a", "b"))


def test_places_hold_in_a_process_that_works_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    for place, meant in (("kept", str(tmp_path / "kept")), ("~/kept", "/home/ann/kept")):
        config = RunConfig(data=DataConfig(cache=place))
        order = prepare(config, "run-1", tmp_path / place.replace("/", ""), SIGMA)
        assert from_json(order.config).data.cache == meant
