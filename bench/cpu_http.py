"""cpu_http: whole servers on a model so small that their own work per token is what is measured.

Streams, one answer and several at once, from servers that are all up and take turns. Whose turn it
is not is idle. Servers and client share the given cores; the client is the same for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, Final

import aiohttp

from bench.client import Client, Record
from bench.cpu_flags import CpuOptions
from bench.serve import find_model
from bench.server import Server, running
from bench.trace import CHAT, Ask
from bench.vllm_stand import vllm_command
from cluster.errors import StartError
from cluster.model import load_config

PROMPT: Final = 32
TOGETHER: Final = 8
AT_ONCE: Final = (1, TOGETHER)
_HEADERS: Final = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Turn:
    """One server, one round, so many answers at once."""

    server: str
    at_once: int
    tokens_per_s: float
    itl_ms: float  # median gap between two events of an answer
    ttft_ms: float  # median


@dataclass
class Servers:
    """All that was measured."""

    model: str
    cores: tuple[int, ...]
    date: datetime
    settings: Mapping[str, Any]
    turns: list[Turn] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        lines = [f"{'':<24}{'at once':>8}{'tok/s':>9}{'ITL ms':>9}{'TTFT ms':>9}"]
        for at_once in AT_ONCE:
            for name in self.texts:
                mine = [t for t in self.turns if (t.server, t.at_once) == (name, at_once)]
                if not mine:
                    continue
                rate = statistics.median(t.tokens_per_s for t in mine)
                itl = statistics.median(t.itl_ms for t in mine)
                ttft = statistics.median(t.ttft_ms for t in mine)
                lines.append(f"{name:<24}{at_once:>8}{rate:>9.0f}{itl:>9.2f}{ttft:>9.1f}")
        lines += [f"{name} left out: {reason}" for name, reason in self.failed.items()]
        lines += [f"{name}: another greedy answer than ours" for name in self.others]
        return "\n".join(lines)

    @property
    def others(self) -> list[str]:
        """Who gave another answer to the same question than the first, which is ours."""
        ours = next(iter(self.texts.values()))
        return [name for name, text in self.texts.items() if text != ours]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "cores": self.cores,
            "date": self.date.isoformat(timespec="seconds"),
            "settings": dict(self.settings),
            "turns": [asdict(turn) for turn in self.turns],
            "other_answers": self.others,
            "failed": self.failed,
        }


def measure_servers(options: CpuOptions) -> Servers:
    """Start all, take turns, end all. Raises StartError if ours does not start."""
    os.sched_setaffinity(0, options.cores)  # the servers inherit it
    return asyncio.run(_measure(options))


def servers(options: CpuOptions) -> list[Server]:
    """Ours divided and undivided; theirs with one thread and with one on every core."""
    model = options.models / "hf"
    ours: tuple[str, ...] = (sys.executable, "-m", "cluster.cli", "serve", str(model))
    ours += ("--port", "{port}", "--grpc-port", "{inner}", "--kernels", options.kernels)
    ours += ("--log-level", "error", "--die-with", str(os.getpid()))
    undivided = ("--prefill", "0", "--decode", "0", "--both", "1")
    found = [
        Server("Baton 1 + 1", ours, "/ready"),
        Server("Baton undivided", (*ours, *undivided), "/ready"),
    ]
    theirs = {"llama.cpp": ("llama.cpp", _llama_cpp), "vllm": ("vLLM", _vllm)}
    for name, command in (theirs[key] for key in theirs if key in options.peers):
        for threads in sorted({1, len(options.cores)}):
            title = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            found.append(Server(title, command(options, threads), "/health"))
    return found


def _llama_cpp(options: CpuOptions, threads: int) -> tuple[str, ...]:
    binary = Path(options.peers["llama.cpp"]).resolve().parent / "llama-server"
    command: tuple[str, ...] = (str(binary), "-m", str(options.models / "f32.gguf"), "--no-webui")
    command += ("--host", "127.0.0.1", "--port", "{port}", "-t", str(threads))
    command += ("-np", str(TOGETHER), "-c", str(TOGETHER * _room(options)))
    return (*command, "-ctk", "f32", "-ctv", "f32")


def _vllm(options: CpuOptions, threads: int) -> tuple[str, ...]:
    command = vllm_command(options.peers["vllm"], options.models / "hf", threads)
    return (*command, "--max-num-seqs", str(TOGETHER), "--max-model-len", str(_room(options)))


def _room(options: CpuOptions) -> int:
    """Tokens of one question and its answer, and some."""
    return PROMPT + options.answer + 32


async def _measure(options: CpuOptions) -> Servers:
    settings = {"prompt": PROMPT, "answer": options.answer, "rounds": options.rounds}
    result = Servers(options.models.resolve().name, options.cores, datetime.now(), settings)
    vocabulary = load_config(options.models / "hf").vocab_size
    async with contextlib.AsyncExitStack() as held:
        # A connection for each answer: servers differ in when they close one that is kept.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        session = await held.enter_async_context(
            aiohttp.ClientSession(connector=connector, headers=dict(_HEADERS))
        )
        up: dict[str, Caller] = {}
        for server in servers(options):
            try:
                url = await held.enter_async_context(running(server, session))
                up[server.name] = Caller(
                    session, url, await find_model(session, url, None), options, vocabulary
                )
                result.texts[server.name] = await up[server.name].warm()
            except StartError as error:
                if server.name.startswith("Baton"):
                    raise
                result.failed[server.name] = str(error)
        for at_once in AT_ONCE:
            for number in range(options.rounds):
                names = list(up)
                first = number % len(names)
                for name in (*names[first:], *names[:first]):
                    result.turns.append(await up[name].turn(name, at_once, number))
    return result


class Caller:
    """Asks one server."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        options: CpuOptions,
        vocabulary: int,
    ) -> None:
        self._client = Client(session, f"{url}/v1/completions", timeout=300.0, keep_text=True)
        self._model = model
        self._options = options
        self._vocabulary = vocabulary

    async def warm(self) -> str:
        """The text of a first answer, the same question for all. Raises StartError."""
        [record], _ = await self._ask("warm", 0, 1)
        await self._ask("warm", 1, TOGETHER)
        return record.text

    async def turn(self, name: str, at_once: int, number: int) -> Turn:
        """Raises StartError if an answer fails: half of a figure is none."""
        records, seconds = await self._ask("turn", number, at_once)
        gaps = [gap for record in records for gap in record.itls]
        return Turn(
            server=name,
            at_once=at_once,
            tokens_per_s=sum(record.output_tokens for record in records) / seconds,
            itl_ms=1e3 * statistics.median(gaps) if gaps else math.nan,
            ttft_ms=1e3 * statistics.median(record.ttft for record in records),
        )

    async def _ask(self, purpose: str, number: int, at_once: int) -> tuple[list[Record], float]:
        random = Random(f"{self._options.seed} {purpose} {number} {at_once}")
        asks = [
            Ask(
                0.0,
                CHAT,
                # Bytes come first in a vocabulary: halves of characters, which a stream holds back.
                tuple(random.randrange(300, self._vocabulary) for _ in range(PROMPT)),
                self._options.answer,
            )
            for _ in range(at_once)
        ]
        start = time.perf_counter()
        records = await asyncio.gather(
            *(self._client.send(ask.body(self._model), PROMPT) for ask in asks)
        )
        seconds = time.perf_counter() - start
        failed = [record.error for record in records if not record.ok]
        if failed:
            raise StartError(f"an answer failed: {failed[0]}")
        return records, seconds
