"""The model card of an exported folder: what it is, what it promises, and how to load it.

The loader that it prints is code: tests run it in a process without fedlr.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from fedlr.report import promise
from fedlr.report.records import Summary
from fedlr.report.units import percent, printable, privacy_loss

Form = Literal["adapter", "merged"]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What a loader of the folder must know beside the summary.

    Attributes:
        form: ``adapter`` (PEFT, needs the base) or ``merged`` (a model by itself).
        revision: Hub revision of the base; None takes the default one.
        random_seed: Public seed that the base's weights were drawn from; None for
            trained weights.
        head: Kind of the head: ``linear``, ``label_text`` or ``random_cls``.
        feature_scale: Norm that pooled features are scaled to; None leaves them.
        max_length: Tokens a text is cut at.
        pairs: Whether an example is two texts.
        padding: Whether the tokenizer can pad, so that several texts fit in one call.
        rounds: Rounds that the run was to have.
        four_bit: Whether the base's linear layers were in 4 bits (NF4) in training.
    """

    form: Form
    revision: str | None
    random_seed: int | None
    head: str
    feature_scale: float | None
    max_length: int
    pairs: bool
    padding: bool
    rounds: int
    four_bit: bool = False


def card(summary: Summary, loading: Loading) -> str:
    """Return the text of ``README.md``, front matter and loader included.

    Every number in it is public, as those of the summary are.
    """
    parts = [
        _front_matter(summary, loading),
        _what(summary, loading),
        _training(summary, loading),
        _privacy(summary),
        _limits(summary, loading),
        _use(summary, loading),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def loader(summary: Summary, loading: Loading) -> str:
    """Return Python that classifies a text: plain torch, transformers, PEFT and safetensors.

    At most ten statements after the imports. ``base`` and ``folder`` are one assignment
    each; after it has run, ``logits`` has shape (texts, classes).
    """
    adapter, drawn = loading.form == "adapter", loading.random_seed is not None
    config = "AutoConfig, " if adapter and drawn else ""
    bits = ", BitsAndBytesConfig" if _in_four_bits(loading) else ""
    scaled = loading.feature_scale is not None and loading.head != "random_cls"
    lines = [
        "import torch",
        *(["from peft import PeftModel"] if adapter else []),
        "from safetensors.torch import load_file",
        f"from torch.nn.functional import linear{', normalize' if scaled else ''}",
        f"from transformers import {config}AutoModel, AutoTokenizer{bits}",
        "",
        *([f"base = {_literal(summary.model)}  # or a folder that holds it"] if adapter else []),
        'folder = "."  # the folder of this file',
        f"labels = {_literal(list(summary.label_names))}",
        *_encoder(loading),
        'head = load_file(f"{folder}/head.safetensors")',
        *_inputs(loading),
        *_logits(loading),
        "print([labels[i] for i in logits.argmax(1)])",
    ]
    return "\n".join(lines)


def _front_matter(summary: Summary, loading: Loading) -> str:
    tags = ["fedlr", "federated-learning", "lora", "text-classification"]
    if summary.privacy_mode == "dp":
        tags.insert(2, "differential-privacy")
    library = "peft" if loading.form == "adapter" else "transformers"
    base = _literal(summary.model)
    return f"---\nlibrary_name: {library}\nbase_model: {base}\ntags: {_literal(tags)}\n---"


def _what(summary: Summary, loading: Loading) -> str:
    labels = ", ".join(f"`{printable(name)}`" for name in summary.label_names)
    model = printable(summary.model)
    stored = " in 4 bits (NF4)" if loading.four_bit else ""
    rounded = ", rounded to 4 bits (NF4) and written out in float32," if loading.four_bit else ""
    what = (
        f"A LoRA adapter for `{model}`{stored} and a classification head"
        if loading.form == "adapter"
        else f"`{model}`{rounded} with a LoRA adapter merged into its weights, and a "
        "classification head"
    )
    example = "a pair of texts" if loading.pairs else "a text"
    text = (
        f"# Text classifier trained by fedlr\n\n{what}, trained by federated learning. It sorts "
        f"{example} into one of {len(summary.label_names)} labels: {labels}."
    )
    if loading.random_seed is None:
        return text
    text += (
        f"\n\n**Not for use: the base is random weights**, drawn from seed {loading.random_seed} "
        f"for a test of the machinery. Only its architecture is that of `{model}`"
    )
    if loading.form == "merged":
        return f"{text}."
    return (
        f"{text}: it cannot be loaded by name. The loader below draws it again, which another "
        "release of PyTorch may do otherwise; `fedlr export --merge` writes it out."
    )


def _training(summary: Summary, loading: Loading) -> str:
    sites = len(summary.clients)
    start, end = percent(summary.accuracy_start), percent(summary.accuracy)
    measured = f"{end} (before training {start}" if summary.accuracy is not None else "not measured"
    opening = ", " if summary.accuracy is not None else " ("
    return f"""## Training

- Data: `{printable(summary.data)}`, digest `{summary.data_sha256}` (of the public part alone \
where the data are not public), over {sites} sites.
- Method: `{summary.method}`, {summary.rounds} of {loading.rounds} rounds.
- Accuracy on the public validation split: {measured}{opening}a constant answer scores \
{percent(summary.majority)})."""


def _privacy(summary: Summary) -> str:
    if summary.privacy_mode in promise.UNPROTECTED:
        return f"## Privacy\n\n{promise.UNPROTECTED[summary.privacy_mode]}"
    unit = summary.unit or "example"
    return f"""## Privacy

{promise.GUARANTEE}

| | |
| --- | --- |
| ε | ≤ {privacy_loss(summary.epsilon_max)}, the largest over the sites |
| δ | {summary.delta:g} |
| unit | `{unit}`: {promise.neighbours(unit)} |
| accountant | `{summary.accountant}` |

{promise.SCOPE}"""


def _limits(summary: Summary, loading: Loading) -> str:
    lines = [
        "The labels, the language and the kind of text are those of the training data; nothing "
        f"else was tested. A text is cut at {loading.max_length} tokens.",
    ]
    private = summary.privacy_mode == "dp"
    if loading.rounds > summary.rounds:
        text = f"The run stopped after {summary.rounds} of {loading.rounds} rounds."
        if private:
            text += (
                " What sites released in a round that was cut short is not in the model; the "
                "number above counts it."
            )
        lines.append(text)
    if private:
        lines.append(promise.NOT_COVERED)
    lines.append("Updates that were poisoned within the norm bound would not have been noticed.")
    lines += [printable(notice) for notice in summary.notices]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _use(summary: Summary, loading: Loading) -> str:
    return f"""## How to load

```python
{loader(summary, loading)}
```

The head is in `head.safetensors`; `head.json` says its kind, the norm that pooled features are \
scaled to, the length that texts are cut at, and the labels in the order of the logits."""


def _literal(value: str | list[str]) -> str:
    """Return ``value`` as Python, JSON and YAML all read it."""
    return json.dumps(value, ensure_ascii=False)


def _revision(loading: Loading) -> str:
    return "" if loading.revision is None else f", revision={_literal(loading.revision)}"


def _encoder(loading: Loading) -> list[str]:
    if loading.form == "merged":
        return ["encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()"]
    model = f"AutoModel.from_pretrained(base{_revision(loading)}, dtype=torch.float32)"
    if _in_four_bits(loading):
        return [
            "four_bits = BitsAndBytesConfig(  # pip install bitsandbytes",
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
            "    bnb_4bit_compute_dtype=torch.float32,",
            ")",
            "encoder = PeftModel.from_pretrained(",
            f"    {model[:-1]}, quantization_config=four_bits), folder",
            ").eval()",
        ]
    if loading.random_seed is None:
        return [f"encoder = PeftModel.from_pretrained({model}, folder).eval()"]
    settings = f"AutoConfig.from_pretrained(base{_revision(loading)})"
    return [
        f"torch.manual_seed({loading.random_seed})  # the base is random weights",
        "encoder = PeftModel.from_pretrained(",
        f"    AutoModel.from_config({settings}, dtype=torch.float32), folder",
        ").eval()",
    ]


def _in_four_bits(loading: Loading) -> bool:
    """Whether the loader rounds the base; one that it draws again stays in float32."""
    return loading.four_bit and loading.form == "adapter" and loading.random_seed is None


def _inputs(loading: Loading) -> list[str]:
    source = "folder" if loading.form == "merged" else f"base{_revision(loading)}"
    texts = '["a first text"], ["its second text"]' if loading.pairs else '["a text to classify"]'
    several = '    padding=True, padding_side="right",'
    return [
        f"inputs = AutoTokenizer.from_pretrained({source})(",
        f"    {texts},",
        f'    truncation=True, max_length={loading.max_length}, return_tensors="pt",',
        several if loading.padding else "    # one text at a time: there is no padding token",
        ")",
    ]


def _logits(loading: Loading) -> list[str]:
    """The head as `fedlr.training.heads` computes it."""
    states = "encoder(**inputs).last_hidden_state"
    if loading.head == "random_cls":
        hidden = [
            "hidden = linear(",
            f'    {states}[:, 0], head["head.dense.weight"], head["head.dense.bias"]',
            ")",
        ]
        features = "torch.tanh(hidden)"
    else:
        hidden = [f'hidden = {states} * inputs["attention_mask"].unsqueeze(-1)']
        if loading.feature_scale is None:
            features = 'hidden.sum(1) / inputs["attention_mask"].sum(1, keepdim=True)'
        else:
            features = f"{loading.feature_scale!r} * normalize(hidden.sum(1))"
    return [
        *hidden,
        "logits = linear(",
        f"    {features},",
        '    head["head.output.weight"], head.get("head.output.bias"),',
        ")",
    ]
