"""systemd units of the programs that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlr.errors import ConfigError


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

    Raises:
        ConfigError: A word holds a control character, such as the end of a line.

    Example:
        >>> made = unit("a b", ["/bin/a", "x y"], {"K": "v"}, "u", {}, stop_s=5)
        >>> [line for line in made.splitlines() if line.startswith("ExecStart")]
        ['ExecStart=/bin/a "x y"']
    """
    words = [*command, *environment.values(), *(str(p) for ps in paths.values() for p in ps)]
    _check_printable((description, *words))
    variables = "\n".join(f"Environment={_quoted(f'{k}={v}')}" for k, v in environment.items())
    places = "\n".join(
        f"{name}={' '.join(_quoted(str(path)) for path in found)}" for name, found in paths.items()
    )
    return f"""\
[Unit]
Description={description.replace("%", "%%")}
Wants=network-online.target
After=network-online.target

[Service]
User={user}
UMask=0027
ExecStart={" ".join((_quoted(command[0]), *map(_argument, command[1:])))}
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


def _check_printable(words: Sequence[str]) -> None:
    """Raise ConfigError where a word would end its line and begin another setting."""
    problems = [
        f"{word!r} holds a control character, which a unit cannot; give another name or place"
        for word in words
        if any(ord(letter) < 32 for letter in word)
    ]
    if problems:
        raise ConfigError(problems)


def _argument(word: str) -> str:
    """Return a word of a command behind its program, where systemd puts variables in for $."""
    return _quoted(word.replace("$", "$$"))


def _quoted(word: str) -> str:
    """Return a word as systemd reads it everywhere: % and \\ stand for themselves, blanks stay.

    $ is left alone: in ``Environment=``, in paths and in a program's own path it is a letter.
    """
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if any(c.isspace() or c in "\"'\\;" for c in word) or not word else text
