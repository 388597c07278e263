"""The fields of a call: their types and ranges, and what is done with all the others.

A field is read (the models below), known but not offered (the tables of neutral values), or
unknown. Nothing that asks for something is ever ignored. How a refusal reads is decided here too:
a code from a closed list, a bounded message, and no more of the client's input than its names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from cluster.errors import BadRequest

log = logging.getLogger(__name__)

MAX_INT32 = 2**31 - 1
MAX_MESSAGE_CHARS = 300
MAX_PARAM_CHARS = 128
MAX_ECHO_CHARS = 64
"""How much of a name that the client made up an answer repeats."""

Tokens = Annotated[int, Field(ge=1, le=MAX_INT32)]
Label = Annotated[str, Field(max_length=512)]
Flag = bool | None

# Read by `gateway.content`; the schema is what /openapi.json says of them.
_STRINGS: Final = {"type": "array", "items": {"type": "string"}}
_IDS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}}
Ids = Annotated[Any, WithJsonSchema(_IDS)]
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _IDS, _STRINGS, {"type": "array", "items": _IDS}]}
    ),
]
Messages = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "object"}})]
Stops = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS]})]
Object = Annotated[Any, WithJsonSchema({"type": "object"})]


class _Body(BaseModel):
    """Strict: no "5" for 5, no 1.0 for 1, no true for 1. None always means "not given"."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: Flag = None
    continuous_usage_stats: Flag = None


class CallBody(_Body):
    """What completions and chats share."""

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    # Logits are divided by it: what is nearer to 0 would make them infinite.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10.0)] | None = None
    logit_bias: Object = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops = None
    stop_token_ids: Ids = None
    include_stop_str_in_output: Flag = None
    ignore_eos: Flag = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: Flag = None
    add_special_tokens: Flag = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    return_token_ids: Flag = None
    return_timeline: Flag = None
    priority: Annotated[int, Field(ge=-MAX_INT32, le=MAX_INT32)] | None = None
    response_format: Object = None
    # Labels: they ask for nothing, so nothing is done with them.
    user: Label | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Label],
            Field(max_length=16),
        ]
        | None
    ) = None
    request_id: Annotated[str, Field(max_length=128)] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class CompletionBody(CallBody):
    prompt: Prompt
    echo: Flag = None
    logprobs: Annotated[int, Field(ge=0)] | None = None


class ChatBody(CallBody):
    messages: Messages
    logprobs: Flag = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None


class TokenizeBody(_Body):
    model: Annotated[str, Field(min_length=1)] | None = None
    prompt: str | None = None
    messages: Messages = None
    add_special_tokens: Flag = None
    return_token_strs: Flag = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None


class DetokenizeBody(_Body):
    model: Annotated[str, Field(min_length=1)] | None = None
    tokens: Ids


# Fields that OpenAI or vLLM know and we do not offer, with the values that ask for nothing. A
# client library that sends its defaults is served; anything else is refused, never ignored.

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logprob_token_ids": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

_NEUTRAL_TEMPLATE: Final[Mapping[str, tuple[Any, ...]]] = {
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "tools": (),
}

NEUTRAL: Final[Mapping[type[_Body], Mapping[str, tuple[Any, ...]]]] = {
    CompletionBody: {**_NEUTRAL, "suffix": ("",)},
    ChatBody: {
        **_NEUTRAL,
        **_NEUTRAL_TEMPLATE,
        "audio": (),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": (),
        "include_reasoning": (True,),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "return_prompt_text": (False,),
        "tool_choice": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
    },
    TokenizeBody: _NEUTRAL_TEMPLATE,
    DetokenizeBody: {},
}

NEVER: Final = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "custom_logit_processor",
        "ec_transfer_params",
        "kv_transfer_params",
        "prompt_embeds",
    }
)
"""Fields with which other systems let a client name workers, blocks or code (R7). Unknown here,
and not even ignored where unknown fields are."""

F = TypeVar("F", bound=_Body)


def read(kind: type[F], data: Any, allow_unknown: bool) -> F:
    """Check types and ranges of a call's fields. Raises BadRequest for the first fault."""
    if not isinstance(data, dict):
        raise refusal("invalid_type", "The body must be a JSON object.")
    for name in NEVER & data.keys():
        raise refusal("unknown_parameter", f"Unknown parameter: '{name}'.", name)
    fields = dict(data)
    for name, neutral in NEUTRAL[kind].items():
        if name in fields:
            value = fields.pop(name)
            if value is not None and not any(_same(value, harmless) for harmless in neutral):
                raise refusal("unsupported_parameter", f"'{name}' is not supported.", name)
    while True:
        try:
            return kind.model_validate(fields)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
        unknown = [fault["loc"] for fault in faults if fault["type"] == "extra_forbidden"]
        if not (allow_unknown and unknown):
            raise _refusal_of(faults[0]["type"], faults[0]["loc"], faults[0].get("ctx", {}))
        log.warning("unknown fields ignored", extra={"fields": [path(loc) for loc in unknown[:8]]})
        for loc in unknown:
            fields = _without(fields, loc)


def refusal(code: str, message: str, param: str | None = None) -> BadRequest:
    """The error for the client. Bounded, whatever went into it."""
    if param is not None and len(param) > MAX_PARAM_CHARS:
        param = param[: MAX_PARAM_CHARS - 3] + "..."
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 3] + "..."
    return BadRequest(message, code=code, param=param)


def shown(name: str) -> str:
    """A name of the client's as an answer repeats it."""
    return name if len(name) <= MAX_ECHO_CHARS else name[: MAX_ECHO_CHARS - 3] + "..."


def path(loc: tuple[str | int, ...]) -> str:
    """Where in the body: `messages.0.role`."""
    return ".".join(shown(str(step)) for step in loc)


_CODES: Final = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "too_long": "array_above_max_length",
    "string_too_long": "string_above_max_length",
    "string_too_short": "invalid_type",  # an empty name is no name
    "finite_number": "invalid_value",
}
_BOUNDS: Final = {
    "greater_than": ("below_min_value", "gt", "greater than"),
    "greater_than_equal": ("below_min_value", "ge", "at least"),
    "less_than_equal": ("above_max_value", "le", "at most"),
}
_WANTED: Final = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "model_type": "an object",
    "string_type": "a string",
}


def _refusal_of(fault: str, loc: tuple[str | int, ...], ctx: Mapping[str, Any]) -> BadRequest:
    """One of pydantic's faults in our words and codes."""
    where = path(loc)
    if fault in _BOUNDS:
        suffix, key, relation = _BOUNDS[fault]
        kind = "integer" if isinstance(ctx[key], int) else "decimal"
        return refusal(f"{kind}_{suffix}", f"'{where}' must be {relation} {ctx[key]}.", where)
    message = {
        "missing": f"Missing required parameter: '{where}'.",
        "extra_forbidden": f"Unknown parameter: '{where}'.",
        "too_long": f"'{where}' has more than {ctx.get('max_length')} entries.",
        "string_too_long": f"'{where}' is longer than {ctx.get('max_length')} characters.",
        "string_too_short": f"'{where}' must not be empty.",
        "finite_number": f"'{where}' must be a finite number.",
    }.get(fault, f"'{where}' must be {_WANTED.get(fault, 'of another type')}.")
    return refusal(_CODES.get(fault, "invalid_type"), message, where)


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: 1.0 is 1, but true is not."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _without(fields: Mapping[str, Any], loc: tuple[str | int, ...]) -> dict[str, Any]:
    """A copy that lacks what is at `loc`."""
    first, rest = str(loc[0]), loc[1:]
    copy = dict(fields)
    if rest:
        copy[first] = _without(copy[first], rest)
    else:
        del copy[first]
    return copy
