"""One request to an OpenAI-compatible server, streamed and timed -> one Record."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.sse import SSEParser

Clock = Callable[[], float]

_DONE = b"[DONE]"
_MAX_REASON_CHARS = 200
_MAX_ERROR_BYTES = 64 * 1024
_FAILED_FINISHES = frozenset({"abort", "error"})


@dataclass(slots=True)
class Record:
    """What one request did, timed at the client; times in seconds on the run's clock.

    `ttft` is from sending to the first event with choices, `itls` are the gaps between all
    consecutive ones, `latency` (E2EL) ends at the last. `error` is None for a whole answer.
    """

    prompt_tokens: int = 0
    start: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    output_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    timeline_ms: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first; 0 where there is no second."""
        if self.output_tokens <= 1:
            return 0.0
        return (self.latency - self.ttft) / (self.output_tokens - 1)


class Answer:
    """Fills a Record from the payloads of one stream.

    Each payload is parsed whole: of the 16 us of CPU that an event costs (one core of a 2-core
    VM), json takes 1.7 and the socket read nearly all the rest. A byte search in its place would
    save a tenth and misread what a model may write.
    """

    def __init__(self, record: Record, keep_text: bool) -> None:
        self._record = record
        self._keep_text = keep_text
        self._last: float | None = None
        self._texts: list[str] = []
        self._done = False

    def accept(self, payload: bytes, now: float) -> None:
        """Take one event that arrived at `now`. What is not an OpenAI chunk fails the request."""
        if payload == _DONE:
            self._done = True
            return
        try:
            event = json.loads(payload.decode())
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self._fail(f"malformed event: {payload[:80]!r}")
            return
        choices = event.get("choices")
        if choices:
            self._time(now)
            self._read(choices)
        elif "error" in event:
            self._fail(f"error event: {_message(event)}")
        usage = event.get("usage")
        if usage:
            self._count(usage)
        metrics = event.get("metrics")
        if metrics:
            self._record.timeline_ms = _timeline(metrics)

    def finish(self) -> None:
        """The stream ended in good order as far as HTTP knows; decide whether it was whole."""
        record = self._record
        record.text = "".join(self._texts)
        if self._last is None:
            self._fail("the stream ended without a single choice")
        elif not self._done and record.finish_reason is None:
            self._fail("the stream was cut: neither finish_reason nor [DONE]")
        elif not record.output_tokens:
            # No usage: a chunk is the best count there is without the model's tokenizer.
            record.output_tokens = 1 + len(record.itls)

    def _time(self, now: float) -> None:
        record = self._record
        if self._last is None:
            record.ttft = now - record.start
        else:
            record.itls.append(now - self._last)
        self._last = now
        record.latency = now - record.start

    def _read(self, choices: Any) -> None:
        choice = choices[0] if isinstance(choices, list) else None
        if not isinstance(choice, dict):
            self._fail("malformed choices")
            return
        finish = choice.get("finish_reason")
        if finish is not None:
            self._record.finish_reason = str(finish)
            if finish in _FAILED_FINISHES:
                self._fail(f"finish_reason {finish!r}")
        if self._keep_text:
            delta = choice.get("delta")
            text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
            if isinstance(text, str):
                self._texts.append(text)

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        output, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
        if isinstance(output, int):
            self._record.output_tokens = output
        if isinstance(prompt, int):
            self._record.prompt_tokens = prompt

    def _fail(self, reason: str) -> None:
        if self._record.error is None:
            self._record.error = reason[:_MAX_REASON_CHARS]


class Client:
    """Sends prepared bodies to one URL. The session is the caller's and stays open."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        timeout: float,
        keep_text: bool = False,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._session = session
        self._url = url
        self._timeout = timeout
        self._keep_text = keep_text
        self._clock = clock

    async def send(self, body: bytes, prompt_tokens: int = 0) -> Record:
        """Send one request and read its stream to the end. Never raises for the server's faults.

        A refused connection, an HTTP error, an error event, a cut stream and the timeout all
        become `Record.error`. Cancelling closes the connection.
        """
        record = Record(prompt_tokens=prompt_tokens, start=self._clock())
        try:
            await self._exchange(body, record)
        except TimeoutError:
            record.error = record.error or f"timed out after {self._timeout:g} s"
        except aiohttp.ClientConnectorError as error:
            record.error = connect_reason(error)
        except aiohttp.ClientPayloadError:
            record.error = record.error or "the stream was cut in the middle of the body"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
            record.error = record.error or reason
        return record

    async def _exchange(self, body: bytes, record: Record) -> None:
        timeout = aiohttp.ClientTimeout(total=self._timeout, sock_connect=10)
        async with self._session.post(self._url, data=body, timeout=timeout) as response:
            if response.status != 200:
                record.error = await _http_error(response)
                return
            parser, answer = SSEParser(), Answer(record, self._keep_text)
            # One clock reading per read, taken before any parsing: events that came in one
            # packet came at one time.
            async for chunk in response.content.iter_any():
                now = self._clock()
                for payload in parser.feed(chunk):
                    answer.accept(payload, now)
            answer.finish()


def open_session(api_key: str | None = None) -> aiohttp.ClientSession:
    """A session without a limit on connections; the run's own limit is --max-concurrency."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers)


def connect_reason(error: aiohttp.ClientConnectorError) -> str:
    """The system's own words, `connection refused`, without aiohttp's around them."""
    number, reason = error.os_error.errno, error.os_error.strerror
    # Name resolution has numbers of its own, negative ones, with words only in strerror.
    if number is not None and number > 0:
        reason = os.strerror(number)
    return f"cannot connect: {(reason or str(error.os_error)).lower()}"


async def _http_error(response: aiohttp.ClientResponse) -> str:
    raw = await response.content.read(_MAX_ERROR_BYTES)
    try:
        message = _message(json.loads(raw))
    except ValueError:
        message = raw.decode(errors="replace").strip() or str(response.reason)
    return f"HTTP {response.status}: {message}"[:_MAX_REASON_CHARS]


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, Mapping) and "message" in error:
        return str(error["message"])
    return str(error)


def _timeline(metrics: Any) -> dict[str, float]:
    phases = metrics.get("timeline_ms") if isinstance(metrics, dict) else None
    if not isinstance(phases, dict):
        return {}
    return {
        name: float(value)
        for name, value in phases.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
