"""The HTTP door: routes, errors, limits, keys, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from starlette.routing import Route

from cluster.errors import EngineFailed, NoWorkers, Overloaded, WorkerLost
from cluster.process import JsonLines
from gateway.app import create_app
from gateway.connection import Connection
from gateway.gateway import Gateway
from gateway.routes import MAX_BODY_PIECES
from gateway.scrape import Siblings
from gateway.text import TextPool
from tests.gateway.fakes import (
    END,
    MODEL,
    Browser,
    FakePools,
    FakeSequencer,
    make_gateway,
    says,
    then,
)

PROMPT = {"model": MODEL, "prompt": "Q", "max_tokens": 50}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Q"}]}


class House:
    """One gateway over fakes and a browser that calls it."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.sequencer = FakeSequencer(says("Hi"))
        self.pools = FakePools()
        self.gateway = make_gateway(directory, self.sequencer, pools=self.pools, **options)
        self.app = create_app(self.gateway)
        self.browser = Browser(self.app, *options.get("keys", ()))

    def sample(self, name: str, **labels: str) -> float:
        registry = self.gateway.metrics.registry
        value = registry.get_sample_value(name, {"model_name": MODEL, **labels})
        return value or 0.0


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    house.gateway.text.start()
    yield house
    house.gateway.text.stop()


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path, keys=["secret"])
    house.gateway.text.start()
    yield house
    house.gateway.text.stop()


@asynccontextmanager
async def served(gateway: Gateway) -> AsyncIterator[str]:
    """Behind a real server on a free port of loopback. The socket listens before it starts."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(gateway), http=Connection, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


# Answers.


async def test_a_completion(house: House) -> None:
    reply = await house.browser.post("/v1/completions", PROMPT)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json()["choices"][0]["text"] == "Hi"
    assert reply.json()["usage"]["completion_tokens"] == 3


async def test_a_streamed_chat(house: House) -> None:
    data = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    reply = await house.browser.post("/v1/chat/completions", data)
    assert reply.headers["content-type"].startswith("text/event-stream")
    role, *texts, usage, done = reply.events
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["delta"]["content"] for event in texts] == ["H", "i", ""]
    assert texts[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert done == "data: [DONE]"
    assert reply.complete


async def test_no_chunk_without_choices_unless_asked(house: House) -> None:
    reply = await house.browser.post("/v1/completions", {**PROMPT, "stream": True})
    assert all(event["choices"] for event in reply.events[:-1])


@pytest.mark.parametrize("include_usage", [True, False])
async def test_the_timeline_on_request(house: House, include_usage: bool) -> None:
    data = {**PROMPT, "return_timeline": True}
    whole = (await house.browser.post("/v1/completions", data)).json()
    assert whole["metrics"]["timeline_ms"]["landing"] == 2.0
    data |= {"stream": True, "stream_options": {"include_usage": include_usage}}
    events = (await house.browser.post("/v1/completions", data)).events[:-1]
    assert [("metrics" in event) for event in events] == [False] * (len(events) - 1) + [True]
    assert bool(events[-1]["choices"]) is not include_usage


async def test_nothing_is_sent_before_the_first_token(house: House) -> None:
    gate, sent = asyncio.Event(), []
    house.sequencer.script = then(says("Hi"), gate, after=0)
    call = asyncio.create_task(
        house.browser.post("/v1/chat/completions", {**CHAT, "stream": True}, on_body=sent.append)
    )
    while not house.sequencer.requests:
        await asyncio.sleep(0)
    assert sent == []
    assert house.gateway.active == 1
    gate.set()
    reply = await call
    assert b'"role":"assistant"' in reply.sends[0]
    assert house.gateway.active == 0


async def test_many_choices_of_many_prompts(house: House) -> None:
    data = {**PROMPT, "prompt": ["a", "b"], "n": 2, "stream": True}
    reply = await house.browser.post("/v1/completions", data)
    texts = dict.fromkeys(range(4), "")
    for event in reply.events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == dict.fromkeys(range(4), "Hi")


# Failures.


async def test_a_failure_before_the_first_byte_has_its_status(house: House) -> None:
    house.sequencer.script = then(says("Hi"), Overloaded("full", retry_after=2.2), after=0)
    for stream in (False, True):
        reply = await house.browser.post("/v1/completions", {**PROMPT, "stream": stream})
        assert (reply.status, reply.error["code"]) == (503, "overloaded")
        assert reply.headers["retry-after"] == "3"
    assert house.sample("baton_errors_total", code="overloaded") == 2


async def test_what_killed_two_workers_is_not_to_be_tried_again(house: House) -> None:
    """Clients of OpenAI try a 500 again by themselves."""
    house.sequencer.script = then(says("Hi"), EngineFailed("It failed."), after=0)
    reply = await house.browser.post("/v1/completions", PROMPT)
    assert (reply.status, reply.error["code"]) == (500, "engine_error")
    assert reply.headers["x-should-retry"] == "false" and "retry-after" not in reply.headers


async def test_a_failure_after_the_first_byte_is_an_event_and_no_done(house: House) -> None:
    house.sequencer.script = then(says("Hi"), WorkerLost("The worker was lost."), after=1)
    reply = await house.browser.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert reply.status == 200
    assert reply.complete
    assert reply.events[-1]["error"]["code"] == "worker_lost"
    assert "data: [DONE]" not in reply.events


async def test_a_bug_tells_the_client_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.sequencer.script = then(says("Hi"), ZeroDivisionError("inner detail"), after=0)
    with caplog.at_level(logging.ERROR):
        reply = await house.browser.post("/v1/completions", PROMPT)
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert b"inner detail" not in reply.body
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.request_id == reply.headers["x-request-id"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [1, 100_000])
async def test_a_line_from_deep_inside_names_its_request(
    house: House, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    """Also one from the thread that a large body is read in."""
    house.gateway.limits = replace(house.gateway.limits, allow_unknown_fields=True)
    caplog.handler.setFormatter(JsonLines())
    data = {**PROMPT, "odd": "x" * length}
    headers = {"x-request-id": f"of-{length}"}
    assert (await house.browser.post("/v1/completions", data, headers=headers)).status == 200
    [line] = [json.loads(line) for line in caplog.text.splitlines() if "ignored" in line]
    assert (line["request_id"], line["fields"]) == (f"of-{length}", ["odd"])


async def test_a_bug_in_a_small_route_too(house: House) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("inner detail")

    house.pools.status = broken  # type: ignore[method-assign]
    reply = await house.browser.get("/status")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert b"inner detail" not in reply.body


async def test_the_request_timeout_is_504(house: House) -> None:
    house.gateway.request_timeout_s = 0.001
    house.sequencer.script = then(says("Hi"), asyncio.Event(), after=0)
    reply = await house.browser.post("/v1/completions", PROMPT)
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    assert house.sequencer.open == set()


# Clients that leave.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1])
async def test_a_client_that_leaves_ends_the_work(house: House, stream: bool, after: int) -> None:
    leave = asyncio.Event()
    house.sequencer.script = then(says("Hi"), asyncio.Event(), after=after)
    data = {**PROMPT, "prompt": ["a", "b"], "stream": stream}
    call = asyncio.create_task(house.browser.post("/v1/completions", data, leave=leave))
    while len(house.sequencer.requests) < 2:
        await asyncio.sleep(0)
    leave.set()
    await call
    assert house.sequencer.open == set()
    assert len(house.sequencer.cancelled) == 2
    assert house.sample("baton_requests_cancelled_total") == 1
    assert house.gateway.active == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_dropped_connection_ends_the_work(house: House, stream: bool) -> None:
    house.sequencer.script = then(says("Hi"), asyncio.Event(), after=1)
    body = json.dumps({**PROMPT, "stream": stream}).encode()
    async with served(house.gateway) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        if stream:
            await reader.readuntil(b"data: ")
        else:
            while not house.sequencer.requests:
                await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()
        await house.sequencer.idle.wait()
    assert len(house.sequencer.cancelled) == 1


# What comes in.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": ""}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-type": 'Application/JSON; charset="UTF-8"'}, 200),
        ({"content-encoding": "identity"}, 200),
    ],
)
async def test_content_type(house: House, headers: dict[str, str], status: int) -> None:
    reply = await house.browser.post("/v1/completions", PROMPT, headers=headers)
    assert reply.status == status
    if status == 415:
        assert reply.error["code"] == "unsupported_media_type"


async def test_a_declared_length_is_refused_before_reading(house: House) -> None:
    reply = await house.browser.call(
        "POST", "/v1/completions", headers={"content-length": str(300 << 20)}
    )
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert reply.headers["connection"] == "close"


async def test_a_body_is_counted_while_it_comes(house: House) -> None:
    limit = house.gateway.limits.max_body_bytes
    exact = json.dumps(PROMPT).encode().ljust(limit)
    assert (await house.browser.call("POST", "/v1/completions", body=[exact])).status == 200
    pieces = [bytes(1 << 20)] * 4 + [b"x"]
    reply = await house.browser.call("POST", "/v1/completions", body=pieces)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")


async def test_a_body_in_too_many_pieces(house: House) -> None:
    pieces = [b" "] * (MAX_BODY_PIECES + 1)
    assert (await house.browser.call("POST", "/v1/completions", body=pieces)).status == 413


async def test_a_body_that_does_not_come(house: House) -> None:
    house.gateway.body_timeout_s = 0.001
    async with served(house.gateway) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert (await reader.readline()).split()[1] == b"408"
        await reader.read()
        writer.close()
        await writer.wait_closed()


async def test_validation_answers_400_in_openais_shape(house: House) -> None:
    for body in (b"", b'{"model": ', b"[]", b'{"model": "baton-test", "prompt": 5}'):
        reply = await house.browser.call("POST", "/v1/completions", body=[body])
        assert reply.status == 400
        assert reply.error["type"] == "invalid_request_error"
    unknown = await house.browser.post("/v1/completions", {**PROMPT, "model": "../../x"})
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
    assert house.sequencer.requests == []
    assert (await house.browser.post("/v1/completions", PROMPT)).status == 200


@pytest.mark.parametrize(
    "hosts", [[], [b"x/?"], [b"a#"], [b"x/health?"], [b"a", b"b"], [b""], [b"a b"]]
)
async def test_odd_hosts(house: House, hosts: list[bytes]) -> None:
    headers = [(b"host", host) for host in hosts]
    reply = await house.browser.get("/live", headers={"host": ""}, more_headers=headers)
    assert (reply.status, reply.error["code"]) == (400, "invalid_host")


async def test_plain_hosts(house: House) -> None:
    for host in ("localhost:8000", "[::1]:8000", "a-b.example"):
        assert (await house.browser.get("/live", headers={"host": host})).status == 200
    old = await house.browser.get("/live", headers={"host": ""}, http_version="1.0")
    assert old.status == 200


async def test_too_many_or_too_large_headers(house: House) -> None:
    for headers in ([(b"x", b"y")] * 5000, [(b"x", b"y" * (64 << 10))]):
        reply = await house.browser.get("/live", more_headers=headers)
        assert (reply.status, reply.error["code"]) == (431, "headers_too_large")


async def test_a_body_with_two_ends(house: House) -> None:
    async with served(house.gateway) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        )
        answer = await reader.read()  # to the end: the connection is closed
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"ambiguous_body" in answer


async def test_request_ids(house: House) -> None:
    async def echoed(*labels: bytes) -> str:
        headers = [(b"x-request-id", label) for label in labels]
        reply = await house.browser.get("/live", more_headers=headers)
        return reply.headers["x-request-id"]

    assert await echoed(b"mine-1") == "mine-1"
    for labels in ((), (b"a", b"b"), (b"x" * 129,), (b"a b",), (b"\x01",), (b"\xe9",), (b"",)):
        ours = await echoed(*labels)
        assert len(ours) == 32
        assert int(ours, 16) >= 0


async def test_wrong_paths_and_methods(house: House) -> None:
    reply = await house.browser.get("/v1/nothing")
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    for method in ("GET", "TRACE", "PUT", "BREW"):
        reply = await house.browser.call(method, "/v1/completions")
        assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
        assert reply.headers["allow"] == "POST"
    preflight = await house.browser.call(
        "OPTIONS", "/v1/completions", headers={"origin": "http://evil.example"}
    )
    assert preflight.status == 405
    assert not any(name.startswith("access-control") for name in preflight.headers)
    assert (await house.browser.get("/v1/models/")).status == 404


# Keys.


async def test_every_route_but_two_needs_the_key(locked: House) -> None:
    def added_in_haste() -> str:
        return "secret"

    locked.app.add_api_route("/haste", added_in_haste, methods=["GET", "DELETE"])
    stranger, opened, routes = Browser(locked.app), set(), 0
    for route in locked.app.routes:
        assert isinstance(route, Route), "a kind of route that nobody has thought of"
        for method in route.methods or ():
            routes += 1
            reply = await stranger.call(method, route.path.replace("{name:path}", MODEL))
            assert reply.status in (200, 401)
            if reply.status == 200:
                opened.add(route.path)
    assert opened == {"/live", "/ready"}
    assert routes >= 16


async def test_keys_over_http(locked: House) -> None:
    stranger = Browser(locked.app)
    reply = await stranger.get("/v1/models")
    assert (reply.error["code"], reply.headers["www-authenticate"]) == ("missing_api_key", "Bearer")
    reply = await stranger.get("/v1/models", headers={"authorization": "Bearer wrong"})
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert (await locked.browser.get("/v1/models")).status == 200


async def test_a_stranger_is_refused_before_his_body_is_read(locked: House) -> None:
    reply = await Browser(locked.app).call("POST", "/v1/completions", body=[b"x"] * 100_000)
    assert reply.status == 401


async def test_the_key_salts_the_prefix_cache(locked: House) -> None:
    await locked.browser.post("/v1/completions", PROMPT)
    await locked.browser.post("/v1/completions", {**PROMPT, "cache_salt": "mine"})
    one, two = (request.salt for request in locked.sequencer.requests)
    assert one != two
    assert b"" not in (one, two)


# Small routes.


async def test_health_follows_the_pools(house: House) -> None:
    reply = await house.browser.get("/health")
    assert (reply.status, reply.body) == (200, b"")
    house.pools.become(False)
    for path in ("/health", "/ready"):
        reply = await house.browser.get(path)
        assert (reply.status, reply.error["code"]) == (503, NoWorkers.code)
        assert reply.headers["retry-after"] == "1"
    assert (await house.browser.get("/live")).status == 200


async def test_models(house: House) -> None:
    card = (await house.browser.get("/v1/models")).json()["data"][0]
    assert (card["id"], card["root"], card["max_model_len"]) == (MODEL, MODEL, 200)
    assert (await house.browser.get(f"/v1/models/{MODEL}")).json() == card
    reply = await house.browser.get("/v1/models/org/other")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


async def test_tokenize_and_back(house: House) -> None:
    data = {"model": MODEL, "prompt": "h€", "return_token_strs": True}
    reply = (await house.browser.post("/tokenize", data)).json()
    assert reply["tokens"] == list("h€".encode())
    assert (reply["count"], reply["max_model_len"], len(reply["token_strs"])) == (4, 200, 4)
    back = await house.browser.post("/detokenize", {"model": MODEL, "tokens": reply["tokens"]})
    assert back.json() == {"prompt": "h€"}
    chat = await house.browser.post("/tokenize", CHAT)
    assert bytes(chat.json()["tokens"]) == b"user: Q\nassistant: "


async def test_small_answers(house: House) -> None:
    assert (await house.browser.get("/version")).json() == {"version": "0.0.test"}
    assert (await house.browser.get("/load")).json() == {"server_load": 0}
    status = {"ready": True, "workers": []}
    assert (await house.browser.get("/status")).json() == status
    house.gateway.siblings = Siblings(8000, ("127.0.0.1:5", "127.0.0.1:6"), 1)
    status |= {"gateway": "127.0.0.1:6", "gateways": ["127.0.0.1:5", "127.0.0.1:6"]}
    assert (await house.browser.get("/status")).json() == status
    document = (await house.browser.get("/openapi.json")).json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "max_tokens" in body["content"]["application/json"]["schema"]["properties"]


async def test_the_page_for_prometheus(house: House) -> None:
    await house.browser.post("/v1/completions", PROMPT)
    await house.browser.get("/no/such/path/5f3a")
    reply = await house.browser.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    page = reply.body.decode()
    assert f'vllm:generation_tokens_total{{model_name="{MODEL}"}} 3.0' in page
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in page
    assert 'http_requests_total{handler="none",method="GET",status="4xx"} 1.0' in page
    assert "5f3a" not in page


# Clients of the field.


async def test_the_openai_client(house: House) -> None:
    async with (
        served(house.gateway) as address,
        openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Q"}],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "Hi"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        whole = await client.completions.create(model=MODEL, prompt="Q", logprobs=1)
        assert whole.choices[0].text == "Hi"
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.text_offset == [0, 1, 2]
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_the_openai_client_raises_on_an_error_event(house: House) -> None:
    house.sequencer.script = then(says("Hi"), WorkerLost("The worker was lost."), after=1)
    async with (
        served(house.gateway) as address,
        openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.completions.create(model=MODEL, prompt="Q", stream=True)
        with pytest.raises(openai.APIError, match="The worker was lost"):
            async for _ in stream:
                pass


async def test_an_http_1_0_client_gets_no_chunked_coding(house: House) -> None:
    body = json.dumps({**PROMPT, "stream": True}).encode()
    async with served(house.gateway) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


async def test_text_that_looks_like_an_event_is_text(house: House) -> None:
    text = 'a\n\ndata: [DONE]\r\n\r\n: b\n\nevent: error\ndata: {"error": {}}\n\n\u2028'
    house.sequencer.script = says(text)
    for path, data in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        reply = await house.browser.post(path, {**data, "max_tokens": 150, "stream": True})
        *events, end = reply.events
        assert end == "data: [DONE]" and reply.body.count(b"\ndata: [DONE]") == 1
        choices = [event["choices"][0] for event in events]
        said = [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]
        assert "".join(said) == text


async def test_the_end_token_is_no_text(house: House) -> None:
    reply = await house.browser.post(
        "/v1/completions", {**PROMPT, "skip_special_tokens": False, "return_token_ids": True}
    )
    choice = reply.json()["choices"][0]
    assert (choice["text"], choice["token_ids"][-1]) == ("Hi", END)


# Large bodies.


@pytest.mark.parametrize("path", ["/v1/completions", "/detokenize"])
async def test_a_large_body_is_a_threads_work(house: House, path: str) -> None:
    """While one is parsed, the event loop serves others."""
    free = threading.Event()
    threads = ThreadPoolExecutor(1)
    threads.submit(free.wait)
    house.gateway.text.stop()
    house.gateway.text = TextPool(house.gateway.tokenizer, threads)
    ids = [65] * 50_000
    asked = {**PROMPT, "prompt": ids} if path == "/v1/completions" else {"tokens": ids}
    large = asyncio.create_task(house.browser.post(path, asked))
    for _ in range(3):
        assert (await house.browser.get("/live")).status == 200
    assert not large.done()
    free.set()
    reply = await large
    if path == "/detokenize":
        assert reply.json() == {"prompt": "A" * len(ids)}
    else:
        assert reply.error["code"] == "context_length_exceeded"
