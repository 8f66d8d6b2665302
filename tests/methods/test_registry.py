import pytest

from fedlr.errors import ConfigError
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.combine import weighted_mean
from fedlr.methods.combiners import build as combiner
from fedlr.methods.hetlora import HetLoRA
from fedlr.methods.registry import METHODS, Options, build


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_registered_under_its_own_name(name: str) -> None:
    assert build(name, orthonormal).name == name
    assert build(name, orthonormal) == METHODS[name](orthonormal, weighted_mean)


def test_an_unknown_name_lists_every_known_one() -> None:
    with pytest.raises(ConfigError, match="'fedsdv' is unknown") as caught:
        build("fedsdv", orthonormal)
    assert all(name in str(caught.value) for name in METHODS)


def test_an_option_reaches_the_method_that_has_it_and_no_other() -> None:
    options = Options(norm_weighting=False, pruning=0.5)
    found = build("hetlora", orthonormal, options=options)
    assert found == HetLoRA(orthonormal, norm_weighting=False, pruning=0.5)
    with pytest.raises(ConfigError, match=r"method\.pruning = 0\.5 but method\.name = flora"):
        build("flora", orthonormal, options=options)


@pytest.mark.parametrize("name", METHODS)
def test_a_combiner_is_refused_where_the_method_needs_the_mean(name: str) -> None:
    median = combiner("coordinate_median")
    if METHODS[name].facts.combiners:
        assert build(name, orthonormal, median).name == name
    else:
        with pytest.raises(ConfigError, match=f"{name} needs the weighted mean"):
            build(name, orthonormal, median)
