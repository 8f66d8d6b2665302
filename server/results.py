"""A finished run → its summary, adapter and plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.report.plots import curves
from fedlr.report.records import ClientSummary, Summary, write_summary
from fedlr.report.units import percent, privacy_loss

if TYPE_CHECKING:
    from fedlr.build import Workbench
    from server.outcome import Outcome


def summarise(workbench: Workbench, outcome: Outcome, wall_s: float) -> Summary:
    """Return the summary of a run; every number in it is public.

    Args:
        workbench: What ran.
        outcome: What came out.
        wall_s: Duration, seconds.
    """
    config, records = workbench.config, outcome.records
    mode = config.privacy.mode
    private = mode != "none"
    sent = max(1, sum(len(record.cohort) for record in records))
    accepted = max(1, sum(record.accepted for record in records))
    clients = _clients(workbench, outcome)
    stopped = (outcome.stopped_reason,) if outcome.stopped_reason else ()
    return Summary(
        method=config.method.name,
        model=workbench.base.name,
        data=config.data.name or config.data.path or config.data.kind,
        data_sha256=workbench.data.publishable_sha256,
        label_names=workbench.data.label_names,
        majority=workbench.majority,
        rounds=outcome.state.round,
        privacy_mode=mode,
        bytes_up=sum(record.bytes_up for record in records) // accepted,
        bytes_down=sum(record.bytes_down for record in records) // sent,
        wall_s=wall_s,
        server_s=sum(record.server_s for record in records),
        clients=clients,
        accuracy_start=outcome.accuracy_start,
        accuracy=outcome.accuracy,
        unit=config.privacy.unit if private else None,
        accountant=config.privacy.accountant if private else None,
        epsilon_max=max(client.epsilon or 0.0 for client in clients) if private else None,
        epsilon_budget=config.privacy.epsilon if mode == "dp" else None,
        delta=max(plan.delta for plan in workbench.clients) if private else None,
        notices=(*workbench.notices, *outcome.notices, *stopped),
    )


def _clients(workbench: Workbench, outcome: Outcome) -> tuple[ClientSummary, ...]:
    mode = workbench.config.privacy.mode
    return tuple(
        ClientSummary(
            client=plan.name,
            joins=outcome.joins.get(plan.name, 0),
            steps=outcome.steps.get(plan.name, 0),
            noise_multiplier=plan.noise_multiplier if mode != "none" else None,
            epsilon=_spent(outcome.epsilon, plan.name, mode),
        )
        for plan in workbench.clients
    )


def _spent(epsilon: Mapping[str, float], client: str, mode: str) -> float | None:
    """Return the client's last reported ε; ∞ in dry mode, where nothing is promised."""
    if mode == "none":
        return None
    return math.inf if mode == "dry" else epsilon.get(client, 0.0)


def card(summary: Summary) -> str:
    """Return the model card of a run's adapter, Markdown: what it is and what it promises."""
    if summary.privacy_mode == "dp":
        promise = (
            f"Each site's releases in this one run are (ε, δ)-differentially private for adding "
            f"or removing one {summary.unit}: ε ≤ {privacy_loss(summary.epsilon_max or 0.0)} at "
            f"δ = {summary.delta:g}, accountant {summary.accountant}, noise added at the site. "
            "Other runs on the same data add to it."
        )
    else:
        promise = f"No privacy guarantee (`privacy.mode={summary.privacy_mode}`)."
    accuracy = "not evaluated" if summary.accuracy is None else percent(summary.accuracy)
    labels = ", ".join(f"`{name}`" for name in summary.label_names)
    return f"""# Adapter trained by fedlr

Method `{summary.method}`, {len(summary.clients)} sites, {summary.rounds} rounds, data
`{summary.data}`. Accuracy on the public validation split: {accuracy} (largest class
{percent(summary.majority)}). Labels: {labels}.

## Privacy

{promise}

## Use

```python
from transformers import AutoModel
from peft import PeftModel

encoder = PeftModel.from_pretrained(AutoModel.from_pretrained("<base_model>"), "<this folder>")
```

The classification head is in `head.safetensors`; `head.json` says its kind, the norm that pooled
features are scaled to, and the labels in the order of the logits.
"""


def write_results(workbench: Workbench, outcome: Outcome, summary: Summary, folder: Path) -> None:
    """Write ``adapter/``, ``curves.png`` and, last of all, ``summary.json`` into ``folder``."""
    from fedlr.build import save_result

    save_result(workbench, outcome.parts, folder / "adapter", card(summary))
    curves(outcome.records, summary, folder / "curves.png")
    write_summary(folder / "summary.json", summary)
