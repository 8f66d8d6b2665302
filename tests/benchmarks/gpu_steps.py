"""One step of DP-SGD on a GPU, ours and Opacus', and the ordinary step beside it.

The private side is made by what `fedlr.build` calls for a run. Every side has a model of its
own on the device, all with the same weights.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlr.adapters.quantised import load_package, missing_package
from fedlr.adapters.surgery import AdaptedModel
from fedlr.build import adapt, local_settings
from fedlr.config import from_mapping
from fedlr.data.batching import TokenisedDataset
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import secret_stream
from fedlr.training.base import BaseModel
from fedlr.training.classifier import Classifier
from fedlr.training.local import LocalTask, LocalTrainer

from .gpu import MODULES, RANK, STAGE, Case, base, factors, head, random_rows, units
from .steps import lora_factors


class PrivateSteps:
    """What a site runs: `LocalTrainer` as `fedlr.build` makes it, noise from secret streams.

    Args:
        case: What to run.
        clip_norm: C.
        sigma: σ.
        data: Rows; None: `random_rows` of the case's shape.
    """

    def __init__(
        self,
        case: Case,
        clip_norm: float = 1.0,
        sigma: float = 1.0,
        data: TokenisedDataset | None = None,
    ) -> None:
        self.case, config = case, from_mapping(_settings(case))
        resident = BaseModel(base(case.precision), cast(Any, None), "", "", "random")
        encoder, sites = adapt(config, resident)
        self.trainer = LocalTrainer(
            Classifier(encoder, head()),
            AdaptedModel(encoder, sites, {}),
            random_rows(case.shape) if data is None else data,
            local_settings(config),
            STAGE.device,
        )
        pairs = {site.name: factors(site.name) for site in sites}
        self._start = {PartKey(name, Role.B): pair[1] for name, pair in pairs.items()}
        fixed = {PartKey(name, Role.A): pair[0] for name, pair in pairs.items()}
        self._parts = {**fixed, **self._start}
        groups = clip_groups(list(self._start), clip_norm, None)
        self._mechanism = Mechanism(clip_norm, groups, sigma, case.shape.rows)

    def task(self) -> LocalTask:
        """A task with new streams."""
        streams = (secret_stream(), secret_stream())
        return LocalTask(self._parts, frozenset({Role.B}), 1.0, self._mechanism, *streams)

    def __call__(self) -> dict[PartKey, Tensor]:
        """Run the steps on every row, each a unit."""
        return self.trainer.train(self.task(), units(range(self.case.shape.rows)))

    def anew(self, rows: range | None = None) -> dict[str, Tensor]:
        """Run the steps on every row, or on some, and return the change of B by site."""
        chosen = range(self.case.shape.rows) if rows is None else rows
        return self.change(self.trainer.train(self.task(), units(chosen)))

    def change(self, found: dict[PartKey, Tensor]) -> dict[str, Tensor]:
        """Return B less the B that every task starts from, by site."""
        return {key.site: value - self._start[key] for key, value in found.items()}


def _settings(case: Case) -> dict[str, Any]:
    """The configuration of a run that takes such steps."""
    return {
        "model": {"precision": case.precision, "max_length": case.shape.tokens},
        "adapter": {"modules": list(MODULES), "layers": None, "rank": RANK, "alpha": float(RANK)},
        "optimizer": {
            "learning_rate": case.rate,
            "steps": case.steps,
            "expected_batch": case.shape.rows,
        },
        "kernels": {
            "device": STAGE.device.type,
            "implementation": case.implementation,
            "gradients": case.gradients,
            "physical_batch": case.shape.rows,
        },
    }


class Plain(nn.Module):
    """Encoder with unmodified PEFT layers and head, B alone trained, as anyone would write it."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        encoder: Any = base(precision)
        if missing_package() is None:
            load_package()  # PEFT's own import of it may fetch a binary
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=list(MODULES), lora_dropout=0.0, bias="none"
        )
        self.encoder = cast(nn.Module, get_peft_model(encoder, settings))
        self.head = head()
        self.factors = dict(lora_factors(self.encoder))
        self.start_anew()
        for a, b in self.factors.values():
            a.requires_grad_(False)
            b.requires_grad_(True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, shape (N, classes)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(states.float(), attention_mask)
        return logits

    def trained(self) -> list[nn.Parameter]:
        """B of every site."""
        return [b for _, b in self.factors.values()]

    @torch.no_grad()
    def start_anew(self) -> None:
        """Set every A and B to `factors`."""
        for name, pair in self.factors.items():
            for parameter, value in zip(pair, factors(name), strict=True):
                parameter.copy_(value)

    def change(self) -> dict[str, Tensor]:
        """Return what B has become less what it began as, by site, on the CPU."""
        return {name: b.detach().cpu() - factors(name)[1] for name, (_, b) in self.factors.items()}


class OrdinarySteps:
    """Forward and backward pass of the whole batch, which is ready on the device, then SGD."""

    def __init__(self, case: Case) -> None:
        self.steps, self.model = case.steps, Plain(case.precision).eval()
        shape = case.shape
        self.batch = random_rows(shape).batch(np.arange(shape.rows)).to(STAGE.device)
        self._optimizer = torch.optim.SGD(self.model.trained(), case.rate)

    def __call__(self) -> None:
        """Run the steps, from wherever B stands."""
        for _ in range(self.steps):
            self._optimizer.zero_grad(set_to_none=True)
            logits = self.model(self.batch.input_ids, self.batch.attention_mask)
            torch.autograd.backward(functional.cross_entropy(logits, self.batch.labels))
            self._optimizer.step()

    def anew(self) -> dict[str, Tensor]:
        """Run the steps from the start and return the change of B by site."""
        self.model.start_anew()
        self()
        return self.model.change()


class GhostSteps(OrdinarySteps):
    """Opacus' ghost clipping on the same model; its noise comes from torch's generator."""

    def __init__(self, case: Case, clip_norm: float = 1.0, sigma: float = 1.0) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        super().__init__(case)
        self.model.train()  # Opacus records nothing in evaluation mode; there is no dropout
        self._wrapped = GradSampleModuleFastGradientClipping(self.model, max_grad_norm=clip_norm)
        self._noisy = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self.model.trained(), case.rate),
            noise_multiplier=sigma,
            max_grad_norm=clip_norm,
            expected_batch_size=case.shape.rows,
        )
        self._loss = DPLossFastGradientClipping(self._wrapped, self._noisy, nn.CrossEntropyLoss())

    def __call__(self) -> None:
        """Run the steps, from wherever B stands."""
        for _ in range(self.steps):
            self._noisy.zero_grad()
            logits = self._wrapped(self.batch.input_ids, self.batch.attention_mask)
            self._loss(logits, self.batch.labels).backward()
            self._noisy.step()
