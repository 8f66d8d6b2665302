"""The sections of a configuration as frozen dataclasses: one field, one default, one meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedlr.config.method import AdapterConfig, CombineConfig, MethodConfig, SubspaceConfig


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The classification head.

    Attributes:
        kind: ``linear`` (zero-initialised, mean pooling), ``label_text`` (label-text
            embeddings on normalised mean-pooled features) or ``random_cls``
            (the paper's frozen random head on the first token).
        trained: Whether clients train it; its clip share is `PrivacyConfig.head_share`.
        feature_scale: Norm that pooled features are normalised to; null leaves
            them as they are (``linear`` only).
        label_scale: Multiplies the centred label-text embeddings (``label_text``).
        label_texts: One descriptive text per label; null uses the data's own.
    """

    kind: Literal["linear", "label_text", "random_cls"] = "label_text"
    trained: bool = False
    feature_scale: float | None = 4.4721
    label_scale: float = 13.4164
    label_texts: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base encoder.

    Attributes:
        name: ``embedded`` (the packaged MiniLM), a hub name, or a local folder.
        revision: Hub revision (commit, tag or branch); null takes the default one.
        sha256: Expected digest of ``model.safetensors``; null skips the check.
        max_length: Tokens an example is cut at.
        random_weights: Ignore the weights and draw them from the public seed: for
            tests of the machinery, never for a result.
        precision: Of the frozen weights: ``float32``; ``bfloat16``, rounded to it and
            computed in it; ``nf4``, linear layers stored in 4 bits and computed in float32
            (extra ``4bit``). A, B, head, gradients, clipping and noise are float32 always.
        head: The classification head.
    """

    name: str = "embedded"
    revision: str | None = None
    sha256: str | None = None
    max_length: int = 64
    random_weights: bool = False
    precision: Literal["float32", "bfloat16", "nf4"] = "float32"
    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from; see `fedlr.data.sources`.

    Attributes:
        kind: ``stdlib``, ``hub`` or ``file``.
        path: Folder or file (``file``).
        name: Data set name on the hub (``hub``).
        subset: Hub configuration name.
        text_columns: One or two columns.
        label_column: Column of the label.
        user_column: Column of the natural unit, if any.
        label_names: The label list, public; null takes the source's declared list.
        train_split: Training split (``hub``), or file name without ending (``file``).
        validation_split: Public validation split, named likewise; null takes the first
            found of validation, valid, dev and test.
        validation_fraction: Share cut off as public validation where there is no
            validation split.
        max_examples: Cap on training examples; null uses all.
        cache: Folder, of the owner alone, in which tokens and hidden states of frozen
            layers are kept and memory-mapped by later runs and other processes: a
            path, absolute or from the current folder, ``~`` allowed. They are as
            private as the text; deleting the folder removes them. null keeps nothing.
        public: Declares the data public: the only data that ``privacy.mode=dry``
            accepts. The one default that differs from ``conf/``: there the embedded
            data are declared public by name, while code must declare nothing so.
    """

    kind: Literal["stdlib", "hub", "file"] = "stdlib"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    user_column: str | None = None
    label_names: tuple[str, ...] | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.2
    max_examples: int | None = None
    cache: str | None = None
    public: bool = False

    @property
    def label(self) -> str:
        """What reports call the data: the name on the hub, the path, or the kind."""
        return self.name or self.path or self.kind


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How a simulation splits examples over clients (public seed).

    Attributes:
        kind: ``iid``, ``dirichlet`` (label skew) or ``natural`` (by user).
        alpha: Dirichlet concentration; smaller is more skewed.
    """

    kind: Literal["iid", "dirichlet", "natural"] = "iid"
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """What is guaranteed to a site's units. See `fedlr/privacy/README.md`.

    Attributes:
        mode: ``dp``; ``dry`` (the private path without noise, public data only);
            ``none`` (plain training).
        epsilon: Target ε of every site over the whole run, > 0.
        delta: Target δ; null is min(1e-5, 1 / (10·N)) of each site's declared N.
        unit: What one unit of privacy is.
        clip_norm: C, bound on one unit's gradient over all trained parameters, 1e-6 to 1e6.
        head_share: Share of C² given to a trained head, in (0, 1): it is clipped to
            C·√share and the adapters to C·√(1 − share). null: one joint clip.
        accountant: ``prv`` or ``rdp``.
        max_joins: Rounds one site may join; null is every round.
        rows_per_user: Rows of one user that a step uses at most, chosen anew each time
            (``unit: user``); null is all of them.
        policies: Folder with a ``<client>.toml`` for each site whose operator allows less
            than this configuration (`client.policy`); null: none does.
    """

    mode: Literal["dp", "dry", "none"] = "dp"
    epsilon: float = 8.0
    delta: float | None = None
    unit: Literal["example", "user"] = "example"
    clip_norm: float = 1.0
    head_share: float | None = None
    accountant: Literal["prv", "rdp"] = "prv"
    max_joins: int | None = None
    rows_per_user: int | None = None
    policies: str | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Local training of one round.

    Attributes:
        name: ``sgd`` or ``adam`` (state is fresh each round).
        learning_rate: Step size of the adapter factors.
        head_learning_rate: Step size of a trained head; null is the same.
        momentum: Heavy-ball momentum inside a round (``sgd``), in [0, 1).
        steps: Local steps per round; an empty Poisson batch is a step.
        expected_batch: L, expected units per step and the divisor of the sum.
    """

    name: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 4.0
    head_learning_rate: float | None = None
    momentum: float = 0.0
    steps: int = 5
    expected_batch: int = 128


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who takes part and when.

    Attributes:
        engine: ``local`` runs every client in this process; ``ray`` runs them on
            Flower's simulation engine, in processes of a Ray cluster; ``deploy`` asks real
            sites (``fedlr submit``).
        clients: Number of clients K.
        clients_per_round: Cohort size, ≤ clients.
        rounds: Number of rounds.
        min_clients: Fewer accepted updates than this end the run cleanly, or have the round
            tried again.
        spare_clients: Clients asked beyond the cohort: a round goes on once the cohort's
            number has answered, and the others have spent their ε in vain.
        retries: Times that a round below ``min_clients`` is tried again; who has paid for it
            gives the same update.
        retry_wait_s: Seconds before each of those.
        longest_pause: Most rounds that a failing client is left out of: 1, 2, 4, … after each
            failure in a row; 0 asks it again at once.
        evaluate_every: Evaluate on public data every k rounds (and at the end).
        average_rounds: The result is the mean of the effective weights of the last
            this many rounds; 1 is the last round alone. Free post-processing.
        start_timeout_s: Seconds until every client must have answered before the first
            round; each process loads the model in that time.
        round_timeout_s: Seconds after which a round goes on without the clients that
            have not answered; null waits for all (``flwr run``: one hour).
        address: ``host:port`` of an existing Ray cluster (``ray``); null starts one on
            this machine.
        cpus_per_client: CPUs of each client process (``ray``), also its torch threads.
        gpus_per_client: GPUs of each client process (``ray``); 0.5 shares one between
            two, 0 hides them.
    """

    engine: Literal["local", "ray", "deploy"] = "local"
    clients: int = 6
    clients_per_round: int = 6
    rounds: int = 8
    min_clients: int = 1
    spare_clients: int = 0
    retries: int = 0
    retry_wait_s: float = 0.0
    longest_pause: int = 0
    evaluate_every: int = 2
    average_rounds: int = 1
    start_timeout_s: float = 600.0
    round_timeout_s: float | None = None
    address: str | None = None
    cpus_per_client: int = 1
    gpus_per_client: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Performance choices; none can change a guarantee.

    Attributes:
        gradients: ``captured`` (δᵀz of the adapter layers), ``opacus`` (its hooks),
            or ``autograd`` (one unit at a time: slow, the reference).
        implementation: ``naive`` (PEFT's products, torch's sums), ``triton`` (the kernels of
            `fedlr.kernels`, on an NVIDIA GPU), or ``auto``: what was measured to pay, which
            is told by ``fedlr doctor``. With ``gradients=captured``; the others are naive.
        physical_batch: Most rows per forward pass; null measures how many fit the free
            memory.
        checkpointing: Compute the inside of adapted layers again in the backward pass
            instead of keeping it.
        tokens_per_batch: Most tokens per forward pass of training, rows × longest row; a
            longer row passes alone. null takes 512 on a CPU, and on a GPU bounds the rows
            only.
        threads: CPU threads of torch; null leaves torch's default.
        device: ``auto`` (CUDA when present), ``cpu`` or ``cuda``.
        fused_clients: Clients of the engine ``local`` that share a pass through the model;
            1 trains one after the other; null takes as many expected batches as fill a
            physical one. Needs ``gradients=captured``, torch's sums and a float32 base;
            otherwise clients train one after the other.
        prefix_cache_mb: Megabytes for the hidden states of the frozen layers below
            the first adapter, which are then computed once; 0 keeps none. Bounds
            the training and the validation rows separately, so twice it in all.
    """

    gradients: Literal["captured", "opacus", "autograd"] = "captured"
    implementation: Literal["auto", "naive", "triton"] = "auto"
    physical_batch: int | None = 32
    checkpointing: bool = False
    tokens_per_batch: int | None = None
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fused_clients: int | None = None
    prefix_cache_mb: int = 1024


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where else the server shows the run while it goes on; see `fedlr.report.tracking`.

    Attributes:
        kind: ``none``, or the tool; each is an extra of this package.
        uri: ``mlflow``: ``sqlite:///<file>`` or the http(s) address of a server, null is
            ``mlflow.db`` in `RunConfig.output`; ``wandb``: the address of a server of one's
            own. Without a password: those belong in the tool's environment variables.
        project: What the tool collects runs under: letters, digits, ``.``, ``_``, ``-``.
        mode: ``offline`` or ``online`` (``wandb``).
    """

    kind: Literal["none", "tensorboard", "mlflow", "wandb", "trackio"] = "none"
    uri: str | None = None
    project: str = "fedlr"
    mode: Literal["offline", "online"] = "offline"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Sections mirror the folders of ``conf/``.

    Attributes:
        seed: Public seed: partitions, cohorts and initial factors. Never noise.
        name: Last part of the run folder's name.
        output: Folder that run folders are made in.
    """

    seed: int = 0
    name: str = "simulate"
    output: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    combine: CombineConfig = field(default_factory=CombineConfig)
    subspace: SubspaceConfig = field(default_factory=SubspaceConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
