"""The folder of a real site: policy, ledger, key of its node, units of agent and node."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlr.deploy.certificates import new_node_key, write_new
from fedlr.deploy.coordinator import OFFLINE, program, search_path
from fedlr.deploy.fresh import fresh_folder
from fedlr.deploy.units import unit
from fedlr.deploy.users import exists, missing, name_problems
from fedlr.errors import ConfigError

AGENT_STOP_S = 3600
"""Seconds that a job in training may take to end when the agent is told to stop: it is paid for."""


@dataclass(frozen=True)
class SiteFolder:
    """A site's folder.

    Attributes:
        folder: Absolute.
        kept_in: Folder of its ledger, absolute; None is one in ``folder``.
    """

    folder: Path
    kept_in: Path | None = None

    @property
    def policy(self) -> Path:
        """The operator's policy."""
        return self.folder / "site.toml"

    @property
    def ledger(self) -> Path:
        """The ledger of its data."""
        return (self.kept_in or self.folder / "ledger") / "site.sqlite"

    @property
    def socket(self) -> Path:
        """Where the agent listens."""
        return self.folder / "door" / "agent.sock"

    @property
    def node(self) -> Path:
        """What the node's user owns."""
        return self.folder / "node"

    @property
    def key(self) -> Path:
        """Private key of the node."""
        return self.node / "key"

    @property
    def public_key(self) -> Path:
        """What the server's operator gets."""
        return self.node / "key.pub"

    @property
    def authority(self) -> Path:
        """Certificate that the node trusts."""
        return self.node / "ca.crt"

    def agent_command(self) -> list[str]:
        """Return the agent's program and words."""
        return [program("fedlr"), "agent", str(self.policy)]

    def node_command(self, server: str, port: int) -> list[str]:
        """Return the node's program and words.

        Args:
            server: ``host:port`` of the reverse proxy.
            port: Of its own programs, on this machine.
        """
        return [
            *(program("flower-supernode"), "--superlink", server),
            *("--root-certificates", str(self.authority)),
            *("--auth-supernode-private-key", str(self.key)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--node-config", f'agent="{self.socket}"'),
        ]

    def node_environment(self) -> dict[str, str]:
        """Return the node's variables."""
        return {"FLWR_HOME": str(self.node / "flower"), **OFFLINE, "PATH": search_path()}


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What ``fedlr site init`` is told beside the policy.

    Attributes:
        server: ``host:port`` of the federation's server.
        authority: Certificate that the server's is signed by.
        disjoint: Why nothing was ever released from these data, for the new ledger.
        user: User of the agent.
        node_user: User of the node, another one.
        group: Group of the node's user, which may open the socket.
        node_port: Port of the node's own programs.
        ledger_folder: Where the ledger is to be, such as a volume of a container: there, and empty;
            None makes one in the site's folder.

    Raises:
        ConfigError: A name, place or port cannot be one; all problems at once.
    """

    server: str
    authority: Path
    disjoint: str
    user: str = "fedlr"
    node_user: str = "flower"
    group: str | None = "flower"
    node_port: int = 9094
    ledger_folder: Path | None = None

    def __post_init__(self) -> None:
        problems = []
        if not re.fullmatch(r"[^\s:/]+:\d{1,5}", self.server):
            problems.append(f"--server {self.server!r} must be host:port, e.g. fl.example.org:443")
        if not self.disjoint.strip():
            problems.append("--disjoint is empty; say why no ledger of these data exists yet")
        named = {"--user": self.user, "--node-user": self.node_user}
        problems += name_problems({**named, **({"--group": self.group} if self.group else {})})
        if self.user == self.node_user:
            problems.append(
                f"--user and --node-user are both {self.user!r}; what runs as the node's user must "
                "not be able to read the agent's files"
            )
        if not 1 <= self.node_port <= 65535:
            problems.append(f"--node-port {self.node_port} must be in [1, 65535]")
        if self.ledger_folder is not None and not _is_empty(self.ledger_folder):
            problems.append(
                f"--ledger-folder {self.ledger_folder} must be a folder that is there, may be read "
                "and is empty; a ledger that exists already goes on in the site that it is of"
            )
        if problems:
            raise ConfigError(problems)


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


def write_site(
    folder: Path,
    policy: Mapping[str, Any],
    settings: SiteSettings,
    make_ledger: Callable[[Path], object],
) -> SiteFolder:
    """Make the folder of a site, whole or not at all.

    Args:
        folder: Does not exist yet, or is empty.
        policy: Content of the policy: values, then sections of values.
        settings: The rest.
        make_ledger: Makes the ledger at the path that it is given, and lets go of it.

    Raises:
        ConfigError: The folder holds something, or cannot be made.
        FedlrError: As ``make_ledger``.
    """
    kept_in = settings.ledger_folder.absolute() if settings.ledger_folder else None
    made = SiteFolder(folder.expanduser().absolute(), kept_in)
    # The node's user passes through what is the agent's; whatever is in it is closed on its own.
    with fresh_folder(made.folder, mode=0o755) as folder_draft:
        draft, authority = SiteFolder(folder_draft), settings.authority.read_bytes()
        draft.node.mkdir(mode=0o700)
        if kept_in is None:
            draft.ledger.parent.mkdir(mode=0o700)
        (draft.node / "flower").mkdir()
        private, public = new_node_key()
        write_new(draft.key, private, 0o600)
        write_new(draft.public_key, public)
        write_new(draft.authority, authority)
        write_new(draft.policy, policy_text(policy).encode(), 0o600)
        for name, text in _units(made, settings).items():
            write_new(draft.folder / name, text.encode())
        make_ledger(draft.ledger if kept_in is None else made.ledger)
    return made


def hand_over(made: SiteFolder, settings: SiteSettings) -> list[str]:
    """Give the files to the users of agent and node, where this process may.

    Returns:
        The commands that do what is left, for somebody who may; none where nothing is: users
        that are not there yet, their group, and the files.
    """
    folder, node = shlex.quote(str(made.folder)), shlex.quote(str(made.node))
    users = (settings.node_user, settings.user)
    left = missing(users, settings.group)
    own = [made.folder, *([] if made.kept_in is None else [made.kept_in])]
    commands = [
        f"chown -R {settings.user}: {shlex.join(map(str, own))}",
        f"chown -R {settings.node_user}: {node}",
        f"chmod 711 {folder}",  # the node's user passes through, and reads nothing on the way
    ]
    if os.geteuid() != 0 or not all(map(exists, users)):
        return left + commands
    try:
        owners = [(place, settings.user) for place in own]
        for place, user in (*owners, (made.node, settings.node_user)):
            for path in (place, *place.rglob("*")):
                shutil.chown(path, user=user, group=-1)
        made.folder.chmod(0o711)
    except OSError:  # a file system that knows no owners, or a root without that right
        return left + commands
    return left


def policy_text(policy: Mapping[str, Any]) -> str:
    """Return a policy as TOML.

    Example:
        >>> print(policy_text({"client": "a", "budget": {"delta": 1e-06}}))
        client = "a"
        <BLANKLINE>
        [budget]
        delta = 1e-06
        <BLANKLINE>
    """
    top = {name: value for name, value in policy.items() if not isinstance(value, Mapping)}
    lines = [f"{name} = {_value(value)}" for name, value in top.items()]
    for name, section in policy.items():
        if isinstance(section, Mapping):
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_value(value)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """Return a text, number, flag or list of them; their JSON is TOML."""
    return json.dumps(value, ensure_ascii=False)


def _units(made: SiteFolder, settings: SiteSettings) -> dict[str, str]:
    return {
        "fedlr-agent.service": unit(
            description="Agent of a fedlr site",
            command=made.agent_command(),
            environment={name: OFFLINE[name] for name in OFFLINE if not name.startswith("FLWR")},
            user=settings.user,
            paths={"ReadWritePaths": (made.folder, *([made.kept_in] if made.kept_in else []))},
            stop_s=AGENT_STOP_S,
        ),
        "fedlr-supernode.service": unit(
            description="Flower node of a fedlr site",
            command=made.node_command(settings.server, settings.node_port),
            environment=made.node_environment(),
            user=settings.node_user,
            paths={"ReadWritePaths": (made.node,)},
            stop_s=60,
        ),
    }
