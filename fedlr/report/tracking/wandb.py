"""Weights & Biases: files in ``<run folder>/wandb``, sent later by ``wandb sync``.

``tracking.mode=offline`` (the default) uses no network; ``online`` sends at once, with the
key of ``wandb login`` or of ``WANDB_API_KEY``.
"""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from fedlr.errors import ConfigError
from fedlr.report.records import RoundRecord, Summary
from fedlr.report.tracking.memory import Sent
from fedlr.report.tracking.tracker import TrackedRun, closing, promise, series

if TYPE_CHECKING:
    from wandb import Run, Settings

Mode = Literal["offline", "online"]


class WandB:
    """Writes to Weights & Biases; see `fedlr.report.tracking.tracker.Tracker`.

    Nothing is recorded beside what is sent: no console, code, host, user, packages or
    hardware. Every process of a resumed run writes a folder of its own under one id;
    ``wandb sync`` joins them in their order.

    Args:
        uri: Address of a server of one's own; None is the tool's default.
        project: Name of the project.
        mode: ``offline``, or ``online``, which is untested.
    """

    def __init__(self, uri: str | None, project: str, mode: Mode) -> None:
        self._uri = uri
        self._project = project
        self._mode = mode
        self._run: Run | None = None
        self._sent: Sent | None = None
        self._finished = False

    def start(self, run: TrackedRun) -> None:
        """Make the run, or go on under its id."""
        import wandb

        self._sent = Sent(run.folder, "wandb", run.run)
        self._run = wandb.init(
            project=self._project,
            id=self._sent.id,
            name=run.run,
            dir=str(run.folder),
            config={**run.settings, "fedlr.rounds": run.rounds},
            resume="allow",
            settings=self._settings(),
        )
        self._sent.keep()
        for record in run.earlier:
            self.round(record)

    def round(self, record: RoundRecord) -> None:
        """Send a row at the round's step, unless it was sent before."""
        if self._run is None or self._sent is None or not self._sent.lacks(record.round):
            return
        self._run.log(series(record), step=record.round)
        self._sent.add(record.round)

    def finish(self, summary: Summary) -> None:
        """Put the result into the run's summary."""
        if self._run is not None:
            self._run.summary.update({**closing(summary), **promise(summary)})
            self._finished = True

    def close(self) -> None:
        """End the run: as crashed, unless it has finished."""
        if self._run is not None:
            self._run.finish(exit_code=0 if self._finished else 1)
            self._run = None
            if self._finished and self._sent is not None:
                self._sent.finish()

    def _settings(self) -> Settings:
        import wandb

        return wandb.Settings(
            mode=self._mode,
            **({} if self._uri is None else {"base_url": self._uri}),
            **dict.fromkeys(("disable_git", "disable_code", "disable_job_creation"), True),
            **dict.fromkeys(("x_disable_meta", "x_disable_stats", "x_disable_machine_info"), True),
            x_save_requirements=False,
            save_code=False,
            console="off",
            silent=True,
            host="",
            init_timeout=20,
        )


def check_key(uri: str | None) -> None:
    """Raise ConfigError where an online run would stop to ask for a key."""
    host = urlsplit(uri or os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    if not os.environ.get("WANDB_API_KEY") and not _is_known(str(host)):
        raise ConfigError(
            [
                f"tracking.mode = online but there is no key for {host}; run `wandb login`, set "
                "WANDB_API_KEY, or set tracking.mode=offline"
            ]
        )


def _is_known(host: str) -> bool:
    """Return whether ``~/.netrc`` has a key for ``host``, or one for every host."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except FileNotFoundError:
        return False
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        raise ConfigError(
            [
                f"tracking.mode = online needs the keys of {str(path)!r}, which cannot be read: "
                f"{getattr(error, 'strerror', None) or error}; mend the file, set WANDB_API_KEY, "
                "or set tracking.mode=offline"
            ]
        ) from error
