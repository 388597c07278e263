"""The one validator: bytes or a dict in, an Ask out, or a BadRequest that says what to change.

HTTP and gRPC both come through here, so a rule about a field is written once. Nothing is guessed,
clipped or ignored: a value is honoured, asks for nothing, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.errors import Forbidden, NotFound
from cluster.messages import Request, Sampling
from gateway import content
from gateway.ask import Ask, Limits
from gateway.fields import (
    CallBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read,
    refusal,
    shown,
)

COMPLETION_TOKENS = 16
"""What a completion that names no max_tokens may generate: OpenAI's default."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are 0: dividing logits by them would overflow, and they mean greedy."""


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """A validated call of /tokenize: `ask` is only ever encoded, never answered."""

    ask: Ask
    return_token_strs: bool


# JSON to Ask.


def completion(data: Any, limits: Limits, defaults: Mapping[str, float] | None = None) -> Ask:
    """A call of /v1/completions.

    `defaults` are the model's own: temperature, top_p, top_k, min_p, repetition_penalty.
    Raises BadRequest, and NotFound for a model that is not served.
    """
    fields = read(CompletionBody, data, limits.allow_unknown_fields)
    ask = _ask("completion", fields, limits, defaults or {})
    prompts = content.prompts(fields.prompt, limits)
    logprobs = _at_most("logprobs", fields.logprobs, limits.max_logprobs)
    echo = bool(fields.echo)
    if echo and logprobs is not None:
        raise refusal("unsupported_parameter", "'echo' with 'logprobs' is not supported.", "echo")
    if len(prompts) > 1 and len(prompts) * ask.n > limits.max_prompts:
        raise refusal(
            "integer_above_max_value",
            f"'n' times the number of prompts must be at most {limits.max_prompts}.",
            "n",
        )
    return replace(
        ask,
        prompts=prompts,
        echo=echo,
        add_special_tokens=_or(fields.add_special_tokens, True),
        sampling=replace(ask.sampling, logprobs=logprobs),
    )


def chat(data: Any, limits: Limits, defaults: Mapping[str, float] | None = None) -> Ask:
    """A call of /v1/chat/completions. Arguments and errors as for `completion`."""
    fields = read(ChatBody, data, limits.allow_unknown_fields)
    ask = _ask("chat", fields, limits, defaults or {})
    top_logprobs = _at_most("top_logprobs", fields.top_logprobs, limits.max_logprobs)
    if top_logprobs and not fields.logprobs:
        raise refusal("invalid_value", "'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    opening, continuing = _turn(fields)
    return replace(
        ask,
        messages=content.messages(fields.messages, limits),
        add_special_tokens=_or(fields.add_special_tokens, False),
        add_generation_prompt=opening,
        continue_final_message=continuing,
        sampling=replace(ask.sampling, logprobs=(top_logprobs or 0) if fields.logprobs else None),
    )


def tokenize(data: Any, limits: Limits) -> TokenizeCall:
    """A call of /tokenize. Raises BadRequest and NotFound."""
    fields = read(TokenizeBody, data, limits.allow_unknown_fields)
    model = check_model(fields.model, limits)
    if fields.prompt is not None and fields.messages is not None:
        raise refusal(
            "conflicting_parameters", "Give either 'prompt' or 'messages', not both.", "messages"
        )
    if fields.prompt is None and fields.messages is None:
        raise refusal(
            "missing_required_parameter", "Missing required parameter: 'prompt'.", "prompt"
        )
    is_chat = fields.prompt is None
    opening, continuing = _turn(fields)
    ask = Ask(
        kind="chat" if is_chat else "completion",
        model=model,
        sampling=Sampling(),
        prompts=() if is_chat else (fields.prompt or "",),
        messages=content.messages(fields.messages, limits) if is_chat else (),
        add_special_tokens=_or(fields.add_special_tokens, not is_chat),
        add_generation_prompt=opening,
        continue_final_message=continuing,
    )
    return TokenizeCall(ask, bool(fields.return_token_strs))


def detokenize(data: Any, limits: Limits) -> tuple[int, ...]:
    """A call of /detokenize: its token ids. Raises BadRequest and NotFound."""
    fields = read(DetokenizeBody, data, limits.allow_unknown_fields)
    check_model(fields.model, limits)
    return content.token_ids(fields.tokens, "tokens", limits)


def _ask(
    kind: Literal["completion", "chat"],
    fields: CallBody,
    limits: Limits,
    defaults: Mapping[str, float],
) -> Ask:
    """What completions and chats have in common."""
    check_model(fields.model, limits)
    content.check_response_format(fields.response_format)
    stream, options = bool(fields.stream), fields.stream_options
    if options is not None and not stream:
        raise refusal("invalid_value", "'stream_options' needs 'stream': true.", "stream_options")
    return Ask(
        kind=kind,
        model=fields.model,
        sampling=_sampling(fields, limits, defaults),
        n=_at_most("n", fields.n, limits.max_choices) or 1,
        stream=stream,
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        stop=content.stops(fields.stop, limits),
        include_stop=bool(fields.include_stop_str_in_output),
        ignore_eos=bool(fields.ignore_eos),
        skip_special_tokens=_or(fields.skip_special_tokens, True),
        cache_salt=fields.cache_salt or "",
        return_token_ids=bool(fields.return_token_ids),
        return_timeline=bool(fields.return_timeline),
        priority=fields.priority or 0,
    )


def _sampling(fields: CallBody, limits: Limits, defaults: Mapping[str, float]) -> Sampling:
    """The client's value, else the model's, else OpenAI's."""

    def choose(name: str, neutral: float) -> float:
        value = getattr(fields, name)
        return float(defaults.get(name, neutral) if value is None else value)

    temperature, top_k = choose("temperature", 1.0), int(choose("top_k", 0))
    return Sampling(
        max_tokens=_max_tokens(fields),
        min_tokens=fields.min_tokens or 0,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=choose("top_p", 1.0),
        top_k=top_k if 0 < top_k < limits.vocab_size else 0,
        min_p=choose("min_p", 0.0),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=choose("repetition_penalty", 1.0),
        logit_bias=content.logit_bias(fields.logit_bias, limits),
        # Negative seeds are seeds too; -1 is kept for "none".
        seed=-1 if fields.seed is None else fields.seed % 2**64,
        stop_token_ids=content.stop_token_ids(fields.stop_token_ids, limits),
    )


def _max_tokens(fields: CallBody) -> int:
    """The client's limit under either name, 0 if it gave none."""
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise refusal(
            "conflicting_parameters",
            "'max_tokens' and 'max_completion_tokens' are given and differ.",
            "max_completion_tokens",
        )
    limit = old or new or 0
    if limit and (fields.min_tokens or 0) > limit:
        raise refusal("invalid_value", f"'min_tokens' must be at most {limit}.", "min_tokens")
    return limit


def _turn(fields: ChatBody | TokenizeBody) -> tuple[bool, bool]:
    """Whether to open an assistant's turn, and whether to go on in the last message instead."""
    continuing = bool(fields.continue_final_message)
    opening = _or(fields.add_generation_prompt, not continuing)
    if opening and continuing:
        raise refusal(
            "conflicting_parameters",
            "'add_generation_prompt' and 'continue_final_message' exclude each other.",
            "continue_final_message",
        )
    return opening, continuing


def check_model(name: str | None, limits: Limits) -> str:
    """A name that is served and that the caller may use; without one the first of those.

    Raises NotFound and Forbidden.
    """
    if name is not None and name not in limits.model_names:
        raise NotFound(
            f"The model `{shown(name)}` does not exist.", code="model_not_found", param="model"
        )
    for usable in limits.usable_names():
        if name in (None, usable):
            return usable
    raise Forbidden("This API key may not use this model.", code="model_forbidden", param="model")


def _at_most(name: str, value: int | None, limit: int) -> int | None:
    if value is not None and value > limit:
        raise refusal("integer_above_max_value", f"'{name}' must be at most {limit}.", name)
    return value


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


# Ask and token ids to Requests.


def fit(ask: Ask, prompts: Sequence[tuple[int, ...]], limits: Limits) -> int:
    """How many tokens each choice may generate: what was asked for, or what every prompt leaves.

    The last token of an answer needs no room in a KV pool: nothing is computed from it.
    Raises BadRequest: empty_prompt, token_out_of_range, context_length_exceeded,
    prompt_too_large_for_server.
    """
    param = "messages" if ask.kind == "chat" else "prompt"
    for prompt in prompts:
        if not prompt:
            raise refusal("empty_prompt", "The prompt must not be empty.", param)
        content.check_range(prompt, param, limits)
    longest = max(map(len, prompts))
    asked = ask.sampling.max_tokens
    context, pool = limits.max_model_len, limits.max_prompt_tokens
    if longest + max(asked, 1) > context:
        raise content.too_long(longest, asked, context, param)
    if longest + max(asked, 1) - 1 > pool:
        raise refusal(
            "prompt_too_large_for_server",
            f"The request needs room for {longest + max(asked, 1) - 1} tokens; "
            f"the largest worker has room for {pool}.",
            param,
        )
    if asked:
        return asked
    left = min(context, pool + 1) - longest
    limit = left if ask.kind == "chat" else min(COMPLETION_TOKENS, left)
    if ask.sampling.min_tokens > limit:
        raise refusal("invalid_value", f"'min_tokens' must be at most {limit}.", "min_tokens")
    return limit


def requests(
    ask: Ask,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    *,
    eos_ids: Iterable[int],
    new_id: Callable[[], str],
    new_seed: Callable[[], int],
    salt: bytes,
) -> list[Request]:
    """One Request per choice j of prompt i, at i * n + j. All choices share one seed.

    `new_seed` is called once, if the client gave none. `salt` separates prefix caches as it is.
    """
    sampling = replace(
        ask.sampling,
        max_tokens=max_tokens,
        seed=new_seed() if ask.sampling.seed == -1 else ask.sampling.seed,
        stop_token_ids=tuple(
            dict.fromkeys((*ask.sampling.stop_token_ids, *(() if ask.ignore_eos else eos_ids)))
        ),
    )
    return [
        Request(new_id(), prompt, replace(sampling, choice=choice), salt)
        for prompt in prompts
        for choice in range(ask.n)
    ]
