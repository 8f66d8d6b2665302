"""Sharing within a process: made once for everything it depends on, and never a changed bit."""

from __future__ import annotations

import pytest
import torch

from fedlr.build import Workbench, build
from fedlr.config import RunConfig
from fedlr.errors import ModelError
from fedlr.methods.method import Parts, Role
from fedlr.privacy.noise import public_stream
from fedlr.reuse import Reuse
from fedlr.training.local import LocalTask
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
