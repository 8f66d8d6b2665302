"""One round as the FedSVD paper's code runs it, written anew, on our job.

What it does there and here: the server hands every client the *whole* model as arrays;
the client loads it, copies the model and wraps it with Opacus' ghost clipping anew;
rows are padded to the client's longest and cut into physical batches of 64 in the
order they were drawn; dropout is on (0.05 inside the adapters, 0.1 inside the
encoder); the server averages and takes the dense SVD of every m × n product.

What it is spared here: one process and one model per client, the waiting loop, W&B, the
evaluation at every client, and an accountant. Model, head, data, sites, logical batches,
steps, learning rate and clip are those of our job, so that the two compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlr.build import Workbench
from fedlr.data.batching import TokenisedDataset, tokenise
from fedlr.head_choice import build_head
from fedlr.methods.method import Parts, Role
from fedlr.training.base import load_base

from .steps import lora_factors

PHYSICAL = 64
"""Rows of one physical batch, the paper's setting."""

ADAPTER_DROPOUT, ENCODER_DROPOUT = 0.05, 0.1

State = Mapping[str, npt.NDArray[np.float32]]


class Adapted(nn.Module):
    """A PEFT model with a frozen head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, shape (N, classes)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(states, attention_mask)
        return logits


def adapted(bench: Workbench) -> Adapted:
    """The job's model as PEFT makes it, dropout on, B alone to be trained."""
    from peft import LoraConfig, get_peft_model

    config, base = bench.config, load_base(bench.config.model.name)
    head = build_head(config, base, bench.data.label_names)
    settings = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=int(config.adapter.alpha),
        target_modules=[site.name for site in bench.layout.sites],
        lora_dropout=ADAPTER_DROPOUT,
        bias="none",
    )
    model = Adapted(cast(nn.Module, get_peft_model(cast(Any, base.encoder), settings)), head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


@dataclass(frozen=True)
class _Padded:
    """All rows of a client, padded to its longest, and where each one is."""

    input_ids: Tensor
    mask: Tensor
    labels: Tensor
    position: Mapping[int, int]

    @classmethod
    def of(cls, data: TokenisedDataset, rows: npt.NDArray[np.int64]) -> _Padded:
        batch = data.batch(rows)
        position = {row: index for index, row in enumerate(rows.tolist())}
        return cls(batch.input_ids, batch.attention_mask, batch.labels, position)


class PaperRound:
    """The federation of the paper's code, one round per call.

    Args:
        bench: The job.
        sigma: σ.
        rows: Rows of each step by client; the same in every round.
    """

    def __init__(
        self, bench: Workbench, sigma: float, rows: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        self._config, self._sigma, self._rows = bench.config, sigma, rows
        self._model = adapted(bench)
        config = bench.config.model
        data = tokenise(bench.base.tokenizer, bench.data.train, config.max_length)
        self._clients = [_Padded.of(data, plan.units.rows) for plan in bench.clients]

    def start(self, parts: Parts, dropout: bool) -> None:
        """Set A and B to those of a state, and dropout on or off.

        A dropout that is off is at rate 0: Opacus needs the training mode.
        """
        for module in self._model.modules():
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        values = {(key.site, key.role): value for key, value in parts.items()}
        with torch.no_grad():
            for name, (a, b) in lora_factors(self._model.encoder):
                a.copy_(values[name, Role.A])
                b.copy_(values[name, Role.B])

    def __call__(self) -> dict[str, Tensor]:
        """Run one round and return s·BA by site."""
        state = as_arrays(self._model)
        changes = []
        for client, steps in enumerate(self._rows):
            load(self._model, state)
            before = factors_of(self._model)
            self._train(client, steps)
            after = factors_of(self._model)
            changes.append({name: after[name] - before[name] for name in after})
        load(self._model, state)
        self._aggregate(changes)
        config = self._config.adapter
        return {
            name: config.alpha / config.rank * (b.detach() @ a.detach())
            for name, (a, b) in lora_factors(self._model.encoder)
        }

    def _train(self, client: int, steps: Sequence[Sequence[int]]) -> None:
        """Copy, wrap, run the client's steps, and keep what came out."""
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        config, data = self._config, self._clients[client]
        original = deepcopy(self._model)
        self._model.train()
        clip = config.privacy.clip_norm
        wrapped = GradSampleModuleFastGradientClipping(self._model, max_grad_norm=clip)
        trained = [value for value in self._model.parameters() if value.requires_grad]
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(trained, config.optimizer.learning_rate),
            noise_multiplier=self._sigma,
            max_grad_norm=clip,
            expected_batch_size=config.optimizer.expected_batch,
        )
        loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
        for rows in steps:
            pieces = torch.tensor([data.position[row] for row in rows]).split(PHYSICAL)
            for number, piece in enumerate(pieces):
                optimizer.zero_grad()
                optimizer.signal_skip_step(number < len(pieces) - 1)
                logits = wrapped(data.input_ids[piece], data.mask[piece])
                loss(logits, data.labels[piece]).backward()
                optimizer.step()
        original.load_state_dict(self._model.state_dict())
        self._model = original

    def _aggregate(self, changes: Sequence[Mapping[str, npt.NDArray[np.float32]]]) -> None:
        """Add the mean change, then refactorise through the dense SVD of each product."""
        for name, (a, b) in lora_factors(self._model.encoder):
            mean = np.sum([change[name] / len(changes) for change in changes], axis=0)
            with torch.no_grad():
                b += torch.from_numpy(mean)
                left, sigma, right = torch.linalg.svd(b @ a, full_matrices=False)
                rank = a.shape[0]
                b.copy_(left[:, :rank] @ torch.diag(sigma[:rank]))
                a.copy_(right[:rank])


def as_arrays(model: nn.Module) -> State:
    """Return a copy of every parameter and buffer of the model."""
    return {name: value.detach().clone().numpy() for name, value in model.state_dict().items()}


def load(model: nn.Module, state: State) -> None:
    """Copy the whole state into the model."""
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})


def factors_of(model: Adapted) -> dict[str, npt.NDArray[np.float32]]:
    """Return a copy of every B by site."""
    return {name: b.detach().clone().numpy() for name, (_, b) in lora_factors(model.encoder)}
