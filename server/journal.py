"""The durable memory of a run: where it stands, and the nonces of the round it is in.

``journal/checkpoint.safetensors`` holds the last completed round whole: it is replaced
in one step, so a reader finds the old one or the new one. ``journal/sending.json`` holds
the nonces of the open round, written before its jobs leave: a resumed run sends the same
ones, and a site that was paid for answers with the same update.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from fedlr.errors import RunError
from fedlr.methods.method import GlobalState, Layout, PartKey, Parts, Role
from fedlr.report import strict_json
from fedlr.report.records import ROUNDS_FILE, read_rounds, write_atomically
from fedlr.report.sweep import LOCK
from server.outcome import Checkpoint

JOURNAL, CHECKPOINT, SENDING, HEAD = (
    "journal",
    "checkpoint.safetensors",
    "sending.json",
    "head.safetensors",
)
_SCHEMA, _WITHOUT_UNHEARD, _WITHOUT_RANKS = (
    "fedlr.journal.3",
    "fedlr.journal.2",
    "fedlr.journal.1",
)
_LOCK_S = 0.5
"""A report that looks whether a run is going on holds the lock for less."""


@dataclass(frozen=True)
class _Header:
    """What a checkpoint holds beside arrays; states are numbered from the oldest.

    ``order`` is that of the arrays, which the file sorts: sums over parts must run in
    the same order after a resume, to the last bit.
    """

    schema: str
    order: tuple[str, ...]
    rounds: tuple[int, ...]
    recent: int
    joins: Mapping[str, int]
    steps: Mapping[str, int]
    epsilon: Mapping[str, float]
    unheard: tuple[str, ...]
    accuracy_start: float | None
    ranks: tuple[Mapping[str, int], ...]
    holders: Mapping[str, str]


@dataclass(frozen=True)
class _Sending:
    """Nonces of the open round by phase, then by client; round −1 is none."""

    round: int = -1
    phases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class FileJournal:
    """The journal of one run folder; one process at a time holds it.

    Args:
        folder: The run folder; its ``journal`` folder is made if it is missing.

    Raises:
        RunError: Another process holds it, it cannot be written, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place = folder / JOURNAL
        try:
            self._place.mkdir(exist_ok=True)
            self._lock = FileLock(folder / LOCK, thread_local=False)
            self._lock.acquire(timeout=_LOCK_S)
        except Timeout as error:
            raise RunError(
                f"the run in {str(folder)!r} is being continued by another process; wait for it"
            ) from error
        except OSError as error:
            raise RunError(
                f"the journal in {str(self._place)!r} cannot be written "
                f"({error.strerror or error}); make the run folder writable for this user"
            ) from error
        self._sending = _read_sending(self._place / SENDING)

    def sending(self, round: int, phase: int, nonces: Mapping[str, str]) -> Mapping[str, str]:
        """See `server.hooks.Journal.sending`."""
        phases = dict(self._sending.phases) if self._sending.round == round else {}
        known = phases.get(str(phase), {})
        phases[str(phase)] = {**nonces, **known}
        self._write_sending(_Sending(round, phases))
        return {client: known.get(client, nonce) for client, nonce in nonces.items()}

    def asked(self, round: int) -> frozenset[str]:
        """See `server.hooks.Journal.asked`."""
        phases = self._sending.phases.values() if self._sending.round == round else ()
        return frozenset(client for nonces in phases for client in nonces)

    def abandoned(self, refused: Collection[str]) -> None:
        """See `server.hooks.Journal.abandoned`."""
        left, phases = set(refused), dict[str, Mapping[str, str]]()
        for phase in sorted(self._sending.phases, key=int, reverse=True):
            nonces = self._sending.phases[phase]
            phases[phase] = {c: nonce for c, nonce in nonces.items() if c not in left}
            left -= nonces.keys()
        self._write_sending(_Sending(self._sending.round, phases))

    def finished(self, checkpoint: Checkpoint) -> None:
        """See `server.hooks.Journal.finished`; the records are in ``rounds.jsonl``."""
        write_atomically(self._place / CHECKPOINT, _encode(checkpoint))

    def checkpoint(self, layout: Layout) -> Checkpoint | None:
        """Return where the run stands; see `read_checkpoint`."""
        return read_checkpoint(self._folder, layout)

    def close(self) -> None:
        """Let another process continue the run."""
        self._lock.release()

    def _write_sending(self, sending: _Sending) -> None:
        self._sending = sending
        write_atomically(self._place / SENDING, strict_json.encode(sending).encode())


def read_checkpoint(folder: Path, layout: Layout) -> Checkpoint | None:
    """Return where the run in ``folder`` stands after its last completed round.

    Args:
        folder: The run folder.
        layout: What the run adapts; not stored, it follows from the configuration.

    Returns:
        The checkpoint, with the records of its rounds; None before the first one.

    Raises:
        RunError: The file is damaged or gone, or a record of its rounds is missing.
    """
    path = folder / JOURNAL / CHECKPOINT
    records = read_rounds(folder / ROUNDS_FILE) if (folder / ROUNDS_FILE).exists() else []
    completed = max((record.round for record in records if record.accepted), default=0)
    if not path.exists():
        # The record of a round is written just before its checkpoint.
        if completed > 1:
            raise RunError(
                f"{path} is gone, though {completed} rounds were finished; bring it back from a "
                "copy, the run cannot go on without it"
            )
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            header = strict_json.decode(_Header, _migrated((file.metadata() or {})["header"]))
            arrays = {name: file.get_tensor(name) for name in header.order}
        if header.schema != _SCHEMA:
            raise ValueError(f"its schema is {header.schema!r}, this program knows {_SCHEMA!r}")
        states = _states(arrays, header, layout)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{path} is damaged: {error}; restore it from a copy") from error
    done = states[-1].round
    kept = tuple(record for record in records if record.round <= done)
    if len(kept) != done or completed > done + 1:
        raise RunError(
            f"{folder / ROUNDS_FILE} tells of {completed} rounds, {path} of {done}; one of them is "
            "from another time, bring back the newest of both"
        )
    return Checkpoint(
        state=states[-1],
        recent=states[len(states) - header.recent :],
        records=kept,
        joins=header.joins,
        steps=header.steps,
        epsilon=header.epsilon,
        unheard=frozenset(header.unheard),
        accuracy_start=header.accuracy_start,
        holders=header.holders,
    )


def write_head(folder: Path, head: Mapping[str, torch.Tensor]) -> None:
    """Keep the whole head, frozen parameters too, as it was before the first round."""
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in head.items()}
    write_atomically(folder / JOURNAL / HEAD, safetensors.torch.save(whole))


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    """Return what `write_head` kept; RunError where it is missing or damaged."""
    path = folder / JOURNAL / HEAD
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}; restore it from a copy") from error


def _encode(checkpoint: Checkpoint) -> bytes:
    states = checkpoint.recent or (checkpoint.state,)
    arrays = {}
    for number, state in enumerate(states):
        for kind, parts in (("parts", state.parts), ("memory", state.memory)):
            for key, value in parts.items():
                name = f"{number}|{kind}|{key.site}|{key.role.value}"
                # A copy of its own: parts may share storage, which the format refuses.
                arrays[name] = value.detach().cpu().clone().contiguous()
    header = _Header(
        schema=_SCHEMA,
        order=tuple(arrays),
        rounds=tuple(state.round for state in states),
        recent=len(checkpoint.recent),
        joins=checkpoint.joins,
        steps=checkpoint.steps,
        epsilon=checkpoint.epsilon,
        unheard=tuple(sorted(checkpoint.unheard)),
        accuracy_start=checkpoint.accuracy_start,
        ranks=tuple(state.ranks for state in states),
        holders=checkpoint.holders,
    )
    return safetensors.torch.save(arrays, metadata={"header": strict_json.encode(header)})


def _migrated(text: str) -> str:
    """Return a header as it is written today.

    An earlier one does not tell who was not heard: all are unheard until they report again.
    """
    found = json.loads(text)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema == _WITHOUT_RANKS:
        found |= {"ranks": [{}] * len(found.get("rounds", ())), "holders": {}}
    if schema in (_WITHOUT_RANKS, _WITHOUT_UNHEARD):
        return json.dumps({**found, "schema": _SCHEMA, "unheard": sorted(found["epsilon"])})
    return text


def _states(
    arrays: Mapping[str, torch.Tensor], header: _Header, layout: Layout
) -> tuple[GlobalState, ...]:
    """Return the states in ``arrays``; ValueError where there is none."""
    if not header.rounds or not 0 <= header.recent <= len(header.rounds):
        raise ValueError("it holds no state")
    if len(header.ranks) != len(header.rounds):
        raise ValueError(f"it has the ranks of {len(header.ranks)} of {len(header.rounds)} states")
    return tuple(
        GlobalState(
            layout=layout,
            parts=_parts(arrays, number, "parts"),
            round=done,
            memory=_parts(arrays, number, "memory"),
            ranks=header.ranks[number],
        )
        for number, done in enumerate(header.rounds)
    )


def _parts(arrays: Mapping[str, torch.Tensor], number: int, kind: str) -> Parts:
    found: dict[PartKey, torch.Tensor] = {}
    for name, value in arrays.items():
        index, group, site, role = name.split("|")
        if (index, group) == (str(number), kind):
            found[PartKey(site, Role(role))] = value
    return found


def _read_sending(path: Path) -> _Sending:
    try:
        return strict_json.decode(_Sending, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _Sending()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; restore it from a copy") from error
