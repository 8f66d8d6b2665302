"""A saved adapter, loaded by PEFT onto an untouched base, computes the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedlr.adapters.export import save_adapter
from fedlr.methods.method import PartKey, Role
from tests.models import FAMILIES, RANK, encoder, rows, tiny

BATCH = rows([5, 3, 8]).batch(np.array([0, 1, 2])).inputs()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_was_trained(family: str, tmp_path: Path) -> None:
    import peft

    model = tiny(family)
    parts = {key: torch.randn_like(value) for key, value in model.parts().items()}
    save_adapter(model.adapted, parts, tmp_path / "adapter")
    fresh = encoder(family)
    base = fresh(**BATCH).last_hidden_state
    library: Any = peft
    loaded = library.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = model.adapted.encoder(**BATCH).last_hidden_state
        found = loaded(**BATCH).last_hidden_state
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, base, rtol=0, atol=1e-2)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (RANK, 2.0 * RANK)


def test_the_head_is_saved_as_it_was_given(tmp_path: Path) -> None:
    model = tiny()
    parts = {key: torch.randn_like(value) for key, value in model.parts().items()}
    save_adapter(model.adapted, parts, tmp_path)
    found = load_file(tmp_path / "head.safetensors")
    assert found.keys() == {"head.output.weight", "head.output.bias"}
    for name, value in found.items():
        assert torch.equal(value, parts[PartKey(name, Role.HEAD)])


def test_without_a_trained_head_there_is_no_file_and_no_residual_in_it(tmp_path: Path) -> None:
    model = tiny()
    parts = model.parts(frozenset({Role.A, Role.B}))
    residual = {PartKey(model.adapted.sites[0].name, Role.RESIDUAL_A): torch.ones(1, 1)}
    save_adapter(model.adapted, {**parts, **residual}, tmp_path)
    assert not (tmp_path / "head.safetensors").exists()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(parts)
    for key, value in parts.items():
        assert torch.equal(
            saved[f"base_model.model.{key.site}.lora_{key.role.upper()}.weight"], value
        )
