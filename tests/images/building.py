"""Builds both images with ``buildah``, which needs no container engine and no daemon."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from fedlr import __version__
from tests.images.engine import Image

ROOT = Path(__file__).resolve().parents[2]

_BASE = "localhost/fedlr-base:imported"


@dataclass
class Builder:
    """A store of images.

    Attributes:
        store: Folder of the store.
        base: Name of a base image, or a file with a tar of its files.
        more: Further words of ``buildah bud``, such as ``--volume`` or ``--build-arg``.
        sizes: Bytes of the files of each image.
        seconds: What each build took.
    """

    store: Path
    base: str
    more: list[str]
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def build(self, target: str) -> Image:
        """Build a target of the Dockerfile, and give its files."""
        base = self._imported() if Path(self.base).is_file() else self.base
        begun, name = time.monotonic(), f"localhost/fedlr-{target}:{__version__}"
        words = ["bud", "--isolation", "chroot", "--format", "docker", "--layers"]
        words += ["--build-arg", f"BASE={base}", *self.more, "-f", "docker/Dockerfile"]
        self._call(*words, "--target", target, "-t", name, str(ROOT))
        self.seconds[target] = time.monotonic() - begun
        root = Path(self._ask("mount", self._ask("from", "--pull-never", name)))
        told = subprocess.run(
            ["du", "-sxB1", str(root)], capture_output=True, text=True, check=True
        )
        self.sizes[target] = int(told.stdout.split()[0])
        found = json.loads(self._ask("inspect", "--type", "image", name))
        return Image(root, found["Docker"]["config"])

    def remove(self) -> None:
        """Take the store away, with whatever is mounted in it."""
        self._call("umount", "--all")
        shutil.rmtree(self.store)

    @property
    def _words(self) -> list[str]:
        places = ("--root", str(self.store / "images"), "--runroot", str(self.store / "run"))
        return ["buildah", "--storage-driver", "vfs", *places]

    def _imported(self) -> str:
        if _BASE not in self._ask("images", "--format", "{{.Name}}:{{.Tag}}").split():
            made = self._ask("from", "scratch")
            self._call("add", "-q", made, self.base, "/")
            self._call("commit", "-q", "--rm", made, _BASE)
        return _BASE

    def _call(self, *words: str) -> None:
        status = subprocess.run([*self._words, *words], cwd=ROOT, check=False).returncode
        assert status == 0, f"buildah {shlex.join(words)}: {status}"

    def _ask(self, *words: str) -> str:
        done = subprocess.run(
            [*self._words, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True
        )
        return done.stdout.strip()
