import pytest

from fedlr.errors import ConfigError
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.combine import weighted_mean
from fedlr.methods.registry import METHODS, build


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_registered_under_its_own_name(name: str) -> None:
    assert build(name, orthonormal).name == name
    assert build(name, orthonormal) == METHODS[name](orthonormal, weighted_mean)


def test_an_unknown_name_lists_every_known_one() -> None:
    with pytest.raises(ConfigError, match="'fedsdv' is unknown") as caught:
        build("fedsdv", orthonormal)
    assert all(name in str(caught.value) for name in METHODS)
