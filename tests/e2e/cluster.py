"""A cluster of real processes on this machine: `with Cluster(tmp_path) as cluster: ...`.

Each process is started as a user would start it, on ports that were free, and dies with the test
run however that ends. Tests wait for conditions, each with a deadline, never for a time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.e2e import client

PATIENCE_S = 30.0
"""For what takes no time on an idle machine. Tests of bounds that we promise name their own."""

_POLL_S = 0.01
_WORDS_OF_A_CRASH = ('"level": "error"', '"level": "critical"', "Traceback")


class Process:
    """One started `baton` command; its stderr is in a file."""

    def __init__(
        self, name: str, command: list[str], directory: Path, module: str = "cluster.cli"
    ) -> None:
        self.name = name
        self.command = command
        self.output = directory / f"{name}.out"
        self.errors = directory / f"{name}.err"
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )
        self.pid = self._popen.pid
        self.children: list[int] = []  # of a launcher, once they are known

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def stdout(self) -> str:
        return self.output.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.errors.read_text(encoding="utf-8")

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        return self._popen.wait(seconds)

    def kill(self) -> None:
        """SIGKILL works on stopped processes too. Idempotent."""
        if self.running:
            self._popen.kill()
        self._popen.wait()


class Cluster:
    """One gateway and any number of workers of one model, built-in if no directory is given."""

    def __init__(self, directory: Path, model: Path | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._model = [] if model is None else ["--model", str(model)]
        self.model = "baton-tiny" if model is None else model.name
        self.processes: dict[str, Process] = {}
        self.http_port, self.grpc_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc = f"127.0.0.1:{self.grpc_port}"
        self.join = self.grpc  # where workers are told to join
        self.headers: dict[str, str] = {}  # of our own calls, where the gateway asks for a key

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Fails if any process logged an error of its own: what no client saw counts too."""
        for process in self.processes.values():
            process.kill()
        if error is None:
            assert not self.crashes(), self.crashes()

    def crashes(self) -> str:
        return "\n".join(
            f"{process.name}: {line}"
            for process in self.processes.values()
            for line in process.stderr.splitlines()
            if any(word in line for word in _WORDS_OF_A_CRASH)
        )

    def gateway(self, *flags: str) -> Process:
        ports = ["--port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        return self._start("gateway", ["gateway", *ports, *flags])

    def worker(self, role: str, *flags: str, name: str = "") -> Process:
        name = name or f"{role}-{sum(p.startswith(role) for p in self.processes)}"
        where = ["--role", role, "--name", name, "--join", self.join]
        return self._start(name, ["worker", *where, "--threads", "1", *flags])

    def _start(self, name: str, command: list[str]) -> Process:
        mortal = ["--die-with", str(os.getpid()), "--log-level", "warning"]
        command = [command[0], *mortal, *command[1:], *self._model]
        process = Process(name, command, self._directory)
        self.processes[name] = process
        return process

    def command(self, *words: str) -> Process:
        """Any other `baton` command."""
        name = f"command-{len(self.processes)}"
        self.processes[name] = Process(name, list(words), self._directory)
        return self.processes[name]

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    def status(self) -> dict[str, Any]:
        """What `baton status --json` shows; {} while nobody answers."""
        try:
            return dict(client.request(self.url, "GET", "/status", headers=self.headers).body)
        except OSError:
            return {}

    def worker_status(self, name: str) -> dict[str, Any]:
        """{} if the cluster has no such worker."""
        workers = self.status().get("workers", [])
        return next((worker for worker in workers if worker["name"] == name), {})

    def until(
        self, wanted: Callable[[dict[str, Any]], object], what: str, seconds: float = PATIENCE_S
    ) -> dict[str, Any]:
        """The first status that is `wanted`."""
        status: dict[str, Any] = {}

        def seen() -> bool:
            nonlocal status
            status = self.status()
            return bool(status and wanted(status))

        try:
            wait_until(seen, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._account(status)}") from None
        return status

    def until_joined(self, *names: str) -> dict[str, Any]:
        """Waits until these workers, or all that were started and live, are members."""
        expected = set(names) or {
            process.name
            for process in self.processes.values()
            if process.command[0] == "worker" and process.running
        }
        return self.until(
            lambda status: expected <= {worker["name"] for worker in status["workers"]},
            f"{sorted(expected)} joined",
        )

    def until_idle(self, seconds: float) -> dict[str, Any]:
        """Waits until no worker holds anything of a request: every block is free or cached (R1).

        Only what a worker has reported since this was called counts.
        """
        before = {worker["name"]: worker["progress"] for worker in self.status()["workers"]}
        return self.until(
            lambda status: all(
                at_rest(worker) and worker["progress"] != before.get(worker["name"])
                for worker in status["workers"]
            ),
            "every block given back",
            seconds,
        )

    def _account(self, status: dict[str, Any]) -> str:
        """What to look at when a wait was in vain."""
        told = [json.dumps(status)]
        for process in self.processes.values():
            state = "running" if process.running else f"ended with {process.wait()}"
            told.append(f"{process.name} {state}: {process.stderr[-2000:]}")
        return "\n".join(told)


@contextmanager
def serving(
    directory: Path,
    model: Path | None = None,
    *,
    prefill: tuple[str, ...] = (),
    decode: tuple[str, ...] = (),
    both: int = 0,
    gateway: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
) -> Iterator[Cluster]:
    """A gateway with one prefill and one decode worker, or with `both` undivided ones, ready.

    `flags` go to every worker, `prefill`, `decode` and `gateway` to that process.
    """
    with Cluster(directory, model) as cluster:
        cluster.gateway(*gateway)
        if both:
            for _ in range(both):
                cluster.worker("both", *flags)
        else:
            cluster.worker("prefill", *flags, *prefill)
            cluster.worker("decode", *flags, *decode)
        cluster.until_joined()
        yield cluster


def at_rest(worker: dict[str, Any]) -> bool:
    """Nothing runs, waits or is held. The ledger must add up at all times."""
    states = [worker[f"{state}_blocks"] for state in ("free", "cached", "promised", "owned")]
    assert sum(states) == worker["blocks"], f"the ledger does not add up: {worker}"
    busy = ("requests", "running", "waiting", "queued_tokens", "promised_blocks", "owned_blocks")
    return not any(worker[what] for what in busy)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    """Raises AssertionError naming `what` did not come about in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(_POLL_S)


def free_ports(count: int) -> list[int]:
    """Below the range from which the kernel takes ports for outgoing connections, so that none of
    those can take one of ours between now and its use."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(11000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and port not in ports:
                ports.append(port)
    return ports


def alive(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    """Its direct children, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found
