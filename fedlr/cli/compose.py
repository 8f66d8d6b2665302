"""Command-line overrides → one frozen configuration, through Hydra."""

from __future__ import annotations

import copy
import importlib.resources
import importlib.util
import itertools
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlr.cli.overrides import sort_out
from fedlr.cli.studies import GROUP
from fedlr.config import RunConfig, from_mapping
from fedlr.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


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
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = choices()
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        of_files = [one.key_or_group in groups or one.package is not None for one in parsed]
        chosen = tuple(itertools.compress(overrides, of_files))
        composed = copy.deepcopy(_of_choices(configuration_folder(), chosen))
        for one, is_choice in zip(parsed, of_files, strict=True):
            if not is_choice:  # as Hydra does it, behind all choices
                OmegaConf.update(composed, one.key_or_group, one.value(), merge=True)
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


@lru_cache(maxsize=256)
def _of_choices(folder: Path, words: tuple[str, ...]) -> DictConfig:
    """Return what choices of files compose, by Hydra, which is slow: cells of a sweep share it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(folder), version_base="1.3"):
        found: DictConfig = hydra_compose("config", overrides=list(words))
    return found


def _without_gaps(values: Any) -> Any:
    """Return ``values`` with null for the mandatory settings that nobody gave."""
    if isinstance(values, dict):
        return {key: _without_gaps(value) for key, value in values.items()}
    return None if values == "???" else values


def listed_choices() -> str:
    """Return `choices` as lines of a help text, at most 100 columns wide."""
    return "\n".join(
        textwrap.fill(
            ", ".join(files), 100, initial_indent=f"  {name:<13} ", subsequent_indent=" " * 16
        )
        for name, files in choices().items()
    )


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
