"""Calls with an Idempotency-Key: readers that come, go and come back, and what is kept for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.errors import (
    BadRequest,
    Cancelled,
    IdempotencyMismatch,
    Overloaded,
    Superseded,
)
from gateway.app import create_app
from gateway.gateway import Gateway
from gateway.reattach import AHEAD, Claim, Kept, Run, Sink, digest_of, key_of
from tests.gateway.fakes import MODEL, Browser, FakeSequencer, make_gateway, says, then
from tests.gateway.line import Line, ask, line_to, refusal
from tests.virtual import on_virtual_time

# Runs alone, on virtual time.

A = Claim(b"tenant", b"key", b"body")
KEEP_S = 30.0


class Pen:
    """Work that writes what the test gives it."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.made = 0
        self.cancelled = False
        self.lost: list[Exception] = []

    async def make(self, sink: Sink) -> None:
        self.made += 1
        try:
            while (piece := await self.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                await sink.write(piece)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def says(self, text: str, *end: Exception | None) -> None:
        for letter in text:
            self.pieces.put_nowait(letter.encode())
        for last in end:
            self.pieces.put_nowait(last)

    def attach(self, kept: Kept, claim: Claim = A) -> Run:
        run = kept.attach(claim, self.make, self.lost.append)
        assert run is not None
        return run


async def read(run: Run, most: int = 1_000_000) -> str:
    text = b""
    async with aclosing(run.read()) as pieces:
        async for piece in pieces:
            text += piece
            if len(text) == most:
                break
    return text.decode()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@on_virtual_time
async def test_one_who_comes_back_reads_all_from_the_beginning() -> None:
    kept, pen = Kept(KEEP_S), Pen()
    pen.says("abc")
    assert await read(pen.attach(kept), 2) == "ab"
    await asyncio.sleep(KEEP_S - 1)
    again = asyncio.create_task(read(pen.attach(kept)))
    await settled()
    pen.says("de", None)
    assert await again == "abcde"
    await asyncio.sleep(KEEP_S - 1)
    assert await read(pen.attach(kept)) == "abcde", "a whole answer can be fetched again"
    assert pen.made == 1 and pen.lost == []


@on_virtual_time
async def test_nobody_comes_back() -> None:
    kept, pen = Kept(KEEP_S), Pen()
    pen.says("abc")
    assert await read(pen.attach(kept), 2) == "ab"
    await asyncio.sleep(KEEP_S - 1)
    assert A in kept and not pen.cancelled
    await asyncio.sleep(2)
    assert A not in kept and pen.cancelled and kept.running == 0
    [lost] = pen.lost
    assert isinstance(lost, Cancelled)
    pen.says("x", None)
    assert await read(pen.attach(kept)) == "x", "the key begins another call"
    await asyncio.sleep(KEEP_S + 1)
    assert A not in kept


@on_virtual_time
async def test_the_time_of_a_whole_answer_begins_with_its_end() -> None:
    kept, pen = Kept(KEEP_S), Pen()
    pen.says("a")
    assert await read(pen.attach(kept), 1) == "a"
    await asyncio.sleep(KEEP_S - 1)
    pen.says("b", None)
    await asyncio.sleep(KEEP_S - 1)
    assert await read(pen.attach(kept)) == "ab"


@on_virtual_time
async def test_the_newest_reader_takes_over() -> None:
    kept, pen = Kept(KEEP_S), Pen()
    pen.says("ab")
    first = asyncio.create_task(read(pen.attach(kept)))
    await settled()
    second = asyncio.create_task(read(pen.attach(kept)))
    with pytest.raises(Superseded):
        await first
    await asyncio.sleep(KEEP_S + 1)
    pen.says("c", None)
    assert await second == "abc", "the one that was sent away took nothing with it"


@on_virtual_time
async def test_a_failure_is_for_the_reader_and_ends_the_key() -> None:
    kept, pen = Kept(KEEP_S), Pen()
    pen.says("ab", Overloaded("full"))
    pieces = pen.attach(kept).read()
    assert [await anext(pieces), await anext(pieces)] == [b"a", b"b"]
    with pytest.raises(Overloaded):
        await anext(pieces)
    assert A not in kept and pen.lost == []
    pen.says("", Overloaded("still"))
    with pytest.raises(Overloaded, match="still"):
        await read(pen.attach(kept))
    pen.says("x", None)
    assert await read(pen.attach(kept)) == "x"


@on_virtual_time
async def test_a_failure_that_nobody_reads_is_told() -> None:
    kept, pen = Kept(KEEP_S), Pen()
    pen.says("ab")
    assert await read(pen.attach(kept), 1) == "a"
    pen.says("", ZeroDivisionError("bug"))
    await settled()
    assert A not in kept
    assert [type(error) for error in pen.lost] == [ZeroDivisionError]


@on_virtual_time
async def test_the_key_of_another_call() -> None:
    kept, pen = Kept(KEEP_S), Pen()
    pen.says("a", None)
    assert await read(pen.attach(kept)) == "a"
    with pytest.raises(IdempotencyMismatch):
        pen.attach(kept, Claim(A.tenant, A.key, b"other body"))
    other = Pen()
    other.says("z", None)
    assert await read(other.attach(kept, Claim(b"other tenant", A.key, A.digest))) == "z"


@on_virtual_time
async def test_of_too_many_the_oldest_complete_one_goes() -> None:
    kept = Kept(KEEP_S, most_runs=2)
    claims = [Claim(b"", bytes([number]), b"") for number in range(4)]
    pens = [Pen() for _ in claims]
    running, whole, next_, last = zip(pens, claims, strict=True)
    running[0].says("a")
    assert await read(running[0].attach(kept, running[1]), 1) == "a"
    whole[0].says("b", None)
    assert await read(whole[0].attach(kept, whole[1])) == "b"
    next_[0].says("c")
    assert await read(next_[0].attach(kept, next_[1]), 1) == "c"
    assert [claim in kept for claim in claims] == [True, False, True, False]
    assert kept.attach(last[1], last[0].make, last[0].lost.append) is None, "all others run"
    await kept.close()
    assert kept.running == 0 and running[0].cancelled and next_[0].cancelled


@on_virtual_time
async def test_bytes_are_bounded_and_complete_answers_go_first() -> None:
    kept = Kept(KEEP_S, most_bytes=10)
    old, new = Pen(), Pen()
    claim = Claim(b"", b"new", b"")
    old.says("x" * 8, None)
    assert await read(old.attach(kept)) == "x" * 8
    new.says("y" * 10, None)
    assert await read(new.attach(kept, claim)) == "y" * 10
    assert A not in kept and claim in kept


@on_virtual_time
async def test_an_answer_that_grows_too_large_goes_on_for_its_reader_alone() -> None:
    """It is held up by a reader that is slow then, as any other; and by none it ends."""
    kept, pen = Kept(KEEP_S, most_bytes=10), Pen()
    count = 5 * AHEAD
    pen.says("z" * count)
    pieces = pen.attach(kept).read()
    for _ in range(5):
        assert await anext(pieces) == b"z"
    await settled()
    assert A not in kept
    assert pen.pieces.qsize() >= count - 11 - AHEAD, "it runs ahead of its reader"
    for _ in range(count - 5):
        assert await anext(pieces) == b"z"
    assert pen.pieces.empty()
    await pieces.aclose()
    await settled()
    assert pen.cancelled and kept.running == 0


@on_virtual_time
async def test_without_a_reader_it_may_not_grow_too_large() -> None:
    kept, pen = Kept(KEEP_S, most_bytes=10), Pen()
    pen.says("z")
    assert await read(pen.attach(kept), 1) == "z"
    pen.says("z" * 20)
    await settled()
    assert pen.cancelled and A not in kept and kept.running == 0


def test_keys() -> None:
    assert key_of([]) is None
    assert key_of([b"!" * 255]) == b"!" * 255
    for bad in ([b""], [b"!" * 256], [b"a b"], [b"\xe9"], [b"a\x00"], [b"a", b"a"]):
        with pytest.raises(BadRequest) as refused:
            key_of(bad)
        assert refused.value.code == "invalid_idempotency_key"


def test_digests_do_not_run_together() -> None:
    assert digest_of(b"/a", b"b") != digest_of(b"/ab", b"") and digest_of(b"a") == digest_of(b"a")


# Over HTTP.

BODY = {"model": MODEL, "prompt": "Q", "max_tokens": 50}
STREAM = {**BODY, "stream": True}
PATH = "/v1/completions"


class House:
    """A gateway whose answers stop after their first token until `gate` is set."""

    def __init__(self, gateway: Gateway, sequencer: FakeSequencer) -> None:
        self.gateway = gateway
        self.gate = asyncio.Event()
        self.sequencer = sequencer
        self.sequencer.script = then(says("abc"), self.gate, after=1)
        self.app = create_app(gateway)

    async def post(
        self, body: dict[str, Any], key: str = "k", api: str = "one", **more: Any
    ) -> Any:
        browser = Browser(self.app, api)
        return await browser.post(PATH, body, headers={"idempotency-key": key}, **more)

    async def lost(self, body: dict[str, Any]) -> None:
        """A call whose client goes while the answer runs."""
        leave = asyncio.Event()
        call = asyncio.create_task(self.post(body, leave=leave))
        while not self.sequencer.open:
            await asyncio.sleep(0)
        await settled()
        leave.set()
        await call


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    sequencer = FakeSequencer(says(""))
    gateway = make_gateway(tmp_path, sequencer, keys=["one", "two"])
    gateway.text.start()
    yield House(gateway, sequencer)
    await gateway.kept.close()
    gateway.text.stop()


def text_of(reply: Any) -> str:
    if reply.headers["content-type"] == "application/json":
        return str(reply.json()["choices"][0]["text"])
    assert reply.events[-1] == "data: [DONE]"
    return "".join(event["choices"][0]["text"] for event in reply.events[:-1])


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_retry_finds_its_running_request(house: House, body: dict[str, Any]) -> None:
    await house.lost(body)
    assert house.sequencer.cancelled == [] and house.gateway.kept.running == 1
    retry = asyncio.create_task(house.post(body))
    await settled()
    house.gate.set()
    reply = await retry
    assert text_of(reply) == "abc" and reply.headers["x-baton-reattached"] == "true"
    again = await house.post(body)
    assert again.body == reply.body, "a finished answer is the same to the byte, its id too"
    assert len(house.sequencer.requests) == 1
    assert house.gateway.active == 0


async def test_without_a_key_the_work_ends_with_its_client(house: House) -> None:
    leave = asyncio.Event()
    call = asyncio.create_task(Browser(house.app, "one").post(PATH, BODY, leave=leave))
    while not house.sequencer.open:
        await asyncio.sleep(0)
    leave.set()
    await call
    assert len(house.sequencer.cancelled) == 1


async def test_the_first_answer_is_marked_as_nothing(house: House) -> None:
    house.gate.set()
    assert "x-baton-reattached" not in (await house.post(STREAM)).headers


async def test_a_second_reader_ends_the_first_with_a_typed_error(house: House) -> None:
    first = asyncio.create_task(house.post(STREAM))
    while not house.sequencer.open:
        await asyncio.sleep(0)
    await settled()
    second = asyncio.create_task(house.post(STREAM))
    reply = await first
    assert reply.events[-1]["error"]["code"] == "superseded"
    house.gate.set()
    assert text_of(await second) == "abc"
    assert len(house.sequencer.requests) == 1


async def test_of_two_whole_answers_the_first_is_refused(house: House) -> None:
    first = asyncio.create_task(house.post(BODY))
    while not house.sequencer.open:
        await asyncio.sleep(0)
    second = asyncio.create_task(house.post(BODY))
    reply = await first
    assert (reply.status, reply.error["code"]) == (409, "superseded")
    assert reply.headers["x-should-retry"] == "false"
    house.gate.set()
    assert text_of(await second) == "abc"


async def test_another_body_and_another_tenant(house: House) -> None:
    house.gate.set()
    await house.post(BODY)
    other = await house.post({**BODY, "max_tokens": 49})
    assert (other.status, other.error["code"]) == (409, "idempotency_mismatch")
    assert (await house.post(STREAM)).status == 409
    theirs = await house.post({**BODY, "max_tokens": 49}, api="two")
    assert theirs.status == 200 and "x-baton-reattached" not in theirs.headers
    assert len(house.sequencer.requests) == 2


async def test_a_bad_key(house: House) -> None:
    reply = await house.post(BODY, key="a b")
    assert (reply.status, reply.error["code"]) == (400, "invalid_idempotency_key")
    assert house.sequencer.requests == []


async def test_a_failed_call_is_tried_again(house: House) -> None:
    script = house.sequencer.script
    house.sequencer.script = then(says("abc"), Overloaded("full"), after=0)
    assert (await house.post(STREAM)).status == 503
    house.sequencer.script = script
    house.gate.set()
    assert text_of(await house.post(STREAM)) == "abc"


async def test_a_gateway_that_ends_cuts_kept_calls_too_and_takes_them_up_till_then(
    house: House,
) -> None:
    await house.lost(STREAM)
    house.gateway.calls.drain()
    assert (await house.post(STREAM, key="new")).error["code"] == "draining"
    back = asyncio.create_task(house.post(STREAM))
    await settled()
    house.gateway.calls.cut()
    reply = await back
    assert reply.headers["x-baton-reattached"] == "true"
    assert reply.events[-1]["error"]["code"] == "draining"
    assert house.gateway.kept.running == 0 and len(house.sequencer.cancelled) == 1


async def test_no_room_to_keep_it(house: House) -> None:
    """Then it is a call like any other."""
    house.gateway.kept = Kept(most_runs=0)
    house.gate.set()
    assert text_of(await house.post(STREAM)) == "abc"
    assert text_of(await house.post(STREAM)) == "abc"
    assert len(house.sequencer.requests) == 2


async def test_a_kept_call_has_the_time_limit_of_any_other(house: House) -> None:
    house.gateway.request_timeout_s = 0.01
    reply = await house.post(BODY)
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    assert len(house.sequencer.cancelled) == 1


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_the_head_says_when_a_decode_worker_read_the_prompt(
    house: House, body: dict[str, Any], keyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.gate.set()
    key = {"idempotency-key": "k"} if keyed else {}
    browser = Browser(house.app, "one")
    assert "x-baton-fallback" not in (await browser.post(PATH, body)).headers
    monkeypatch.setattr(house.sequencer, "fallback", True)
    for _ in range(2):
        reply = await browser.post(PATH, body, headers=key)
        assert reply.headers["x-baton-fallback"] == "decode-prefill"


# Over gRPC.


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    async with line_to(tmp_path) as line:
        yield line
        await line.gateway.kept.close()


KEY = (("idempotency-key", "k"),)


async def test_a_grpc_retry_finds_its_running_request(line: Line) -> None:
    gate = asyncio.Event()
    line.sequencer.script = then(says("abc"), gate, after=1)
    call = line.stream(ask(), metadata=KEY)
    assert (await call.read()).choices[0].text == "a"
    assert "baton-reattached" not in dict(await call.initial_metadata())
    call.cancel()
    retry = line.stream(ask(), metadata=KEY)
    assert (await retry.read()).choices[0].text == "a"
    assert dict(await retry.initial_metadata())["baton-reattached"] == "true"
    gate.set()
    text = ""
    while message := await retry.read():
        text += "".join(choice.text for choice in message.choices)
    assert text == "bc" and len(line.sequencer.requests) == 1
    whole = await refusal(line.generate(ask(), metadata=KEY))
    assert whole.code() is grpc.StatusCode.ALREADY_EXISTS, "the method is part of the call"
    assert (await refusal(line.generate(ask(max_tokens=5), metadata=KEY))).code() is whole.code()
    while line.gateway.active:  # a client hears of the end before the call itself is over
        await asyncio.sleep(0)


async def test_a_whole_grpc_answer_can_be_fetched_again(line: Line) -> None:
    first = await line.generate(ask(), metadata=KEY)
    assert await line.generate(ask(), metadata=KEY) == first
    assert first.choices[0].text == "Hi" and len(line.sequencer.requests) == 1


async def test_a_second_grpc_reader_takes_over(line: Line) -> None:
    line.sequencer.script = then(says("abc"), asyncio.Event(), after=1)
    first = line.stream(ask(), metadata=KEY)
    await first.read()
    second = line.stream(ask(), metadata=KEY)
    await second.read()
    assert await first.code() is grpc.StatusCode.ABORTED
    second.cancel()


async def test_grpc_says_when_a_decode_worker_read_the_prompt(line: Line) -> None:
    line.sequencer.fallback = True
    for call in (line.generate(ask()), line.stream(ask())):
        assert dict(await call.initial_metadata())["baton-fallback"] == "decode-prefill"
        call.cancel()
