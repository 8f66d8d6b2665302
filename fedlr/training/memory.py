"""How many rows fit one pass: measured on made-up rows, never on private ones."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlr.data.batching import Batch
from fedlr.methods.method import PartKey
from fedlr.privacy.gradients import GRADIENTS

from .classifier import Classifier

MOST_ROWS = 256
"""More rows a pass make no processor busier."""

DEFAULT_ROWS = 32

LARGEST_CPU_BYTES = 4 << 30
"""Memory that a pass may take on a CPU: what is free there is shared with other processes."""

_SHARE = 0.5  # of what is free: workspaces, fragments and the clipped sum are not measured
_PROBED_ROWS = 8


def rows_that_fit(
    classifier: Classifier,
    trained: dict[PartKey, nn.Parameter],
    gradients: str,
    longest: int,
    say: Callable[[str], None] = lambda _: None,
    kept: int = 0,
) -> int:
    """Return a physical batch for the memory that is free: a power of two in [1, `MOST_ROWS`].

    Runs one pass of per-unit gradients on a few rows of ``longest`` made-up tokens, each
    a unit of its own, and measures its largest use; a probe that does not fit is halved.

    Args:
        classifier: On its device, in evaluation mode; left as it was.
        trained: The arrays that train, requiring a gradient.
        gradients: Key of `fedlr.privacy.gradients.GRADIENTS`.
        longest: Tokens that an example is cut at, ≥ 1.
        say: Told what was found.
        kept: Bytes, ≥ 0, that a round takes beside its passes and that are not taken yet.

    Guarantees:
        Rows, lengths and units are made up. It depends on the machine's free memory, and so
        on what the process holds, the site's rows included; nothing that is released
        depends on it beyond rounding.

    Raises:
        RuntimeError: What is not a lack of memory, as torch raises it.
    """
    device = next(classifier.parameters()).device
    rows = _PROBED_ROWS
    while True:
        try:
            used = _bytes_of_a_pass(classifier, trained, gradients, (rows, longest))
            break
        except (RuntimeError, MemoryError) as error:
            if not _lacks_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1:
            say("one row does not fit the free memory; a pass has 1 row")
            return 1
        rows //= 2
    budget = _SHARE * max(0, free_bytes(device) - kept)
    found = power_of_two(budget * rows / max(used, 1))
    say(
        f"a pass has {found} rows: {used / rows / 1e6:.1f} MB a row of {longest} tokens, "
        f"{budget / 1e6:.0f} MB for it"
    )
    return found


def power_of_two(rows: float) -> int:
    """Return the largest power of two ≤ ``rows``, in [1, `MOST_ROWS`].

    Example:
        >>> [power_of_two(rows) for rows in (0.3, 1.0, 9.9, 64.0, 1e9)]
        [1, 1, 8, 64, 256]
    """
    return 1 << (max(1, min(int(rows), MOST_ROWS)).bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a pass may count on; on a CPU at most `LARGEST_CPU_BYTES`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return min(_available(), LARGEST_CPU_BYTES)


def _available() -> int:
    """Return the CPU memory that neither this system nor this container uses."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass  # another system, or a container that shows less
    return max(0, min(found))


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
        error
    )


def _bytes_of_a_pass(
    classifier: Classifier,
    trained: dict[PartKey, nn.Parameter],
    gradients: str,
    shape: tuple[int, int],
) -> int:
    """Return the most bytes alive at once during per-unit gradients of a batch of ``shape``."""
    device = next(classifier.parameters()).device
    batch = _made_up(classifier, shape).to(device)
    path = GRADIENTS[gradients](classifier, trained)
    index = torch.arange(shape[0], device=device)
    with LiveBytes() as live:
        path(partial(classifier.losses, batch), index, shape[0])
    return int(live.peak)


def _made_up(classifier: Classifier, shape: tuple[int, int]) -> Batch:
    encoder: Any = classifier.encoder
    vocabulary = int(encoder.get_input_embeddings().weight.shape[0])
    rows, tokens = shape
    return Batch(
        input_ids=(torch.arange(rows * tokens).reshape(shape) * 7 + 11) % vocabulary,
        attention_mask=torch.ones(shape, dtype=torch.int64),
        token_type_ids=None,
        labels=torch.zeros(rows, dtype=torch.int64),
        unit_index=torch.arange(rows),
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made within it, and the most that were alive at once.

    On every device alike; memory that an operation takes and gives back inside itself
    is not seen.

    Attributes:
        now: Bytes alive.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` and take note of the storages that it made."""
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given | self._seen:
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
