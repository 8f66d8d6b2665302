"""One process at a time works with a site: its agent, or a check of it.

The ledger alone would bear two. But a check loads the model a second time and trains a step on
the same device: an agent beside it could run out of memory in a job that is paid for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedlr.errors import RunError


@contextmanager
def held(ledger: Path) -> Iterator[None]:
    """Keep the site of a ledger to this process for the block.

    Args:
        ledger: Its file.

    Raises:
        RunError: Another process has it, or this user cannot lock it.
    """
    lock = FileLock(f"{ledger}.agent", mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
        _give_to_owner(Path(lock.lock_file), ledger)
    except Timeout as error:
        raise RunError(
            f"another agent serves the ledger {ledger}, or a check of it is under way; stop the "
            "agent first (it finishes its job), or wait for the check"
        ) from error
    except OSError as error:
        lock.release()
        raise RunError(
            f"{lock.lock_file} cannot be locked: {error.strerror or error}; use the user who owns "
            f"{ledger}, e.g. with sudo -u"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _give_to_owner(lock: Path, ledger: Path) -> None:
    """Let the ledger's owner lock it the next time, where root does it now."""
    if os.geteuid() == 0 and ledger.exists():
        owner = ledger.stat()
        # The folder is the owner's, who must not be given what a link of theirs names.
        os.chown(lock, owner.st_uid, owner.st_gid, follow_symlinks=False)
