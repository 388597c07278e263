from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadRequest, BatonError, NotFound
from gateway import content, parse, validate
from gateway.ask import Ask, Limits
from gateway.fields import ChatBody, CompletionBody
from tests.gateway.catalogue import CHAT, Case, cases

LIMITS = Limits(
    model_names=("tiny", "alias"), vocab_size=1000, max_model_len=64, max_prompt_tokens=40
)
HI = [{"role": "user", "content": "hi"}]


def run(case: Case, limits: Limits = LIMITS) -> Ask:
    """The gateway's way with a body, with one token per word in place of a tokenizer."""
    data = parse.parse_json(case.raw())
    ask = (validate.chat if case.endpoint == CHAT else validate.completion)(data, limits)
    prompts = [p if isinstance(p, tuple) else (1,) * len(p.split()) for p in ask.prompts]
    validate.fit(ask, prompts or [(1,)], limits)
    return ask


def completion(**fields: Any) -> Ask:
    return validate.completion({"model": "tiny", "prompt": "hi", **fields}, LIMITS)


def chat(**fields: Any) -> Ask:
    return validate.chat({"model": "tiny", "messages": HI, **fields}, LIMITS)


@pytest.mark.parametrize("case", cases(LIMITS), ids=str)
def test_catalogue(case: Case) -> None:
    if case.status == 200:
        run(case)
        return
    with pytest.raises(BatonError) as raised:
        run(case)
    error = raised.value
    assert (error.http, error.type) == (case.status, "invalid_request_error")
    assert (error.code, error.param) == (case.code, case.param)
    assert 0 < len(error.message) <= 300
    assert "pydantic" not in error.message


def test_every_row_about_fields_is_in_the_catalogue() -> None:
    # 15-19 and what follows 66 are the transport's.
    rows = {case.row for case in cases(LIMITS)}
    assert rows == {*range(1, 15), *range(20, 67)}


def test_names_made_up_by_the_client_are_not_repeated_at_length() -> None:
    name = "x" * 100_000
    for body in ({name: 1}, {"metadata": {name: "a"}}, {"model": name}, {"stop": name}):
        with pytest.raises(BatonError) as raised:
            completion(**body)
        assert len(json.dumps(raised.value.body())) < 600


def test_null_means_not_given() -> None:
    data = {"model": "tiny", "prompt": "hi"}
    fields = set(CompletionBody.model_fields) - data.keys()
    unsupported = ("best_of", "suffix", "prompt_logprobs", "guided_json", "truncate_prompt_tokens")
    asked = validate.completion({**data, **dict.fromkeys((*fields, *unsupported))}, LIMITS)
    assert asked == validate.completion(data, LIMITS)


def test_defaults() -> None:
    ask = completion()
    assert (ask.n, ask.stream, ask.echo, ask.stop) == (1, False, False, ())
    assert (ask.add_special_tokens, ask.skip_special_tokens) == (True, True)
    assert ask.sampling.seed == -1
    assert ask.sampling.logprobs is None
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.top_k) == (1.0, 1.0, 0)
    assert not chat().add_special_tokens
    assert chat().add_generation_prompt


def test_every_field_arrives() -> None:
    ask = completion(
        model="alias",
        prompt=[[1, 2], [3]],
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        presence_penalty=-1,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias={"7": -100, "3": 2.5},
        seed=11,
        stop=["b", "a", "b"],
        stop_token_ids=[9, 8, 9],
        include_stop_str_in_output=True,
        ignore_eos=True,
        n=3,
        logprobs=4,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        skip_special_tokens=False,
        add_special_tokens=False,
        cache_salt="mine",
        return_token_ids=True,
        return_timeline=True,
    )
    sampling = ask.sampling
    assert (ask.model, ask.prompts, ask.n) == ("alias", ((1, 2), (3,)), 3)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.logprobs) == (5, 2, 4)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.min_p, sampling.presence_penalty) == (0.125, -1.0)
    assert (sampling.frequency_penalty, sampling.repetition_penalty) == (1.5, 1.25)
    assert sampling.logit_bias == ((3, 2.5), (7, -100.0))
    assert (sampling.seed, sampling.stop_token_ids) == (11, (9, 8))
    assert (ask.stop, ask.include_stop, ask.ignore_eos) == (("b", "a"), True, True)
    assert (ask.stream, ask.include_usage, ask.continuous_usage) == (True, True, True)
    assert (ask.skip_special_tokens, ask.add_special_tokens) == (False, False)
    assert (ask.cache_salt, ask.return_token_ids, ask.return_timeline) == ("mine", True, True)


def test_the_clients_value_comes_before_the_models_and_that_before_ours() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    body = {"model": "tiny", "messages": HI, "top_k": 0, "top_p": None}
    sampling = validate.chat(body, LIMITS, defaults).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 0, 0.95)
    assert sampling.min_p == 0.0


@pytest.mark.parametrize(("asked", "kept"), [(0, 0.0), (1e-300, 0.0), (0.01, 0.01), (2, 2.0)])
def test_a_temperature_next_to_nothing_is_greedy(asked: float, kept: float) -> None:
    assert completion(temperature=asked).sampling.temperature == kept


@pytest.mark.parametrize(("asked", "kept"), [(-1, 0), (0, 0), (1, 1), (999, 999), (1000, 0)])
def test_top_k_of_everything_is_none(asked: int, kept: int) -> None:
    assert completion(top_k=asked).sampling.top_k == kept


@pytest.mark.parametrize(
    ("asked", "kept"), [(0, 0), (5, 5), (-1, 2**64 - 1), (-(2**63), 2**63), (2**63 - 1, 2**63 - 1)]
)
def test_negative_seeds_are_seeds(asked: int, kept: int) -> None:
    assert completion(seed=asked).sampling.seed == kept


def test_chat_logprobs() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling.logprobs == 3
    assert chat(logprobs=False, top_logprobs=0).sampling.logprobs is None


def test_max_completion_tokens_is_max_tokens() -> None:
    assert chat(max_completion_tokens=7).sampling.max_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).sampling.max_tokens == 7


def test_messages_as_templates_see_them() -> None:
    ask = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"], "name": "Ann"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "audio": None},
        ]
    )
    assert ask.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": "c"},
    )


def test_continuing_a_message_opens_no_new_turn() -> None:
    ask = chat(continue_final_message=True)
    assert (ask.continue_final_message, ask.add_generation_prompt) == (True, False)
    ask = chat(add_generation_prompt=False)
    assert (ask.continue_final_message, ask.add_generation_prompt) == (False, False)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        # `vllm bench serve`, both of its endpoints
        (
            "completion",
            {
                "model": "tiny",
                "prompt": "hello there",
                "repetition_penalty": 1.0,
                "max_tokens": 8,
                "logprobs": None,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                "temperature": 0.0,
            },
        ),
        (
            "chat",
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
                "max_completion_tokens": 8,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                "temperature": 0.0,
                "top_p": 1.0,
            },
        ),
        # SGLang's benchmark
        (
            "completion",
            {
                "model": "tiny",
                "prompt": "hello there",
                "temperature": 0.0,
                "best_of": 1,
                "max_tokens": 8,
                "stream": True,
                "ignore_eos": True,
            },
        ),
        # the openai library with everything at its neutral value
        (
            "chat",
            {
                "model": "tiny",
                "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}],
                "frequency_penalty": 0,
                "presence_penalty": 0.0,
                "logit_bias": {},
                "n": 1,
                "stop": [],
                "user": "someone",
                "metadata": {"job": "5"},
                "store": False,
                "service_tier": "auto",
                "parallel_tool_calls": True,
                "tool_choice": "none",
                "response_format": {"type": "text"},
                "modalities": ["text"],
                "priority": 0,
                "length_penalty": 1.0,
                "use_beam_search": False,
            },
        ),
    ],
)
def test_bodies_that_clients_send(endpoint: str, body: dict[str, Any]) -> None:
    getattr(validate, endpoint)(parse.parse_json(json.dumps(body).encode()), LIMITS)


def test_unknown_fields_can_be_ignored_but_not_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lenient = Limits(("tiny",), 1000, 64, 40, allow_unknown_fields=True)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi", "weight": 1}],
        "stream": True,
        "stream_options": {"extra": 1, "include_usage": True},
        "x" * 10_000: 1,
    }
    with caplog.at_level(logging.WARNING):
        ask = validate.chat(body, lenient)
    assert ask.include_usage
    assert ask.messages == tuple(HI)
    fields = caplog.records[0].fields  # type: ignore[attr-defined]
    assert "stream_options.extra" in fields
    assert max(map(len, fields)) <= 64
    assert body["stream_options"] == {"extra": 1, "include_usage": True}


@pytest.mark.parametrize("name", ["kv_transfer_params", "bootstrap_room", "prompt_embeds"])
def test_what_names_internals_is_never_ignored(name: str) -> None:
    lenient = Limits(("tiny",), 1000, 64, 40, allow_unknown_fields=True)
    with pytest.raises(BadRequest) as raised:
        validate.completion({"model": "tiny", "prompt": "hi", name: None}, lenient)
    assert raised.value.code == "unknown_parameter"


def test_unknown_fields_do_not_hide_faults() -> None:
    lenient = Limits(("tiny",), 1000, 64, 40, allow_unknown_fields=True)
    with pytest.raises(BadRequest) as raised:
        validate.completion({"model": "tiny", "prompt": "hi", "x": 1, "top_p": 5}, lenient)
    assert raised.value.param == "top_p"


def test_tokenize() -> None:
    call = validate.tokenize({"prompt": "hi", "return_token_strs": True}, LIMITS)
    assert call.return_token_strs
    assert (call.ask.prompts, call.ask.add_special_tokens) == (("hi",), True)
    call = validate.tokenize({"model": "alias", "messages": HI, "tools": None}, LIMITS)
    assert (call.ask.kind, call.ask.messages) == ("chat", tuple(HI))
    assert (call.ask.add_special_tokens, call.ask.add_generation_prompt) == (False, True)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"prompt": "a", "messages": HI}, "conflicting_parameters"),
        ({"prompt": ["a"]}, "invalid_type"),
        ({"messages": []}, "empty_array"),
        ({"prompt": "a", "chat_template": "x"}, "unsupported_parameter"),
        ([], "invalid_type"),
    ],
)
def test_bad_calls_of_tokenize(body: Any, code: str) -> None:
    with pytest.raises(BadRequest) as raised:
        validate.tokenize(body, LIMITS)
    assert raised.value.code == code


def test_detokenize() -> None:
    assert validate.detokenize({"tokens": [1, 2]}, LIMITS) == (1, 2)
    assert validate.detokenize({"model": "tiny", "tokens": []}, LIMITS) == ()
    with pytest.raises(NotFound):
        validate.detokenize({"model": "other", "tokens": []}, LIMITS)
    for tokens, code in (([1000], "token_out_of_range"), ([True], "invalid_type")):
        with pytest.raises(BadRequest) as raised:
            validate.detokenize({"tokens": tokens}, LIMITS)
        assert raised.value.code == code


@pytest.mark.parametrize(
    ("prompt", "asked", "given"),
    [(1, 40, 40), (24, None, 16), (35, None, 6), (40, None, 1), (40, 1, 1), (1, None, 16)],
)
def test_fit_completion(prompt: int, asked: int | None, given: int) -> None:
    ask = completion(max_tokens=asked)
    assert validate.fit(ask, [(1,) * prompt], LIMITS) == given


def test_fit_chat_gets_what_is_left() -> None:
    assert validate.fit(chat(), [(1,) * 10], LIMITS) == 31
    whole = Limits(("tiny",), 1000, 64, 1000)
    assert validate.fit(chat(), [(1,) * 10], whole) == 54


def test_fit_holds_for_the_longest_prompt() -> None:
    assert validate.fit(completion(), [(1,), (1,) * 38], LIMITS) == 3


def test_fit_says_both_numbers() -> None:
    with pytest.raises(BadRequest) as raised:
        validate.fit(completion(max_tokens=50), [(1,) * 20], LIMITS)
    assert "64" in raised.value.message
    assert "70" in raised.value.message


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ((), "empty_prompt"),
        ((1000,), "token_out_of_range"),
        ((1,) * 64, "context_length_exceeded"),
        ((1,) * 41, "prompt_too_large_for_server"),
    ],
)
def test_fit_checks_what_the_tokenizer_made(prompt: tuple[int, ...], code: str) -> None:
    with pytest.raises(BadRequest) as raised:
        validate.fit(completion(), [(1,), prompt], LIMITS)
    assert (raised.value.code, raised.value.param) == (code, "prompt")


def test_requests_in_the_order_of_choices() -> None:
    ask = completion(prompt=["a", "b"], n=3, stop_token_ids=[7, 5])
    ids = iter("uvwxyz")
    made = validate.requests(
        ask,
        [(1,), (2, 3)],
        9,
        eos_ids=(5, 6),
        new_id=lambda: next(ids),
        new_seed=lambda: 77,
        salt=b"tenant",
    )
    assert [request.id for request in made] == list("uvwxyz")
    assert [request.tokens for request in made] == [(1,)] * 3 + [(2, 3)] * 3
    assert [request.sampling.choice for request in made] == [0, 1, 2] * 2
    assert {request.sampling.seed for request in made} == {77}
    assert {request.sampling.max_tokens for request in made} == {9}
    assert {request.sampling.stop_token_ids for request in made} == {(7, 5, 6)}
    assert {request.salt for request in made} == {b"tenant"}


def test_requests_with_the_clients_seed_and_without_eos() -> None:
    def no_seed() -> int:
        raise AssertionError("the client gave one")

    (request,) = validate.requests(
        completion(seed=-1, ignore_eos=True),
        [(1,)],
        9,
        eos_ids=(5,),
        new_id=lambda: "a",
        new_seed=no_seed,
        salt=b"",
    )
    assert (request.sampling.seed, request.sampling.stop_token_ids) == (2**64 - 1, ())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(
    st.sampled_from(sorted(ChatBody.model_fields | CompletionBody.model_fields)),
    json_values,
    st.booleans(),
)
def test_any_value_in_any_field_is_served_or_refused(name: str, value: Any, lenient: bool) -> None:
    limits = Limits(("tiny",), 1000, 64, 40, allow_unknown_fields=lenient)
    for call, body in (
        (validate.completion, {"model": "tiny", "prompt": "hi", name: value}),
        (validate.chat, {"model": "tiny", "messages": HI, name: value}),
        (validate.chat, {"model": "tiny", "messages": [{"role": "user", "content": value}]}),
    ):
        try:
            call(body, limits)
        except (BadRequest, NotFound) as error:
            assert len(error.message) <= 300


class Watched(list[int]):
    """Remembers the longest part of it that anybody took at once."""

    longest = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if isinstance(key, slice):
            self.longest = max(self.longest, len(part))
        return part

    def __iter__(self) -> Any:
        raise AssertionError("it was gone through as a whole")


def test_many_ids_are_looked_at_part_by_part() -> None:
    limits = Limits(("tiny",), 1000, 1 << 20, 1 << 20)
    for bad, code in ((1000, "token_out_of_range"), (-1, "token_out_of_range"), (True, "type")):
        ids = Watched([5] * 100_000)
        ids[99_999] = bad
        with pytest.raises(BadRequest) as caught:
            content.token_ids(ids, "tokens", limits)
        assert code in caught.value.code
        assert 0 < ids.longest <= content.CUT


@pytest.mark.parametrize("prompt", [[1, *[None] * 64], [[1, *[None] * 64]], [[1], [1, *"x" * 64]]])
def test_a_prompt_beyond_any_context_is_refused_before_it_is_looked_at(prompt: Any) -> None:
    """What else is in it would be another fault."""
    with pytest.raises(BadRequest) as caught:
        validate.completion({"model": "tiny", "prompt": prompt}, LIMITS)
    assert caught.value.code == "context_length_exceeded"


def test_every_number_of_a_large_body_lets_other_threads_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter changes threads at calls into Python, never within one of C."""
    calls = 0
    convert = parse._integer

    def counted(text: str) -> int:
        nonlocal calls
        calls += 1
        return convert(text)

    monkeypatch.setattr(parse, "_integer", counted)
    ids = list(range(-20, 30_000))
    assert parse.parse_json(json.dumps({"tokens": ids}).encode()) == {"tokens": ids}
    assert calls == len(ids)


@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_parse_any_bytes(body: bytes) -> None:
    try:
        data = parse.parse_json(body)
    except BadRequest:
        return
    assert data == json.loads(body)


@given(json_values)
def test_parse_what_json_writes(data: Any) -> None:
    text = json.dumps(data)
    if "NaN" in text or "Infinity" in text:
        return
    assert parse.parse_json(text.encode()) == data
    assert parse.parse_json(json.dumps(data, ensure_ascii=False).encode()) == data


def test_surrogate_pairs_and_escaped_backslashes_are_text() -> None:
    assert parse.parse_json(b'"\\ud83d\\ude00 \\\\ud800"') == "\U0001f600 \\ud800"
