"""A site believes an order exactly if a trusted coordinator signed every byte of it, for now."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlr.errors import ConfigError, OrderRefused
from fedlr.signing import (
    CLOCKS_APART_S,
    LONGEST_S,
    MOST_CHARACTERS,
    RunOrder,
    check_public_key,
    new_key,
    public_key,
    read_key,
    sign,
    verify,
)

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
ORDER = RunOrder(run="tiny-1a2b", config='{"seed":0,"name":"häß"}', issued=1_000, expires=9_000)
NOW = 5_000.0
TRUSTED = [public_key(KEY)]


def code_of(text: str, now: float = NOW) -> str:
    with pytest.raises(OrderRefused) as refused:
        verify(text, TRUSTED, now)
    return refused.value.code


def outcome(text: str) -> RunOrder | str:
    try:
        return verify(text, TRUSTED, NOW)
    except OrderRefused as error:
        return error.code


def test_a_signed_order_comes_back_as_it_was() -> None:
    assert verify(sign(ORDER, KEY), TRUSTED, NOW) == ORDER
    assert verify(sign(ORDER, KEY), [public_key(OTHER), *TRUSTED], NOW) == ORDER


def test_only_a_trusted_coordinator_may_ask() -> None:
    assert code_of(sign(ORDER, OTHER)) == "unsigned"
    with pytest.raises(OrderRefused, match=r"not among allow\.coordinators"):
        verify(sign(ORDER, KEY), [], NOW)


@pytest.mark.parametrize("field", ["run", "config", "issued", "expires"])
def test_no_field_can_be_altered(field: str) -> None:
    content = json.loads(sign(ORDER, KEY))
    before = content["order"][field]
    content["order"][field] = before + 1 if isinstance(before, int) else before + "x"
    assert code_of(json.dumps(content)) == "unsigned"


def test_another_coordinators_name_under_a_signature_does_not_help() -> None:
    content = json.loads(sign(ORDER, OTHER))
    content["coordinator"] = public_key(KEY)
    assert code_of(json.dumps(content)) == "unsigned"


def test_a_digest_is_of_what_is_asked_and_not_of_when() -> None:
    others = [replace(ORDER, run="tiny-1a2c"), replace(ORDER, config="{}")]
    assert len({order.digest for order in (ORDER, *others)}) == 3
    assert replace(ORDER, issued=1_001, expires=9_001).digest == ORDER.digest


def test_a_signature_of_the_bare_text_is_none() -> None:
    # Who can have a coordinator sign other texts must not be able to make an order of one.
    content = json.loads(sign(ORDER, KEY))
    bare = json.dumps(content["order"], ensure_ascii=False).encode()
    content["signature"] = KEY.sign(bare).hex()
    assert code_of(json.dumps(content)) == "unsigned"


@pytest.mark.parametrize(
    ("now", "good"),
    [
        (ORDER.issued, True),
        (ORDER.issued - CLOCKS_APART_S, True),
        (ORDER.issued - CLOCKS_APART_S - 1, False),
        (ORDER.expires - 1, True),
        (ORDER.expires, False),
    ],
)
def test_an_order_is_good_in_its_time_alone(now: float, good: bool) -> None:
    text = sign(ORDER, KEY)
    if good:
        assert verify(text, TRUSTED, now) == ORDER
    else:
        assert code_of(text, now) == "expired"


def test_an_altered_order_that_has_expired_is_unsigned() -> None:
    # Nothing it says is believed, its time included.
    content = json.loads(sign(ORDER, KEY))
    content["order"]["expires"] += 10_000
    assert code_of(json.dumps(content), ORDER.expires + 1.0) == "unsigned"


@given(st.text(max_size=400))
@settings(max_examples=200, deadline=None)
def test_no_text_is_more_than_refused(text: str) -> None:
    assert code_of(text) == "unsigned"


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=255))
@settings(max_examples=200, deadline=None)
def test_no_changed_byte_gives_another_order(place: int, value: int) -> None:
    raw = bytearray(sign(ORDER, KEY).encode())
    raw[place % len(raw)] = value
    # A blank in the place of another one is the same JSON.
    assert outcome(raw.decode(errors="replace")) in (ORDER, "unsigned")


def test_a_text_without_end_is_not_parsed() -> None:
    with pytest.raises(OrderRefused, match="more than 65536 characters"):
        verify("[" * (MOST_CHARACTERS + 1), TRUSTED, NOW)
    assert code_of("[" * MOST_CHARACTERS) == "unsigned"
    with pytest.raises(ValueError, match="it must be ≤ 65536"):
        sign(replace(ORDER, config="x" * MOST_CHARACTERS), KEY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": ""},
        {"run": "../up"},
        {"run": "a/b"},
        {"run": ".hidden"},
        {"run": "x" * 129},
        {"issued": -1},
        {"expires": ORDER.issued},
        {"expires": ORDER.issued + LONGEST_S + 1},
    ],
)
def test_an_order_outside_its_bounds_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(ORDER, **wrong)  # type: ignore[arg-type]


def test_a_key_is_its_owners_and_signs_what_its_public_half_verifies(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.pem"
    public = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert check_public_key("key", public) == public == public_key(read_key(path))
    assert verify(sign(ORDER, read_key(path)), [public], NOW) == ORDER


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.pem"
    new_key(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already and is never replaced"):
        new_key(path)
    assert path.read_bytes() == before


def of_another_kind() -> bytes:
    key = generate_private_key(SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        (lambda: b"no key", 0o600, "no private key in PEM"),
        (of_another_kind, 0o600, "no Ed25519 key"),
        (of_another_kind, 0o640, "may be read or written by others"),
    ],
)
def test_what_is_no_key_of_a_coordinator_is_refused(
    tmp_path: Path, content: Callable[[], bytes], mode: int, complaint: str
) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content())
    path.chmod(mode)
    with pytest.raises(ConfigError, match=complaint):
        read_key(path)


def test_a_missing_key_and_a_folder_that_is_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key(tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="cannot be made: No such file"):
        new_key(tmp_path / "none" / "key.pem")


@pytest.mark.parametrize("text", ["", "AB" * 32, "a" * 63, "g" * 64, "a" * 65])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        check_public_key("allow.coordinators", text)
