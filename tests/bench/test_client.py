from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from aiohttp import web

from bench.client import Answer, Client, Record, open_session
from tests.bench.conftest import CUT, DONE, chunk, event, usage, whole


def filled(*events: tuple[float, bytes], keep_text: bool = True) -> Record:
    """A Record started at 10.0 after events at given times."""
    record = Record(start=10.0)
    answer = Answer(record, keep_text)
    for now, raw in events:
        answer.accept(raw.removeprefix(b"data: ").strip(), now)
    answer.finish()
    return record


class TestAnswer:
    def test_times_are_those_of_choice_events_alone(self) -> None:
        record = filled(
            (10.25, chunk("")),
            (10.50, chunk("a")),
            (11.00, chunk("b", "stop")),
            (13.00, usage(5, 3)),
            (14.00, DONE),
        )
        assert record.ok
        assert record.ttft == 0.25  # an empty text counts: it is the first event with choices
        assert record.itls == [0.25, 0.5]
        assert record.latency == 1.0
        assert record.tpot == (1.0 - 0.25) / 2
        assert (record.prompt_tokens, record.output_tokens) == (5, 3)
        assert (record.text, record.finish_reason) == ("ab", "stop")

    def test_one_token_has_no_tpot(self) -> None:
        assert filled((11, chunk("a", "length")), (11, usage(1, 1)), (11, DONE)).tpot == 0.0

    def test_chat_delta_text(self) -> None:
        def delta(**fields: str) -> bytes:
            return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})

        record = filled(
            (11, delta(role="assistant", content="")), (12, delta(content="hé")), (13, DONE)
        )
        assert record.ok and record.text == "hé"

    def test_text_is_not_kept_unless_asked(self) -> None:
        assert filled((11, chunk("a", "stop")), keep_text=False).text == ""

    def test_without_usage_chunks_are_counted(self) -> None:
        assert filled((11, chunk("a")), (12, chunk("b")), (12, DONE)).output_tokens == 2

    def test_usage_on_every_chunk_takes_the_last(self) -> None:
        def running(output: int) -> bytes:
            choice = {"index": 0, "text": "x", "finish_reason": None}
            counts = {"prompt_tokens": 4, "completion_tokens": output}
            return event({"choices": [choice], "usage": counts})

        record = filled((11, running(2)), (12, running(5)), (12, DONE))
        assert record.output_tokens == 5 and len(record.itls) == 1

    def test_finish_reason_without_done_is_whole(self) -> None:
        assert filled((11, chunk("a", "length"))).ok

    def test_done_without_finish_reason_is_whole(self) -> None:
        assert filled((11, chunk("a")), (11, DONE)).ok

    def test_neither_is_a_cut(self) -> None:
        assert "cut" in str(filled((11, chunk("a"))).error)

    def test_error_event_fails_though_done_follows(self) -> None:
        broken = event({"error": {"message": "worker lost", "code": 500}})
        record = filled((11, chunk("a")), (12, broken), (12, DONE))
        assert record.error == "error event: worker lost"

    def test_text_that_looks_like_an_error_is_text(self) -> None:
        text = '"error": {"message": "no"} data: [DONE]'
        record = filled((11, chunk(text, "stop")), (11, DONE))
        assert record.ok and record.text == text

    @pytest.mark.parametrize("finish", ["abort", "error"])
    def test_finish_reasons_of_failure(self, finish: str) -> None:
        assert finish in str(filled((11, chunk("a", finish)), (11, DONE)).error)

    @pytest.mark.parametrize(
        "raw", [b"data: {oops\n\n", b"data: \xff\n\n", event([1]), event({"choices": [1]})]
    )
    def test_malformed_events_fail(self, raw: bytes) -> None:
        assert "malformed" in str(filled((11, chunk("a")), (12, raw), (13, DONE)).error)

    def test_no_choice_at_all_fails(self) -> None:
        assert "without a single choice" in str(filled((11, usage(3, 0)), (11, DONE)).error)

    def test_timeline_keeps_numbers_alone(self) -> None:
        phases = {"queue": 1, "prefill": 2.5, "odd": "x", "flag": True, "gone": None}
        raw = usage(1, 1, metrics={"timeline_ms": phases})
        record = filled((11, chunk("a", "stop")), (11, raw), (11, DONE))
        assert record.timeline_ms == {"queue": 1.0, "prefill": 2.5}


async def send(url: str, *, timeout: float = 30.0, key: str | None = None) -> Record:
    async with open_session(key) as session:
        client = Client(session, f"{url}/v1/completions", timeout=timeout, keep_text=True)
        return await client.send(json.dumps({"prompt": "hi"}).encode(), 7)


async def test_a_whole_stream(serve_script: Any) -> None:
    server = await serve_script(whole("a", "€", "c", prompt=9))
    record = await send(server.url, key="secret")
    assert record.ok
    assert record.text == "a€c"
    assert (record.prompt_tokens, record.output_tokens, len(record.itls)) == (9, 3, 2)
    assert 0 < record.ttft <= record.latency
    assert server.bodies == [{"prompt": "hi"}]
    assert server.headers[0]["Authorization"] == "Bearer secret"


async def test_a_stream_in_single_bytes_with_comments_and_crlf(serve_script: Any) -> None:
    stream = b": hello\n\n" + b"".join(whole("é", "😀")).replace(b"\n", b"\r\n")
    server = await serve_script([bytes([byte]) for byte in stream])
    record = await send(server.url)
    assert record.ok and record.text == "é😀" and record.output_tokens == 2


async def test_connection_lost_in_the_answer(serve_script: Any) -> None:
    server = await serve_script([chunk("a"), CUT])
    record = await send(server.url)
    assert not record.ok and record.error


async def test_body_that_ends_early(serve_script: Any) -> None:
    server = await serve_script([chunk("a"), b'data: {"choi'])
    assert "cut" in str((await send(server.url)).error)


async def test_http_error_in_the_openai_shape(serve_script: Any) -> None:
    body = {"error": {"message": "prompt too long", "type": "invalid", "code": 400}}
    server = await serve_script(lambda _: web.json_response(body, status=400))
    assert (await send(server.url)).error == "HTTP 400: prompt too long"


async def test_http_error_in_plain_text(serve_script: Any) -> None:
    server = await serve_script(lambda _: web.Response(status=503, text="busy"))
    assert (await send(server.url)).error == "HTTP 503: busy"


async def test_http_error_without_a_body(serve_script: Any) -> None:
    server = await serve_script(lambda _: web.Response(status=502))
    assert (await send(server.url)).error == "HTTP 502: Bad Gateway"


async def test_refused_connection() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody can answer
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert (await send(url)).error == "cannot connect: connection refused"


async def test_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # connects, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert (await send(url, timeout=0.01)).error == "timed out after 0.01 s"
