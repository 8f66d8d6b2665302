"""Users and groups of this machine: what they may be called, and the commands that make them."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Mapping, Sequence

_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def name_problems(names: Mapping[str, str]) -> list[str]:
    """Return what is wrong with names of users or groups, one sentence each.

    Args:
        names: Name by the option that gave it.

    Example:
        >>> name_problems({"--user": "fedlr"})
        []
        >>> name_problems({"--user": "Fed LR"})
        ["--user 'Fed LR' must match [a-z_][a-z0-9_-]{0,31}, as the names of users do"]
    """
    return [
        f"{option} {name!r} must match {_NAME.pattern}, as the names of users do"
        for option, name in names.items()
        if not _NAME.fullmatch(name)
    ]


def exists(user: str) -> bool:
    """Return whether there is such a user here."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def missing(users: Sequence[str], group: str | None) -> list[str]:
    """Return the commands that make ``users``, and all of them members of ``group``.

    Args:
        users: Their names.
        group: None asks for no group.

    Returns:
        None where nothing is left to do. A user's own group comes with the user.
    """
    absent = [user for user in users if not exists(user)]
    commands = [f"useradd --system {user}" for user in absent]
    if group is None:
        return commands
    if not _group_exists(group) and group not in absent:
        commands.append(f"groupadd --system {group}")
    outside = [user for user in users if user != group or user not in absent]
    return commands + [f"usermod -aG {group} {one}" for one in outside if not _is_in(one, group)]


def _group_exists(group: str) -> bool:
    try:
        grp.getgrnam(group)
    except KeyError:
        return False
    return True


def _is_in(user: str, group: str) -> bool:
    """Return whether a user is a member of a group, by the group's list or as its own."""
    try:
        number = grp.getgrnam(group).gr_gid
        return number in os.getgrouplist(user, pwd.getpwnam(user).pw_gid)
    except KeyError:
        return False
