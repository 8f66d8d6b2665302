"""Small data sets and a whole-word tokenizer for the tests of fedlr.data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedlr.data.dataset import TextDataset
from fedlr.data.spec import SourceSpec

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e")


def spec(kind: Any = "file", **changes: Any) -> SourceSpec:
    values: dict[str, Any] = {
        "path": None,
        "name": None,
        "subset": None,
        "text_columns": ("text",),
        "label_column": "label",
        "user_column": None,
        "label_names": None,
        "validation_fraction": 0.25,
        "train_split": "train",
        "validation_split": None,
        "max_examples": None,
        "public": True,
        "seed": 0,
    }
    return SourceSpec(kind=kind, **(values | changes))


def dataset(labels: Sequence[int], users: Sequence[str] | None = None) -> TextDataset:
    return TextDataset(
        texts=tuple(f"text {row}" for row in range(len(labels))),
        pairs=None,
        labels=np.array(labels, dtype=np.int64),
        users=None if users is None else tuple(users),
    )


def word_tokenizer(pad: str | None = "[PAD]", special: bool = True) -> PreTrainedTokenizerFast:
    """Word w of WORDS has the id of its place there: [CLS] 2, [SEP] 3, a 4, b 5, …"""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    make: Any = PreTrainedTokenizerFast  # untyped
    made: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    return made
