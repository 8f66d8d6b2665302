"""Certificates of a coordinator's server, and keys of nodes; by the package ``cryptography``.

A federation has a small closed circle of clients, so the default is a certificate authority of
its own: sites trust its certificate and nobody else's. Keys are P-384, as Flower's nodes want.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlr.errors import ConfigError

AUTHORITY_DAYS = 3650
"""Days for which an authority made here is good."""

SERVER_DAYS = 397
"""Days for which a server's certificate made here is good; `fedlr server renew` makes the next."""

_BEFORE = timedelta(minutes=15)
"""A certificate is good from a little before it was made: clocks differ."""


@dataclass(frozen=True)
class Authority:
    """A certificate authority with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_authority(name: str) -> Authority:
    """Make an authority that signs servers' certificates and nothing below them.

    Args:
        name: Its common name, as operators see it.
    """
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Authority(certificate, key)


def new_server(authority: Authority, hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """Make a server's certificate for ``hosts``.

    Args:
        authority: Signs it.
        hosts: Names and addresses of the server, one or more; ``localhost`` and ``127.0.0.1``
            are added, where the proxy and the command line reach it.

    Returns:
        Certificate and private key, PEM.

    Example:
        >>> certificate, _ = new_server(new_authority("test"), ["fl.example.org"])
        >>> names_of(certificate)
        ('fl.example.org', 'localhost', '127.0.0.1')
    """
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.now(UTC)
    names = [_general_name(host) for host in dict.fromkeys((*hosts, "localhost", "127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(
            min(now + timedelta(days=SERVER_DAYS), authority.certificate.not_valid_after_utc)
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_issuer(authority), critical=False)
        .sign(authority.key, hashes.SHA384())
    )
    return certificate.public_bytes(Encoding.PEM), private_bytes(key)


def names_of(certificate: bytes) -> tuple[str, ...]:
    """Return the names and addresses that a server's certificate is for."""
    found = x509.load_pem_x509_certificate(certificate).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in names)


def expiry_of(certificate: bytes) -> datetime:
    """Return when a certificate ends, UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def read_authority(certificate: Path, key: Path) -> Authority:
    """Return an authority that lies in two PEM files.

    Raises:
        ConfigError: A file cannot be read, holds something else, or the two do not belong
            together; or the certificate may sign no others, or is not good now. A server's
            certificate that it signed would be refused by every site.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(
            [f"the authority {error.filename} cannot be read: {error.strerror or error}"]
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            [f"the authority {certificate} with {key} is no certificate and key in PEM: {error}"]
        ) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError([f"the key {key} of the authority must be one of an elliptic curve"])
    problems = _unfit(certificate, found)
    if private.public_key() != found.public_key():
        problems.append(f"the key {key} does not belong to the certificate {certificate}")
    if problems:
        raise ConfigError(problems)
    return Authority(found, private)


def _unfit(path: Path, certificate: x509.Certificate) -> list[str]:
    """Return why no site would trust what this certificate signed; empty if they do."""
    problems, found, now = [], certificate.extensions, datetime.now(UTC)
    constraints = [one.value for one in found if isinstance(one.value, x509.BasicConstraints)]
    usages = [one.value for one in found if isinstance(one.value, x509.KeyUsage)]
    if not any(one.ca for one in constraints) or not all(one.key_cert_sign for one in usages):
        problems.append(
            f"the certificate {path} is not that of an authority: its basic constraints must say "
            "CA:TRUE, and its key usage, if it has one, keyCertSign; give the authority's own, "
            "not one that it signed"
        )
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begins <= now < ends:
        problems.append(
            f"the certificate {path} is good from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} "
            f"UTC, and now it is {now:%Y-%m-%d %H:%M}; give the authority's current one"
        )
    return problems


def new_node_key() -> tuple[bytes, bytes]:
    """Return the key of a node: private (OpenSSH) and public (one OpenSSH line)."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PKCS #8 in PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that does not exist yet, with ``mode`` from its first byte on.

    Raises:
        ConfigError: It exists, or cannot be made. A file is never replaced.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except FileExistsError as error:
        raise ConfigError([f"{path} exists already and is not replaced"]) from error
    except OSError as error:
        raise ConfigError([f"{path} cannot be written: {error.strerror or error}"]) from error


def replace_kept(contents: Mapping[Path, tuple[bytes, int]]) -> None:
    """Replace files in their order, each with the owner, group and mode of the old one.

    Args:
        contents: New content by file, and the mode of a file that is missing.

    Raises:
        ConfigError: One cannot be written, or not be given to its owner; no file is replaced
            then.
    """
    drafts = {path: path.with_name(f"{path.name}.new") for path in contents}
    try:
        for path, (content, mode) in contents.items():
            drafts[path].unlink(missing_ok=True)
            old = path.stat() if path.exists() else None
            write_new(drafts[path], content, 0o600)
            if old is not None:
                os.chown(drafts[path], old.st_uid, old.st_gid, follow_symlinks=False)
            drafts[path].chmod(mode if old is None else old.st_mode & 0o777)
        for path, draft in drafts.items():
            draft.replace(path)
    except OSError as error:
        raise ConfigError(
            [
                f"{error.filename}: {error.strerror or error}; use the user who owns "
                f"{', '.join(map(str, contents))}, or root"
            ]
        ) from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _issuer(authority: Authority) -> x509.AuthorityKeyIdentifier:
    """Return the identifier of an authority's key: its own, however that was computed."""
    own = x509.SubjectKeyIdentifier
    try:
        found = authority.certificate.extensions.get_extension_for_class(own).value
    except x509.ExtensionNotFound:
        found = own.from_public_key(authority.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
