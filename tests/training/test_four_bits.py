"""A base in 4 bits is a float32 base with other weights: same gradients, same bound, blind rows."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlr.adapters.export import Trained, merge
from fedlr.adapters.quantised import dense_weight, is_quantised, missing_package
from fedlr.build import check_names, kernel_call, local_settings, provenance
from fedlr.config import from_mapping
from fedlr.data.store import Store
from fedlr.errors import ConfigError, ModelError
from fedlr.kernels.dispatch import choose
from fedlr.methods.method import PartKey
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.gradients import GRADIENTS
from fedlr.privacy.noise import public_stream
from fedlr.training import base as bases
from fedlr.training.base import BaseModel, load_base
from fedlr.training.classifier import Classifier
from fedlr.training.fused import train_together
from fedlr.training.local import LocalTask
from fedlr.training.precision import cast_base, notices
from fedlr.training.prefix import PrefixCache, _kinds, find_prefix
from tests.data.helpers import word_tokenizer
from tests.models import FAMILIES, Tiny, encoder, tiny
from tests.training.test_precision import (
    DATA,
    LENGTHS,
    ROLES,
    SIZES,
    SLACK,
    client,
    clipped_sum,
    largest_change,
    wide,
)

needs_package = pytest.mark.skipif(
    missing_package() is not None, reason="bitsandbytes is in the extra '4bit'"
)
PATHS = ("captured", "opacus", "autograd")
NF4 = from_mapping({"model": {"precision": "nf4"}})


def written_out(model: Tiny, family: str, checkpointing: bool = False) -> Tiny:
    """The float32 model of the weights that ``model``'s bits stand for."""
    dense = tiny(family, checkpointing=checkpointing)
    for name, layer in model.adapted.encoder.named_modules():
        if is_quantised(layer):
            dense.adapted.encoder.get_submodule(name).weight.copy_(dense_weight(layer))
    return dense


def gradients(model: Tiny, path: str, drawn: list[int]) -> dict[PartKey, Tensor]:
    """Gradients of every movable array, a unit a row."""
    trained = model.adapted.select_trained(ROLES)
    batch = DATA.batch(np.array(drawn))
    index = torch.arange(len(drawn))
    losses = partial(model.classifier.losses, batch)
    return GRADIENTS[path](model.classifier, trained)(losses, index, len(drawn))


def flat(found: dict[PartKey, Tensor]) -> Tensor:
    """Each unit's whole gradient, a row."""
    return torch.cat([found[key].flatten(1) for key in sorted(found)], dim=1)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a unit's gradient, relative to that gradient."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@needs_package
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unit_gradients_are_those_of_the_written_out_model(
    family: str, path: str, checkpointing: bool
) -> None:
    model = tiny(family, precision="nf4", checkpointing=checkpointing)
    drawn = list(range(6))
    expected = gradients(written_out(model, family, checkpointing), path, drawn)
    found = gradients(model, path, drawn)
    assert found.keys() == expected.keys()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert apart(flat(found), flat(expected)) <= 1e-5
    other = gradients(tiny(family), path, drawn)  # the weights before they were rounded
    assert apart(flat(other), flat(expected)) > 1e-2


@needs_package
def test_a_rows_gradient_is_the_same_alone_and_in_company() -> None:
    """Companions of every length; first, last and among few: the rounding of float32."""
    model = wide("nf4")
    for row in (0, 4, 9):
        alone = flat(gradients(model, "captured", [row]))
        others = [other for other in range(len(LENGTHS)) if other != row]
        for drawn in ([row, *others], [*others, row], [*others[:3], row]):
            found = flat(gradients(model, "captured", drawn))[drawn.index(row)]
            assert apart(found[None], alone) <= 3e-5


@needs_package
@pytest.mark.parametrize("gradients_path", ["captured", "autograd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_moves_the_sum_by_at_most_the_clip(family: str, gradients_path: str) -> None:
    model = tiny(family, precision="nf4", checkpointing=family == "bert")
    trainer = model.trainer(DATA, gradients=gradients_path, physical_batch=3)
    assert 0.9 <= largest_change(trainer, model) <= 1 + SLACK


@needs_package
def test_a_wide_model_keeps_the_bound_without_shapes_of_its_own() -> None:
    model = wide("nf4")
    trainer = model.trainer(DATA, physical_batch=8)
    assert 0.9 <= largest_change(trainer, model) <= 1 + SLACK


@needs_package
def test_rows_need_no_shape_of_their_own() -> None:
    assert local_settings(NF4).own_shapes is None
    tokens = {"model": {"precision": "nf4"}, "kernels": {"tokens_per_batch": 512}}
    assert local_settings(from_mapping(tokens)).tokens_per_batch == 512


@needs_package
def test_clients_that_share_passes_train_as_they_do_alone() -> None:
    model = tiny(precision="nf4")
    trainer, parts = model.trainer(DATA), model.parts()
    groups = clip_groups([key for key in parts if key.role in ROLES], 0.5, None)
    stream = public_stream("t")
    task = LocalTask(parts, ROLES, 1.0, Mechanism(0.5, groups, 0.0, 1), stream, stream)
    units = [client([0, 1]), client([2, 3])]
    together = train_together(trainer, [task, task], units)
    for found, mine in zip(together, units, strict=True):
        expected = trainer.train(task, mine)
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=0, atol=1e-5)


@needs_package
def test_the_cached_prefix_is_that_of_the_bits(tmp_path: Path) -> None:
    caches, store = {}, Store.open(str(tmp_path / "store"), lambda _: None)
    for precision in ("float32", "nf4"):
        model = tiny(layers=3, on=[2], precision=precision)
        prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
        assert prefix is not None
        caches[precision] = PrefixCache(4, None, 1, "base", store).fill(
            model.adapted.encoder, prefix, DATA
        )
        assert caches[precision].hidden is not None
        assert ("nf4" in _kinds(prefix)) is (precision == "nf4")
        classifier = Classifier(model.adapted.encoder, model.classifier.head, prefix).eval()
        replayed = dataclasses.replace(model, classifier=classifier)
        found = clipped_sum(
            replayed.trainer(caches[precision]), model, units := list(range(len(SIZES)))
        )
        expected = clipped_sum(model.trainer(DATA), model, units)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(caches["nf4"].hidden, caches["float32"].hidden, rtol=0, atol=1e-3)


@needs_package
def test_merging_writes_out_the_bits_and_adds_the_update() -> None:
    model = tiny(precision="nf4", checkpointing=True)
    head = {f"head.{name}": value for name, value in model.classifier.head.state_dict().items()}
    trained = Trained(model.adapted, model.parts(), head, {})
    merged = merge(trained)
    for site, pair in trained.factors().items():
        layer = model.adapted.encoder.get_submodule(f"base_model.model.{site.name}.base_layer")
        update = pair.scaling * pair.b.double() @ pair.a.double()
        wanted = (dense_weight(layer).double() + update).float()
        assert torch.equal(merged.get_submodule(site.name).get_parameter("weight"), wanted)
    assert {value.dtype for value in merged.parameters()} == {torch.float32}
    assert not any(map(is_quantised, merged.modules()))
    assert any(map(is_quantised, model.adapted.encoder.modules()))
    batch = DATA.batch(np.arange(4))
    with torch.no_grad():
        found = Classifier(merged, model.classifier.head).eval()(batch)
        expected = model.classifier(batch)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_sites_of_other_bits_do_not_agree() -> None:
    base = BaseModel(nn.Identity(), word_tokenizer(), "base", "tokenizer", "tiny")
    found = [
        provenance(from_mapping({"model": {"precision": precision}}), base, ("a", "b"))
        for precision in ("float32", "bfloat16", "nf4")
    ]
    assert len({one.labels for one in found}) == 3
    assert {one.base for one in found} == {"base"}  # of the file, so of the weights in float32


def test_no_kernel_reads_4_bits() -> None:
    call = kernel_call(NF4)
    assert (call.dtype, call.quantised) == (torch.float32, True)
    chosen = choose("lora_linear", call)
    assert chosen.implementation == "naive"
    assert "stored in 4 bits" in chosen.reason
    with pytest.raises(ConfigError, match=r"lora_linear cannot run it: .*stored in 4 bits"):
        choose("lora_linear", call, "triton")
    assert "4 bits" not in choose("clipped_sum", call).reason


def test_a_missing_package_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fedlr.build

    for module in (bases, fedlr.build):
        monkeypatch.setattr(module, "missing_package", lambda: "install 'fedlr[4bit]'")
    with pytest.raises(ConfigError, match=r"fedlr\[4bit\]"):
        load_base("no such folder", precision="nf4")
    with pytest.raises(ConfigError, match=r"fedlr\[4bit\]"):
        check_names(NF4)
    check_names(from_mapping({"model": {"precision": "bfloat16"}}))


class ReadsWeights(nn.Module):
    """An encoder whose own code multiplies by a layer's weight, whatever that holds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.layer, self.how = nn.Embedding(20, 8), nn.Linear(8, 8), how

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        del attention_mask
        states = self.layer(self.table(input_ids))
        weight = self.layer.weight
        states = states @ weight if self.how == "product" else states * weight.float().norm()
        return type("Output", (), {"last_hidden_state": states})


@needs_package
@pytest.mark.parametrize("how", ["product", "norm"])
def test_a_model_that_reads_the_packed_bits_is_refused(how: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be stored in 4 bits.*model\.precision=float32"):
        cast_base(ReadsWeights(how).requires_grad_(False), "nf4")


@needs_package
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_leaves_a_model_as_it_was(family: str) -> None:
    model = encoder(family)
    cast_base(model, "nf4")
    assert any(map(is_quantised, model.modules()))


def test_a_reader_is_told() -> None:
    (told,) = notices("nf4", None)
    assert "4 bits" in told
    assert "merged export" in told
    assert notices("float32", None) == notices("bfloat16", None) == ()
    assert "shape of its own" in notices("bfloat16", 64)[0]
