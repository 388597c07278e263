"""What a process that is short of memory, of file descriptors or of disk still does: what it has
begun (FAULTS 3.3, rows 11, 25 and 26)."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.client import DONE, get, post, stream, tokens
from tests.e2e.cluster import Cluster, Process, free_ports, serving, wait_until
from tests.e2e.launched import PATIENCE_S, READY_S, child
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER

SHORT: dict[str, Any] = {**LONG_ANSWER, "max_tokens": 2}
MEMORY = Path("/sys/fs/cgroup/memory")  # v1
LIMIT = 1 << 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serving(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def refused(cluster: Cluster, short_of: str) -> bool:
    try:
        answer = post(cluster.url, COMPLETIONS, SHORT)
    except ConnectionError:
        return False  # taken for an idle one, by a look of a second ago
    if answer.status != 503:
        return False
    assert answer.body["error"]["code"] == "overloaded", answer.body
    assert short_of in answer.body["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    return True


def descriptors(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def connection(cluster: Cluster) -> socket.socket:
    return socket.create_connection(("127.0.0.1", cluster.http_port), timeout=10)


def test_short_of_descriptors_it_serves_whom_it_has(cluster: Cluster) -> None:
    """It hangs up on those who ask for nothing, and begins nothing new until some are free."""
    gateway = cluster["gateway"]
    before = descriptors(gateway)
    limit = before + 25
    was = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (limit, was[1]))
    with stream(cluster.url, COMPLETIONS, LONG_ANSWER) as events, ExitStack() as crowd:
        next(events)
        for _ in range(limit):  # more than there are
            crowd.enter_context(closing(connection(cluster)))
        wait_until(lambda: descriptors(gateway) <= before + 1, "the idle ones to be hung up on")
        next(events)
        for _ in range(descriptors(gateway), round(0.89 * limit)):
            crowd.enter_context(closing(connection(cluster)))
        wait_until(lambda: refused(cluster, "descriptors"), "refusal")
        assert get(cluster.url, "/ready").status == 503
        assert get(cluster.url, "/live").status == 200
        crowd.close()
        *_, end = events
        assert end == DONE
    wait_until(lambda: get(cluster.url, "/ready").status == 200, "ready again")
    assert post(cluster.url, COMPLETIONS, SHORT).status == 200
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, was)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup (v1) with a limit of LIMIT."""
    group = MEMORY / f"baton-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (v1) can be made here: {error.strerror}")
    (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    yield group
    for pid in (group / "cgroup.procs").read_text().split():
        (MEMORY / "cgroup.procs").write_text(pid)
    group.rmdir()


HOG = "import sys; held = bytearray(int(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def test_short_of_memory_it_begins_nothing_new(cluster: Cluster, cgroup: Path) -> None:
    """Somebody else in its cgroup has taken most of what both may have."""
    (cgroup / "cgroup.procs").write_text(str(cluster["gateway"].pid))
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(LIMIT * 88 // 100)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: (cgroup / "cgroup.procs").write_text(str(os.getpid())),
    )
    with hog, stream(cluster.url, COMPLETIONS, LONG_ANSWER) as events:
        next(events)
        assert hog.stdout is not None and hog.stdout.readline() == b"held\n"
        wait_until(lambda: refused(cluster, "memory"), "refusal")
        assert get(cluster.url, "/ready").status == 503
        pressure = next(
            line
            for line in get(cluster.url, "/metrics").body.splitlines()
            if line.startswith('baton_pressure_ratio{resource="memory"}')
        )
        assert float(pressure.split()[-1]) > 0.85
        hog.kill()
        *_, end = events
        assert end == DONE
    wait_until(lambda: post(cluster.url, COMPLETIONS, SHORT).status == 200, "room again")


FULL = Path("/dev/full")


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Runs a command whose every word on stderr fails for want of space."""
    started = []

    def run(*words: str) -> Process:
        (tmp_path / "mute.err").symlink_to(FULL)
        started.append(Process("mute", list(words), tmp_path))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def test_a_full_disk_behind_the_logs_ends_nobody(mute: Callable[..., Process]) -> None:
    http, grpc = free_ports(2)
    mortal = ["--die-with", str(os.getpid()), "--log-level", "debug"]
    launcher = mute("serve", "--port", str(http), "--grpc-port", str(grpc), *mortal)
    url = f"http://127.0.0.1:{http}"

    def workers() -> dict[str, str]:
        try:
            return {w["name"]: w["incarnation"] for w in get(url, "/status").body["workers"]}
        except OSError:
            return {}

    wait_until(lambda: "ready" in launcher.stdout or not launcher.running, "ready", READY_S)
    assert len(tokens(url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
    before = workers()
    os.kill(child(launcher, "decode-0"), signal.SIGKILL)  # which the launcher has to say
    wait_until(
        lambda: workers().get("decode-0") not in (None, before["decode-0"]), "another", PATIENCE_S
    )
    assert len(tokens(url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
    launcher.signal(signal.SIGTERM)
    assert launcher.wait() == 0


def test_a_full_disk_does_not_change_what_a_bad_start_ends_with(
    mute: Callable[..., Process],
) -> None:
    assert mute("serve", "--port", "no number").wait() == 78
