from __future__ import annotations

import ssl
from argparse import ArgumentTypeError, Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import aiohttp
import pytest

from cluster.errors import StartError
from deploy import chat, status
from deploy.client import ClientParser, base_url, session, unreachable


def test_a_certificate_that_is_not_trusted_is_told_apart_from_silence() -> None:
    options = Namespace(url="https://gw")
    connection: Any = Namespace(host="gw", port=443, ssl=True)
    strange = aiohttp.ClientConnectorCertificateError(connection, ssl.CertificateError("unknown"))
    assert "SSL_CERT_FILE" in unreachable(options, strange).message
    assert "nothing answers at https://gw" in unreachable(options, TimeoutError()).message


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("gw", "http://gw"),
        ("[::1]:8000/", "http://[::1]:8000"),
        ("https://gw/v1/", "https://gw"),
        ("https://gw/behind/a/proxy", "https://gw/behind/a/proxy"),
    ],
)
def test_an_address_as_people_write_it(text: str, url: str) -> None:
    assert base_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "http://", "ftp://gw", "http:///v1", "gw:99999", "gw:0", "gw:x", "[::1", "gw?a=b", "a b"],
)
@pytest.mark.parametrize("command", [status, chat])
def test_what_is_no_address_is_one_line(command: Any, text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        base_url(text)
    with pytest.raises(StartError, match="is no address like http"):
        command.main(["--url", text])


class Stranger(BaseHTTPRequestHandler):
    """Another program's server."""

    answer = b""

    def do_GET(self) -> None:
        self.wfile.write(self.answer)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "is no Baton gateway"),
        (b"\x00\x00\x1e\x04\x00", "is no Baton gateway"),  # as a gRPC port begins
        (b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "is no Baton gateway"),
        (b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{", "is no Baton gateway"),
        (b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n[]", "is no Baton gateway"),
        (
            b'HTTP/1.0 404 No\r\nContent-Type: application/json\r\n\r\n{"detail": "Not Found"}',
            "is no Baton gateway",
        ),
        (
            b"HTTP/1.0 401 No\r\nContent-Type: application/json\r\n\r\n"
            b'{"error": {"message": "No key."}}',
            "No key.",
        ),
    ],
)
@pytest.mark.parametrize("command", [status, chat])
def test_somebody_elses_answer_is_one_line(command: Any, answer: bytes, told: str) -> None:
    handler = type("Handler", (Stranger,), {"answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(StartError, match=told):
            command.main(["--url", f"127.0.0.1:{server.server_port}"])
        server.shutdown()
        thread.join()


async def sent(*argv: str) -> str | None:
    """The Authorization header that a command with these flags sends."""
    options = ClientParser("baton x", "").parse_args(argv)
    async with session(options) as client:
        return client.headers.get("authorization")


async def test_which_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert await sent() == "Bearer theirs"
    monkeypatch.setenv("BATON_API_KEY", "ours")
    assert await sent() == "Bearer ours"
    assert await sent("--api-key", "given") == "Bearer given"
    assert await sent("--api-key", "") is None


@pytest.mark.parametrize("command", [status, chat])
def test_help_shows_no_key(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BATON_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "sk-secret")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "sk-secret" not in capsys.readouterr().out
