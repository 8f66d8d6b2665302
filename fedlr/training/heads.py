"""Classification heads on pooled features.

Three heads: a trained, zero-initialised linear one; the label texts' own
embeddings on normalised features, so that all that is learned is in B; and the
frozen random head on the first token, as in the FedSVD paper's code. Pooling and
normalisation are per example, never from statistics of private data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from fedlr import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LinearHead(nn.Module):
    """Mean pooling and a linear map, optionally on features of fixed norm.

    Args:
        weight: Initial weight, shape (classes, width), float32.
        bias: Whether there is a bias (initially zero).
        feature_scale: Norm that each example's pooled features are scaled to;
            None leaves them as they are.
    """

    def __init__(self, weight: Tensor, bias: bool, feature_scale: float | None) -> None:
        super().__init__()
        if feature_scale is not None:
            checks.positive("feature_scale", feature_scale)
        self.output = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        with torch.no_grad():
            self.output.weight.copy_(weight)
            if bias:
                self.output.bias.zero_()
        self.feature_scale = feature_scale

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits (N, classes) from hidden states (N, T, width) and a mask (N, T)."""
        features = mean_pool(hidden, mask)
        if self.feature_scale is not None:
            features = functional.normalize(features, dim=1) * self.feature_scale
        logits: Tensor = self.output(features)
        return logits


class RandomClsHead(nn.Module):
    """The frozen head of the FedSVD paper's code: dense, tanh, output on the first token.

    Args:
        width: Hidden size.
        classes: Number of labels.
        generator: Public generator of both random maps (standard deviation 0.02).
    """

    def __init__(self, width: int, classes: int, generator: Generator) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.output = nn.Linear(width, classes)
        with torch.no_grad():
            for layer in (self.dense, self.output):
                layer.weight.normal_(0.0, 0.02, generator=generator)
                layer.bias.zero_()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits (N, classes) from hidden states (N, T, width); the mask is not used."""
        del mask
        logits: Tensor = self.output(torch.tanh(self.dense(hidden[:, 0])))
        return logits


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the hidden states of real tokens: (N, T, width), (N, T) → (N, width).

    A row without a single token gives zeros.

    Example:
        >>> mean_pool(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]])).item()
        3.0
    """
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def label_embeddings(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], scale: float
) -> Tensor:
    """Embed the label texts: normalised mean pooling, centred over labels, times ``scale``.

    Centring removes what all labels share, so that no class starts favoured.

    Args:
        encoder: The frozen base encoder.
        tokenizer: Its tokenizer.
        texts: One text per label, public.
        scale: Multiplies the centred embeddings.

    Returns:
        Shape (classes, width), float32: the weight of a `LinearHead`.
    """
    device = next(encoder.parameters()).device
    features = []
    # One by one: not every tokenizer has a padding token, and there are few labels.
    for text in texts:
        encoded: Any = tokenizer(text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states: Tensor = encoder(**encoded.to(device)).last_hidden_state
            features.append(states[0].float().mean(0))
    pooled = functional.normalize(torch.stack(features), dim=1)
    return scale * (pooled - pooled.mean(0, keepdim=True))
