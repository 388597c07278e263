"""An answer depends on its request alone: not on the cluster's shape, its load or its caches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.model import load_config
from tests.e2e.client import at_once, complete, get, tokens
from tests.e2e.cluster import Cluster, serving
from tests.e2e.conftest import Checkpoint
from tests.e2e.reference import OneProcess, prompt_of

COUNT = 24

FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "seed": 0},
    "temperature": {"temperature": 0.8, "seed": 1},
    "top_p": {"temperature": 1.0, "top_p": 0.8, "seed": 2**62 + 3},
    "top_k": {"temperature": 1.3, "top_k": 7, "seed": 4},
    "min_p": {"temperature": 1.5, "min_p": 0.1, "seed": -5},
    "penalties": {
        "temperature": 0.7,
        "presence_penalty": 0.9,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.4,
        "seed": 6,
    },
    "greedy penalties": {"temperature": 0, "frequency_penalty": 1.1, "seed": 0},
    "bias": {"temperature": 1.0, "logit_bias": {"7": 4.5, "8": -100}, "seed": 7},
    "all": {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.01,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 0.9,
        "seed": 8,
    },
}
ASKED = {"max_tokens": COUNT, "ignore_eos": True}
CROWDED_BLOCKS = 60
SMALL_STEPS = ("--max-num-batched-tokens", "40", "--chunk-bytes", "2048")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def vocab(model: Path) -> int:
    return load_config(model).vocab_size


@pytest.fixture(scope="module")
def reference(model: Path) -> OneProcess:
    return OneProcess(model)


@pytest.fixture(scope="module", params=["pair", "both", "crowded"])
def cluster(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """`crowded` is a pair whose decode worker has room for about six of these answers."""
    decode = ("--block-size", "64")
    if request.param == "crowded":
        decode = ("--block-size", "8", "--num-blocks", str(CROWDED_BLOCKS))
    with serving(
        tmp_path_factory.mktemp(request.param),
        model,
        decode=decode,
        both=int(request.param == "both"),
        flags=SMALL_STEPS,
    ) as cluster:
        yield cluster
        cluster.until_idle(2)


@pytest.mark.parametrize("name", FIELDS)
def test_sampling_is_that_of_one_process(
    name: str, cluster: Cluster, reference: OneProcess, vocab: int
) -> None:
    prompt = prompt_of(90, vocab)
    got = tokens(cluster.url, cluster.model, prompt, **ASKED, **FIELDS[name])
    assert got == reference.answer(prompt, COUNT, **FIELDS[name])


def test_the_settings_tell_answers_apart(reference: OneProcess, vocab: int) -> None:
    """Otherwise the test above would prove little."""
    answers = [reference.answer(prompt_of(90, vocab), COUNT, **f) for f in FIELDS.values()]
    assert len({tuple(answer) for answer in answers}) == len(FIELDS)


def test_choices_have_noise_of_their_own(
    cluster: Cluster, reference: OneProcess, vocab: int
) -> None:
    prompts = [prompt_of(40, vocab), prompt_of(55, vocab)]
    fields = FIELDS["temperature"]
    body = complete(cluster.url, cluster.model, prompts, n=3, **ASKED, **fields)
    wanted = [
        reference.answer(prompt, COUNT, choice, **fields)
        for prompt in prompts
        for choice in (0, 1, 2)
    ]
    assert [choice["token_ids"] for choice in body["choices"]] == wanted
    assert len({tuple(answer) for answer in wanted}) == 6


def test_32_at_once_are_each_as_if_alone(
    cluster: Cluster, reference: OneProcess, vocab: int
) -> None:
    """All lengths and settings mixed; crowded, most wait for room and some are evicted."""
    settings = list(FIELDS.values())
    jobs = [(prompt_of(3 * i + 1, vocab), settings[i % len(settings)]) for i in range(32)]
    ask = partial(tokens, cluster.url, cluster.model, **ASKED)
    crowded = any(worker["blocks"] == CROWDED_BLOCKS for worker in cluster.status()["workers"])
    for _ in range(5):  # on busy cores prompts may be read too slowly to crowd anything at first
        got = at_once([partial(ask, prompt, **fields) for prompt, fields in jobs], 32)
        for (prompt, fields), answer in zip(jobs, got, strict=True):
            assert answer == reference.answer(prompt, COUNT, **fields), f"{len(prompt)} tokens"
        cluster.until_idle(2)
        if not crowded or evictions(cluster):
            break
    assert (evictions(cluster) > 0) == crowded


def evictions(cluster: Cluster) -> float:
    exposition = get(cluster.url, "/metrics").body
    return sum(
        float(line.rpartition(" ")[2])
        for line in exposition.splitlines()
        if line.startswith("vllm:num_preemptions_total")
    )


def test_cached_prefixes_change_nothing(
    cluster: Cluster, reference: OneProcess, vocab: int
) -> None:
    """Twice the same prompt, then others that share most of it."""
    prompt = prompt_of(200, vocab)
    prompts = [prompt, prompt, [*prompt, 9, 8, 7], prompt[:150] + [5] * 20, prompt[:64]]
    cached = []
    for asked in prompts:
        body = complete(cluster.url, cluster.model, asked, **ASKED, **FIELDS["top_p"])
        assert body["choices"][0]["token_ids"] == reference.answer(asked, COUNT, **FIELDS["top_p"])
        cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert body["usage"]["prompt_tokens"] == len(asked)
    assert cached[0] == 0
    assert cached[1] >= 192 and cached[2] >= 192 and cached[3] >= 144 and cached[4] >= 48
    assert all(hit < len(asked) for hit, asked in zip(cached, prompts, strict=True))


def test_salts_share_no_prefix(cluster: Cluster, vocab: int) -> None:
    prompt = prompt_of(170, vocab)
    ask = partial(complete, cluster.url, cluster.model, prompt, **ASKED, **FIELDS["greedy"])
    usages = [ask(cache_salt=salt)["usage"] for salt in ("one", "other", "one")]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[:2] == [0, 0] and cached[2] >= 160
