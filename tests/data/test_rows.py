from __future__ import annotations

import pytest

from fedlr.data.rows import build_dataset, choose_validation, label_encoder
from fedlr.errors import DataError
from tests.data.helpers import spec

NAMES = ("no", "yes")


def test_pairs_users_and_labels_are_read() -> None:
    rows = [
        (1, {"premise": "p", "guess": "g", "label": "yes", "who": 7, "more": None}),
        (2, {"premise": "q", "guess": "h", "label": 0, "who": "x"}),
    ]
    wanted = spec(text_columns=("premise", "guess"), user_column="who")
    data = build_dataset("memory", rows, wanted, NAMES)
    assert (data.texts, data.pairs, data.users) == (("p", "q"), ("g", "h"), ("7", "x"))
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, r"row 4 has no column 'label'; it has 'text'"),
        ({"text": None, "label": 0}, "row 4: text = None must be text"),
        ({"text": "\ud800", "label": 0}, "row 4: text is not valid Unicode"),
        ({"text": "t", "label": 2}, "row 4: label 2 is not in the label list.*0 to 1.*'yes'"),
        ({"text": "t", "label": -1}, "label -1 is not"),
        ({"text": "t", "label": "Yes"}, "label 'Yes' is not"),
        ({"text": "t", "label": True}, "label True is not"),
        ({"text": "t", "label": 1.0}, "label 1.0 is not"),
        ({"text": "t", "label": None}, "label None is not"),
    ],
)
def test_bad_rows_are_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_dataset("memory", [(3, {"text": "t", "label": 0}), (4, row)], spec(), NAMES)


@pytest.mark.parametrize("user", [None, "", 1.5, True])
def test_a_row_without_natural_id_is_refused(user: object) -> None:
    rows = [(1, {"text": "t", "label": 0, "who": user})]
    with pytest.raises(DataError, match="row 1: who"):
        build_dataset("memory", rows, spec(user_column="who"), NAMES)


def test_no_rows_is_refused() -> None:
    with pytest.raises(DataError, match="memory has no rows"):
        build_dataset("memory", [], spec(), NAMES)


def test_names_come_before_indices() -> None:
    encode = label_encoder(("1", "0"))
    assert [encode(label) for label in ("0", "1")] == [1, 0]


def test_integers_are_refused_where_names_are_other_numbers() -> None:
    """With the list ("1", "2", "3") the integer 1 may mean class 0 or class 1."""
    encode = label_encoder(("1", "2", "3"))
    assert [encode(label) for label in (1, 2, "0", 0)] == [None, None, None, 0]
    assert [label_encoder(("0", "1"))(label) for label in (0, 1)] == [0, 1]
    with pytest.raises(DataError, match="written as strings"):
        build_dataset("memory", [(1, {"text": "t", "label": 1})], spec(), ("1", "2"))


@pytest.mark.parametrize("label", ["1 ", "+1", "1.0", "١", "9" * 5000])
def test_only_plain_digits_are_an_index(label: str) -> None:
    assert label_encoder(NAMES)(label) is None


def test_a_long_label_list_is_cut_in_messages() -> None:
    names = tuple(f"class {number}" for number in range(60))
    with pytest.raises(DataError, match="'class 49' and 10 more"):
        build_dataset("memory", [(1, {"text": "t", "label": 60})], spec(), names)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        (("train",), None),
        (("train", "test", "dev"), "dev"),
        (("dev", "valid", "validation"), "validation"),
        (("test", "train"), "test"),
    ],
)
def test_order_of_preference(found: tuple[str, ...], chosen: str | None) -> None:
    name, notices = choose_validation(found, spec(), "here")
    assert name == chosen
    assert bool(notices) == (chosen == "test")


def test_the_training_split_is_never_its_own_validation() -> None:
    assert choose_validation(("test",), spec(train_split="test"), "here") == (None, ())


def test_a_configured_split_must_exist() -> None:
    wanted = spec(validation_split="held_out")
    assert choose_validation(("held_out", "dev"), wanted, "here")[0] == "held_out"
    with pytest.raises(DataError, match="'held_out' is not in here, which has dev, train"):
        choose_validation(("train", "dev"), wanted, "here")
