"""Settings are checked where they are made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.outcome import Checkpoint
from tests.server.toys import config, first_state

WRONG: list[dict[str, object]] = [
    {"rounds": 0},
    {"clients": 0},
    {"clients_per_round": 0},
    {"clients_per_round": 5},
    {"min_clients": 0},
    {"min_clients": 4},
    {"evaluate_every": 0},
    {"average_rounds": 0},
    {"weights": "size"},
    {"update_norm_bound": 0.0},
    {"round_timeout_s": -1.0},
    {"start_timeout_s": 0.0},
    {"start_timeout_s": float("inf")},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_wrong_setting_is_named(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} = .* must be"):
        config(**change)


def test_the_limits_themselves_are_valid() -> None:
    settings = config(clients=4, clients_per_round=4, min_clients=4, update_norm_bound=1e-9)
    assert settings.min_clients == settings.clients


def test_a_checkpoint_is_between_rounds() -> None:
    with pytest.raises(ValueError, match=r"state\.phase = 1"):
        Checkpoint(replace(first_state(), phase=1))
