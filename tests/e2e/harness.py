"""A whole federation of real processes, started from the units that fedlr writes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedlr.build import source_spec
from fedlr.cli.compose import compose
from fedlr.data.sources import load
from fedlr.planning import client_units, declared_size
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.ledger import SqliteLedger

FEDLR = str(Path(sys.executable).parent / "fedlr")
RESTART_S = 2.0
"""Seconds before a program that ended is started again; the units say ten and more."""

CORES = 2
"""Sites that are made at once."""

DELTA = 0.01
"""δ that every site declares."""


def wait_for(what: str, found: Callable[[], object], seconds: float = 120.0) -> None:
    """Look five times a second until ``found()`` is true."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def fedlr(*words: str, status: int | None = 0, seconds: float = 300) -> str:
    """Call the command line as an administrator would; return all that it prints."""
    done = subprocess.run(
        [FEDLR, *words], capture_output=True, text=True, timeout=seconds, check=False
    )
    told = done.stdout + done.stderr
    assert status is None or done.returncode == status, f"{words}: {done.returncode}\n{told}"
    assert "Traceback" not in told, told
    return told


@dataclass
class Program:
    """What a unit describes, and its supervisor, which starts it again as systemd would.

    Attributes:
        unit: The file.
        log: Gets its output.
        around: Words before the command, such as those of another network.
        extra: Further variables.
    """

    unit: Path
    log: Path
    around: Sequence[str] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _wanted: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._wanted.set()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()
        wait_for(f"start of {self.unit.stem}", lambda: self._process is not None)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self, restart: bool = True) -> None:
        """Kill it and all that it started, as a crash of the machine would."""
        if not restart:
            self._wanted.clear()
        os.killpg(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        self._wanted.clear()
        if self._process is not None and self._process.poll() is None:
            os.killpg(self.pid, signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
                self._process.wait(20)
        if self._thread is not None:
            self._thread.join(20)

    def _supervise(self) -> None:
        while self._wanted.is_set():
            command, variables = read_unit(self.unit)
            environment = {**clean_environment(), **variables, **self.extra}
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self.around, *command],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.starts += 1
            self._process.wait()
            time.sleep(RESTART_S)


def read_unit(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return command and variables of a unit; systemd's quoting is a shell's here."""
    command, variables = list[str](), dict[str, str]()
    for line in path.read_text().splitlines():
        key, _, value = line.partition("=")
        words = shlex.split(value.replace("%%", "%").replace("$$", "$"))
        if key == "ExecStart":
            command = words
        elif key == "Environment":
            name, _, text = words[0].partition("=")
            variables[name] = text
    return command, variables


def clean_environment() -> dict[str, str]:
    """What a unit's program finds: none of the variables of the tests."""
    kept = ("PATH", "HOME", "LANG", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "OMP_NUM_THREADS": "1"
    }


@dataclass
class Federation:
    """A server and its sites.

    Attributes:
        folder: Holds everything.
        words: Overrides of every run.
        port: Of the SuperLink.
        reached: Addresses of the server, by site that reaches it under another than 127.0.0.1.
        around: Words before commands, by program.
    """

    folder: Path
    words: list[str]
    port: int = field(default_factory=free_port)
    reached: Mapping[int, str] = field(default_factory=dict)
    around: Mapping[str, Sequence[str]] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        return self.folder / "server"

    def site(self, index: int) -> Path:
        return self.folder / f"site-{index}"

    def submit(self, *words: str, status: int | None = 0, seconds: float = 600) -> str:
        return fedlr(
            "submit", str(self.server), *self.words, *words, status=status, seconds=seconds
        )

    def begin(self, *words: str) -> str:
        """Submit without following; return the run's name."""
        self.submit(*words, "--detach")
        return str(self.status()["runs"][-1]["run"])

    def submit_again(self, run: str) -> str:
        """Go on with a run without following it."""
        return fedlr("submit", str(self.server), "--resume", run, "--detach")

    def status(self) -> dict[str, list[dict[str, str]]]:
        told = fedlr("status", str(self.server), "--json")
        found: dict[str, list[dict[str, str]]] = json.loads(told[told.index("{") :])
        return found

    def ended(self, run: str, seconds: float = 300) -> str:
        """Wait for the end of a run and return its status."""
        states = [""]

        def over() -> bool:
            told = fedlr("status", str(self.server), "--json", status=None)
            if "{" not in told:  # a SuperLink that is being started again
                return False
            found = json.loads(told[told.index("{") :])["runs"]
            states.append(next(one["status"] for one in found if one["run"] == run))
            return states[-1].startswith("finished")

        wait_for(f"end of {run}", over, seconds)
        return states[-1]

    def run_folder(self, run: str) -> Path:
        return self.server / "runs" / run

    def rounds(self, run: str) -> int:
        path = self.run_folder(run) / "rounds.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def booked(self, index: int) -> int:
        """Rounds in a site's ledger, which `fedlr ledger verify` finds whole."""
        path = self.site(index) / "ledger" / "site.sqlite"
        ledger = SqliteLedger(path, f"client-{index:03d}")
        try:
            return ledger.joins()
        finally:
            ledger.close()

    def spent(self, index: int) -> float:
        """ε of everything in a site's ledger, by the accountant of `tests.cli.small`."""
        path = self.site(index) / "ledger" / "site.sqlite"
        ledger = SqliteLedger(path, f"client-{index:03d}")
        try:
            return epsilon(ledger.spent(), DELTA, "rdp")
        finally:
            ledger.close()

    def online(self) -> list[str]:
        return [one["site"] for one in self.status()["sites"] if one["status"] == "online"]

    def hand_over(self, index: int) -> None:
        """Do what is to be done with a site's folder before its programs start: nothing here."""

    def start(self, name: str, unit: Path, **options: object) -> Program:
        log, around = self.folder / f"{name}.log", self.around.get(name, ())
        program = Program(unit, log, around, **options)  # type: ignore[arg-type]
        program.start()
        self.programs[name] = program
        return program

    def stop(self) -> None:
        for program in reversed(self.programs.values()):
            program.stop()

    def logs(self) -> str:
        return "\n".join(f"== {name}\n{p.text[-3000:]}" for name, p in self.programs.items())


def write_rows(folder: Path, words: Sequence[str], clients: int) -> tuple[str, ...]:
    """Put the rows of a simulation's clients into ``rows-<i>.jsonl``; return the label list."""
    rows_of = [word for word in words if not word.startswith("federation.")]
    sizes = (f"federation.clients={clients}", f"federation.clients_per_round={clients}")
    config = compose([*rows_of, *sizes])
    data = load(source_spec(config))
    for index, units in enumerate(client_units(config, data)):
        lines = [
            json.dumps({"text": data.train.texts[row], "label": int(data.train.labels[row])})
            for row in units.rows.tolist()
        ]
        (folder / f"rows-{index}.jsonl").write_text("\n".join(lines) + "\n")
    return data.label_names


def bring_up(made: Federation, clients: int, model: str) -> None:
    """Do what ``docker/README.md`` tells the administrators to do, and wait until all is up."""
    folder, words = made.folder, made.words
    checked = [word for word in words if word.startswith(("model", "adapter"))]
    labels = write_rows(folder, words, clients)
    port, hosts = str(made.port), {"127.0.0.1", *made.reached.values()}
    named = [word for host in hosts for word in ("--host", host)]
    fedlr("server", "init", str(made.server), *named, "--port", port)
    told = fedlr("server", "show", str(made.server), "--json")
    key = json.loads(told)["coordinator"]
    made.start("superlink", made.server / "fedlr-superlink.service")
    named = [word for label in labels for word in ("--label", label)]

    def init(index: int) -> None:
        # As a simulation declares it, also where few rows could not be rounded.
        size = declared_size(len((folder / f"rows-{index}.jsonl").read_text().splitlines()))
        fedlr(
            *("site", "init", str(made.site(index)), *checked, "--client", f"client-{index:03d}"),
            *("--data", str(folder / f"rows-{index}.jsonl"), *named, "--public"),
            *("--server", f"{made.reached.get(index, '127.0.0.1')}:{port}"),
            *("--authority", str(made.server / "ca.crt")),
            *("--coordinator", key, "--epsilon-total", "100", "--disjoint", "made for a test"),
            *("--model", model, "--device", "cpu", "--group", "", "--delta", str(DELTA)),
            *("--node-port", str(free_port()), "--declared-size", str(size)),
        )

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(init, range(clients)))
    wait_for("the SuperLink", lambda: "Uvicorn running" in made.programs["superlink"].text)
    made.start("superexec", made.server / "fedlr-superexec.service")
    for index in range(clients):
        public = made.site(index) / "node" / "key.pub"
        name = f"site-{index}"
        fedlr("server", "register", str(made.server), str(public), "--name", name)
        made.hand_over(index)
        made.start(f"agent-{index}", made.site(index) / "fedlr-agent.service")
        made.start(f"node-{index}", made.site(index) / "fedlr-supernode.service")
    for index in range(clients):
        agent = made.programs[f"agent-{index}"]
        wait_for(f"agent {index}", lambda agent=agent: "serving at" in agent.text, 300)  # type: ignore[misc]
    wait_for("all nodes", lambda: len(made.online()) == clients, 60 + 30 * clients)


@contextmanager
def brought_up(made: Federation, clients: int, model: str) -> Iterator[Federation]:
    """`bring_up`, and an end in any case; what the programs said is shown where a test fails."""
    try:
        bring_up(made, clients, model)
        yield made
    except BaseException:
        print(made.logs())
        raise
    finally:
        made.stop()


@contextmanager
def federation(
    folder: Path, words: list[str], clients: int = 3, model: str = "embedded"
) -> Iterator[Federation]:
    """A federation in ``folder``, `brought_up`."""
    with brought_up(Federation(folder, words), clients, model) as made:
        yield made
