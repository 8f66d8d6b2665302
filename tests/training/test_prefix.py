"""Replaying the frozen lower layers changes nothing; where it would, nothing is cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlr.adapters.inject import inject
from fedlr.build import build
from fedlr.data.batching import TokenisedDataset
from fedlr.data.store import Store
from fedlr.lowrank.factors import AdapterSite
from fedlr.methods.method import Role
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream
from fedlr.training import prefix as module
from fedlr.training.classifier import Classifier
from fedlr.training.local import LocalTask
from fedlr.training.prefix import PrefixCache, cache_prefix, find_prefix
from tests.models import FAMILIES, LONGEST, PAD, VOCABULARY, WIDTH, Tiny, encoder, rows, tiny
from tests.models import units_of as units
from tests.test_build import config, saved
from tests.test_build import train as trained

DATA = rows([5, 3, LONGEST, 7, 2, 9, 4, 6])
ROLES = frozenset({Role.B, Role.HEAD})
SMALL = {"max_examples": 60}
NESTED = [family for family in FAMILIES if family != "albert"]


def with_prefix(model: Tiny, data: TokenisedDataset) -> tuple[Tiny, TokenisedDataset]:
    prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
    assert prefix is not None
    cached = cache_prefix(model.adapted.encoder, prefix, data, 3, 1)
    classifier = Classifier(model.adapted.encoder, model.classifier.head, prefix).eval()
    return replace(model, classifier=classifier), cached


@pytest.mark.parametrize("family", NESTED)
def test_replay_equals_the_whole_encoder_in_logits_and_training(family: str) -> None:
    plain = tiny(family, layers=3, on=[2])
    model, cached = with_prefix(tiny(family, layers=3, on=[2]), DATA)
    assert cached.hidden is not None
    assert cached.hidden.shape == (len(DATA.tokens), WIDTH)
    drawn = np.array([4, 2, 0])
    with torch.no_grad():
        expected = plain.classifier(DATA.batch(drawn))
        found = model.classifier(cached.batch(drawn))
        again = model.classifier(DATA.batch(drawn))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(again, expected)  # rows without cached states run every layer

    one = Mechanism(
        0.5, clip_groups([k for k in plain.parts() if k.role in ROLES], 0.5, None), 0.0, 4
    )
    stream = public_stream("t")
    task = LocalTask(plain.parts(), ROLES, 1.0, one, stream, stream)
    left = plain.trainer(DATA, steps=3).train(task, units([1, 2, 1]))
    right = model.trainer(cached, steps=3).train(task, units([1, 2, 1]))
    assert left.keys() == right.keys()
    for key in left:
        assert torch.allclose(left[key], right[key], rtol=0, atol=1e-5), key


def test_the_skipped_layers_do_not_run_and_come_back() -> None:
    model, cached = with_prefix(tiny(layers=3, on=[1, 2]), DATA)
    layer = model.adapted.encoder.get_submodule("base_model.model.encoder.layer.0.intermediate")
    runs: list[int] = []
    handle = layer.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model.classifier(cached.batch(np.array([0])))
        assert runs == []
        model.classifier(DATA.batch(np.array([0])))
        assert runs == [1]
    handle.remove()
    broken = replace(cached.batch(np.array([0])), hidden=torch.zeros(1, 1, WIDTH + 1))
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.classifier(broken)
    with torch.no_grad():
        plain = tiny(layers=3, on=[1, 2]).classifier(DATA.batch(np.array([0])))
        assert torch.equal(model.classifier(DATA.batch(np.array([0]))), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_the_first_layer_leaves_no_prefix(family: str) -> None:
    model = tiny(family)
    assert find_prefix(model.adapted.encoder, model.adapted.sites) is None


def test_adapters_outside_one_list_of_layers_leave_no_prefix() -> None:
    model = tiny(layers=3, on=[2])
    elsewhere = AdapterSite("decoder.layer.1.query", 4, 4, 1, 1.0)
    assert find_prefix(model.adapted.encoder, [*model.adapted.sites, elsewhere]) is None


def test_no_adapter_no_prefix() -> None:
    assert find_prefix(tiny().adapted.encoder, []) is None


@pytest.mark.parametrize(
    ("layers", "groups", "inner", "modules", "on"),
    [
        (4, 2, 1, ["query"], [-1]),  # group 0 is called twice below group 1
        (4, 1, 2, ["1.attention.query"], None),  # group 0 runs below and above its own inner layer
    ],
)
def test_a_prefix_that_is_called_again_is_not_cached(
    layers: int, groups: int, inner: int, modules: Sequence[str], on: list[int] | None
) -> None:
    base = encoder("albert", layers, num_hidden_groups=groups, inner_group_num=inner)
    adapted, sites = inject(base, modules, on, 2, 2.0)
    prefix = find_prefix(adapted, sites)
    assert prefix is None or cache_prefix(adapted, prefix, DATA, 3, 1) is DATA


def test_groups_that_are_called_once_each_may_be_cached() -> None:
    base = encoder("albert", 2, num_hidden_groups=2)
    adapted, sites = inject(base, ["query"], [-1], 2, 2.0)
    prefix = find_prefix(adapted, sites)
    assert prefix is not None
    assert cache_prefix(adapted, prefix, DATA, 3, 1).hidden is not None


def test_layers_whose_attributes_the_encoder_reads() -> None:
    """ModernBERT asks every layer for its kind of attention."""
    import transformers

    library: Any = transformers
    config = library.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=4 * LONGEST,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )
    base: nn.Module = library.ModernBertModel(config).eval().requires_grad_(False)
    adapted, sites = inject(base, ["Wqkv"], [2], 2, 2.0)
    prefix = find_prefix(adapted, sites)
    assert prefix is not None
    assert prefix.depth == 2
    cached = cache_prefix(adapted, prefix, DATA, 3, 1)
    assert cached.hidden is not None
    batch = cached.batch(np.array([2, 0]))
    assert batch.hidden is not None
    with torch.no_grad():
        whole = adapted(**batch.inputs()).last_hidden_state
        with prefix.replayed(batch.hidden):
            replayed = adapted(**batch.inputs()).last_hidden_state
    real = batch.attention_mask.bool()
    assert torch.allclose(whole[real], replayed[real], rtol=0, atol=1e-5)


def test_a_cache_above_the_limit_and_an_empty_set_come_back_as_they_were() -> None:
    model = tiny(layers=3, on=[2])
    prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
    assert prefix is not None
    # One megabyte holds 1,000,000 / (4·16) = 15,625 tokens.
    for last, fits in ((13, True), (14, False)):
        data = rows([12] * 1301 + [last])
        found = cache_prefix(model.adapted.encoder, prefix, data, 128, 1)
        assert (found.hidden is not None) is fits
        assert (found is data) is not fits
    assert cache_prefix(model.adapted.encoder, prefix, DATA, 3, 0) is DATA
    empty = rows([])
    assert cache_prefix(model.adapted.encoder, prefix, empty, 3, 1) is empty


class Pairs(nn.Module):
    """A layer that returns a tuple."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden, None


class Odd(nn.Module):
    """An encoder of such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 4})
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.layer = nn.ModuleList([Pairs(), Pairs()])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embedding(input_ids)
        for layer in self.layer:
            hidden = layer(hidden)[0]
        return hidden


def test_layers_that_return_no_tensor_are_not_cached() -> None:
    model = Odd()
    prefix = find_prefix(model, [AdapterSite("layer.1.query", 4, 4, 1, 1.0)])
    assert prefix is not None
    assert cache_prefix(model, prefix, DATA, 3, 1) is DATA


def test_padding_takes_nothing_from_the_first_row() -> None:
    """Padded positions are zeros even where the first token's states are no numbers."""
    hidden = torch.ones(len(DATA.tokens), WIDTH)
    hidden[0] = torch.nan
    batch = replace(DATA, hidden=hidden).batch(np.array([2, 4]))
    assert batch.hidden is not None
    assert torch.isfinite(batch.hidden).all()
    assert (batch.hidden[1, 2:] == 0).all()


def cached_by(
    model: Tiny, store: Store | None, said: list[str] | None = None, **changes: Any
) -> TokenisedDataset:
    """The rows with states that ``store`` keeps; a made-up digest names the base."""
    prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
    assert prefix is not None
    say = ([] if said is None else said).append
    values: dict[str, Any] = {"size": 3, "tokens": 20, "megabytes": 1, "base_sha256": "base"}
    cache = PrefixCache(**{**values, **changes}, store=store, say=say)
    return cache.fill(model.adapted.encoder, prefix, DATA)


def bits(data: TokenisedDataset) -> Tensor:
    assert data.hidden is not None
    return data.hidden.clone().view(torch.int32)


@pytest.mark.parametrize("piece", [1, 4 * WIDTH * 15, 1 << 26])
def test_memory_and_disk_give_the_same_bits(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also row by row, and in pieces of some rows on their way to the disk."""
    whole = cached_by(tiny(layers=3, on=[2]), None)
    monkeypatch.setattr(module, "_PIECE_BYTES", piece)
    model, said = tiny(layers=3, on=[2]), list[str]()
    store = Store.open(str(tmp_path / "cache"), said.append)
    in_memory = cached_by(model, None)
    written = cached_by(model, store, said)
    assert [line.split(" in ")[0] for line in said] == [
        "computing the 2 frozen layers below the adapters once",
        "keeping 3.1 kB of hidden states",
    ]
    runs: list[int] = []
    hook = model.adapted.encoder.register_forward_hook(lambda *_: runs.append(1))
    mapped = cached_by(model, store, said)
    hook.remove()
    assert len(runs) == 2  # the look whether they are this model's, and nothing else
    assert len(said) == 2
    assert torch.equal(bits(in_memory), bits(written))
    assert torch.equal(bits(in_memory), bits(mapped))
    assert torch.allclose(bits(whole).view(torch.float32), in_memory.hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * len(DATA), [1, 4, 3]], ids=["example", "user"])
def test_updates_are_those_without_the_prefix(sizes: list[int], tmp_path: Path) -> None:
    """Dry mode, three steps: to 1e-6 without a cache, and bit for bit between the two kinds."""
    store = Store.open(str(tmp_path / "cache"), print)
    found = []
    for kind in ("none", "memory", "disk", "disk"):
        model = tiny(layers=3, on=[2])
        start = model.parts()
        data = DATA if kind == "none" else cached_by(model, store if kind == "disk" else None)
        prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
        classifier = Classifier(model.adapted.encoder, model.classifier.head, prefix).eval()
        trainer = replace(model, classifier=classifier).trainer(data, steps=3)
        groups = clip_groups([key for key in start if key.role in ROLES], 0.5, None)
        stream = public_stream("same")
        task = LocalTask(start, ROLES, 0.7, Mechanism(0.5, groups, 0.0, 4), stream, stream)
        found.append(trainer.train(task, units(sizes)))
    none, memory, *disk = found
    for key in none:
        assert float((none[key] - memory[key]).abs().max()) < 1e-6
        assert all(torch.equal(memory[key], other[key]) for other in disk)
    assert any(not torch.equal(none[key], start[key]) for key in none)


def test_a_full_disk_leaves_them_in_memory(tmp_path: Path) -> None:
    model, said = tiny(layers=3, on=[2]), list[str]()
    store = Store.open(str(tmp_path / "cache"), said.append)
    store.folder.rmdir()
    found = cached_by(model, store, said)
    assert torch.equal(bits(found), bits(cached_by(model, None)))
    assert any("cannot keep" in line and "goes on without" in line for line in said)


def test_states_that_are_too_large_are_said_to_be(tmp_path: Path) -> None:
    said: list[str] = []
    model = tiny(layers=3, on=[2])
    prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
    assert prefix is not None
    data = rows([12] * 1301 + [14])  # one token more than 1 MB holds
    store = Store.open(str(tmp_path / "cache"), said.append)
    for place in (None, store):
        cache = PrefixCache(128, None, 1, store=place, say=said.append)
        assert cache.fill(model.adapted.encoder, prefix, data) is data
    assert (
        said
        == [
            "the 2 frozen layers are computed in every pass: kernels.prefix_cache_mb = 1 is less "
            "than the 2 MB of their output"
        ]
        * 2
    )
    assert list(store.folder.iterdir()) == []


def test_states_of_another_model_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    """A library that computes the layers otherwise than the one that filled the folder did."""
    said: list[str] = []
    store = Store.open(str(tmp_path / "cache"), said.append)
    cached_by(tiny(layers=3, on=[2], seed=1), store)
    model = tiny(layers=3, on=[2])
    found = cached_by(model, store, said)
    assert "the frozen layers that were kept are not those of this model" in said
    assert torch.equal(bits(found), bits(cached_by(model, None)))
    said.clear()
    cached_by(model, store, said)
    assert said == []


def test_fewer_bits_without_own_shapes_are_not_kept() -> None:
    model, said = tiny(layers=3, on=[2]), list[str]()
    for value in model.adapted.encoder.parameters():
        value.data = value.data.to(torch.bfloat16)
    assert cached_by(model, None, said) is DATA
    assert said == ["the frozen layers are computed in every pass: they are not float32"]


def test_a_built_run_keeps_and_maps_what_it_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run neither tokenises nor runs the lower layers, and trains to the same bits."""
    name = saved(encoder("bert", layers=3), tmp_path / "bert")
    kept = {"cache": str(tmp_path / "cache")}
    plain = build(config(name, adapter={"layers": "top:1"}))
    first = build(config(name, adapter={"layers": "top:1"}, data={**SMALL, **kept}))
    monkeypatch.setattr("fedlr.data.store.tokenise", lambda *_: pytest.fail("tokenised"))
    monkeypatch.setattr(PrefixCache, "_pieces", lambda *_: pytest.fail("computed"))
    said: list[str] = []
    second = build(config(name, adapter={"layers": [-1]}, data={**SMALL, **kept}), said.append)
    assert not any("frozen" in line or "keeping" in line for line in said)
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert names == ["states", "states", "tokens", "tokens"]  # train and validation
    one, other, third = trained(plain), trained(first), trained(second)
    for key in one:
        assert torch.equal(one[key], other[key])
        assert torch.equal(one[key], third[key])
