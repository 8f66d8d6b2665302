"""Orders of a coordinator: what a run may ask of a site, signed, so that nobody else can ask.

Whoever reaches a Flower SuperLink can submit an app and send any job. A site therefore does
not believe the app: it runs the jobs of an order that names the whole configuration, and that
a coordinator has signed whose public key its operator wrote into the policy. Ed25519
(RFC 8032) over one canonical text; the implementation is that of the package ``cryptography``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedlr import checks
from fedlr.errors import ConfigError, OrderRefused
from fedlr.report import strict_json

MOST_CHARACTERS = 65_536
"""Length above which the text of a signed order is refused unread: ten times a long one."""

CLOCKS_APART_S = 900
"""Seconds by which an order may seem to come from the future: clocks differ."""

LONGEST_S = 90 * 86_400
"""Longest time for which an order may be good, in seconds: one that is lost must end some day."""

_DOMAIN = b"fedlr.order.1\0"
"""Before what is signed, so that no signature of another protocol fits."""

_LAST = 253_402_300_799 - LONGEST_S
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEY = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class RunOrder:
    """What a coordinator asks of every site of one run.

    Attributes:
        run: Identifier of the run, as in its jobs: a letter or digit, then at most 127 letters,
            digits, ``.``, ``_`` and ``-``; it names files at the sites.
        config: Canonical JSON of the configuration (`fedlr.config.to_json`).
        issued: When it was signed, seconds since 1970, UTC.
        expires: When it ends, seconds since 1970, UTC; > ``issued``, at most `LONGEST_S` later.

    Raises:
        ValueError: A field is outside its bound.
    """

    run: str
    config: str
    issued: int
    expires: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.run):
            raise ValueError(f"run = {self.run!r} must match {_NAME.pattern}")
        checks.at_least("issued", self.issued, 0)
        if self.issued > _LAST:
            raise ValueError(f"issued = {self.issued} must be ≤ {_LAST}, the year 9999")
        checks.at_least("expires", self.expires, self.issued + 1)
        if self.expires - self.issued > LONGEST_S:
            raise ValueError(
                f"expires = {self.expires} must be ≤ issued + {LONGEST_S}, {LONGEST_S // 86_400} "
                "days later"
            )

    @property
    def digest(self) -> str:
        """sha256, hex, of run and configuration: what an operator approves.

        A coordinator may sign the same again for a later time, for a run that goes on.
        """
        return sha256(_DOMAIN + f"{self.run}\0{self.config}".encode()).hexdigest()

    def _signed(self) -> bytes:
        """Return what is signed; strict JSON in field order is one text for one order."""
        return _DOMAIN + strict_json.encode(self).encode()


@dataclass(frozen=True)
class SignedOrder:
    """An order on its way.

    Attributes:
        order: What is asked.
        coordinator: Public key of who asks, 64 hexadecimal digits.
        signature: 128 hexadecimal digits.
    """

    order: RunOrder
    coordinator: str
    signature: str


def new_key(path: Path) -> str:
    """Make the key pair of a coordinator and return its public key.

    Args:
        path: Gets the private key: PKCS #8 in PEM, not encrypted, readable by its owner alone.

    Returns:
        The public key as operators write it into their policies, 64 hexadecimal digits.

    Raises:
        ConfigError: The file exists, or cannot be made. A key is never replaced.
    """
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(
            [f"the key {path} exists already and is never replaced; give another place"]
        ) from error
    except OSError as error:
        raise ConfigError([f"the key {path} cannot be made: {error.strerror or error}"]) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return public_key(key)


def read_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key of a coordinator.

    Raises:
        ConfigError: There is none, others may read it, or it is no Ed25519 key.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MOST_CHARACTERS)
    except OSError as error:
        raise ConfigError([f"the key {path} cannot be read: {error.strerror or error}"]) from error
    if mode & 0o077:
        raise ConfigError(
            [f"the key {path} may be read or written by others; chmod 600 it, or make a new one"]
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError([f"the key {path} is no private key in PEM: {error}"]) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError([f"the key {path} is no Ed25519 key; give the key of a coordinator"])
    return key


def public_key(key: Ed25519PrivateKey) -> str:
    """Return the public key that belongs to ``key``, 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def check_public_key(name: str, text: str) -> str:
    """Return ``text`` if it is a public key of a coordinator; ValueError otherwise."""
    if not _KEY.fullmatch(text):
        raise ValueError(f"{name} = {text!r} must be 64 hexadecimal digits, in small letters")
    return text


def sign(order: RunOrder, key: Ed25519PrivateKey) -> str:
    """Return ``order`` signed, as the text that travels.

    Raises:
        ValueError: The text has more than `MOST_CHARACTERS`.

    Example:
        >>> key = Ed25519PrivateKey.generate()
        >>> order = RunOrder(run="tiny-1a2b", config="{}", issued=1000, expires=2000)
        >>> verify(sign(order, key), [public_key(key)], now=1500) == order
        True
    """
    signature = key.sign(order._signed()).hex()
    text = strict_json.encode(SignedOrder(order, public_key(key), signature))
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the order has {len(text)} characters, it must be ≤ {MOST_CHARACTERS}")
    return text


def announced(text: str) -> RunOrder:
    """Return the order in ``text`` without a look at its signature: for whoever signed it.

    Raises:
        ConfigError: There is none.
    """
    try:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it has more than {MOST_CHARACTERS} characters")
        return strict_json.decode(SignedOrder, text).order
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"there is no signed order: {error}; use `fedlr submit`"]) from error


def verify(text: str, trusted: Collection[str], now: float | None = None) -> RunOrder:
    """Return the order in ``text`` if one of the trusted coordinators signed it and it is good now.

    Args:
        text: What `sign` returned, from an untrusted place.
        trusted: Public keys of the coordinators that an operator trusts.
        now: Seconds since 1970; None asks the clock.

    Raises:
        OrderRefused: ``unsigned``: no order, not signed, altered, or signed by somebody else.
            ``expired``: outside of its time; the message, for the operator alone, tells both.

    Guarantees:
        Nothing in ``text`` is believed before its signature fits, and its length is looked at
        before it is parsed.
    """
    if len(text) > MOST_CHARACTERS:
        raise OrderRefused("unsigned", f"the order has more than {MOST_CHARACTERS} characters")
    try:
        signed = strict_json.decode(SignedOrder, text)
    except (ValueError, RecursionError) as error:
        raise OrderRefused("unsigned", f"there is no signed order: {error}") from error
    _check_signature(signed, trusted)
    order, at = signed.order, time.time() if now is None else now
    if order.issued > at + CLOCKS_APART_S or order.expires <= at:
        raise OrderRefused(
            "expired",
            f"the order of {order.run} holds from {_shown(order.issued)} to "
            f"{_shown(order.expires)}, and here it is {_shown(at)}; set the clock, or submit anew",
        )
    return order


def _check_signature(signed: SignedOrder, trusted: Collection[str]) -> None:
    """Raise OrderRefused unless a trusted key signed."""
    if signed.coordinator not in trusted:
        raise OrderRefused(
            "unsigned",
            f"the order of {signed.order.run} is signed by {signed.coordinator!r}, which is not "
            "among allow.coordinators of the policy",
        )
    try:
        if not _SIGNATURE.fullmatch(signed.signature):
            raise ValueError("it is not 128 hexadecimal digits")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.coordinator))
        key.verify(bytes.fromhex(signed.signature), signed.order._signed())
    except (InvalidSignature, ValueError) as error:
        raise OrderRefused(
            "unsigned",
            f"the signature under the order of {signed.order.run} does not fit: altered on its "
            f"way, or never signed by {signed.coordinator} ({error or 'it fits another text'})",
        ) from error


def _shown(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
