"""What a site computes from its rows once, kept in files and memory-mapped: tokens, hidden states.

**The files are private data**: token ids are the text, and hidden states nearly so. They
lie in a folder that is open to its owner alone (mode 0700, files 0600), nothing in them
is ever sent, and deleting the folder removes all of it, also while a run has it mapped.

A file is written as a draft and renamed: a reader finds a whole file or none, and two
processes that write the same one replace each other's equal work. Every file carries a
SHA-256 of its content, checked before it is used; a damaged or truncated one is rebuilt.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlr.data.batching import TokenisedDataset, tokenise
from fedlr.data.dataset import Labels, TextDataset
from fedlr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
"""Version of the files, part of every key: a new one leaves the old files unread."""

_DRAFT = ".fedlr-draft-"
_ABANDONED_S = 3600.0
_DIGEST_BYTES = 32
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Store:
    """A private folder of computed rows, see `Store.open`.

    Attributes:
        folder: Where the files are.
        say: Told what is kept, how large it is, and what could not be kept or used.
    """

    folder: Path
    say: Callable[[str], None]

    @classmethod
    def open(cls, place: str, say: Callable[[str], None]) -> Store:
        """Make the folder where it is missing, and check that it is private.

        Args:
            place: ``data.cache``: a path, absolute or from the current folder; ``~`` is
                the user's home.
            say: See `Store`.

        Raises:
            ConfigError: It cannot be made, is no folder, or is open to others.
        """
        folder = Path(place).expanduser().resolve()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise ConfigError(
                [
                    f"data.cache = {place!r} cannot be used: {error.strerror or error}; name a "
                    "folder of your own, or set data.cache=null"
                ]
            ) from error
        if found.st_mode & 0o077 or found.st_uid != os.getuid():
            raise ConfigError(
                [
                    f"data.cache = {place!r} would hold private data and is open to others (mode "
                    f"{found.st_mode & 0o777:o}, owner {found.st_uid}); name a folder that does "
                    "not exist yet, or chmod 700 one of your own"
                ]
            )
        with suppress(OSError):  # left by a process that was killed
            for draft in folder.glob(f"{_DRAFT}*"):
                if time.time() - draft.stat().st_mtime > _ABANDONED_S:
                    draft.unlink(missing_ok=True)
        return cls(folder, say)

    def read_tokens(self, key: str, labels: Labels) -> TokenisedDataset | None:
        """Map the tokens of ``key``; None where there are none, or none that are whole."""
        import pyarrow as pa

        path = self.folder / f"tokens-{key}.arrow"
        if not path.exists():
            return None
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            held, about = reader.get_batch(0), json.loads(reader.schema.metadata[b"fedlr"])
            held.validate()
            tokens, offsets = _flat(held.column("tokens"))
            kinds = _flat(held.column("token_type_ids"))[0] if about["kinds"] else None
            if about["sha256"] != _digest(tokens, offsets, kinds, about["pad"]):
                raise ValueError("its content is not what was written")
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            self._rebuild(path, error)
            return None
        return TokenisedDataset(tokens, offsets, kinds, labels, about["pad"])

    def write_tokens(self, key: str, data: TokenisedDataset) -> bool:
        """Keep ``data`` without its labels; False, said, where the disk refuses."""
        import pyarrow as pa

        kinds = data.token_type_ids
        about = {
            "pad": data.pad_token_id,
            "kinds": kinds is not None,
            "sha256": _digest(data.tokens, data.offsets, kinds, data.pad_token_id),
        }
        columns = {"tokens": data.tokens} | ({} if kinds is None else {"token_type_ids": kinds})
        lists = {
            name: pa.LargeListArray.from_arrays(pa.array(data.offsets), pa.array(flat))
            for name, flat in columns.items()
        }
        batch = pa.record_batch(lists).replace_schema_metadata({"fedlr": json.dumps(about)})

        def fill(file: BinaryIO) -> None:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)

        self.say(f"keeping {_shown(batch.nbytes)} of tokens in {self.folder}")
        return self._write(f"tokens-{key}.arrow", batch.nbytes, fill)

    def read_states(self, key: str, rows: int, width: int) -> Tensor | None:
        """Map hidden states, shape (rows, width), float32; None as `read_tokens`.

        The mapping is private to the process: writing to it changes no file.
        """
        path = self.folder / f"states-{key}.f32"
        if not path.exists():
            return None
        try:
            with path.open("rb") as file:
                length = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
                if length != rows * width * 4:
                    raise ValueError(f"it has {length} bytes of {rows * width * 4}")
                digest = hashlib.sha256()
                while left := length - file.tell():
                    digest.update(file.read(min(left, _READ_BYTES)))
                if digest.digest() != file.read():
                    raise ValueError("its content is not what was written")
            return torch.from_numpy(np.memmap(path, np.float32, "c", shape=(rows, width)))
        except (OSError, ValueError) as error:
            self._rebuild(path, error)
            return None

    def write_states(self, key: str, size: int, pieces: Iterable[Tensor]) -> bool:
        """Keep hidden states that come piece after piece; False, said, where the disk refuses.

        Args:
            key: Their name.
            size: Bytes of all of them, announced before the first is computed.
            pieces: Consecutive rows, shape (n, width), float32, CPU.
        """

        def fill(file: BinaryIO) -> None:
            digest = hashlib.sha256()
            for piece in pieces:
                content = piece.contiguous().numpy().tobytes()
                file.write(content)
                digest.update(content)
            file.write(digest.digest())

        self.say(f"keeping {_shown(size)} of hidden states in {self.folder}")
        return self._write(f"states-{key}.f32", size, fill)

    def _write(self, name: str, size: int, fill: Callable[[BinaryIO], None]) -> bool:
        """Let ``fill`` write a draft, and give it its name once it is whole."""
        draft = None
        try:
            if shutil.disk_usage(self.folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            handle, draft = tempfile.mkstemp(prefix=_DRAFT, dir=self.folder)  # mode 0600
            with os.fdopen(handle, "wb") as file:
                fill(file)
            Path(draft).rename(self.folder / name)
        except OSError as error:
            self.say(
                f"{self.folder} cannot keep {_shown(size)} ({error.strerror or error}); this "
                "run goes on without"
            )
            return False
        finally:
            if draft is not None:
                Path(draft).unlink(missing_ok=True)
        return True

    def _rebuild(self, path: Path, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        self.say(f"{path} is damaged ({reason}) and is made anew")


def tokenise_once(
    tokenizer: PreTrainedTokenizerBase, dataset: TextDataset, max_length: int, store: Store | None
) -> TokenisedDataset:
    """Return what `tokenise` returns; from the second time on, mapped from ``store``.

    Args:
        tokenizer: See `tokenise`. One without a canonical description (it runs in
            Python) is asked every time, and that is said.
        dataset: See `tokenise`.
        max_length: See `tokenise`.
        store: Where tokens are kept; None keeps nothing on the disk.
    """
    if store is None:
        return tokenise(tokenizer, dataset, max_length)
    about = _description(tokenizer)
    if about is None:
        store.say(f"{type(tokenizer).__name__} cannot be told from others: no tokens are kept")
        return tokenise(tokenizer, dataset, max_length)
    key = _key("tokens", about, str(max_length), *_rows(dataset))
    found = store.read_tokens(key, dataset.labels)
    if found is not None:
        return found
    made = tokenise(tokenizer, dataset, max_length)
    if store.write_tokens(key, made):  # mapped, so that processes share one copy
        found = store.read_tokens(key, dataset.labels)
    return made if found is None else found


def states_key(data: TokenisedDataset, base_sha256: str, depth: int, made: str) -> str:
    """Return the key of the hidden states of ``data`` after ``depth`` layers of a base model.

    Args:
        data: The tokens; labels have no part in it.
        base_sha256: Digest of the base model's weights.
        depth: Number of layers.
        made: On which device and in which precision: the last bits differ between them.
    """
    tokens = _digest(data.tokens, data.offsets, data.token_type_ids, data.pad_token_id)
    return _key("states", "float32", tokens, base_sha256, str(depth), made)


def _shown(size: int) -> str:
    """Return bytes in decimal units, for a sentence."""
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.{0 if size >= 1e8 else 1}f} MB"


def _key(*parts: str) -> str:
    digest = hashlib.sha256(str(FORMAT).encode())
    for part in parts:
        content = part.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8) + content)
    return digest.hexdigest()


def _rows(dataset: TextDataset) -> Iterator[str]:
    yield "one" if dataset.pairs is None else "two"
    yield from dataset.texts
    yield from dataset.pairs or ()


def _description(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Everything that decides a tokenizer's output, but its passing truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules: dict[str, Any] = json.loads(backend.to_str())
    rules |= {"truncation": None, "padding": None}
    names = (
        *("pad_token_id", "eos_token_id", "truncation_side", "model_input_names"),
        "split_special_tokens",
    )
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    own = [type(tokenizer).__name__, *(getattr(tokenizer, name, None) for name in names)]
    return json.dumps([rules, own, versions], sort_keys=True)


def _flat(column: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return (values, offsets) of a list column as views of the mapped file."""
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy()


def _digest(
    tokens: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.int8] | None,
    pad: int,
) -> str:
    """Hash the content of a tokenised data set, each array with its type and size."""
    digest = hashlib.sha256(str(pad).encode())
    for array in (tokens, offsets, *(() if kinds is None else (kinds,))):
        digest.update(f" {array.dtype.str} {len(array)} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
