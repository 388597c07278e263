"""Answer: order, ends and cancellation of the choices of one call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadRequest, BatonError, DeadlineExceeded, EngineFailed, WorkerLost
from cluster.messages import Token
from gateway import validate
from gateway.gateway import Gateway
from gateway.keys import ANYONE, Keys
from gateway.stream import Answer, Delta
from tests.gateway.fakes import END, MODEL, FakeSequencer, make_gateway, says, then


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    gateway = make_gateway(tmp_path, FakeSequencer(says("Hi")))
    gateway.text.start()
    yield gateway
    gateway.text.stop()


def sequencer(gateway: Gateway) -> FakeSequencer:
    assert isinstance(gateway.sequencer, FakeSequencer)
    return gateway.sequencer


async def prepared(gateway: Gateway, **fields: Any) -> Answer:
    data = {"model": MODEL, "prompt": "Q", "max_tokens": 100, **fields}
    ask = validate.completion(data, gateway.limits)
    return await Answer.prepare(gateway, ask, ANYONE, gateway.clock())


async def run(answer: Answer) -> list[Delta]:
    deltas: list[Delta] = []

    async def collect(arrived: list[Delta]) -> None:
        deltas.extend(arrived)

    await answer.run(collect)
    return deltas


async def test_each_token_is_a_delta_and_the_end_token_has_no_text(gateway: Gateway) -> None:
    deltas = await run(await prepared(gateway))
    assert [(d.text, d.tokens, d.finish) for d in deltas] == [
        ("H", (ord("H"),), ""),
        ("i", (ord("i"),), ""),
        ("", (END,), "stop"),
    ]
    assert deltas[-1].stop_reason is None
    assert [d.so_far for d in deltas] == [1, 2, 3]
    assert sequencer(gateway).cancelled == []


async def test_half_a_character_waits_for_the_other_half(gateway: Gateway) -> None:
    sequencer(gateway).script = says("a€b", finish="length")
    deltas = await run(await prepared(gateway, logprobs=0))
    assert [d.text for d in deltas] == ["a", "€", "b"]
    assert deltas[1].tokens == tuple("€".encode())
    assert [entry[0][0] for entry in deltas[1].logprobs] == list("€".encode())
    assert deltas[-1].finish == "length"


async def test_a_first_token_without_text_still_opens_the_choice(gateway: Gateway) -> None:
    sequencer(gateway).script = says("€", finish="length")
    deltas = await run(await prepared(gateway))
    assert [(d.opens, d.text) for d in deltas] == [(True, ""), (False, "€")]
    assert deltas[1].tokens == tuple("€".encode())


async def test_a_stop_string_ends_the_choice_on_the_workers_too(gateway: Gateway) -> None:
    sequencer(gateway).script = says("one STOP never seen")
    answer = await prepared(gateway, stop=[" STOP"])
    deltas = await run(answer)
    assert "".join(d.text for d in deltas) == "one"
    assert deltas[-1].finish == "stop"
    assert deltas[-1].stop_reason == " STOP"
    assert answer.usage.completion_tokens == len("one STOP")
    assert sequencer(gateway).cancelled == [sequencer(gateway).requests[0].id]


async def test_what_might_have_begun_a_stop_string_is_not_lost(gateway: Gateway) -> None:
    sequencer(gateway).script = says("one ST", finish="length")
    deltas = await run(await prepared(gateway, stop=[" STOP"], logprobs=0))
    assert "".join(d.text for d in deltas) == "one ST"
    assert sum(len(d.logprobs) for d in deltas) == len("one ST")


async def test_a_stop_token_is_a_reason_only_if_the_client_named_it(gateway: Gateway) -> None:
    sequencer(gateway).script = says("ok", stop_token=END)
    assert (await run(await prepared(gateway)))[-1].stop_reason is None
    deltas = await run(await prepared(gateway, stop_token_ids=[END]))
    assert deltas[-1].stop_reason == END


async def test_requests_carry_what_was_asked(gateway: Gateway) -> None:
    gateway.keys = Keys(["k"])
    await run(await prepared(gateway, prompt=["ab", "c"], n=2, seed=7, stop_token_ids=[5]))
    asked = {(r.tokens, r.sampling.choice): r for r in sequencer(gateway).requests}
    assert set(asked) == {(tuple(b"ab"), 0), (tuple(b"ab"), 1), (tuple(b"c"), 0), (tuple(b"c"), 1)}
    for request in asked.values():
        assert request.sampling.seed == 7
        assert set(request.sampling.stop_token_ids) == {5, END}
    assert len({request.id for request in asked.values()}) == 4


async def test_without_a_seed_each_call_draws_one(gateway: Gateway) -> None:
    await run(await prepared(gateway, n=2))
    await run(await prepared(gateway))
    one, same, other = (r.sampling.seed for r in sequencer(gateway).requests)
    assert one == same != other


async def test_ignore_eos_leaves_the_models_ends_out(gateway: Gateway) -> None:
    await run(await prepared(gateway, ignore_eos=True))
    assert sequencer(gateway).requests[0].sampling.stop_token_ids == ()


async def test_the_first_choice_leads(gateway: Gateway) -> None:
    """The others start when its first token exists, and so find its prompt in the cache."""
    gate = asyncio.Event()
    sequencer(gateway).script = then(says("Hi"), gate, after=0)
    answer = await prepared(gateway, n=3, prompt=["a", "b"])
    running = asyncio.create_task(run(answer))
    while len(sequencer(gateway).requests) < 2:
        await asyncio.sleep(0)
    for _ in range(20):  # turns of the loop in which followers could start too early
        await asyncio.sleep(0)
    assert [r.sampling.choice for r in sequencer(gateway).requests] == [0, 0]
    gate.set()
    deltas = await running
    texts = ["".join(d.text for d in deltas if d.choice == index) for index in range(6)]
    assert texts == ["Hi"] * 6
    assert sum(bool(d.finish) for d in deltas) == 6


async def test_usage_counts_a_prompt_once(gateway: Gateway) -> None:
    sequencer(gateway).script = says("Hi", cached_tokens=2)
    answer = await prepared(gateway, prompt=["abc", "de"], n=2)
    await run(answer)
    assert answer.usage.body() == {
        "prompt_tokens": 5,
        "completion_tokens": 4 * 3,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_echo_puts_the_prompt_first(gateway: Gateway) -> None:
    deltas = await run(await prepared(gateway, prompt=[[65, 66], [67]], echo=True))
    texts = ["".join(d.text for d in deltas if d.choice == index) for index in (0, 1)]
    assert texts == ["ABHi", "CHi"]


async def test_a_failure_comes_after_what_was_made_before_it(gateway: Gateway) -> None:
    sequencer(gateway).script = then(says("abc"), WorkerLost("lost"), after=2)
    deltas: list[Delta] = []

    async def collect(arrived: list[Delta]) -> None:
        deltas.extend(arrived)

    with pytest.raises(WorkerLost):
        await (await prepared(gateway)).run(collect)
    assert "".join(d.text for d in deltas) == "ab"


async def test_one_failing_choice_ends_all(gateway: Gateway) -> None:
    never = asyncio.Event()
    healthy, sick = then(says("abc"), never, after=1), then(says("abc"), WorkerLost("x"), after=1)
    sequencer(gateway).script = lambda r: (healthy if r.tokens == (97,) else sick)(r)
    with pytest.raises(WorkerLost):
        await run(await prepared(gateway, prompt=["a", "b"]))
    assert sequencer(gateway).open == set()
    assert len(sequencer(gateway).cancelled) == 1


async def test_an_answer_without_an_end_is_an_error(gateway: Gateway) -> None:
    sequencer(gateway).script = lambda r: [Token(r.id, 1, 0, 65)]
    with pytest.raises(EngineFailed):
        await run(await prepared(gateway))


async def test_a_lost_token_is_never_passed_over(gateway: Gateway) -> None:
    sequencer(gateway).script = lambda r: [Token(r.id, 1, 1, 65, finish="length")]
    with pytest.raises(AssertionError):
        await run(await prepared(gateway))


@pytest.mark.parametrize("after", [0, 1])
async def test_cancelling_closes_every_choice(gateway: Gateway, after: int) -> None:
    sequencer(gateway).script = then(says("abc"), asyncio.Event(), after=after)
    running = asyncio.create_task(run(await prepared(gateway, prompt=["a", "b", "c"])))
    while len(sequencer(gateway).requests) < 3:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sequencer(gateway).open == set()
    assert len(sequencer(gateway).cancelled) == 3


async def test_a_failing_reader_closes_every_choice(gateway: Gateway) -> None:
    async def refuse(arrived: list[Delta]) -> None:
        raise OSError("the pipe is gone")

    sequencer(gateway).script = then(says("abc"), asyncio.Event(), after=1)
    with pytest.raises(OSError, match="pipe"):
        await (await prepared(gateway)).run(refuse)
    assert sequencer(gateway).open == set()


async def test_a_slow_reader_holds_up_the_sequencer(gateway: Gateway) -> None:
    """What nobody reads is not fetched: at most the queue's worth runs ahead."""
    fetched = 0

    def counting(request: Any) -> Any:
        nonlocal fetched
        for step in says("x" * 5000, finish="length")(request):
            fetched += 1
            yield step

    sequencer(gateway).script = counting
    limits = gateway.limits
    gateway.limits = type(limits)(limits.model_names, limits.vocab_size, 8000, 8000)
    seen = 0

    async def read(arrived: list[Delta]) -> None:
        nonlocal seen
        assert fetched - seen <= 2 * 256 + 2
        for _ in range(50):
            await asyncio.sleep(0)
        seen += len(arrived)

    await (await prepared(gateway, max_tokens=5000)).run(read)
    assert seen == 5000


async def test_the_time_limit_is_an_error_of_its_own(gateway: Gateway) -> None:
    sequencer(gateway).script = then(says("abc"), asyncio.Event(), after=1)
    with pytest.raises(DeadlineExceeded):
        async with gateway.calls.within(0.001):
            await (await prepared(gateway)).run(_ignore)
    assert sequencer(gateway).open == set()


async def test_a_prompt_that_does_not_fit_reaches_no_worker(gateway: Gateway) -> None:
    with pytest.raises(BadRequest) as caught:
        await prepared(gateway, prompt="x" * 500)
    assert caught.value.code == "context_length_exceeded"
    assert sequencer(gateway).requests == []


async def test_the_timeline_adds_up_to_the_time_to_the_first_token(gateway: Gateway) -> None:
    ticks = iter(range(10_000))
    gateway.clock = lambda: float(next(ticks))
    answer = await prepared(gateway)
    await run(answer)
    timeline = answer.timeline()
    spans = timeline["timeline_ms"]
    assert sum(spans.values()) == pytest.approx(timeline["time_to_first_token_ms"])
    assert timeline["mean_itl_ms"] == timeline["generation_time_ms"] / 2
    assert (timeline["prefill_worker"], timeline["decode_worker"]) == ("p0", "d0")


async def test_errors_stay_what_they_are(gateway: Gateway) -> None:
    sequencer(gateway).script = then(says("abc"), ZeroDivisionError("bug"), after=0)
    with pytest.raises(ZeroDivisionError):
        await run(await prepared(gateway))
    sequencer(gateway).script = then(says("abc"), BatonError("ours"), after=0)
    with pytest.raises(BatonError, match="ours"):
        await run(await prepared(gateway))


async def _ignore(arrived: list[Delta]) -> None:
    return
