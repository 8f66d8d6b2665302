"""A saved model, loaded by PEFT or transformers alone, computes the same features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlr.adapters.export import Trained, merge, save_adapter, save_merged
from fedlr.adapters.inject import inject
from fedlr.adapters.surgery import AdaptedModel
from fedlr.methods.method import PartKey, Parts, Role
from fedlr.training.base import weights_digest
from fedlr.training.classifier import Classifier
from fedlr.training.heads import LinearHead
from tests.data.helpers import word_tokenizer
from tests.models import CLASSES, FAMILIES, RANK, Tiny, cored, encoder, modules_of, rows, tiny

BATCH = rows([5, 3, 8]).batch(np.array([0, 1, 2]))
TOLERANCE = 1e-4  # float32: the sum over layers is taken in another order
BASE, CARD = "owner/model", "# An adapter\n\nε is of one run.\n"
SETTINGS = {
    "kind": "linear",
    "feature_scale": 2.5,
    "label_names": ["gut", "schlecht", "weiß nicht"],
}


def arrays(head: nn.Module) -> dict[str, Tensor]:
    """All of a head by the names that the parts have."""
    return {f"head.{name}": value for name, value in head.state_dict().items()}


def trained(model: Tiny, parts: Parts, settings: Mapping[str, Any] = SETTINGS) -> Trained:
    return Trained(model.adapted, parts, arrays(model.classifier.head), settings)


def random_parts(model: Tiny) -> dict[PartKey, Tensor]:
    draws = torch.Generator().manual_seed(5)
    return {
        key: 0.5 * torch.randn(value.shape, generator=draws) for key, value in model.parts().items()
    }


def residual(model: Tiny, ranks: int | tuple[int, ...]) -> dict[PartKey, Tensor]:
    """A random residual at every site, of one rank or of one for each in turn."""
    draws, found = torch.Generator().manual_seed(7), {}
    for index, site in enumerate(model.adapted.sites):
        rank = ranks if isinstance(ranks, int) else ranks[index % len(ranks)]
        left = 0.1 * torch.randn(site.out_features, rank, generator=draws)
        right = torch.randn(rank, site.in_features, generator=draws)
        found[PartKey(site.name, Role.RESIDUAL_B)] = left
        found[PartKey(site.name, Role.RESIDUAL_A)] = right
    return found


def loaded(fresh: nn.Module, folder: Path) -> nn.Module:
    import peft

    library: Any = peft
    adapted: nn.Module = library.PeftModel.from_pretrained(fresh, str(folder)).eval()
    return adapted


def features(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCH.inputs()).last_hidden_state
    return found


def reference(family: str, model: Tiny, parts: Parts) -> Tensor:
    """Features of an untouched base whose weights are set to W + R_b·R_a + s·B·A."""
    base = encoder(family)
    for site in model.adapted.sites:
        part = {role: parts.get(PartKey(site.name, role)) for role in Role}
        a, b = part[Role.A], part[Role.B]
        left, right = part[Role.RESIDUAL_B], part[Role.RESIDUAL_A]
        assert a is not None
        assert b is not None
        update = site.scaling * b @ a
        if left is not None and right is not None:
            update = update + left @ right
        weight = base.get_submodule(site.name).get_parameter("weight")
        weight.copy_(weight + update)
    return features(base)


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_others_load_what_was_trained(family: str, form: str, tmp_path: Path) -> None:
    import transformers

    model = tiny(family)
    parts = random_parts(model)
    before = weights_digest(model.adapted.encoder)
    if form == "adapter":
        save_adapter(trained(model, parts), tmp_path / "out", BASE, CARD)
        again = loaded(encoder(family), tmp_path / "out")
    else:
        save_merged(trained(model, parts), tmp_path / "out", word_tokenizer(), CARD)
        library: Any = transformers
        again = library.AutoModel.from_pretrained(str(tmp_path / "out")).eval()
        assert type(again) is type(encoder(family))
    expected = reference(family, model, parts)
    assert torch.allclose(features(again), expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(features(encoder(family)), expected, rtol=0, atol=1e-2)
    assert weights_digest(model.adapted.encoder) == before  # the live model, bit for bit


def test_without_a_residual_the_factors_are_saved_bit_for_bit(tmp_path: Path) -> None:
    model = tiny()
    parts = random_parts(model)
    save_adapter(trained(model, parts), tmp_path, BASE, CARD)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (RANK, 2.0 * RANK)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    factors = {key: value for key, value in parts.items() if key.role in (Role.A, Role.B)}
    assert len(saved) == len(factors)
    for key, value in factors.items():
        name = f"base_model.model.{key.site}.lora_{key.role.upper()}.weight"
        assert torch.equal(saved[name], value)


@pytest.mark.parametrize("ranks", [3, (1, 4), (0, 2), 0])
def test_a_residual_is_part_of_both_forms(tmp_path: Path, ranks: int | tuple[int, ...]) -> None:
    """Of one rank, of different ranks, and at some sites only."""
    model = tiny()
    parts = {**random_parts(model), **residual(model, ranks)}
    result = trained(model, parts)
    largest = ranks if isinstance(ranks, int) else max(ranks)
    assert result.rank() == RANK + largest
    expected = reference("bert", model, parts)
    save_adapter(result, tmp_path, BASE, CARD)
    assert torch.allclose(
        features(loaded(encoder("bert"), tmp_path)), expected, rtol=0, atol=TOLERANCE
    )
    assert torch.allclose(features(merge(result)), expected, rtol=0, atol=TOLERANCE)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == RANK + largest


@pytest.mark.parametrize("ranks", [0, 3])
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_core_is_multiplied_into_b(tmp_path: Path, form: str, ranks: int) -> None:
    """As saved: B·R and A of the same rank; with a residual, stacked onto it."""
    model = cored()
    parts = {**random_parts(model), **residual(model, ranks)}
    cores = model.adapted.read({Role.CORE})
    whole, plain = {**parts, **cores}, tiny()
    products = {
        PartKey(key.site, Role.B): parts[PartKey(key.site, Role.B)] @ core
        for key, core in cores.items()
    }
    expected = reference("bert", plain, {**parts, **products})
    assert not torch.allclose(reference("bert", plain, parts), expected, rtol=0, atol=1e-2)
    result = trained(model, whole)
    assert result.rank() == RANK + ranks
    model.adapted.write(whole)
    assert torch.allclose(features(model.adapted.encoder), expected, rtol=0, atol=TOLERANCE)
    if form == "merged":
        found = features(merge(result))
    else:
        save_adapter(result, tmp_path, BASE, CARD)
        found = features(loaded(encoder("bert"), tmp_path))
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert len(saved) == 2 * len(cores)
        for key, product in products.items() if ranks == 0 else ():
            name = f"base_model.model.{key.site}"
            assert torch.equal(saved[f"{name}.lora_B.weight"], product)
            a = parts[PartKey(key.site, Role.A)]
            assert torch.equal(saved[f"{name}.lora_A.weight"], a)
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_what_the_live_model_holds_does_not_count(tmp_path: Path) -> None:
    """A residual of the last evaluation, or the fewer columns of the last client."""
    model = tiny()
    parts = {**random_parts(model), **residual(model, 2)}
    expected = reference("bert", model, parts)
    narrow = {
        key: value[:1] if key.role is Role.A else value[:, :1]
        for key, value in model.parts().items()
        if key.role is not Role.HEAD
    }
    result = trained(model, parts)
    for left in ({**parts}, residual(model, 3), narrow):
        model.adapted.write(left)
        save_adapter(result, tmp_path, BASE, CARD)
        for found in (merge(result), loaded(encoder("bert"), tmp_path)):
            assert torch.allclose(features(found), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_float32_and_keeps_every_weight_that_no_site_adapts(
    dtype: torch.dtype,
) -> None:
    base = encoder("bert").to(dtype)
    model, sites = inject(base, modules_of("bert"), (-1,), RANK, 1.0)
    adapted = AdaptedModel(model, sites, {})
    parts = {key: torch.randn(value.shape) for key, value in adapted.read({Role.A, Role.B}).items()}
    found = merge(Trained(adapted, parts, {}, {})).state_dict()
    before = encoder("bert").to(dtype).float().state_dict()
    assert found.keys() == before.keys()
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed == {f"{site.name}.weight" for site in sites}
    assert all(value.dtype == before[name].dtype for name, value in found.items())


@pytest.mark.parametrize("trained_head", [True, False])
def test_the_classifier_can_be_rebuilt_from_the_folder(tmp_path: Path, trained_head: bool) -> None:
    """Logits of base + folder = logits of the model, with a frozen head as with a trained one."""
    model = tiny()
    head = LinearHead(torch.randn(CLASSES, 16), bias=trained_head, feature_scale=2.5)
    held = {f"head.{name}": value for name, value in head.named_parameters()}
    adapted = AdaptedModel(model.adapted.encoder, model.adapted.sites, held if trained_head else {})
    whole = Tiny(Classifier(adapted.encoder, head).eval(), adapted)
    parts = random_parts(whole)
    assert any(key.role is Role.HEAD for key in parts) is trained_head
    before = {name: value.clone() for name, value in arrays(head).items()}
    save_adapter(trained(whole, parts), tmp_path, BASE, CARD)

    settings = json.loads((tmp_path / "head.json").read_text(encoding="utf-8"))
    assert settings == SETTINGS
    saved = load_file(tmp_path / "head.safetensors")
    assert saved.keys() == before.keys()
    for name, value in saved.items():
        expected = parts[PartKey(name, Role.HEAD)] if trained_head else before[name]
        assert torch.equal(value, expected)
    again = LinearHead(saved["head.output.weight"], trained_head, settings["feature_scale"])
    again.load_state_dict({name.removeprefix("head."): value for name, value in saved.items()})
    rebuilt = Classifier(loaded(encoder("bert"), tmp_path), again).eval()
    adapted.write(parts)
    with torch.no_grad():
        assert torch.allclose(rebuilt(BATCH), whole.classifier(BATCH), rtol=0, atol=TOLERANCE)


def test_half_a_head_half_a_residual_and_a_strange_array_are_refused() -> None:
    model = tiny()
    parts, site = random_parts(model), model.adapted.sites[0]
    half = {"head.output.weight": torch.zeros(CLASSES, 16)}
    with pytest.raises(ValueError, match=r"head\.output\.bias"):
        Trained(model.adapted, parts, half, SETTINGS)
    right = {PartKey(site.name, Role.RESIDUAL_A): torch.ones(1, site.in_features)}
    with pytest.raises(ValueError, match="half a residual"):
        trained(model, {**parts, **right})
    narrow = {PartKey(site.name, Role.RESIDUAL_B): torch.ones(site.out_features, 2)}
    with pytest.raises(ValueError, match="residual_b has shape"):
        trained(model, {**parts, **right, **narrow})
    with pytest.raises(ValueError, match="the model has no array"):
        trained(model, {**parts, PartKey("nowhere", Role.A): torch.ones(1, 1)})


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_folder_names_the_public_base_and_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A base from a local folder: PEFT would write that folder's path, and ask the hub."""
    import transformers

    def no_hub(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", no_hub)
    source: Any = encoder("bert")
    source.save_pretrained(str(tmp_path / "base"))
    word_tokenizer().save_pretrained(str(tmp_path / "base"))
    library: Any = transformers
    base = library.BertModel.from_pretrained(str(tmp_path / "base"))
    tokenizer = library.AutoTokenizer.from_pretrained(str(tmp_path / "base"))
    model, sites = inject(base, modules_of("bert"), None, RANK, 1.0)
    adapted = AdaptedModel(model, sites, {})
    result = Trained(adapted, adapted.read({Role.A, Role.B}), {}, {})
    for _ in range(2):  # a second time over the first
        if form == "adapter":
            save_adapter(result, tmp_path / "out", BASE, CARD)
        else:
            save_merged(result, tmp_path / "out", tokenizer, CARD)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    ours = {"README.md", "head.safetensors", "head.json"}
    assert files.keys() == ours | (
        {"adapter_config.json", "adapter_model.safetensors"}
        if form == "adapter"
        else {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    )
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert files["README.md"].decode() == CARD
    if form == "adapter":
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
