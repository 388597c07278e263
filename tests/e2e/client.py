"""A plain HTTP client for the tests: shows statuses, headers and events as they came."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

DONE = "[DONE]"
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any  # parsed if it is JSON


def get(url: str, path: str) -> Answer:
    return request(url, "GET", path)


def post(url: str, path: str, body: dict[str, Any] | bytes) -> Answer:
    return request(url, "POST", path, body)


def request(
    url: str,
    method: str,
    path: str,
    body: dict[str, Any] | bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One call on a connection of its own. Raises OSError when nobody answers."""
    with closing(_connect(url)) as connection:
        _send(connection, method, path, body, headers)
        return _read(connection.getresponse())


def _connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)


def _send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: dict[str, Any] | bytes | None,
    headers: dict[str, str] | None = None,
) -> None:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})


def _read(response: http.client.HTTPResponse) -> Answer:
    data = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    is_json = headers.get("content-type", "").startswith("application/json")
    return Answer(response.status, headers, json.loads(data) if is_json else data.decode())


@contextmanager
def stream(
    url: str, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> Iterator[Iterator[Any]]:
    """The events of one SSE answer, each parsed, DONE as it is. Leaving the block hangs up."""
    with closing(_connect(url)) as connection:
        _send(connection, "POST", path, {**body, "stream": True}, headers)
        with closing(connection.getresponse()) as response:
            assert response.status == 200, response.read().decode()
            yield _events(response)


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """Holds the framing to the letter: `data: ` + one line + an empty line, and nothing else."""
    while line := response.readline():
        assert line.startswith(b"data: ") and line.endswith(b"\n"), line
        assert response.readline() == b"\n"
        data = line[len("data: ") : -1].decode()
        yield DONE if data == DONE else json.loads(data)


def complete(url: str, model: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    """The whole body of a completion that must succeed."""
    body = {"model": model, "prompt": prompt, "return_token_ids": True, **fields}
    answer = post(url, "/v1/completions", body)
    assert answer.status == 200, answer.body
    return dict(answer.body)


def tokens(url: str, model: str, prompt: Any, **fields: Any) -> list[int]:
    """The token ids of a completion's only choice."""
    [choice] = complete(url, model, prompt, **fields)["choices"]
    return list(choice["token_ids"])


def at_once(calls: list[Any], workers: int) -> list[Any]:
    """What each of the calls returns, made from `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def raw_post(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and return the connection unread, to be closed at will."""
    data = json.dumps(body).encode()
    host = urlsplit(url)
    assert host.hostname is not None
    connection = socket.create_connection((host.hostname, host.port or 80), timeout=TIMEOUT_S)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection
