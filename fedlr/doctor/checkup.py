"""The two forms of the examination: the long one of ``fedlr doctor``, the short one of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from fedlr.adapters.surgery import AdaptedModel
from fedlr.build import (
    Workbench,
    adapt,
    check_names,
    check_own_shapes,
    local_settings,
    source_spec,
)
from fedlr.config import RunConfig
from fedlr.data.sources import load
from fedlr.doctor import clipping, durability, exchange, frozen, gradients, kernels, noise, versions
from fedlr.doctor.finding import Check, Finding, find
from fedlr.doctor.subject import UNITS, Subject, left_as_it_was
from fedlr.errors import DoctorError
from fedlr.head_choice import build_head
from fedlr.method_choice import Start, method_of
from fedlr.restore import RunModel
from fedlr.training.base import check_capacity, check_rows_alone, load_base
from fedlr.training.classifier import Classifier

_OTHER_PATH = "set kernels=reference, or kernels.device=cpu, and report it"
_STOP = "trust no private run of this installation; reinstall fedlr and its requirements"
_DISK = "set output=<folder on a local disk>, on which SQLite can lock and synchronise"
_IMPLEMENTATION = "set kernels.implementation=auto"
_VERSIONS = "install the versions that fedlr asks for (pip install --upgrade fedlr)"
_SOME = (0, 1)  # the longest row, and the unit of most rows


def examine(config: RunConfig, say: Callable[[str], None] = lambda _: None) -> tuple[Finding, ...]:
    """Carry out every check on the model and device of ``config``.

    Args:
        config: A checked configuration; no private row is used, no ledger of a run
            is opened. Its data are read for nothing but the label list, and not even
            for that where ``data.label_names`` gives it; the text of ``subspace.public``
            is, where the first A is made of it.
        say: Told what is being done, one short line at a time.

    Raises:
        ConfigError, ModelError, DataError: As `fedlr.build.build`: there is nothing
            to examine.
    """
    model = _load(config, say)
    classifier = Classifier(model.adapted.encoder, model.head)
    start = Start(model.base, classifier, model.adapted, source_spec(config), model.label_names)
    method = method_of(config, start)
    subject = Subject.of(model, method, noise_multiplier=1.0)
    removed = {
        **_neighbours(config, range(len(UNITS))),
        **dict.fromkeys(clipping.OVERFLOWING, _SOME),
    }
    extras = [
        *(["demo"] if config.model.name == "embedded" else []),
        *(["ray"] if config.federation.engine == "ray" else []),
        *(["4bit"] if config.model.precision == "nf4" else []),
    ]
    checks = [
        *_private_step(subject, removed),
        Check("kernels", partial(kernels.in_use, config), _IMPLEMENTATION),
        Check("adapter round trip", partial(exchange.round_trip, subject), _STOP),
        Check("secret entropy", noise.secret_entropy, _STOP),
        Check("durable ledger", partial(durability.survives_a_kill, Path(config.output)), _DISK),
        Check("versions", partial(versions.known_to_work, extras), _VERSIONS),
    ]
    with left_as_it_was(model.adapted):
        return tuple(_found(check, say) for check in checks)


def quick(workbench: Workbench) -> tuple[Finding, ...]:
    """Carry out the checks that can differ by model and device, before a run's first round.

    Args:
        workbench: What will run; it is left as it was.

    Returns:
        What was found, all of it passed; nothing unless ``privacy.mode=dp``.

    Raises:
        DoctorError: A check failed: nothing private may be released.
    """
    config = workbench.config
    if config.privacy.mode != "dp":
        return ()
    sigma = min(plan.noise_multiplier for plan in workbench.clients)
    with left_as_it_was(workbench.adapted):
        subject = Subject.of(RunModel.of(workbench), workbench.method, sigma)
        findings = tuple(map(find, _private_step(subject, _neighbours(config, _SOME))))
    _refuse(findings, str(subject.device))
    return findings


def _refuse(findings: Sequence[Finding], device: str) -> None:
    """Raise DoctorError with every failed check, its measure, its bound and the way out."""
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        told = "\n".join(f"  - {f.name}: {f.detail}; {f.remedy}" for f in failed)
        raise DoctorError(
            f"privacy does not hold on this machine ({device}), and nothing was trained:\n{told}\n"
            "`fedlr doctor` with the same overrides examines everything"
        )


def _neighbours(config: RunConfig, loud: Sequence[int]) -> dict[float, Sequence[int]]:
    """Return what the clip check removes: ``loud`` units where every gradient is clipped."""
    return {1.0: _SOME, clipping.HUGE * max(1.0, config.privacy.clip_norm): loud}


def _private_step(subject: Subject, removed: Mapping[float, Sequence[int]]) -> list[Check]:
    """Return the checks of the private step itself."""
    return [
        Check("per-unit gradients", partial(gradients.same_as_autograd, subject), _OTHER_PATH),
        Check(
            "clip bound",
            partial(clipping.at_most_the_clip, subject, removed),
            _OTHER_PATH,
        ),
        Check("noise", partial(noise.present_and_fresh, subject), _STOP),
        Check("base unchanged", partial(frozen.base_unchanged, subject), _STOP),
    ]


def _load(config: RunConfig, say: Callable[[str], None]) -> RunModel:
    """Build the model as a run would, on its device."""
    check_names(config)
    model, settings = config.model, config.kernels
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if settings.device == "auto" else settings.device)
    say(f"loading the model {model.name}")
    seed = config.seed if model.random_weights else None
    base = load_base(model.name, model.revision, model.sha256, seed, model.precision)
    base.encoder.to(device)
    check_capacity(base, model.max_length)
    check_rows_alone(base, model.max_length)
    label_names = config.data.label_names
    if label_names is None:
        say("reading the label list of the data")
        label_names = load(source_spec(config)).label_names
    head = build_head(config, base, label_names).to(device).requires_grad_(False)
    check_own_shapes(base, local_settings(config))
    encoder, sites = adapt(config, base)
    movable = dict(head.named_parameters()) if model.head.trained else {}
    adapted = AdaptedModel(encoder, sites, {f"head.{name}": v for name, v in movable.items()})
    return RunModel(config, base, adapted, head, label_names)


def _found(check: Check, say: Callable[[str], None]) -> Finding:
    say(f"checking: {check.name}")
    return find(check)
