"""``fedlr doctor``: does what privacy rests on hold on this machine, model and device?"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlr.cli.arguments import Parser
from fedlr.cli.compose import compose
from fedlr.errors import DoctorError
from fedlr.report.live import say
from fedlr.report.units import printable

if TYPE_CHECKING:
    from fedlr.doctor.finding import Finding

_ABOUT = """\
Check on this machine, for the model, adapters, gradient path and device of a configuration,
that the private step does what its accounting assumes, that the ledger outlives a kill and
that the installed versions are known to work together. Overrides are those of `fedlr
simulate`. Only made-up rows are used; nothing is trained, booked or kept. Every private run
begins with the short form of this. Exits with 0 if nothing failed, else with 10."""

_WIDTH = 100
_INDENT = 36


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: Hydra overrides, and ``--json`` or ``--help``.

    Returns:
        0, or the exit code of `DoctorError` where a check failed; what leaves nothing
        to examine is raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("doctor", _ABOUT)
    parser.add_argument("overrides", metavar="overrides", nargs="*", default=[])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse(words)
    if given is None:
        return 0
    config = compose(given.overrides)
    from fedlr.doctor.checkup import examine

    findings = examine(config, say)
    sound = all(finding.passed for finding in findings)
    if given.json:
        print(json.dumps({"passed": sound, "findings": [_record(f) for f in findings]}))
    else:
        print(table(findings))
    return 0 if sound else DoctorError.exit_code


def table(findings: Sequence[Finding]) -> str:
    """Return one entry per finding: name, verdict, seconds, measure and bound; then the sum."""
    lines = []
    for finding in findings:
        head = f"{finding.name:<20} {finding.verdict:<7} {finding.seconds:>4.1f} s"
        text = finding.detail + (f" -> {finding.remedy}" if finding.remedy else "")
        body = textwrap.wrap(printable(text), _WIDTH - _INDENT, break_long_words=False)
        gap = " " * _INDENT
        lines += [f"{head:<{_INDENT}}{body[0]}", *(gap + line for line in body[1:])]
    failed = [finding.name for finding in findings if not finding.passed]
    seconds = sum(finding.seconds for finding in findings)
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    return "\n".join([*lines, f"{len(findings)} checks in {seconds:.1f} s: {verdict}"])


def _record(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "verdict": finding.verdict,
        "detail": finding.detail,
        "remedy": finding.remedy or None,
        "seconds": round(finding.seconds, 3),
    }
