"""Sharing within a process: made once for everything it depends on, and never a changed bit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from fedlr.build import Workbench, build, source_spec
from fedlr.config import RunConfig
from fedlr.data.batching import TokenisedDataset
from fedlr.errors import ModelError
from fedlr.methods.method import PartKey, Parts, Role
from fedlr.privacy.noise import public_stream
from fedlr.reuse import Reuse, base_key, rows_key, with_states
from fedlr.training.local import LocalTask
from fedlr.training.prefix import FrozenPrefix, PrefixCache
from tests.models import LONGEST, encoder
from tests.test_build import config, saved


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(encoder("bert", layers=3), tmp_path_factory.mktemp("model") / "bert")


def upper(name: str, rank: int = 2) -> RunConfig:
    """Adapters in the last layer only: two frozen ones below are computed once."""
    return config(name, adapter={"layers": [-1], "rank": rank})


def test_a_value_is_made_once_for_its_key_and_few_are_kept() -> None:
    made: list[str] = []

    def get(key: str, keep: int = 1, kind: str = "any") -> str:
        return reuse.get(kind, key, lambda: made.append(key) or f"value of {key}", keep)  # type: ignore[func-returns-value]

    reuse = Reuse()
    assert [get(key) for key in "aabba"] == [f"value of {key}" for key in "aabba"]
    assert made == list("aba")
    made.clear()
    assert [get(key, 2, "other") for key in "abacbab"]
    # The one used longest ago goes: b for c, a for b, c for a.
    assert made == list("abcba")
    made.clear()
    reuse = Reuse(on=False)
    assert [get(key) for key in "aa"] == ["value of a"] * 2
    assert made == list("aa")


def test_what_cannot_be_made_is_not_kept() -> None:
    reuse = Reuse()
    with pytest.raises(ZeroDivisionError):
        reuse.get("any", 1, lambda: 1 // 0)
    assert reuse.get("any", 1, lambda: "now") == "now"


def test_the_old_value_goes_before_the_new_one_is_made() -> None:
    reuse, kept = Reuse(), {"old"}

    class Value:
        def __del__(self) -> None:
            kept.discard("old")

    reuse.get("any", 1, Value)
    reuse.get("any", 2, lambda: kept.copy())
    assert reuse.get("any", 2, lambda: {"made again"}) == set()


def shares(one: Workbench, other: Workbench) -> dict[str, bool]:
    mine, theirs = (
        {
            key.replace(".base_layer", ""): value.data_ptr()
            for key, value in bench.adapted.encoder.named_parameters()
            if "lora_" not in key
        }
        for bench in (one, other)
    )
    return {
        "weights": mine == theirs,
        "data": one.data is other.data,
        "states": one.trainer._data is other.trainer._data,
    }


def test_weights_and_rows_are_shared_and_adapters_are_not(name: str) -> None:
    reuse = Reuse()
    one, other = (build(upper(name, rank), reuse=reuse) for rank in (2, 4))
    assert shares(one, other) == {"weights": True, "data": True, "states": True}
    assert one.trainer._data.hidden is not None
    alone = build(upper(name))
    assert shares(one, alone) == {"weights": False, "data": False, "states": False}
    ranks = [next(iter(b.adapted.parameters().values())).shape[0] for b in (one, other)]
    assert ranks == [2, 4]
    assert not any(value.requires_grad for value in one.base.encoder.parameters())


def test_what_decides_a_value_is_in_its_key(name: str) -> None:
    reuse, first = Reuse(), upper(name)
    one = build(first, reuse=reuse)
    longer = build(config(name, adapter={"layers": [-1]}, model={"max_length": 8}), reuse=reuse)
    assert longer.trainer._data.tokens.shape != one.trainer._data.tokens.shape
    fewer = build(config(name, data={"max_examples": 30}, adapter={"layers": [-1]}), reuse=reuse)
    assert len(fewer.trainer._data) == 30
    none = build(config(name, adapter={"layers": None}), reuse=reuse)
    assert none.trainer._data.hidden is None


def test_a_changed_weight_is_noticed(name: str) -> None:
    reuse = Reuse()
    bench = build(upper(name), reuse=reuse)
    with torch.no_grad():
        next(bench.base.encoder.parameters()).mul_(1.5)
    with pytest.raises(ModelError, match="were changed by a run"):
        build(upper(name), reuse=reuse)


def test_a_residual_of_one_run_is_not_in_the_next(name: str) -> None:
    """The weights are shared: they are the same objects and bits while one run has it folded."""
    reuse, given = Reuse(), upper(name)
    one = build(given, reuse=reuse)
    draws = torch.Generator().manual_seed(0)
    parts = dict(one.method.init(one.layout, draws).parts)
    for key in [key for key in parts if key.role is Role.HEAD]:  # one of zeros tells nothing
        parts[key] = torch.randn(parts[key].shape, generator=draws)
    before = one.evaluator(parts)
    folded = dict(parts)
    for site in one.layout.sites:
        folded[PartKey(site.name, Role.RESIDUAL_B)] = torch.ones(site.out_features, 1)
        folded[PartKey(site.name, Role.RESIDUAL_A)] = torch.ones(1, site.in_features)
    assert one.evaluator(folded) != before
    other = build(given, reuse=reuse)  # it would say that the weights were changed
    assert other.evaluator(parts) == before
    assert one.evaluator(folded) != before
    assert one.evaluator(parts) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_sharing_changes_no_bit_of_any_base(name: str, precision: str) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="4-bit weights are in the extra '4bit'")
    # Plain training in bfloat16: the private path fills every row up, and takes long.
    mode = "none" if precision == "bfloat16" else "dry"
    model = {"name": name, "max_length": LONGEST, "precision": precision}
    given = config(name, model=model, adapter={"layers": [-1], "rank": 2}, privacy={"mode": mode})
    reuse = Reuse()
    build(given, reuse=reuse)
    shared, alone = build(given, reuse=reuse), build(given)
    if precision != "bfloat16":
        assert torch.equal(hidden(shared), hidden(alone))
    parts = shared.method.init(shared.layout, torch.Generator().manual_seed(0)).parts
    found = [stepped(bench, parts) for bench in (shared, alone)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert shared.evaluator(parts) == alone.evaluator(parts)


def stepped(bench: Workbench, parts: Parts) -> Parts:
    """Train one client on every one of its rows, plainly."""
    public = public_stream("test")
    task = LocalTask(parts, frozenset({Role.B}), 1.0, None, public, public)
    return bench.trainer.train(task, bench.clients[0].units)


def hidden(bench: Workbench) -> torch.Tensor:
    assert bench.trainer._data.hidden is not None
    return bench.trainer._data.hidden


def deeper(name: str) -> RunConfig:
    return config(name, adapter={"layers": [-2, -1]})


def drawn(name: str, seed: int) -> RunConfig:
    given = config(name, adapter={"layers": [-1]}, model={"name": name, "random_weights": True})
    return replace(given, seed=seed)


def narrow(name: str) -> RunConfig:
    kept = upper(name)
    model = replace(kept.model, precision="bfloat16")
    return replace(kept, model=model, privacy=replace(kept.privacy, mode="none"))


def plain(name: str) -> RunConfig:
    kept = upper(name)
    return replace(kept, privacy=replace(kept.privacy, mode="none"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (upper, deeper),
        (deeper, upper),
        (plain, narrow),
        (lambda name: drawn(name, 0), lambda name: drawn(name, 1)),
        (upper, lambda name: config(name, adapter={"layers": [-1]}, model={"max_length": 8})),
    ],
    ids=["deeper", "less deep", "precision", "drawn weights", "length"],
)
def test_what_another_run_left_changes_no_bit(
    name: str, before: Callable[[str], RunConfig], after: Callable[[str], RunConfig]
) -> None:
    reuse = Reuse()
    build(before(name), reuse=reuse)
    shared, alone = build(after(name), reuse=reuse), build(after(name))
    mine, theirs = (bench.base.encoder.state_dict() for bench in (shared, alone))
    frozen = [key for key in mine if "lora_" not in key]
    assert all(torch.equal(mine[key], theirs[key]) for key in frozen)
    assert all(mine[key].dtype == theirs[key].dtype for key in frozen)
    rows, same = shared.trainer._data.tokens, alone.trainer._data.tokens
    assert np.array_equal(rows, same)
    if after is not narrow:  # whose states do not replay to the bit, so none are kept
        assert torch.equal(hidden(shared), hidden(alone))
    parts = shared.method.init(shared.layout, torch.Generator().manual_seed(0)).parts
    found = [stepped(bench, parts) for bench in (shared, alone)]
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_another_model_has_rows_and_weights_of_its_own(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = saved(encoder("bert", layers=3, seed=1), tmp_path_factory.mktemp("other") / "bert")
    reuse = Reuse()
    one, two = (build(upper(given), reuse=reuse) for given in (name, other))
    assert shares(one, two) == {"weights": False, "data": True, "states": False}
    assert torch.equal(hidden(two), hidden(build(upper(other))))


CPU = torch.device("cpu")


def test_the_keys_of_rows_and_weights_have_all_that_decides_them() -> None:
    given = config("a")
    model, data = given.model, given.data
    rows = [
        given,
        replace(given, model=replace(model, name="b")),
        replace(given, model=replace(model, revision="1" * 40)),
        replace(given, model=replace(model, max_length=8)),
        replace(given, data=replace(data, cache="elsewhere")),
        replace(given, data=replace(data, max_examples=30)),
    ]
    assert len({rows_key(one, source_spec(one)) for one in rows}) == len(rows)
    weights = [
        *rows[:4],
        replace(given, model=replace(model, sha256="0" * 64)),
        replace(given, model=replace(model, precision="bfloat16")),
        *(replace(given, seed=seed, model=replace(model, random_weights=True)) for seed in (0, 1)),
    ]
    assert len({base_key(one, CPU) for one in weights}) == len(weights)
    # A seed that draws no weights leaves them as they are.
    assert base_key(replace(given, seed=5), CPU) == base_key(given, CPU)


class Filling:
    """Stands for a cache: counts how often states are computed."""

    def __init__(self, **passes: int | None) -> None:
        usual: dict[str, int | None] = dict.fromkeys(("tokens", "megabytes", "own_shapes"))
        self.__dict__.update({"size": 1, **usual, **passes})
        self.made = 0

    def fill(self, *_: object) -> TokenisedDataset:
        self.made += 1
        return cast(TokenisedDataset, object())


class Depth:
    def __init__(self, depth: int) -> None:
        self.depth = depth


def test_states_are_computed_again_for_all_that_decides_their_last_bits() -> None:
    reuse, rows = Reuse(), cast(Any, (None, None))

    def computed(key: Hashable = "rows", depth: int = 1, **passes: int | None) -> bool:
        cache = Filling(**passes)
        frozen = (nn.Identity(), cast(FrozenPrefix, Depth(depth)))
        with_states(rows, cast(PrefixCache, cache), frozen, True, reuse, key)
        assert cache.made in (0, 2)
        return cache.made == 2

    assert computed()
    assert not computed()
    changes: list[dict[str, Any]] = [{"key": "other rows"}, {"depth": 2}]
    changes += [{name: 2} for name in ("size", "tokens", "megabytes", "own_shapes")]
    for change in changes:
        assert computed(**change), change
        assert computed(), change
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert computed()
    finally:
        torch.set_num_threads(threads)
