"""Installed versions against the ranges that this distribution was tested with."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fedlr.doctor.finding import Result

DISTRIBUTION = "fedlr"
DISPENSABLE = {"triton": "which only kernels on a GPU need"}
"""What fedlr computes without, and why that is no mistake; images for CPUs leave it out."""

SHOWN = ("torch", "opacus", "peft", "transformers", "flwr", "hydra-core")


def known_to_work(extras: Iterable[str] = ()) -> Result:
    """Compare Python and every requirement of the distribution with what is installed.

    Args:
        extras: Optional parts that the configuration needs, such as ``ray``.

    Returns:
        Failed where something is missing or older than the tested range; a warning
        where something is newer, or the ranges are not known. What is missing and
        dispensable is only mentioned.
    """
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return Result(
            True, f"{DISTRIBUTION} is not installed, so the tested versions are not known", True
        )
    python = SpecifierSet(about["Requires-Python"] or "")
    failed = _against("python", platform.python_version(), python)
    problems: list[str] = [failed] if failed else []
    newer: list[str] = []
    without = ""
    for requirement in _requirements(extras):
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if why := DISPENSABLE.get(requirement.name):
                without += f"; without {requirement.name}, {why}"
            else:
                problems.append(f"{requirement.name} is not installed")
            continue
        sentence = _against(requirement.name, installed, requirement.specifier)
        if sentence is not None:
            late = _is_newer(installed, requirement.specifier)
            (newer if late else problems).append(sentence)
    if problems or newer:
        return Result(not problems, "; ".join([*problems, *newer]), warning=not problems)
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN)
    python_now = platform.python_version()
    return Result(True, f"known to work together: Python {python_now}, {shown}{without}")


def _requirements(extras: Iterable[str]) -> list[Requirement]:
    """Return the requirements that hold on this platform, for the core and ``extras``."""
    listed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    wanted = ["", *extras]
    return [
        requirement
        for requirement in listed
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in wanted)
    ]


def _against(name: str, installed: str, tested: SpecifierSet) -> str | None:
    """Say that a version is outside its range, or None."""
    if tested.contains(installed, prereleases=True):
        return None
    late = "newer than" if _is_newer(installed, tested) else "not in"
    return f"{name} {installed} is {late} the tested range {tested}"


def _is_newer(installed: str, tested: SpecifierSet) -> bool:
    """Whether a version above every lower end is outside the range."""
    lower = [part for part in tested if part.operator in (">=", ">", "==", "~=")]
    version = Version(installed)
    return all(version > Version(part.version.removesuffix(".*")) for part in lower)
