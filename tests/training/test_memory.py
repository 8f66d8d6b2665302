"""The measured physical batch, and what checkpointing saves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.methods.method import PartKey, Role
from fedlr.privacy.gradients import GRADIENTS
from fedlr.training import memory
from fedlr.training.classifier import Classifier
from fedlr.training.memory import LiveBytes, free_bytes, power_of_two, rows_that_fit
from tests.models import CPU, FAMILIES, LONGEST, MOVABLE, Tiny, rows, tiny

ROLES = frozenset({Role.B, Role.HEAD})


def live_bytes(model: Tiny, gradients: str, count: int, roles: frozenset[Role] = ROLES) -> int:
    """The most bytes alive during per-unit gradients of ``count`` rows of `LONGEST` tokens."""
    trained = model.adapted.select_trained(roles)
    batch = rows([LONGEST] * count).batch(np.arange(count))
    path = GRADIENTS[gradients](model.classifier, trained)
    with LiveBytes() as live:
        path(partial(model.classifier.losses, batch), batch.unit_index, count)
    return live.peak


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("roles", [ROLES, MOVABLE], ids=["b", "all"])
@pytest.mark.parametrize("gradients", ["captured", "opacus"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less(family: str, gradients: str, roles: frozenset[Role]) -> None:
    """Of eight layers the inside of one is alive at a time, and the inputs of all."""
    plain = live_bytes(tiny(family, layers=8), gradients, 6, roles)
    saved = live_bytes(tiny(family, layers=8, checkpointing=True), gradients, 6, roles)
    assert saved < (0.55 if gradients == "captured" else 0.85) * plain


def test_live_bytes_are_those_of_tensors_that_are_alive() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        assert (live.now, live.peak) == (4000, 4000)
        second = view + 1
        assert live.now == 8000
        del first, view
        assert (live.now, live.peak) == (4000, 8000)
        del second
    assert (live.now, live.peak) == (0, 8000)


def found(
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    model: Tiny | None = None,
    say: Callable[[str], None] = lambda _: None,
    kept: int = 0,
) -> int:
    monkeypatch.setattr(memory, "free_bytes", lambda _: int(free))
    used = tiny() if model is None else model
    trained: dict[PartKey, torch.nn.Parameter] = used.adapted.select_trained(ROLES)
    return rows_that_fit(used.classifier, trained, "captured", LONGEST, say, kept)


def test_more_memory_gives_more_rows_of_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    row = live_bytes(tiny(), "captured", 8) / 8
    sizes = [found(monkeypatch, share * row) for share in (0, 1, 9, 33, 1e9)]
    assert sizes == [1, 1, 4, 16, 256]


def test_what_a_round_keeps_beside_its_passes_is_not_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = live_bytes(tiny(), "captured", 8) / 8
    kept = int(24 * row)
    assert found(monkeypatch, 33 * row) == 16
    assert found(monkeypatch, 33 * row + kept, kept=kept) == 16
    assert found(monkeypatch, 33 * row, kept=kept) == 4
    assert found(monkeypatch, row, kept=kept) == 1


def test_the_size_is_announced_and_the_model_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = tiny(), list[str]()
    before = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    size = found(monkeypatch, 1e6, model, told.append)
    assert told[0].startswith(f"a pass has {size} rows: ")
    after = model.classifier.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.grad is None for value in model.classifier.parameters())


class Scarce(Classifier):
    """A classifier that runs out of memory above ``limit`` rows."""

    limit = 0

    def losses(self, batch: object, rows: Tensor | None = None) -> Tensor:
        assert rows is not None
        if len(rows) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().losses(batch, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "expected"), [(8, 256), (2, 256), (0, 1)])
def test_a_probe_that_does_not_fit_is_halved(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    model, told = tiny(), list[str]()
    scarce = Scarce(model.classifier.encoder, model.classifier.head).eval()
    scarce.limit = limit
    assert found(monkeypatch, 1e12, Tiny(scarce, model.adapted), told.append) == expected
    assert ("does not fit" in told[0]) is (limit == 0)


def test_another_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(Classifier, "losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found(monkeypatch, 1e6, model)
    assert [power_of_two(value) for value in (0, 3, 8, 1e6)] == [1, 2, 8, 256]
    assert 0 <= free_bytes(CPU) <= memory.LARGEST_CPU_BYTES
