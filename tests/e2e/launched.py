"""`baton serve` whose workers fail when a test says so: `with launched(tmp_path) as house:`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.client import get
from tests.e2e.cluster import Process, alive, children_of, free_ports, wait_until

READY_S = 60.0
PATIENCE_S = 40.0
"""For a worker that has failed to be there again: it loads torch on a machine full of others."""


class House:
    """A launcher, its gateway and its workers."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self._directory = directory
        http, grpc = free_ports(2)
        self.url = f"http://127.0.0.1:{http}"
        ports = ["--port", str(http), "--grpc-port", str(grpc)]
        mortal = ["--die-with", str(os.getpid())]
        words = [str(directory), "serve", *ports, *mortal, *flags]
        self.launcher = Process("launcher", words, directory, "tests.e2e.failing_worker")

    def fail(self, name: str, fault: str) -> None:
        """At the next step of this worker."""
        (self._directory / f"{name}.{fault}").touch()

    def workers(self) -> dict[str, str]:
        """The members' incarnations by name."""
        return {w["name"]: w["incarnation"] for w in self.status()["workers"]}

    def status(self) -> dict[str, Any]:
        return dict(get(self.url, "/status").body)

    def until_replaced(self, name: str, incarnation: str) -> None:
        """Waits for another start of this worker to be a member."""
        wait_until(
            lambda: self.workers().get(name, incarnation) != incarnation,
            f"{name} is back: {self.launcher.stderr}",
            PATIENCE_S,
        )

    def recoveries(self) -> dict[str, int]:
        """How many there were, by cause."""
        found: dict[str, int] = {}
        for line in get(self.url, "/metrics").body.splitlines():
            if line.startswith("baton_recoveries_total{"):
                cause = line.split('cause="')[1].split('"')[0]
                found[cause] = found.get(cause, 0) + int(float(line.rpartition(" ")[2]))
        return found

    def pid(self, name: str) -> int:
        return child(self.launcher, name)


def child(launcher: Process, name: str) -> int:
    """The process id of a launcher's worker."""
    for pid in children_of(launcher.pid):
        if f"--name={name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"{name} does not run")


@contextmanager
def launched(directory: Path, *flags: str) -> Iterator[House]:
    """Ready, with all its workers; none of it lives on."""
    house = House(directory, *flags)
    launcher = house.launcher
    try:
        wait_until(lambda: "ready" in launcher.stdout or not launcher.running, "ready", READY_S)
        assert launcher.running, launcher.stderr
        yield house
    finally:
        for pid in children_of(launcher.pid) if launcher.running else []:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.kill()
