"""The records of a run: one line per round, one summary at the end.

``rounds.jsonl`` is append-only. A line is committed by its newline, so a crash
in the middle of a write costs at most the line that was being written.
``summary.json`` is written whole or not at all. Both are strict JSON
(`fedlr.report.strict_json`): ε = ∞ is the string ``"inf"``, NaN is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlr import checks
from fedlr.errors import RunError
from fedlr.report import strict_json
from fedlr.report.lines import LineLog, read_lines

ROUNDS_FILE, SUMMARY_FILE = "rounds.jsonl", "summary.json"
"""Their names in a run folder."""

PRIVACY_MODES = ("dp", "dry", "none")

_CODE = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Refusal:
    """A client whose update was not aggregated, or that abstained.

    Attributes:
        client: Public identifier of the client.
        code: A code from a fixed list, lower case with underscores, at most 40
            characters: a sentence, which could quote a private row, is refused.

    Raises:
        ValueError: ``code`` does not have that form.
    """

    client: str
    code: str

    def __post_init__(self) -> None:
        if not _CODE.fullmatch(self.code):
            raise ValueError(
                f"code = {self.code!r} must be a lower-case code of at most 40 characters "
                "such as 'over_budget'; free text may quote private data"
            )


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One closed round, completed or abandoned: one line of ``rounds.jsonl``.

    Attributes:
        round: Number of the round, ≥ 1.
        cohort: Clients that were asked, in client order.
        accepted: Updates that were aggregated, ≤ the size of the cohort; 0 in a
            round that was abandoned because too few clients joined.
        refused: The others, each with its code; ``no_answer`` where a client
            sent no reply in time, ``quorum`` where its valid update was given
            up with the round.
        accuracy: Share of the public validation data classified correctly, in
            [0, 1]; None when this round was not evaluated.
        loss: Mean cross-entropy on the same data, nats; may be ∞ for a model
            that diverged; None when this round was not evaluated.
        epsilon_max: Largest ε spent by any client so far; ∞ in dry mode, None
            where privacy is off.
        epsilon_by_client: ε spent so far by client; empty where privacy is off.
        bytes_down: Encoded payload sent to all clients in this round, bytes.
        bytes_up: Encoded payload received from all clients, bytes.
        wall_s: Duration of the whole round, seconds, measured by the server.
        server_s: The part of it spent aggregating, seconds.
        steps: Local optimiser steps of all accepted updates, empty batches
            included.

    Raises:
        ValueError: A value outside its range, or an ε without a maximum.
    """

    round: int
    cohort: tuple[str, ...]
    accepted: int
    bytes_down: int
    bytes_up: int
    wall_s: float
    server_s: float
    steps: int
    refused: tuple[Refusal, ...] = ()
    accuracy: float | None = None
    loss: float | None = None
    epsilon_max: float | None = None
    epsilon_by_client: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.at_least("round", self.round, 1)
        for name in ("accepted", "bytes_down", "bytes_up", "steps"):
            checks.at_least(name, getattr(self, name), 0)
        for name in ("wall_s", "server_s"):
            checks.non_negative(name, getattr(self, name))
        if self.accepted > len(self.cohort):
            raise ValueError(
                f"accepted = {self.accepted} must be ≤ {len(self.cohort)}, the size of the cohort"
            )
        _share("accuracy", self.accuracy)
        _up_to_infinity("loss", self.loss)
        _up_to_infinity("epsilon_max", self.epsilon_max)
        for client, epsilon in self.epsilon_by_client.items():
            _up_to_infinity(f"epsilon_by_client[{client!r}]", epsilon)
            if self.epsilon_max is None or epsilon > self.epsilon_max:
                raise ValueError(
                    f"epsilon_by_client[{client!r}] = {epsilon} must be ≤ epsilon_max = "
                    f"{self.epsilon_max}; the maximum is over all clients"
                )


@dataclass(frozen=True, kw_only=True)
class ClientSummary:
    """What one client contributed to a run; all of it public.

    Attributes:
        client: Public identifier.
        joins: Rounds in which an update of this client was accepted.
        steps: Local optimiser steps over those rounds.
        noise_multiplier: σ, noise standard deviation in units of the clipping
            norm; 0 in dry mode, None where privacy is off.
        epsilon: ε spent in the end; ∞ in dry mode, None where privacy is off.

    Raises:
        ValueError: A value outside its range.
    """

    client: str
    joins: int
    steps: int
    noise_multiplier: float | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        checks.at_least("joins", self.joins, 0)
        checks.at_least("steps", self.steps, 0)
        if self.noise_multiplier is not None:
            checks.non_negative("noise_multiplier", self.noise_multiplier)
        _up_to_infinity("epsilon", self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run: the content of ``summary.json``.

    Attributes:
        method: Name of the federated method, e.g. ``"fedsvd"``.
        model: Name of the base model.
        data: Name of the data source.
        data_sha256: Digest of the data, hex; of its public validation split and
            label list alone where the data are not declared public.
        label_names: The declared labels, in the order of the classes.
        majority: Share of the largest class of the validation split, [0, 1]:
            what a constant answer scores.
        rounds: Finished rounds.
        accuracy_start: Validation accuracy before training, [0, 1].
        accuracy: Validation accuracy at the last evaluation, [0, 1].
        privacy_mode: ``dp``, ``dry`` (private path, no noise) or ``none``.
        unit: Unit of privacy, e.g. ``"example"``; None where privacy is off.
        accountant: Name of the accountant; None where privacy is off.
        epsilon_max: Largest ε of any client; ∞ in dry mode, else None if off.
        epsilon_budget: The bound that stops a client; None if there is none.
        delta: δ of every ε here (the largest if they differ); None if off.
        bytes_up: Mean encoded payload of one client in one round, upwards.
        bytes_down: The same, downwards.
        wall_s: Duration of the run, seconds.
        server_s: The part of it spent aggregating, seconds.
        clients: One entry per client, in the order of the federation.
        notices: Sentences a reader of the numbers must know; the last one says why rounds are
            missing, where any are.

    Raises:
        ValueError: A value outside its range, or an ε that contradicts
            ``privacy_mode``: a dry run must say ∞, a plain one nothing.
    """

    method: str
    model: str
    data: str
    data_sha256: str
    label_names: tuple[str, ...]
    majority: float
    rounds: int
    privacy_mode: str
    bytes_up: int
    bytes_down: int
    wall_s: float
    server_s: float
    clients: tuple[ClientSummary, ...]
    accuracy_start: float | None = None
    accuracy: float | None = None
    unit: str | None = None
    accountant: str | None = None
    epsilon_max: float | None = None
    epsilon_budget: float | None = None
    delta: float | None = None
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rounds", "bytes_up", "bytes_down"):
            checks.at_least(name, getattr(self, name), 0)
        for name in ("wall_s", "server_s"):
            checks.non_negative(name, getattr(self, name))
        for name in ("majority", "accuracy_start", "accuracy"):
            _share(name, getattr(self, name))
        for name in ("epsilon_max", "epsilon_budget"):
            _up_to_infinity(name, getattr(self, name))
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta = {self.delta} must be in (0, 1)")
        self._check_privacy()

    def _check_privacy(self) -> None:
        mode = checks.one_of("privacy_mode", self.privacy_mode, PRIVACY_MODES)
        given = (self.epsilon_max, self.delta)
        if mode == "none" and given != (None, None):
            raise ValueError(f"epsilon_max, delta = {given} must be None: privacy_mode is none")
        if mode == "dp" and None in given:
            raise ValueError(f"epsilon_max, delta = {given} must be given: privacy_mode is dp")
        if mode == "dry" and self.epsilon_max != math.inf:
            raise ValueError(f"epsilon_max = {given[0]} must be ∞: a dry run adds no noise")


class RoundLog(LineLog[RoundRecord]):
    """Appends to ``rounds.jsonl``, see `fedlr.report.lines.LineLog`."""


def read_rounds(path: Path) -> list[RoundRecord]:
    """Return the committed rounds of a log, in rising order, see `fedlr.report.lines.read_lines`.

    Raises:
        RunError: The file cannot be read, or a committed line is damaged; the
            message names its number.
    """
    lines = read_lines(path, RoundRecord)
    if lines.problem is not None:
        raise RunError(f"{lines.problem}; restore the file from a copy")
    return list(lines.records)


def write_summary(path: Path, summary: Summary) -> None:
    """Write ``summary.json``: a reader finds the old file or the new one, whole.

    Raises:
        RunError: The file cannot be written; an older one is left as it was.
    """
    write_atomically(path, (strict_json.encode(summary, indent=2) + "\n").encode())


def read_summary(path: Path) -> Summary:
    """Return the summary that `write_summary` wrote.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        return strict_json.decode(Summary, Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(
            f"{path} is damaged: {error}; delete it, and `fedlr simulate resume=<run folder>` "
            "settles the run anew"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by ``content`` through a temporary file in the same folder.

    Raises:
        RunError: The folder cannot be written; an older file stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _synchronise(folder: Path) -> None:
    """Wait until the folder's entries are on the disk: a rename survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share(name: str, value: float | None) -> None:
    if value is not None:
        checks.in_range(name, value, 0.0, 1.0)


def _up_to_infinity(name: str, value: float | None) -> None:
    """Check that ``value`` is None or in [0, ∞]; NaN fails the comparison."""
    if value is not None and not value >= 0:
        raise ValueError(f"{name} = {value} must be ≥ 0 and not NaN")
