"""What is kept beside a site's rows: equal to what is computed, private, whole or made anew."""

from __future__ import annotations

import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlr.data import store as module
from fedlr.data.batching import TokenisedDataset
from fedlr.data.dataset import TextDataset
from fedlr.data.store import Store, states_key, tokenise_once
from fedlr.errors import ConfigError
from tests.data.helpers import word_tokenizer

TEXTS = ("a b c", "d", "e e e e")
PAIRS = ("d e", "a", "b")


def rows(pairs: tuple[str, ...] | None = None, texts: tuple[str, ...] = TEXTS) -> TextDataset:
    return TextDataset(texts, pairs, np.array([1, 0, 2]), None)


def opened(folder: Path, said: list[str] | None = None) -> Store:
    return Store.open(str(folder / "cache"), ([] if said is None else said).append)


def equal(left: TokenisedDataset, right: TokenisedDataset) -> bool:
    """Whether all but the cached states is the same."""

    def arrays(data: TokenisedDataset) -> list[Any]:
        kinds = data.token_type_ids
        kinds = np.array([-1]) if kinds is None else kinds
        return [data.tokens, data.offsets, kinds, data.labels, data.pad_token_id]

    return all(map(np.array_equal, arrays(left), arrays(right)))


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tokenising fails the test."""
    return lambda: monkeypatch.setattr(
        module, "tokenise", lambda *_: pytest.fail("the rows were tokenised")
    )


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_a_second_run_maps_instead_of_tokenising(
    pairs: tuple[str, ...] | None, tmp_path: Path, never: Callable[[], None]
) -> None:
    expected = tokenise_once(word_tokenizer(), rows(pairs), 9, None)
    said: list[str] = []
    first = tokenise_once(word_tokenizer(), rows(pairs), 9, opened(tmp_path, said))
    assert [line.split(" in ")[0] for line in said] == [f"keeping 0.{1 + bool(pairs)} kB of tokens"]
    never()
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)  # what a call leaves behind is no difference
    second = tokenise_once(tokenizer, rows(pairs), 9, opened(tmp_path, said))
    assert len(said) == 1
    for found in (first, second):
        assert equal(found, expected)
        assert not found.tokens.flags.owndata  # mapped
        assert not found.tokens.flags.writeable
        batch, own = (data.batch(np.array([2, 0, 2])) for data in (found, expected))
        assert torch.equal(batch.input_ids, own.input_ids)
        batch.input_ids.zero_()
    assert equal(second, expected)


def test_labels_are_not_kept_and_may_change(tmp_path: Path, never: Callable[[], None]) -> None:
    tokenise_once(word_tokenizer(), rows(), 9, opened(tmp_path))
    never()
    other = TextDataset(TEXTS, None, np.array([0, 1, 0]), None)
    found = tokenise_once(word_tokenizer(), other, 9, opened(tmp_path))
    assert found.labels.tolist() == [0, 1, 0]


def test_whatever_changes_the_tokens_is_another_file(tmp_path: Path) -> None:
    """A text, where its rows begin, the length, the pairs, a token's id, the padding."""
    store = opened(tmp_path)
    asked: list[tuple[Any, TextDataset, int]] = [
        (word_tokenizer(), rows(), 9),
        (word_tokenizer(), rows(), 5),
        (word_tokenizer(), rows(PAIRS), 9),
        (word_tokenizer(), rows(texts=("a b", "c d", "e e e e")), 9),
        (word_tokenizer(), rows(texts=("a b c", "d", "e e e a")), 9),
        (word_tokenizer(pad="e"), rows(), 9),
        (word_tokenizer(special=False), rows(), 9),
    ]
    for arguments in asked:
        assert equal(tokenise_once(*arguments, store), tokenise_once(*arguments, None))
    assert len(list(store.folder.iterdir())) == len(asked)
    for arguments in asked:  # each finds its own again
        assert equal(tokenise_once(*arguments, store), tokenise_once(*arguments, None))
    assert len(list(store.folder.iterdir())) == len(asked)


def test_an_empty_data_set_is_kept_too(tmp_path: Path, never: Callable[[], None]) -> None:
    empty = TextDataset((), None, np.array([], dtype=np.int64), None)
    assert len(tokenise_once(word_tokenizer(), empty, 9, opened(tmp_path))) == 0
    never()
    assert len(tokenise_once(word_tokenizer(), empty, 9, opened(tmp_path))) == 0


def test_a_tokenizer_without_a_description_is_asked_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, said = word_tokenizer(), list[str]()
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", None)
    made = tokenise_once(word_tokenizer(), rows(), 9, None)
    monkeypatch.setattr(module, "tokenise", lambda *_: made)
    store = opened(tmp_path, said)
    assert tokenise_once(tokenizer, rows(), 9, store) is made
    assert list(store.folder.iterdir()) == []
    assert said == [f"{type(tokenizer).__name__} cannot be told from others: no tokens are kept"]


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = opened(tmp_path)
        tokenise_once(word_tokenizer(), rows(), 9, store)
        store.write_states("k", 8, [torch.ones(1, 2)])
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()}
    assert modes == {0o600}


def test_a_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    for mode in (0o755, 0o710, 0o701):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache").chmod(mode)
        with pytest.raises(ConfigError, match=rf"^data\.cache = .*open to others \(mode {mode:o}"):
            opened(tmp_path)
        assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == mode
    (tmp_path / "cache").chmod(0o700)
    opened(tmp_path)


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"^data\.cache = .* cannot be used: .*; name a"):
            Store.open(str(place), print)


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store.open("~/deep/er", print).folder == tmp_path / "deep" / "er"


def test_any_damage_is_noticed_and_mended(tmp_path: Path) -> None:
    """Every byte of the tokens is changed once, and every length tried."""
    said: list[str] = []
    store = opened(tmp_path, said)
    tokenise_once(word_tokenizer(), rows(PAIRS), 9, store)
    (file,) = store.folder.iterdir()
    whole, key = file.read_bytes(), file.stem.removeprefix("tokens-")
    expected = tokenise_once(word_tokenizer(), rows(PAIRS), 9, None)
    damaged = [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(len(whole))]
    damaged += [whole[:length] for length in range(0, len(whole), 7)]
    noticed = 0
    for content in damaged:
        file.unlink()  # what an earlier turn mapped stays what it was
        file.write_bytes(content)
        found = store.read_tokens(key, expected.labels)
        assert found is None or equal(found, expected)  # some bytes only fill up to 8
        noticed += found is None
    assert noticed > 0.5 * len(damaged)
    assert len(said) == 1 + noticed
    assert all("\n" not in line for line in said)
    file.write_bytes(whole[:100])
    assert equal(tokenise_once(word_tokenizer(), rows(PAIRS), 9, store), expected)
    assert "is damaged (" in said[-2]
    assert said[-2].endswith(") and is made anew")
    assert file.read_bytes() == whole


def test_states_come_back_bit_for_bit_or_not_at_all(tmp_path: Path) -> None:
    said: list[str] = []
    store = opened(tmp_path, said)
    states = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    assert store.read_states("k", 10, 3) is None
    assert store.write_states("k", 120, states.split(4))
    assert said == [f"keeping 0.1 kB of hidden states in {store.folder}"]
    found = store.read_states("k", 10, 3)
    assert found is not None
    assert torch.equal(found, states)
    found.zero_()  # private to this process
    again = store.read_states("k", 10, 3)
    assert again is not None
    assert torch.equal(again, states)
    path = store.folder / "states-k.f32"
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x", b"", whole[:7] + b"\x00" + whole[8:], b"x" * 152):
        path.unlink()
        path.write_bytes(content)
        assert store.read_states("k", 10, 3) is None
        assert "is damaged" in said[-1]
    path.write_bytes(whole)
    assert store.read_states("k", 5, 6) is not None  # the key, not the shape, is the name
    assert store.read_states("k", 10, 4) is None


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store = opened(tmp_path, said)

    def broken() -> Any:
        yield torch.ones(1, 2)
        raise OSError(28, "No space left on device")

    assert not store.write_states("k", 16, broken())
    sentence = "cannot keep 0.0 kB (No space left on device); this run goes on without"
    assert said[-1] == f"{store.folder} {sentence}"
    full = type("Usage", (), {"free": 0})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: full)
    asked: list[int] = []
    assert not store.write_states("k", 16, (asked.append(1) or torch.ones(1, 2) for _ in "ab"))
    assert said[-1].endswith(sentence)
    assert asked == []  # nothing was computed in vain
    expected = tokenise_once(word_tokenizer(), rows(), 9, None)
    assert equal(tokenise_once(word_tokenizer(), rows(), 9, store), expected)
    assert "cannot keep 0.1 kB (No space left on device)" in said[-1]
    assert list(store.folder.iterdir()) == []


def test_a_folder_that_is_deleted_meanwhile_takes_nothing_with_it(tmp_path: Path) -> None:
    said: list[str] = []
    store = opened(tmp_path, said)
    mapped = tokenise_once(word_tokenizer(), rows(), 9, store)
    for path in store.folder.iterdir():
        path.unlink()
    store.folder.rmdir()
    assert equal(mapped, tokenise_once(word_tokenizer(), rows(), 9, None))
    assert equal(tokenise_once(word_tokenizer(), rows(), 9, store), mapped)
    assert "goes on without" in said[-1]


def test_drafts_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    store = opened(tmp_path)
    old, new = (store.folder / f".fedlr-draft-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("tokens")
    hours = time.time() - 7200
    os.utime(old, (hours, hours))
    opened(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def _write_and_read(folder: str, barrier: Any, wrong: Any) -> None:
    store = Store.open(folder, lambda _: None)
    expected = tokenise_once(word_tokenizer(), rows(), 9, None)
    barrier.wait(60)
    for _ in range(30):
        found = tokenise_once(word_tokenizer(), rows(), 9, store)
        if not equal(found, expected):
            wrong.value += 1
        for path in store.folder.glob("tokens-*"):
            path.unlink(missing_ok=True)


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both write, read and delete the same file thirty times."""
    context = multiprocessing.get_context("fork")
    barrier, wrong = context.Barrier(2), context.Value("i", 0)
    place = str(tmp_path / "cache")
    both = [context.Process(target=_write_and_read, args=(place, barrier, wrong)) for _ in "ab"]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    assert wrong.value == 0
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_key_of_states_tells_what_they_are_of(tmp_path: Path) -> None:
    one = tokenise_once(word_tokenizer(), rows(), 9, None)
    other = tokenise_once(word_tokenizer(), rows(), 4, None)
    keys = {
        states_key(one, "base", 1, "cpu"),
        states_key(other, "base", 1, "cpu"),
        states_key(one, "other", 1, "cpu"),
        states_key(one, "base", 2, "cpu"),
        states_key(one, "base", 1, "cuda"),
    }
    assert len(keys) == 5
    mapped = tokenise_once(word_tokenizer(), rows(), 9, opened(tmp_path))
    assert states_key(mapped, "base", 1, "cpu") in keys


def test_tokenizers_that_split_special_tokens_or_not_do_not_share_a_file(tmp_path: Path) -> None:
    """The flag is no part of the tokenizer's own rules."""
    tokenizer: Any = word_tokenizer()
    about = module._description(tokenizer)
    tokenizer.split_special_tokens = not getattr(tokenizer, "split_special_tokens", False)
    assert module._description(tokenizer) != about
