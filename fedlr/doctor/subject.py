"""What is examined: the configured model and gradient path, on made-up rows.

Everything between a row and a release is production code: `LocalTrainer` draws,
clips, sums, adds noise and steps. The rows are random tokens from a public seed, so
nothing that is measured here tells of anyone's data, and no ledger is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedlr.adapters.surgery import AdaptedModel
from fedlr.build import local_settings
from fedlr.config import RunConfig
from fedlr.data.batching import TokenisedDataset, UnitIndex
from fedlr.errors import ModelError
from fedlr.methods.method import MODEL_ROLES, Method, PartKey, Parts, Role
from fedlr.planning import clients_together
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import task_streams
from fedlr.restore import RunModel
from fedlr.training.base import BaseModel
from fedlr.training.classifier import Classifier
from fedlr.training.fused import train_together
from fedlr.training.local import LocalSettings, LocalTask, LocalTrainer
from fedlr.training.prefix import FrozenPrefix, cache_prefix, find_prefix

PHYSICAL_BATCH = 4
"""Rows of one forward pass: few, so that a batch takes several."""

UNITS = ((0,), (1,) * (PHYSICAL_BATCH + 1), (2,), (3, 4), (5,), (6,))
"""Rows of each made-up unit. Row 0 is the longest, and removing it changes all padding; unit 1
is one row many times: its gradients add up, and no single pass sees all of them."""

_SHORT_ROW = 24
_MAGNIFICATION = 1000.0
_LARGEST_SHARE = 0.1


@dataclass(frozen=True)
class Subject:
    """A model with adapters and head at a public point where every gradient is non-zero.

    Attributes:
        model: The model; it is left as it was by `left_as_it_was` alone.
        train: Roles that train in the method's private phase.
        parts: Every movable array, public values.
        rows: Made-up rows, with the frozen prefix cached where a run would cache it.
        units: Their units, see `UNITS`.
        prefix: The frozen layers that are replayed; None where there are none.
        noise_multiplier: σ > 0 of the noise check.
    """

    model: RunModel
    train: frozenset[Role]
    parts: Parts
    rows: TokenisedDataset
    units: UnitIndex
    prefix: FrozenPrefix | None
    noise_multiplier: float

    @classmethod
    def of(cls, model: RunModel, method: Method, noise_multiplier: float) -> Subject:
        """Return the subject of a model that has been put on its device."""
        state = method.init(model.layout, torch.Generator().manual_seed(model.config.seed))
        phase = next(phase for phase in method.plan(state).phases if phase.private)
        prefix = find_prefix(model.adapted.encoder, model.adapted.sites)
        rows = made_up_rows(model.base, model.config.model.max_length, len(model.label_names))
        if prefix is not None:
            megabytes = model.config.kernels.prefix_cache_mb
            own_shapes = local_settings(model.config).own_shapes
            rows = cache_prefix(
                model.adapted.encoder, prefix, rows, PHYSICAL_BATCH, megabytes, own_shapes
            )
        return cls(
            model=model,
            train=phase.train,
            parts=_public_point(model.adapted, state.parts),
            rows=rows,
            units=chosen_units(range(len(UNITS))),
            prefix=prefix,
            noise_multiplier=noise_multiplier,
        )

    @property
    def config(self) -> RunConfig:
        """The configuration under examination."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.adapted.encoder.parameters()).device

    @property
    def trained(self) -> list[PartKey]:
        """The arrays that train, sorted."""
        return sorted(key for key in self.model.adapted.parameters() if key.role in self.train)

    def classifier(self) -> Classifier:
        """Return the classifier as a run trains it."""
        return Classifier(self.model.adapted.encoder, self.model.head, self.prefix).eval()

    def mechanism(self, noise_multiplier: float) -> Mechanism:
        """Return the configured clip and divisor with noise σ = ``noise_multiplier``."""
        privacy = self.config.privacy
        return Mechanism(
            clip_norm=privacy.clip_norm,
            groups=clip_groups(self.trained, privacy.clip_norm, privacy.head_share),
            noise_multiplier=noise_multiplier,
            expected_batch=self.config.optimizer.expected_batch,
        )

    def task(self, noise_multiplier: float, sample_rate: float) -> LocalTask:
        """Return a task from the public point; secret streams where there is noise."""
        sampling, noise = task_streams(noise_multiplier > 0, "doctor")
        return LocalTask(
            parts=self.parts,
            train=self.train,
            sample_rate=sample_rate,
            mechanism=self.mechanism(noise_multiplier),
            sampling=sampling,
            noise=noise,
        )

    def settings(self) -> LocalSettings:
        """Return the configured local training, in passes of few rows."""
        return replace(local_settings(self.config), physical_batch=PHYSICAL_BATCH)

    def trainer(
        self, settings: LocalSettings, classifier: Classifier | None = None
    ) -> LocalTrainer:
        """Return production's trainer on the made-up rows."""
        own = self.classifier() if classifier is None else classifier
        return LocalTrainer(own, self.model.adapted, self.rows, settings, self.device)

    def release(
        self,
        units: UnitIndex,
        noise_multiplier: float,
        classifier: Classifier | None = None,
    ) -> Tensor:
        """Return what one step releases, undivided, in units of C: (Σ clip + σC·N) / C.

        One SGD step of the whole local path, shared with another client where the run's
        clients share passes, in which every unit is drawn. The step
        is a thousand times the released sum over C, so that what float32 keeps of the
        difference is the sum and not the arrays it was added to.

        Returns:
            Shape (d,), float64, on the CPU; arrays in the order of `trained`.
        """
        rate = _MAGNIFICATION * self.config.optimizer.expected_batch / self.config.privacy.clip_norm
        settings = replace(
            self.settings(),
            optimizer="sgd",
            learning_rate=rate,
            head_learning_rate=rate,
            momentum=0.0,
            steps=1,
            rows_per_user=None,  # drawn anew, so two batches would differ by more than a unit
        )
        moved = self._trained(self.trainer(settings, classifier), noise_multiplier, units)
        change = [(self.parts[key].double() - moved[key].double()) for key in self.trained]
        return torch.cat([value.flatten() for value in change]) / _MAGNIFICATION

    def _trained(self, trainer: LocalTrainer, noise_multiplier: float, units: UnitIndex) -> Parts:
        """Train as the run does: alone, or beside another client that has units of its own."""
        task = self.task(noise_multiplier, 1.0)
        if clients_together(self.config) == 1:
            return trainer.train(task, units)
        companion = self.task(noise_multiplier, 1.0)
        return train_together(trainer, [task, companion], [units, chosen_units((0, 1))])[0]


@contextmanager
def left_as_it_was(adapted: AdaptedModel) -> Iterator[None]:
    """Bring every movable array back at the end, and let none require a gradient."""
    before = adapted.read(MODEL_ROLES)
    try:
        yield
    finally:
        adapted.write(before)
        adapted.select_trained(frozenset())


def chosen_units(chosen: Sequence[int]) -> UnitIndex:
    """Return the client that has these of the made-up `UNITS`, none too."""
    sizes = [len(UNITS[unit]) for unit in chosen]
    rows = np.array([row for unit in chosen for row in UNITS[unit]], dtype=np.int64)
    return UnitIndex(rows, np.cumsum([0, *sizes], dtype=np.int64))


def made_up_rows(base: BaseModel, longest: int, classes: int) -> TokenisedDataset:
    """Return rows of random ordinary tokens and labels from a public seed.

    Args:
        base: Whose vocabulary the tokens are from.
        longest: Tokens of row 0; the others have at most `_SHORT_ROW`, ragged.
        classes: Number of labels.

    Raises:
        ModelError: The tokenizer has nothing but special tokens.
    """
    tokenizer = base.tokenizer
    special = set(tokenizer.all_special_ids)
    words = np.array(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.int32)
    if not len(words):
        raise ModelError(
            f"model.name = {base.name!r}: its tokenizer has special tokens only; use the tokenizer "
            "that the model was published with"
        )
    draws = np.random.default_rng(0)
    count, most = 1 + max(map(max, UNITS)), min(longest, _SHORT_ROW)
    lengths = np.array([longest, *draws.integers(1, most + 1, count - 1)])
    pad = tokenizer.pad_token_id
    return TokenisedDataset(
        tokens=draws.choice(words, int(lengths.sum())),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_type_ids=None,
        labels=draws.integers(0, classes, count),
        pad_token_id=int((tokenizer.eos_token_id or 0) if pad is None else pad),
    )


def _public_point(adapted: AdaptedModel, initial: Parts) -> dict[PartKey, Tensor]:
    """Return every movable array, moved away from zeros in which gradients vanish.

    B gives each site an update of a tenth of its base weight's norm with a core that is
    the identity, and a trained head gets random entries: far inside what a site accepts
    of a server.
    """
    draws = torch.Generator().manual_seed(0)
    norms = {site.name: (site, norm) for site, norm in adapted.base_norms().items()}
    point = {
        **adapted.read(MODEL_ROLES),
        **{k: v for k, v in initial.items() if k in adapted.parameters()},
    }
    for key in sorted(point):
        value = point[key].float()
        random = torch.randn(value.shape, generator=draws)
        if key.role is Role.B:
            site, norm = norms[key.site]
            update = (
                site.scaling * float(random.norm()) * float(point[PartKey(key.site, Role.A)].norm())
            )
            value = random * (_LARGEST_SHARE * norm / update if update > 0 else 0.02)
        elif key.role is Role.CORE:
            value = torch.eye(value.shape[0])
        elif key.role is Role.HEAD:
            value = value + random / value.shape[-1] ** 0.5
        point[key] = value
    return point
