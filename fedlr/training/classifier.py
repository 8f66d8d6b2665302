"""An adapted encoder with a head: rows of tokens → logits and losses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn import functional

from fedlr.data.batching import Batch

from .prefix import FrozenPrefix


class Classifier(nn.Module):
    """A text classifier; no row's output depends on another row.

    Args:
        encoder: A (PEFT-adapted) encoder with ``last_hidden_state``.
        head: Maps hidden states (N, T, width) and mask (N, T) to logits.
        prefix: Frozen lower layers, replayed where a batch brings their cached
            hidden states; None runs every layer always.
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, prefix: FrozenPrefix | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._prefix = prefix

    def forward(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Return logits, shape (N, classes), of the batch or of some of its rows.

        Args:
            batch: Padded rows, on this module's device.
            rows: Positions (K,) int64; None takes all.
        """
        inputs = batch.inputs(rows)
        hidden = batch.hidden if rows is None or batch.hidden is None else batch.hidden[rows]
        if self._prefix is None or hidden is None:
            replay: AbstractContextManager[None] = nullcontext()
        else:
            replay = self._prefix.replayed(hidden)
        with replay:
            states = self.encoder(**inputs).last_hidden_state
        # Pooling, head and loss are float32 whatever the base computes in.
        logits: Tensor = self.head(states.float(), inputs["attention_mask"])
        return logits

    def losses(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Return each row's cross-entropy in nats, shape (N,)."""
        labels = batch.labels if rows is None else batch.labels[rows]
        return functional.cross_entropy(self(batch, rows), labels, reduction="none")
