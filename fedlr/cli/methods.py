"""``fedlr methods``: everything that can be chosen, and what each choice trains and sends."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence

from fedlr.cli.arguments import Parser
from fedlr.cli.compose import configuration_folder

_ABOUT = """\
List methods, combiners, subspace policies and refreshes: what each trains, what it sends
up and down per site, whether its aggregation is exact and fit for secure aggregation, and
where it comes from. All of it is read off the methods themselves."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: ``--json`` or ``--help``, or none.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("methods", _ABOUT)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    given = parser.parse(words)
    if given is None:
        return 0
    from fedlr.method_facts import catalogue
    from fedlr.report import strict_json
    from fedlr.report.methods import text

    found = catalogue(_about())
    if given.json:
        print(strict_json.encode(found))
    else:
        print(text(found, shutil.get_terminal_size((100, 24)).columns), end="")
    return 0


def _about() -> dict[str, str]:
    """Return what each subspace policy is, by the comment that opens its file."""
    files = sorted((configuration_folder() / "subspace").glob("*.yaml"))
    found = {}
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        opening = itertools.takewhile(lambda line: line.startswith("#"), lines)
        found[path.stem] = " ".join(line.lstrip("# ") for line in opening)
    return found
