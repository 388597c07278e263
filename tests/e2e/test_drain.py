"""SIGTERM on a gateway: what runs comes to its end or is told why not, and nobody is cut off."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

from tests.e2e.client import DONE, TIMEOUT_S, get, post, stream, tokens
from tests.e2e.cluster import Process, alive, children_of, free_ports, wait_until
from tests.e2e.sockets import ESTABLISHED, sockets
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER, SOON_S
from tests.e2e.test_several_gateways import gateways
from tests.e2e.two_gateways import Streams, questions, two_gateways, undisturbed

PATIENCE_S = 60.0


def test_running_answers_end_and_new_calls_are_sent_elsewhere(tmp_path: Path) -> None:
    with two_gateways(tmp_path, "--shutdown-timeout", "100") as (one, other):
        bodies = questions(8)
        expected = undisturbed(other, bodies)
        streams = Streams(one, [{**body, "max_tokens": 1000} for body in bodies])
        one["gateway"].signal(signal.SIGTERM)
        wait_until(lambda: get(one.url, "/ready").status == 503, "not ready any more")
        refused = post(one.url, COMPLETIONS, {**LONG_ANSWER, "max_tokens": 2})
        assert (refused.status, refused.body["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close" and int(refused.headers["retry-after"]) >= 1
        assert len(tokens(other.url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
        found = streams.tokens()
        assert [answer[:200] for answer in found] == expected
        assert [len(answer) for answer in found] == [1000] * len(bodies)
        assert one["gateway"].wait(PATIENCE_S) == 0
        other.until_idle(SOON_S)


def test_what_runs_too_long_is_told_so_and_its_blocks_are_free(tmp_path: Path) -> None:
    with two_gateways(tmp_path, "--shutdown-timeout", "0.2") as (one, other):
        with ThreadPoolExecutor(1) as caller, stream(one.url, COMPLETIONS, LONG_ANSWER) as events:
            next(events)
            whole = caller.submit(post, one.url, COMPLETIONS, LONG_ANSWER)
            wait_until(lambda: get(one.url, "/load").body["server_load"] == 2, "both calls")
            one["gateway"].signal(signal.SIGTERM)
            *_, last = events
            answer = whole.result()
        assert last != DONE and last["error"]["code"] == "draining"
        assert (answer.status, answer.body["error"]["code"]) == (503, "draining")
        assert one["gateway"].wait(PATIENCE_S) == 0
        other.until_idle(SOON_S)


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with (
        two_gateways(tmp_path, "--shutdown-timeout", "100") as (one, other),
        stream(one.url, COMPLETIONS, LONG_ANSWER) as events,
    ):
        next(events)
        one["gateway"].signal(signal.SIGTERM)
        wait_until(lambda: get(one.url, "/ready").status == 503, "the first one to be seen")
        one["gateway"].signal(signal.SIGTERM)
        assert one["gateway"].wait(PATIENCE_S) == 130
        other.until_idle(SOON_S)


def answers(pid: int, port: int) -> bool:
    """Whether this process has a client on the port."""
    return any(s.port == port and s.state == ESTABLISHED for s in sockets(pid))


def test_on_a_shared_port_nobody_meets_the_one_that_drains(tmp_path: Path) -> None:
    """While it ends, and until it is there again, the others answer all that comes, and it answers
    who had been connected to it before."""
    http, grpc = free_ports(2)
    url = f"http://127.0.0.1:{http}"
    words = ["serve", "--gateways", "2", "--port", str(http), "--grpc-port", str(grpc)]
    launcher = Process("launcher", words, tmp_path)
    try:
        wait_until(lambda: "ready" in launcher.stdout or not launcher.running, "ready", PATIENCE_S)
        launcher.children = children_of(launcher.pid)
        body = {**LONG_ANSWER, "max_tokens": 2000, "return_token_ids": True}
        with stream(url, COMPLETIONS, body) as events:
            next(events)
            [busy] = [pid for pid in gateways(launcher) if answers(pid, http)]
            short = {**LONG_ANSWER, "max_tokens": 2}
            early = [HTTPConnection("127.0.0.1", http, timeout=TIMEOUT_S) for _ in range(8)]
            for connection in early:
                connection.connect()
            os.kill(busy, signal.SIGTERM)
            assert post(url, COMPLETIONS, short).status == 200
            for connection in early:
                head = {"Content-Type": "application/json"}
                connection.request("POST", COMPLETIONS, json.dumps(short), head)
            for connection in early:
                assert connection.getresponse().status == 200
                connection.close()
            asked = 0
            while alive(busy) or asked < 50:
                answer = post(url, COMPLETIONS, short)
                assert answer.status == 200, answer.body
                asked += 1
            *_, end = events
            assert end == DONE, "its own answer came to its end"
        wait_until(lambda: len(gateways(launcher)) == 2, "another in its place", PATIENCE_S)
        assert "ended with status 0" in launcher.stderr
    finally:
        launcher.kill()
        for pid in filter(alive, launcher.children):
            os.kill(pid, signal.SIGKILL)
