"""The command line: ``fedlr <verb> [overrides]``. Hydra is loaded by the verb, not here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from fedlr import __version__
from fedlr.errors import FedlrError

VERBS = {
    "simulate": ("fedlr.cli.simulate", "run a simulated federation on this machine"),
}

_USAGE = """\
fedlr {version}: federated fine-tuning with private low-rank aggregation

usage: fedlr <verb> [overrides]

verbs:
{verbs}

overrides are Hydra's, for example
  fedlr simulate method=ffa_lora partition=dirichlet federation.rounds=5
`fedlr <verb> --help` lists the choices of every section."""


def usage() -> str:
    """Return the text of ``fedlr --help``."""
    verbs = "\n".join(f"  {name:<10} {line}" for name, (_, line) in VERBS.items())
    return _USAGE.format(version=__version__, verbs=verbs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: Words after the program's name; None takes ``sys.argv``.

    Returns:
        0 on success; the `FedlrError.exit_code` of a user's mistake, whose
        message goes to standard error without a traceback; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"fedlr {__version__}")
        return 0
    if words[0] not in VERBS:
        print(f"fedlr: {words[0]!r} is not a verb\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        verb: Any = importlib.import_module(VERBS[words[0]][0])
        return int(verb.run(words[1:]))
    except FedlrError as error:
        print(f"fedlr: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fedlr: stopped by Ctrl-C", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
