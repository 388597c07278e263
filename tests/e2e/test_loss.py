"""A process dies or stops at the worst moment: the answer goes on and is the same answer (R5)."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.client import DONE, complete, get, post, stream, tokens
from tests.e2e.cluster import Cluster, serving
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER, SOON_S, long_answer, long_prompt
from tests.e2e.test_clients import generate_stream

SLOW = ("--max-num-batched-tokens", "16", "--chunk-bytes", "4096")  # of a prefill worker
ANSWER = {**LONG_ANSWER, "max_tokens": 1000, "temperature": 0, "return_token_ids": True}

WORST = pytest.mark.parametrize(
    ("blow", "cause"),
    [
        pytest.param(signal.SIGKILL, "died", id="killed"),
        pytest.param(signal.SIGSTOP, "silent", id="stopped"),
    ],
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """One prefill worker and two decode workers, slow enough to be met at work."""
    with serving(tmp_path, prefill=SLOW, flags=("--kernels", "torch")) as cluster:
        cluster.worker("decode", "--kernels", "torch")
        cluster.until_joined()
        yield cluster


def decoding(events: Iterator[Any]) -> list[Any]:
    """Reads so far that the handoff is over."""
    return [next(events) for _ in range(5)]


def works_again(cluster: Cluster) -> None:
    assert len(tokens(cluster.url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
    cluster.until_idle(SOON_S)


def decoder(cluster: Cluster) -> str:
    """The one decode worker that has something to do."""
    status = cluster.until(
        lambda s: sum(w["running"] for w in s["workers"] if w["role"] == "decode") == 1,
        "decoding",
    )
    return str(next(w["name"] for w in status["workers"] if w["role"] == "decode" and w["running"]))


def token_ids(chunks: list[Any]) -> list[int]:
    """Of one streamed choice that ended well."""
    *events, end = chunks
    assert end == DONE, end
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    return [token for event in events for token in event["choices"][0]["token_ids"]]


def counted(cluster: Cluster, name: str) -> dict[str, float]:
    """A counter's samples by their labels, without the model's name."""
    text = get(cluster.url, "/metrics").body
    found = re.findall(rf"^{name}{{(.*?),?model_name=\"[^\"]*\",?(.*)}} (\S+)$", text, re.MULTILINE)
    return {",".join(filter(None, labels)): float(value) for *labels, value in found}


@WORST
def test_decode_worker_lost_during_an_answer(
    cluster: Cluster, blow: signal.Signals, cause: str
) -> None:
    undisturbed = complete(cluster.url, **ANSWER)["choices"][0]["token_ids"]
    cluster.until_idle(SOON_S)
    with stream(cluster.url, COMPLETIONS, {**ANSWER, "return_timeline": True}) as events:
        begun = decoding(events)
        victim = decoder(cluster)
        cluster[victim].signal(blow)
        chunks = [*begun, *events]
    assert token_ids(chunks) == undisturbed
    [loss] = chunks[-2]["metrics"]["recoveries"]
    assert (loss["phase"], loss["cause"]) == ("decoding", cause) and loss["pause_ms"] > 0
    assert counted(cluster, "baton_recoveries_total") == {f'cause="{cause}",phase="decoding"': 1.0}
    status = cluster.until_idle(SOON_S)
    assert victim not in [worker["name"] for worker in status["workers"]]
    works_again(cluster)


@WORST
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_prefill_worker_lost_during_a_long_prompt(
    cluster: Cluster, streamed: bool, blow: signal.Signals, cause: str
) -> None:
    body = {**long_prompt(seed=1), "temperature": 0, "return_timeline": True}
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(post, cluster.url, COMPLETIONS, body)
        cluster.until(
            lambda s: any(w["owned_blocks"] for w in s["workers"] if w["role"] == "prefill"),
            "prefill under way",
        )
        cluster.worker("prefill", *SLOW, name="spare")
        cluster["prefill-0"].signal(blow)
        answer = call.result()
    assert answer.status == 200
    losses = answer.body["metrics"]["recoveries"]
    assert [(loss["phase"], loss["cause"]) for loss in losses] == [("prefilling", cause)]
    timeline = answer.body["metrics"]["timeline_ms"]
    assert timeline["recovery"] > 0
    cluster.until_joined("spare")
    again = post(cluster.url, COMPLETIONS, body)
    assert answer.body["choices"] == again.body["choices"]
    works_again(cluster)


def test_prefill_worker_lost_after_its_part(cluster: Cluster) -> None:
    """What it has handed over goes on without it."""
    with stream(cluster.url, COMPLETIONS, {**ANSWER, "return_timeline": True}) as events:
        begun = decoding(events)
        cluster["prefill-0"].signal(signal.SIGKILL)
        chunks = [*begun, *events]
    assert len(token_ids(chunks)) == 1000 and not chunks[-2]["metrics"]["recoveries"]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"temperature": 0.9, "seed": 11, "logprobs": 3}, id="seeded-logprobs"),
        pytest.param(
            {
                "temperature": 1.0,
                "seed": 5,
                "n": 3,
                "repetition_penalty": 1.1,
                "presence_penalty": 0.7,
                "frequency_penalty": 0.3,
            },
            id="penalties-choices",
        ),
        pytest.param(
            {"temperature": 0, "stop": ["\u0416\u0416", "\u00fc\u00fc"], "min_p": 0.1}, id="stop"
        ),
    ],
)
def test_nothing_of_an_answer_changes(cluster: Cluster, asked: dict[str, Any]) -> None:
    """Noise, penalties, logprobs, stop strings, choices and usage know of no attempt."""
    body = {**ANSWER, **asked}
    undisturbed = complete(cluster.url, **body)
    cluster.until_idle(SOON_S)
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(lambda: complete(cluster.url, **body))
        status = cluster.until(
            lambda s: any(w["running"] for w in s["workers"] if w["role"] == "decode"), "decoding"
        )
        busy = [w for w in status["workers"] if w["role"] == "decode" and w["running"]]
        cluster[busy[0]["name"]].signal(signal.SIGKILL)
        disturbed = call.result()
    assert sum(counted(cluster, "baton_recoveries_total").values()) >= 1
    usages = [{**b["usage"], "prompt_tokens_details": None} for b in (disturbed, undisturbed)]
    assert usages[0] == usages[1]
    for one, other in zip(disturbed["choices"], undisturbed["choices"], strict=True):
        logprobs, others = one.pop("logprobs", None), other.pop("logprobs", None)
        assert one == other
        if others is not None:
            assert logprobs["tokens"] == others["tokens"]
            assert logprobs["token_logprobs"] == pytest.approx(others["token_logprobs"], abs=1e-3)


def test_a_stopped_worker_comes_back_empty(cluster: Cluster) -> None:
    """R6: fenced while it slept, it frees everything and is a member again, as the same start."""
    with stream(cluster.url, COMPLETIONS, ANSWER) as events:
        begun = decoding(events)
        victim = decoder(cluster)
        before = cluster.worker_status(victim)["incarnation"]
        cluster[victim].signal(signal.SIGSTOP)
        token_ids([*begun, *events])
    cluster[victim].signal(signal.SIGCONT)
    cluster.until_joined()
    assert cluster.worker_status(victim)["incarnation"] == before
    works_again(cluster)


def test_grpc_goes_on_too(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        asked = long_answer()
        asked.max_tokens, asked.temperature, asked.return_timeline = 1000, 0, True
        undisturbed = list(generate_stream(channel)(asked, timeout=30))
        cluster.until_idle(SOON_S)
        call = generate_stream(channel)(asked, timeout=30)
        begun = decoding(call)
        cluster[decoder(cluster)].signal(signal.SIGKILL)
        disturbed = [*begun, *call]
    texts = [
        "".join(c.text for message in told for c in message.choices)
        for told in (undisturbed, disturbed)
    ]
    assert texts[0] == texts[1] != ""
    [loss] = disturbed[-1].metrics.recoveries
    assert (loss.phase, loss.cause) == ("decoding", "died") and loss.pause_ms > 0


def test_without_a_prefill_worker_a_decode_worker_reads_by_itself(cluster: Cluster) -> None:
    """R10. It heals without a restart of anything else."""
    before = complete(cluster.url, **ANSWER)
    cluster["prefill-0"].kill()
    cluster.until(lambda s: len(s["workers"]) == 2, "prefill-0 gone")
    assert get(cluster.url, "/ready").status == 200
    fallen = post(cluster.url, COMPLETIONS, ANSWER)
    assert fallen.status == 200 and fallen.body["choices"] == before["choices"]
    assert counted(cluster, "baton_fallbacks_total") == {"": 1.0}
    cluster.worker("prefill", name="successor")
    cluster.until_joined("successor")
    assert complete(cluster.url, **ANSWER)["choices"] == before["choices"]
    assert counted(cluster, "baton_fallbacks_total") == {"": 1.0}


def test_without_a_decode_worker_it_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, gateway=("--no-worker-timeout", "1")) as cluster:
        with stream(cluster.url, COMPLETIONS, ANSWER) as events:
            decoding(events)
            cluster["decode-0"].kill()
            *rest, last = events
        assert last["error"]["code"] == "no_workers" and DONE not in rest
        nobody = post(cluster.url, COMPLETIONS, {**ANSWER, "max_tokens": 2})
        assert nobody.status == 503 and nobody.body["error"]["code"] == "no_workers"
        assert int(nobody.headers["retry-after"]) > 0
        ready = get(cluster.url, "/ready")
        assert ready.status == 503 and int(ready.headers["retry-after"]) > 0
        cluster.worker("decode", name="successor")
        cluster.until_joined("successor")
        works_again(cluster)


def test_gateway_killed_and_started_again(cluster: Cluster) -> None:
    """Workers drop its requests at once, and are there for its successor."""
    with stream(cluster.url, COMPLETIONS, LONG_ANSWER) as events:
        decoding(events)
        cluster["gateway"].kill()
    cluster.gateway()
    cluster.until_joined()
    works_again(cluster)
