"""A process dies or stops at the worst moment: a typed error soon, nothing leaked, life goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.client import DONE, get, post, stream, tokens
from tests.e2e.cluster import Cluster, Process, serving
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER, SOON_S, long_answer, long_prompt
from tests.e2e.test_clients import generate_stream

LOST_S = 2.0
STOPPED_S = 2.5
"""Six missed beats of 0.25 s, a seventh to notice, and the way through a busy machine."""

WORST = pytest.mark.parametrize(
    ("blow", "within"),
    [
        pytest.param(signal.SIGKILL, LOST_S, id="killed"),
        pytest.param(signal.SIGSTOP, STOPPED_S, id="stopped"),
    ],
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    slow = ("--max-num-batched-tokens", "16", "--chunk-bytes", "4096")
    with serving(tmp_path, prefill=slow) as cluster:
        yield cluster


def check_lost(error: dict[str, Any]) -> None:
    """An error object that tells a client what happened and nothing of our insides."""
    assert error["code"] == "worker_lost" and error["type"] == "service_unavailable"
    assert "127.0.0.1" not in error["message"] and "-0" not in error["message"]


def decoding(events: Iterator[Any]) -> None:
    """Reads so far that the handoff is over: before that a loss may also be a failed transfer."""
    for _ in range(5):
        next(events)


def works_again(cluster: Cluster) -> None:
    assert len(tokens(cluster.url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
    cluster.until_idle(SOON_S)


def strike(process: Process, blow: signal.Signals) -> float:
    process.signal(blow)
    return time.monotonic()


@WORST
def test_decode_worker_lost_during_an_answer(
    cluster: Cluster, blow: signal.Signals, within: float
) -> None:
    with stream(cluster.url, COMPLETIONS, LONG_ANSWER) as events:
        decoding(events)
        since = strike(cluster["decode-0"], blow)
        *rest, last = events  # until the server ends the stream
        took = time.monotonic() - since
    check_lost(last["error"])
    assert DONE not in rest and not any(e["choices"][0]["finish_reason"] for e in rest)
    assert took < within

    status = cluster.until_idle(SOON_S)
    assert [worker["name"] for worker in status["workers"]] == ["prefill-0"]
    nobody = post(cluster.url, COMPLETIONS, {**LONG_ANSWER, "max_tokens": 2})
    assert nobody.status == 503 and nobody.body["error"]["code"] == "no_workers"
    assert int(nobody.headers["retry-after"]) > 0
    assert get(cluster.url, "/ready").status == 503

    cluster.worker("decode", name="decode-new")
    cluster.until_joined("decode-new")
    works_again(cluster)


@WORST
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_prefill_worker_lost_during_a_long_prompt(
    cluster: Cluster, streamed: bool, blow: signal.Signals, within: float
) -> None:
    """No byte was sent yet, so streaming or not it is an HTTP status."""
    body = {**long_prompt(seed=1), "stream": streamed}
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(post, cluster.url, COMPLETIONS, body)
        cluster.until(lambda status: status["workers"][1]["owned_blocks"], "prefill under way")
        since = strike(cluster["prefill-0"], blow)
        answer = call.result()
        took = time.monotonic() - since
    assert answer.status == 503
    check_lost(answer.body["error"])
    assert took < within
    status = cluster.until_idle(SOON_S)
    assert [worker["name"] for worker in status["workers"]] == ["decode-0"]
    cluster.worker("prefill", name="prefill-new")
    cluster.until_joined("prefill-new")
    works_again(cluster)


def test_prefill_worker_lost_after_its_part(cluster: Cluster) -> None:
    """What it has handed over goes on without it."""
    with stream(cluster.url, COMPLETIONS, {**LONG_ANSWER, "max_tokens": 400}) as events:
        decoding(events)
        cluster["prefill-0"].signal(signal.SIGKILL)
        *chunks, end = events
    assert end == DONE
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stopped_worker_comes_back_empty(cluster: Cluster) -> None:
    """R6: fenced while it slept, it frees everything and is a member again."""
    with stream(cluster.url, COMPLETIONS, LONG_ANSWER) as events:
        decoding(events)
        cluster["decode-0"].signal(signal.SIGSTOP)
        *_, last = events
    check_lost(last["error"])
    cluster["decode-0"].signal(signal.SIGCONT)
    cluster.until_joined("prefill-0", "decode-0")
    works_again(cluster)


def test_grpc_tells_the_loss(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        call = generate_stream(channel)(long_answer(), timeout=30)
        decoding(call)
        since = strike(cluster["decode-0"], signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as lost:
            list(call)
        assert time.monotonic() - since < LOST_S
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "worker_lost" in dict(tuple(m) for m in lost.value.trailing_metadata())["baton-code"]


def test_only_its_own_requests_are_lost(cluster: Cluster) -> None:
    """Two decode workers, two answers: the survivor's is whole."""
    cluster.worker("decode", name="decode-1")
    cluster.until_joined()
    body = {**LONG_ANSWER, "max_tokens": 600}
    with (
        stream(cluster.url, COMPLETIONS, body) as one,
        stream(cluster.url, COMPLETIONS, body) as two,
    ):
        decoding(one)
        decoding(two)
        cluster.until(
            lambda status: all(
                worker["requests"] == 1
                for worker in status["workers"]
                if worker["role"] == "decode"
            ),
            "one answer on each decode worker",
        )
        cluster["decode-1"].signal(signal.SIGKILL)
        ends = [list(one)[-1], list(two)[-1]]
    assert sorted(end == DONE for end in ends) == [False, True]
    check_lost(next(end for end in ends if end != DONE)["error"])
    works_again(cluster)


def test_gateway_killed_and_started_again(cluster: Cluster, tmp_path: Path) -> None:
    """Workers drop its requests at once, and are there for its successor."""
    with stream(cluster.url, COMPLETIONS, LONG_ANSWER) as events:
        decoding(events)
        cluster["gateway"].kill()
    cluster.gateway()
    cluster.until_joined("prefill-0", "decode-0")
    works_again(cluster)
