"""The JSON that OpenAI's clients read: completions and chats, whole and as SSE events.

A chunk is put together from strings, of which only the text is encoded anew each time. All of it is
ASCII: some clients split lines at U+2028 or U+0085, which must not cut an event in two.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar

from cluster.ids import new_id
from gateway.ask import Ask
from gateway.gateway import Gateway
from gateway.stream import Answer, Delta, Usage

DONE = b"data: [DONE]\n\n"

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Shape(ABC):
    """One call's answer in one of the two shapes. Keeps what one chunk must know of others."""

    id_prefix: ClassVar[str]
    object_whole: ClassVar[str]
    object_chunk: ClassVar[str]

    def __init__(self, gateway: Gateway, ask: Ask, answer: Answer) -> None:
        self._ask = ask
        self._tokenizer = gateway.tokenizer
        self._prompts = answer.prompts
        self._echoes = answer.echoes
        self._head = {
            "id": self.id_prefix + new_id(),
            "created": int(gateway.wall_clock()),
            "model": gateway.limits.model_names[0],
        }
        head = {"object": self.object_chunk, **self._head}
        self._event_head = "data: " + _dumps(head)[:-1] + ',"choices":['
        more = ask.return_token_ids or ask.continuous_usage
        self._plain = "" if more else ',"logprobs":null,"finish_reason":null}]}\n\n'
        self._counts: dict[int, int] = {}
        self._prompts_shown: set[int] = set()

    @abstractmethod
    def events(self, delta: Delta, metrics: Mapping[str, Any] | None = None) -> str:
        """The SSE events of one Delta: none, one, or a role chunk and one."""

    def usage_event(self, usage: Usage, metrics: Mapping[str, Any] | None) -> str:
        """The last chunk, without choices."""
        fields = f'"usage":{_dumps(usage.body())}{_optional("metrics", metrics)}'
        return f"{self._event_head}],{fields}}}\n\n"

    def whole(
        self, deltas: Sequence[Delta], usage: Usage, metrics: Mapping[str, Any] | None
    ) -> bytes:
        """The answer that is not streamed, from all its Deltas."""
        by_choice: dict[int, list[Delta]] = {}
        for delta in deltas:
            by_choice.setdefault(delta.choice, []).append(delta)
        body: dict[str, Any] = {
            "object": self.object_whole,
            **self._head,
            "choices": [self._choice(index, by_choice[index]) for index in sorted(by_choice)],
            "usage": usage.body(),
        }
        if self._ask.kind == "chat" and self._ask.return_token_ids:
            body["prompt_token_ids"] = self._prompts[0]
        if metrics is not None:
            body["metrics"] = metrics
        return _dumps(body).encode()

    @abstractmethod
    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """One choice of the answer that is not streamed."""

    @abstractmethod
    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """The log-probabilities of one Delta's tokens, if they were asked for."""

    def _event(self, delta: Delta, content: str, metrics: Mapping[str, Any] | None) -> str:
        """One chunk with one choice; `content` is the JSON of its delta or text."""
        if self._plain and not (delta.finish or delta.logprobs):  # nearly every token's
            return f'{self._event_head}{{"index":{delta.choice},{content}{self._plain}'
        logprobs = _dumps(self._logprobs(delta)) if delta.logprobs else "null"
        finish = "null"
        if delta.finish:
            finish = f'"{delta.finish}","stop_reason":{_dumps(delta.stop_reason)}'
        ids = ""
        if self._ask.return_token_ids:
            ids = f',"token_ids":{_dumps(delta.tokens)}{self._prompt_ids(delta.choice)}'
        return (
            f'{self._event_head}{{"index":{delta.choice},{content},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{ids}}}]{self._running_usage(delta)}'
            f"{_optional('metrics', metrics)}}}\n\n"
        )

    def _running_usage(self, delta: Delta) -> str:
        if not self._ask.continuous_usage:
            return ""
        self._counts[delta.choice] = delta.so_far
        prompt = sum(len(prompt) for prompt in self._prompts)
        tokens = sum(self._counts.values())
        return (
            f',"usage":{{"prompt_tokens":{prompt},"total_tokens":{prompt + tokens},'
            f'"completion_tokens":{tokens}}}'
        )

    def _prompt_ids(self, choice: int) -> str:
        """A field with the prompt's ids, once per choice of a completion."""
        if self._ask.kind == "chat" or choice in self._prompts_shown:
            return ""
        self._prompts_shown.add(choice)
        return f',"prompt_token_ids":{_dumps(self._prompt_of(choice))}'

    def _prompt_of(self, choice: int) -> tuple[int, ...]:
        return self._prompts[choice // self._ask.n]

    def _finish(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "logprobs": None,
            "finish_reason": deltas[-1].finish,
            "stop_reason": deltas[-1].stop_reason,
        }
        together = Delta(
            deltas[0].choice,
            "",
            tuple(token for delta in deltas for token in delta.tokens),
            tuple(entry for delta in deltas for entry in delta.logprobs),
        )
        if together.logprobs:
            fields["logprobs"] = self._logprobs(together)
        if self._ask.return_token_ids:
            fields["token_ids"] = together.tokens
        return fields


class CompletionShape(Shape):
    id_prefix = "cmpl-"
    object_whole = object_chunk = "text_completion"

    def __init__(self, gateway: Gateway, ask: Ask, answer: Answer) -> None:
        super().__init__(gateway, ask, answer)
        self._offsets: dict[int, int] = {}

    def events(self, delta: Delta, metrics: Mapping[str, Any] | None = None) -> str:
        if not delta.text and not delta.finish:
            return ""
        return self._event(delta, f'"text":{quoted(delta.text)}', metrics)

    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        fields = {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            **self._finish(deltas),
        }
        if self._ask.return_token_ids:
            fields["prompt_token_ids"] = self._prompt_of(index)
        return fields

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        """Four lists side by side, one entry per token."""
        name = self._tokenizer.token_text
        offset = self._offsets.get(delta.choice)
        if offset is None:
            offset = len(self._echoes[delta.choice // self._ask.n])
        offsets, top = [], []
        for chosen, *others in delta.logprobs:
            offsets.append(offset)
            offset += _characters(self._tokenizer.token_bytes(chosen[0]))
            ranked = {name(token): _logprob(value) for token, value in others}
            ranked.setdefault(name(chosen[0]), _logprob(chosen[1]))
            top.append(ranked)
        self._offsets[delta.choice] = offset
        return {
            "text_offset": offsets,
            "token_logprobs": [_logprob(entry[0][1]) for entry in delta.logprobs],
            "tokens": [name(entry[0][0]) for entry in delta.logprobs],
            "top_logprobs": top,
        }


class ChatShape(Shape):
    id_prefix = "chatcmpl-"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def events(self, delta: Delta, metrics: Mapping[str, Any] | None = None) -> str:
        events = self._role(delta) if delta.opens else ""
        if delta.text or delta.finish:
            content = f'"delta":{{"content":{quoted(delta.text)}}}'
            events += self._event(delta, content, metrics)
        return events

    def _role(self, delta: Delta) -> str:
        """Sent with the first token and never before: clients take the time to it for TTFT."""
        ids = ""
        if self._ask.return_token_ids:
            ids = f',"prompt_token_ids":{_dumps(self._prompts[0])}'
        return (
            f'{self._event_head}{{"index":{delta.choice},'
            f'"delta":{{"role":"assistant","content":""}},"logprobs":null,'
            f'"finish_reason":null}}]{ids}{self._running_usage(delta)}}}\n\n'
        )

    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, **self._finish(deltas)}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        content = []
        for chosen, *others in delta.logprobs:
            content.append(
                {**self._token(*chosen), "top_logprobs": [self._token(*other) for other in others]}
            )
        return {"content": content}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": _logprob(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


def shape_of(gateway: Gateway, ask: Ask, answer: Answer) -> Shape:
    """The shape that this kind of call is answered in."""
    return (ChatShape if ask.kind == "chat" else CompletionShape)(gateway, ask, answer)


def error_event(body: Mapping[str, Any]) -> bytes:
    """What ends a stream that fails after its first byte. No [DONE] follows: it is not done."""
    return f"data: {_dumps(body)}\n\n".encode()


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _optional(name: str, value: Any) -> str:
    return "" if value is None else f',"{name}":{_dumps(value)}'


def _logprob(value: float) -> float:
    return LOWEST_LOGPROB if math.isnan(value) else max(value, LOWEST_LOGPROB)


def _characters(token: bytes) -> int:
    """Characters that begin in this token. A continuation byte belongs to the one before."""
    return sum(byte & 0xC0 != 0x80 for byte in token)
