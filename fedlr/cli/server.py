"""``fedlr server``: what the operator of a federation's server does."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlr.cli.arguments import Parser
from fedlr.deploy.certificates import expiry_of, names_of, write_new
from fedlr.deploy.coordinator import (
    CONNECTION,
    Coordinator,
    ServerSettings,
    read_coordinator,
    renew_certificate,
    write_coordinator,
)
from fedlr.errors import ConfigError
from fedlr.report.live import say
from fedlr.report.units import printable
from fedlr.signing import public_key, read_key

_ABOUT = """\
Prepare and keep the server of a federation of real sites.

  init        make a new folder: keys, certificates, settings of the SuperLink, units and the
              reverse proxy's configuration
  show        print what sites need of it, and until when its certificate is good
  register    let a site's node in, by the public key that `fedlr site init` printed
  unregister  keep it out from now on
  renew       make the server's next certificate; sites change nothing. It needs the key of
              the authority: ca.key of the folder, or --authority-key"""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: An action, a coordinator's folder, options, or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    given = _parser().parse(words)
    if given is None:
        return 0
    _check_options(given)
    if given.action == "init":
        _init(given)
        return 0
    _ACTIONS[given.action](read_coordinator(given.folder), given)
    return 0


def _parser() -> Parser:
    parser = Parser("server", _ABOUT)
    parser.add_argument("action", choices=("init", *_ACTIONS))
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("public_key", nargs="?", type=Path, help="register: the site's key.pub")
    parser.add_argument("--name", help="register, unregister: the site's name")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        help="init, renew: name or address of the server; again for another one",
    )
    parser.add_argument("--public-port", type=int, default=443, help="init: of the reverse proxy")
    parser.add_argument("--port", type=int, default=8000, help="init: of the SuperLink")
    parser.add_argument("--user", default="fedlr", help="init: user of the server's programs")
    parser.add_argument("--authority", type=Path, help="init: certificate of your own authority")
    parser.add_argument(
        "--authority-key",
        type=Path,
        help="init: its private key; renew: where it is not in the folder",
    )
    parser.add_argument("--json", action="store_true", help="show: as one JSON object")
    return parser


def _check_options(given: argparse.Namespace) -> None:
    problems = []
    if given.authority is not None and given.action != "init":
        problems.append(
            f"--authority is an option of init, not of {given.action}: sites trust the one that "
            "they were given; leave it out"
        )
    if given.authority_key is not None and given.action not in ("init", "renew"):
        problems.append(
            f"--authority-key is an option of init and renew, not of {given.action}; leave it out"
        )
    if given.action == "init" and (given.authority is None) is not (given.authority_key is None):
        problems.append("--authority and --authority-key belong together; give both or none")
    if (given.public_key is not None) is not (given.action == "register"):
        problems.append("fedlr server register takes a site's public key, and nothing else does")
    if given.action in ("register", "unregister") and given.name is None:
        problems.append(f"fedlr server {given.action} needs --name, the site's name")
    if given.name is not None and not _NAME.fullmatch(given.name):
        problems.append(f"--name {given.name!r} must match {_NAME.pattern}")
    if problems:
        raise ConfigError(problems)


def _init(given: argparse.Namespace) -> None:
    authority = (given.authority, given.authority_key) if given.authority else None
    settings = ServerSettings(
        tuple(given.host), given.public_port, given.port, given.user, authority
    )
    made = write_coordinator(given.folder, settings)
    say(f"made {made.folder}; it holds the key that may ask sites for runs: keep a copy of it safe")
    say("next: docker/README.md, or the units and reverse-proxy.conf in it")
    _show(made, given)


def _show(made: Coordinator, given: argparse.Namespace) -> None:
    certificate = made.certificate.read_bytes()
    record = {
        "coordinator": public_key(read_key(made.key)),
        "authority": str(made.authority),
        "hosts": list(names_of(certificate)),
        "certificate_until": expiry_of(certificate).isoformat(),
    }
    if given.json:
        print(json.dumps(record))
        return
    print(f"coordinator   {record['coordinator']}   (for allow.coordinators of sites)")
    print(f"authority     {record['authority']}   (a copy for every site)")
    print(f"certificate   for {', '.join(names_of(certificate))}")
    print(f"              good until {expiry_of(certificate):%Y-%m-%d}")


def _register(made: Coordinator, given: argparse.Namespace) -> None:
    from fedlr.cli.flower import call, node_file

    try:
        key = given.public_key.read_bytes()
    except OSError as error:
        raise ConfigError(
            [f"the public key {given.public_key} cannot be read: {error.strerror or error}"]
        ) from error
    if b"PRIVATE" in key:
        raise ConfigError(
            [f"{given.public_key} is a private key, which must not leave its site; make a new one"]
        )
    path = node_file(made, given.name)
    if path.exists():
        raise ConfigError(
            [f"a site {given.name} is registered; unregister it first, or give another name"]
        )
    node = str(call(made, "supernode", "register", str(given.public_key), CONNECTION)["node-id"])
    write_new(path, f"{node}\n".encode())
    say(f"{given.name} may connect, as node {node}")


def _unregister(made: Coordinator, given: argparse.Namespace) -> None:
    from fedlr.cli.flower import call, node_file

    path = node_file(made, given.name)
    if not path.exists():
        known = ", ".join(sorted(one.stem for one in made.sites.glob("*.node"))) or "none"
        raise ConfigError([f"no site {printable(given.name)} is registered; known: {known}"])
    node = path.read_text(encoding="utf-8").strip()
    call(made, "supernode", "unregister", node, CONNECTION)
    path.unlink()
    say(f"{given.name} is kept out")


def _renew(made: Coordinator, given: argparse.Namespace) -> None:
    own = {"localhost", "127.0.0.1"}
    kept = [name for name in names_of(made.certificate.read_bytes()) if name not in own]
    renew_certificate(made, given.host or kept, given.authority_key)
    until = expiry_of(made.certificate.read_bytes())
    folder = shlex.quote(str(made.folder))
    say(f"a certificate until {until:%Y-%m-%d} is in {folder}; restart proxy and SuperLink")


_ACTIONS: dict[str, Callable[[Coordinator, argparse.Namespace], None]] = {
    "show": _show,
    "register": _register,
    "unregister": _unregister,
    "renew": _renew,
}
