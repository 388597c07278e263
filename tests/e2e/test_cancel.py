"""R4: whoever goes away, in whatever phase, his blocks are free on both sides soon after."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from cluster.wire import inference_pb2 as wire
from tests.e2e.client import get, raw_post, stream, tokens
from tests.e2e.cluster import Cluster, at_rest, serving, wait_until
from tests.e2e.reference import prompt_of
from tests.e2e.test_clients import generate, generate_stream

SOON_S = 2.0
COMPLETIONS = "/v1/completions"
VOCABULARY = 2000  # ids that baton-tiny has

LONG_ANSWER: dict[str, Any] = {
    "model": "baton-tiny",
    "prompt": "once",
    "max_tokens": 3500,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Prefills in small steps, and one seat for decoding: every phase can be seen."""
    with serving(
        tmp_path_factory.mktemp("cancel"),
        prefill=("--max-num-batched-tokens", "16", "--chunk-bytes", "4096"),
        decode=("--max-num-seqs", "1", "--block-size", "64"),
    ) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _idle_and_well(cluster: Cluster) -> Iterator[None]:
    """Every test leaves all blocks free or cached, and a cluster that answers as before."""
    yield
    cluster.until_idle(SOON_S)
    wait_until(lambda: calls(cluster) == 0, "every call to be over", SOON_S)
    answer = tokens(cluster.url, "baton-tiny", "Hello", max_tokens=3, temperature=0)
    assert len(answer) == 3


def long_prompt(seed: int) -> dict[str, Any]:
    """Takes hundreds of steps, and no prefix cache has it."""
    return {"model": "baton-tiny", "prompt": prompt_of(4000, VOCABULARY, seed), "max_tokens": 9}


def calls(cluster: Cluster) -> int:
    """How many calls the gateway is answering."""
    load: int = get(cluster.url, "/load").body["server_load"]
    return load


def reset(connection: socket.socket) -> None:
    """Close with RST, as a client does that dies with unread data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def leave(connection: socket.socket) -> None:
    connection.close()


GOODBYES = pytest.mark.parametrize("goodbye", [leave, reset])
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])


@GOODBYES
@STREAMED
def test_gone_while_prefilling(cluster: Cluster, streamed: bool, goodbye: Any) -> None:
    body = {**long_prompt(seed=2 * streamed + (goodbye is reset)), "stream": streamed}
    connection = raw_post(cluster.url, COMPLETIONS, body)
    cluster.until(
        lambda status: (
            status["workers"][1]["queued_tokens"] > 0
            and status["workers"][0]["promised_blocks"] > 0
        ),
        "prefill under way, landing promised",
    )
    goodbye(connection)
    cluster.until_idle(SOON_S)


@GOODBYES
@STREAMED
def test_gone_while_decoding(cluster: Cluster, streamed: bool, goodbye: Any) -> None:
    connection = raw_post(cluster.url, COMPLETIONS, {**LONG_ANSWER, "stream": streamed})
    cluster.until(lambda status: status["workers"][0]["running"] > 0, "decoding")
    if streamed:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    goodbye(connection)
    cluster.until_idle(SOON_S)


@STREAMED
def test_gone_while_queued(cluster: Cluster, streamed: bool) -> None:
    """The one seat is taken. Who waits for it and leaves is forgotten; who sits stays."""
    with stream(cluster.url, COMPLETIONS, LONG_ANSWER) as events:
        next(events)
        waiting = raw_post(cluster.url, COMPLETIONS, {**LONG_ANSWER, "stream": streamed})
        wait_until(lambda: calls(cluster) == 2, "the second call to arrive")
        leave(waiting)
        wait_until(lambda: calls(cluster) == 1, "the second call to be forgotten", SOON_S)
        assert "choices" in next(events)


def test_a_seat_is_handed_on(cluster: Cluster) -> None:
    """The queue moves when the one who sits leaves."""
    connection = raw_post(cluster.url, COMPLETIONS, {**LONG_ANSWER, "stream": True})
    cluster.until(lambda status: status["workers"][0]["running"] > 0, "decoding")
    waiting = raw_post(cluster.url, COMPLETIONS, {**LONG_ANSWER, "max_tokens": 2})
    wait_until(lambda: calls(cluster) == 2, "the second call to arrive")
    leave(connection)
    with waiting:
        assert waiting.recv(4096).startswith(b"HTTP/1.1 200")


def test_gone_after_any_number_of_events(cluster: Cluster) -> None:
    """From right after the request to well into the answer; each leaves the ledger whole."""
    for count in range(12):
        with stream(
            cluster.url, COMPLETIONS, {**LONG_ANSWER, "prompt": f"{count} times"}
        ) as events:
            for _ in range(count):
                assert "choices" in next(events)
    for _ in range(12):
        leave(raw_post(cluster.url, COMPLETIONS, LONG_ANSWER))
    cluster.until_idle(SOON_S)


def test_gone_with_many_choices(cluster: Cluster) -> None:
    body = {**LONG_ANSWER, "n": 3, "max_tokens": 1000}
    connection = raw_post(cluster.url, COMPLETIONS, body)
    cluster.until(lambda status: status["workers"][0]["running"] > 0, "decoding")
    leave(connection)
    cluster.until_idle(SOON_S)


def test_half_a_request_is_forgotten(cluster: Cluster) -> None:
    connection = raw_post(cluster.url, COMPLETIONS, {})
    connection.close()
    with socket.create_connection(("127.0.0.1", cluster.http_port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")


def long_answer() -> wire.GenerateRequest:
    return wire.GenerateRequest(model="baton-tiny", prompt="once", max_tokens=3500, ignore_eos=True)


def test_grpc_cancel(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        call = generate_stream(channel)(long_answer(), timeout=30)
        next(call)
        call.cancel()
        cluster.until_idle(SOON_S)
        whole = generate(channel).future(long_answer(), timeout=30)
        cluster.until(lambda status: status["workers"][0]["running"] > 0, "decoding")
        whole.cancel()
        cluster.until_idle(SOON_S)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_grpc_deadline(cluster: Cluster, phase: str) -> None:
    request = long_answer()
    if phase == "prefill":
        request.prompt_token_ids.ids.extend(prompt_of(4000, VOCABULARY, seed=9))
        request.max_tokens = 9
    with grpc.insecure_channel(cluster.grpc) as channel:
        with pytest.raises(grpc.RpcError) as late:
            generate(channel)(request, timeout=0.4)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        cluster.until_idle(SOON_S)


def test_the_ledger_adds_up_while_working(cluster: Cluster) -> None:
    """R1 at any moment, not only at rest."""
    body = {**LONG_ANSWER, "prompt": prompt_of(2000, VOCABULARY, seed=10), "max_tokens": 2000}
    connection = raw_post(cluster.url, COMPLETIONS, body)
    seen = set()

    def both_seen(status: dict[str, Any]) -> bool:
        for worker in status["workers"]:
            at_rest(worker)  # checks the sum
            seen.update(
                (worker["name"], state)
                for state in ("promised_blocks", "owned_blocks")
                if worker[state]
            )
        return len(seen) == 3

    try:
        cluster.until(both_seen, "promised on one side, owned on both")
    finally:
        leave(connection)
