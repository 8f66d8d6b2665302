"""Two users of one machine, ``fedlr`` and ``flower``, who exist for processes started here alone.

A private mount namespace gives each process an ``/etc/passwd`` and ``/etc/group`` that know them,
and lets it reach the interpreter where that lies in a folder that only root may enter. The
machine's own files and mounts stay as they are; nothing is left when the processes have ended.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

USERS = {"fedlr": 64_001, "flower": 64_002}
"""User and group of that name have the number; ``fedlr`` is in the group ``flower`` too."""

_NEEDS = ("unshare", "setpriv", "mount")


@dataclass(frozen=True)
class Users:
    """How to start a process as one of them.

    Attributes:
        folder: Of the files that stand in the place of the machine's.
    """

    folder: Path

    def around(self, user: str = "root") -> list[str]:
        """Words before a command that runs it as a user of `USERS`, or as root among them."""
        lines = ["set -e"]
        for name in ("passwd", "group"):
            lines.append(f"mount --bind {shlex.quote(str(self.folder / name))} /etc/{name}")
        for closed, needed in _closed().items():
            lines += self._opened(closed, needed)
        drop = f"setpriv --reuid={user} --regid={user} --init-groups --no-new-privs --"
        lines.append(f'exec {"" if user == "root" else drop} "$@"')
        return [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            "\n".join(lines),
            "sh",
        ]

    def _opened(self, closed: Path, needed: list[Path]) -> list[str]:
        """Put a folder that anybody may enter over a closed one, with what is needed of it."""
        lines = []
        for number, path in enumerate(needed):
            lines.append(f"mount --rbind {shlex.quote(str(path))} {self.folder}/kept-{number}")
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}")
        for number, path in enumerate(needed):
            quoted = shlex.quote(str(path))
            lines += [f"mkdir -p {quoted}", f"mount --rbind {self.folder}/kept-{number} {quoted}"]
        return lines


def missing() -> str:
    """Why there can be no such users here; empty where there can."""
    if os.geteuid() != 0:
        return "only root can start processes of other users"
    if absent := [name for name in _NEEDS if shutil.which(name) is None]:
        return f"{', '.join(absent)} of util-linux is not here"
    tried = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "x", "/mnt"],
        capture_output=True,
        check=False,
    )
    return "no mount namespace can be made here" if tried.returncode else ""


def make_users(folder: Path) -> Users:
    """Write what `Users` needs into a folder that everybody may enter."""
    for name in ("passwd", "group"):
        lines = Path(f"/etc/{name}").read_text().splitlines()
        lines = [line for line in lines if line.partition(":")[0] not in USERS]
        for user, number in USERS.items():
            members = "fedlr" if user == "flower" else ""
            home = f"{number}:{number}::/nonexistent:/bin/false"
            lines.append(f"{user}:x:{home if name == 'passwd' else f'{number}:{members}'}")
        (folder / name).write_text("\n".join(lines) + "\n")
        (folder / name).chmod(0o644)
    for number in range(max((len(needed) for needed in _closed().values()), default=0)):
        (folder / f"kept-{number}").mkdir()
    return Users(folder)


def _closed() -> dict[Path, list[Path]]:
    """Folders that other users may not enter, and what of them Python needs."""
    found: dict[Path, list[Path]] = {}
    for text in dict.fromkeys((sys.base_prefix, sys.prefix, str(ROOT), *sys.path)):
        path = Path(text or ROOT).resolve()
        if not path.exists():
            continue
        for above in reversed(path.parents):
            if not above.stat().st_mode & stat.S_IXOTH:
                found.setdefault(above, []).append(path)
                break
    # What lies in something that is kept is kept with it.
    return {
        above: [one for one in paths if not any(one.is_relative_to(p) for p in paths if p != one)]
        for above, paths in found.items()
    }
