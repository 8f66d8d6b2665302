"""The folder of a coordinator: keys, certificates, settings of the server's programs.

``fedlr server init`` writes it once. Flower's control interface knows no users: whoever reaches
it runs code on every node. So the SuperLink listens on this machine alone, and the reverse
proxy lets the nodes' own paths through and nothing else.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from fedlr.deploy.certificates import (
    new_authority,
    new_server,
    private_bytes,
    read_authority,
    replace_kept,
    write_new,
)
from fedlr.deploy.fresh import fresh_folder
from fedlr.deploy.units import unit
from fedlr.deploy.users import name_problems
from fedlr.errors import ConfigError
from fedlr.signing import new_key
from fedlr.told import KEPT

CONNECTION = "fedlr"
"""Name of the connection in Flower's own settings."""

PORT = 8000
"""Port of the SuperLink on this machine."""

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Variables that keep every program of a federation from calling anyone but its server."""

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Coordinator:
    """A coordinator's folder.

    Attributes:
        folder: Absolute.
    """

    folder: Path

    @property
    def key(self) -> Path:
        """Private key that signs orders."""
        return self.folder / "coordinator.key"

    @property
    def authority(self) -> Path:
        """Certificate that sites trust."""
        return self.folder / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """Its private key; missing where the authority is somebody else's."""
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.crt"

    @property
    def certificate_key(self) -> Path:
        """Its private key."""
        return self.folder / "server.key"

    @property
    def home(self) -> Path:
        """Where Flower's programs keep their settings."""
        return self.folder / "flower"

    @property
    def secret(self) -> Path:
        """What SuperLink and SuperExec share."""
        return self.folder / "superexec.secret"

    @property
    def database(self) -> Path:
        """State of the SuperLink, which survives its restart."""
        return self.folder / "superlink" / "state.db"

    @property
    def runs(self) -> Path:
        """Where run folders are made."""
        return self.folder / "runs"

    @property
    def sites(self) -> Path:
        """Public keys of the registered sites, by name."""
        return self.folder / "sites"

    @property
    def submitted(self) -> Path:
        """Which of Flower's runs is which of ours."""
        return self.folder / "submitted"

    @property
    def configs(self) -> Path:
        """Whole configurations of the submitted runs, of which sites are told less."""
        return self.submitted / "configs"

    def environment(self) -> dict[str, str]:
        """Return the variables that the server's programs need, beside those they are given."""
        own = {"FLWR_HOME": str(self.home), KEPT: str(self.configs)}
        return {**own, **OFFLINE, "PATH": search_path()}

    def commands(self, port: int) -> dict[str, list[str]]:
        """Return the server's two programs, by name.

        The ServerApp runs in a process of its own, so that a run survives a restart of the
        SuperLink, whose state is in the database.
        """
        superlink = [
            *(program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)),
            *("--ssl-ca-certfile", str(self.authority)),
            *("--ssl-certfile", str(self.certificate)),
            *("--ssl-keyfile", str(self.certificate_key)),
            "--enable-supernode-auth",
            *("--isolation", "process", "--superexec-auth-secret-file", str(self.secret)),
            *("--database", str(self.database)),
            "--disable-runtime-dependency-installation",
        ]
        superexec = [
            *(program("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{port}"),
            *("--root-certificates", str(self.authority)),
            *("--superexec-auth-secret-file", str(self.secret)),
        ]
        return {"fedlr-superlink": superlink, "fedlr-superexec": superexec}


@dataclass(frozen=True)
class ServerSettings:
    """What ``fedlr server init`` is told.

    Attributes:
        hosts: Names and addresses under which sites reach the server, one or more.
        public_port: Port of the reverse proxy.
        port: Port of the SuperLink on this machine.
        user: User of the server's programs.
        authority: Certificate and key of an authority that exists; None makes one.

    Raises:
        ConfigError: A name or a port cannot be one; all problems at once.
    """

    hosts: tuple[str, ...]
    public_port: int = 443
    port: int = PORT
    user: str = "fedlr"
    authority: tuple[Path, Path] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"host {host!r} must be a name or an address, without port or path"
            for host in self.hosts
            if not _HOST.fullmatch(host) or len(host) > 253
        ]
        problems += [
            f"{name} = {value} must be in [1, 65535]"
            for name, value in (("public port", self.public_port), ("port", self.port))
            if not 1 <= value <= 65535
        ]
        if not self.hosts:
            problems.append("--host is missing; give the name under which sites reach the server")
        problems += name_problems({"--user": self.user})
        if problems:
            raise ConfigError(problems)


def write_coordinator(folder: Path, settings: ServerSettings) -> Coordinator:
    """Make the folder of a coordinator, whole or not at all.

    Args:
        folder: Does not exist yet, or is empty.
        settings: What it is for.

    Raises:
        ConfigError: It holds something, cannot be made, or the given authority is unfit.
    """
    made = Coordinator(folder.expanduser().absolute())
    authority = read_authority(*settings.authority) if settings.authority else None
    with fresh_folder(made.folder, mode=0o750) as folder_draft:
        draft = Coordinator(folder_draft)
        new_key(draft.key)
        found = authority or new_authority(f"fedlr at {settings.hosts[0]}")
        write_new(draft.authority, found.certificate.public_bytes(Encoding.PEM))
        if authority is None:
            write_new(draft.authority_key, private_bytes(found.key), 0o600)
        certificate, key = new_server(found, settings.hosts)
        write_new(draft.certificate, certificate)
        write_new(draft.certificate_key, key, 0o600)
        write_new(draft.secret, secrets.token_bytes(32), 0o600)
        for place in (
            draft.home,
            draft.database.parent,
            draft.runs,
            draft.sites,
            draft.submitted,
            draft.configs,
        ):
            place.mkdir(mode=0o750)
        for name, text in _texts(made, settings).items():
            write_new(draft.folder / name, text.encode())
    return made


def read_coordinator(folder: Path) -> Coordinator:
    """Return the coordinator of a folder; ConfigError where it is none."""
    found, shown = Coordinator(folder.expanduser().absolute()), shlex.quote(str(folder))
    if not (found.home / "config.toml").is_file():
        raise ConfigError(
            [
                f"{folder} is no coordinator's folder; `fedlr server init {shown} --host <name>` "
                "makes one"
            ]
        )
    return found


def renew_certificate(
    coordinator: Coordinator, hosts: Sequence[str], authority_key: Path | None = None
) -> None:
    """Replace the server's certificate and key; sites, who trust the authority, change nothing.

    Args:
        coordinator: Whose.
        hosts: As in `fedlr.deploy.certificates.new_server`.
        authority_key: Key of an authority that is not kept here; None takes ``ca.key``.

    Raises:
        ConfigError: The authority's key is not here, or the authority is unfit. Both files
            are then as they were.

    Guarantees:
        The files keep their owner, group and mode, whoever calls.
    """
    place = authority_key or coordinator.authority_key
    if not place.exists():
        raise ConfigError(
            [
                f"the authority's key {place} is not here; give it with --authority-key <file>, or "
                f"have its owner sign a new certificate, and put that and its key at "
                f"{coordinator.certificate} and {coordinator.certificate_key} by hand"
            ]
        )
    certificate, key = new_server(read_authority(coordinator.authority, place), hosts)
    # The key first: a proxy that reads them in between finds two that do not fit, and says so.
    replace_kept(
        {
            coordinator.certificate_key: (key, 0o600),
            coordinator.certificate: (certificate, 0o644),
        }
    )


def program(name: str) -> str:
    """Return the absolute path of a program of this installation."""
    return str(Path(sys.executable).parent / name)


def search_path() -> str:
    """Return a PATH in which Flower's programs, which start one another, are found."""
    return os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"))


def _texts(made: Coordinator, settings: ServerSettings) -> dict[str, str]:
    """Return the files that hold settings, by name."""
    texts = {
        "flower/config.toml": _connection(made, settings.port),
        "reverse-proxy.conf": _proxy(made, settings),
    }
    for name, words in made.commands(settings.port).items():
        texts[f"{name}.service"] = unit(
            description=f"{name} of the federation at {settings.hosts[0]}",
            command=words,
            environment=made.environment(),
            user=settings.user,
            paths={
                "ReadWritePaths": (made.folder,),
                # A ServerApp that a stranger submitted must not sign orders, nor change what the
                # coordinator signs when a run is resumed.
                "ReadOnlyPaths": (made.submitted,),
                "InaccessiblePaths": (
                    made.key,
                    *([] if settings.authority else [made.authority_key]),
                ),
            },
            stop_s=90,  # Flower's own programs wait for one another
        )
    return texts


def _connection(made: Coordinator, port: int) -> str:
    return f"""\
# Of Flower's command line, with FLWR_HOME={made.home}
[superlink]
default = "{CONNECTION}"

[superlink.{CONNECTION}]
address = "127.0.0.1:{port}"
root-certificates = "{made.authority}"
"""


def _proxy(made: Coordinator, settings: ServerSettings) -> str:
    names = " ".join(settings.hosts)
    return f"""\
# nginx: all that the world may reach of the SuperLink. Its control interface (/v1/control/) has
# no users: whoever reached it could run code on every node.
server {{
    listen {settings.public_port} ssl;
    server_name {names};
    ssl_certificate {made.certificate};
    ssl_certificate_key {made.certificate_key};
    ssl_protocols TLSv1.3;
    client_max_body_size 16m; # Flower sends arrays in pieces of 5 MiB

    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{settings.port};
        proxy_ssl_trusted_certificate {made.authority};
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_read_timeout 300s;
    }}
    location / {{
        return 404;
    }}
}}
"""
