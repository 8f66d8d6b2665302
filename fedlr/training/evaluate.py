"""Accuracy and loss on the public validation split."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from fedlr import checks
from fedlr.adapters.surgery import AdaptedModel
from fedlr.data.batching import TokenisedDataset, physical_batches
from fedlr.methods.method import MODEL_ROLES, RESIDUAL_ROLES, Parts

from .classifier import Classifier


class Evaluator:
    """Evaluates parts on public data, with the resident model.

    Args:
        classifier: Adapted encoder with head.
        adapted: Its movable arrays.
        data: Public rows, N; none at a real site, which evaluates nothing.
        physical_batch: Rows of one forward pass; changes no result.
        device: Where the model lives.
    """

    def __init__(
        self,
        classifier: Classifier,
        adapted: AdaptedModel,
        data: TokenisedDataset,
        physical_batch: int,
        device: torch.device,
    ) -> None:
        self._classifier, self._adapted = classifier.eval(), adapted
        self._data, self._device = data, device
        self._pieces = physical_batches(np.arange(len(data)), data.lengths, physical_batch)

    def __call__(self, parts: Parts) -> tuple[float, float]:
        """Return (accuracy in 0–1, mean cross-entropy in nats); a NaN loss is returned as ∞.

        Args:
            parts: A method's state: what the model computes with, cores and residuals
                too, is written into it; the rest is left out.

        Raises:
            ValueError: There is no row.
        """
        checks.at_least("validation rows", len(self._data), 1)
        roles = MODEL_ROLES | RESIDUAL_ROLES
        self._adapted.write({key: value for key, value in parts.items() if key.role in roles})
        correct, loss = 0, 0.0
        with torch.inference_mode():
            for rows in self._pieces:
                batch = self._data.batch(rows).to(self._device)
                logits = self._classifier(batch)
                correct += int((logits.argmax(1) == batch.labels).sum())
                loss += float(functional.cross_entropy(logits, batch.labels, reduction="sum"))
        mean = loss / len(self._data)
        return correct / len(self._data), math.inf if math.isnan(mean) else mean
