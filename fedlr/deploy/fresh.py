"""A folder that is made whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlr.errors import ConfigError


@contextmanager
def fresh_folder(folder: Path, mode: int) -> Iterator[Path]:
    """Give a draft to be filled, which becomes ``folder`` when the block ends without an error.

    Args:
        folder: Absolute; does not exist yet, or is empty.
        mode: Permissions of the new folder.

    Raises:
        ConfigError: It holds something, or something in the block cannot be written; the draft
            is taken away.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([f"{folder} exists already; give a folder that is new"])
    draft = folder.with_name(f".{folder.name}.new-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True, mode=mode)
        yield draft
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except OSError as error:
        place = error.filename or folder
        raise ConfigError(
            [f"{place}: {error.strerror or error}; give a place that can be written"]
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
