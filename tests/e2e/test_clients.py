"""What users hold in their hands: the openai package, gRPC with and without our stubs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import openai
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.wire import inference_pb2 as wire
from tests.e2e.cluster import Cluster

QUESTION = "What is a landing?"
TEXT = "Baton serves large language models on two"


@pytest.fixture
def client(tiny: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def channel(tiny: Cluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(tiny.grpc) as channel:
        yield channel


def ask_openai(client: openai.OpenAI, **fields: object) -> str:
    answer = client.chat.completions.create(
        model="baton-tiny",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        **fields,  # type: ignore[call-overload]
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text: str = answer.choices[0].message.content
    return text


def test_openai_chat(client: openai.OpenAI) -> None:
    assert "landing" in ask_openai(client).lower()


def test_openai_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="baton-tiny",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, last = chunks
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == ask_openai(client)
    assert parts[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens > len(text.split())
    assert len(parts) > 10, "it came in pieces"


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["baton-tiny"]
    assert client.models.retrieve("baton-tiny").id == "baton-tiny"


def test_openai_completion_with_echo(client: openai.OpenAI) -> None:
    plain, echoed = (
        client.completions.create(
            model="baton-tiny", prompt=TEXT, max_tokens=8, temperature=0, echo=echo
        )
        .choices[0]
        .text
        for echo in (False, True)
    )
    assert plain and echoed == TEXT + plain


def test_openai_completion_with_logprobs(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(
        model="baton-tiny", prompt=TEXT, max_tokens=8, temperature=0, logprobs=3
    ).choices
    found = choice.logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs
    assert "".join(found.tokens) == choice.text
    assert all(value is not None and value <= 0 for value in found.token_logprobs)
    for token, value, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert len(top) >= 3 and top[token] == value == max(top.values()), "greedy takes the best"


def test_openai_chat_logprobs(client: openai.OpenAI) -> None:
    [choice] = client.chat.completions.create(
        model="baton-tiny",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=2,
    ).choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 6
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_openai_n_and_seed(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(
            model="baton-tiny", prompt=TEXT, max_tokens=12, temperature=1.5, n=3, seed=5
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = ask()
    assert first == ask() and len(set(first)) == 3


def test_openai_stop(client: openai.OpenAI) -> None:
    """The stop string spans tokens, and no part of it leaks into the stream."""
    whole = ask_openai(client)
    stop = whole[37:43]
    fields = {
        "model": "baton-tiny",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "stop": [stop, "never said"],
    }
    [choice] = client.chat.completions.create(**fields).choices
    assert choice.message.content == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.model_extra is not None and choice.model_extra["stop_reason"] == stop
    chunks = client.chat.completions.create(**fields, stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole[: whole.index(stop)]


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt=TEXT)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="baton-tiny", prompt=TEXT, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="baton-tiny", prompt=[1] * 5000, stream=True)
    assert too_long.value.code == "context_length_exceeded"


def generate(channel: grpc.Channel) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(
        "/baton.v1.Inference/Generate",
        request_serializer=wire.GenerateRequest.SerializeToString,
        response_deserializer=wire.GenerateResponse.FromString,
    )


def generate_stream(channel: grpc.Channel) -> grpc.UnaryStreamMultiCallable:
    return channel.unary_stream(
        "/baton.v1.Inference/GenerateStream",
        request_serializer=wire.GenerateRequest.SerializeToString,
        response_deserializer=wire.GenerateResponse.FromString,
    )


def question() -> wire.GenerateRequest:
    messages = wire.Messages(messages=[wire.Message(role="user", content=QUESTION)])
    return wire.GenerateRequest(
        model="baton-tiny", messages=messages, temperature=0, return_timeline=True
    )


def test_grpc_says_what_http_says(channel: grpc.Channel, client: openai.OpenAI) -> None:
    answer = generate(channel)(question(), timeout=30)
    [choice] = answer.choices
    assert choice.text == ask_openai(client) and choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
    assert answer.metrics.prefill_worker == "prefill-0"
    assert answer.metrics.decode_worker == "decode-0"


def test_grpc_stream(channel: grpc.Channel, client: openai.OpenAI) -> None:
    *parts, last = generate_stream(channel)(question(), timeout=30)
    choices = [choice for part in parts for choice in part.choices]
    assert "".join(choice.text for choice in choices) == ask_openai(client)
    assert [choice.finish_reason for choice in choices][-2:] == ["", "stop"]
    assert not last.choices and last.usage.completion_tokens > 10
    assert len(parts) > 10, "it came in pieces"


def test_grpc_token_ids(channel: grpc.Channel) -> None:
    request = wire.GenerateRequest(
        model="baton-tiny",
        prompt_token_ids=wire.TokenIds(ids=[5, 6, 7]),
        max_tokens=4,
        ignore_eos=True,
        return_token_ids=True,
    )
    [choice] = generate(channel)(request, timeout=30).choices
    assert len(choice.token_ids) == 4 and choice.finish_reason == "length"


def test_grpc_errors(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as unknown:
        generate(channel)(wire.GenerateRequest(model="gpt-4", prompt="x"), timeout=30)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert ("baton-code", "model_not_found") in [
        tuple(m) for m in unknown.value.trailing_metadata()
    ]
    wrong = wire.GenerateRequest(model="baton-tiny", prompt="x", temperature=9)
    with pytest.raises(grpc.RpcError) as invalid:
        list(generate_stream(channel)(wrong, timeout=30))
    assert invalid.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("baton-param", "temperature") in [tuple(m) for m in invalid.value.trailing_metadata()]


def test_grpc_health(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "baton.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health.Check(health_pb2.HealthCheckRequest(service="no.such"), timeout=10)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_grpc_reflection(channel: grpc.Channel) -> None:
    """Enough for a generic client to call us without our files."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Inference"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(asked), timeout=10)
    names = {service.name for service in listed.list_services_response.service}
    assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names
    [data] = described.file_descriptor_response.file_descriptor_proto
    file = FileDescriptorProto.FromString(data)
    assert [m.name for m in file.service[0].method] == ["Generate", "GenerateStream"]


def test_baton_status_and_chat(tiny: Cluster, client: openai.OpenAI) -> None:
    status = tiny.command("status", "--url", tiny.url, "--json")
    assert status.wait() == 0, status.stderr
    names = [worker["name"] for worker in json.loads(status.stdout)["workers"]]
    assert names == ["decode-0", "prefill-0"]
    table = tiny.command("status", "--url", tiny.url)
    assert table.wait() == 0
    assert "decode-0" in table.stdout and "model baton-tiny: ready" in table.stdout
    chat = tiny.command("chat", "--url", tiny.url, QUESTION)
    assert chat.wait() == 0 and chat.stdout.strip() == ask_openai(client)
