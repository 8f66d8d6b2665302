"""``fedlr site init`` and ``check``: a real site, from its data to a key to hand over."""

from __future__ import annotations

import argparse
import shlex
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlr.cli.arguments import Parser
from fedlr.cli.compose import compose
from fedlr.config import RunConfig
from fedlr.deploy.site_folder import (
    SiteFolder,
    SiteSettings,
    hand_over,
    policy_text,
    write_site,
)
from fedlr.errors import ConfigError, FedlrError
from fedlr.report.live import say
from fedlr.signing import check_public_key

_ABOUT = """\
Make the folder of a real site: policy, ledger, key of its node, units. Then check data, model,
device and disk as `fedlr site check` does, and print the public key to hand over."""

_CHECK = """\
Check data, model, device, private step and disk of a site. Its agent must not be running: the
check loads the model a second time, beside a job that is paid for."""

_OVERRIDES = "of a run as it will be asked for, e.g. adapter=query_value; the default job without"

FEWEST_TO_ROUND = 100
"""Units below which two digits of their number would tell it."""

LEAST_FREE = 1_000_000_000
"""Bytes that must be free beside the ledger: every update that was paid for is kept there."""


def init(words: Sequence[str]) -> int:
    """Make a site; return 0.

    Args:
        words: What stands behind ``fedlr site init``.

    Raises:
        FedlrError: Something is missing or wrong; no folder is left then. A check that fails
            leaves it, handed over, to be mended and checked again.
    """
    given = _parser().parse(words)
    if given is None:
        return 0
    settings = SiteSettings(
        server=given.server,
        authority=given.authority,
        disjoint=given.disjoint,
        user=given.user,
        node_user=given.node_user,
        group=given.group or None,
        node_port=given.node_port,
        ledger_folder=given.ledger_folder,
    )
    asked, policy = compose(given.overrides), _policy(given, settings)
    _check_policy(policy, given.folder)
    source = policy["source_id"]
    made = write_site(
        given.folder, policy, settings, lambda path: _make_ledger(path, source, settings.disjoint)
    )
    say(f"made {made.folder}; its policy is {made.policy}")
    try:
        _check(made.policy, asked)
    except FedlrError:
        again = shlex.join(["fedlr", "site", "check", str(made.policy), *given.overrides])
        say("it cannot take part yet: what to mend is said last, and then")
        say(f"  sudo -u {settings.user} {again}")
        raise
    finally:
        _hand_over(made, policy["client"], settings)
    return 0


def _hand_over(made: SiteFolder, client: str, settings: SiteSettings) -> None:
    """Give the files to their users, and say what is left, and the node's public key."""
    left = hand_over(made, settings)
    if left:
        say("as root, so that nothing that a job contains can read the data:")
        print("\n".join(f"  {line}" for line in left))
    print(f"public key of {client}, for the server's operator ({made.public_key}):")
    print(made.public_key.read_text(encoding="utf-8").strip())


def check(words: Sequence[str]) -> int:
    """Check a site that exists; return 0."""
    parser = Parser("site check", _CHECK)
    parser.add_argument("policy", type=Path, help="the operator's file, e.g. site.toml")
    parser.add_argument("overrides", nargs="*", help=_OVERRIDES)
    given = parser.parse(words)
    if given is not None:
        _check(given.policy, compose(given.overrides))
    return 0


def _parser() -> Parser:
    parser = Parser("site init", _ABOUT)
    parser.add_argument("folder", type=Path, help="is made, or is empty")
    parser.add_argument("overrides", nargs="*", help=_OVERRIDES)
    needed = parser.add_argument_group("needed").add_argument
    needed("--client", required=True, help="public name of the site")
    needed("--data", required=True, type=Path, help="file or folder of rows, see data=file")
    needed("--label", required=True, action="append", help="a label; again for each, in order")
    needed("--server", required=True, help="host:port of the federation's server")
    needed("--authority", required=True, type=Path, help="ca.crt of the server's operator")
    needed("--coordinator", required=True, help="public key that may ask for runs")
    needed("--epsilon-total", required=True, type=float, help="most ε over all runs, ever")
    needed("--disjoint", required=True, help="why no ledger of these data exists yet")
    option = parser.add_argument
    option("--epsilon-per-run", type=float)
    option("--epsilon-per-month", type=float)
    option("--delta", type=float, help="largest δ; without it min(1e-5, 1/(10·N))")
    option("--unit", choices=("example", "user"), default="example")
    option(
        "--declared-size",
        type=int,
        help="N, public, rounded; without it two digits of the units, if there are ≥ 100",
    )
    option("--text-columns", default="text")
    option("--label-column", default="label")
    option("--user-column")
    option("--public", action="store_true", help="the data are public; runs without noise pass")
    option("--approve", action="store_true", help="every run waits for `fedlr site approve`")
    option("--model", default="embedded", help="hub name or folder of the base model")
    option("--device", choices=("auto", "cpu", "cuda"), default="auto")
    option("--user", default="fedlr", help="user of the agent")
    option("--node-user", default="flower", help="user of the node")
    option("--group", default="flower", help="group of the node's user; empty: the agent's own")
    option("--node-port", type=int, default=9094)
    option("--ledger-folder", type=Path, help="an empty folder, e.g. a volume; else in the site's")
    return parser


def _policy(given: argparse.Namespace, settings: SiteSettings) -> dict[str, Any]:
    """Return the content of the policy, with N and δ declared where nobody gave them."""
    _check_options(given)
    data = _data(given)
    size = _declared(given, data)
    delta = min(1e-5, 1 / (10 * size)) if given.delta is None else given.delta
    budget = {
        "delta": delta,
        "epsilon_total": given.epsilon_total,
        "epsilon_per_run": given.epsilon_per_run,
        "epsilon_per_month": given.epsilon_per_month,
    }
    agent = {"socket": "door/agent.sock", "group": settings.group}
    return {
        "client": given.client,
        "declared_size": size,
        "unit": given.unit,
        "labels": given.label,
        "source_id": given.client,
        "ledger": _ledger(settings),
        "budget": {name: value for name, value in budget.items() if value is not None},
        "allow": {
            "coordinators": [given.coordinator],
            "approve": given.approve,
            "dry": given.public,
        },
        "data": data,
        "model": {"name": _place(given.model)},
        "kernels": {"device": given.device},
        "agent": {name: value for name, value in agent.items() if value is not None},
    }


def _check_options(given: argparse.Namespace) -> None:
    """Raise ConfigError with every option that cannot be, by the name that the user gave."""
    problems = []
    try:
        check_public_key("--coordinator", given.coordinator)
    except ValueError as error:
        problems.append(str(error))
    if not given.data.expanduser().exists():
        problems.append(f"--data {given.data} does not exist")
    if given.unit == "user" and given.user_column is None:
        problems.append("--unit user needs --user-column, the column that tells users apart")
    if given.declared_size is not None and given.declared_size < 1:
        problems.append(
            f"--declared-size {given.declared_size} must be ≥ 1: the number of units that these "
            "data are said to have, rounded"
        )
    if given.delta is not None and not 0 < given.delta <= 0.5:
        problems.append(
            f"--delta {given.delta} must be in (0, 0.5]; leave it out for min(1e-5, 1/(10·N))"
        )
    if problems:
        raise ConfigError(problems)


def _data(given: argparse.Namespace) -> dict[str, Any]:
    """Return the section ``data`` of the policy."""
    data: dict[str, Any] = {
        "path": str(given.data.expanduser().absolute()),
        "text_columns": given.text_columns.split(","),
        "label_column": given.label_column,
        "public": given.public,
    }
    if given.user_column is not None:
        data["user_column"] = given.user_column
    return data


def _check_policy(policy: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError where no agent would take this policy, before anything is made."""
    from client.declaration import declaration_of

    path = SiteFolder(folder.expanduser().absolute()).policy
    try:
        declaration_of(policy, path)
        tomllib.loads(policy_text(policy))
    except ConfigError as error:
        start = f"policy {path}: "
        raise ConfigError(
            [f"the policy would say: {one.removeprefix(start)}" for one in error.problems]
        ) from error
    except ValueError as error:
        raise ConfigError(
            [f"a name or a label holds a letter that the policy, TOML, cannot hold: {error}"]
        ) from error


def _ledger(settings: SiteSettings) -> str:
    kept_in = settings.ledger_folder
    return str(kept_in.absolute() / "site.sqlite") if kept_in else "ledger/site.sqlite"


def _place(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else model


def _declared(given: argparse.Namespace, data: dict[str, Any]) -> int:
    """Return N as it is given, or two digits of the units that there are, where that is safe.

    The rows are read in any case: what cannot be read is found before anything is made.

    Raises:
        ConfigError: Nobody gave it, and two digits would be the number itself.
        DataError: The rows cannot be read.
    """
    from fedlr.build import source_spec
    from fedlr.config import from_mapping
    from fedlr.planning import count_units, declared_size

    config = from_mapping({"data": {"kind": "file", **data, "label_names": given.label}})
    count, unit = count_units(replace(source_spec(config), only="train"), given.unit), given.unit
    if given.declared_size is not None:
        return int(given.declared_size)
    if count < FEWEST_TO_ROUND:
        rounded = max(10, count // 10 * 10)
        raise ConfigError(
            [
                f"--declared-size is missing: N becomes public, and two digits of {count} {unit}s "
                f"would tell their number; round it, e.g. --declared-size {rounded}, down to tens. "
                "The promise holds for any N; a smaller one costs more noise"
            ]
        )
    size = declared_size(count)
    say(f"declared_size = {size}: two digits of the number of {unit}s, which becomes public")
    return size


def _make_ledger(path: Path, source: str, disjoint: str) -> None:
    from fedlr.privacy.ledger import SqliteLedger

    SqliteLedger(path, source, disjoint=disjoint).close()


def _check(policy: Path, asked: RunConfig) -> None:
    """Say what was found; FedlrError where the site could not take part."""
    from client.declaration import read_declaration
    from client.hold import held
    from client.resident import Resident

    declaration = read_declaration(policy)
    with held(declaration.ledger):
        resident = Resident(declaration, say)
        try:
            resident.load()
            device = resident.examine(asked)
        finally:
            resident.close()
    say(f"the private step holds on {device}")
    free = shutil.disk_usage(declaration.ledger.parent).free
    if free < LEAST_FREE:
        raise ConfigError(
            [
                f"{free // 10**6} MB are free beside the ledger {declaration.ledger}, it needs ≥ "
                f"{LEAST_FREE // 10**6}: every update that was paid for is kept there; make room"
            ]
        )
    say(f"{free // 10**9} GB are free beside the ledger")
