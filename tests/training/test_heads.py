"""Pooling without padding, normalised features, frozen random maps from a public seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fedlr.training.heads import LinearHead, RandomClsHead, label_embeddings, mean_pool
from tests.data.helpers import word_tokenizer
from tests.models import CLASSES, WIDTH, encoder

DRAWS = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 4, WIDTH, generator=DRAWS)
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])


def test_pooling_is_the_mean_of_the_real_tokens_alone() -> None:
    found = mean_pool(HIDDEN, MASK)
    assert torch.allclose(found[0], HIDDEN[0, :3].mean(0))
    assert torch.allclose(found[1], HIDDEN[1, 0])
    garbage = HIDDEN.clone()
    garbage[MASK == 0] = 1e9
    assert torch.equal(mean_pool(garbage, MASK), found)


def test_a_row_without_tokens_pools_to_zeros() -> None:
    assert torch.equal(mean_pool(HIDDEN, torch.zeros(2, 4)), torch.zeros(2, WIDTH))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_head_starts_at_its_weight(bias: bool) -> None:
    weight = torch.randn(CLASSES, WIDTH, generator=DRAWS)
    head = LinearHead(weight, bias, None)
    assert torch.allclose(head(HIDDEN, MASK), mean_pool(HIDDEN, MASK) @ weight.T, atol=1e-5)
    assert {name for name, _ in head.named_parameters()} == (
        {"output.weight", "output.bias"} if bias else {"output.weight"}
    )
    weight.zero_()
    assert float(head.output.weight.abs().max().detach()) > 0


def test_normalised_features_have_the_given_norm() -> None:
    head = LinearHead(torch.eye(WIDTH), False, 4.0)
    for scale in (1e-3, 1.0, 1e3):
        logits = head(scale * HIDDEN, MASK)
        assert torch.allclose(logits.norm(dim=1), torch.tensor(4.0))
        direction = functional.normalize(mean_pool(HIDDEN, MASK), dim=1)
        assert torch.allclose(logits / 4, direction, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_feature_scale_is_a_positive_number(scale: float) -> None:
    with pytest.raises(ValueError, match="feature_scale"):
        LinearHead(torch.eye(2), False, scale)


def test_the_random_head_is_the_first_token_s_dense_tanh_output() -> None:
    head = RandomClsHead(WIDTH, CLASSES, torch.Generator().manual_seed(3))
    maps = dict(head.named_parameters())
    first = torch.tanh(HIDDEN[:, 0] @ maps["dense.weight"].T)
    assert torch.allclose(head(HIDDEN, MASK), first @ maps["output.weight"].T, atol=1e-6)
    assert not maps["dense.bias"].any()
    assert not maps["output.bias"].any()
    # Deviation 0.02: of 256 draws it is known to √(1/512) ≈ 4.4 %, five of them are 22 %.
    assert float(maps["dense.weight"].std().detach()) == pytest.approx(0.02, rel=0.22)


def test_the_random_head_follows_its_generator_and_no_other() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 100)
        head = RandomClsHead(WIDTH, CLASSES, torch.Generator().manual_seed(seed))
        return torch.cat([value.detach().flatten() for value in head.parameters()])

    torch.manual_seed(1)
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_label_embeddings_are_centred_directions() -> None:
    """Σ_k w_k = 0, and w_k − w_j is the difference of two unit vectors times the scale."""
    model, tokenizer = encoder("bert"), word_tokenizer()
    texts = ["a b", "c", "d e a b"]
    found = label_embeddings(model, tokenizer, texts, 2.0)
    assert found.shape == (3, WIDTH)
    assert found.sum(0).abs().max() < 1e-5
    alone = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt")
        hidden = model(input_ids=encoded["input_ids"]).last_hidden_state
        alone.append(functional.normalize(hidden.mean(1), dim=1)[0])
    for row in (1, 2):
        assert torch.allclose(found[row] - found[0], 2 * (alone[row] - alone[0]), atol=1e-5)
    assert not found.requires_grad


def test_a_tokenizer_without_a_padding_token_embeds_the_same() -> None:
    model, texts = encoder("bert"), ["a b", "c", "d e a b"]
    padding, none = word_tokenizer(), word_tokenizer(pad=None)
    assert none.pad_token_id is None
    expected = label_embeddings(model, padding, texts, 2.0)
    assert torch.equal(label_embeddings(model, none, texts, 2.0), expected)
