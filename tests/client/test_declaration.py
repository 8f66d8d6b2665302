"""A site's policy file says all that an agent needs; whatever is wrong in it is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.declaration import LONGEST_SOCKET, read_declaration
from fedlr.errors import ConfigError
from tests.client.real_site import place

KEY = "ab" * 32

WHOLE = f"""\
client = "hospital-a"
declared_size = 11000
unit = "user"
labels = ["no", "yes"]
source_id = "ward-7"
ledger = "ward-7.sqlite"

[budget]
delta = 1e-6
epsilon_total = 10.0
epsilon_per_run = 4.0

[allow]
coordinators = ["{KEY}"]
approve = true
methods = ["fedsvd"]

[data]
path = "ward-7"
user_column = "patient"

[model]
name = "/srv/models/minilm"

[kernels]
threads = 2
physical_batch = 8

[agent]
socket = "door/agent.sock"
group = "flower"
job_megabytes = 3
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        read_declaration(written(folder, text))
    return refused.value.problems


def test_a_whole_policy_is_read_as_it_stands(tmp_path: Path) -> None:
    found = read_declaration(written(tmp_path, WHOLE))
    assert (found.client, found.ledger) == ("hospital-a", tmp_path / "ward-7.sqlite")
    assert found.limits.epsilon_per_run == 4.0
    assert found.limits.methods == frozenset({"fedsvd"})
    assert found.coordinators == frozenset({KEY})
    assert (found.approve, found.dry) == (True, False)
    assert (found.data.path, found.data.user_column) == (str(tmp_path / "ward-7"), "patient")
    assert not found.data.public
    assert found.model.name == "/srv/models/minilm"
    assert (found.kernels.threads, found.kernels.physical_batch) == (2, 8)
    assert found.agent.socket == tmp_path / "door" / "agent.sock"
    assert (found.agent.group, found.agent.job_bytes) == ("flower", 3_000_000)


def test_paths_are_beside_the_file_wherever_the_agent_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, WHOLE)
    monkeypatch.chdir(tmp_path)
    assert read_declaration(Path("site.toml")) == read_declaration(tmp_path / "site.toml")


def test_the_site_of_the_tests_is_declared_well(tmp_path: Path) -> None:
    assert read_declaration(place(tmp_path).policy).client == "client-000"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('client = "hospital-a"\n', "", "client is missing"),
        ("declared_size = 11000\n", "", "declared_size is missing"),
        ("delta = 1e-6\n", "", "budget.delta"),
        (f'coordinators = ["{KEY}"]\n', "", "allow.coordinators is missing"),
        (KEY, KEY[:-1], "64 hexadecimal digits"),
        ("approve = true", 'approve = "yes"', "allow.approve = 'yes' must be true or false"),
        ("approve = true", "dry = true", "data.public is not true"),
        ("approve = true", "aprove = true", "there is no allow.aprove"),
        ('path = "ward-7"\n', "", "data.path is missing"),
        ('path = "ward-7"', 'path = "w"\nname = "imdb"', "there is no data.name of a site"),
        ('user_column = "patient"', "user_column = 3", "data.user_column"),
        ("threads = 2", "threads = 0", "kernels.threads = 0 must be ≥ 1"),
        ("threads = 2", "fused_clients = 2", "there is no kernels.fused_clients of a site"),
        ("job_megabytes = 3", "job_megabytes = 0", "agent.job_megabytes = 0 must be ≥ 1"),
        ("job_megabytes = 3", "port = 3", "there is no agent.port"),
        ('group = "flower"', "group = 3", "agent.group = 3 must be a text"),
        ("door/agent.sock", "x" * LONGEST_SOCKET, "must have ≤ 100 bytes"),
        ('[model]\nname = "/srv/models/minilm"', "", ""),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in WHOLE
    text = WHOLE.replace(old, new)
    if not complaint:
        assert read_declaration(written(tmp_path, text)).model.name == "embedded"
        return
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert complaint in found[0]
    assert str(tmp_path / "site.toml") in found[0]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = WHOLE.replace("declared_size = 11000\n", "").replace("threads = 2", "threads = 0")
    text = text.replace("approve = true", "approve = 1").replace('"patient"', "4")
    assert len(problems(tmp_path, text)) == 4


def test_a_section_that_is_none_is_told(tmp_path: Path) -> None:
    text = WHOLE[: WHOLE.index("[data]")]
    assert any("data = 3" in found for found in problems(tmp_path, "data = 3\n" + text))
