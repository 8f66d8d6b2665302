"""The composition root: a configuration becomes objects.

The only file that imports every layer. It starts nothing and releases nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from fedlr.adapters.codec import SCHEMA
from fedlr.adapters.core import add_cores
from fedlr.adapters.forward import use_kernel
from fedlr.adapters.inject import inject
from fedlr.adapters.quantised import missing_package
from fedlr.adapters.surgery import AdaptedModel
from fedlr.config import RunConfig
from fedlr.data.dataset import LoadedData
from fedlr.data.public import check_public
from fedlr.data.sources import SourceSpec, check_present, load
from fedlr.data.store import Store
from fedlr.errors import ConfigError
from fedlr.head_choice import build_head, label_texts, trained_head
from fedlr.kernels.dispatch import (
    KERNELS,
    NAIVE,
    TRITON,
    Call,
    ClippedSum,
    choose,
    clipped_sum,
    lora_linear,
)
from fedlr.lowrank.factors import AdapterSite
from fedlr.method_choice import Start, folds, method_of, method_problems, trains_cores
from fedlr.methods.method import MODEL_ROLES, Layout, Method
from fedlr.planning import ClientPlan, OwnRows, plan_clients
from fedlr.reuse import (
    NOTHING_SHARED,
    Reuse,
    base_key,
    resident_base,
    resident_tokens,
    rows_key,
    with_states,
)
from fedlr.training.base import BaseModel, model_size
from fedlr.training.classifier import Classifier
from fedlr.training.evaluate import Evaluator
from fedlr.training.jobs import Provenance
from fedlr.training.local import LocalSettings, LocalTrainer
from fedlr.training.memory import DEFAULT_ROWS, power_of_two, rows_that_fit
from fedlr.training.precision import check_same_bits, notices
from fedlr.training.prefix import FrozenPrefix, PrefixCache, find_prefix

CPU_TOKENS = 512
"""Tokens of a pass on a CPU: more are only more padding (``tests/benchmarks/test_batching.py``)."""


@dataclass(frozen=True)
class Workbench:
    """Everything a simulation needs, sharing one resident base model.

    Attributes:
        config: The configuration it was built from.
        base: The frozen encoder, its tokenizer and digests.
        adapted: Movable arrays of the model.
        head: The whole classification head, frozen or trained.
        layout: What the federation adapts.
        method: The federated method.
        trainer: Local training.
        evaluator: Public evaluation.
        provenance: Digests that jobs carry.
        data: The loaded data (train and public validation).
        clients: The simulated clients.
        majority: Share of the largest class of the validation split.
        notices: Sentences a reader of the results must know.
    """

    config: RunConfig
    base: BaseModel
    adapted: AdaptedModel
    head: nn.Module
    layout: Layout
    method: Method
    trainer: LocalTrainer
    evaluator: Evaluator
    provenance: Provenance
    data: LoadedData
    clients: tuple[ClientPlan, ...]
    majority: float
    notices: tuple[str, ...]

    @property
    def whole_head(self) -> dict[str, Tensor]:
        """Every parameter of the head, frozen ones too, by the name it has in parts."""
        return {f"head.{key}": value for key, value in self.head.state_dict().items()}


def build(
    config: RunConfig,
    say: Callable[[str], None] = lambda _: None,
    noise: Mapping[str, float] | None = None,
    evaluate: bool = True,
    reuse: Reuse = NOTHING_SHARED,
    own: OwnRows | None = None,
) -> Workbench:
    """Build everything that ``config`` describes.

    Args:
        config: A checked configuration.
        say: Told what is being done, one short line at a time.
        noise: σ by client where it is known; None calibrates it.
        evaluate: Whether validation will be asked for; False saves its frozen
            layers in a process that only trains.
        reuse: What other runs of this process have made already; changes no result.
        own: Rows of one real site, or of the server of real sites, in the place of what
            ``config`` says of data and clients.

    Raises:
        ConfigError: A setting that does not fit the model or the data.
        DataError, ModelError: Something cannot be loaded.
    """
    check_names(config)
    if config.kernels.threads is not None:
        torch.set_num_threads(config.kernels.threads)
    device, spec = device_of(config), source_spec(config) if own is None else own.spec
    store = None if config.data.cache is None else Store.open(config.data.cache, say)
    check_present(spec)
    base = resident_base(config, device, reuse, say)
    data = reuse.get("data", spec, lambda: _read(spec, say))
    model = _assembled(config, base, spec, data.label_names)
    # After what is quickly found wrong, before what takes long.
    clients = plan_clients(config, data, noise, say) if own is None else own.plan(data)
    classifier, adapted = model.start.classifier, model.start.adapted
    rows = rows_key(config, spec)
    longest = config.model.max_length
    training, validation = reuse.get(
        "tokens", rows, lambda: resident_tokens(base, data, longest, store, say)
    )
    settings = _fitting_settings(config, classifier, adapted, say)
    check_own_shapes(base, settings)
    if model.prefix is not None:
        cache = _prefix_cache(config, base, settings, store, say)
        parts, key = (training, validation), (rows, base_key(config, device))
        frozen = model.encoder, model.prefix
        training, validation = with_states(parts, cache, frozen, evaluate, reuse, key)
    return Workbench(
        config=config,
        base=base,
        adapted=adapted,
        head=model.head,
        layout=layout_of(adapted),
        method=method_of(config, model.start, reuse),
        trainer=LocalTrainer(classifier, adapted, training, settings, device),
        evaluator=Evaluator(classifier, adapted, validation, settings.physical_batch, device),
        provenance=provenance(config, base, data.label_names),
        data=data,
        clients=clients,
        majority=data.validation.majority,
        notices=(*data.notices, *notices(config.model.precision, settings.own_shapes)),
    )


@dataclass(frozen=True)
class _Model:
    """The base with its adapters and its head, and the layers that nothing trained reaches."""

    start: Start
    encoder: nn.Module
    head: nn.Module
    prefix: FrozenPrefix | None


def _assembled(
    config: RunConfig, base: BaseModel, spec: SourceSpec, labels: tuple[str, ...]
) -> _Model:
    """Put head and adapters of ``config`` on ``base``."""
    head = build_head(config, base, labels)
    encoder, sites = adapt(config, base)
    prefix = find_prefix(encoder, sites)
    on_device = head.to(device_of(config)).requires_grad_(False)
    classifier = Classifier(encoder, on_device, prefix)
    adapted = AdaptedModel(encoder, sites, trained_head(head, config.model.head))
    return _Model(Start(base, classifier, adapted, spec, labels), encoder, head, prefix)


def _read(spec: SourceSpec, say: Callable[[str], None]) -> LoadedData:
    say("reading the data")
    return load(spec)


def layout_of(adapted: AdaptedModel) -> Layout:
    """Return what a federation adapts: the sites, and the head as it is now."""
    head = {name: value.detach().cpu().clone() for name, value in adapted.head.items()}
    return Layout(adapted.sites, head)


def adapt(config: RunConfig, base: BaseModel) -> tuple[nn.Module, tuple[AdapterSite, ...]]:
    """Put the adapters of ``config`` on ``base``, with cores where its method trains them."""
    adapter = config.adapter
    encoder, sites = inject(
        base.encoder,
        adapter.modules,
        adapter.layers,
        adapter.rank,
        adapter.alpha,
        config.kernels.checkpointing,
    )
    if trains_cores(config):
        add_cores(encoder, sites)
    # Opacus and the reference look at the module that holds B, as PEFT calls it.
    if config.kernels.gradients == "captured":
        call, wanted = kernel_call(config), config.kernels.implementation
        if choose("lora_linear", call, wanted).implementation != NAIVE:
            use_kernel(encoder, sites, lora_linear(call, wanted))
    return encoder, sites


def kernel_call(config: RunConfig) -> Call:
    """Return what the choice of a kernel depends on."""
    dtype = torch.bfloat16 if config.model.precision == "bfloat16" else torch.float32
    nf4, cored = config.model.precision == "nf4", trains_cores(config)
    return Call(device_of(config), dtype, config.adapter.rank, quantised=nf4, cored=cored)


def _sum_kernel(config: RunConfig, own_shapes: int | None) -> ClippedSum | None:
    """Return what computes clipped sums from δ and z; None forms each unit's gradient."""
    call, wanted = kernel_call(config), config.kernels.implementation
    if config.kernels.gradients != "captured" or own_shapes is not None:
        return None
    if choose("clipped_sum", call, wanted).implementation != TRITON:
        return None
    return clipped_sum(call, wanted)


def _prefix_cache(
    config: RunConfig,
    base: BaseModel,
    settings: LocalSettings,
    store: Store | None,
    say: Callable[[str], None],
) -> PrefixCache:
    return PrefixCache(
        size=settings.physical_batch,
        tokens=settings.tokens_per_batch,
        megabytes=config.kernels.prefix_cache_mb,
        base_sha256=base.base_sha256,
        store=store,
        own_shapes=settings.own_shapes,
        say=say,
    )


def check_own_shapes(base: BaseModel, settings: LocalSettings) -> None:
    """Where rows need a shape of their own, refuse a model that this does not help.

    Raises:
        ModelError: See `fedlr.training.precision.check_same_bits`.
    """
    if settings.own_shapes is not None:
        vocabulary = model_size(base, "vocab_size")
        check_same_bits(base.encoder, vocabulary, settings.physical_batch, settings.own_shapes)


def _fitting_settings(
    config: RunConfig, classifier: Classifier, adapted: AdaptedModel, say: Callable[[str], None]
) -> LocalSettings:
    """Return `local_settings`, with a measured ``physical_batch`` where none is configured."""
    settings = local_settings(config)
    if config.kernels.physical_batch is not None:
        return settings
    trained = adapted.select_trained(MODEL_ROLES)
    kept, longest = adapted.base_bytes() if folds(config) else 0, config.model.max_length
    size = rows_that_fit(classifier, trained, settings.gradients, longest, say, kept)
    adapted.select_trained(frozenset())
    if settings.own_shapes is not None:  # every pass is filled up to that many rows
        size = min(size, power_of_two(config.optimizer.expected_batch))
    return replace(settings, physical_batch=size)


def check_names(config: RunConfig) -> None:
    """Check names that only the libraries know; ConfigError with all that are wrong."""
    problems = method_problems(config)
    if config.model.precision == "nf4" and (missing := missing_package()):
        problems.append(missing)
    if config.kernels.device == "cuda" and not torch.cuda.is_available():
        problems.append("kernels.device = cuda but no CUDA device is visible; use auto or cpu")
    else:
        for kernel in KERNELS:
            try:
                choose(kernel, kernel_call(config), config.kernels.implementation)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)


def check_data(config: RunConfig) -> None:
    """Raise DataError now if local data, or public text, are not there; reads no row."""
    check_present(source_spec(config))
    check_public(config.subspace.public, source_spec(config))


def source_spec(config: RunConfig) -> SourceSpec:
    """Return the data source that ``config.data`` describes, with the public seed."""
    data = config.data
    return SourceSpec(
        kind=data.kind,
        path=data.path,
        name=data.name,
        subset=data.subset,
        text_columns=data.text_columns,
        label_column=data.label_column,
        user_column=data.user_column,
        label_names=data.label_names,
        validation_fraction=data.validation_fraction,
        train_split=data.train_split,
        validation_split=data.validation_split,
        max_examples=data.max_examples,
        public=data.public,
        seed=config.seed,
        split_by_user=config.privacy.unit == "user",
    )


def local_settings(config: RunConfig) -> LocalSettings:
    """Return the public settings of local training."""
    optimizer, kernels = config.optimizer, config.kernels
    tokens = kernels.tokens_per_batch
    if tokens is None and device_of(config).type == "cpu":
        tokens = CPU_TOKENS
    needs_own_shapes = config.model.precision == "bfloat16" and config.privacy.mode != "none"
    own_shapes = config.model.max_length if needs_own_shapes else None
    return LocalSettings(
        optimizer=optimizer.name,
        learning_rate=optimizer.learning_rate,
        head_learning_rate=optimizer.head_learning_rate or optimizer.learning_rate,
        momentum=optimizer.momentum,
        steps=optimizer.steps,
        physical_batch=kernels.physical_batch or DEFAULT_ROWS,
        gradients=kernels.gradients,
        rows_per_user=config.privacy.rows_per_user,
        tokens_per_batch=tokens,
        own_shapes=own_shapes,
        kernel=_sum_kernel(config, own_shapes),
    )


def provenance(config: RunConfig, base: BaseModel, label_names: tuple[str, ...]) -> Provenance:
    """Return the digests that server and sites must agree on.

    ``labels`` is the sha256 of the canonical JSON of what gives the arrays their
    meaning: label names, head (with the texts that are embedded), adapters,
    ``model.max_length``, a ``model.precision`` below float32 and, where weights are
    drawn from it, the public seed.
    Settings and not computed weights, whose last bits differ between processors.
    """
    model = config.model
    texts = label_texts(model.head, label_names) if model.head.kind == "label_text" else None
    drawn = model.random_weights or model.head.kind == "random_cls"
    meaning = {
        "label_names": label_names,
        "head": {**asdict(model.head), "label_texts": texts},
        # Not the ranks of clients: those are in the shapes of what they are sent.
        "adapter": {k: v for k, v in asdict(config.adapter).items() if k != "rank_by_client"},
        "max_length": model.max_length,
        "seed": config.seed if drawn else None,
    }
    if model.precision != "float32":  # only then, so that older runs keep their digest
        meaning["precision"] = model.precision
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    labels = hashlib.sha256(text.encode()).hexdigest()
    return Provenance(base.base_sha256, base.tokenizer_sha256, labels, SCHEMA)


def device_of(config: RunConfig) -> torch.device:
    """Return the device that ``kernels.device`` means on this machine."""
    choice = config.kernels.device
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)
