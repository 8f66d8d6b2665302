"""Certificates that OpenSSL's own verification accepts, and keys that OpenSSH reads."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
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


def test_a_file_is_private_from_its_first_byte_and_never_replaced(tmp_path: Path) -> None:
    write_new(tmp_path / "key", b"secret", 0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="exists already"):
        write_new(tmp_path / "key", b"other")
    assert (tmp_path / "key").read_bytes() == b"secret"
    with pytest.raises(ConfigError, match="cannot be written"):
        write_new(tmp_path / "none" / "key", b"")
