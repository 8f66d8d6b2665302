"""What a container engine does with ``docker/compose.yaml``, where there is none.

Namespaces by ``unshare``, users and capabilities by ``setpriv``, roots by overlayfs: enough to see
that each service does its work with what the file grants it. Networks are one bridge; restarts,
resource limits and seccomp profiles are not there.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HOST = "fl.example.org"
NEEDED = ("buildah", "unshare", "nsenter", "setpriv", "ip", "chroot", "nginx")
"""Programs without which nothing here works."""

START_S = 30.0
"""Seconds that mounts may take."""

_DEVICES = ("null", "zero", "full", "random", "urandom")
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")

Service = Mapping[str, Any]


@dataclass(frozen=True)
class Image:
    """An image whose files lie in a folder.

    Attributes:
        root: Its files.
        config: What `buildah inspect` calls its Docker configuration.
    """

    root: Path
    config: Mapping[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return dict(one.split("=", 1) for one in self.config["Env"])


@dataclass
class Container:
    """A service that was started.

    Attributes:
        service: As in the file.
        image: What it runs.
        log: Gets its output.
        process: Ends when its first process does.
    """

    service: Service
    image: Image
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """The service's first program, once it is on its root."""
        end = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < end:
            for shell in _children(self.process.pid):
                for program in _children(shell):
                    if _on_a_root_of_its_own(program):
                        return program
            time.sleep(0.05)
        raise AssertionError(f"it has ended:\n{self.text[-2000:]}")

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def execute(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as ``docker compose exec`` does."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", "-i", "-u", "--root", "--wd"]
        command = [*enter, *confined(self.service), *variables(self.service, self.image), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)

    def healthy(self) -> bool:
        """Ask what the service's health check asks, once."""
        kind, *words = self.service["healthcheck"]["test"]
        assert kind == "CMD"
        try:
            return self.execute(*words).returncode == 0
        except AssertionError:
            return False

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # what it forked goes with it: --kill-child
            self.process.wait(30)


@dataclass
class Engine:
    """Starts services of a compose file.

    Attributes:
        folder: Holds folders and volumes of the services.
        images: By the name that services give.
        started: Containers by service.
    """

    folder: Path
    images: Mapping[str, Image]
    file: Mapping[str, Any] = field(default_factory=dict)
    started: dict[str, Container] = field(default_factory=dict)
    _count: int = 0
    _networks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n10.77.0.2 {HOST}\n")
        _call("ip", "link", "add", "bridge0", "type", "bridge")
        _call("ip", "link", "set", "bridge0", "up")

    def service(self, name: str) -> Service:
        found: Service = self.file["services"][name]
        return found

    def start(self, name: str, *words: str, image: Image | None = None) -> Container:
        """Start a service; ``words`` stand in the place of its command."""
        service = self.service(name)
        used = image or self.images[service["image"]]
        self._count += 1
        scratch = self.folder / f"scratch-{self._count}"
        for part in ("upper", "work", "root"):
            (scratch / part).mkdir(parents=True)
        command = [*service.get("entrypoint", []), *(words or service.get("command", []))]
        inside = [*confined(service), *variables(service, used), *command]
        script = "\n".join((*self._mounts(service, used, scratch), _last(scratch, inside)))
        log = self.folder / f"{name}-{self._count}.log"
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._network(name, service), *unshare, "bash", "-euc", script],
                stdout=output,
                stderr=output,
            )
        made = Container(service, used, log, process)
        self.started[name] = made
        return made

    def run(self, name: str, *words: str, seconds: float = 600) -> str:
        """Run a service to its end, as ``docker compose run --rm`` does; return its output."""
        made = self.start(name, *words)
        try:
            status = made.process.wait(seconds)
        finally:
            made.stop()
            del self.started[name]
        assert status == 0, f"{name} {shlex.join(words)}: {status}\n{made.text}"
        return made.text

    def stop(self) -> None:
        for made in reversed(self.started.values()):
            made.stop()
        for name in self._networks.values():
            _call("ip", "netns", "del", name)

    def _network(self, name: str, service: Service) -> list[str]:
        mode = service.get("network_mode", name)
        if mode == "none":
            return ["unshare", "--net"]
        owner = mode.removeprefix("service:")
        if owner not in self._networks:
            assert owner == name, f"{name} needs the network of {owner}, which is not started"
            self._networks[owner] = self._new_network(service)
        return ["nsenter", f"--net=/run/netns/{self._networks[owner]}"]

    def _new_network(self, service: Service) -> str:
        """Make a network on the bridge; the first one is the server's."""
        index = len(self._networks) + 2
        name, here = f"fedlr-{os.getpid()}-{index}", f"v{index}"
        _call("ip", "netns", "add", name)
        _call("ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", name)
        _call("ip", "link", "set", here, "master", "bridge0", "up")
        inside = ("ip", "-n", name)
        _call(*inside, "link", "set", "lo", "up")
        _call(*inside, "addr", "add", f"10.77.0.{index}/24", "dev", "eth0")
        _call(*inside, "link", "set", "eth0", "up")
        for key, value in service.get("sysctls", {}).items():
            place = Path("/proc/sys", *key.split("."))
            _call("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > {place}")
        return name

    def _mounts(self, service: Service, image: Image, scratch: Path) -> list[str]:
        """Return the commands that make a service's root."""
        root = scratch / "root"
        layers = f"lowerdir={image.root},upperdir={scratch}/upper,workdir={scratch}/work"
        lines = ["mount --make-rprivate /", f"mount -t overlay overlay -o {layers} {root}"]
        lines += [f"mount -t tmpfs tmpfs {root}/dev", f"mount -t proc proc {root}/proc"]
        for device in _DEVICES:
            lines.append(
                f"touch {root}/dev/{device}; mount --bind /dev/{device} {root}/dev/{device}"
            )
        lines.append(f"mkdir -m 1777 {root}/dev/shm")
        lines += _bind(self.folder / "hosts", root / "etc/hosts", "ro")
        for entry in service.get("tmpfs", []):
            target, _, options = entry.partition(":")
            place = root / target.strip("/")
            lines.append(f"mkdir -p {place}; mount -t tmpfs -o {options} tmpfs {place}")
        for source, target, mode in self._sources(service, image):
            lines += _bind(source, root / target.strip("/"), mode)
        if service.get("read_only"):
            lines.append(f"mount -o remount,ro {root}")
        return lines

    def _sources(self, service: Service, image: Image) -> list[tuple[Path, str, str]]:
        """Return what is mounted: place here, place there, ``ro`` or ``rw``."""
        found = []
        for entry in service.get("volumes", []):
            source, target, mode = (*entry.split(":"), "rw")[:3]
            if source.startswith("."):
                place = (self.folder / source).resolve()
                if not place.exists():
                    place.mkdir(parents=True)
            else:
                place = self._volume(source, image.root / target.strip("/"))
            found.append((place, target, mode))
        for secret in service.get("secrets", []):
            source = self.file["secrets"][secret["source"]]["file"]
            found.append(((self.folder / source).resolve(), secret["target"], "ro"))
        # What lies deeper is mounted later.
        return sorted(found, key=lambda one: len(Path(one[1]).parts))

    def _volume(self, name: str, original: Path) -> Path:
        """Return a volume; a new one takes owner and mode of what it is mounted over."""
        assert name in self.file["volumes"], name
        place = self.folder / "volumes" / name
        if not place.exists():
            place.mkdir(parents=True)
            status = original.stat()
            os.chown(place, status.st_uid, status.st_gid)
            place.chmod(status.st_mode & 0o7777)
        return place


def read_compose(path: Path) -> Any:
    """Return a compose file with the default of every variable in it."""
    return yaml.safe_load(_VARIABLE.sub(r"\2", path.read_text(encoding="utf-8")))


def confined(service: Service) -> list[str]:
    """Return the words that make a process the service's user, with what the file leaves it."""
    user, _, group = service["user"].partition(":")
    words = ["setpriv", f"--reuid={user}", f"--regid={group or user}"]
    groups = service.get("group_add", [])
    words.append(f"--groups={','.join(groups)}" if groups else "--clear-groups")
    if service.get("cap_drop") == ["ALL"]:
        words += ["--inh-caps=-all", "--bounding-set=-all"]
    if "no-new-privileges:true" in service.get("security_opt", []):
        words.append("--no-new-privs")
    return words


def variables(service: Service, image: Image) -> list[str]:
    """Return the words that set the variables of image and service, and no others."""
    values = {**image.environment, **service.get("environment", {})}
    return ["env", "-i", *(f"{name}={value}" for name, value in values.items())]


def wait_healthy(container: Container, seconds: float) -> float:
    """Wait until a health check passes; return the seconds that it took."""
    start = time.monotonic()
    while not container.healthy():
        assert container.process.poll() is None, container.text
        assert time.monotonic() - start < seconds, container.text
        time.sleep(1)
    return time.monotonic() - start


def _bind(source: Path, target: Path, mode: str) -> list[str]:
    make = f"mkdir -p {target}" if source.is_dir() else f"mkdir -p {target.parent}; touch {target}"
    lines = [f"{make}; mount --bind {source} {target}"]
    return [*lines, f"mount -o remount,bind,ro {target}"] if mode == "ro" else lines


def _last(scratch: Path, inside: Sequence[str]) -> str:
    """Return the end of a service's script: a shell that reaps, and the program on its root."""
    return f"chroot {scratch}/root {shlex.join(inside)} & wait $!"


def _children(pid: int) -> list[int]:
    told = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in told.read_text().split()] if told.exists() else []


def _on_a_root_of_its_own(pid: int) -> bool:
    """Whether a process has left this machine's root; until then the shell still mounts."""
    try:
        return Path(f"/proc/{pid}/root").stat().st_dev != Path("/").stat().st_dev
    except OSError:
        return False


def _call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
