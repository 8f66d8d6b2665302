"""A trained adapter → a folder that PEFT loads onto the untouched base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fedlr.methods.method import MODEL_ROLES, Parts, Role

from .inject import ADAPTER
from .surgery import AdaptedModel


@dataclass(frozen=True)
class AdapterCard:
    """What the reader of an adapter folder must know.

    Attributes:
        base: The base model, as a reader would name it to ``from_pretrained``:
            public, no path of this machine unless the user gave one.
        text: Body of the folder's ``README.md``, Markdown, without front matter.
    """

    base: str
    text: str


def save_adapter(
    model: AdaptedModel,
    parts: Parts,
    folder: Path,
    card: AdapterCard,
    head: Mapping[str, Tensor],
    head_settings: Mapping[str, Any],
) -> None:
    """Write ``parts`` as a PEFT adapter, with the whole head and a card.

    Args:
        model: The adapted model; its movable arrays are set to ``parts``.
        parts: A, B and trained head of the final state; other roles are left out.
        folder: Made if missing. Gets ``adapter_config.json`` and
            ``adapter_model.safetensors`` (PEFT), ``head.safetensors``,
            ``head.json`` and ``README.md``; files of these names are replaced.
        card: Name of the base model and text of ``README.md``.
        head: Every parameter of the head, frozen ones too, by the name a trained
            one has in ``parts`` (``head.output.weight``); its value is taken
            where ``parts`` has none. Any float dtype, shape and device.
        head_settings: What else rebuilds the head: its kind, ``feature_scale``,
            the label names; content of ``head.json``, plain JSON values.

    Raises:
        ValueError: ``parts`` has a head parameter that ``head`` lacks, or an
            array that the model lacks or has in another shape. Nothing is
            written then.

    Guarantees:
        ``PeftModel.from_pretrained(base, folder)`` computes the same hidden states
        as ``model``, and a head with the saved arrays the same logits. Residuals
        of methods that fold into the base are not part of this format. No
        network is asked.
    """
    from safetensors.torch import save_file

    trained = {key.site: value for key, value in parts.items() if key.role is Role.HEAD}
    if unknown := sorted(trained.keys() - head.keys()):
        raise ValueError(f"parts has head arrays {unknown} that head lacks; give the whole head")
    whole = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in {**head, **trained}.items()
    }
    model.write({key: value for key, value in parts.items() if key.role in MODEL_ROLES})
    encoder = cast(Any, model.encoder)
    encoder.peft_config[ADAPTER].base_model_name_or_path = card.base
    # "auto" would compare the vocabulary with the one on the hub; it never changes here.
    encoder.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    save_file(whole, str(folder / "head.safetensors"))
    settings = json.dumps(dict(head_settings), ensure_ascii=False, indent=2, allow_nan=False)
    (folder / "head.json").write_text(settings + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(card), encoding="utf-8")


def _readme(card: AdapterCard) -> str:
    """The card with its YAML front matter; a JSON string is a YAML string."""
    base = json.dumps(card.base, ensure_ascii=False)
    return f"---\nlibrary_name: peft\nbase_model: {base}\n---\n\n{card.text.strip()}\n"
