"""Command-line overrides → one frozen configuration, through Hydra."""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlr.cli.overrides import sort_out
from fedlr.cli.studies import GROUP
from fedlr.config import RunConfig, from_mapping
from fedlr.errors import ConfigError


def configuration_folder() -> Path:
    """Return the folder of ``config.yaml``: inside the installed package, or of the checkout.

    Raises:
        ConfigError: Neither exists: the installation is damaged.
    """
    if importlib.util.find_spec("fedlr.conf") is not None:
        found = Path(str(importlib.resources.files("fedlr.conf")))
        if (found / "config.yaml").is_file():
            return found
    checkout = Path(__file__).resolve().parents[2] / "conf"
    if (checkout / "config.yaml").is_file():
        return checkout
    raise ConfigError(["conf/config.yaml is not part of this installation; reinstall fedlr"])


def compose(overrides: Sequence[str]) -> RunConfig:
    """Compose ``config.yaml`` with Hydra overrides and check the result.

    Args:
        overrides: As on Hydra's command line: ``method=ffa_lora``,
            ``federation.rounds=5``, ``experiment=...``.

    Raises:
        ConfigError: Everything that is wrong at once: overrides that name nothing
            or cannot be read, and what `fedlr.config.from_mapping` objects to in
            what the others compose.
    """
    good, problems = sort_out(overrides, choices())
    try:
        config = from_mapping(_without_gaps(_compose(good)))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return config


def compose_mapping(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the composed plain mapping, values unchecked; ``???`` stands for what is missing.

    Raises:
        ConfigError: With all overrides that name nothing or cannot be read.
    """
    good, problems = sort_out(overrides, choices())
    if problems:
        raise ConfigError(problems)
    return _compose(good)


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose overrides that `sort_out` let through."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
            composed: DictConfig = hydra_compose("config", overrides=list(overrides))
        mapping: Any = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # The first line is the reason; below it come Hydra's search path and object types.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        words = " ".join(overrides)
        raise ConfigError(
            [f"{words} cannot be composed: {reason}; change or leave out one of these overrides"]
        ) from error
    for section in ("experiment", "debug"):
        mapping.pop(section, None)
    return {str(key): value for key, value in mapping.items()}


def _without_gaps(values: Any) -> Any:
    """Return ``values`` with null for the mandatory settings that nobody gave."""
    if isinstance(values, dict):
        return {key: _without_gaps(value) for key, value in values.items()}
    return None if values == "???" else values


def choices() -> dict[str, list[str]]:
    """Return the choices of every configuration group of a run, by group name.

    Studies are none: `fedlr.cli.studies` reads them, for ``fedlr sweep`` alone.
    """
    root = configuration_folder()
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        group = file.parent.relative_to(root).as_posix()
        if group not in (".", GROUP):
            found.setdefault(group, []).append(file.stem)
    return found
