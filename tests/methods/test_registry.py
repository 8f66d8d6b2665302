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


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["weighted_mean", "coordinate_median"])
def test_a_filter_is_refused_where_it_would_not_filter_all(name: str, kind: str) -> None:
    filtered, facts = combiner(kind, consensus=0.5), METHODS[name].facts
    if facts.consensus:
        assert build(name, orthonormal, filtered).name == name
        return
    with pytest.raises(ConfigError) as caught:
        build(name, orthonormal, filtered)
    assert (
        f"combine.consensus is set but not all that method.name = {name} averages is filtered by "
        "it; set combine.consensus=null, or one of fedsvd, ffa_lora, rolora, fedavg_lora"
    ) in str(caught.value)
    assert ("needs the weighted mean" in str(caught.value)) == (
        kind != "weighted_mean" and not facts.combiners
    )
