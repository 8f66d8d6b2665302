"""Certificates that OpenSSL's own verification accepts, and keys that OpenSSH reads."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedlr.deploy import certificates
from fedlr.deploy.certificates import (
    Authority,
    expiry_of,
    new_authority,
    new_node_key,
    new_server,
    private_bytes,
    read_authority,
    replace_kept,
    write_new,
)
from fedlr.errors import ConfigError


def write_authority(folder: Path, authority: Authority, name: str = "ca") -> Path:
    (folder / f"{name}.crt").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(private_bytes(authority.key))
    return folder / f"{name}.crt"


def connect(folder: Path, trusted: Path, host: str) -> str:
    """Speak TLS with a server that shows ``server.crt``; return the version that was agreed on."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=str(trusted))
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as made:
                made.recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as made:
            made.send(b"x")
            return str(made.version())
    finally:
        ours.close()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority = new_authority("test")
    write_authority(tmp_path, authority)
    certificate, key = new_server(authority, ["fl.example.org", "10.1.2.3"])
    (tmp_path / "server.crt").write_bytes(certificate)
    (tmp_path / "server.key").write_bytes(key)
    return tmp_path


@pytest.mark.parametrize("host", ["fl.example.org", "10.1.2.3", "localhost", "127.0.0.1"])
def test_who_trusts_the_authority_trusts_the_server(folder: Path, host: str) -> None:
    assert connect(folder, folder / "ca.crt", host) == "TLSv1.3"


def test_another_name_or_another_authority_is_not_trusted(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(folder, folder / "ca.crt", "other.example.org")
    stranger = write_authority(folder, new_authority("test"), "stranger")
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(folder, stranger, "fl.example.org")


def test_a_server_does_not_outlive_its_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "AUTHORITY_DAYS", 3)
    certificate, _ = new_server(new_authority("test"), ["a"])
    assert expiry_of(certificate) <= datetime.now(UTC) + timedelta(days=3)


def test_a_node_s_key_is_one_that_openssh_reads(tmp_path: Path) -> None:
    private, public = new_node_key()
    write_new(tmp_path / "key", private, 0o600)
    assert public.startswith(b"ecdsa-sha2-nistp384 ")
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(tmp_path / "key")], capture_output=True, check=True
    )
    assert derived.stdout.split()[:2] == public.split()[:2]


def test_an_authority_is_read_back_and_a_wrong_one_is_refused(folder: Path) -> None:
    found = read_authority(folder / "ca.crt", folder / "ca.key")
    assert found.key.public_key() == found.certificate.public_key()
    with pytest.raises(ConfigError, match="does not belong to"):
        read_authority(folder / "ca.crt", folder / "server.key")
    with pytest.raises(ConfigError, match="no certificate and key"):
        read_authority(folder / "ca.key", folder / "ca.crt")
    with pytest.raises(ConfigError, match="nothing cannot be read"):
        read_authority(folder / "nothing", folder / "ca.key")


def authority(
    ca: bool | None = True, days: tuple[int, int] = (-1, 9), signs: bool = True, own: bytes = b""
) -> Authority:
    """An authority that somebody else made: fit, unless told otherwise."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "theirs")])
    begins, ends = (now + timedelta(days=count) for count in days)
    made = x509.CertificateBuilder(name, name, key.public_key(), 7, begins, ends)
    if ca is not None:
        made = made.add_extension(x509.BasicConstraints(ca, None), critical=True)
    if not signs:
        made = made.add_extension(certificates._usage(signs=False), critical=True)
    if own:
        made = made.add_extension(x509.SubjectKeyIdentifier(own), critical=False)
    return Authority(made.sign(key, hashes.SHA256()), key)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (authority(ca=False), "CA:TRUE"),
        (authority(ca=None), "CA:TRUE"),
        (authority(signs=False), "keyCertSign"),
        (authority(days=(-9, -1)), "is good from"),
        (authority(days=(1, 9)), "is good from"),
    ],
    ids=["leaf", "silent", "usage", "ended", "not yet"],
)
def test_an_authority_that_no_site_would_trust_is_refused(
    tmp_path: Path, given: Authority, told: str
) -> None:
    write_authority(tmp_path, given)
    with pytest.raises(ConfigError, match=told):
        read_authority(tmp_path / "ca.crt", tmp_path / "ca.key")


@pytest.mark.parametrize("own", [b"an identifier of its own", b""])
def test_a_server_names_its_authority_s_key_as_that_does(tmp_path: Path, own: bytes) -> None:
    given = authority(own=own)
    trusted = write_authority(tmp_path, given)
    certificate, key = new_server(read_authority(trusted, tmp_path / "ca.key"), ["a"])
    (tmp_path / "server.crt").write_bytes(certificate)
    (tmp_path / "server.key").write_bytes(key)
    found = x509.load_pem_x509_certificate(certificate).extensions
    named = found.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    made = x509.SubjectKeyIdentifier.from_public_key(given.key.public_key())
    assert named == (own or made.digest)
    assert connect(tmp_path, trusted, "a") == "TLSv1.3"


def test_a_file_that_is_replaced_keeps_owner_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_new(path, b"old", 0o640)
    if os.geteuid() == 0:
        os.chown(path, 4321, 4322)
    before = path.stat()
    replace_kept({path: (b"new", 0o600), tmp_path / "other": (b"made", 0o644)})
    after = path.stat()
    assert (path.read_bytes(), (tmp_path / "other").read_bytes()) == (b"new", b"made")
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        *(before.st_uid, before.st_gid, before.st_mode),
    )
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o644
    with pytest.raises(ConfigError, match="none"):
        replace_kept({path: (b"newer", 0o600), tmp_path / "none" / "x": (b"", 0o600)})
    assert path.read_bytes() == b"new"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["key", "other"]


def test_a_file_is_private_from_its_first_byte_and_never_replaced(tmp_path: Path) -> None:
    write_new(tmp_path / "key", b"secret", 0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="exists already"):
        write_new(tmp_path / "key", b"other")
    assert (tmp_path / "key").read_bytes() == b"secret"
    with pytest.raises(ConfigError, match="cannot be written"):
        write_new(tmp_path / "none" / "key", b"")
