"""A trained model → a folder that others load: an adapter for the base, or the base with it merged.

Nothing here changes the live model: adapters are written from the arrays, and
merging is done on a copy of the base.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlr.lowrank.factors import AdapterSite, Factors, stack
from fedlr.methods.effective import update_of
from fedlr.methods.method import MODEL_ROLES, RESIDUAL_ROLES, Parts, Role

from .inject import ADAPTER
from .quantised import dequantise
from .residual import fold
from .surgery import AdaptedModel

LARGEST_RANK = 256
"""Above this rank an adapter is no longer small beside its layer, and is merged instead."""

FILES_OF = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "merged": ("config.json", "model.safetensors"),
}
"""What tells the two forms of a folder apart; a folder with both would be read as an adapter."""


@dataclass(frozen=True)
class Trained:
    """A trained classifier, as it is written.

    Attributes:
        adapted: The model; its base weights and sites count, and its arrays where
            ``parts`` has none.
        parts: The result: A, B, a core, a residual and the trained head; other roles
            are left out.
        head: Every parameter of the head, frozen ones too, by the name a trained one
            has in ``parts`` (``head.output.weight``); its value is taken where
            ``parts`` has none. Any float dtype, shape and device.
        head_settings: What else rebuilds the head: its kind, ``feature_scale``, the
            label names; content of ``head.json``, plain JSON values.

    Raises:
        ValueError: ``parts`` has a head parameter that ``head`` lacks, an array
            that the model lacks or that does not fit it, or half a residual.
    """

    adapted: AdaptedModel
    parts: Parts
    head: Mapping[str, Tensor]
    head_settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        trained = {key.site for key in self.parts if key.role is Role.HEAD}
        if unknown := sorted(trained - self.head.keys()):
            raise ValueError(
                f"parts has head arrays {unknown} that head lacks; give the whole head"
            )
        roles = MODEL_ROLES | RESIDUAL_ROLES
        self.adapted.check({k: v for k, v in self.parts.items() if k.role in roles})

    def factors(self) -> dict[AdapterSite, Factors]:
        """Return each site's whole update of the base weight, float32 on the CPU.

        s·B·A is kept as it was trained where there is no residual, and s·B·R·A is B·R and
        A; else the pair is stacked, [s·B·R, R_b] and [A; R_a], with scaling 1.
        """
        roles = {Role.A, Role.B, Role.CORE}
        arrays = {**self.adapted.read(roles), **self.parts}
        plain = {key: _plain(v) for key, v in arrays.items() if key.role is not Role.HEAD}
        updates = ((site, update_of(site, plain)) for site in self.adapted.sites)
        return {site: update for site, update in updates if update is not None}

    def rank(self) -> int:
        """Return the largest rank of any site's update, a residual's included."""
        return max(update.rank for update in self.factors().values())

    def whole_head(self) -> dict[str, Tensor]:
        """Return every parameter of the head as trained: copies on the CPU."""
        trained = {key.site: value for key, value in self.parts.items() if key.role is Role.HEAD}
        return {
            name: value.detach().cpu().clone().contiguous()
            for name, value in {**self.head, **trained}.items()
        }


def save_adapter(trained: Trained, folder: Path, base: str, readme: str) -> None:
    """Write the result as a PEFT adapter, with the whole head and a card.

    Args:
        trained: The result; its `Trained.rank` may be any.
        folder: Made if missing. Gets ``adapter_config.json`` and
            ``adapter_model.safetensors`` (PEFT), ``head.safetensors``, ``head.json``
            and ``README.md``; files of these names are replaced.
        base: The base model, as a reader would name it to ``from_pretrained``:
            public, no path of this machine unless the user gave one.
        readme: Text of ``README.md``.

    Guarantees:
        ``PeftModel.from_pretrained(base, folder)`` computes the hidden states of
        W + R_b·R_a + s·B·A (s·B·R·A with a core), and a head with the saved arrays the same
        logits. Where the run kept W in 4 bits, ``base`` loaded so (NF4 with quantised scales)
        gives them; in float32 it gives those of the adapter on the weights before they were
        rounded.
        Without a residual and a core the factors are the trained ones, bit for bit; with
        one they are exact up to the rounding of s·B and of B·R. Sites of smaller rank are filled
        with zeros. The live model stays as it is, and no network is asked.
    """
    from safetensors.torch import save_file

    factors = trained.factors()
    if len({pair.scaling for pair in factors.values()}) > 1:  # PEFT's is one for all
        factors = {site: stack([pair]) for site, pair in factors.items()}
    rank = max(pair.rank for pair in factors.values())
    arrays = {}
    for site, pair in factors.items():
        name, missing = f"base_model.model.{site.name}", rank - pair.rank
        arrays[f"{name}.lora_A.weight"] = functional.pad(pair.a, (0, 0, 0, missing)).contiguous()
        arrays[f"{name}.lora_B.weight"] = functional.pad(pair.b, (0, missing)).contiguous()
    encoder = cast(Any, trained.adapted.encoder)
    kind = type(encoder.get_base_model())
    settings = copy.deepcopy(encoder.peft_config[ADAPTER])
    settings.r = rank
    settings.lora_alpha = next(iter(factors.values())).scaling * rank
    settings.target_modules = sorted(site.name for site in factors)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    settings.save_pretrained(
        str(folder),
        auto_mapping_dict={"base_model_class": kind.__name__, "parent_library": kind.__module__},
    )
    _save_head(trained, folder, readme)


def save_merged(trained: Trained, folder: Path, tokenizer: Any, readme: str) -> None:
    """Write the result as a model of the base's own class that ``AutoModel`` loads.

    Args:
        trained: The result, of any rank.
        folder: Made if missing. Gets ``config.json``, ``model.safetensors``, the
            tokenizer's files, ``head.safetensors``, ``head.json`` and ``README.md``.
        tokenizer: The base model's.
        readme: Text of ``README.md``.

    Guarantees:
        As `merge`; ``AutoModel.from_pretrained(folder)`` needs nothing else. The
        live model stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = merge(trained)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    _save_head(trained, folder, readme)


def merge(trained: Trained) -> nn.Module:
    """Return a copy of the base encoder with W + R_b·R_a + s·B·A in the place of each W.

    With a core R it is s·B·R·A. What the live model computes with now does not count.

    Returns:
        A model of the base's own class, without PEFT, in evaluation mode, on the
        CPU; every weight in float32, of which a small update would lose its bits in
        fewer. The sum is taken in float64 and rounded once. A weight that was stored in
        4 bits is the one that those bits stand for, with which the update was trained,
        and not the one that was rounded to them.
    """
    encoder: Any = copy.deepcopy(trained.adapted.encoder)
    for site in trained.adapted.sites:
        fold(encoder.get_submodule(f"base_model.model.{site.name}.base_layer"), None)
    base: nn.Module = encoder.unload()
    dequantise(base)
    base.to("cpu", torch.float32)
    with torch.no_grad():
        for site, pair in trained.factors().items():
            weight = base.get_submodule(site.name).get_parameter("weight")
            update = pair.scaling * (pair.b.double() @ pair.a.double())
            weight.copy_(weight.double() + update)
    return base.eval()


def _plain(array: Tensor) -> Tensor:
    return array.detach().to("cpu", torch.float32)


def _save_head(trained: Trained, folder: Path, readme: str) -> None:
    from safetensors.torch import save_file

    save_file(trained.whole_head(), str(folder / "head.safetensors"))
    settings = json.dumps(
        dict(trained.head_settings), ensure_ascii=False, indent=2, allow_nan=False
    )
    (folder / "head.json").write_text(settings + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")
