"""The checks of the private step pass on honest code and catch planted defects in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlr.doctor import clipping, frozen, gradients, noise
from fedlr.doctor.finding import Check, Finding, find
from fedlr.doctor.subject import UNITS, Subject, left_as_it_was
from fedlr.kernels.clipped_sum import naive
from fedlr.methods.method import MODEL_ROLES, PartKey, Role
from fedlr.privacy.dpsgd import ClippedSum, Mechanism, private_gradient
from fedlr.privacy.gradients import GRADIENTS, CapturedGradients
from fedlr.privacy.noise import Stream, task_streams
from fedlr.training.local import LocalTrainer
from tests.doctor.subjects import subject

REMOVED = dict.fromkeys((1.0, 1e12, *clipping.OVERFLOWING), range(len(UNITS)))

CHECKS: dict[str, Callable[[Subject], Check]] = {
    "gradients": lambda s: Check("gradients", partial(gradients.same_as_autograd, s), "-"),
    "clip": lambda s: Check("clip", partial(clipping.at_most_the_clip, s, REMOVED), "-"),
    "noise": lambda s: Check("noise", partial(noise.present_and_fresh, s), "-"),
    "base": lambda s: Check("base", partial(frozen.base_unchanged, s), "-"),
}


def ask(name: str, one: Subject) -> Finding:
    return find(CHECKS[name](one))


HONEST: list[dict[str, Any]] = [
    {},
    {"family": "albert", "kernels": {"gradients": "captured"}},
    {"family": "distilbert", "kernels": {"gradients": "opacus"}},
    {"kernels": {"gradients": "autograd"}, "method": {"name": "head_only"}},
    {
        "method": {"name": "fedavg_lora"},
        "optimizer": {"name": "adam", "learning_rate": 0.002},
        "on": (1,),
    },
    {"privacy": {"clip_norm": 1e6}, "optimizer": {"learning_rate": 1e-6}},
    # The run's own bound on sizes would end such steps, which is no fault of the machine.
    {"method": {"name": "fedavg_lora"}, "optimizer": {"learning_rate": 1e5}},
    {"method": {"name": "fed_sb"}},
    {"method": {"name": "flora"}},
    {"privacy": {"unit": "user", "rows_per_user": 2}},
    {"privacy": {"clip_norm": 1e-4, "head_share": 0.3}, "method": {"name": "ffa_lora"}},
]


@pytest.mark.parametrize("changes", HONEST, ids=str)
def test_honest_code_passes_and_the_model_is_left_as_it_was(changes: dict[str, Any]) -> None:
    one = subject(**changes)
    before = one.model.adapted.read(MODEL_ROLES)
    with left_as_it_was(one.model.adapted):
        found = {name: ask(name, one) for name in CHECKS}
    assert {name: finding.verdict for name, finding in found.items()} == dict.fromkeys(
        CHECKS, "passed"
    ), found
    after = one.model.adapted.read(MODEL_ROLES)
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert not any(value.requires_grad for value in one.model.adapted.parameters().values())


def test_the_clip_is_reached_and_the_prefix_is_in_use() -> None:
    """Else the bound would hold of itself, and the cached path would not be examined."""
    one = subject(on=(1,))
    assert one.rows.hidden is not None
    assert "at most 1.000000 C" in ask("clip", one).detail


class Scaled(CapturedGradients):
    """Off by one per cent."""

    def __call__(self, *given: Any) -> dict[PartKey, Tensor]:
        return {key: 1.01 * value for key, value in super().__call__(*given).items()}


class Leaking(CapturedGradients):
    """Every unit gets a hundredth of its neighbour's gradient."""

    def __call__(self, *given: Any) -> dict[PartKey, Tensor]:
        found = super().__call__(*given)
        return {key: value + 0.01 * value.roll(1, 0) for key, value in found.items()}


class NotFinite(CapturedGradients):
    """One path of the model overflows."""

    def __call__(self, *given: Any) -> dict[PartKey, Tensor]:
        return {key: value * torch.nan for key, value in super().__call__(*given).items()}


@pytest.mark.parametrize("wrong", [Scaled, Leaking, NotFinite])
def test_a_wrong_gradient_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRADIENTS, "captured", wrong)
    assert not ask("gradients", subject()).passed


def test_a_model_that_no_gradient_reaches_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject(method={"name": "head_only"})
    monkeypatch.setattr(one.model.head, "forward", lambda h, m: h.new_zeros(len(h), 3) * h.sum())
    with torch.no_grad():
        finding = ask("gradients", one)
    assert not finding.passed


class Piecewise(ClippedSum):
    """Clips what each pass sees of a unit."""

    def add(self, gradients: Mapping[PartKey, Tensor], units: object, last: object) -> None:
        count = len(next(iter(gradients.values())))
        super().add(gradients, range(count), [True] * count)


def unclipped(squared: Tensor, bound: float) -> Tensor:
    return torch.ones_like(squared)


def too_wide(squared: Tensor, bound: float) -> Tensor:
    return REAL_FACTORS(squared, 1.001 * bound)


def not_guarded(squared: Tensor, bound: float) -> Tensor:
    return (bound / squared.sqrt()).clamp_max(1.0)


REAL_FACTORS = naive.clip_factors


@pytest.mark.parametrize("wrong", [unclipped, too_wide, not_guarded])
def test_a_missing_or_wrong_clip_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "clip_factors", wrong)
    if wrong is not_guarded:  # NaN times zero, as a plain product would have it
        monkeypatch.setattr(
            naive, "clipped_sum", lambda g, f: (g.flatten(1) * f[:, None]).sum(0).view(g.shape[1:])
        )
    finding = ask("clip", subject())
    assert not finding.passed
    assert "bound 1.00001 C" in finding.detail


@pytest.mark.parametrize("together", [1, 3])
def test_clipping_each_pass_alone_is_caught(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr("fedlr.training.local.ClippedSum", Piecewise)
    finding = ask("clip", subject(kernels={"fused_clients": together}))
    assert not finding.passed
    assert "bound 1.00001 C" in finding.detail


def test_clipping_each_group_to_all_of_c_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "clip_factors", lambda squared, bound: REAL_FACTORS(squared, 0.5))
    assert not ask("clip", subject(privacy={"clip_norm": 0.5, "head_share": 0.3})).passed


REAL_GAUSSIAN = Stream.gaussian


@pytest.mark.parametrize("scale", [0.0, 2 / 3, 0.85, 1.5])
def test_missing_or_mis_sized_noise_is_caught(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Stream, "gaussian", lambda self, shape, sd: scale * REAL_GAUSSIAN(self, shape, sd)
    )
    assert not ask("noise", subject()).passed


def test_one_stream_for_two_steps_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", lambda count: bytes(count))
    finding = ask("noise", subject())
    assert not finding.passed
    assert "0.000 in their difference" in finding.detail
    assert not find(Check("entropy", noise.secret_entropy, "-")).passed


@pytest.mark.parametrize("together", [1, 3])
def test_a_skipped_empty_batch_is_caught(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Wherever the run's step is made: by one client alone, or by several in one pass."""
    real = private_gradient

    def skipping(clipped: Any, mechanism: Mechanism, stream: Stream) -> Any:
        if all(not value.any() for value in clipped.values()):
            return dict(clipped)
        return real(clipped, mechanism, stream)

    monkeypatch.setattr("fedlr.training.local.private_gradient", skipping)
    finding = ask("noise", subject(kernels={"fused_clients": together}))
    assert not finding.passed
    assert "0.000 in an empty one" in finding.detail


def test_noise_on_some_arrays_only_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a tiny model is a quarter of what trains."""
    monkeypatch.setattr(
        Stream,
        "gaussian",
        lambda self, shape, sd: REAL_GAUSSIAN(self, shape, sd if 3 not in shape else 0.0),
    )
    assert not ask("noise", subject()).passed


REAL_TRAIN = LocalTrainer.train


def test_a_changed_base_weight_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    weight = next(
        value
        for name, value in one.model.adapted.encoder.named_parameters()
        if "base_layer" in name
    )

    def train(self: LocalTrainer, *given: Any) -> Any:
        found = REAL_TRAIN(self, *given)
        with torch.no_grad():
            weight.view(torch.int32)[0, 0] ^= 1  # the last bit
        return found

    monkeypatch.setattr(LocalTrainer, "train", train)
    finding = ask("base", one)
    assert not finding.passed
    assert "frozen weights have changed" in finding.detail


def test_a_moved_a_is_caught_where_only_b_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject(method={"name": "ffa_lora"})
    a = next(v for k, v in one.model.adapted.parameters().items() if k.role is Role.A)

    def train(self: LocalTrainer, *given: Any) -> Any:
        found = REAL_TRAIN(self, *given)
        with torch.no_grad():
            a.mul_(1 + 1e-6)
        return found

    monkeypatch.setattr(LocalTrainer, "train", train)
    assert "does not train and has moved" in ask("base", one).detail


def test_an_optimiser_that_does_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    finding = ask("base", subject())
    assert not finding.passed
    assert "trains and has not moved" in finding.detail


def test_a_stream_that_can_be_copied_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(Check("entropy", noise.secret_entropy, "-")).passed
    monkeypatch.setattr(Stream, "__reduce_ex__", lambda self, _: (dict, ()))
    assert "copied" in find(Check("entropy", noise.secret_entropy, "-")).detail


def public(*given: Any) -> tuple[Stream, Stream]:
    return task_streams(False, *given[1:])


def alike(*given: Any) -> tuple[Stream, Stream]:
    """One key for sampling and noise."""
    return Stream(bytes(32), secret=True), Stream(bytes(32), secret=True)


@pytest.mark.parametrize(
    ("wrong", "says"), [(public, "not from the system's entropy"), (alike, "the same numbers")]
)
def test_wrong_streams_of_a_task_are_caught(
    wrong: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "task_streams", wrong)
    finding = find(Check("entropy", noise.secret_entropy, "-"))
    assert not finding.passed
    assert says in finding.detail


def test_accepted_public_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "private_gradient", lambda *_: {})
    assert "public stream is accepted" in find(Check("entropy", noise.secret_entropy, "-")).detail


@pytest.mark.parametrize("count", [1, 2048, 10**7])
def test_the_bounds_of_the_deviation_are_those_of_a_chi_squared(count: int) -> None:
    from scipy.stats import chi2

    low, high = noise.deviation_bounds(count, 4)
    outside = chi2.cdf(count * low**2, count) + chi2.sf(count * high**2, count)
    assert 4 * outside <= noise.FALSE_ALARM


def test_a_check_that_breaks_has_failed() -> None:
    def broken() -> Any:
        raise RuntimeError("out of memory\nand a page of details")

    finding = find(Check("step", broken, "use another device"))
    assert finding.verdict == "failed"
    assert finding.detail == "could not be carried out: RuntimeError: out of memory"
    assert finding.remedy == "use another device"
