"""Who is refused for asking too much, over HTTP and gRPC: quotas, priorities, a full house."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.errors import Overloaded
from gateway.app import create_app
from gateway.fair import Standing
from gateway.gateway import Gateway
from gateway.keys import Keys
from gateway.quota import Quotas
from gateway.tokens import Tokenizer
from tests.gateway.fakes import MODEL, Browser, FakeSequencer, Reply, make_gateway, says
from tests.gateway.line import ask, line_to

PROMPT = {"model": MODEL, "prompt": "Q", "max_tokens": 50}
LIMITS = {"requests_per_minute": 3, "tokens_per_minute": 200, "weight": 2.0, "priority": -1}


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class House:
    """A gateway with the keys `limited`, of a tenant with LIMITS, and `free`, without any."""

    def __init__(self, directory: Path) -> None:
        file = directory / "keys.yaml"
        keys: list[dict[str, Any]] = [
            {"key_sha256": digest("limited"), "tenant": "l", **LIMITS},
            {"key_sha256": digest("second"), "tenant": "l", **LIMITS},
            {"key_sha256": digest("free"), "tenant": "f"},
            {"key_sha256": digest("batch"), "tenant": "b", "priority": 5},
        ]
        file.write_text(json.dumps(keys))
        self.time = Time()
        self.sequencer = FakeSequencer(says("Hi"))
        self.gateway: Gateway = make_gateway(directory, self.sequencer)
        self.gateway.keys = Keys(file=file)
        self.gateway.quotas = Quotas(self.time)
        self._app = create_app(self.gateway)

    async def post(
        self,
        key: str,
        body: dict[str, Any] | None = None,
        path: str = "/v1/completions",
        **headers: str,
    ) -> Reply:
        return await Browser(self._app, key).post(path, body or PROMPT, headers=headers)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    house.gateway.text.start()
    yield house
    house.gateway.text.stop()


async def test_requests_beyond_a_keys_limit_are_429_with_when(house: House) -> None:
    for left in (2, 1, 0):
        reply = await house.post("limited")
        assert (reply.status, reply.headers["x-ratelimit-remaining-requests"]) == (200, f"{left}")
    for address in range(100):  # where it says that it comes from makes no difference
        reply = await house.post("limited", **{"x-forwarded-for": f"10.0.0.{address}"})
        assert (reply.status, reply.headers["retry-after"]) == (429, "20")
    assert reply.error["type"] == "rate_limit_error"
    assert reply.error["code"] == "requests_per_minute_exceeded"
    assert reply.headers["x-ratelimit-limit-requests"] == "3"
    assert (await house.post("second")).status == 429, "another key of the same tenant"
    assert (await house.post("free")).status == 200
    house.time.now += 20
    assert (await house.post("limited")).status == 200


async def test_tokens_are_reserved_and_what_was_not_delivered_comes_back(house: House) -> None:
    reply = await house.post("limited", {**PROMPT, "max_tokens": 150})
    assert reply.headers["x-ratelimit-remaining-tokens"] == "196"  # Q, H, i, end
    reply = await house.post("limited", {**PROMPT, "max_tokens": 196})
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")
    assert reply.error["code"] == "tokens_per_minute_exceeded"
    house.time.now += 1
    reply = await house.post("limited", {**PROMPT, "max_tokens": 195, "n": 1, "stream": True})
    assert reply.status == 200
    assert reply.headers["x-ratelimit-remaining-tokens"] == "3"  # all is reserved at its head


async def test_choices_count_each(house: House) -> None:
    assert (await house.post("limited", {**PROMPT, "n": 3})).status == 200
    reply = await house.post("limited", {**PROMPT, "n": 4})
    assert (reply.status, reply.error["code"]) == (429, "tokens_per_minute_exceeded")


async def test_a_failed_call_costs_its_request_alone(house: House) -> None:
    house.sequencer.script = lambda request: [Overloaded("full")]
    assert (await house.post("limited")).status == 503
    house.sequencer.script = says("Hi")
    reply = await house.post("limited", {**PROMPT, "max_tokens": 199})
    assert (reply.status, reply.headers["x-ratelimit-remaining-requests"]) == (200, "1")


async def test_who_has_no_limits_is_told_of_none(house: House) -> None:
    reply = await house.post("free")
    assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


async def test_a_call_that_would_wait_too_long_is_not_even_tokenised(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.sequencer.refusal = Overloaded("Too much is waiting.", retry_after=7.2)
    monkeypatch.setattr(house.gateway.text, "encode", None)
    for body in (PROMPT, {**PROMPT, "stream": True}):
        reply = await house.post("limited", body)
        assert (reply.status, reply.headers["retry-after"]) == (503, "8")
        assert reply.headers["x-ratelimit-remaining-requests"] == "3", "that cost it nothing"
    assert not house.sequencer.requests


async def test_a_key_without_tokens_left_is_not_even_tokenised(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.sequencer.script = says("x" * 199, finish="length")
    assert (await house.post("limited", {**PROMPT, "max_tokens": 199})).status == 200
    monkeypatch.setattr(house.gateway.text, "encode", None)
    for prompt in ("Q", "Q" * 100, [1] * 100, ["Q", "Q"]):
        assert (await house.post("limited", {**PROMPT, "prompt": prompt})).status == 429


async def test_what_is_too_long_costs_a_request_and_is_not_tokenised_whole(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the 4 MiB that a body may hold a few times as much as fits is looked at."""
    seen = []
    encode = Tokenizer._encode
    monkeypatch.setattr(
        Tokenizer, "_encode", lambda self, text: seen.append(len(text)) or encode(self, text)
    )
    long = "Q" * (3 << 20)
    for left, refused in ((2, {"prompt": long}), (1, {"prompt": ["Q", long]})):
        reply = await house.post("limited", {**PROMPT, **refused})
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
        assert (reply.error["param"]) == "prompt"
        assert reply.headers["x-ratelimit-remaining-requests"] == f"{left}"
    chat = {"model": MODEL, "messages": [{"role": "user", "content": long}]}
    reply = await house.post("limited", chat, path="/v1/chat/completions")
    assert (reply.error["code"], reply.error["param"]) == ("context_length_exceeded", "messages")
    assert max(seen) < 100 * house.gateway.limits.max_model_len < len(long)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_what_no_worker_sees_costs_a_request_too(house: House, path: str) -> None:
    for left in (2, 1, 0):
        reply = await house.post("limited", {"prompt": "Q", "tokens": [1]}, path=path)
        assert reply.headers["x-ratelimit-remaining-requests"] == f"{left}"
    reply = await house.post("limited", {"prompt": "Q", "tokens": [1]}, path=path)
    assert (reply.status, reply.error["code"]) == (429, "requests_per_minute_exceeded")


async def test_every_choice_is_admitted_before_any_begins(house: House) -> None:
    await house.post("free", {**PROMPT, "prompt": ["Q", "R"], "n": 2})
    assert house.sequencer.admitted == [(Standing("f"), 2), (Standing("f"), 4)]


@pytest.mark.parametrize(
    ("key", "asked", "given"),
    [
        ("limited", None, 0),
        ("limited", 0, 0),
        ("limited", -1, -1),
        ("limited", -2, None),
        ("limited", 9, 9),
        ("free", -1, None),
        ("free", 2**31 - 1, 2**31 - 1),
        ("batch", None, 5),
        ("batch", 0, 5),
        ("batch", 4, None),
        ("batch", 5, 5),
    ],
)
async def test_a_key_bounds_how_urgent_its_requests_may_be(
    house: House, tmp_path: Path, key: str, asked: int | None, given: int | None
) -> None:
    async with line_to(tmp_path) as line:
        line.gateway.keys = house.gateway.keys
        call = line.generate(
            ask(priority=asked), metadata=(("authorization", f"Bearer {key}"),), timeout=60.0
        )
        if given is None:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            trailing = dict(refused.value.trailing_metadata() or ())
            assert trailing["baton-code"] == "priority_forbidden"
        else:
            await call
            assert line.sequencer.admitted[0][0].priority == given
    reply = await house.post(key, {**PROMPT, "priority": asked})
    if given is None:
        assert (reply.status, reply.error["type"]) == (403, "permission_error")
        assert (reply.error["code"], reply.error["param"]) == ("priority_forbidden", "priority")
        assert not house.sequencer.admitted
    else:
        assert reply.status == 200
        standing, _ = house.sequencer.admitted[0]
        assert standing.priority == given
        assert standing.weight == (2.0 if key == "limited" else 1.0)


@pytest.mark.parametrize("value", [1.0, "1", True, 2**31, -(2**31), 10**30])
async def test_a_priority_is_an_integer(house: House, value: Any) -> None:
    reply = await house.post("free", {**PROMPT, "priority": value})
    assert (reply.status, reply.error["param"]) == (400, "priority")


async def test_quotas_hold_over_grpc_too(tmp_path: Path, house: House) -> None:
    async with line_to(tmp_path) as line:
        line.gateway.keys = house.gateway.keys
        line.gateway.quotas = Quotas(house.time)
        metadata = (("authorization", "Bearer limited"),)
        for left in (2, 1, 0):
            await (call := line.generate(ask(), metadata=metadata))
            ended = dict(await call.trailing_metadata() or ())
            assert ended["x-ratelimit-remaining-requests"] == f"{left}"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await line.generate(ask(), metadata=metadata)
        trailing = dict(refused.value.trailing_metadata() or ())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailing["baton-code"] == "requests_per_minute_exceeded"
        assert (trailing["retry-after"], trailing["x-ratelimit-limit-tokens"]) == ("20", "200")
        line.sequencer.refusal = Overloaded("Too much is waiting.", retry_after=3)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await line.generate(ask(), metadata=(("authorization", "Bearer free"),))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.value.trailing_metadata() or ())["retry-after"] == "3"
