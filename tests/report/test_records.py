"""The log of rounds and the summary: round trips, torn and damaged files, strict JSON."""

from __future__ import annotations

import json
import math
import resource
import string
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlr.errors import RunError
from fedlr.report import strict_json
from fedlr.report.records import (
    ClientSummary,
    Refusal,
    RoundLog,
    RoundRecord,
    Summary,
    read_rounds,
    read_summary,
    write_summary,
)
from tests.report.samples import RECORD, SUMMARY

counts = st.integers(min_value=0, max_value=2**63)
seconds = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
maybe_infinite = st.none() | st.floats(min_value=0, allow_nan=False)
names = st.text(max_size=12)
codes = st.text(string.ascii_lowercase, min_size=1, max_size=40)


@st.composite
def records(draw: st.DrawFn) -> RoundRecord:
    cohort = tuple(draw(st.lists(names, max_size=4)))
    epsilon_max = draw(maybe_infinite)
    below = st.just(0.0) if epsilon_max is None else st.floats(0, epsilon_max)
    by_client = {} if epsilon_max is None else draw(st.dictionaries(names, below, max_size=4))
    return RoundRecord(
        round=draw(st.integers(1, 10**6)),
        cohort=cohort,
        accepted=draw(st.integers(0, len(cohort))),
        refused=tuple(draw(st.lists(st.builds(Refusal, names, codes), max_size=3))),
        accuracy=draw(st.none() | st.floats(0, 1)),
        loss=draw(maybe_infinite),
        epsilon_max=epsilon_max,
        epsilon_by_client=by_client,
        bytes_down=draw(counts),
        bytes_up=draw(counts),
        wall_s=draw(seconds),
        server_s=draw(seconds),
        steps=draw(counts),
    )


@given(records())
def test_a_record_survives_its_line(record: RoundRecord) -> None:
    line = strict_json.encode(record)
    assert "\n" not in line
    assert strict_json.decode(RoundRecord, line) == record


def refuse(literal: str) -> NoReturn:
    raise AssertionError(f"{literal} is not strict JSON")


def test_infinite_epsilon_is_a_string_in_the_file_and_infinity_in_python(tmp_path: Path) -> None:
    record = replace(RECORD, epsilon_max=math.inf, epsilon_by_client={"inf": math.inf})
    RoundLog(tmp_path / "rounds.jsonl").append(record)
    text = (tmp_path / "rounds.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["epsilon_by_client"] == {"inf": "inf"}
    (read,) = read_rounds(tmp_path / "rounds.jsonl")
    assert read == record
    assert read.epsilon_max == math.inf


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", '"nan"', "true"])
def test_numbers_outside_strict_json_are_refused_on_reading(literal: str) -> None:
    text = strict_json.encode(RECORD).replace('"wall_s": 2.0', f'"wall_s": {literal}')
    assert literal in text
    with pytest.raises(ValueError, match=r"wall_s|is not JSON"):
        strict_json.decode(RoundRecord, text)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_the_codec_refuses_what_json_cannot_say(value: float) -> None:
    broken = replace(RECORD)
    object.__setattr__(broken, "loss", value)
    with pytest.raises(ValueError, match="loss"):
        strict_json.encode(broken)


@pytest.mark.parametrize(
    "name", [f.name for f in fields(RoundRecord) if f.type in ("float", "float | None")]
)
def test_no_field_of_a_round_takes_nan(name: str) -> None:
    changes: dict[str, Any] = {name: math.nan}
    with pytest.raises(ValueError, match=name):
        replace(RECORD, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": 0}, "round = 0 must be ≥ 1"),
        ({"accepted": 4}, "accepted = 4 must be ≤ 3"),
        ({"accuracy": 1.01}, "accuracy = 1.01"),
        ({"loss": -0.1}, "loss = -0.1"),
        ({"bytes_up": 1.5}, "bytes_up = 1.5 must be an integer"),
        ({"wall_s": math.inf}, "wall_s = inf"),
        ({"epsilon_max": 1.0}, "1.25 must be ≤ epsilon_max = 1.0"),
        ({"epsilon_max": None}, "must be ≤ epsilon_max = None"),
    ],
)
def test_a_round_outside_its_ranges_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECORD, **changes)


@pytest.mark.parametrize("code", ["", "Over", "row 7 is 'Bob'", "a" * 41, "over_budget\n"])
def test_a_refusal_carries_a_code_and_no_sentence(code: str) -> None:
    with pytest.raises(ValueError, match="code = "):
        Refusal("site-0", code)


def log_of(path: Path, *rounds: int) -> RoundLog:
    log = RoundLog(path)
    for number in rounds:
        log.append(replace(RECORD, round=number))
    return log


def test_reopening_a_log_continues_it(tmp_path: Path) -> None:
    log_of(tmp_path / "r", 1, 2)
    log_of(tmp_path / "r", 3)
    assert [r.round for r in read_rounds(tmp_path / "r")] == [1, 2, 3]


def test_a_line_torn_at_any_byte_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    log_of(path, 1, 2)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert [r.round for r in read_rounds(path)] == [1]
    for cut in (start, start + 1, len(whole) // 2 + start // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        log_of(path, 2)
        assert path.read_bytes() == whole


def test_a_torn_first_line_leaves_no_round(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b'{"round": 1, "coh\xc3')
    assert read_rounds(tmp_path / "r") == []


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"round": 2}',
        strict_json.encode(RECORD).replace('"round": 1', '"round": 0').encode(),
        strict_json.encode(RECORD).replace('"steps"', '"stairs"').encode(),
        strict_json.encode(RECORD).replace('"round": 1', '"round": 1, "round": 1').encode(),
        strict_json.encode(RECORD).replace('"steps": 20', '"steps": true').encode(),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(tmp_path: Path, damage: bytes) -> None:
    good = strict_json.encode(RECORD).encode()
    (tmp_path / "r").write_bytes(good + b"\n" + damage + b"\n" + good + b"\n")
    with pytest.raises(RunError, match="line 2 is damaged"):
        read_rounds(tmp_path / "r")


def test_a_repeated_round_replaces_itself_and_what_followed(tmp_path: Path) -> None:
    log_of(tmp_path / "r", 1, 2, 3, 4)
    RoundLog(tmp_path / "r").append(replace(RECORD, round=3, steps=99))
    read = read_rounds(tmp_path / "r")
    assert [(r.round, r.steps) for r in read] == [(1, 20), (2, 20), (3, 99)]


def test_a_write_that_the_system_cuts_short_leaves_no_trace(tmp_path: Path) -> None:
    log = log_of(tmp_path / "r", 1)
    before = (tmp_path / "r").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(RunError, match="cannot append"):
            log.append(replace(RECORD, round=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "r").read_bytes() == before


def test_a_line_that_never_reached_the_disk_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(tmp_path / "r", 1)
    before = (tmp_path / "r").read_bytes()

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(RunError, match="Input/output error"):
        log.append(replace(RECORD, round=2))
    assert (tmp_path / "r").read_bytes() == before


def test_a_missing_folder_or_file_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        RoundLog(tmp_path / "absent" / "r")
    with pytest.raises(RunError, match="cannot read"):
        read_rounds(tmp_path / "absent")
    with pytest.raises(RunError, match="cannot read"):
        read_summary(tmp_path / "absent")
    with pytest.raises(RunError, match="cannot write"):
        write_summary(tmp_path / "absent" / "s", SUMMARY)


PLAIN = replace(SUMMARY, privacy_mode="none", epsilon_max=None, delta=None, unit=None)
DRY = replace(SUMMARY, privacy_mode="dry", epsilon_max=math.inf)


@pytest.mark.parametrize("summary", [SUMMARY, PLAIN, DRY], ids=["dp", "none", "dry"])
def test_a_summary_survives_its_file(tmp_path: Path, summary: Summary) -> None:
    write_summary(tmp_path / "summary.json", summary)
    assert read_summary(tmp_path / "summary.json") == summary
    data = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert list(data) == [f.name for f in fields(Summary)]
    assert data["epsilon_max"] == {"dp": 1.25, "none": None, "dry": "inf"}[summary.privacy_mode]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy_mode": "off"}, "privacy_mode = 'off' must be one of dp, dry, none"),
        ({"privacy_mode": "none"}, "must be None"),
        ({"epsilon_max": None}, "must be given"),
        ({"delta": None}, "must be given"),
        ({"privacy_mode": "dry"}, "must be ∞"),
        ({"delta": 0.0}, "delta = 0.0"),
        ({"majority": math.nan}, "majority"),
        ({"epsilon_max": math.nan}, "epsilon_max"),
    ],
)
def test_a_summary_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SUMMARY, **changes)


def test_a_client_summary_checks_its_numbers() -> None:
    with pytest.raises(ValueError, match="joins = -1"):
        ClientSummary(client="site-0", joins=-1, steps=0)
    with pytest.raises(ValueError, match="noise_multiplier = inf"):
        ClientSummary(client="site-0", joins=1, steps=0, noise_multiplier=math.inf)


def test_a_failed_write_leaves_the_old_summary_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, SUMMARY)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_summary(path, PLAIN)
    assert read_summary(path) == SUMMARY
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_summary_is_damage(tmp_path: Path) -> None:
    (tmp_path / "s").write_text(strict_json.encode(SUMMARY)[:100])
    with pytest.raises(RunError, match="is damaged"):
        read_summary(tmp_path / "s")
