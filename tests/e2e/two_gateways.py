"""Two gateways on the same workers, as real processes; and many streams at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

from tests.e2e.client import DONE, complete, stream
from tests.e2e.cluster import Cluster
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER

ANSWER: dict[str, Any] = {
    **LONG_ANSWER,
    "max_tokens": 200,
    "temperature": 0,
    "return_token_ids": True,
}


@contextmanager
def two_gateways(directory: Path, *flags: str) -> Iterator[tuple[Cluster, Cluster]]:
    """Both have joined one prefill and one decode worker, which are the first's processes."""
    with Cluster(directory / "one") as one, Cluster(directory / "other") as other:
        for cluster in (one, other):
            cluster.gateway(*flags)
        for role in ("prefill", "decode"):
            one.worker(role, "--join", other.grpc)
        for cluster in (one, other):
            until_both_workers(cluster)
        yield one, other


def until_both_workers(cluster: Cluster) -> None:
    cluster.until(lambda status: len(status["workers"]) == 2, "both workers joined")


def questions(count: int) -> list[dict[str, Any]]:
    return [{**ANSWER, "prompt": f"question number {number}:"} for number in range(count)]


def undisturbed(cluster: Cluster, bodies: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each answer, one after the other."""
    return [complete(cluster.url, **body)["choices"][0]["token_ids"] for body in bodies]


class Streams:
    """Answers that are read side by side; all have begun when this returns."""

    def __init__(self, cluster: Cluster, bodies: list[dict[str, Any]]) -> None:
        self._begun = Barrier(len(bodies) + 1)
        self._pool = ThreadPoolExecutor(len(bodies))
        self._reads = [self._pool.submit(self._read, cluster, body) for body in bodies]
        self._begun.wait(60)

    def _read(self, cluster: Cluster, body: dict[str, Any]) -> list[int]:
        with stream(cluster.url, COMPLETIONS, body) as events:
            first = next(events)
            self._begun.wait(60)
            *chunks, end = [first, *events]
        assert end == DONE, end
        return [token for event in chunks for token in event["choices"][0]["token_ids"]]

    def tokens(self) -> list[list[int]]:
        """Of each, once they have ended."""
        with self._pool:
            return [read.result() for read in self._reads]
