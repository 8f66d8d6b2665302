"""A trained adapter → a folder that PEFT loads onto the untouched base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from fedlr.methods.method import Parts, Role

from .surgery import AdaptedModel


def save_adapter(model: AdaptedModel, parts: Parts, folder: Path) -> None:
    """Write ``parts`` as a PEFT adapter and, where one was trained, the head.

    Args:
        model: The adapted model; its factors are set to ``parts``.
        parts: A, B and trained head of the final state.
        folder: Made if missing; gets ``adapter_config.json``,
            ``adapter_model.safetensors`` and ``head.safetensors``.

    Guarantees:
        ``PeftModel.from_pretrained(base, folder)`` computes the same features as
        ``model``. Residuals of methods that fold into the base are not part of
        this format.
    """
    from safetensors.torch import save_file

    movable = {key: value for key, value in parts.items() if key.role in _MOVABLE}
    model.write(movable)
    cast(Any, model.encoder).save_pretrained(str(folder), safe_serialization=True)
    head = {key.site: value.contiguous() for key, value in parts.items() if key.role is Role.HEAD}
    if head:
        save_file(head, str(folder / "head.safetensors"))


_MOVABLE = frozenset({Role.A, Role.B, Role.HEAD})
