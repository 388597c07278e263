"""A gateway that is short of something refuses new calls at both doors until it is over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import grpc
import h11
import pytest

from cluster.pressure import Pressure
from gateway.app import create_app
from gateway.main import _hang_up_idle
from tests.gateway.fakes import MODEL, Browser
from tests.gateway.line import ask, line_to


async def test_both_doors_refuse_new_calls_until_it_is_over(tmp_path: Path) -> None:
    share = 0.86
    async with line_to(tmp_path) as line:
        pressure = line.gateway.pressure = Pressure(0.85, readings={"memory": lambda: share})
        browser = Browser(create_app(line.gateway))
        body = {"model": MODEL, "prompt": "Q", "max_tokens": 50}

        async def statuses() -> list[int]:
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "Q"}]}
            replies = [
                await browser.post("/v1/completions", body),
                await browser.post("/v1/chat/completions", chat),
                await browser.post("/tokenize", {"prompt": "Q"}),
                await browser.post("/detokenize", {"tokens": [1]}),
                await browser.get("/ready"),
                await browser.get("/health"),
                await browser.get("/live"),
            ]
            return [reply.status for reply in replies]

        assert await statuses() == [200] * 7
        pressure.look()
        assert await statuses() == [503] * 6 + [200]
        refused = await browser.post("/v1/completions", body)
        assert refused.error["code"] == "overloaded"
        assert refused.error["message"] == "The server is short of memory."
        assert refused.headers["retry-after"] == "1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await line.generate(ask())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        share = 0.5
        pressure.look()
        assert await statuses() == [200] * 7
        await line.generate(ask())


def test_hanging_up_goes_over_all_connections() -> None:
    """One that is at its end already keeps no other."""
    told: list[int] = []

    def connection(number: int) -> SimpleNamespace:
        def shutdown() -> None:
            told.append(number)
            if number == 1:
                raise h11.LocalProtocolError("too late")

        return SimpleNamespace(shutdown=shutdown)

    _hang_up_idle([connection(number) for number in range(3)])
    assert told == [0, 1, 2]
