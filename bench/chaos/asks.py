"""Ask: one request of the run, and the list of them all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"

_QUESTIONS: Final = (
    "Hello!",
    "What is a KV cache?",
    "Why two pools?",
    "What is prefill?",
    "What is a landing?",
    "Who are you?",
)
_SEEDED: Final[dict[str, Any]] = {"temperature": 0.9, "top_p": 0.95}
_PENALTIES: Final[dict[str, Any]] = {
    "presence_penalty": 0.6,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
}


@dataclass(frozen=True)
class Ask:
    """`body` asks for all that shows a fault: token ids, usage and the timeline."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def streamed(self) -> bool:
        return bool(self.body["stream"])

    def with_stop(self, text: str) -> Ask:
        """The same, ended by a stop string that comes up in the second half of its text."""
        for at in range(len(text) // 2, len(text) - 4):
            stop = text[at : at + 4]
            if text.find(stop) == at and stop.isascii():
                return replace(
                    self, name=f"{self.name}, stop string", body={**self.body, "stop": [stop]}
                )
        return self


def write(model: str, ids: Sequence[int], longest: int, seed: int) -> list[Ask]:
    """Greedy and seeded; streamed and whole; with log-probabilities, penalties and several choices;
    short prompts and long ones of random token `ids`, all within `longest` tokens."""
    rng = random.Random(seed)
    tokens = min(250, longest // 4)

    def prompt(length: int) -> list[int]:
        return [rng.choice(ids) for _ in range(min(length, longest // 4))]

    def ask(name: str, prompt: Any, *, whole: bool = False, **fields: Any) -> Ask:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens + rng.randrange(tokens // 2),
            "ignore_eos": True,
            "temperature": 0,
            "seed": rng.randrange(1 << 31),
            **fields,
        }
        return Ask(name, COMPLETIONS, _shown(body, whole))

    def chat(name: str, question: str, **fields: Any) -> Ask:
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens}
        return Ask(name, CHAT, _shown({**body, **fields}, whole=False))

    asks = [chat("chat", question) for question in _QUESTIONS]
    for length in (8, 70, 300, 900):
        asks += [
            ask("greedy", prompt(length)),
            ask("greedy, whole", prompt(length), whole=True),
            ask("seeded", prompt(length), **_SEEDED),
            ask("seeded, whole", prompt(length), whole=True, **_SEEDED),
            ask("seeded, top-k and bias", prompt(length), **_narrowed(ids, rng)),
            ask("seeded, penalties", prompt(length), **_SEEDED, **_PENALTIES),
            ask("seeded, log-probabilities", prompt(length), logprobs=3, **_SEEDED),
            ask("seeded, two choices", prompt(length), n=2, **_SEEDED),
        ]
    chosen = rng.choice(_QUESTIONS)
    asks.append(chat("chat, seeded, log-probabilities", chosen, **_CHAT_LOGPROBS, **_SEEDED))
    asks.append(ask("prompt of text", "Once there were two pools of workers. ", **_SEEDED))
    return asks


_CHAT_LOGPROBS: Final[dict[str, Any]] = {"logprobs": True, "top_logprobs": 2, "seed": 11}


def _narrowed(ids: Sequence[int], rng: random.Random) -> dict[str, Any]:
    bias = {str(rng.choice(ids)): rng.choice((-5.0, 3.0)) for _ in range(4)}
    return {"temperature": 0.8, "top_k": 40, "min_p": 0.02, "logit_bias": bias}


def _shown(body: dict[str, Any], whole: bool) -> dict[str, Any]:
    shown = {**body, "return_token_ids": True, "return_timeline": True, "stream": not whole}
    return shown if whole else {**shown, "stream_options": {"include_usage": True}}
