"""``fedlr audit``: what it prints, its exit status, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlr.audit.bound import Guesses
from fedlr.audit.run import Claim, Report, judge
from fedlr.cli import audit
from fedlr.errors import ConfigError
from fedlr.privacy.noise import Stream
from tests.models import LONGEST, encoder
from tests.test_build import saved

LABELS, TEXTS = ("no", "yes"), ("a b c", "d", "e e a b a b c d e", "c c d")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Overrides of a configuration of seconds: 4 rounds in which every unit is always drawn."""
    lines = [{"text": TEXTS[i % 4], "label": LABELS[i % 3 % 2]} for i in range(40)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        text = "\n".join(map(json.dumps, lines)) + "\n"
        (tmp_path / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return [
        *("model=encoder", f"model.name={saved(encoder('bert'), tmp_path / 'model')}"),
        *("data=file", f"data.path={tmp_path / 'data'}", f"data.label_names=[{','.join(LABELS)}]"),
        *("adapter=query_value", "adapter.rank=8", f"model.max_length={LONGEST}"),
        *("federation.clients=2", "federation.clients_per_round=2", "federation.rounds=4"),
        *("optimizer.steps=1", "optimizer.expected_batch=40", "optimizer.learning_rate=0.1"),
        *("privacy.accountant=rdp", "privacy.delta=1e-12", "kernels.device=cpu", "--canaries=500"),
    ]


def test_an_honest_site_passes_at_epsilon_one(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Wrong once in 10⁶ runs at most: that is what the confidence says of an honest site.
    assert audit.run([*words, "--confidence=0.999999"]) == 0
    found = capsys.readouterr()
    assert "round 4 of 4" in found.err
    table = dict(line.split("  ", 1) for line in found.out.splitlines())
    assert list(table) == [
        "claimed ε",
        "canaries",
        "lower bound on ε",
        "largest possible",
        "verdict",
    ]
    assert table["claimed ε"].strip().startswith("1.00 at δ = 1e-12")
    assert "500, 100 guessed" in table["canaries"]
    assert "passed" in table["verdict"]


def test_a_site_is_audited_under_its_operators_policy(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "client-000.toml").write_text("[allow]\nmax_rank = 2\n")
    given = [*words, f"privacy.policies={tmp_path / 'policies'}", "--canaries=100"]
    assert audit.run(given) == 0
    assert "100, 20 guessed" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="max_rank = 2, but method fed_sb gives every client"):
        audit.run([*given, "method=fed_sb"])


@pytest.mark.parametrize("more", [(), ("method=fedavg_lora",)])
def test_a_site_without_noise_fails_with_its_own_exit_status(
    more: tuple[str, ...],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Stream.gaussian
    monkeypatch.setattr(Stream, "gaussian", lambda self, shape, sd: real(self, shape, 1e-3 * sd))
    assert audit.run(["--json", *words, *more]) == audit.EXCEEDED == 9
    record = json.loads(capsys.readouterr().out)
    assert record["exceeded"] is True
    assert record["correct"] == record["guesses"] == 100
    assert record["claimed_epsilon"] <= 1.0 < record["epsilon_lower_bound"]
    assert record["epsilon_lower_bound"] == record["largest_possible_bound"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["privacy=none"], "privacy.mode = none claims no ε to audit"),
        (["--canaries=99"], "--canaries = 99 must be ≥ 100"),
        (["--confidence=1"], "--confidence = 1.0 must be"),
        (["--canaries=many"], "--canaries"),
        (["privacy.epsilom=1"], "privacy.epsilon"),
    ],
)
def test_what_cannot_be_audited_is_refused(wrong: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        audit.run(wrong)


def test_epsilon_is_one_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(config: Any, *_: Any) -> Report:
        seen.append(config.privacy.epsilon)
        return judge(Guesses(1000, 200, 100), Claim(config.privacy.epsilon, 1e-5))

    monkeypatch.setattr(audit, "audit", stop)
    for words in ([], ["privacy.epsilon=3"], ["method=ffa_lora", "+privacy.epsilon=0.5"]):
        assert audit.run(words) == 0
    assert seen == [1.0, 3.0, 0.5]


def test_a_claim_that_no_guesses_can_contradict_is_not_called_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = judge(Guesses(1000, 200, 200), Claim(8.0, 1e-5))
    monkeypatch.setattr(audit, "audit", lambda *_: report)
    assert audit.run(["privacy.epsilon=8"]) == 0
    assert "nothing could be: lower privacy.epsilon" in capsys.readouterr().out


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.run(["--help"]) == 0
    assert "--canaries" in capsys.readouterr().out
