"""What a run tells the outside: evaluation, log, display, journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedlr.methods.method import GlobalState, Parts
from fedlr.report.live import Progress, SilentProgress
from fedlr.report.records import RoundLog
from server.outcome import Checkpoint

Evaluate = Callable[[Parts], tuple[float, float]]
"""Parts → (accuracy in [0, 1], mean loss) on public data."""


class Journal(Protocol):
    """Durable memory of a run: with it a resumed run asks no site to pay twice for a phase."""

    def sending(self, round: int, phase: int, nonces: Mapping[str, str]) -> Mapping[str, str]:
        """Store the nonces of a phase durably before its jobs are sent.

        Args:
            round: Zero-based round.
            phase: Index of the phase in the round.
            nonces: Fresh nonce by client.

        Returns:
            The nonce to use by client: the stored one where an interrupted run
            has already sent this phase, ``nonces`` otherwise. A site that answered
            then gives the same update and pays nothing; one that was cut short
            abstains (``forfeited``); one that was never reached answers as ever.
        """
        ...

    def asked(self, round: int) -> frozenset[str]:
        """Return the clients that hold a nonce of ``round``: they have paid for it, or may have."""
        ...

    def finished(self, checkpoint: Checkpoint) -> None:
        """Store where the run stands after a closed round, abandoned or not."""
        ...

    def abandoned(self, refused: Collection[str]) -> None:
        """Forget the last nonce of each of these clients in a round that was given up.

        It is that of the phase in which they refused: the next try asks them anew there. What
        they answered before, and what others answered or may have, is paid for, and given again.
        """
        ...


class NoJournal:
    """Remembers nothing: for tests and runs that are repeated rather than resumed."""

    def sending(self, round: int, phase: int, nonces: Mapping[str, str]) -> Mapping[str, str]:
        """Return ``nonces``."""
        return nonces

    def asked(self, round: int) -> frozenset[str]:
        """Return nobody."""
        return frozenset()

    def finished(self, checkpoint: Checkpoint) -> None:
        """Do nothing."""

    def abandoned(self, refused: Collection[str]) -> None:
        """Do nothing."""


class Recorder(Protocol):
    """Gets the state after every completed round, before the round's own record is written.

    A round that a resumed run repeats is recorded again.
    """

    def record(self, state: GlobalState) -> None:
        """Keep what is to be known of ``state``, which must stay as it is."""
        ...


@dataclass(frozen=True)
class Hooks:
    """Everything a run calls; none of it changes the model.

    Attributes:
        evaluate: Measures parts on public data; None evaluates nothing.
        log: Gets one record per round; None writes none.
        progress: The display.
        journal: Durable memory.
        recorder: Gets the state after each round (`server.spectra`); None keeps none.
        wait: Called with seconds before a round is tried again.
    """

    evaluate: Evaluate | None = None
    log: RoundLog | None = None
    progress: Progress = field(default_factory=SilentProgress)
    journal: Journal = field(default_factory=NoJournal)
    recorder: Recorder | None = None
    wait: Callable[[float], None] = time.sleep
