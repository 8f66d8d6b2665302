"""``fedlr report``, and the command on its page: what it prints gives the same run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.cli.compose import compose
from fedlr.cli.report import run
from fedlr.config import RunConfig, to_json
from fedlr.errors import ConfigError, RunError
from fedlr.report.command import overrides
from server.results import plain_default
from tests.report.run_folder import make
from tests.report.sweeps import make_sweep


def mapping(config: RunConfig) -> dict[str, object]:
    found: dict[str, object] = json.loads(to_json(config))
    return found


def test_the_last_line_is_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = make(tmp_path / "run", rounds=1), tmp_path / "new" / "place"
    assert run([str(folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output / 'report.html'}\n"
    assert (output / "figures" / "accuracy.png").exists()
    assert not (folder / "report.html").exists()


def test_a_sweep_is_reported_with_what_choosing_costs(tmp_path: Path) -> None:
    folder, output = make_sweep(tmp_path / "sweep"), tmp_path / "out"
    assert run([str(folder), "--output", str(output)]) == 0
    text = (output / "report.html").read_text(encoding="utf-8")
    assert "which this page was made without" not in text


def test_a_folder_that_is_none_of_both_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no run\.json and no sweep\.json; give the one"):
        run([str(tmp_path)])
    with pytest.raises(RunError, match="is not a folder; give the one"):
        run([str(tmp_path / "none")])
    folder = make(tmp_path / "2026-01-02" / "run", rounds=1)
    with pytest.raises(
        RunError, match=f"holds runs or sweeps and is none itself.*for example '{folder}'"
    ):
        run([str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another place with --output"):
        run([str(folder), "--output", str(tmp_path / "file")])
    with pytest.raises(ConfigError, match="see `fedlr report --help`"):
        run([])


def test_the_default_of_the_server_is_that_of_the_configuration_files() -> None:
    assert plain_default() == mapping(compose([]))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["debug=tiny"],
        ["experiment=sst2", "data.path=some folder"],
        ["privacy=none", "method=head_only", "model/head=linear", "seed=3"],
        ["adapter.layers=top:1", "privacy.delta=1e-7", "optimizer=adam"],
        ['name="größe"'],
    ],
)
def test_the_words_on_the_page_compose_to_the_same_configuration(words: list[str]) -> None:
    config = compose(words)
    again = compose(list(overrides(mapping(config), mapping(compose([])))))
    assert again == config


TEXTS = (
    *("a b", 'a"b', "it's", "a\\", 'a\\"b\\', "${x}", "\\${x}", "null", "1e5", "-3", "True"),
    *("ü", "a,b", "a=b", "a:b", "(a)", "[a]", "{a}", "a#b", " a ", "~/x", "C:\\d\\x", "$", "plain"),
)


@pytest.mark.parametrize("path", ["a b/'c\"", "${x}\\", "~/x/y.csv"])
def test_a_text_survives_the_words(path: str) -> None:
    config = compose(["data=file", "data.path=here"])
    config = replace(config, data=replace(config.data, path=path, label_names=TEXTS))
    assert compose(list(overrides(mapping(config), plain_default()))) == config
