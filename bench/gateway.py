"""gateway: what streaming costs the gateway, beside a bare uvicorn application.

    gateway   the real process; its workers compute nothing (bench.gateway_workers), over real gRPC
    bare      an ASGI application that sends the same bytes in the same number of events

Both on one core, the workers and the client (bench.gateway_reader) on the other. Rounds alternate:
paced steps, which give the latency that is added, then a flood, steps as fast as the stream takes
them. Each token is an event of its own in all of them. CPU seconds are the serving process's own,
all its threads, from the moment when every answer has its first token. Times are those of one
host's monotonic clock: from the worker's step (for bare: the tick) to the client's read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from operator import truediv
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench import shape
from bench.options import require
from cluster.config import child_environment
from cluster.errors import StartError
from deploy.launcher import end_all

START_S: Final = 60.0
ROUND_S: Final = 120.0
LINE_BYTES: Final = 256 << 20
"""A line of JSON from a child at most: every read of a long round."""

PROMPT: Final = tuple(range(1, 33))


@dataclass(frozen=True)
class Options:
    streams: int = 256
    steps: int = 120
    pace: float = 40.0
    rounds: int = 5
    output: str = ""


@dataclass(frozen=True)
class Measured:
    """One round. Latencies are from a token's step to the read that completed it."""

    server: str
    paced: bool
    tokens: int
    events: int
    wall_s: float
    cpu_s: float
    client_cpu_s: float
    p50_ms: float
    p99_ms: float

    @property
    def tokens_per_core_second(self) -> float:
        return self.tokens / self.cpu_s


class Child:
    """A process of the bench: lines of JSON in and out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, core: int, *words: str) -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *words,
            env=child_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        os.sched_setaffinity(process.pid, {core})
        return cls(process)

    def say(self, message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")

    async def hear(self) -> dict[str, Any]:
        """Its next line. Raises StartError when there is none."""
        assert self.process.stdout is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ROUND_S):
                if line := await self.process.stdout.readline():
                    return dict(json.loads(line))
        raise StartError("a process of the bench said nothing more")

    def cpu_s(self) -> float:
        """CPU time of all its threads. The clock of another process, as clock_getcpuclockid names
        it; /proc has the same in steps of 10 ms."""
        return time.clock_gettime((~self.process.pid << 3) | 2)


@dataclass(frozen=True)
class Server:
    """What is measured, and what says when its answers take a step."""

    name: str
    port: int
    child: Child
    stepper: Child


async def measure(
    server: Server, options: Options, pace: float, client_core: int
) -> tuple[Measured, list[str]]:
    """One round; the second value is the events of one answer."""
    body = json.dumps(
        {
            "model": shape.NAME,
            "prompt": PROMPT,
            "max_tokens": options.steps + 1,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    )
    server.stepper.say({"streams": options.streams, "pace": pace})
    reader = await Child.start(
        client_core, "bench.gateway_reader", str(server.port), str(options.streams), body
    )
    try:
        await server.stepper.hear()  # every answer has its first token
        wall, cpu = time.monotonic(), server.child.cpu_s()
        server.stepper.say({})
        result = await reader.hear()
        wall, cpu = time.monotonic() - wall, server.child.cpu_s() - cpu
        steps = (await server.stepper.hear())["steps"]
    finally:
        await end_all([reader.process])
    expected = options.streams * (options.steps + 1)
    if result["tokens"] != expected:
        raise StartError(f"{server.name}: {result['tokens']} of {expected} tokens arrived")
    late = sorted(
        1e3 * (read - steps[index - 1])
        for read, first, behind in result["reads"]
        for index in range(max(1, first), behind)
    )
    measured = Measured(
        server.name,
        pace > 0,
        options.streams * options.steps,
        result["events"],
        wall,
        cpu,
        result["cpu_s"],
        late[len(late) // 2],
        late[len(late) * 99 // 100],
    )
    return measured, result["sample"]


async def compare(options: Options) -> list[Measured]:
    """All rounds: the servers take turns, paced first."""
    ours, others = sorted(os.sched_getaffinity(0))[:2]
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as directory:
        model = shape.write_model(Path(directory))
        async with contextlib.AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(serving_gateway(model, ours, others))
            _, events = await measure(gateway, options, 0, others)  # and warms up
            bare = await stack.enter_async_context(serving_bare(events, ours))
            await measure(bare, options, 0, others)
            for _ in range(options.rounds):
                for pace in (options.pace, 0.0):
                    for server in (gateway, bare):
                        measured, _ = await measure(server, options, pace, others)
                        found.append(measured)
    return found


@asynccontextmanager
async def serving_gateway(model: Path, core: int, workers_core: int) -> AsyncIterator[Server]:
    port, grpc_port = _free_port(), _free_port()
    flags = ["--port", str(port), "--grpc-port", str(grpc_port), "--log-level", "error"]
    gateway = await Child.start(core, "cluster.cli", "gateway", str(model), *flags)
    children = [gateway.process]
    try:
        join = f"127.0.0.1:{grpc_port}"
        workers = await Child.start(workers_core, "bench.gateway_workers", str(model), join)
        children.append(workers.process)
        await workers.hear()
        await _until_ready(f"http://127.0.0.1:{port}/ready")
        yield Server("gateway", port, gateway, workers)
    finally:
        await end_all(children)


@asynccontextmanager
async def serving_bare(events: Sequence[str], core: int) -> AsyncIterator[Server]:
    port = _free_port()
    bare = await Child.start(core, "bench.gateway_bare", str(port))
    try:
        bare.say(list(events))
        await bare.hear()
        yield Server("bare", port, bare, bare)
    finally:
        await end_all([bare.process])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def _until_ready(url: str) -> None:
    try:
        async with asyncio.timeout(START_S), aiohttp.ClientSession() as client:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with client.get(url) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StartError(f"the gateway was not ready within {START_S:g} s") from None


def table(rounds: Sequence[Measured]) -> str:
    """Medians over the rounds, and the gateway's share of what bare does next to it."""
    lines = [
        f"{'':<16}{'tokens/s':>10}{'per core s':>12}{'us/token':>10}"
        f"{'p50 ms':>9}{'p99 ms':>9}{'client cpu':>12}"
    ]
    for paced in (True, False):
        rates, middle = dict[str, list[float]](), statistics.median
        for name in ("gateway", "bare"):
            these = [r for r in rounds if r.server == name and r.paced == paced]
            rates[name] = [r.tokens_per_core_second for r in these]
            rate = middle(rates[name])
            latency = (
                f"{middle(r.p50_ms for r in these):>9.2f}{middle(r.p99_ms for r in these):>9.2f}"
                if paced
                else f"{'-':>9}{'-':>9}"
            )
            lines.append(
                f"{name + (' paced' if paced else ' flood'):<16}"
                f"{middle(r.tokens / r.wall_s for r in these):>10.0f}{rate:>12.0f}"
                f"{1e6 / rate:>10.1f}{latency}"
                f"{middle(r.client_cpu_s / r.wall_s for r in these):>12.0%}"
            )
        shares = map(truediv, rates["gateway"], rates["bare"])
        lines.append(f"{'gateway / bare':<16}{'':>10}{middle(shares):>12.2f}")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> Options:
    """Raises StartError; SystemExit for --help and unknown flags."""
    parser = argparse.ArgumentParser(
        prog="baton bench gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    defaults = Options()
    parser.add_argument("--streams", type=int, help="answers at once (default: 256)")
    parser.add_argument("--steps", type=int, help="tokens of each after its first (default: 120)")
    parser.add_argument("--pace", type=float, help="steps a second when paced (default: 40)")
    parser.add_argument("--rounds", type=int, help="of everything (default: 5)")
    parser.add_argument("--output", help="JSON (default: bench/results/gateway.json)")
    parser.set_defaults(**asdict(defaults))
    options = Options(**vars(parser.parse_args(argv)))
    require(1 <= options.streams <= 900, "--streams must be from 1 to 900")
    require(1 <= options.steps <= 4000, "--steps must be from 1 to 4000")
    require(options.pace > 0, "--pace must be greater than 0")
    require(options.rounds > 0, "--rounds must be at least 1")
    require(len(os.sched_getaffinity(0)) > 1, "two cores are needed: one serves, one asks")
    return options


def to_json(options: Options, rounds: Sequence[Measured]) -> dict[str, Any]:
    packages = ("uvicorn", "uvloop", "h11", "httptools", "grpcio", "protobuf")
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "options": asdict(options),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rounds": [asdict(one) for one in rounds],
    }


def main(argv: Sequence[str]) -> int:
    """Run `baton bench gateway`. Raises StartError."""
    options = parse(argv)
    rounds = asyncio.run(compare(options))
    print(table(rounds))
    path = Path(options.output or "bench/results/gateway.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_json(options, rounds), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror}") from None
    print(f"Saved to {path}")
    return 0
