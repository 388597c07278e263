"""What only holds for the HTTP response as a whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.app import create_app
from gateway.text import TextPool
from tests.gateway.fakes import MODEL, Browser, FakeSequencer, make_gateway, says


@pytest.mark.parametrize("stream", [False, True])
async def test_waiting_for_the_tokenizer_counts_to_the_time_limit(
    tmp_path: Path, stream: bool
) -> None:
    sequencer = FakeSequencer(says("Hi"))
    gateway = make_gateway(tmp_path, sequencer, request_timeout_s=0.01)
    encoders, free = ThreadPoolExecutor(1), threading.Event()
    encoders.submit(free.wait)
    gateway.text = TextPool(gateway.tokenizer, encoders)
    gateway.text.start()
    try:
        data = {"model": MODEL, "prompt": "Q", "stream": stream}
        reply = await Browser(create_app(gateway)).post("/v1/completions", data)
    finally:
        free.set()
        gateway.text.stop()
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    assert sequencer.requests == []
    assert gateway.active == 0
