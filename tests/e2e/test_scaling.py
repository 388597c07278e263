"""Pools grow and shrink under load, and nobody who asks notices."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.client import DONE, at_once, complete, raw_post, stream
from tests.e2e.cluster import Cluster, serving
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER, long_prompt
from tests.e2e.test_loss import decoder, decoding

ANSWER: dict[str, Any] = {"ignore_eos": True, "temperature": 0, "return_timeline": True}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with serving(tmp_path, prefill=("--max-num-batched-tokens", "32")) as cluster:
        yield cluster


def served_by(cluster: Cluster, prompts: list[Any]) -> list[tuple[str, str]]:
    """The (prefill, decode) workers that each answer names in its timeline, asked all at once."""
    ask = partial(complete, cluster.url, cluster.model, **ANSWER, max_tokens=150)
    bodies = at_once([partial(ask, prompt) for prompt in prompts], len(prompts))
    return [(b["metrics"]["prefill_worker"], b["metrics"]["decode_worker"]) for b in bodies]


def different(count: int) -> list[str]:
    return [f"Question {i}: how long is a piece of string?" for i in range(count)]


def finished(events: Iterator[Any]) -> int:
    """Reads a stream to its good end; how many tokens it still had."""
    *chunks, end = events
    assert end == DONE, end
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks)


def test_workers_join_and_are_used(cluster: Cluster) -> None:
    assert set(served_by(cluster, different(4))) == {("prefill-0", "decode-0")}
    cluster.worker("decode", "--block-size", "32", name="late-decode")
    cluster.worker("prefill", name="late-prefill")
    status = cluster.until_joined()
    assert [(w["role"], w["name"]) for w in status["workers"]] == [
        ("decode", "decode-0"),
        ("decode", "late-decode"),
        ("prefill", "late-prefill"),
        ("prefill", "prefill-0"),
    ]
    pairs = served_by(cluster, different(12))
    assert {decode for _, decode in pairs} == {"decode-0", "late-decode"}
    assert {prefill for prefill, _ in pairs} == {"prefill-0", "late-prefill"}


def drain(cluster: Cluster, name: str) -> None:
    """SIGTERM, and until the gateway knows or it is gone."""
    cluster[name].signal(signal.SIGTERM)
    cluster.until(
        lambda status: all(w["draining"] for w in status["workers"] if w["name"] == name),
        f"{name} draining",
    )


def test_a_drained_decode_worker_finishes_what_it_has(cluster: Cluster) -> None:
    cluster.worker("decode")
    cluster.until_joined()
    body = {**LONG_ANSWER, "max_tokens": 2000, "return_token_ids": True}
    with stream(cluster.url, COMPLETIONS, body) as events:
        read = len(next(events)["choices"][0]["token_ids"])
        status = cluster.until(
            lambda s: s["workers"][0]["running"] + s["workers"][1]["running"], "decoding"
        )
        workers = status["workers"][:2]
        leaving, staying = (w["name"] for w in sorted(workers, key=lambda w: -w["running"]))
        drain(cluster, leaving)
        assert set(served_by(cluster, different(4))) == {("prefill-0", staying)}
        assert cluster[leaving].running, "the answer was over too soon to show anything"
        assert read + finished(events) == 2000
    assert cluster[leaving].wait() == 0
    cluster.until(
        lambda s: [w["name"] for w in s["workers"]] == [staying, "prefill-0"], f"{leaving} left"
    )
    cluster.until_idle(2)


def test_a_drained_prefill_worker_finishes_what_it_has(cluster: Cluster) -> None:
    connection = raw_post(cluster.url, COMPLETIONS, long_prompt(seed=1))
    cluster.until(lambda status: status["workers"][1]["owned_blocks"], "prefill under way")
    drain(cluster, "prefill-0")
    with connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert cluster["prefill-0"].wait() == 0
    cluster.worker("prefill", name="successor")
    cluster.until_joined("successor")
    assert served_by(cluster, different(1)) == [("successor", "decode-0")]


def test_what_a_drain_does_not_wait_for_moves(cluster: Cluster) -> None:
    """After --shutdown-timeout what still runs goes on elsewhere, and no token changes."""
    for name in ("hasty-0", "hasty-1"):
        slow = ("--kernels", "torch")
        cluster.worker("decode", *slow, "--shutdown-timeout", "0.1", name=name)
    cluster.until_joined("hasty-0", "hasty-1")
    cluster["decode-0"].signal(signal.SIGTERM)
    assert cluster["decode-0"].wait() == 0
    body = {**LONG_ANSWER, "max_tokens": 2000, "temperature": 0, "return_token_ids": True}
    undisturbed = complete(cluster.url, **body)["choices"][0]["token_ids"]
    cluster.until_idle(2)
    with stream(cluster.url, COMPLETIONS, {**body, "return_timeline": True}) as events:
        begun = decoding(events)
        victim = decoder(cluster)
        cluster[victim].signal(signal.SIGTERM)
        *chunks, end = [*begun, *events]
    assert end == DONE
    assert [t for chunk in chunks for t in chunk["choices"][0]["token_ids"]] == undisturbed
    [loss] = chunks[-1]["metrics"]["recoveries"]
    assert (loss["phase"], loss["cause"]) == ("decoding", "drained")
    assert cluster[victim].wait() == 0


def test_rolling_restart_fails_nobody(cluster: Cluster) -> None:
    """Workers are replaced one by one while calls keep coming; every one is answered whole."""
    for role in ("decode", "prefill"):
        cluster.worker(role, name=f"{role}-new")
    cluster.until_joined()
    ended = threading.Event()

    def keep_asking(caller: int) -> int:
        asked = 0
        while not ended.is_set():
            prompt = f"{caller} asks for the {asked}th time"
            body = complete(cluster.url, cluster.model, prompt, **ANSWER, max_tokens=20)
            assert body["usage"]["completion_tokens"] == 20
            asked += 1
        return asked

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(keep_asking, caller) for caller in range(3)]
        try:
            for name in ("decode-0", "prefill-0"):
                cluster[name].signal(signal.SIGTERM)
                assert cluster[name].wait() == 0
        finally:
            ended.set()
        assert all(caller.result() > 0 for caller in callers)
    cluster.until_idle(2)


def test_an_undivided_worker_stands_in(cluster: Cluster) -> None:
    """R10: without a prefill worker a `both` answers, and the timeline shows it."""
    cluster.worker("both")
    cluster.until_joined()
    assert set(served_by(cluster, different(2))) == {("prefill-0", "decode-0")}
    cluster["prefill-0"].signal(signal.SIGKILL)
    cluster.until(lambda s: len(s["workers"]) == 2, "prefill-0 gone")
    assert set(served_by(cluster, different(2))) == {("both-0", "both-0")}
