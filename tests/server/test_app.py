"""The ServerApp runs the strategy, in this process as on any engine."""

from __future__ import annotations

import logging

import pytest
from flwr.app import Context

from fedlr.errors import RunError
from server.app import make_server_app, run_in_process
from server.outcome import Outcome
from server.strategy import FederatedStrategy
from tests.server.toys import assert_same_parts, config, grid_of, run, strategy, toy_sites


def test_the_app_runs_the_strategy_of_its_context() -> None:
    outcomes: list[Outcome] = []

    def factory(context: Context) -> FederatedStrategy:
        return strategy(config(rounds=int(context.run_config["rounds"])))

    run_in_process(make_server_app(factory, outcomes.append), grid_of(toy_sites()), {"rounds": 2})
    (outcome,) = outcomes
    assert outcome.state.round == 2
    assert_same_parts(outcome.parts, run(toy_sites(), config(rounds=2)).parts)


def test_a_failing_run_raises_and_reports_no_outcome() -> None:
    outcomes: list[Outcome] = []
    app = make_server_app(lambda _: strategy(), outcomes.append)
    with pytest.raises(RunError):
        run_in_process(app, grid_of(toy_sites(1)))
    assert outcomes == []


def test_flower_says_nothing_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def chatty(context: Context) -> FederatedStrategy:
        logging.getLogger("flwr").info("[ROUND 1/3]")
        return strategy()

    run_in_process(make_server_app(chatty, lambda _: None), grid_of(toy_sites()))
    assert [record for record in caplog.records if record.name.startswith("flwr")] == []
