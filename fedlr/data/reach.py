"""Whether the Hugging Face hub can be asked: for models and data sets alike.

Its client retries a dead connection for half a minute and more, for each file anew.
Asked once beforehand, it need not be: what lies in the local cache loads without a
network, and what does not is refused at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 5.0
"""Seconds that the hub may take to say anything at all."""


@contextmanager
def cache_if_silent(name: str) -> Iterator[str | None]:
    """Let the client ask the hub only if it answers; else everything comes from the cache.

    Args:
        name: Of a model or a data set, or a local folder, for which nothing is asked.

    Yields:
        None for a folder and where the hub answers; else why it is not asked:
        ``HF_HUB_OFFLINE is set``, or what became of the one request.
    """
    from huggingface_hub import constants

    silence = None if Path(name).is_dir() else silence_of_hub()
    before = constants.HF_HUB_OFFLINE
    # What the client itself reads before each request. Arguments such as local_files_only
    # do not reach every request that transformers makes.
    constants.HF_HUB_OFFLINE = before or silence is not None
    try:
        yield silence
    finally:
        constants.HF_HUB_OFFLINE = before


def silence_of_hub() -> str | None:
    """Return why the hub cannot be asked now, or None where it answers.

    It answers if one request to it (``HF_ENDPOINT``, through the client's own session
    and so its proxies) comes back with a status below 500.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            answer = get_session().head(
                constants.ENDPOINT, timeout=PATIENCE_S, follow_redirects=False
            )
        # The client's transport is its own affair, and any way it fails means the same.
        except Exception as error:
            answers.append(f"{constants.ENDPOINT}: {error}")
        else:
            broken = answer.status_code >= 500
            answers.append(
                f"{constants.ENDPOINT}: HTTP status {answer.status_code}" if broken else None
            )

    # In a thread, because no time-out of a request bounds the resolution of a name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return answers[0] if answers else f"{constants.ENDPOINT}: no answer in {PATIENCE_S:g} s"


def verdict(error: BaseException, kind: str, silence: str | None) -> str | None:
    """Say in a user's words what the hub's client raised, with the way out.

    Args:
        error: As it was raised, with its causes.
        kind: ``model`` or ``data set``.
        silence: What `cache_if_silent` yielded.

    Returns:
        What follows on the name of the thing, up to where ``, or …`` can go on;
        None where the hub is not the reason.
    """
    from huggingface_hub import errors

    causes = tuple(_chain(error))
    if any(isinstance(cause, errors.HFValidationError) for cause in causes):
        return "is neither an existing folder nor a name on the hub (owner/name); correct it"
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return "is on the hub, but not in this revision; correct the revision or leave it out"
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        return unknown(kind)
    if any(isinstance(cause, errors.LocalEntryNotFoundError) for cause in causes):
        return unreachable(silence or next(iter(str(causes[-1]).splitlines()), None))
    return None


def unknown(kind: str) -> str:
    """Say that the hub does not know the name."""
    return (
        f"is no folder here, and the hub has no such {kind}, or it needs a login; check the "
        "spelling (owner/name), log in with `hf auth login`"
    )


def unreachable(silence: str | None) -> str:
    """Say that neither cache nor hub gives it; ``silence`` is why the hub does not."""
    reason = silence or "the connection was lost"
    return (
        "is no folder here and not in the local cache, and the hub cannot be reached "
        f"({reason}); go online once"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
