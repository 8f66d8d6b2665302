"""``fedlr export``: the model of a run as a folder that others load without fedlr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.arguments import Parser
from fedlr.errors import ConfigError, RunError
from fedlr.report.facts import read_facts
from fedlr.report.records import SUMMARY_FILE, Summary, read_summary

if TYPE_CHECKING:
    from fedlr.restore import RunModel
    from server.outcome import Checkpoint

_ABOUT = """\
Write the model of a run as a folder that PyTorch, transformers and PEFT load without
fedlr; README.md in it says how. The run may be finished or interrupted: what counts
is its last whole round. Prints the folder as its last line."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: A run folder, and ``--merge``, ``--output <folder>`` or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("export", _ABOUT)
    parser.add_argument("run", metavar="<run>", type=Path, help="the run folder")
    parser.add_argument(
        "--merge", action="store_true", help="a whole model rather than an adapter for the base"
    )
    parser.add_argument(
        "--output",
        metavar="<folder>",
        type=Path,
        help="default: adapter or merged in the run folder",
    )
    given = parser.parse(words)
    if given is not None:
        print(export(given.run, given.merge, given.output))
    return 0


def export(folder: Path, merge: bool = False, output: Path | None = None) -> Path:
    """Write the model of the run in ``folder`` and return where it is.

    Args:
        folder: The run folder.
        merge: Write a whole model rather than an adapter for the base.
        output: Where to; None takes ``adapter`` or ``merged`` in the run folder.

    Raises:
        RunError: ``folder`` is no run folder or has no finished round, or ``output``
            is not empty.
        FedlrError: As `fedlr.restore.restore`.
    """
    read_facts(folder)  # before anything else: is it a run at all?
    target = output or folder / ("merged" if merge else "adapter")
    _check_free(target)
    model, checkpoint = load_run(folder)
    from fedlr.restore import save_result

    form = save_result(model, checkpoint.parts, _summary(folder, model, checkpoint), target, merge)
    if form == "merged" and not merge:
        print("fedlr: the rank is too large for an adapter; it is merged", file=sys.stderr)
    return target


def load_run(folder: Path) -> tuple[RunModel, Checkpoint]:
    """Return the model of a run, without its data, and where the run stands.

    Raises:
        RunError: ``folder`` is no run folder, is damaged, or has no finished round.
        FedlrError: As `fedlr.restore.restore`.
    """
    facts = read_facts(folder)
    from fedlr.restore import restore
    from server.journal import CHECKPOINT, JOURNAL, read_checkpoint, read_head
    from server.session import read_config

    if not (folder / JOURNAL / CHECKPOINT).exists():
        raise _no_round(folder)
    model = restore(read_config(folder, facts), facts, read_head(folder))
    checkpoint = read_checkpoint(folder, model.layout)
    if checkpoint is None or checkpoint.state.round == 0:
        raise _no_round(folder)
    return model, checkpoint


def _summary(folder: Path, model: RunModel, checkpoint: Checkpoint) -> Summary:
    """Return what the run measured at its last whole round, its ε as the ledgers have it."""
    from server.results import settle, so_far, summarise
    from server.session import order_of

    facts, outcome = read_facts(folder), so_far(checkpoint)
    if (folder / SUMMARY_FILE).exists():
        summary = read_summary(folder / SUMMARY_FILE)
        if summary.rounds == checkpoint.state.round:  # it may be from before a resume
            outcome = replace(outcome, accuracy=summary.accuracy)
    try:
        order = order_of(folder, model.config, facts)
    except ConfigError:  # the policies are elsewhere: the ledgers they name count as unreadable
        alone = replace(model.config.privacy, policies=None)
        order = order_of(folder, replace(model.config, privacy=alone), facts)
    outcome = settle(model.config, facts, order, outcome)
    wall_s = sum(record.wall_s for record in checkpoint.records)
    return summarise(model.config, facts, outcome, wall_s)


def _no_round(folder: Path) -> RunError:
    return RunError(
        f"the run in {str(folder)!r} has finished no round, so there is no trained model; "
        f"`fedlr simulate resume={folder}` goes on with it"
    )


def _check_free(target: Path) -> None:
    """Raise RunError unless ``target`` can be a new folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise RunError(
            f"{str(target)!r} is there already and is not empty, and nothing is written over; "
            "choose another place with --output <folder>, or remove it"
        )
