"""Loading a base: reproducible, safetensors only, every weight from the file, rows on their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlr.errors import ConfigError, ModelError
from fedlr.training.base import (
    BaseModel,
    check_capacity,
    check_rows_alone,
    load_base,
    model_size,
    weights_digest,
)
from fedlr.training.precision import cast_base
from tests.data.helpers import word_tokenizer
from tests.hub import ask_at, serve, snapshot
from tests.models import FAMILIES, LONGEST, PAD, VOCABULARY, WIDTH, encoder, rows

NAME = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT of two layers with its tokenizer."""
    return save(encoder("bert"), tmp_path / "base")


def save(model: nn.Module, path: Path) -> Path:
    saving: Any = model
    saving.save_pretrained(str(path))
    word_tokenizer().save_pretrained(str(path))
    return path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / NAME)
    edit(weights)
    save_file(weights, folder / NAME, metadata={"format": "pt"})


def test_a_folder_gives_its_own_weights_frozen_in_evaluation_mode(folder: Path) -> None:
    base = load_base(str(folder))
    expected = encoder("bert").state_dict()
    found = base.encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not base.encoder.training
    for parameter in base.encoder.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    again = load_base(str(folder))
    assert base.base_sha256 == again.base_sha256
    assert base.tokenizer_sha256 == again.tokenizer_sha256


def test_a_rounded_base_keeps_the_digest_of_its_file(folder: Path) -> None:
    whole, rounded = load_base(str(folder)), load_base(str(folder), precision="bfloat16")
    assert whole.base_sha256 == rounded.base_sha256
    for left, right in zip(whole.encoder.parameters(), rounded.encoder.parameters(), strict=True):
        assert torch.equal(left.bfloat16(), right)
        assert not right.requires_grad
    with pytest.raises(ValueError, match="precision"):
        load_base(str(folder), precision="float16")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_stand_alone_in_bfloat16_up_to_its_rounding(family: str) -> None:
    base = bare(encoder(family))
    cast_base(base.encoder, "bfloat16")
    check_rows_alone(base, LONGEST)


def test_the_digest_names_every_weight_shape_and_value() -> None:
    one, same, other = encoder("bert", seed=1), encoder("bert", seed=1), encoder("bert", seed=2)
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    with torch.no_grad():
        last = list(same.parameters())[-1]
        last.view(-1)[-1] = torch.nextafter(last.view(-1)[-1], torch.tensor(9.0))
    assert weights_digest(one) != weights_digest(same)
    left, right = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        left.weight.zero_()
        right.weight.zero_()
    assert weights_digest(left) != weights_digest(right)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = load_base(str(folder), random_seed=5)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    again, other = load_base(str(folder), random_seed=5), load_base(str(folder), random_seed=6)
    trained = load_base(str(folder))
    digests = [model.base_sha256 for model in (first, again, other, trained)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_random_weights_are_float32_whatever_the_model_was_trained_in(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    for seed in (None, 0):
        loaded = load_base(str(folder), random_seed=seed)
        assert {value.dtype for value in loaded.encoder.parameters()} == {torch.float32}


def test_the_sha256_of_the_file_is_checked(folder: Path) -> None:
    digest = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    assert load_base(str(folder), sha256=digest).name == str(folder)
    with pytest.raises(ModelError, match=f"has sha256 {digest}, expected 00"):
        load_base(str(folder), sha256="00")
    (folder / NAME).unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        load_base(str(folder), sha256=digest)


def test_a_folder_of_pickles_is_refused(folder: Path) -> None:
    torch.save(load_file(folder / NAME), folder / "pytorch_model.bin")
    (folder / NAME).unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded: .*model\.safetensors"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", r"'nowhere' is no folder here and not in the local cache, and the hub cannot"),
        ("owner/no-such-model", r"cannot be reached \(HF_HUB_OFFLINE is set\); go online once, or"),
        ("no/such/folder", "neither an existing folder nor a name on the hub"),
        ("/no/folder", "neither an existing folder nor a name on the hub"),
    ],
)
def test_what_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=says):
        load_base(name)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the loader ask a hub at an address, with an empty cache in ``tmp_path/cache``."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return lambda endpoint: ask_at(endpoint, monkeypatch)


def test_a_dead_hub_is_asked_once_and_what_is_cached_loads(
    tmp_path: Path, online: Callable[[str], None]
) -> None:
    """The client itself would try every file six times, with pauses."""
    name = "owner/model"
    with serve(503) as server:
        online(server.endpoint)
        with pytest.raises(ModelError, match=r"cannot be reached \(http.*status 503\); go online"):
            load_base(name)
        assert server.asked == ["/"]
        save(encoder("bert"), snapshot(tmp_path / "cache", name))
        cached = load_base(name)
        assert server.asked == ["/", "/"]
    assert cached.base_sha256 == load_base(str(save(encoder("bert"), tmp_path / "b"))).base_sha256


def test_a_name_the_hub_does_not_know_is_no_network_problem(
    online: Callable[[str], None],
) -> None:
    with serve() as server:
        online(server.endpoint)
        with pytest.raises(ModelError, match=r"'owner/model' .* the hub has no such model"):
            load_base("owner/model")


def test_a_damaged_file_is_refused(folder: Path) -> None:
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(folder))


def test_a_file_of_another_shape_is_refused(folder: Path) -> None:
    change(folder, lambda w: w.update({"embeddings.word_embeddings.weight": torch.zeros(3, 3)}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(folder))


def test_a_file_without_some_of_the_encoder_is_refused(folder: Path) -> None:
    """Transformers would draw them at random and say so only in a log."""

    def drop(weights: dict[str, torch.Tensor]) -> None:
        del weights["encoder.layer.1.attention.self.query.weight"]

    change(folder, drop)
    with pytest.raises(ModelError, match=r"lacks encoder\.layer\.1\.attention\.self\.query"):
        load_base(str(folder))


def test_a_file_without_a_pooler_has_one_digest(folder: Path) -> None:
    """Many published encoders have none (RoBERTa); a random one would differ between sites."""

    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("pooler")]:
            del weights[name]

    whole = load_base(str(folder))
    change(folder, drop)
    first, second = load_base(str(folder)), load_base(str(folder))
    assert first.base_sha256 == second.base_sha256 != whole.base_sha256
    batch = rows([4, 6]).batch(np.array([0, 1])).inputs()
    with torch.no_grad():
        assert torch.equal(
            first.encoder(**batch).last_hidden_state, whole.encoder(**batch).last_hidden_state
        )


def test_a_model_that_brings_its_own_code_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('code of the author ran')\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(folder))


def test_the_embedded_model_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlr.training.base.EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install 'fedlr\[demo\]'"):
        load_base("embedded")
    fake = save(encoder("bert"), tmp_path / "fake")
    (tmp_path / "fake_package.py").write_text(f"def get_model_path(): return {str(fake)!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fedlr.training.base.EMBEDDED_PACKAGE", "fake_package")
    with pytest.raises(ModelError, match="not the published ones"):
        load_base("embedded")


def bare(model: nn.Module) -> BaseModel:
    return BaseModel(model, word_tokenizer(), "", "", "some/model")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_usual_encoders_stand_alone(family: str) -> None:
    check_rows_alone(bare(encoder(family)), LONGEST)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_accepted_row_runs_and_the_next_is_refused(family: str) -> None:
    """4·12 = 48 positions are configured; RoBERTa's first two (up to its padding id) are taken."""
    base = bare(encoder(family))
    positions = 46 if family == "roberta" else 48
    check_capacity(base, positions)
    check_rows_alone(base, positions)
    with pytest.raises(ConfigError) as caught:
        check_capacity(base, positions + 1)
    (problem,) = caught.value.problems
    assert problem.startswith(f"model.max_length = {positions + 1} must be ≤ {positions}, ")
    assert problem.endswith("lower it")
    with pytest.raises(ModelError, match="token ids and a mask alone"):
        check_rows_alone(base, positions + 1)  # what a private round would have run into


def test_the_largest_id_of_the_tokenizer_needs_an_embedding() -> None:
    """Ids 0 … 8 are words; 9 … 49 fill the table of 50; the next one has no row."""
    base = bare(encoder("bert"))
    base.tokenizer.add_tokens([f"extra{number}" for number in range(41)])
    check_capacity(base, LONGEST)
    base.tokenizer.add_tokens(["onemore"])
    with pytest.raises(
        ModelError, match=r"has 50 token embeddings .* up to 50, which must be < 50"
    ):
        check_capacity(base, LONGEST)


def test_a_model_of_two_towers_is_refused(tmp_path: Path) -> None:
    """CLIP's sizes are those of its parts: neither a vocabulary nor a width of its own."""
    import transformers

    library: Any = transformers
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**tower, "vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 3}
    settings = library.CLIPConfig(
        text_config=text,
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    base = load_base(str(save(library.CLIPModel(settings), tmp_path / "clip")))
    for check in (check_capacity, check_rows_alone):
        with pytest.raises(ModelError, match="has no vocab_size in its configuration"):
            check(base, LONGEST)
    with pytest.raises(ModelError, match="has no hidden_size in its configuration"):
        model_size(base, "hidden_size")


OTHERS: dict[str, dict[str, Any]] = {
    "ConvBert": {"embedding_size": WIDTH, "head_ratio": 1, "conv_kernel_size": 3},
    "FNet": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_encoders_whose_rows_feel_their_neighbours_are_refused(kind: str) -> None:
    """Removing the longest row of a batch would change all the others' gradients."""
    import transformers

    library: Any = transformers
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 4 * LONGEST,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
    }
    settings = getattr(library, f"{kind}Config")(**sizes, **OTHERS[kind])
    model = getattr(library, f"{kind}Model")(settings).eval()
    with pytest.raises(ModelError, match="computes a row differently beside a longer one"):
        check_rows_alone(bare(model), LONGEST)


class Picky(nn.Module):
    """Needs more than tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": VOCABULARY})
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        raise ValueError("pixel_values are missing")


def test_an_encoder_that_needs_other_inputs_is_refused() -> None:
    with pytest.raises(ModelError, match="token ids and a mask alone: pixel_values are missing"):
        check_rows_alone(bare(Picky()), LONGEST)
