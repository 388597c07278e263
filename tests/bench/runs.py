"""Runs with chosen numbers, for tests of what is made of them."""

from __future__ import annotations

from bench.client import Record
from bench.measured import Measured, Run
from bench.trace import CHAT, LOADED, LONG, PROBES, QUIET, Ask, Phase


def chat(itls_ms: list[float], *, ttft_ms: float = 10.0, text: str = "a b") -> Record:
    gaps = [gap / 1000 for gap in itls_ms]
    return Record(
        prompt_tokens=3,
        ttft=ttft_ms / 1000,
        itls=gaps,
        latency=ttft_ms / 1000 + sum(gaps),
        output_tokens=1 + len(gaps),
        text=text,
    )


def broken(reason: str = "HTTP 503: busy") -> Record:
    return Record(error=reason)


def measured(
    name: str, chats: list[Record], longs: list[Record] | None = None, *, duration: float = 2.0
) -> Measured:
    longs = longs or []
    asks = [Ask(0.0, CHAT, (number, 2, 3), 2) for number in range(len(chats))]
    asks += [Ask(0.5, LONG, (number, 5, 6, 7), 1) for number in range(len(longs))]
    return Measured(Phase(name, tuple(asks)), (*chats, *longs), duration)


def run(
    mode: str = "pd",
    chunk: int = 64,
    *,
    number: int = 1,
    quiet_ms: float = 10.0,
    loaded_ms: float = 20.0,
    long_ttft_ms: float = 500.0,
    text: str = "a b",
    failures: int = 0,
) -> Run:
    """One chat with two gaps of the given length in each phase, one long prompt under load."""
    loaded = [chat([loaded_ms] * 2, text=text), *(broken() for _ in range(failures))]
    return Run(
        mode,
        chunk,
        number,
        1.5,
        {
            PROBES: measured(PROBES, [chat([1.0], text=text)]),
            QUIET: measured(QUIET, [chat([quiet_ms] * 2)]),
            LOADED: measured(LOADED, loaded, [chat([], ttft_ms=long_ttft_ms, text="l")]),
        },
    )
