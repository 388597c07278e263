"""What a call says: prompts, messages, stop strings and token ids, of whatever shape they came in.

Read by hand, not by a schema: a body may hold a million token ids, and each fault has its own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from cluster.errors import BadRequest
from gateway.ask import Limits
from gateway.fields import refusal, shown

MAX_MESSAGES = 4096
MAX_STOP_TOKEN_IDS = 128
MAX_NAME_CHARS = 256
CUT = 8192

ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer word for it; the models' templates know the older one
    "user": "user",
    "assistant": "assistant",
}
_EMPTY_IN_MESSAGES: Final = (
    "annotations",
    "audio",
    "function_call",
    "reasoning",
    "reasoning_content",
    "refusal",
    "tool_call_id",
    "tool_calls",
)
"""Fields of an answer that clients send back with it; we serve them only where they are empty."""


def prompts(value: Any, limits: Limits) -> tuple[str | tuple[int, ...], ...]:
    """Text, token ids, or a list of either. Raises BadRequest."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise refusal(
            "invalid_type", "'prompt' must be text, token ids or a list of either.", "prompt"
        )
    _check_length(value, limits)
    kinds = set(map(type, value))
    if kinds == {int}:
        value, kinds = [value], {list}
    if len(value) > limits.max_prompts and kinds <= {str, list}:
        raise refusal(
            "array_above_max_length",
            f"'prompt' has more than {limits.max_prompts} prompts.",
            "prompt",
        )
    if not value or any(entry in ("", []) for entry in value):
        raise refusal("empty_prompt", "The prompt must not be empty.", "prompt")
    if kinds == {str}:
        return tuple(value)
    if kinds == {list}:
        for entry in value:
            _check_length(entry, limits)
        return tuple(token_ids(entry, "prompt", limits) for entry in value)
    raise refusal("invalid_type", "'prompt' must be text, token ids or a list of either.", "prompt")


def _check_length(prompt: Sequence[Any], limits: Limits) -> None:
    """First of all, since it costs nothing. Raises BadRequest for what no context could hold."""
    if len(prompt) > limits.max_model_len and isinstance(prompt[0], int):
        raise too_long(len(prompt), 0, limits.max_model_len, "prompt")


def too_long(prompt: int, asked: int, context: int, param: str) -> BadRequest:
    """The refusal of a prompt that leaves no room for the `asked` tokens, or for any."""
    message = (
        f"This model's maximum context length is {context} tokens. The prompt has {prompt} tokens"
    )
    if asked and prompt < context:
        message += f" and max_tokens asks for {asked}: together {prompt + asked}"
    else:
        message += " and leaves no room for an answer"
    return refusal("context_length_exceeded", message + ".", param)


def token_ids(value: Any, param: str, limits: Limits) -> tuple[int, ...]:
    """Ids within the vocabulary. Raises BadRequest."""
    if not isinstance(value, list) or not all(
        set(map(type, part)) <= {int} for part in _cut(value)
    ):
        raise refusal("invalid_type", f"'{param}' must be an array of integers.", param)
    check_range(value, param, limits)
    return tuple(value)


def check_range(ids: Sequence[int], param: str, limits: Limits) -> None:
    """Raises BadRequest if an id is not in the vocabulary."""
    if not all(min(part) >= 0 and max(part) < limits.vocab_size for part in _cut(ids)):
        raise refusal(
            "token_out_of_range",
            f"'{param}' holds a token id outside of 0..{limits.vocab_size - 1}.",
            param,
        )


def _cut(ids: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """In parts, between which a thread gives way to others: a builtin does so only at its end."""
    for start in range(0, len(ids), CUT):
        yield ids[start : start + CUT]


def messages(value: Any, limits: Limits) -> tuple[Mapping[str, str], ...]:
    """A conversation as a chat template sees it: role, content as text, name. Raises BadRequest."""
    if not isinstance(value, list):
        raise refusal("invalid_type", "'messages' must be an array.", "messages")
    if not value:
        raise refusal("empty_array", "'messages' must not be empty.", "messages")
    if len(value) > MAX_MESSAGES:
        raise refusal(
            "array_above_max_length",
            f"'messages' has more than {MAX_MESSAGES} entries.",
            "messages",
        )
    allow_unknown = limits.allow_unknown_fields
    return tuple(
        _message(entry, f"messages.{number}", allow_unknown) for number, entry in enumerate(value)
    )


def _message(entry: Any, where: str, allow_unknown: bool) -> Mapping[str, str]:
    if not isinstance(entry, dict):
        raise refusal("invalid_type", f"'{where}' must be an object.", where)
    role = entry.get("role")
    if role in ("tool", "function"):
        raise refusal("unsupported_content", "Tool messages are not supported.", f"{where}.role")
    if not isinstance(role, str) or role not in ROLES:
        raise refusal(
            "invalid_value", f"'{where}.role' must be one of {', '.join(ROLES)}.", f"{where}.role"
        )
    for name in _EMPTY_IN_MESSAGES:
        if entry.get(name) not in (None, []):
            raise refusal("unsupported_parameter", f"'{name}' is not supported.", f"{where}.{name}")
    known = ("role", "content", "name", *_EMPTY_IN_MESSAGES)
    _refuse_unknown(entry, known, where, allow_unknown)
    if "content" not in entry:
        param = f"{where}.content"
        raise refusal(
            "missing_required_parameter", f"Missing required parameter: '{param}'.", param
        )
    message = {
        "role": ROLES[role],
        "content": _text(entry["content"], f"{where}.content", allow_unknown),
    }
    if entry.get("name") is not None:
        message["name"] = _bounded(entry["name"], f"{where}.name", MAX_NAME_CHARS)
    return message


def _text(content: Any, where: str, allow_unknown: bool) -> str:
    """Content as one text; parts are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refusal("invalid_type", f"'{where}' must be text or an array of parts.", where)
    if not content:
        raise refusal("empty_array", f"'{where}' must not be empty.", where)
    return "\n".join(
        _part(part, f"{where}.{number}", allow_unknown) for number, part in enumerate(content)
    )


def _part(part: Any, where: str, allow_unknown: bool) -> str:
    if not isinstance(part, dict):
        raise refusal("invalid_type", f"'{where}' must be an object.", where)
    if not isinstance(part.get("type"), str):
        raise refusal("invalid_value", f"'{where}.type' must be \"text\".", f"{where}.type")
    if part["type"] != "text":
        raise refusal("unsupported_content", "Only parts of type text are supported.", where)
    _refuse_unknown(part, ("type", "text"), where, allow_unknown)
    if not isinstance(part.get("text"), str):
        raise refusal("invalid_type", f"'{where}.text' must be a string.", f"{where}.text")
    return str(part["text"])


def _refuse_unknown(
    entry: Mapping[str, Any], known: Sequence[str], where: str, allow_unknown: bool
) -> None:
    for name in () if allow_unknown else entry:
        if name not in known:
            param = f"{where}.{shown(name)}"
            raise refusal("unknown_parameter", f"Unknown parameter: '{param}'.", param)


def stops(value: Any, limits: Limits) -> tuple[str, ...]:
    """Stop strings, each once, in the client's order. Raises BadRequest."""
    if value is None:
        return ()
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise refusal("invalid_type", "'stop' must be a string or an array of strings.", "stop")
    if len(entries) > limits.max_stop:
        raise refusal(
            "array_above_max_length", f"'stop' has more than {limits.max_stop} entries.", "stop"
        )
    found = dict.fromkeys(_bounded(entry, "stop", limits.max_stop_chars) for entry in entries)
    if "" in found:
        raise refusal("invalid_value", "A stop string must not be empty.", "stop")
    return tuple(found)


def _bounded(value: Any, param: str, max_chars: int) -> str:
    if not isinstance(value, str):
        raise refusal("invalid_type", f"'{param}' must be a string.", param)
    if len(value) > max_chars:
        raise refusal(
            "string_above_max_length", f"'{param}' is longer than {max_chars} characters.", param
        )
    return value


def stop_token_ids(value: Any, limits: Limits) -> tuple[int, ...]:
    """Token ids that end an answer, each once. Raises BadRequest."""
    param = "stop_token_ids"
    ids = token_ids([] if value is None else value, param, limits)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise refusal(
            "array_above_max_length",
            f"'{param}' has more than {MAX_STOP_TOKEN_IDS} entries.",
            param,
        )
    return tuple(dict.fromkeys(ids))


_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


def logit_bias(value: Any, limits: Limits) -> tuple[tuple[int, float], ...]:
    """{"token id": bias} with bias in -100..100, sorted by id. Raises BadRequest."""
    param = "logit_bias"
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise refusal("invalid_type", f"'{param}' must be an object.", param)
    if len(value) > limits.max_logit_bias:
        raise refusal(
            "array_above_max_length",
            f"'{param}' has more than {limits.max_logit_bias} entries.",
            param,
        )
    biases = []
    for key, bias in value.items():
        if _TOKEN_KEY.fullmatch(key) is None or int(key) >= limits.vocab_size:
            raise refusal(
                "invalid_key", f"Keys of '{param}' are token ids below {limits.vocab_size}.", param
            )
        if type(bias) not in (int, float):
            raise refusal("invalid_type", f"Values of '{param}' must be numbers.", param)
        if not bias >= -100:
            raise refusal("decimal_below_min_value", f"'{param}' must be at least -100.", param)
        if bias > 100:
            raise refusal("decimal_above_max_value", f"'{param}' must be at most 100.", param)
        biases.append((int(key), float(bias)))
    return tuple(sorted(biases))


def check_response_format(value: Any) -> None:
    """Plain text is all there is. Raises BadRequest for anything else."""
    param = "response_format"
    if value is None:
        return
    if not isinstance(value, dict):
        raise refusal("invalid_type", f"'{param}' must be an object.", param)
    kind = value.get("type")
    if kind in ("json_object", "json_schema", "structural_tag", "regex", "grammar"):
        raise refusal("unsupported_parameter", "Only the response format text is supported.", param)
    if kind != "text":
        raise refusal("invalid_value", f"'{param}.type' must be \"text\".", f"{param}.type")
    _refuse_unknown(value, ("type",), param, allow_unknown=False)
