"""Command-line overrides → one frozen configuration, through Hydra."""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
            ``federation.rounds=5``, ``+experiment=...``.

    Raises:
        ConfigError: An override that Hydra cannot parse or find, with Hydra's
            reason, or everything `fedlr.config.from_mapping` objects to.
    """
    return from_mapping(compose_mapping(overrides))


def compose_mapping(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the composed plain mapping, unchecked except for missing values."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
            composed: DictConfig = hydra_compose("config", overrides=list(overrides))
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError([f"{key} is missing; give {key}=<value>" for key in missing])
        mapping: Any = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            [f"the overrides cannot be composed: {reason}. `fedlr simulate --help` lists choices"]
        ) from error
    for section in ("experiment", "debug"):
        mapping.pop(section, None)
    return {str(key): value for key, value in mapping.items()}


def choices() -> dict[str, list[str]]:
    """Return the choices of every configuration group, by group name."""
    root = configuration_folder()
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        group = file.parent.relative_to(root).as_posix()
        if group != ".":
            found.setdefault(group, []).append(file.stem)
    return found
