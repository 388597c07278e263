"""The gRPC door and the catalogue: what a message can hold, and rows G1 to G11."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import BatonError, Draining, NoWorkers, Overloaded, RateLimited
from cluster.rpc import MAX_MESSAGE_BYTES
from cluster.wire import inference_pb2 as wire
from gateway import inference
from gateway.ask import Limits
from gateway.keys import Keys
from tests.gateway.catalogue import CHAT, INSIDES, Case, cases
from tests.gateway.fakes import MODEL, says, then
from tests.gateway.line import Line, ask, line_to, refusal
from tests.gateway.transport import ALIAS, KEY, KEY_FILE, NARROW_KEY

Code = grpc.StatusCode
CODES = {200: None, 400: Code.INVALID_ARGUMENT, 404: Code.NOT_FOUND}
LIMITS = Limits((MODEL, ALIAS), 257, 200, 199)
OPEN = {f"/{inference.HEALTH}/", "/grpc.reflection.v1alpha.ServerReflection/"}


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    async with line_to(tmp_path) as line:
        line.gateway.limits = LIMITS
        yield line


# G5: the rows about fields.

FIELDS = wire.GenerateRequest.DESCRIPTOR.fields_by_name
KINDS: dict[int, tuple[type, ...]] = {
    FieldDescriptor.TYPE_INT64: (int,),
    FieldDescriptor.TYPE_DOUBLE: (int, float),
    FieldDescriptor.TYPE_BOOL: (bool,),
    FieldDescriptor.TYPE_STRING: (str,),
}


def as_message(case: Case) -> wire.GenerateRequest | None:
    """The same call as a message, if a message can say it."""
    if isinstance(case.body, bytes) or case.body.get("model") == "":
        return None
    if case.endpoint == CHAT and ("logprobs" in case.body or "messages" not in case.body):
        return None  # means another thing here
    try:
        whole = {name: of(FIELDS[name], value) for name, value in case.body.items()}
        if "prompt" in whole and isinstance(whole["prompt"], wire.TokenIds):
            whole["prompt_token_ids"] = whole.pop("prompt")
        return wire.GenerateRequest(**whole)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def of(field: FieldDescriptor, value: Any) -> Any:
    """A field's value. Raises one of what `as_message` expects if there is none such."""
    if field.name == "prompt" and isinstance(value, list):
        return wire.TokenIds(ids=[exactly(KINDS[FieldDescriptor.TYPE_INT64], id) for id in value])
    if field.name == "messages":
        # A text that is missing is an empty one to protobuf.
        parts = [{**part, "content": part["content"]} for part in exactly((list,), value)]
        messages = [
            wire.Message(**{name: exactly((str,), text) for name, text in part.items()})
            for part in parts
        ]
        return wire.Messages(messages=messages)
    if field.name == "logit_bias":
        if any(str(int(key)) != key for key in value):
            raise ValueError(value)
        return {int(key): exactly((int, float), bias) for key, bias in value.items()}
    if field.name in ("stop", "stop_token_ids"):
        return [exactly(KINDS[field.type], one) for one in exactly((list,), value)]
    return exactly(KINDS[field.type], value)


def exactly(kinds: tuple[type, ...], value: Any) -> Any:
    if type(value) not in kinds:
        raise TypeError(value)
    return value


def details(error: grpc.aio.AioRpcError) -> Iterator[Any]:
    """The google.rpc messages that an error carries, after a check that it says what they say."""
    for name, value in error.trailing_metadata():
        if name == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            for packed in status.details:
                kind = packed.TypeName().rpartition(".")[2]
                detail = getattr(error_details_pb2, kind)()
                assert packed.Unpack(detail)
                yield detail


async def test_every_field_has_over_grpc_the_rule_that_it_has_over_http(line: Line) -> None:
    rows = set()
    for case in cases(LIMITS):
        message = as_message(case)
        if message is None:
            continue
        rows.add(case.row)
        if case.status == 200:
            await line.generate(message)
            line.sequencer.requests.clear()
            continue
        error = await refusal(line.generate(message))
        assert error.code() is CODES[case.status], str(case)
        trailing = dict(error.trailing_metadata())
        assert trailing["baton-code"] == case.code, str(case)
        assert trailing.get("baton-param") == case.param, str(case)
        [found] = details(error)
        [violation] = found.field_violations
        assert (violation.field, violation.reason) == (case.param, case.code.upper()), str(case)
        assert line.sequencer.requests == [], str(case)
        assert not INSIDES.search(error.details() or ""), str(case)
    # The rest is about JSON, or about fields and types that no message has.
    assert rows >= {10, 20, 21, 23, 24, 25, 26, 29, 30, 34, 35, 37, 38, 39, 40, 41, 42, 43, 44, 45}
    assert rows >= {46, 49, 50, 51, 52, 53, 54, 66}


# G2, G6, G9, G10: what is around a message.


@pytest.fixture
def locked(line: Line, tmp_path: Path) -> Line:
    file = tmp_path / "keys.json"
    file.write_text(KEY_FILE)
    line.gateway.keys = Keys(file=file)
    return line


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@pytest.mark.parametrize(
    ("metadata", "code", "said"),
    [
        ((), Code.UNAUTHENTICATED, "missing_api_key"),
        ((("authorization", KEY),), Code.UNAUTHENTICATED, "missing_api_key"),
        (bearer("wrong"), Code.UNAUTHENTICATED, "invalid_api_key"),
        (bearer(KEY) * 2, Code.UNAUTHENTICATED, "invalid_api_key"),
        (bearer(NARROW_KEY), Code.PERMISSION_DENIED, "model_forbidden"),
    ],
)
async def test_who_may_not(locked: Line, metadata: Any, code: Code, said: str) -> None:
    for call in (locked.generate(ask(), metadata=metadata), first(locked, metadata)):
        error = await refusal(call)
        assert (error.code(), dict(error.trailing_metadata())["baton-code"]) == (code, said)
    assert locked.sequencer.requests == []


async def first(line: Line, metadata: Any) -> wire.GenerateResponse:
    return await line.stream(ask(), metadata=metadata).read()


async def test_who_may(locked: Line) -> None:
    await locked.generate(ask(), metadata=bearer(KEY))
    await locked.generate(ask(model=ALIAS), metadata=bearer(NARROW_KEY))
    one, two = locked.sequencer.requests
    assert one.salt != two.salt


async def test_every_method_but_probes_needs_the_key(locked: Line) -> None:
    """Whatever is registered is called; a method that is added unguarded shows here."""
    registered: list[str] = []

    class Server:
        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            for handler in handlers:
                registered.extend(handler._method_handlers)

        def add_registered_method_handlers(self, service: str, methods: Any) -> None:
            registered.extend(f"/{service}/{name}" for name in methods)

    server: Any = Server()
    inference.add_to_server(server, locked.gateway)
    for method in set(registered):
        if not method.startswith(tuple(OPEN)):
            error = await refusal(locked.channel.unary_stream(method)(b"").read())
            assert error.code() is Code.UNAUTHENTICATED, method
    assert len(set(registered)) >= 5


async def test_a_message_beyond_the_limit(line: Line) -> None:
    error = await refusal(line.raw(b"x" * (MAX_MESSAGE_BYTES + 1)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    await line.generate(ask())


@pytest.mark.parametrize(
    ("failure", "code", "seconds"),
    [
        (Overloaded("full", retry_after=2.5), Code.RESOURCE_EXHAUSTED, 3),
        (RateLimited("slow down", retry_after=7), Code.RESOURCE_EXHAUSTED, 7),
        (Draining("ending"), Code.UNAVAILABLE, 1),
        (NoWorkers("none"), Code.UNAVAILABLE, 1),
    ],
)
async def test_when_to_come_back(line: Line, failure: BatonError, code: Code, seconds: int) -> None:
    line.sequencer.script = then(says("Hi"), failure, after=0)
    error = await refusal(line.generate(ask()))
    assert error.code() is code
    assert dict(error.trailing_metadata())["retry-after"] == str(seconds)
    [info] = details(error)
    assert info.retry_delay.seconds == seconds


async def test_odd_metadata(line: Line) -> None:
    error = await refusal(line.generate(ask(), metadata=(("x-large", "y" * 20_000),)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    for odd in (
        ("junk-bin", b"\xff\x00"),
        ("x-request-id", "x" * 200),
        ("authorization-bin", b"x"),
    ):
        assert (await line.generate(ask(), metadata=(odd,))).choices[0].text == "Hi"


# G11: floods below the calls.

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 1, 3, 4, 6, 7


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(**fields: bytes) -> bytes:
    """HPACK without its tables: literal fields alone."""
    whole = {b":method": b"POST", b":scheme": b"http", b":authority": b"x", b"te": b"trailers"}
    whole |= {b":path": fields["path"], b"content-type": b"application/grpc"}
    pseudo_first = sorted(whole.items(), key=lambda item: not item[0].startswith(b":"))
    return b"".join(bytes((0, len(n))) + n + bytes((len(v),)) + v for n, v in pseudo_first)


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    """Until the other side hangs up."""
    try:
        while True:
            head = await reader.readexactly(9)
            yield head[3], await reader.readexactly(int.from_bytes(head[:3], "big"))
    except (asyncio.IncompleteReadError, ConnectionError):
        return


async def test_a_flood_of_pings(line: Line) -> None:
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        pings = b"".join(frame(PING, payload=struct.pack(">Q", count)) for count in range(1000))
        writer.write(PREFACE + frame(SETTINGS) + pings)
        ends = [payload async for kind, payload in frames(reader) if kind == GOAWAY]
        writer.close()
    assert not ends or b"too_many_pings" in ends[-1]
    assert (await line.generate(ask())).choices[0].text == "Hi"


async def test_streams_that_are_opened_and_reset(line: Line) -> None:
    """Rapid Reset (CVE-2023-44487): nothing is done for them, and others are served meanwhile."""
    path = f"/{inference.SERVICE}/Generate".encode()
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        draining = asyncio.create_task(exhaust(reader))
        writer.write(PREFACE + frame(SETTINGS))
        for stream in range(1, 20_001, 2):
            opened = frame(HEADERS, stream, headers(path=path), flags=4)
            writer.write(opened + frame(RST_STREAM, stream, struct.pack(">I", 8)))
            if stream % 2001 == 0:
                assert (await line.generate(ask())).choices[0].text == "Hi"
                with suppress(ConnectionError):  # it may be shown out
                    await writer.drain()
        assert (await line.generate(ask())).choices[0].text == "Hi"
        writer.close()
        await draining
    assert len(line.sequencer.requests) < 20  # our own calls


async def exhaust(reader: asyncio.StreamReader) -> None:
    async for _ in frames(reader):
        pass


async def test_a_log_line_per_call_and_no_prompt(
    locked: Line, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[dict[str, Any]]:
        return [vars(record) for record in caplog.records if record.message == "grpc request"]

    with caplog.at_level(logging.DEBUG):
        await locked.generate(ask(prompt="zebra"), metadata=bearer(KEY))
        await refusal(locked.generate(ask(prompt="zebra")))
        async with asyncio.timeout(10):
            while len(lines()) < 2:  # it is written after the client was told
                await asyncio.sleep(0)
    assert [line["code"] for line in lines()] == ["ok", "missing_api_key"]
    assert all(len(line["request_id"]) == 32 for line in lines())
    assert "zebra" not in json.dumps([vars(record) for record in caplog.records], default=str)
