"""Factors that change on the wire or in a saved adapter are caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlr.adapters import codec
from fedlr.adapters.export import save_adapter
from fedlr.doctor import exchange
from fedlr.doctor.exchange import round_trip
from fedlr.methods.method import PartKey
from tests.doctor.subjects import subject


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"family": "roberta", "method": {"name": "head_only"}, "on": (1,)},
        {"method": {"name": "fed_sb"}},
        {"method": {"name": "flora"}},
    ],
    ids=str,
)
def test_honest_factors_survive(changes: dict[str, Any]) -> None:
    one = subject(**changes)
    result = round_trip(one)
    assert result.passed, result.detail
    adapters = {name.split(".")[-2] for name, _ in one.model.adapted.encoder.named_parameters()}
    assert "reloaded" not in adapters


def rescale(folder: Path) -> None:
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "lora_alpha": 1.01 * settings["lora_alpha"]}))


def change(folder: Path, name: str, part: str, changed: Callable[[Any], Any]) -> None:
    arrays = load_file(str(folder / name))
    save_file(
        {key: changed(value) if part in key else value for key, value in arrays.items()},
        str(folder / name),
    )


DEFECTS: dict[str, Callable[[Path], None]] = {
    "alpha": rescale,
    "b": lambda f: change(f, "adapter_model.safetensors", "lora_B", torch.zeros_like),
    "a": lambda f: change(f, "adapter_model.safetensors", "lora_A", lambda a: a.flip(0)),
    "head": lambda f: change(f, "head.safetensors", "bias", lambda b: b + 0.01),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_saved_adapter_that_is_another_is_caught(
    defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(trained: Any, folder: Path, base: str, readme: str) -> None:
        save_adapter(trained, folder, base, readme)
        DEFECTS[defect](folder)

    monkeypatch.setattr(exchange, "save_adapter", save)
    result = round_trip(subject())
    assert not result.passed
    assert "bound 0.0001; wire form exact" in result.detail


def test_a_wire_form_that_rounds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = codec.decode

    def decode(*given: Any) -> dict[PartKey, torch.Tensor]:
        return {key: value.bfloat16().float() for key, value in real(*given).items()}

    monkeypatch.setattr(codec, "decode", decode)
    result = round_trip(subject())
    assert not result.passed
    assert "wire form CHANGED" in result.detail
