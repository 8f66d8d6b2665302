"""A saved adapter, loaded by PEFT onto an untouched base, computes the same features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlr.adapters.export import AdapterCard, save_adapter
from fedlr.adapters.inject import inject
from fedlr.adapters.surgery import AdaptedModel
from fedlr.methods.method import PartKey, Parts, Role
from fedlr.training.classifier import Classifier
from fedlr.training.heads import LinearHead
from tests.models import CLASSES, FAMILIES, RANK, Tiny, encoder, modules_of, rows, tiny

BATCH = rows([5, 3, 8]).batch(np.array([0, 1, 2]))
CARD = AdapterCard(base="owner/model", text="# An adapter\n\nε is of one run.")
SETTINGS = {
    "kind": "linear",
    "feature_scale": 2.5,
    "label_names": ["gut", "schlecht", "weiß nicht"],
}


def arrays(head: nn.Module) -> dict[str, Tensor]:
    """All of a head by the names that the parts have."""
    return {f"head.{name}": value for name, value in head.state_dict().items()}


def save(model: Tiny, parts: Parts, folder: Path, settings: Mapping[str, Any] = SETTINGS) -> None:
    save_adapter(model.adapted, parts, folder, CARD, arrays(model.classifier.head), settings)


def random_parts(model: Tiny) -> dict[PartKey, Tensor]:
    return {key: torch.randn_like(value) for key, value in model.parts().items()}


def loaded(fresh: nn.Module, folder: Path) -> nn.Module:
    import peft

    library: Any = peft
    adapted: nn.Module = library.PeftModel.from_pretrained(fresh, str(folder)).eval()
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_was_trained(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    save(model, random_parts(model), tmp_path / "adapter")
    fresh, inputs = encoder(family), BATCH.inputs()
    base = fresh(**inputs).last_hidden_state
    again = loaded(fresh, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.adapted.encoder(**inputs).last_hidden_state
        found = again(**inputs).last_hidden_state
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, base, rtol=0, atol=1e-2)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (RANK, 2.0 * RANK)


@pytest.mark.parametrize("trained", [True, False])
def test_the_classifier_can_be_rebuilt_from_the_folder(tmp_path: Path, trained: bool) -> None:
    """Logits of base + folder = logits of the model, with a frozen head as with a trained one."""
    model = tiny()
    head = LinearHead(torch.randn(CLASSES, 16), bias=trained, feature_scale=2.5)
    held = {f"head.{name}": value for name, value in head.named_parameters()} if trained else {}
    adapted = AdaptedModel(model.adapted.encoder, model.adapted.sites, held)
    whole = Tiny(Classifier(adapted.encoder, head).eval(), adapted)
    parts = random_parts(whole)
    assert any(key.role is Role.HEAD for key in parts) is trained
    before = {name: value.clone() for name, value in arrays(head).items()}
    save(whole, parts, tmp_path)

    settings = json.loads((tmp_path / "head.json").read_text(encoding="utf-8"))
    assert settings == SETTINGS
    saved = load_file(tmp_path / "head.safetensors")
    assert saved.keys() == before.keys()
    for name, value in saved.items():
        assert torch.equal(value, parts[PartKey(name, Role.HEAD)] if trained else before[name])
    weight, bias = saved["head.output.weight"], saved.get("head.output.bias")
    again = LinearHead(weight, bias is not None, settings["feature_scale"])
    again.load_state_dict({name.removeprefix("head."): value for name, value in saved.items()})
    rebuilt = Classifier(loaded(encoder("bert"), tmp_path), again).eval()
    with torch.no_grad():
        assert torch.allclose(rebuilt(BATCH), whole.classifier(BATCH), rtol=0, atol=1e-5)


def test_no_residual_is_saved(tmp_path: Path) -> None:
    model = tiny()
    parts = model.parts(frozenset({Role.A, Role.B}))
    residual = {PartKey(model.adapted.sites[0].name, Role.RESIDUAL_A): torch.ones(1, 1)}
    save(model, {**parts, **residual}, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(parts)
    for key, value in parts.items():
        assert torch.equal(
            saved[f"base_model.model.{key.site}.lora_{key.role.upper()}.weight"], value
        )


def test_half_a_head_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = tiny()
    before, parts = model.parts(), random_parts(model)
    half = {"head.output.weight": torch.zeros(CLASSES, 16)}
    with pytest.raises(ValueError, match=r"head\.output\.bias"):
        save_adapter(model.adapted, parts, tmp_path / "adapter", CARD, half, SETTINGS)
    assert not (tmp_path / "adapter").exists()
    after = model.parts()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_folder_names_the_public_base_and_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base from a local folder: PEFT would write that folder's path, and ask the hub."""
    import transformers

    def no_hub(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", no_hub)
    source: Any = encoder("bert")
    source.save_pretrained(str(tmp_path / "base"))
    library: Any = transformers
    base = library.BertModel.from_pretrained(str(tmp_path / "base"))
    model, sites = inject(base, modules_of("bert"), None, RANK, 1.0)
    adapted = AdaptedModel(model, sites, {})
    for _ in range(2):  # a second time over the first
        save_adapter(adapted, adapted.read({Role.A, Role.B}), tmp_path / "out", CARD, {}, {})
    texts = {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()
    }
    assert texts.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "head.json",
    }
    assert not [name for name, text in texts.items() if str(tmp_path).encode() in text]
    settings = json.loads(texts["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "owner/model"


@pytest.mark.parametrize("base", ["owner/model", 'a "folder": #1', "C:\\models\\größe", "yes"])
def test_the_card_is_ours_and_its_front_matter_is_yaml(tmp_path: Path, base: str) -> None:
    model = tiny()
    card = AdapterCard(base, CARD.text)
    head = arrays(model.classifier.head)
    save_adapter(model.adapted, model.parts(), tmp_path, card, head, SETTINGS)
    empty, front, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")
    assert empty == ""
    assert yaml.safe_load(front) == {"library_name": "peft", "base_model": base}
    assert body.strip() == CARD.text
