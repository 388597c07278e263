"""A client that loses its connection and comes back with the same Idempotency-Key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DONE, get, request, stream
from tests.e2e.cluster import Cluster, serving
from tests.e2e.test_cancel import COMPLETIONS, SOON_S
from tests.e2e.two_gateways import ANSWER, undisturbed

KEY = {"Idempotency-Key": "2f1c"}
BODY = {**ANSWER, "max_tokens": 1000}


@pytest.fixture
def seconds() -> str:
    return "30"


@pytest.fixture
def cluster(tmp_path: Path, seconds: str) -> Iterator[Cluster]:
    with serving(tmp_path, gateway=("--reattach-timeout", seconds)) as cluster:
        yield cluster


def test_it_reads_the_same_answer_from_the_beginning(cluster: Cluster) -> None:
    [expected] = undisturbed(cluster, [BODY])
    cluster.until_idle(SOON_S)
    with stream(cluster.url, COMPLETIONS, BODY, KEY) as events:
        first = [next(events) for _ in range(5)]
    cluster.until(lambda status: any(w["running"] for w in status["workers"]), "it goes on")
    with stream(cluster.url, COMPLETIONS, BODY, KEY) as events:
        *chunks, end = events
    assert end == DONE and chunks[:5] == first
    assert [t for event in chunks for t in event["choices"][0]["token_ids"]] == expected
    other = request(
        cluster.url, "POST", COMPLETIONS, {**BODY, "stream": True, "max_tokens": 9}, KEY
    )
    assert (other.status, other.body["error"]["code"]) == (409, "idempotency_mismatch")


@pytest.mark.parametrize("seconds", ["0.5"])
def test_if_it_does_not_come_back_all_is_freed(cluster: Cluster) -> None:
    long = {**BODY, "max_tokens": 3500, "n": 8}
    with stream(cluster.url, COMPLETIONS, long, KEY) as events:
        next(events)
    cluster.until(lambda status: any(w["running"] for w in status["workers"]), "it goes on")
    cluster.until_idle(0.5 + SOON_S)
    text = get(cluster.url, "/metrics").body
    assert re.search(r"^vllm:request_success_total{.*} [1-9]", text, re.MULTILINE) is None
