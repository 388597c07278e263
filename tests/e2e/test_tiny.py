"""The built-in model's every promised answer, word for word, through the whole cluster."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from engine.tiny import Conversation, questions
from tests.e2e.client import DONE, at_once, post, stream
from tests.e2e.cluster import Cluster, serving
from tests.e2e.sockets import sockets

CHAT = "/v1/chat/completions"
KNOWN = questions()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Odd block sizes and small chunks: a corrupted byte of KV shows as a wrong word."""
    with serving(
        tmp_path_factory.mktemp("tiny"),
        prefill=("--block-size", "16"),
        decode=("--block-size", "48"),
        flags=("--max-num-batched-tokens", "64", "--chunk-bytes", "16384"),
    ) as cluster:
        yield cluster
        cluster.until_idle(2)


def body_of(talk: Conversation) -> dict[str, object]:
    messages = []
    for question, answer in talk.turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"model": "baton-tiny", "messages": messages[:-1], "temperature": 0}


def test_every_answer_is_word_for_word(cluster: Cluster) -> None:
    def ask(talk: Conversation) -> tuple[str, str]:
        answer = post(cluster.url, CHAT, body_of(talk))
        assert answer.status == 200, answer.body
        [choice] = answer.body["choices"]
        return choice["message"]["content"], choice["finish_reason"]

    got = at_once([partial(ask, talk) for talk in KNOWN], 8)
    wrong = {
        talk.turns[-1][0]: said
        for talk, said in zip(KNOWN, got, strict=True)
        if said != (talk.turns[-1][1], "stop")
    }
    assert not wrong
    assert any(len(talk.turns) > 1 for talk in KNOWN), "follow-up turns are among them"


@pytest.mark.parametrize("talk", KNOWN[:: len(KNOWN) // 8], ids=lambda talk: talk.turns[-1][0])
def test_the_stream_says_the_same(talk: Conversation, cluster: Cluster) -> None:
    with stream(cluster.url, CHAT, body_of(talk)) as events:
        *chunks, end = events
    assert end == DONE
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == talk.turns[-1][1]
    assert deltas[0]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_nothing_leaves_the_machine_unasked(cluster: Cluster) -> None:
    """Loopback by default, on every plane (FAULTS 1, row 2)."""
    for process in cluster.processes.values():
        found = sockets(process.pid)
        assert found, process.name
        assert not [one for one in found if not one.local.is_loopback], process.name
