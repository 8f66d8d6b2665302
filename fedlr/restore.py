"""The trained model of a run, without its data: rebuilt, written as others load it, and used."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedlr.adapters import export
from fedlr.adapters.surgery import AdaptedModel
from fedlr.build import Workbench, adapt, layout_of, provenance
from fedlr.config import HeadConfig, RunConfig
from fedlr.data.batching import physical_batches, tokenise
from fedlr.data.dataset import TextDataset
from fedlr.errors import RunError
from fedlr.methods.method import Layout, Parts
from fedlr.report.card import Form, Loading, card
from fedlr.report.facts import RunFacts, check_same
from fedlr.report.records import Summary
from fedlr.training.base import BaseModel, load_base, quiet_transformers
from fedlr.training.classifier import Classifier
from fedlr.training.heads import LinearHead, RandomClsHead
from fedlr.training.memory import DEFAULT_ROWS


@dataclass(frozen=True)
class RunModel:
    """The model of a run; what its rounds changed is not in it but in `Parts`.

    Attributes:
        config: The configuration of the run.
        base: The frozen encoder, its tokenizer and digests.
        adapted: Movable arrays of the model.
        head: The whole classification head, as at the start.
        label_names: Labels in the order of the logits.
    """

    config: RunConfig
    base: BaseModel
    adapted: AdaptedModel
    head: nn.Module
    label_names: tuple[str, ...]

    @classmethod
    def of(cls, workbench: Workbench) -> RunModel:
        """Return the model that a workbench trains."""
        return cls(
            workbench.config,
            workbench.base,
            workbench.adapted,
            workbench.head,
            workbench.data.label_names,
        )

    @property
    def layout(self) -> Layout:
        """What the run adapts."""
        return layout_of(self.adapted)

    def trained(self, parts: Parts) -> export.Trained:
        """Return the model with ``parts`` in it, as it is written and used."""
        settings = self.config.model.head
        return export.Trained(
            adapted=self.adapted,
            parts=parts,
            head={f"head.{name}": value for name, value in self.head.state_dict().items()},
            head_settings={
                "kind": settings.kind,
                "feature_scale": None if settings.kind == "random_cls" else settings.feature_scale,
                "max_length": self.config.model.max_length,
                "label_names": list(self.label_names),
            },
        )


def restore(config: RunConfig, facts: RunFacts, head: Mapping[str, Tensor]) -> RunModel:
    """Rebuild the model of a run as it was before its first round, on the CPU.

    Args:
        config: The configuration of the run.
        facts: What the run was made of.
        head: Every head parameter by its name (``head.output.weight``), as kept at
            the start of the run. It is not computed again: its last bits differ
            between processors.

    Raises:
        ConfigError, ModelError: As `fedlr.build.build`.
        RunError: Base weights, tokenizer or the settings that give the arrays their
            meaning are not those of the run, or ``head`` does not fit them.
    """
    model = config.model
    seed = config.seed if model.random_weights else None
    base = load_base(model.name, model.revision, model.sha256, seed, model.precision)
    _check_same(config, facts, base)
    module = _head(model.head, head)
    # It is used merged, on whatever machine this is: no kernel runs.
    plain = replace(config.kernels, implementation="naive", checkpointing=False)
    encoder, sites = adapt(replace(config, kernels=plain), base)
    movable = dict(module.named_parameters()) if model.head.trained else {}
    adapted = AdaptedModel(encoder, sites, {f"head.{name}": v for name, v in movable.items()})
    return RunModel(config, base, adapted, module, facts.label_names)


def save_result(
    model: RunModel, parts: Parts, summary: Summary, folder: Path, merged: bool = False
) -> Form:
    """Write the trained model, its head and its card into ``folder``.

    Args:
        model: The model of the run; it stays as it is.
        parts: Its result.
        summary: What the card tells.
        folder: Made if missing; files that an earlier export left are replaced.
        merged: Write a whole model rather than an adapter for the base.

    Returns:
        ``adapter`` or ``merged``; ``merged`` also where the rank of an adapter would
        exceed `fedlr.adapters.export.LARGEST_RANK`.

    Raises:
        RunError: ``folder`` cannot be written; nothing in it has changed then,
            unless the disk failed while the finished files were moved there.
    """
    trained = model.trained(parts)
    form: Form = "merged" if merged or trained.rank() > export.LARGEST_RANK else "adapter"
    readme = card(summary, _loading(model, form))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as place:
            if form == "merged":
                with quiet_transformers():
                    export.save_merged(trained, Path(place), model.base.tokenizer, readme)
            else:
                export.save_adapter(trained, Path(place), model.base.name, readme)
            for name in export.FILES_OF["adapter" if form == "merged" else "merged"]:
                (folder / name).unlink(missing_ok=True)
            mode = (Path(place) / "README.md").stat().st_mode  # safetensors leaves 0600
            for path in Path(place).iterdir():
                path.chmod(mode)
                path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{str(folder)!r} cannot be written: {reason}; free some space there, or choose "
            "another folder"
        ) from error
    return form


def logits(model: RunModel, parts: Parts, texts: Sequence[str]) -> Tensor:
    """Return the logits of the trained model, shape (N, classes), float32, on the CPU.

    Args:
        model: The model of the run; it stays as it is.
        parts: Its result, a residual included.
        texts: N ≥ 0 texts; where the run's examples are pairs, each holds both with a
            tab between them.

    Raises:
        RunError: A text of a pair is missing, or the model does not give finite
            numbers: the run diverged.
    """
    trained = model.trained(parts)
    classifier = Classifier(
        export.merge(trained), _head(model.config.model.head, trained.whole_head())
    )
    data = tokenise(model.base.tokenizer, _rows(model, texts), model.config.model.max_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.eval().to(device)
    found = torch.empty(len(texts), len(model.label_names))
    size = model.config.kernels.physical_batch or DEFAULT_ROWS
    with torch.inference_mode():
        for rows in physical_batches(np.arange(len(texts)), data.lengths, size):
            found[rows] = classifier(data.batch(rows).to(device)).float().cpu()
    if not bool(found.isfinite().all()):
        raise RunError(
            "the model does not give finite numbers: its training diverged; train again with a "
            "smaller optimizer.learning_rate"
        )
    return found


def _rows(model: RunModel, texts: Sequence[str]) -> TextDataset:
    labels = np.zeros(len(texts), dtype=np.int64)
    columns = model.config.data.text_columns
    if len(columns) == 1:
        return TextDataset(tuple(texts), None, labels, None)
    pairs = [text.split("\t") for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2:
            raise RunError(
                f"{text!r} must be two texts with one tab between them: the run was trained on "
                f"pairs of {' and '.join(columns)}"
            )
    return TextDataset(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), labels, None)


def _check_same(config: RunConfig, facts: RunFacts, base: BaseModel) -> None:
    """Raise RunError unless the model is the one the run trained."""
    now = provenance(config, base, facts.label_names)
    found = replace(facts, base=now.base, tokenizer=now.tokenizer, labels=now.labels)
    check_same(facts, found, ("base", "tokenizer", "labels"))


def _head(settings: HeadConfig, arrays: Mapping[str, Tensor]) -> nn.Module:
    """Return the head with the values of ``arrays``; nothing in it requires a gradient."""
    values = {name.removeprefix("head."): value for name, value in arrays.items()}
    try:
        weight = values["output.weight"]
        head: nn.Module
        if settings.kind == "random_cls":
            head = RandomClsHead(weight.shape[1], weight.shape[0], torch.Generator())
        else:
            head = LinearHead(weight, "output.bias" in values, settings.feature_scale)
        head.load_state_dict(values)
    except (KeyError, IndexError, RuntimeError) as error:
        raise RunError(
            f"the head of the run is damaged: {error} does not fit model.head.kind = "
            f"{settings.kind}; restore the run folder from a copy"
        ) from error
    return head.requires_grad_(False)


def _loading(model: RunModel, form: Form) -> Loading:
    config, head = model.config, model.config.model.head
    return Loading(
        form=form,
        revision=config.model.revision,
        random_seed=config.seed if config.model.random_weights else None,
        head=head.kind,
        feature_scale=head.feature_scale,
        max_length=config.model.max_length,
        pairs=len(config.data.text_columns) == 2,
        padding=model.base.tokenizer.pad_token_id is not None,
        rounds=config.federation.rounds,
        four_bit=config.model.precision == "nf4",
    )
