"""The bad-input catalogue: one table for the validator, HTTP, gRPC and the whole cluster.

Rows carry the number they have in the project's catalogue of faults; one number may have several
bodies. A body is JSON as a dict (`model` is filled in unless the case is about it) or raw bytes.
Rows about the transport (content type, sizes, connections, keys) are in `transport.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gateway.ask import Limits

INSIDES = re.compile(r"0x[0-9a-f]{6,}|Traceback|\.py\b|/home/|/tmp/|site-packages|127\.0\.0\.1")
"""What no answer to a client may hold."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Case:
    row: int
    endpoint: str
    body: bytes | dict[str, Any]
    status: int = 400
    code: str = ""
    param: str | None = None

    def __str__(self) -> str:
        return f"{self.row}-{self.endpoint.rsplit('/')[2]}-{self.raw()[:60]!r}"

    def raw(self) -> bytes:
        """The body as HTTP carries it."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def cases(limits: Limits) -> list[Case]:
    """All of it, for a server with these limits. Statuses are 400, 404 or 200."""
    model, vocab, context = limits.model_names[0], limits.vocab_size, limits.max_model_len
    hi = [{"role": "user", "content": "hi"}]
    found: list[Case] = []

    def raw(row: int, code: str, *bodies: bytes, param: str | None = None) -> None:
        found.extend(Case(row, COMPLETIONS, body, 400, code, param) for body in bodies)

    def bad(row: int, code: str, param: str | None, *bodies: dict[str, Any]) -> None:
        """Completions, with a model and a prompt if the body has none."""
        for body in bodies:
            whole = {"model": model, "prompt": "hi", **body}
            found.append(Case(row, COMPLETIONS, whole, 400, code, param))

    def bad_chat(row: int, code: str, param: str | None, *bodies: dict[str, Any]) -> None:
        for body in bodies:
            whole = {"model": model, "messages": hi, **body}
            found.append(Case(row, CHAT, whole, 400, code, param))

    def bad_content(row: int, code: str, param: str, *contents: Any) -> None:
        for content in contents:
            bad_chat(row, code, param, {"messages": [{"role": "user", "content": content}]})

    def good(row: int, body: dict[str, Any]) -> None:
        whole = {"model": model, "max_tokens": 2, **body}
        found.append(Case(row, CHAT if "messages" in body else COMPLETIONS, whole, 200))

    start = f'{{"model": "{model}", "prompt": "hi"'.encode()

    raw(1, "invalid_json", b'{"prompt": ', b'{"prompt": "hi', start)
    raw(2, "invalid_json", b"", b" \n")
    raw(3, "invalid_type", b"null", b"[]", b'"x"', b"5")
    raw(4, "invalid_json", start + b"} x", start + b"}{}", start + b",}")
    raw(5, "invalid_json", start + b', "temperature": NaN}')
    raw(6, "invalid_json", *(start + b', "temperature": ' + n + b"}" for n in _NUMBERS))
    raw(7, "invalid_json", start + b', "user": "\xff"}', start + b', "user": "\xed\xa0\x80"}')
    raw(8, "invalid_json", (start + b"}").decode().encode("utf-16"), b"\xef\xbb\xbf" + start + b"}")
    raw(9, "invalid_json", start + b', "user": "\\ud800"}', start + b', "\\uDFFF": 1}')
    good(10, {"prompt": "a\u0000b"})
    raw(11, "invalid_json", b"[" * 200_000, b"[" * 100_000 + b"]" * 100_000)
    raw(11, "invalid_json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    raw(12, "invalid_json", start + b', "seed": ' + b"9" * 5000 + b"}")
    raw(
        13,
        "duplicate_parameter",
        start + b', "max_tokens": 1, "max_tokens": 2}',
        start + b', "max_tokens": 1, "max\\u005ftokens": 1}',
        param="max_tokens",
    )
    bad(14, "unknown_parameter", "no_such_field", {"no_such_field": 1})
    bad(
        14,
        "unknown_parameter",
        "stream_options.extra",
        {"stream": True, "stream_options": {"extra": True}},
    )
    bad_chat(
        14,
        "unknown_parameter",
        "messages.0.extra",
        {"messages": [{"role": "user", "content": "hi", "extra": 1}]},
    )

    found.append(
        Case(20, COMPLETIONS, {"prompt": "hi"}, 400, "missing_required_parameter", "model")
    )
    found.append(Case(20, CHAT, {"messages": hi}, 400, "missing_required_parameter", "model"))
    for name in ("no-such-model", "../../x", "x" * 10_000, "a\nb", model + " "):
        body = {"model": name, "prompt": "hi"}
        found.append(Case(21, COMPLETIONS, body, 404, "model_not_found", "model"))
    found.append(
        Case(21, CHAT, {"model": "gpt-4", "messages": hi}, 404, "model_not_found", "model")
    )
    bad(22, "invalid_type", "model", {"model": None}, {"model": 5}, {"model": ""}, {"model": {}})
    found.append(
        Case(23, COMPLETIONS, {"model": model}, 400, "missing_required_parameter", "prompt")
    )
    found.append(Case(23, CHAT, {"model": model}, 400, "missing_required_parameter", "messages"))

    bad(24, "empty_prompt", "prompt", *({"prompt": p} for p in ("", [], [[]], [""], ["a", ""])))
    bad_chat(25, "empty_array", "messages", {"messages": []})
    bad_chat(26, "invalid_value", "messages.0.role", {"messages": [{"content": "hi"}]})
    for role in ("root", "", 5, None, ["user"]):
        message = {"role": role, "content": "hi"}
        bad_chat(26, "invalid_value", "messages.0.role", {"messages": [message]})
    bad_chat(26, "invalid_value", "messages.1.role", {"messages": [*hi, {"role": "User"}]})
    bad_content(27, "invalid_type", "messages.0.content", None, 5, {}, True)
    bad_content(27, "invalid_type", "messages.0.content.0", [5], ["hi"], [None])
    bad_content(27, "invalid_type", "messages.0.content.0.text", [{"type": "text", "text": 5}])
    bad_content(27, "empty_array", "messages.0.content", [])
    bad_chat(
        27,
        "missing_required_parameter",
        "messages.0.content",
        {"messages": [{"role": "user"}]},
    )
    bad_chat(27, "invalid_type", "messages.0", {"messages": ["hi"]}, {"messages": [None]})
    bad_chat(27, "invalid_type", "messages", {"messages": "hi"}, {"messages": {"role": "user"}})
    bad_content(
        28,
        "unsupported_content",
        "messages.0.content.0",
        [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
        [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
    )

    ids = ([vocab], [1, vocab, 2], [-1], [2**31], [2**63], [10**20], [[1], [vocab]])
    bad(29, "token_out_of_range", "prompt", *({"prompt": p} for p in ids[:2]))
    bad(30, "token_out_of_range", "prompt", *({"prompt": p} for p in ids[2:]))
    wrong = ([True, False], [1.0], ["1", 1], [1, "1"], [[1], "a"], [None], [[1.0]], 5, {}, None)
    bad(31, "invalid_type", "prompt", *({"prompt": p} for p in wrong[:2]))
    bad(32, "invalid_type", "prompt", *({"prompt": p} for p in wrong[2:]))
    bad(33, "array_above_max_length", "prompt", {"prompt": ["a"] * 10_000})
    bad(33, "array_above_max_length", "prompt", {"prompt": [[1]] * (limits.max_prompts + 1)})

    too_long = {"prompt": [1] * context}, {"prompt": [1] * (context + 1)}
    bad(34, "context_length_exceeded", "prompt", *too_long)
    bad(34, "context_length_exceeded", "prompt", {"prompt": [[1], [1] * context]})
    bad(
        35,
        "context_length_exceeded",
        "prompt",
        {"prompt": [1] * (context - 1), "max_tokens": 2},
        {"prompt": [1], "max_tokens": context},
    )
    if limits.max_prompt_tokens + 1 < context:
        too_large = [1] * (limits.max_prompt_tokens + 1)
        bad(36, "prompt_too_large_for_server", "prompt", {"prompt": too_large, "max_tokens": 1})

    for name in ("max_tokens", "max_completion_tokens"):
        bad(37, "integer_below_min_value", name, {name: 0}, {name: -1}, {name: -(10**30)})
        bad(38, "invalid_type", name, *({name: value} for value in (5.5, "5", True, [], {}, 5.0)))
        bad(38, "integer_above_max_value", name, {name: 2**31}, {name: 10**30})
    bad_chat(
        39,
        "conflicting_parameters",
        "max_completion_tokens",
        {"max_tokens": 5, "max_completion_tokens": 6},
    )
    bad(39, "integer_below_min_value", "min_tokens", {"min_tokens": -1})
    bad(39, "invalid_value", "min_tokens", {"min_tokens": 6, "max_tokens": 5}, {"min_tokens": 99})

    def beyond(row: int, name: str, low: tuple[Any, ...], high: tuple[Any, ...], kind: str) -> None:
        bad(row, f"{kind}_below_min_value", name, *({name: value} for value in low))
        bad(row, f"{kind}_above_max_value", name, *({name: value} for value in high))

    beyond(40, "temperature", (-0.1, -1), (2.1, 10**30), "decimal")
    bad(40, "invalid_type", "temperature", {"temperature": "1"}, {"temperature": True})
    good(41, {"prompt": "hi", "temperature": 1e-300})
    beyond(42, "top_p", (0, -1, 0.0), (1.0001,), "decimal")
    beyond(43, "top_k", (-2,), (2**31,), "integer")
    bad(43, "invalid_type", "top_k", {"top_k": 1.5}, {"top_k": "5"})
    beyond(44, "min_p", (-0.1,), (1.1,), "decimal")
    beyond(44, "presence_penalty", (-2.01,), (2.01,), "decimal")
    beyond(44, "frequency_penalty", (-2.01,), (2.01,), "decimal")
    beyond(44, "repetition_penalty", (0, -1, 1e-300), (11,), "decimal")
    beyond(45, "n", (0, -1), (limits.max_choices + 1, 10**9, 10**30), "integer")
    bad(45, "invalid_type", "n", {"n": 1.0}, {"n": "2"}, {"n": True})
    bad(45, "integer_above_max_value", "n", {"n": 2, "prompt": ["a"] * limits.max_prompts})
    bad(
        46,
        "context_length_exceeded",
        "prompt",
        {"n": limits.max_choices, "max_tokens": context},
    )

    for name, value in _UNSUPPORTED:
        bad(47, "unsupported_parameter", name, {name: value})
    bad(47, "unsupported_parameter", "echo", {"echo": True, "logprobs": 0})
    for name, value in (*_UNSUPPORTED_IN_CHAT, *_UNSUPPORTED_SHARED):
        bad_chat(47, "unsupported_parameter", name, {name: value})
    bad_chat(
        47,
        "unsupported_content",
        "messages.1.role",
        {"messages": [*hi, {"role": "tool", "content": "5", "tool_call_id": "a"}]},
    )
    bad_chat(
        47,
        "unsupported_parameter",
        "messages.1.tool_calls",
        {"messages": [*hi, {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]},
    )
    bad_chat(
        47,
        "conflicting_parameters",
        "continue_final_message",
        {"add_generation_prompt": True, "continue_final_message": True},
    )

    beyond(48, "seed", (-(2**63) - 1,), (2**63, 2**64), "integer")
    beyond(48, "priority", (-(2**31),), (2**31,), "integer")
    bad(48, "invalid_type", "seed", {"seed": "x"}, {"seed": 1.5}, {"seed": True})
    bad(49, "array_above_max_length", "stop", {"stop": list("abcdefgh")[: limits.max_stop + 1]})
    bad(50, "invalid_value", "stop", {"stop": ""}, {"stop": [""]}, {"stop": ["a", ""]})
    bad(51, "string_above_max_length", "stop", {"stop": "x" * 2**20}, {"stop": ["x" * 1025]})
    bad(51, "invalid_type", "stop", {"stop": [None]}, {"stop": 5}, {"stop": [["a"]]}, {"stop": {}})
    stops = ([vocab], [-1], [2**64])
    bad(51, "token_out_of_range", "stop_token_ids", *({"stop_token_ids": ids} for ids in stops))
    bad(51, "invalid_type", "stop_token_ids", {"stop_token_ids": ["1"]}, {"stop_token_ids": 5})
    bad(51, "array_above_max_length", "stop_token_ids", {"stop_token_ids": [1] * 129})

    keys = ("abc", "1.5", "-1", str(vocab), "", " 1", "01", "١", "1" * 4000)
    bad(52, "invalid_key", "logit_bias", *({"logit_bias": {key: 1}} for key in keys))
    bad(53, "decimal_above_max_value", "logit_bias", {"logit_bias": {"1": 101}})
    bad(53, "decimal_below_min_value", "logit_bias", {"logit_bias": {"1": -100.5}})
    for value in ("1", None, True, [1]):
        bad(53, "invalid_type", "logit_bias", {"logit_bias": {"1": value}})
    bad(53, "invalid_type", "logit_bias", {"logit_bias": [1]}, {"logit_bias": "x"})
    many = {str(token): 1 for token in range(limits.max_logit_bias + 1)}
    bad(53, "array_above_max_length", "logit_bias", {"logit_bias": many})
    raw(53, "invalid_json", start + b', "logit_bias": {"1": NaN}}')

    beyond(54, "logprobs", (-1, -2), (limits.max_logprobs + 1,), "integer")
    bad(54, "invalid_type", "logprobs", {"logprobs": True}, {"logprobs": "5"})
    bad_chat(54, "invalid_type", "logprobs", {"logprobs": 1}, {"logprobs": "true"})
    bad_chat(54, "invalid_value", "top_logprobs", {"top_logprobs": 2})
    bad_chat(
        54,
        "integer_above_max_value",
        "top_logprobs",
        {"logprobs": True, "top_logprobs": limits.max_logprobs + 1},
    )
    bad(55, "invalid_type", "stream", {"stream": "yes"}, {"stream": 1}, {"stream": {}})
    bad(56, "invalid_value", "stream_options", {"stream_options": {"include_usage": True}})
    bad(56, "invalid_value", "stream_options", {"stream": False, "stream_options": {}})
    bad(56, "invalid_type", "stream_options", {"stream": True, "stream_options": 5})
    bad_chat(57, "invalid_value", "response_format.type", {"response_format": {"type": "xml"}})
    bad_chat(57, "invalid_value", "response_format.type", {"response_format": {}})
    bad_chat(57, "invalid_type", "response_format", {"response_format": "text"})
    for kind in ("json_object", "json_schema", "structural_tag"):
        bad_chat(
            58, "unsupported_parameter", "response_format", {"response_format": {"type": kind}}
        )
    for number, schemas in _SCHEMAS.items():
        for schema in schemas:
            form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
            bad_chat(number, "unsupported_parameter", "response_format", {"response_format": form})
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}
    bad_chat(62, "unsupported_parameter", "tools", {"tools": [tool]}, {"tools": [tool] * 1000})
    bad_chat(62, "unsupported_parameter", "tools", {"tools": []})
    bad_chat(63, "unsupported_parameter", "chat_template", {"chat_template": "{{ 1 }}"})
    bad_chat(
        63,
        "unsupported_parameter",
        "chat_template_kwargs",
        {"chat_template_kwargs": {"tokenize": True}},
    )
    for name in _NEVER:
        bad(64, "unknown_parameter", name, {name: {}}, {name: None})
    bad(65, "string_above_max_length", "user", {"user": "x" * 2**20})
    bad(65, "string_above_max_length", "metadata.a", {"metadata": {"a": "x" * 2**20}})
    bad(
        65,
        "array_above_max_length",
        "metadata",
        {"metadata": dict.fromkeys(map(str, range(17)), "")},
    )
    bad(65, "invalid_type", "metadata", {"metadata": "x" * 2**20})
    good(66, {"prompt": "".join(_SPECIAL)})
    good(66, {"messages": [{"role": "user", "content": "".join(_SPECIAL)}]})
    return found


_SCHEMAS: dict[int, tuple[dict[str, Any], ...]] = {
    59: (
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": "(a+)+$"},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$ref": "http://169.254.169.254/"},
    ),
    60: ({"enum": list(range(100_000))}, {"description": "x" * 2**20}),
    61: ({"type": "object"}, {"type": "strin"}, {"type": "object"}),
}
_NUMBERS = (b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"nan", b"0x1", b"01", b"+1", b"1.")
_NEVER = (
    "kv_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "prompt_embeds",
    "custom_logit_processor",
)
_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|eot_id|>", "<|end|>", "<|bos|>", "<|assistant|>")
_UNSUPPORTED_SHARED = (
    ("best_of", 2),
    ("use_beam_search", True),
    ("length_penalty", 1.5),
    ("early_stopping", True),
    ("prompt_logprobs", 0),
    ("truncate_prompt_tokens", 5),
    ("allowed_token_ids", [1]),
    ("bad_words", ["x"]),
    ("structured_outputs", {"regex": "(a+)+$"}),
    ("guided_json", {}),
    ("service_tier", "flex"),
    ("store", True),
    ("spaces_between_special_tokens", False),
    ("thinking_token_budget", 5),
)
_UNSUPPORTED = (*_UNSUPPORTED_SHARED, ("suffix", "end"), ("best_of", True), ("store", 1))
_UNSUPPORTED_IN_CHAT = (
    ("tool_choice", "auto"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [{"name": "f"}]),
    ("function_call", "auto"),
    ("echo", True),
    ("documents", [{"text": "x"}]),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x", "format": "wav"}),
    ("reasoning_effort", "high"),
    ("web_search_options", {}),
)
