"""What a run refuses, its plan refuses, in the same words; a ledger counts for its own client."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fedlr.build import source_spec
from fedlr.cli import operators
from fedlr.cli.compose import compose
from fedlr.cli.main import main
from fedlr.data.sources import load
from fedlr.errors import ConfigError
from fedlr.orders import check_policies
from fedlr.planning import plan_clients
from fedlr.privacy.earlier import Earlier, read_ledger
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger
from tests.cli.small import policies, small
from tests.cli.test_plan import QUICK, planned

OWN = 'ledger = "ward.sqlite"\nsource_id = "ward"\n[budget]\nepsilon_total = 9.0\ndelta = 0.01\n'
OTHER = OWN.replace("ward", "other")
NAMES = ("client-000", "client-001")
WORDS = (*QUICK, "federation.clients=2", "federation.clients_per_round=2", "data.max_examples=90")


def kept(path: Path, source: str) -> None:
    SqliteLedger(path, source).close()


def _nothing(folder: Path) -> None:
    pass


def _ward(folder: Path) -> None:
    kept(folder / "ward.sqlite", "ward")


def _of_another(folder: Path) -> None:
    kept(folder / "ward.sqlite", "elsewhere")


def _of_users(folder: Path) -> None:
    with closing(SqliteLedger(folder / "ward.sqlite", "ward")) as ledger:
        key, event = JobKey("run", 0, "client-000", "n"), Release(1.0, 0.1, 1, "user")
        ledger.reserve(key, event)
        ledger.commit(key, event)


def _without_witness(folder: Path) -> None:
    _of_users(folder)
    (folder / "ward.sqlite.witness").unlink()


def _gone(folder: Path) -> None:
    _of_users(folder)
    (folder / "ward.sqlite").unlink()


def _damaged(folder: Path) -> None:
    (folder / "ward.sqlite").write_text("no ledger at all\n" * 99)


def _two_of_one_source(folder: Path) -> None:
    for name in ("ward", "other"):
        kept(folder / f"{name}.sqlite", "ward")


def _one_under_two_names(folder: Path) -> None:
    _ward(folder)
    os.link(folder / "ward.sqlite", folder / "other.sqlite")


Prepare = Callable[[Path], None]
REFUSED: dict[str, tuple[tuple[str, ...], Prepare, tuple[str, ...], str]] = {
    # (policies of the clients, what else is in their folder, overrides, part of the refusal)
    "dry": (("",), _nothing, ("privacy=dry", "data.public=true"), "privacy.mode = dry"),
    "not private": (("",), _nothing, ("privacy=none", "data.public=true"), "privacy.mode = none"),
    "client": (('client = "another"',), _nothing, (), "says client = 'another'"),
    "size": (("declared_size = 7",), _nothing, (), "says declared_size = 7, the run 4"),
    "unit": (('unit = "user"',), _nothing, (), "says unit = 'user'"),
    "labels": (('labels = ["a", "b"]',), _nothing, (), "says labels = ['a', 'b'], the run ['net"),
    "method": (('[allow]\nmethods = ["flora"]',), _nothing, (), "allows the methods flora"),
    "delta": (("[budget]\ndelta = 1e-9",), _nothing, (), "allows δ ≤ 1e-09"),
    "no ledger": ((OWN,), _nothing, (), "which does not exist; bring it back"),
    "lost ledger": ((OWN,), _gone, (), "which does not exist; bring it back"),
    "ledger of another source": ((OWN,), _of_another, (), "belongs to the data source 'elsewhere'"),
    "ledger of another unit": ((OWN,), _of_users, (), "holds releases of the unit user"),
    "ledger without witness": ((OWN,), _without_witness, (), "has released something, but"),
    "damaged ledger": ((OWN,), _damaged, (), "the policy of client-000: ledger"),
    "no file name": (
        (OWN.replace("ward.s", f"{'w' * 300}.s"),),
        _nothing,
        (),
        "File name too long",
    ),
    "one ledger": ((OWN, OWN), _ward, (), "client-000 and client-001 name one ledger"),
    "one source": (
        (OWN, OTHER.replace('source_id = "other"', 'source_id = "ward"')),
        _two_of_one_source,
        (),
        "name one ledger or source id",
    ),
    "one file": ((OWN, OTHER), _one_under_two_names, (), "name one ledger or source id"),
    "no policy": (("epsilon = 3",), _nothing, (), "there is no epsilon"),
    "no such client": (("", "", "epsilon = 3"), _nothing, (), "is no client's"),
    "all at once": (
        ("declared_size = 7\n" + OWN.replace("0.01", "1e-9"), OTHER),
        _nothing,
        ("method=ffa_lora",),
        "4 problems",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_refuses_its_plan_refuses_in_the_same_words(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts, prepare, words, says = REFUSED[name]
    by_client = {f"client_{index:03d}": text for index, text in enumerate(texts)}
    given = policies(tmp_path / "p", **by_client)
    prepare(tmp_path / "p")
    config = compose([*WORDS, *words, given])
    data = load(source_spec(config))
    clients = plan_clients(config, data, dict.fromkeys(NAMES, 1.0))
    with pytest.raises(ConfigError) as refused:
        check_policies(config, clients, data.label_names)
    assert says in str(refused.value)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["plan", *WORDS, *words, given]) == 2
    err = capfd.readouterr().err
    assert err.endswith(f"fedlr: {refused.value}\n")
    assert "calibrating" not in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_verbs_refuse_alike(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labels = 'labels = ["yes", "no"]\n'
    given = policies(tmp_path / "p", client_000=labels + OWN, client_001=OWN)
    words = [*small(tmp_path), given]
    refusals = []
    for verb in ("simulate", "plan"):
        assert main([verb, *words]) == 2
        refusals.append(capfd.readouterr().err.partition("fedlr: 4 problems")[2])
    assert refusals[0] == refusals[1]
    assert "the run ['no', 'yes']" in refusals[0]
    assert not (tmp_path / "runs").exists()


def test_labels_that_no_data_were_read_for_are_not_held_against_a_policy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = policies(tmp_path / "p", client_000='labels = ["a", "b"]')
    planned(capfd, "--sizes", "500", *QUICK, given)
    words = ("--sizes", "500", *QUICK, given, "data=file", "data.path=x", "data.label_names=[b,a]")
    assert main(["plan", *words]) == 2
    assert "says labels = ['a', 'b'], the run ['b', 'a']" in capfd.readouterr().err


def test_a_sweep_names_each_problem_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = policies(tmp_path / "p", client_000="declared_size = 9", client_001=OWN)
    assert (
        main(["plan", "--sizes", "500,400", *QUICK, given, "seed=0,1", "privacy.epsilon=1,3"]) == 2
    )
    err = capfd.readouterr().err
    assert "2 problems" in err
    assert err.count("says declared_size = 9, the run 500") == 1


def test_a_sweep_reads_each_ledger_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process books between two runs would make two ledgers of it."""
    given, read = policies(tmp_path / "p", client_000=OWN), list[Path]()

    def counted(path: Path, source_id: str | None = None) -> Earlier:
        read.append(path)
        return read_ledger(path, source_id)

    _ward(tmp_path / "p")
    monkeypatch.setattr(operators, "read_ledger", counted)
    assert len(planned(capfd, "--sizes", "500", *QUICK, given, "privacy.epsilon=1,3").runs) == 2
    assert read == [tmp_path.resolve() / "p" / "ward.sqlite"]


def given_ledgers(folder: Path, **sources: str) -> str:
    """A folder of ledgers, each of a data source, by client with an underscore."""
    folder.mkdir()
    for name, source in sources.items():
        kept(folder / f"{name.replace('_', '-')}.sqlite", source)
    return str(folder)


RUN = "2031-05-01-120000-tiny-1a2b3c4d"


@pytest.mark.parametrize(
    ("sources", "policy", "says"),
    [
        ({"client_000": f"{RUN}/client-000"}, "", None),
        ({"client_000": "anything"}, "", None),
        ({"client_000": "ward"}, 'source_id = "ward"', None),
        # A run makes its own ledger where a policy names a source and no ledger of it.
        ({"client_000": f"{RUN}/client-000"}, 'source_id = "ward"', None),
        ({"client_000": f"{RUN}/client-000"}, 'source_id = "x/client-001"', None),
        ({"client_000": "x/client-001"}, 'source_id = "x/client-001"', None),
        (
            {"client_000": f"{RUN}/client-001"},
            "",
            f"'{RUN}/client-001', to client-001 of a run, not to client-000",
        ),
        ({"client_000": "east"}, 'source_id = "ward"', "the policy of client-000 says source_id"),
        ({"client_001": "ward"}, 'source_id = "ward"', "which is that of client-000, not of"),
        (
            {"client_000": "east", "client_001": "east"},
            "",
            "client-001.sqlite belongs to the data source 'east', which is that of client-000",
        ),
    ],
)
def test_a_ledger_must_be_of_the_client_whose_name_its_file_has(
    sources: dict[str, str],
    policy: str,
    says: str | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = given_ledgers(tmp_path / "l", **sources)
    given = policies(tmp_path / "p", client_000=policy)
    words = ("plan", "--sizes", "500,400", *QUICK, given, "--ledgers", folder)
    assert main([*words]) == (0 if says is None else 2)
    assert (says or "") in capfd.readouterr().err


def test_the_ledger_of_a_policy_counts_and_not_a_given_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = policies(tmp_path / "p", client_000=OWN)
    with closing(SqliteLedger(tmp_path / "p" / "ward.sqlite", "ward")) as ledger:
        ledger.reserve(JobKey("run", 0, "client-000", "n"), Release(2.0, 0.1, 9, "example"))
    folder = given_ledgers(tmp_path / "l", client_000=f"{RUN}/client-000")
    words = ("--sizes", "500", *QUICK, given)
    alone, both = planned(capfd, *words), planned(capfd, *words, "--ledgers", folder)
    assert both.runs == alone.runs
    assert alone.runs[0].clients[0].spent > 0
    assert both.notices != alone.notices


def test_strangers_are_named_with_all_that_does_not_fit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = given_ledgers(
        tmp_path / "l", client_000=f"{RUN}/client-001", client_001=f"{RUN}/client-000"
    )
    given = policies(tmp_path / "p", client_000="declared_size = 9", client_001=OWN)
    assert main(["plan", "--sizes", "500,400", *QUICK, given, "--ledgers", folder]) == 2
    err = capfd.readouterr().err
    assert "4 problems" in err
    assert err.count("--ledgers: client-00") == 2
