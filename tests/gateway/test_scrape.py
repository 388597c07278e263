from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client.parser import text_string_to_metric_families

from cluster.messages import Load
from cluster.metrics import GatewayMetrics, WorkerView
from gateway.scrape import Siblings, merge

WORKER = WorkerView("d0", "decode", 16, 100, Load(1, running=3))


def metrics(tokens: int) -> GatewayMetrics:
    """Of one gateway that knows one worker."""
    made = GatewayMetrics("m", 100, lambda: [WORKER])
    for _ in range(tokens):
        made.next_token(0.01)
    return made


def values(text: str, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_each_sample_names_its_gateway_and_each_worker_comes_once() -> None:
    text = merge(1, {n: metrics(n + 1).exposition().decode() for n in (0, 1)})
    assert values(text, "vllm:generation_tokens_total") == {
        (("gateway", "0"), ("model_name", "m")): 1.0,
        (("gateway", "1"), ("model_name", "m")): 2.0,
    }
    running = values(text, "vllm:num_requests_running")
    assert list(running.values()) == [3.0]
    assert "gateway" not in dict(next(iter(running)))
    buckets = values(text, "vllm:inter_token_latency_seconds_bucket")
    assert {dict(labels)["gateway"] for labels in buckets} == {"0", "1"}


def test_each_gateways_own_queue_is_shown() -> None:
    waiting = (3, 7)
    texts = {}
    for number in (0, 1):
        made = metrics(1)
        made.queue(lambda: 0, lambda number=number: waiting[number], lambda: 0.0)
        texts[number] = made.exposition().decode()
    shown = values(merge(0, texts), "vllm:num_requests_waiting")
    own = {dict(labels)["gateway"]: n for labels, n in shown.items() if "gateway" in dict(labels)}
    assert own == {"0": 3.0, "1": 7.0}
    assert len(shown) == 3


def test_a_family_is_described_once_and_in_one_place() -> None:
    text = merge(0, {n: metrics(1).exposition().decode() for n in (0, 1, 2)})
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert len(heads) == len(set(heads))
    assert {line.split()[1] for line in heads} == {"HELP", "TYPE"}


def test_what_only_one_has_counted_is_shown() -> None:
    failed = metrics(1)
    failed.error("overloaded")
    texts = {0: metrics(1).exposition().decode(), 1: failed.exposition().decode()}
    [(labels, value)] = values(merge(0, texts), "baton_errors_total").items()
    assert dict(labels) == {"gateway": "1", "model_name": "m", "code": "overloaded"}
    assert value == 1.0


def test_samples_without_labels_get_one() -> None:
    text = "# HELP a About.\n# TYPE a counter\na_total 1.0\n"
    assert merge(0, {0: text}) == '# HELP a About.\n# TYPE a counter\na_total{gateway="0"} 1.0\n'


@asynccontextmanager
async def sibling(answer: web.Response, seen: list[str]) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("authorization", ""))
        return answer

    app = web.Application()
    app.router.add_get("/metrics", handle)
    async with TestServer(app) as server:
        yield f"127.0.0.1:{server.port}"


async def test_the_others_are_asked_with_the_callers_key() -> None:
    seen: list[str] = []
    own = metrics(1).exposition()
    theirs = web.Response(body=metrics(5).exposition())
    async with sibling(theirs, seen) as address:
        text = await Siblings(8000, ("nobody", address), 0).scrape(own, b"Bearer k")
    tokens = values(text.decode(), "vllm:generation_tokens_total")
    assert sorted(tokens.values()) == [1.0, 5.0]
    assert seen == ["Bearer k"]


async def test_who_does_not_answer_is_left_out() -> None:
    own = metrics(2).exposition()
    async with sibling(web.Response(status=401), []) as refusing:
        gone = "127.0.0.1:1"
        text = await Siblings(8000, (gone, refusing, "nobody"), 2).scrape(own, b"")
    assert list(values(text.decode(), "vllm:generation_tokens_total").values()) == [2.0]
