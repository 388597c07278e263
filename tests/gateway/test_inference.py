"""The gRPC door, over a real channel: the same answers and refusals as HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.errors import BadRequest, Overloaded, WorkerLost
from cluster.wire import inference_pb2 as wire
from gateway import inference, validate
from gateway.keys import Keys
from tests.gateway.fakes import MODEL, says, then
from tests.gateway.line import Line, ask, conversation, line_to, refusal

Code = grpc.StatusCode


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    async with line_to(tmp_path) as line:
        yield line


async def test_the_whole_answer(line: Line) -> None:
    answer = await line.generate(ask(return_token_ids=True, logprobs=1, return_timeline=True))
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("Hi", "stop")
    assert choice.WhichOneof("stop_reason") is None
    assert list(choice.token_ids[:2]) == [ord("H"), ord("i")]
    first = choice.logprobs[0]
    assert (first.token, first.bytes, first.logprob) == ("H", b"H", -0.5)
    assert [other.token_id for other in first.top_logprobs] == [ord("H")]
    assert (answer.created, answer.model) == (123, MODEL)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 3)
    assert answer.usage.total_tokens == 4
    assert answer.metrics.timeline_ms["landing"] == 2.0
    assert answer.metrics.decode_worker == "d0"


async def test_the_answer_as_it_grows(line: Line) -> None:
    messages = [message async for message in line.stream(ask(stop=["i"]))]
    assert all(message.HasField("usage") is (message is messages[-1]) for message in messages)
    assert not messages[-1].choices
    choices = [choice for message in messages for choice in message.choices]
    assert "".join(choice.text for choice in choices) == "H"
    assert (choices[-1].finish_reason, choices[-1].stop_string) == ("stop", "i")
    assert len({message.id for message in messages}) == 1
    assert messages[-1].usage.completion_tokens == 2


async def test_ids_and_conversations(line: Line) -> None:
    await line.generate(ask(prompt_token_ids=wire.TokenIds(ids=[65, 66])))
    await line.generate(ask(messages=conversation("Q")))
    ids, chat = (request.tokens for request in line.sequencer.requests)
    assert ids == (65, 66)
    assert bytes(chat) == b"user: Q\nassistant: "


async def test_a_stop_token_that_was_named(line: Line) -> None:
    line.sequencer.script = says("Hi", stop_token=256)
    answer = await line.generate(ask(stop_token_ids=[256]))
    assert answer.choices[0].stop_token_id == 256


def test_what_is_set_becomes_the_http_body_and_nothing_else() -> None:
    data = ask(
        max_tokens=0,
        temperature=0.0,
        ignore_eos=False,
        logit_bias={5: -1.0},
        stop=["a", "b"],
        prompt_token_ids=wire.TokenIds(ids=[1]),
    ).SerializeToString()
    assert inference.to_fields(data) == (
        "completion",
        {
            "model": MODEL,
            "prompt": [1],
            "max_tokens": 0,
            "temperature": 0.0,
            "ignore_eos": False,
            "logit_bias": {"5": -1.0},
            "stop": ["a", "b"],
        },
    )
    kind, fields = inference.to_fields(
        ask(messages=conversation("x"), logprobs=3).SerializeToString()
    )
    assert kind == "chat"
    assert fields["messages"] == [{"role": "user", "content": "x"}]
    assert (fields["logprobs"], fields["top_logprobs"]) == (True, 3)


def test_every_field_of_the_message_is_one_the_validator_knows(line: Line) -> None:
    """A field that only one door has would be a rule that only one door checks."""
    own = {"prompt_token_ids", "messages"}
    for descriptor in wire.GenerateRequest.DESCRIPTOR.fields:
        known = validate.CompletionBody.model_fields | validate.ChatBody.model_fields
        assert descriptor.name in own | known.keys(), descriptor.name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt_token_ids": wire.TokenIds(ids=[257])}, "prompt"),
        ({"prompt_token_ids": wire.TokenIds(ids=[-1])}, "prompt"),
        ({"prompt_token_ids": wire.TokenIds()}, "prompt"),
        ({"messages": wire.Messages()}, "messages"),
        ({"messages": wire.Messages(messages=[wire.Message(role="root")])}, "messages.0.role"),
        ({"messages": conversation("x"), "echo": True}, "echo"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"model": ""}, "model"),
    ],
)
async def test_fields_outside_their_limits(line: Line, fields: dict[str, Any], param: str) -> None:
    error = await refusal(line.generate(ask(**fields)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["baton-param"] == param
    assert line.sequencer.requests == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff\xff\xff", "invalid_message"),
        (b"\x0a\x02\xff\xfe", "invalid_message"),  # model is not UTF-8
        (b"\x0a\xff\xff\xff\xff\x0f", "invalid_message"),  # longer than the message
        (b"\xa2\x06\x01x", "unknown_parameter"),  # field 100
        (b"\x0b" * 10_000, "invalid_message"),  # groups without end
    ],
)
async def test_malformed_messages(line: Line, data: bytes, code: str) -> None:
    error = await refusal(line.raw(data))
    assert error.code() is Code.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["baton-code"] == code
    assert (await line.generate(ask())).choices[0].text == "Hi"


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0b" * 10_000])
async def test_malformed_messages_to_probes(
    line: Line, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """They ask for no key: whoever sends such must not fill the log with it."""
    health, mirror = f"/{inference.HEALTH}/", "/grpc.reflection.v1alpha.ServerReflection/"

    async def one() -> AsyncIterator[bytes]:
        yield data

    for call in (
        line.channel.unary_unary(health + "Check")(data),
        line.channel.unary_stream(health + "Watch")(data).read(),
        line.channel.stream_stream(mirror + "ServerReflectionInfo")(one()).read(),
    ):
        assert (await refusal(call)).code() is Code.INVALID_ARGUMENT
    unknown = line.channel.unary_unary(health + "List")(b"")
    assert (await refusal(unknown)).code() is Code.UNIMPLEMENTED
    assert not [record for record in caplog.records if record.exc_info]


def test_unknown_fields_inside_are_seen_too() -> None:
    message = ask(messages=conversation("x"))
    message.messages.messages[0].MergeFromString(b"\xa2\x06\x01x")
    with pytest.raises(BadRequest):
        inference.to_fields(message.SerializeToString())
    assert inference.to_fields(message.SerializeToString(), allow_unknown=True)[0] == "chat"


@pytest.mark.parametrize(
    ("failure", "code", "baton"),
    [
        (Overloaded("full"), Code.RESOURCE_EXHAUSTED, "overloaded"),
        (WorkerLost("lost"), Code.UNAVAILABLE, "worker_lost"),
        (ZeroDivisionError("inner detail"), Code.INTERNAL, "internal_error"),
    ],
)
@pytest.mark.parametrize("after", [0, 1])
async def test_failures_have_a_status(
    line: Line, failure: Exception, code: Code, baton: str, after: int
) -> None:
    line.sequencer.script = then(says("Hi"), failure, after=after)
    error = await refusal(line.generate(ask(), metadata=(("x-request-id", "mine"),)))
    assert error.code() is code
    assert "inner" not in (error.details() or "")
    trailing = dict(error.trailing_metadata())
    assert (trailing["baton-code"], trailing["x-request-id"]) == (baton, "mine")
    call = line.stream(ask())
    if after:
        assert (await call.read()).choices[0].text == "H"
    assert (await refusal(call.read())).code() is code


async def test_unknown_model_and_method(line: Line) -> None:
    assert (await refusal(line.generate(ask(model="other")))).code() is Code.NOT_FOUND
    call = line.channel.unary_unary(f"/{inference.SERVICE}/Other")
    assert (await refusal(call(b""))).code() is Code.UNIMPLEMENTED


async def test_keys(line: Line) -> None:
    line.gateway.keys = Keys(["secret"])
    for metadata in ((), (("authorization", "Bearer wrong"),)):
        error = await refusal(line.generate(ask(), metadata=metadata))
        assert error.code() is Code.UNAUTHENTICATED
    await line.generate(ask(), metadata=(("authorization", "Bearer secret"),))
    assert line.sequencer.requests[0].salt != b""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1])
async def test_a_client_that_cancels_ends_the_work(line: Line, stream: bool, after: int) -> None:
    line.sequencer.script = then(says("Hi"), asyncio.Event(), after=after)
    call = (line.stream if stream else line.generate)(ask())
    if stream and after:
        await call.read()
    else:
        while not line.sequencer.requests:
            await asyncio.sleep(0)
    call.cancel()
    await line.sequencer.idle.wait()
    assert len(line.sequencer.cancelled) == 1


async def test_the_deadline_ends_the_work(line: Line) -> None:
    line.sequencer.script = then(says("Hi"), asyncio.Event(), after=1)
    error = await refusal(line.generate(ask(), timeout=0.05))
    assert error.code() is Code.DEADLINE_EXCEEDED
    await line.sequencer.idle.wait()


async def test_a_deadline_that_has_passed_reaches_no_worker(line: Line) -> None:
    error = await refusal(line.generate(ask(), timeout=-1.0))
    assert error.code() is Code.DEADLINE_EXCEEDED
    assert line.sequencer.requests == []


async def test_without_a_deadline_the_servers_own_holds(line: Line) -> None:
    line.gateway.request_timeout_s = 0.01
    line.sequencer.script = then(says("Hi"), asyncio.Event(), after=1)
    error = await refusal(line.generate(ask()))
    assert error.code() is Code.DEADLINE_EXCEEDED
    assert dict(error.trailing_metadata())["baton-code"] == "deadline_exceeded"


async def test_health_follows_the_pools(line: Line) -> None:
    stub = health_pb2_grpc.HealthStub(line.channel)
    status = health_pb2.HealthCheckResponse
    for service in ("", inference.SERVICE):
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await stub.Check(request)).status == status.SERVING
    unknown = health_pb2.HealthCheckRequest(service="other")
    assert (await refusal(stub.Check(unknown))).code() is Code.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == status.SERVING
    line.pools.become(False)
    assert (await watch.read()).status == status.NOT_SERVING
    line.pools.become(True)
    assert (await watch.read()).status == status.SERVING
    watch.cancel()


async def test_reflection_names_the_services(line: Line) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(line.channel)
    request: Message = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo()
    await call.write(request)
    await call.done_writing()
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {inference.SERVICE, inference.HEALTH} <= names


async def test_a_client_that_does_not_read_loses_its_call(line: Line) -> None:
    """And holds up no more than its own answer until then."""
    fetched = 0

    def endless(request: Any) -> Any:
        nonlocal fetched
        for step in says("x" * 300_000, finish="length")(request):
            fetched += 1
            yield step

    line.sequencer.script = endless
    line.gateway.limits = replace(
        line.gateway.limits, max_model_len=500_000, max_prompt_tokens=500_000
    )
    line.gateway.write_timeout_s = 0.2
    call = line.stream(ask(max_tokens=300_000))
    await call.read()
    async with asyncio.timeout(30):
        await line.sequencer.idle.wait()
        while line.gateway.active:
            await asyncio.sleep(0.01)
    assert fetched < 200_000  # what gRPC buffers grows with the speed that it has seen
    assert len(line.sequencer.cancelled) == 1
    call.cancel()
