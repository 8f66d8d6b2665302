"""systemd units of the programs that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def unit(
    description: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    user: str,
    paths: Mapping[str, Sequence[Path]],
    stop_s: int,
) -> str:
    """Return a unit that is started again whatever ends it, and sees a read-only system.

    Args:
        description: One line.
        command: Program and its words.
        environment: Its variables.
        user: Who it runs as.
        paths: Places by systemd's word for them, such as ``ReadWritePaths``.
        stop_s: Seconds it gets to stop.

    Example:
        >>> made = unit("a b", ["/bin/a", "x y"], {"K": "v"}, "u", {}, stop_s=5)
        >>> [line for line in made.splitlines() if line.startswith("ExecStart")]
        ['ExecStart=/bin/a "x y"']
    """
    variables = "\n".join(f"Environment={_quoted(f'{k}={v}')}" for k, v in environment.items())
    places = "\n".join(
        f"{name}={' '.join(_quoted(str(path)) for path in found)}" for name, found in paths.items()
    )
    return f"""\
[Unit]
Description={description}
Wants=network-online.target
After=network-online.target

[Service]
User={user}
UMask=0027
ExecStart={" ".join(map(_quoted, command))}
{variables}
Restart=always
RestartSec=10
RestartSteps=5
RestartMaxDelaySec=120
TimeoutStopSec={stop_s}
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
{places}

[Install]
WantedBy=multi-user.target
"""


def _quoted(word: str) -> str:
    """Return a word as systemd reads it: % and $ stand for themselves, blanks are kept."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if any(c.isspace() or c in "\"'\\;" for c in word) or not word else text
