"""A request that kills whoever computes it (FAULTS 3.3, row 27)."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.e2e.client import DONE, post, stream
from tests.e2e.cluster import wait_until
from tests.e2e.failing_worker import POISON
from tests.e2e.launched import PATIENCE_S, launched
from tests.e2e.test_cancel import COMPLETIONS

BODY: dict[str, Any] = {
    "model": "baton-tiny",
    "prompt": "Once upon a time",
    "max_tokens": 600,
    "ignore_eos": True,
    "seed": 7,
    "temperature": 1.0,
    "logit_bias": {str(POISON): -100},
    "return_token_ids": True,
}


def token_ids(events: Iterable[Any]) -> list[int]:
    """Of a stream, which must come to its end."""
    *chunks, end = events
    assert end == DONE, chunks[-1]
    return [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]


def test_a_request_that_kills_its_workers_gets_no_third(tmp_path: Path) -> None:
    with launched(tmp_path, "--prefill", "3", "--decode", "1") as house, ExitStack() as stack:
        with stream(house.url, COMPLETIONS, BODY) as events:
            undisturbed = token_ids(events)
        before = house.workers()
        others = [stack.enter_context(stream(house.url, COMPLETIONS, BODY)) for _ in range(3)]
        begun = [next(events) for events in others]
        poison = {"model": "baton-tiny", "prompt": [5, POISON, 7], "max_tokens": 4}
        answer = post(house.url, COMPLETIONS, poison)
        assert answer.status == 500
        assert answer.body["error"]["code"] == "engine_error"
        for first, events in zip(begun, others, strict=True):
            assert token_ids([first, *events]) == undisturbed
        wait_until(lambda: house.workers().keys() == before.keys(), "all back", PATIENCE_S)
        after = house.workers()
        new = [name for name in before if before[name] != after[name]]
        # Two, or one where the machine was so busy that a worker was taken for dead.
        assert 1 <= len(new) <= 2
        for name in new:
            assert name.startswith("prefill-")
            assert f"{name} ended with status {-signal.SIGABRT}" in house.launcher.stderr
        with stream(house.url, COMPLETIONS, BODY) as events:
            assert token_ids(events) == undisturbed
