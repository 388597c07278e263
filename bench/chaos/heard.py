"""Heard: one answer as its client saw it, and whether it says what the undisturbed one said."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from bench.chaos.asks import Ask
from bench.sse import SSEParser

SAME_LOGPROB: Final = 1e-3
"""KV that was computed in other batches and chunks differs in its last bits; tokens must not."""

CUT: Final = "cut"
"""In place of an error's code: the connection broke without one."""

_DONE: Final = b"[DONE]"


@dataclass
class Choice:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        """One choice of a chunk, or of a whole answer."""
        said = chunk.get("delta") or chunk.get("message")
        self.text += said.get("content", "") if said else chunk.get("text", "")
        self.tokens += chunk.get("token_ids") or ()
        logprobs = chunk.get("logprobs") or {}
        self.logprobs += logprobs.get("token_logprobs", ())
        self.logprobs += [entry["logprob"] for entry in logprobs.get("content", ())]
        if chunk.get("finish_reason") is not None:
            self.finish, self.stop_reason = chunk["finish_reason"], chunk.get("stop_reason")

    def begins(self, other: Choice) -> bool:
        """Whether the other one says this and goes on."""
        same = zip(self.logprobs, other.logprobs, strict=False)
        return (
            other.text.startswith(self.text)
            and other.tokens[: len(self.tokens)] == self.tokens
            and all(math.isclose(a, b, abs_tol=SAME_LOGPROB) for a, b in same)
        )

    def equals(self, other: Choice) -> bool:
        ends = (self.text, self.tokens, len(self.logprobs), self.finish, self.stop_reason)
        return self.begins(other) and ends == (
            *(other.text, other.tokens, len(other.logprobs), other.finish, other.stop_reason),
        )


@dataclass
class Said:
    """All that must not depend on what befell the cluster. Usage is (prompt, completion)."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None

    def add(self, body: Mapping[str, Any]) -> None:
        for chunk in body.get("choices", ()):
            self.choices.setdefault(chunk["index"], Choice()).add(chunk)
        if usage := body.get("usage"):
            self.usage = usage["prompt_tokens"], usage["completion_tokens"]

    def equals(self, other: Said) -> bool:
        """To the byte, log-probabilities to their fourth digit."""
        return (
            self.usage == other.usage
            and self.choices.keys() == other.choices.keys()
            and all(mine.equals(other.choices[index]) for index, mine in self.choices.items())
        )

    def begins(self, other: Said) -> bool:
        """What a failed answer has said must be right too, as far as it goes."""
        return all(
            index in other.choices and mine.begins(other.choices[index])
            for index, mine in self.choices.items()
        )


@dataclass
class Heard:
    """Filled by `call`. `times` are the start and the arrival of every event, on perf_counter.

    `error` is "" for a whole answer, else the error's code, "HTTP 502" for one without, or CUT.
    """

    ask: Ask
    gateway: str
    said: Said = field(default_factory=Said)
    times: list[float] = field(default_factory=list)
    error: str = ""
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _mark: int = -1
    _reached: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def recoveries(self) -> list[Mapping[str, Any]]:
        """What the answer's own metrics say of its recoveries."""
        return list(self.metrics.get("recoveries") or ())

    @property
    def started(self) -> float:
        return self.times[0]

    @property
    def ended(self) -> float:
        return self.times[-1]

    def pause(self, since: float, until: float = math.inf) -> float:
        """The longest time without an event that ended after `since` and began before `until`."""
        gaps = zip(self.times, self.times[1:], strict=False)
        return max((b - a for a, b in gaps if b > since and a < until), default=0.0)

    async def reached(self, event: int) -> None:
        """Returns when this event, or the answer's end, has come. One waiter at a time."""
        if len(self.times) <= event and not self.over.is_set():
            self._mark = event
            self._reached.clear()
            await self._reached.wait()

    def tick(self) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) - 1 == self._mark:
            self._reached.set()

    def end(self) -> None:
        self.times.append(time.perf_counter())
        self._reached.set()
        self.over.set()


async def call(session: aiohttp.ClientSession, url: str, heard: Heard, salt: str = "") -> None:
    """Ask and hear the answer out. A salt keeps the prompt out of caches. Raises nothing."""
    body = {**heard.ask.body, "cache_salt": salt} if salt else heard.ask.body
    heard.tick()
    try:
        async with session.post(url + heard.ask.path, json=body) as response:
            heard.status, heard.headers = response.status, response.headers
            if response.status != 200:
                heard.error = _code(await response.read()) or f"HTTP {response.status}"
            elif heard.ask.streamed:
                await _stream(response, heard)
            else:
                answer = await response.json()
                heard.said.add(answer)
                heard.metrics = answer.get("metrics") or {}
    except (aiohttp.ClientError, OSError, TimeoutError):
        heard.error = heard.error or CUT
    finally:
        heard.end()


async def _stream(response: aiohttp.ClientResponse, heard: Heard) -> None:
    """Done only with [DONE]: what ends without it was cut, however politely."""
    parser, done = SSEParser(), False
    async for piece in response.content.iter_any():
        for payload in parser.feed(piece):
            heard.tick()
            if payload == _DONE:
                done = True
                continue
            heard.error = heard.error or _code(payload)
            event = json.loads(payload)
            heard.said.add(event)
            heard.metrics = event.get("metrics") or heard.metrics
    if not done and not heard.error:
        heard.error = CUT


def _code(payload: bytes) -> str:
    """The code of an error body, "" for anything else."""
    if b'"error"' not in payload:
        return ""
    try:
        error = json.loads(payload)["error"]
        return str(error["code"])
    except (ValueError, KeyError, TypeError):
        return ""
