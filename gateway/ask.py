"""One API call after validation: what HTTP and gRPC both become before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.messages import Sampling


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model and this gateway allow."""

    model_names: tuple[str, ...]  # the first is the one reported
    vocab_size: int
    max_model_len: int
    max_prompt_tokens: int  # the largest prompt that any worker's whole KV pool holds
    max_choices: int = 16
    max_prompts: int = 64
    max_stop: int = 4
    max_stop_chars: int = 1024
    max_logprobs: int = 20
    max_logit_bias: int = 300
    max_body_bytes: int = 4 << 20
    allow_unknown_fields: bool = False
    allowed_names: tuple[str, ...] = ()  # what this caller's key names; empty: all

    def usable_names(self) -> tuple[str, ...]:
        """The served names that this caller may use."""
        if not self.allowed_names:
            return self.model_names
        return tuple(name for name in self.model_names if name in self.allowed_names)


@dataclass(frozen=True, slots=True)
class Ask:
    """A validated call, its prompts not tokenised yet. `sampling.max_tokens` 0 is "what is left".

    `sampling.seed` is the client's or -1, `sampling.stop_token_ids` are the client's alone: the
    gateway adds the model's EOS ids unless `ignore_eos`.
    """

    kind: Literal["completion", "chat"]
    model: str
    sampling: Sampling
    prompts: tuple[str | tuple[int, ...], ...] = ()  # completions: text or token ids
    messages: tuple[Mapping[str, Any], ...] = ()  # chat: role and content
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    cache_salt: str = ""
    return_token_ids: bool = False
    return_timeline: bool = False  # Baton's own: durations of each phase in the response
    priority: int = 0  # lower comes first
