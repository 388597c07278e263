from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from bench.client import Record, open_session
from bench.overload import Bench, OverloadOptions, parse_options
from bench.overload_report import Call, Phase, table
from bench.stand import House
from cluster.errors import StartError
from tests.bench.conftest import ScriptedServer, whole

SMALL = OverloadOptions(
    seconds=0.2,
    at_once=2,
    calibrating=8,
    prompt=4,
    answer=2,
    shorts=2,
    pause=0.01,
    longs=3,
    long_prompt=9,
)


class TestOptions:
    def test_defaults_are_those_of_the_class(self) -> None:
        assert parse_options([]) == OverloadOptions()
        assert parse_options(["--times", "2.5", "--longs", "3"]).times == 2.5

    @pytest.mark.parametrize(
        ("flag", "value"),
        [("--times", "1"), ("--seconds", "0"), ("--long-prompt", "5000"), ("--shorts", "0")],
    )
    def test_what_cannot_work_is_refused(self, flag: str, value: str) -> None:
        with pytest.raises(StartError, match=flag):
            parse_options([flag, value])


class TestPhase:
    def test_what_was_let_in_and_what_was_refused(self) -> None:
        good = Call(Record(ttft=0.5, latency=0.8, output_tokens=4), 200)
        broken = Call(Record(ttft=0.7, latency=0.7, output_tokens=1, error="cut"), 200)
        refused = [Call(Record(), 503, "3", 0.01), Call(Record(), 429, "", 0.02)]
        other = Call(Record(error="connection reset"), 0)
        phase = Phase("x", 2.0, [good, broken, *refused, other], 2.0)
        numbers = phase.numbers()
        assert (numbers["sent"], numbers["accepted"], numbers["broken"]) == (5, 2, 1)
        assert (numbers["refused"], numbers["refused_with_retry_after"]) == (2, 1)
        assert numbers["other_errors"] == 1
        assert numbers["answered_per_s"] == 0.5
        assert numbers["ttft_ms"] == {"p50": 600.0, "p99": 698.0, "max": 700.0}
        assert numbers["tpot_ms"]["max"] == 100.0
        assert numbers["retry_after_s"]["p50"] == 3.0
        assert numbers["refusal_ms"]["max"] == 20.0


async def bench(server: ScriptedServer, session: Any, options: OverloadOptions = SMALL) -> Bench:
    return Bench(options, House(server.url, os.getpid()), session)


async def test_a_server_that_refuses_what_is_too_much(serve_script: Any) -> None:
    asked = 0

    def script(body: dict[str, Any]) -> Any:
        nonlocal asked
        asked += 1
        if asked > 20:
            return web.Response(status=503, headers={"Retry-After": "4"})
        return whole("a", "b")

    server = await serve_script(script)
    async with open_session() as session:
        options = replace(SMALL, times=3.0)
        phases, memory = await (await bench(server, session, options)).overload()
    capacity, within, beyond = phases
    assert len(capacity.calls) == 8 and capacity.rate > 0
    assert len(beyond.calls) > len(within.calls)
    assert beyond.numbers()["refused_with_retry_after"] == beyond.numbers()["refused"] > 0
    assert memory["most"] >= max(memory["before"], 1)
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts), "none meets a warm prefix cache"


async def test_the_flood_and_who_stands_beside_it_have_keys_of_their_own(serve_script: Any) -> None:
    server = await serve_script(whole("a", "b"))
    async with open_session() as session:
        phases = await (await bench(server, session)).fairness()
    assert [(phase.name, len(phase.calls)) for phase in phases] == [
        ("alone", 2),
        ("flooded", 2),
        ("one key", 2),
    ]
    keys = [headers["Authorization"].removeprefix("Bearer ") for headers in server.headers]
    assert keys.count("flood") == 3 and keys.count("short") == 2 + 2 + 3 + 2
    assert [len(body["prompt"]) for body in server.bodies].count(9) == 6
    result = {
        "options": {"times": 4.0},
        "gateway_rss_mib": {"before": 1.0, "most": 2.0, "after": 1.5},
        "phases": {phase.name: phase.numbers() for phase in phases},
    }
    result["phases"] |= {"capacity": phases[0].numbers(), "beyond": phases[0].numbers()}
    lines = table(result).splitlines()
    assert len(lines) == 1 + 5 + 3 and "flooded" in lines[2]
