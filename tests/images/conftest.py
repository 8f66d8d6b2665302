"""A store, both images, and a server with three sites on them.

IMAGES_BASE names a base image, or a tar of one's files (`debootstrap`); IMAGES_TORCH is the build
argument TORCH; IMAGES_BUILDAH holds further words of ``buildah bud``; IMAGES_STORE is a folder that
is kept, and used again.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.building import ROOT, Builder
from tests.images.engine import NEEDED, Engine, Image, read_compose

NEW_MOUNTS, NEW_NETWORK = 0x00020000, 0x40000000


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} missing; apt-get install buildah iproute2 nginx-light")
    if os.geteuid() != 0:
        pytest.skip("needs root, for namespaces and other users")
    kept = os.environ.get("IMAGES_STORE")
    store = Path(kept) if kept else tmp_path_factory.mktemp("store")
    default = re.search(r"^ARG BASE=(\S+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert default is not None
    more = shlex.split(os.environ.get("IMAGES_BUILDAH", ""))
    if torch := os.environ.get("IMAGES_TORCH"):
        more += ["--build-arg", f"TORCH={torch}"]
    made = Builder(store, os.environ.get("IMAGES_BASE") or default[1], more)
    yield made
    if not kept:
        made.remove()


@pytest.fixture(scope="session")
def images(builder: Builder) -> dict[str, Image]:
    found = {target: builder.build(target) for target in ("server", "client")}
    for target, size in builder.sizes.items():
        seconds = builder.seconds[target]
        print(f"image {target}: {size / 1e6:.0f} MB of files, built in {seconds:.0f} s")
    return found


@pytest.fixture(scope="session")
def engine(images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose mounts and networks are this process's own, and end with it."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS | NEW_NETWORK) != 0:
        pytest.skip(f"no namespaces of its own: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    compose = read_compose(ROOT / "docker" / "compose.yaml")
    names = {one["image"] for one in compose["services"].values()}
    own = {name: name.removeprefix("fedlr-").split(":")[0] for name in names if "fedlr" in name}
    by_name = {name: images[target] for name, target in own.items()}
    made = Engine(tmp_path_factory.mktemp("federation"), by_name, compose)
    yield made
    made.stop()
