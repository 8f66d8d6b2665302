"""The command line: ``fedlr <verb> [overrides]``. Hydra is loaded by the verb, not here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlr import __version__
from fedlr.errors import FedlrError, RunError

VERBS = {
    "simulate": ("fedlr.cli.simulate", "run a simulated federation on this machine"),
    "sweep": ("fedlr.cli.sweep", "run a grid of configurations, or a study; goes on where it was"),
    "plan": ("fedlr.cli.plan", "print noise and ε of a run or a sweep before it is trained"),
    "methods": ("fedlr.cli.methods", "list methods, combiners and subspaces, and what they send"),
    "report": ("fedlr.cli.report", "write a run or a sweep as one page with figures"),
    "export": ("fedlr.cli.export", "write the model of a run as others load it"),
    "audit": ("fedlr.cli.audit", "attack a site's private training; bound its ε from below"),
    "server": ("fedlr.cli.server", "prepare the server of real sites, and let sites in"),
    "submit": ("fedlr.cli.submit", "ask real sites for a run, and follow it"),
    "status": ("fedlr.cli.status", "show the sites of a server and its runs"),
    "stop": ("fedlr.cli.stop", "end a run of real sites"),
    "agent": ("fedlr.cli.agent", "serve one real site: its data, ledger, policy and model"),
    "site": (
        "fedlr.cli.site",
        "bring up a real site; look at the runs that asked there, approve them",
    ),
    "health": ("fedlr.cli.health", "ask a running agent, SuperLink or SuperNode if it serves"),
    "ledger": ("fedlr.cli.ledger", "show, verify, export or mend a data source's ledger"),
    "predict": ("fedlr.cli.predict", "classify texts with the model of a run"),
    "doctor": ("fedlr.cli.doctor", "check that privacy holds on this machine, model and device"),
}

_USAGE = """\
fedlr {version}: federated fine-tuning with private low-rank aggregation

usage: fedlr simulate [overrides]
       fedlr sweep sweep=<study> [overrides] [--plan]
       fedlr plan [overrides] [--sizes=<N,N,…>] [--ledgers=<run folder>] [--json]
       fedlr doctor [overrides] [--json]
       fedlr audit [overrides] [--canaries=<n>] [--confidence=<p>] [--json]
       fedlr methods [--json]
       fedlr report <run folder or sweep> [--output <folder>] [--markdown]
       fedlr export <run folder> [--merge] [--output <folder>]
       fedlr server <action> <folder> [<public key>]
       fedlr submit <folder> [overrides] [--resume <run>]
       fedlr status <folder>
       fedlr stop <folder> <run>
       fedlr agent <policy.toml>
       fedlr site init <folder> …
       fedlr site <action> <policy.toml> [<run>]
       fedlr health <address>
       fedlr ledger <action> <file>
       fedlr predict <run folder> "text" … [--json]

verbs:
{verbs}

overrides are Hydra's, for example
  fedlr simulate method=ffa_lora partition=dirichlet federation.rounds=5
`fedlr simulate --help` lists the choices of every section, `fedlr sweep --help` the studies."""


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
        message goes to standard error without a traceback; 130 after Ctrl-C;
        141 where the reader of standard output went away (``fedlr … | head``).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(words)
        print(end="", flush=True)
    except BrokenPipeError:
        # Python flushes what is left once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def check_siblings() -> None:
    """Check that ``server`` and ``client`` are the packages that came with ``fedlr``.

    The names are general: a file of the working folder, or another distribution,
    can stand before them on the import path. Nothing is imported.

    Raises:
        RunError: One of them is missing, or lies in another folder than ``fedlr``.
    """
    home = _place("fedlr")
    for name in ("server", "client"):
        found = _place(name)
        expected = home.with_name(name) if home else None
        if found is None or found != expected:
            raise RunError(
                f"the name {name!r} means {found or 'nothing'} here, not {expected}, the package "
                f"that fedlr was installed with; rename or uninstall the other {name!r}, or start "
                "fedlr from another folder"
            )


def _place(name: str) -> Path | None:
    """Return the folder of a package, or the file of a module, as an import would find it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    place = folders[0] if folders else spec.origin
    # Installers may link single files into place; what counts is the folder around a package.
    return Path(place).parent.resolve() / Path(place).name if place else None


def _run(words: Sequence[str]) -> int:
    """Answer a question about the program, or run a verb."""
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
        check_siblings()
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
