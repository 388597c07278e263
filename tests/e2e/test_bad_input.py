"""The catalogue of bad bodies against the real thing; after each bad call a good one is served."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.model import load_config
from engine.tiny import TINY_DIR
from gateway.ask import Limits
from tests.e2e.client import Answer, get, post, tokens
from tests.e2e.cluster import Cluster
from tests.gateway.catalogue import INSIDES, Case, cases

_MODEL = load_config(TINY_DIR)
LIMITS = Limits(
    model_names=("baton-tiny",),
    vocab_size=_MODEL.vocab_size,
    max_model_len=_MODEL.max_model_len,
    max_prompt_tokens=_MODEL.max_model_len - 1,
)
COMPLETIONS = "/v1/completions"
GOOD = {"model": "baton-tiny", "prompt": "Hello", "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def rested(tiny: Cluster) -> Iterator[Cluster]:
    """No bad call may leave anything on a worker."""
    yield tiny
    tiny.until_idle(2)


def check_error(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """The OpenAI error shape, bounded, with no insides of ours in it."""
    assert answer.status == status, answer.body
    error = answer.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert len(json.dumps(answer.body)) < 1000
    assert not INSIDES.search(error["message"]), error
    return dict(error)


ALL = cases(LIMITS)


@pytest.mark.parametrize("row", sorted({case.row for case in ALL}))
def test_every_row_of_the_catalogue(rested: Cluster, row: int) -> None:
    for case in [case for case in ALL if case.row == row]:
        check(rested, case)
    assert len(tokens(rested.url, "baton-tiny", "Hello", max_tokens=2, ignore_eos=True)) == 2


def check(cluster: Cluster, case: Case) -> None:
    answer = post(cluster.url, case.endpoint, case.raw())
    if case.status == 200:
        assert answer.status == 200, (str(case), answer.body)
        return
    try:
        error = check_error(answer, case.status, case.code)
    except AssertionError as wrong:
        raise AssertionError(f"{case}: {wrong}") from None
    assert error["param"] == case.param, str(case)


def test_a_connection_outlives_bad_calls(rested: Cluster) -> None:
    """Bad, good, bad, good on one kept-alive connection."""
    connection = http.client.HTTPConnection("127.0.0.1", rested.http_port, timeout=30)
    try:
        for body, status in [({"prompt": 5}, 400), (GOOD, 200)] * 2:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", COMPLETIONS, json.dumps(body), headers)
            response = connection.getresponse()
            response.read()
            assert response.status == status
    finally:
        connection.close()


def raw(cluster: Cluster, data: bytes) -> bytes:
    """What comes back for these bytes until the server closes or has answered."""
    with socket.create_connection(("127.0.0.1", cluster.http_port), timeout=30) as connection:
        connection.sendall(data)
        return connection.recv(1 << 16)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_pipelined_calls_keep_their_order(rested: Cluster) -> None:
    def call(body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data

    with socket.create_connection(("127.0.0.1", rested.http_port), timeout=30) as connection:
        connection.sendall(call(GOOD) + call({"prompt": 5}))
        said = b""
        while said.count(b"HTTP/1.1 ") < 2 or not said.endswith(b"}}"):
            piece = connection.recv(1 << 16)
            assert piece, said
            said += piece
    first, second = said.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and second.startswith(b"400")


def test_an_old_client_gets_a_plain_stream(rested: Cluster) -> None:
    """HTTP/1.0 knows no chunks: the end of the connection is the end of the stream."""
    data = json.dumps({**GOOD, "stream": True}).encode()
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
    with socket.create_connection(("127.0.0.1", rested.http_port), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    headers, _, body = said.partition(b"\r\n\r\n")
    assert b" 200 " in headers and b"chunked" not in headers.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


def test_the_largest_body(rested: Cluster) -> None:
    """4 MiB is read to its end and judged; one byte more is refused by its announced length."""
    body = json.dumps({**GOOD, "user": ""}).encode()
    body = body.replace(b'""', b'"' + b"x" * (LIMITS.max_body_bytes - len(body)) + b'"')
    assert len(body) == LIMITS.max_body_bytes
    check_error(post(rested.url, COMPLETIONS, body), 400, "string_above_max_length")
    more = HEAD + b"Content-Length: %d\r\n\r\n{" % (LIMITS.max_body_bytes + 1)
    assert raw(rested, more).startswith(b"HTTP/1.1 413 ")


def test_a_context_filled_to_the_brim(rested: Cluster) -> None:
    """The longest prompt that is allowed is also served."""
    longest = [7] * (_MODEL.max_model_len - 1)
    assert len(tokens(rested.url, "baton-tiny", longest, max_tokens=1, ignore_eos=True)) == 1
    assert get(rested.url, "/health").status == 200
