"""Old and missing packages fail, newer ones are a warning, tested ones are known to work."""

from __future__ import annotations

from importlib import metadata

import pytest

from fedlr.doctor.versions import known_to_work

TESTED = (
    "torch<3,>=2.6",
    "opacus<1.7,>=1.6",
    "peft<0.22,>=0.21",
    "transformers<6,>=5.0",
    "flwr<1.42,>=1.41",
    "hydra-core<1.4,>=1.3",
    "nowhere>=1; platform_system == 'Nowhere'",
    'ray==2.55.1; extra == "ray"',
)
INSTALLED = {
    "torch": "2.6.0+cpu",
    "opacus": "1.6.0",
    "peft": "0.21.3",
    "transformers": "5.1.0.dev0",
    "flwr": "1.41.0",
    "hydra-core": "1.3.2",
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that `importlib.metadata` answers with; missing ones are not installed."""
    found = dict(INSTALLED)
    about = {"Requires-Python": ">=3.11"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: list(TESTED))
    monkeypatch.setattr(metadata, "metadata", lambda _: about)
    return found


def test_versions_in_their_ranges_are_known_to_work(installed: dict[str, str]) -> None:
    result = known_to_work()
    assert (result.passed, result.warning) == (True, False)
    assert "known to work together: Python 3." in result.detail
    assert "torch 2.6.0+cpu, opacus 1.6.0" in result.detail


@pytest.mark.parametrize(
    ("changes", "passed", "sentence"),
    [
        ({"torch": "3.0.1"}, True, "torch 3.0.1 is newer than the tested range <3,>=2.6"),
        ({"flwr": "1.42.0"}, True, "flwr 1.42.0 is newer than the tested range"),
        ({"opacus": "1.5.4"}, False, "opacus 1.5.4 is not in the tested range <1.7,>=1.6"),
        ({"opacus": "1.5.4", "torch": "4"}, False, "opacus 1.5.4 is not in the tested range"),
    ],
)
def test_newer_is_a_warning_and_older_a_failure(
    changes: dict[str, str], passed: bool, sentence: str, installed: dict[str, str]
) -> None:
    installed.update(changes)
    result = known_to_work()
    assert (result.passed, result.warning) == (passed, passed)
    assert sentence in result.detail


def test_what_only_a_gpu_needs_is_not_missed(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: [*TESTED, "triton>=3.3,<4"])
    result = known_to_work()
    assert (result.passed, result.warning) == (True, False)
    assert "without triton, which only kernels on a GPU need" in result.detail
    installed["triton"] = "3.0"
    assert not known_to_work().passed


def test_a_missing_package_fails_and_an_extra_counts_where_it_is_used(
    installed: dict[str, str],
) -> None:
    assert "ray is not installed" in known_to_work(["ray"]).detail
    installed["ray"] = "2.55.1"
    assert known_to_work(["ray"]).passed
    installed["ray"] = "2.60.0"
    assert known_to_work(["ray"]).warning
    del installed["peft"]
    assert not known_to_work().passed


def test_another_python_is_told(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    result = known_to_work()
    assert not result.passed
    assert "python 3.10.4 is not in the tested range >=3.11" in result.detail


def test_without_its_metadata_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    assert known_to_work().warning


def test_what_the_tests_run_with_has_not_failed() -> None:
    assert known_to_work().passed, known_to_work().detail
