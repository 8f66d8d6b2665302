"""Factors survive every way out: the wire, and the saved adapter that others load."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlr.adapters import codec
from fedlr.adapters.export import save_adapter
from fedlr.doctor.finding import Result
from fedlr.doctor.subject import Subject
from fedlr.training.classifier import Classifier

BOUND = 1e-4
"""Largest accepted difference of a logit, relative to the largest logit or 1."""

_RELOADED = "reloaded"


def round_trip(subject: Subject) -> Result:
    """Send the factors over the wire form and through a saved adapter folder.

    The folder is loaded by PEFT into a copy of the model; its logits must be those of
    the live model with the same factors in it.
    """
    exact = _same_over_the_wire(subject)
    adapted = subject.model.adapted
    adapted.write(subject.parts)
    live = _logits(subject, adapted.encoder, subject.model.head)
    with tempfile.TemporaryDirectory(prefix="fedlr-doctor-") as place:
        folder = Path(place)
        save_adapter(subject.model.trained(subject.parts), folder, subject.model.base.name, "")
        encoder, head = _loaded(subject, folder)
        loaded = _logits(subject, encoder, head)
    error = float((live - loaded).abs().max()) / max(1.0, float(live.abs().max()))
    wire = "exact" if exact else "CHANGED"
    return Result(
        exact and error <= BOUND,
        f"logits of the saved adapter differ by {error:.1e}, bound {BOUND:g}; wire form {wire}",
    )


def _same_over_the_wire(subject: Subject) -> bool:
    there = codec.decode(codec.encode(subject.parts))
    return there.keys() == subject.parts.keys() and all(
        torch.equal(there[key], value) for key, value in subject.parts.items()
    )


def _loaded(subject: Subject, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return copies of encoder and head that have what is saved in ``folder``."""
    encoder: Any = copy.deepcopy(subject.model.adapted.encoder)
    encoder.load_adapter(str(folder), _RELOADED, torch_device=str(subject.device))
    encoder.set_adapter(_RELOADED)
    head = copy.deepcopy(subject.model.head)
    saved = load_file(str(folder / "head.safetensors"))
    head.load_state_dict({name.removeprefix("head."): value for name, value in saved.items()})
    return encoder, head


def _logits(subject: Subject, encoder: nn.Module, head: nn.Module) -> Tensor:
    everything = subject.rows.batch(np.arange(len(subject.rows))).to(subject.device)
    with torch.inference_mode():
        logits: Tensor = Classifier(encoder, head).eval()(everything)
    return logits.float().cpu()
