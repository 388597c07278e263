from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.load import Sample
from bench.options import ServeOptions
from bench.requests import prepare, request_body
from bench.vocabulary import WordVocabulary
from cluster.errors import StartError


async def bodies(options: ServeOptions, count: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    requests = await prepare(options, "m", WordVocabulary(), count, seed)
    return [json.loads(body) for body, _ in requests]


def test_completion_body() -> None:
    options = ServeOptions(ignore_eos=True, timeline=True, sampling={"temperature": 0.5})
    assert request_body(options, "m", Sample([1, 2], 8)) == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "ignore_eos": True,
        "return_timeline": True,
    }


def test_chat_body_and_extra_body_wins() -> None:
    options = ServeOptions(backend="openai-chat", extra_body={"temperature": 1, "user": "me"})
    assert request_body(options, "m", Sample("hello", 8)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 1,
        "user": "me",
    }


async def test_random_data_for_completions_is_token_ids() -> None:
    options = ServeOptions(random_input_len=6, random_output_len=3)
    requests = await prepare(options, "m", WordVocabulary(), 2, 0)
    assert [tokens for _, tokens in requests] == [6, 6]
    for body in await bodies(options):
        assert len(body["prompt"]) == 6 and body["max_tokens"] == 3
        assert all(type(token) is int for token in body["prompt"])


async def test_random_data_for_chat_is_text() -> None:
    options = ServeOptions(backend="openai-chat", random_input_len=6)
    for body in await bodies(options):
        (message,) = body["messages"]
        assert message["role"] == "user" and len(message["content"].split()) == 6


async def test_prefix_repetition() -> None:
    options = ServeOptions(
        dataset_name="prefix_repetition",
        prefix_repetition_prefix_len=5,
        prefix_repetition_suffix_len=2,
        prefix_repetition_num_prefixes=2,
    )
    prompts = [body["prompt"] for body in await bodies(options, 4)]
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 2
    assert {len(prompt) for prompt in prompts} == {7}


async def test_custom_messages_go_to_chat_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"messages": messages}))
    chat = ServeOptions(dataset_name="custom", dataset_path=path, backend="openai-chat")
    assert [body["messages"] for body in await bodies(chat)] == [messages, messages]
    with pytest.raises(StartError, match="openai-chat"):
        await bodies(ServeOptions(dataset_name="custom", dataset_path=path))


async def test_sharegpt_counts_lengths_and_drops_the_unusual(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    turns = [("one two three four five", "a b c d e f"), ("too short", "a b c d e f")]
    rows = [{"conversations": [{"value": ask}, {"value": reply}]} for ask, reply in turns]
    path.write_text(json.dumps(rows))
    options = ServeOptions(dataset_name="sharegpt", dataset_path=path)
    for body in await bodies(options, 3):
        assert (body["prompt"], body["max_tokens"]) == (turns[0][0], 6)
    path.write_text(json.dumps(rows[1:]))
    with pytest.raises(StartError, match="no conversation of usual length"):
        await bodies(options)


async def test_unreadable_file_is_one_line(tmp_path: Path) -> None:
    options = ServeOptions(dataset_name="custom", dataset_path=tmp_path / "absent.jsonl")
    with pytest.raises(StartError, match=r"absent\.jsonl"):
        await bodies(options)


async def test_nothing_to_make() -> None:
    assert await bodies(ServeOptions(), 0) == []
