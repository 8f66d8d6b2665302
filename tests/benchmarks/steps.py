"""One step of DP-SGD on B three ways, and the ordinary step that it is compared with.

Every side has a model of its own, all with the same weights: MiniLM with PEFT's
adapters (r = 8) on query and value of every layer, a frozen head, no dropout,
float32, plain SGD. Rows have one length, so that nothing is saved by sorting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlr.adapters.forward import use_kernel
from fedlr.adapters.inject import inject
from fedlr.adapters.surgery import AdaptedModel
from fedlr.data.batching import Batch, TokenisedDataset, UnitIndex
from fedlr.kernels.dispatch import Call, lora_linear
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import secret_stream
from fedlr.training.base import load_base
from fedlr.training.classifier import Classifier
from fedlr.training.heads import LinearHead
from fedlr.training.local import LocalSettings, LocalTask, LocalTrainer

STEPS = 1
"""Steps of one call: all that a client's task does once is set against a single step."""

MODULES, RANK, CLASSES, RATE = ("query", "value"), 8, 6, 1.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """Rows of one length."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows} × {self.tokens}"


SHAPES = (Shape(64, 32), Shape(16, 128))


def random_rows(shape: Shape) -> TokenisedDataset:
    """Random word pieces and labels from a fixed seed; no padding."""
    draws = np.random.default_rng(0)
    return TokenisedDataset(
        tokens=draws.integers(1000, 30_000, shape.rows * shape.tokens).astype(np.int32),
        offsets=np.arange(shape.rows + 1, dtype=np.int64) * shape.tokens,
        token_type_ids=None,
        labels=draws.integers(0, CLASSES, shape.rows),
        pad_token_id=0,
    )


def head() -> LinearHead:
    """A frozen head like the default one: fixed directions on features of fixed norm."""
    weight = torch.randn(CLASSES, 384, generator=torch.Generator().manual_seed(1))
    made = LinearHead(13.4 * functional.normalize(weight, dim=1), False, 4.4721)
    made.requires_grad_(False)
    return made


def first_a(names: list[str]) -> dict[str, Tensor]:
    """An orthonormal A of every site from a fixed seed."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.linalg.qr(torch.randn(384, RANK, generator=generator)).Q.T.contiguous()
        for name in names
    }


def first_b(names: list[str]) -> dict[str, Tensor]:
    """A B that is not zero: at B = 0 no backward pass would notice how A and B are used."""
    generator = torch.Generator().manual_seed(3)
    return {name: 0.02 * torch.randn(384, RANK, generator=generator) for name in names}


def apart(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Relative Frobenius difference over all sites together; ∞ where names differ."""
    if left.keys() != right.keys():
        return float("inf")
    squared = sum(float((left[name] - right[name]).double().pow(2).sum()) for name in left)
    return (squared / sum(float(value.double().pow(2).sum()) for value in right.values())) ** 0.5


class PrivateSteps:
    """What a site runs: `LocalTrainer` on one physical batch of all rows, every row drawn.

    Args:
        shape: Of the batch.
        gradients: A key of ``GRADIENTS``.
        clip_norm: C.
        sigma: σ; the noise comes from secret streams, new ones in each call.
    """

    def __init__(
        self, shape: Shape, gradients: str = "captured", clip_norm: float = 1.0, sigma: float = 1.0
    ) -> None:
        encoder, sites = inject(load_base("embedded").encoder, MODULES, None, RANK, float(RANK))
        if gradients == "captured":  # as `fedlr.build.adapt` does for a run
            use_kernel(encoder, sites, lora_linear(Call(CPU)))
        adapted = AdaptedModel(encoder, sites, {})
        settings = LocalSettings("sgd", RATE, RATE, 0.0, STEPS, shape.rows, gradients)
        classifier = Classifier(encoder, head())
        self._trainer = LocalTrainer(classifier, adapted, random_rows(shape), settings, CPU)
        a = first_a([site.name for site in sites])
        self._parts = {PartKey(name, Role.A): value for name, value in a.items()}
        b = first_b([site.name for site in sites])
        self._parts |= {PartKey(name, Role.B): value for name, value in b.items()}
        groups = clip_groups([k for k in self._parts if k.role is Role.B], clip_norm, None)
        self._mechanism = Mechanism(clip_norm, groups, sigma, shape.rows)
        self._units = UnitIndex.of(None, np.arange(shape.rows), "example")

    def __call__(self) -> dict[str, Tensor]:
        """Run the steps from `first_b` and return the change of B by site."""
        train = frozenset({Role.B})
        streams = (secret_stream(), secret_stream())
        task = LocalTask(self._parts, train, 1.0, self._mechanism, *streams)
        found = self._trainer.train(task, self._units)
        return {key.site: value - self._parts[key] for key, value in found.items()}


class Plain(nn.Module):
    """Encoder and head, as anyone would write it."""

    def __init__(self, dropout: tuple[float, float] = (0.0, 0.0)) -> None:
        """Adapt MiniLM.

        Args:
            dropout: Rate inside the adapters and rate inside the encoder.
        """
        from peft import LoraConfig, get_peft_model

        super().__init__()
        encoder: Any = load_base("embedded").encoder
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout[1]
        settings = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=list(MODULES),
            lora_dropout=dropout[0],
            bias="none",
        )
        self.encoder = cast(nn.Module, get_peft_model(encoder, settings))
        self.head = head()
        self.factors = dict(lora_factors(self.encoder))
        for name, value in first_a(list(self.factors)).items():
            a, b = self.factors[name]
            with torch.no_grad():
                a.copy_(value)
            a.requires_grad_(False)
            b.requires_grad_(True)
        self.start_anew()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, shape (N, classes)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(states, attention_mask)
        return logits

    def trained(self) -> list[nn.Parameter]:
        """B of every site."""
        return [b for _, b in self.factors.values()]

    def start_anew(self) -> None:
        """Set every B to `first_b`."""
        with torch.no_grad():
            for name, value in first_b(list(self.factors)).items():
                self.factors[name][1].copy_(value)

    def change(self) -> dict[str, Tensor]:
        """Return what B has become less `first_b`, by site."""
        start = first_b(list(self.factors))
        return {name: b.detach() - start[name] for name, (_, b) in self.factors.items()}


def lora_factors(encoder: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Yield (site, (A, B)) of every adapted layer of a PEFT model."""
    for name, module in encoder.named_modules():
        if hasattr(module, "lora_A"):
            layer = cast(Any, module)
            factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            yield name.removeprefix("base_model.model."), factors


class OrdinarySteps:
    """The ordinary step: one forward and backward pass of the whole batch, then SGD.

    The batch is put together once, before anything is measured; the private side does
    that in every step, as a site has to.
    """

    def __init__(self, shape: Shape) -> None:
        self.model = Plain().eval()
        self._batch: Batch = random_rows(shape).batch(np.arange(shape.rows))
        self._optimizer = torch.optim.SGD(self.model.trained(), RATE)

    def __call__(self) -> None:
        """Run the steps, from wherever B stands."""
        for _ in range(STEPS):
            self._optimizer.zero_grad(set_to_none=True)
            logits = self.model(self._batch.input_ids, self._batch.attention_mask)
            functional.cross_entropy(logits, self._batch.labels).backward()
            self._optimizer.step()

    def anew(self) -> dict[str, Tensor]:
        """Run the steps from `first_b` and return the change of B by site."""
        self.model.start_anew()
        self()
        return self.model.change()


class GhostSteps:
    """Opacus' ghost clipping: norms in a first backward pass, the clipped sum in a second.

    Its noise comes from torch's generator, as in the paper's code and unlike ours.
    """

    def __init__(self, shape: Shape, clip_norm: float = 1.0, sigma: float = 1.0) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self._plain = Plain().train()  # Opacus records nothing in evaluation mode
        self._model = GradSampleModuleFastGradientClipping(self._plain, max_grad_norm=clip_norm)
        self._optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self._plain.trained(), RATE),
            noise_multiplier=sigma,
            max_grad_norm=clip_norm,
            expected_batch_size=shape.rows,
        )
        self._loss = DPLossFastGradientClipping(self._model, self._optimizer, nn.CrossEntropyLoss())
        self._batch = random_rows(shape).batch(np.arange(shape.rows))

    def __call__(self) -> None:
        """Run the steps, from wherever B stands."""
        for _ in range(STEPS):
            self._optimizer.zero_grad()
            logits = self._model(self._batch.input_ids, self._batch.attention_mask)
            self._loss(logits, self._batch.labels).backward()
            self._optimizer.step()

    def anew(self) -> dict[str, Tensor]:
        """Run the steps from `first_b` and return the change of B by site."""
        self._plain.start_anew()
        self()
        return self._plain.change()
