"""Errors cross processes as they are: engines and pools pickle them."""

from __future__ import annotations

import pickle

import pytest

from fedlr import errors
from fedlr.errors import BadUpdate, ConfigError, FedlrError, OrderRefused


def every_kind() -> list[FedlrError]:
    """One of each class of the module."""
    made: list[FedlrError] = []
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, FedlrError):
            if value is ConfigError:
                made.append(ConfigError(["one", "two"]))
            elif value is BadUpdate:
                made.append(BadUpdate("norm", "too large"))
            elif value is OrderRefused:
                made.append(OrderRefused("unsigned", "altered"))
            else:
                made.append(value("a sentence"))
    return made


@pytest.mark.parametrize("error", every_kind(), ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_to_another_process(error: FedlrError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.exit_code == error.exit_code
