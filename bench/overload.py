"""overload: four times as much as a cluster can do, and one tenant that floods beside another.

capacity   as many requests at a time as workers like: how many a second are answered
within     most of that rate, at random: what an answer feels like when nobody is refused
beyond     so many times that rate: who is let in, how that feels, and how the others are refused

alone      a tenant with short prompts, one at a time, and nobody else
flooded    the same, while another tenant has sent long prompts all at once
one key    the same flood by that tenant itself: first come first served, for comparison

The second three are of a gateway that refuses nobody.

One prefill and one decode worker, each on a core of its own; gateway and client share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench import shape
from bench.client import Answer, Record, open_session
from bench.cpu import describe
from bench.load import arrival_times
from bench.options import require
from bench.overload_report import Call, Phase, table
from bench.serve import paced
from bench.sse import SSEParser
from bench.stand import House, house, modes
from cluster.config import GatewayConfig, WorkerConfig
from cluster.errors import StartError

VOCABULARY: Final = 2000
"""Of the shape's 2,048 tokens; the first ones have meanings."""

WITHIN: Final = 0.8
"""Of the capacity: what arrives when nobody should be refused."""

TENANTS: Final = ("load", "short", "flood")


@dataclass(frozen=True, kw_only=True)
class OverloadOptions:
    """Raises StartError for what cannot work. Lengths are tokens, the rest seconds and counts."""

    times: float = 4.0
    seconds: float = 20.0
    max_queue_delay: float = 2.0
    prompt: int = 256
    answer: int = 16
    at_once: int = 12
    calibrating: int = 120
    short_prompt: int = 32
    shorts: int = 12
    pause: float = 0.25
    long_prompt: int = 1500
    longs: int = 10
    chunk: int = 256
    seed: int = 0
    output: str = "bench/results/overload.json"

    def __post_init__(self) -> None:
        require(self.times > 1, "--times must be more than 1")
        require(self.max_queue_delay > 0, "--max-queue-delay must be greater than 0")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and name != "seed":
                require(value > 0, f"--{name.replace('_', '-')} must be greater than 0")
        longest = shape.CONFIG["max_position_embeddings"]
        require(self.long_prompt < longest, f"--long-prompt: the model ends at {longest}")


def main(argv: Sequence[str]) -> int:
    """Run `baton bench overload`. Returns 1 if an accepted answer broke. Raises StartError."""
    options = parse_options(argv)
    result = asyncio.run(measure(options))
    print(table(result))
    path = Path(options.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror}") from None
    print(f"Saved to {path}")
    return int(any(phase["broken"] for phase in result["phases"].values()))


def parse_options(argv: Sequence[str]) -> OverloadOptions:
    """Raises StartError; SystemExit for --help and unknown flags."""
    parser = argparse.ArgumentParser(
        prog="baton bench overload",
        description="A cluster beyond what it can do, and one tenant flooding beside another.",
        allow_abbrev=False,
    )
    for name, default in vars(OverloadOptions()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"default: {default}",
        )
    return OverloadOptions(**vars(parser.parse_args(list(argv))))


async def measure(options: OverloadOptions) -> dict[str, Any]:
    """Everything from the model to the last phase. Raises StartError; no process outlives it."""
    machine = describe((0, 1))
    with tempfile.TemporaryDirectory(prefix="baton-overload-") as directory:
        stand = Stand(options, Path(directory))
        async with stand.open(options.max_queue_delay) as bench:
            load, memory = await bench.overload()
        async with stand.open(0.0) as bench:
            fairness = await bench.fairness()
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": machine,
        "model": shape.NAME,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "gateway_rss_mib": memory,
        "phases": {phase.name: phase.numbers() for phase in (*load, *fairness)},
    }


class Stand:
    """What clusters are started from: a model of the usual shape, and a key for each tenant."""

    def __init__(self, options: OverloadOptions, directory: Path) -> None:
        self._options = options
        self._keys = directory / "keys.json"
        entries = [
            {"key_sha256": hashlib.sha256(tenant.encode()).hexdigest(), "tenant": tenant}
            for tenant in TENANTS
        ]
        self._keys.write_text(json.dumps(entries), encoding="utf-8")
        self._base = WorkerConfig(
            model=str(shape.write_model(directory)),
            load_format="dummy",
            kv_cache_memory_bytes=512 << 20,
            log_level="error",
        )

    @asynccontextmanager
    async def open(self, max_queue_delay: float) -> AsyncIterator[Bench]:
        """A fresh cluster."""
        front = GatewayConfig(max_queue_delay=max_queue_delay, api_key_file=str(self._keys))
        pair = modes((0, 1))[0]
        async with (
            house(pair, self._options.chunk, self._base, front, TENANTS[0]) as cluster,
            open_session() as session,
        ):
            bench = Bench(self._options, cluster, session)
            await bench.warm()
            yield bench


class Bench:
    """Asks one cluster."""

    def __init__(
        self, options: OverloadOptions, cluster: House, session: aiohttp.ClientSession
    ) -> None:
        self._options = options
        self._cluster = cluster
        self._session = session
        self._random = random.Random(options.seed)

    async def warm(self) -> None:
        await self._at_once("warm", 8)

    async def overload(self) -> tuple[list[Phase], dict[str, float]]:
        """And the gateway's memory before, after and, at most, while it is too much."""
        options = self._options
        capacity = await self._at_once("capacity", options.calibrating)
        capacity.rate = sum(call.record.ok for call in capacity.calls) / capacity.duration
        require(capacity.rate > 0, "nothing was answered: lower --prompt or --at-once")
        within = await self._open("within", capacity.rate * WITHIN)
        before = self._rss()
        watching = asyncio.create_task(self._peak())
        beyond = await self._open("beyond", capacity.rate * options.times)
        watching.cancel()
        memory = {"before": before, "most": await watching, "after": self._rss()}
        return [capacity, within, beyond], memory

    async def fairness(self) -> list[Phase]:
        return [
            await self._shorts("alone"),
            await self._flooded("flooded", "flood"),
            await self._flooded("one key", "short"),
        ]

    async def _at_once(self, name: str, count: int) -> Phase:
        """At most `at_once` in flight."""
        phase, free = Phase(name, 0.0), asyncio.Semaphore(self._options.at_once)

        async def one() -> None:
            body = self._body(self._options.prompt, self._options.answer)
            async with free:
                phase.calls.append(await self._send("load", body))

        return await _timed(phase, [one() for _ in range(count)])

    async def _open(self, name: str, rate: float) -> Phase:
        """At so many a second, whatever comes of them."""
        options, phase = self._options, Phase(name, rate)
        count = int(rate * options.seconds)
        bodies = [self._body(options.prompt, options.answer) for _ in range(count)]
        began = time.perf_counter()
        tasks: list[asyncio.Task[Call]] = []

        def send(index: int) -> None:
            tasks.append(asyncio.create_task(self._send("load", bodies[index])))

        arrivals = arrival_times(count, rate, 1.0, options.seed)
        await paced(arrivals, send, time.perf_counter, asyncio.sleep)
        phase.calls = list(await asyncio.gather(*tasks))
        phase.duration = time.perf_counter() - began
        return _told(phase)

    async def _shorts(self, name: str) -> Phase:
        """A person's pace: one after the other, with a moment between them."""
        phase, options = Phase(name, 0.0), self._options

        async def all_of_them() -> None:
            for _ in range(options.shorts):
                body = self._body(options.short_prompt, 2)
                phase.calls.append(await self._send("short", body))
                await asyncio.sleep(options.pause)

        return await _timed(phase, [all_of_them()])

    async def _flooded(self, name: str, key: str) -> Phase:
        options = self._options
        flood = [
            asyncio.create_task(self._send(key, self._body(options.long_prompt, 2)))
            for _ in range(options.longs)
        ]
        await asyncio.sleep(0.2)
        phase = await self._shorts(name)
        await asyncio.gather(*flood)
        return phase

    def _body(self, prompt: int, answer: int) -> bytes:
        ids = self._random.choices(range(8, VOCABULARY), k=prompt)
        body = {"model": shape.NAME, "prompt": ids, "max_tokens": answer, "ignore_eos": True}
        return json.dumps(body | {"stream": True, "temperature": 0.0}).encode()

    async def _send(self, key: str, body: bytes) -> Call:
        """One request to its end. A cut connection is an error of the record."""
        call, clock = Call(Record(start=time.perf_counter())), time.perf_counter
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{self._cluster.url}/v1/completions"
        try:
            async with self._session.post(url, data=body, headers=headers) as response:
                call.status = response.status
                call.retry_after = response.headers.get("retry-after", "")
                if response.status != 200:
                    await response.read()
                    call.seconds = clock() - call.record.start
                    return call
                parser, answer = SSEParser(), Answer(call.record, keep_text=False)
                async for chunk in response.content.iter_any():
                    now = clock()
                    for payload in parser.feed(chunk):
                        answer.accept(payload, now)
                answer.finish()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            call.record.error = f"{type(error).__name__}: {error}"
        return call

    async def _peak(self) -> float:
        """Until it is cancelled."""
        most = self._rss()
        try:
            while True:
                await asyncio.sleep(0.1)
                most = max(most, self._rss())
        except asyncio.CancelledError:
            return most

    def _rss(self) -> float:
        """MiB that the gateway has resident."""
        status = Path(f"/proc/{self._cluster.gateway_pid}/status").read_text(encoding="utf-8")
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return round(int(line.split()[1]) / 1024, 1)


async def _timed(phase: Phase, work: Sequence[Any]) -> Phase:
    began = time.perf_counter()
    await asyncio.gather(*work)
    phase.duration = time.perf_counter() - began
    return _told(phase)


def _told(phase: Phase) -> Phase:
    """One line on stderr, so that minutes of silence do not look like a hang."""
    print(f"{phase.name}: {len(phase.calls)} in {phase.duration:.1f} s", file=sys.stderr)
    return phase
