"""protocol: how `baton bench cpu` speaks to an engine in another process, and maybe another Python.

One JSON object per line each way. The first says what to load; after that each asks for one thing:

    prefill  ids          seconds until the token after a prompt is known; nothing is kept
    hold     prompts      run these sequences, none being held, up to their first token
    decode   steps        seconds for that many further tokens of every held sequence
    drop                  end the held sequences
    answer   ids, count   the greedy tokens after a prompt, and how far each led the second, if told
    memory                resident bytes now and at most

This side needs the standard library alone, so that a peer's Python needs nothing but the peer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Load:
    """What an engine is to be: the same for all of them as far as they have it."""

    model: str
    precision: str  # fp32 or int8
    cores: tuple[int, ...]
    sequences: int  # held at once at most
    context: int  # tokens of each of them at most
    prompt: int  # tokens of a prompt that is not held at most
    options: dict[str, Any] = field(default_factory=dict)  # the peer's own

    @property
    def threads(self) -> int:
        return len(self.cores)

    @property
    def tokens(self) -> int:
        """Keys and values that there must be room for: all that is held, or one long prompt."""
        return max(self.sequences * self.context, self.prompt)


@dataclass(frozen=True)
class Answer:
    """`margins`: logit of the chosen token minus that of the second; empty if not known."""

    tokens: list[int]
    margins: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """Bytes resident. The peak counts from the process's start."""

    resident: int
    peak: int


class Engine(Protocol):
    """What a peer has to do. Times are taken in here, so that pipes do not count."""

    def describe(self) -> dict[str, str]:
        """Versions and the settings that matter for speed."""

    def prefill(self, ids: Sequence[int]) -> float: ...

    def hold(self, prompts: Sequence[Sequence[int]]) -> None: ...

    def decode(self, steps: int) -> float: ...

    def drop(self) -> None: ...

    def answer(self, ids: Sequence[int], count: int) -> Answer: ...

    def memory(self) -> Memory: ...


def own_memory() -> Memory:
    """Of this process, pages of mapped files included."""
    sizes = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            sizes[name] = int(rest.split()[0]) * 1024
    return Memory(sizes["VmRSS"], sizes["VmHWM"])


def serve(make: Callable[[Load], Engine]) -> None:
    """Load what the first line says, then do what each line asks for until there is none.

    A failure is answered with its reason; the process goes on, as the next line may still work.
    """
    lines = sys.stdin
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print: their words are not replies
    engine: Engine | None = None
    for line in lines:
        try:
            asked = json.loads(line)
            if engine is None:
                load = Load(**{**asked, "cores": tuple(asked["cores"])})
                os.sched_setaffinity(0, load.cores)
                engine = make(load)
                reply = engine.describe()
            else:
                reply = _reply(engine, asked)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def _reply(engine: Engine, asked: dict[str, Any]) -> dict[str, Any]:
    match asked["do"]:
        case "prefill":
            return {"seconds": engine.prefill(asked["ids"])}
        case "hold":
            engine.hold(asked["prompts"])
            return {}
        case "decode":
            return {"seconds": engine.decode(asked["steps"])}
        case "drop":
            engine.drop()
            return {}
        case "answer":
            return asdict(engine.answer(asked["ids"], asked["count"]))
        case "memory":
            return asdict(engine.memory())
        case other:
            raise ValueError(f"unknown: {other!r}")
