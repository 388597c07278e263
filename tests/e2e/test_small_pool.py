"""A KV pool that is smaller than the model's context: what fits is served, what cannot is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import client
from tests.e2e.cluster import Cluster, serving

POOL_TOKENS = 20 * 16


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("small-pool")
    with serving(directory, decode=("--num-blocks", "20")) as cluster:
        yield cluster


def test_a_chat_that_names_no_limit_gets_what_fits(cluster: Cluster) -> None:
    body = {"model": "baton-tiny", "messages": [{"role": "user", "content": "Hello"}]}
    answer = client.post(cluster.url, "/v1/chat/completions", body)
    assert answer.status == 200
    assert answer.body["choices"][0]["finish_reason"] == "stop"
    endless = client.post(cluster.url, "/v1/chat/completions", body | {"ignore_eos": True})
    assert endless.status == 200
    assert endless.body["choices"][0]["finish_reason"] == "length"
    assert endless.body["usage"]["total_tokens"] == POOL_TOKENS + 1


@pytest.mark.parametrize(("prompt", "limit"), [(POOL_TOKENS + 1, 1), (100, 300)])
def test_what_can_never_fit_is_refused(cluster: Cluster, prompt: int, limit: int) -> None:
    body = {"model": "baton-tiny", "prompt": [40] * prompt, "max_tokens": limit}
    answer = client.post(cluster.url, "/v1/completions", body)
    assert answer.status == 400
    assert answer.body["error"]["code"] == "prompt_too_large_for_server"
