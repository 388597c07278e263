"""The bad-input catalogue's rows about keys, HTTP and its connections, as bytes on a socket.

One table for a gateway over fakes and for a whole cluster, whose key file must be `KEY_FILE` and
which must serve `model` and its alias ALIAS.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

KEY, NARROW_KEY, SLOW_KEY = "right-key", "narrow-key", "slow-key"
ALIAS = "another-name"


def entry(key: str, tenant: str, **fields: Any) -> dict[str, Any]:
    """One of a key file's list."""
    return {"key_sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant, **fields}


KEY_FILE = json.dumps(
    [
        entry(KEY, "wide"),
        entry(NARROW_KEY, "narrow", models=[ALIAS]),
        entry(SLOW_KEY, "slow", requests_per_minute=3),
    ]
)
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Exchange:
    """What is sent, and the answer to it. A row may have several."""

    row: int
    sent: bytes
    status: int
    code: str = ""
    closes: bool = False  # the server ends the connection
    headers: dict[str, str] = field(default_factory=dict)  # of the answer

    def __str__(self) -> str:
        return f"{self.row}-{self.sent[:300]!r}"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool


def call(
    body: bytes,
    *more: str,
    key: str = KEY,
    kind: str = "application/json",
    version: str = "1.1",
    length: int | None = None,
) -> bytes:
    """A completion's request. `more` are header lines; no `kind`, `key` or Host if it is empty."""
    lines = [f"POST /v1/completions HTTP/{version}", "Host: test", *more]
    if kind:
        lines.append(f"Content-Type: {kind}")
    if key:
        lines.append(f"Authorization: Bearer {key}")
    if not any(line.startswith("Transfer-Encoding") for line in more):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def good(model: str, *more: str, key: str = KEY, **fields: Any) -> bytes:
    body = {"model": model, "prompt": "Hello", "max_tokens": 2, "ignore_eos": True, **fields}
    return call(json.dumps(body).encode(), *more, key=key)


def get(path: str, *more: str, method: str = "GET", host: str = "Host: test") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", host, f"Authorization: Bearer {KEY}", *more]
    return "\r\n".join(line for line in lines if line).encode("latin-1") + b"\r\n\r\n"


def exchanges(model: str) -> list[Exchange]:
    chunked = "Transfer-Encoding: chunked"
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 2}).encode()
    found: list[Exchange] = []

    def bad(row: int, status: int, code: str, *sent: bytes, closes: bool = True) -> None:
        found.extend(Exchange(row, data, status, code, closes) for data in sent)

    types = ("text/plain", "", "application/x-www-form-urlencoded", "application/json;charset=l1")
    bad(15, 415, "unsupported_media_type", *(call(body, kind=kind) for kind in types))
    codings = ("gzip", "deflate", "br", "identity, gzip")
    encoded = [call(body, f"Content-Encoding: {coding}") for coding in codings]
    bad(16, 415, "unsupported_media_type", *encoded)
    too_large = "request_too_large"
    bad(17, 413, too_large, call(b" " * ((4 << 20) + 1)), call(b"x", length=(4 << 20) + 1))
    bad(17, 413, too_large, call(chunks([b" " * (1 << 20)] * 4 + [b"x"]), chunked))
    bad(18, 413, too_large, call(b"{", length=300_000_000))
    bad(19, 413, too_large, call(chunks([b"xxxxxx"] * 10_000), chunked))
    bad(19, 413, too_large, call(chunks([b" "] * 1025 + [body]), chunked))

    missing = [call(body, key=""), call(body, "Authorization: Basic eDp5", key="")]
    missing += [
        call(body, "Authorization: Bearer", key=""),
        get("/v1/models").replace(b"Bear", b""),
    ]
    asks = {"www-authenticate": "Bearer"}
    found += [Exchange(67, sent, 401, "missing_api_key", headers=asks) for sent in missing]
    wrong = ("wrong-key", f" {KEY}", KEY[:-1], KEY + "x", KEY.upper(), "r\xefght-key", "k" * 16384)
    unknown = [call(body, key=key) for key in wrong]
    unknown += [call(body, f"Authorization: Bearer {KEY}"), get("/metrics").replace(b"right", b"r")]
    found += [Exchange(68, sent, 401, "invalid_api_key", headers=asks) for sent in unknown]
    bad(68, 431, "headers_too_large", call(body, key="k" * 65536))
    # Space behind a header's value is none of it (RFC 9110, 5.5): this is the key itself.
    found.append(Exchange(68, call(body, key=KEY + " "), 200))

    narrow = [good(model, key=NARROW_KEY), good(model, key=NARROW_KEY, stream=True)]
    narrow.append(get(f"/v1/models/{model}").replace(KEY.encode(), NARROW_KEY.encode()))
    bad(69, 403, "model_forbidden", *narrow, closes=False)
    found.append(Exchange(69, good(ALIAS, key=NARROW_KEY), 200))

    allow = {"allow": "POST"}
    for method in ("GET", "TRACE", "PUT", "DELETE"):
        sent = get("/v1/completions", method=method)
        found.append(Exchange(72, sent, 405, "method_not_allowed", headers=allow))
    bad(72, 404, "not_found", get("/v1/nothing"), get("/"), get("/v1/completions/"), closes=False)
    labels = (
        ["a", "b"],
        ["x" * 10_000],
        ["a b"],
        ["\xe9"],
        ["x" * 129],
        [""],
        ["a\tb"],
        ["a\x01\x7fb"],
    )
    for label in labels:
        sent = good(model, *(f"X-Request-Id: {each}" for each in label))
        found.append(Exchange(73, sent, 200, headers={"x-request-id": OURS}))

    both = (call(b"0\r\n\r\n", chunked, "Content-Length: 3"),)
    bad(74, 400, "ambiguous_body", *both)
    lengths = (["5", "6"], ["-1"], ["1e3"], ["+5"], ["5, 6"], ["0x5"], [""])
    for values in lengths:
        lines = [f"Content-Length: {value}" for value in values]
        bad(75, 400, "invalid_http", get("/live", *lines, method="POST"))
    codings = ("xchunked", "chunked, identity", "gzip, chunked", "")
    for coding in codings:
        sent = get("/live", f"Transfer-Encoding: {coding}", method="POST")
        bad(75, 400, "invalid_http", sent)
    odd = ("X : y", " X: y", "X\x00: y", "X: a\x00b", "X", "X: a\rb", "(X): y")
    bad(75, 400, "invalid_http", *(get("/live", line) for line in odd))

    whole = get("/live")
    bare = [whole.replace(b"\r\n", b"\n"), whole.replace(b"\r\n", b"\n", 1)]
    bare += [get("/live", "X: y\nContent-Length: 5"), whole[:-2] + b"\n", b"\n" + whole]
    bare.append(call(b"0\r\nX: y\n\r\n", chunked))
    bad(76, 400, "invalid_http", *bare)
    hosts = ("Host: x/?", "Host: a#", "Host: x/live?", "Host:", "Host: a b", "Host: a@b")
    bad(77, 400, "invalid_host", *(get("/live", host=host) for host in hosts), closes=False)
    bad(77, 400, "invalid_http", get("/live", host=""), get("/live", "Host: other"))
    targets = ("http://evil.example/live", "live", "//live@x:1", "*")
    bad(77, 400, "invalid_target", *(get(target) for target in targets[:2]), closes=False)
    bad(77, 404, "not_found", *(get(target) for target in targets[2:]), closes=False)
    large = [get("/live", "X: " + "y" * (128 << 10)), get("/live", *["X: y"] * 5000)]
    bad(78, 431, "headers_too_large", *large)
    bad(78, 431, "headers_too_large", get("/live", *["X: y"] * 101), closes=False)
    bad(79, 400, "invalid_http", b"GET /live\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    bad(
        79,
        400,
        "invalid_http",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\r\n\r\n",
    )
    bad(79, 400, "invalid_http", whole.replace(b"/1.1", b"/2.0"), whole.replace(b"/1.1", b"/1.2"))
    bad(85, 413, too_large, call(b"", "Expect: 100-continue", length=300_000_000))
    crossing = ("Origin: http://evil.example", "Access-Control-Request-Method: POST")
    sent = get("/v1/completions", *crossing, method="OPTIONS")
    found.append(Exchange(86, sent, 405, "method_not_allowed", headers=NOTHING_CORS))
    found.append(Exchange(86, good(model, crossing[0]), 200, headers=NOTHING_CORS))
    return found


OURS = "(32 hex digits)"
"""Stands for an id that the server has made."""

NOTHING_CORS = {f"access-control-allow-{what}": "" for what in ("origin", "methods", "headers")}


def chunks(parts: Iterable[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def converse(host: str, port: int, sent: bytes, closes: bool = False) -> Answer:
    """Send while reading one answer, and, if the server is to hang up, until it has."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode("latin-1").split("\r\n")[:-2]
            assert status.startswith("HTTP/1.1 "), status
            headers = {}
            for line in lines:
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            if "content-length" in headers:
                body = await reader.readexactly(int(headers["content-length"]))
            else:
                body = await reader.readuntil(b"\r\n0\r\n\r\n")
            closed = closes and await reader.read() == b""
        finally:
            writer.close()
            with suppress(ConnectionError):  # reset: it had not read all that was sent
                await writer.wait_closed()
        return Answer(int(status.split()[1]), headers, body, closed)


async def check(host: str, port: int, exchange: Exchange) -> Answer:
    """Send it and hold the answer against the table."""
    answer = await converse(host, port, exchange.sent, exchange.closes)
    told = (str(exchange), answer)
    assert answer.status == exchange.status, told
    assert answer.closed == exchange.closes, told
    if exchange.code:
        error = json.loads(answer.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, told
        assert error["code"] == exchange.code, told
        assert len(answer.body) < 1000, told
    for name, value in exchange.headers.items():
        if value == OURS:
            assert len(answer.headers[name]) == 32 and int(answer.headers[name], 16), told
        else:
            assert answer.headers.get(name, "") == value, told
    return answer
