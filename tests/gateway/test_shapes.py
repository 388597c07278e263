"""The exact JSON: compared whole, because clients read it literally."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway import validate
from gateway.gateway import Gateway
from gateway.shapes import ChatShape, CompletionShape, Shape, error_event, shape_of
from gateway.stream import Answer, Delta, Usage
from tests.gateway.fakes import MODEL, FakeSequencer, make_gateway, says

A, B = ((65, -0.5), (66, -1.5)), ((66, float("-inf")), (65, -0.25))


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return make_gateway(tmp_path, FakeSequencer(says("")), wall_clock=lambda: 123.9)


def completion(gateway: Gateway, prompts: Any = ((1, 2),), **fields: Any) -> Shape:
    data = {"model": MODEL, "prompt": "p", "stream": True, **fields}
    ask = validate.completion(data, gateway.limits)
    echoes = ["p" if ask.echo else ""] * len(prompts)
    return shape_of(gateway, ask, Answer(gateway, ask, prompts, echoes, (), 0.0))


def chat(gateway: Gateway, **fields: Any) -> Shape:
    messages = [{"role": "user", "content": "p"}]
    data = {"model": MODEL, "messages": messages, "stream": True, **fields}
    ask = validate.chat(data, gateway.limits)
    return shape_of(gateway, ask, Answer(gateway, ask, ((1, 2),), [""], (), 0.0))


def parsed(events: str) -> list[dict[str, Any]]:
    """Each event without the fields that all of one answer share."""
    *lines, rest = events.split("\n\n")
    assert rest == ""
    found = []
    for line in lines:
        event = json.loads(line.removeprefix("data: "))
        del event["id"], event["created"], event["model"], event["object"]
        found.append(event)
    return found


def test_the_kind_decides_the_shape(gateway: Gateway) -> None:
    assert type(chat(gateway)) is ChatShape
    assert type(completion(gateway)) is CompletionShape


def test_a_chat_opens_with_its_role_and_its_first_text(gateway: Gateway) -> None:
    shape = chat(gateway)
    events = parsed(shape.events(Delta(0, "Hi", (1,), so_far=1, opens=True)))
    assert events == [
        {
            "choices": [
                {
                    "index": 0,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
            ]
        },
        {
            "choices": [
                {"index": 0, "delta": {"content": "Hi"}, "logprobs": None, "finish_reason": None}
            ]
        },
    ]


def test_a_chat_opens_even_while_its_text_is_held(gateway: Gateway) -> None:
    [event] = parsed(chat(gateway).events(Delta(0, "", opens=True)))
    assert event["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_what_all_chunks_share(gateway: Gateway) -> None:
    shape = chat(gateway)
    texts = [shape.events(Delta(0, "a")), shape.events(Delta(0, "b"))]
    one, two = (json.loads(text.removeprefix("data: ")) for text in texts)
    assert one["id"] == two["id"]
    assert one["id"].startswith("chatcmpl-")
    assert (one["object"], one["created"], one["model"]) == ("chat.completion.chunk", 123, MODEL)
    text = completion(gateway).events(Delta(0, "a"))
    event = json.loads(text.removeprefix("data: "))
    assert event["id"].startswith("cmpl-")
    assert event["object"] == "text_completion"


def test_a_completion_chunk(gateway: Gateway) -> None:
    shape = completion(gateway)
    assert shape.events(Delta(0, "", opens=True)) == ""
    [event] = parsed(shape.events(Delta(3, "x", (1,), opens=True)))
    assert event == {
        "choices": [{"index": 3, "text": "x", "logprobs": None, "finish_reason": None}]
    }


@pytest.mark.parametrize("reason", [None, "STOP", 7])
def test_the_last_chunk_says_why(gateway: Gateway, reason: Any) -> None:
    delta = Delta(0, "x", finish="stop", stop_reason=reason)
    for shape in (chat(gateway), completion(gateway)):
        [event] = parsed(shape.events(delta))
        assert event["choices"][0]["finish_reason"] == "stop"
        assert event["choices"][0]["stop_reason"] == reason


@pytest.mark.parametrize("text", ["\n\ndata: [DONE]\n\n", "\u2028\u2029\x85\r", '"}]}', "€😀\0"])
def test_text_cannot_leave_its_event(gateway: Gateway, text: str) -> None:
    for shape in (chat(gateway), completion(gateway)):
        events = shape.events(Delta(0, text))
        assert len(events.splitlines()) == 2
        assert events.isascii()
        choice = parsed(events)[0]["choices"][0]
        assert choice.get("text", choice.get("delta", {}).get("content")) == text


def test_chat_logprobs(gateway: Gateway) -> None:
    shape = chat(gateway, logprobs=True, top_logprobs=1)
    [event] = parsed(shape.events(Delta(0, "AB", (65, 66), (A, B))))
    assert event["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "A",
                "logprob": -0.5,
                "bytes": [65],
                "top_logprobs": [{"token": "B", "logprob": -1.5, "bytes": [66]}],
            },
            {
                "token": "B",
                "logprob": -9999.0,
                "bytes": [66],
                "top_logprobs": [{"token": "A", "logprob": -0.25, "bytes": [65]}],
            },
        ]
    }


def test_completion_logprobs(gateway: Gateway) -> None:
    shape = completion(gateway, logprobs=1)
    first = parsed(shape.events(Delta(0, "AB", (65, 66), (A, B))))[0]["choices"][0]["logprobs"]
    assert first == {
        "text_offset": [0, 1],
        "token_logprobs": [-0.5, -9999.0],
        "tokens": ["A", "B"],
        "top_logprobs": [{"B": -1.5, "A": -0.5}, {"A": -0.25, "B": -9999.0}],
    }
    second = parsed(shape.events(Delta(0, "A", (65,), (A,))))[0]["choices"][0]["logprobs"]
    assert second["text_offset"] == [2]


def test_offsets_count_characters_not_tokens(gateway: Gateway) -> None:
    shape = completion(gateway, logprobs=0)
    entries = tuple(((byte, -1.0),) for byte in "€x".encode())
    [event] = parsed(shape.events(Delta(0, "€x", (), entries)))
    assert event["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 1]


def test_running_usage_counts_all_choices(gateway: Gateway) -> None:
    shape = completion(gateway, n=2, stream_options={"continuous_usage_stats": True})
    shape.events(Delta(0, "a", so_far=1))
    shape.events(Delta(1, "b", so_far=1))
    [event] = parsed(shape.events(Delta(0, "c", so_far=2)))
    assert event["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    [role, _] = parsed(
        chat(gateway, stream_options={"continuous_usage_stats": True}).events(
            Delta(0, "a", so_far=1, opens=True)
        )
    )
    assert role["usage"]["completion_tokens"] == 1


def test_the_usage_chunk_has_no_choices(gateway: Gateway) -> None:
    usage = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=1)
    [event] = parsed(chat(gateway).usage_event(usage, {"queue_time_ms": 1.5}))
    assert event == {
        "choices": [],
        "usage": {
            "prompt_tokens": 5,
            "total_tokens": 7,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        "metrics": {"queue_time_ms": 1.5},
    }
    assert "metrics" not in parsed(chat(gateway).usage_event(usage, None))[0]


def test_token_ids_on_request(gateway: Gateway) -> None:
    shape = completion(gateway, return_token_ids=True)
    [first] = parsed(shape.events(Delta(0, "a", (65, 66))))
    assert first["choices"][0]["token_ids"] == [65, 66]
    assert first["choices"][0]["prompt_token_ids"] == [1, 2]
    [second] = parsed(shape.events(Delta(0, "b", (67,))))
    assert "prompt_token_ids" not in second["choices"][0]
    role, text = parsed(
        chat(gateway, return_token_ids=True).events(Delta(0, "a", (65,), opens=True))
    )
    assert role["prompt_token_ids"] == [1, 2]
    assert text["choices"][0]["token_ids"] == [65]


def test_a_whole_chat(gateway: Gateway) -> None:
    shape = chat(gateway)
    deltas = [Delta(0, "Hi", (1,), opens=True), Delta(0, "!", (2,), finish="length")]
    whole = json.loads(shape.whole(deltas, Usage(2, 2, 0), None))
    assert whole.pop("id").startswith("chatcmpl-")
    assert whole == {
        "object": "chat.completion",
        "created": 123,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi!"},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_whole_completion_orders_its_choices(gateway: Gateway) -> None:
    shape = completion(gateway, prompts=((1,), (2, 3)), logprobs=1, return_token_ids=True)
    deltas = [
        Delta(1, "A", (65,), (A,), finish="stop", stop_reason="x"),
        Delta(0, "B", (66,), (B,)),
        Delta(0, "A", (65,), (A,), finish="length"),
    ]
    whole = json.loads(shape.whole(deltas, Usage(3, 3, 0), {"mean_itl_ms": None}))
    first, second = whole["choices"]
    assert (first["index"], first["text"], second["text"]) == (0, "BA", "A")
    assert first["logprobs"]["text_offset"] == [0, 1]
    assert first["token_ids"] == [66, 65]
    assert second["prompt_token_ids"] == [2, 3]
    assert second["stop_reason"] == "x"
    assert whole["metrics"] == {"mean_itl_ms": None}


def test_an_error_event() -> None:
    assert error_event({"error": {"code": "x"}}) == b'data: {"error":{"code":"x"}}\n\n'
