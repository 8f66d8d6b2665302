"""Words of the verbs that take no overrides; a mistake there is a sentence, not a usage dump."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from fedlr.errors import ConfigError
from fedlr.report.units import printable


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` of one verb whose complaints are ConfigErrors.

    Args:
        verb: Its name, as after ``fedlr``.
        about: What it does, one or more sentences.
    """

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(
            prog=f"fedlr {verb}",
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's reason and the way out."""
        raise ConfigError([f"{printable(message)}; see `{self.prog} --help`"])

    def parse(self, words: Sequence[str]) -> argparse.Namespace | None:
        """Return the parsed words, options anywhere; None where help was asked for, and printed.

        Raises:
            ConfigError: A word that is missing, unknown or of the wrong type.
        """
        try:
            return self.parse_intermixed_args(list(words))
        except SystemExit:  # only ``--help`` leaves so: `error` raises
            return None
