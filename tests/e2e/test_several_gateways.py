"""`baton serve --gateways 2`: two processes behind one port, and what a user sees of that."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.client import DONE, get, stream, tokens
from tests.e2e.cluster import Process, alive, children_of, free_ports, wait_until
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER
from tests.e2e.test_launcher import STOP_S, all_dead, bad_start
from tests.e2e.two_gateways import Streams, questions, two_gateways, undisturbed, until_both_workers

LEASE_S = 12.0

COUNTER = re.compile(r'http_requests_total\{gateway="(\d)",handler="/live".*\} ([0-9.]+)')


@pytest.fixture
def ports() -> list[int]:
    """HTTP, and two in a row for gRPC."""
    while True:
        http, grpc = free_ports(2)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", grpc + 1)):
                return [http, grpc]


@pytest.fixture
def launcher(tmp_path: Path, ports: list[int]) -> Iterator[Process]:
    words = ["serve", "--gateways", "2", "--port", str(ports[0]), "--grpc-port", str(ports[1])]
    launcher = Process("launcher", words, tmp_path)
    try:
        wait_until(lambda: "ready" in launcher.stdout or not launcher.running, "ready", 60)
        launcher.children = children_of(launcher.pid)
        yield launcher
    finally:
        launcher.kill()
        for pid in filter(alive, launcher.children):
            os.kill(pid, signal.SIGKILL)


def gateways(launcher: Process) -> list[int]:
    """Their process ids."""
    return [
        pid
        for pid in children_of(launcher.pid)
        if b"gateway" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]


def scraped(url: str) -> dict[str, float]:
    """Calls of /live that each gateway has counted, by its number."""
    text = str(get(url, "/metrics").body)
    return {number: float(value) for number, value in COUNTER.findall(text)}


def test_two_processes_answer_on_one_port(launcher: Process, ports: list[int]) -> None:
    """Each serves whole answers, one scrape shows both, and Ctrl-C ends all of it."""
    url = f"http://127.0.0.1:{ports[0]}"
    first, _ = launcher.stdout.splitlines()
    assert url in first and "2 gateways + 1 prefill + 1 decode" in first
    assert len(gateways(launcher)) == 2
    asked = 0
    while len(scraped(url)) < 2:  # until the kernel has dealt out a connection to each
        assert get(url, "/live").status == 200
        assert len(tokens(url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
        asked += 1
        assert asked < 100, "all connections went to one of them"
    assert sum(scraped(url).values()) == asked
    text = str(get(url, "/metrics").body)
    families = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    blocks = [line for line in text.splitlines() if line.startswith("vllm:cache_config_info{")]
    assert len(blocks) == 2, "each worker once, however many gateways know it"
    with ExitStack() as held:
        answers = [held.enter_context(stream(url, COMPLETIONS, LONG_ANSWER)) for _ in range(4)]
        for events in answers:
            assert next(events) != DONE
        since = time.monotonic()
        launcher.signal(signal.SIGINT)
        assert launcher.wait(STOP_S) == 0
    assert time.monotonic() - since < STOP_S
    assert all_dead(launcher.children)
    assert launcher.stderr == ""


def test_one_that_dies_is_started_again_and_the_other_goes_on(
    launcher: Process, ports: list[int]
) -> None:
    """No connection is refused meanwhile, and the workers join the new one."""
    url = f"http://127.0.0.1:{ports[0]}"
    before = set(gateways(launcher))
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: "ended with status -9" in launcher.stderr, "its end to be told")
    wait_until(lambda: len(set(gateways(launcher)) - before) == 1, "another in its place")
    for _ in range(20):
        assert get(url, "/live").status == 200
    wait_until(
        lambda: all(len(get(url, "/status").body["workers"]) == 2 for _ in range(8)),
        "the workers to have joined both",
    )
    for _ in range(8):
        assert len(tokens(url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3


def test_one_is_killed_amid_its_streams_and_the_others_do_not_notice(tmp_path: Path) -> None:
    """Its requests' blocks come back, and it gets the same workers when it returns."""
    with two_gateways(tmp_path) as (one, other):
        bodies = questions(20)
        expected = undisturbed(other, bodies)
        with ExitStack() as held:
            for number in range(20):
                body = {**LONG_ANSWER, "prompt": f"lost {number}"}
                next(held.enter_context(stream(one.url, COMPLETIONS, body)))
            streams = Streams(other, bodies)
            one["gateway"].kill()
        assert streams.tokens() == expected
        other.until_idle(LEASE_S)
        recovered = [
            line
            for line in str(get(other.url, "/metrics").body).splitlines()
            if line.startswith("baton_recoveries_total{")
        ]
        assert recovered == [], "they were met by no loss"
        one.gateway()
        until_both_workers(one)
        assert undisturbed(one, bodies[:2]) == expected[:2]


def test_they_share_the_port_with_nobody_else(ports: list[int], tmp_path: Path) -> None:
    """Not even with one who would share it."""
    where = ("127.0.0.1", ports[0])
    with socket.create_server(where, reuse_port=True):
        words = ["serve", "--gateways", "2", "--port", str(ports[0]), "--grpc-port", str(ports[1])]
        why = bad_start(Process("other", words, tmp_path))
    assert str(ports[0]) in why and "--port" in why


def test_a_grpc_port_beyond_the_last_one() -> None:
    words = ["serve", "--gateways", "3", "--grpc-port", "65534"]
    ended = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 78
    assert "--grpc-port 65534" in ended.stderr
