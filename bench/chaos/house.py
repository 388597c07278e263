"""House: gateways and workers as real processes on loopback, each to be struck by its name.

Every worker joins every gateway. What dies is started again under its own name, as a supervisor
would; nothing outlives the block that the house is entered for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import GatewayConfig, WorkerConfig, child_environment, flags
from cluster.errors import StartError
from cluster.messages import DECODE, PREFILL
from deploy.launcher import end_all

START_S: Final = 120.0
PATIENCE_S: Final = 60.0
"""For what takes seconds on a busy machine; what is promised to take less is measured."""

_POLL_S: Final = 0.02
_OWN_ERRORS: Final = ('"level": "error"', '"level": "critical"', "Traceback")
_HELD: Final = ("requests", "running", "waiting", "queued_tokens")
_HELD_BLOCKS: Final = ("promised_blocks", "owned_blocks")


@dataclass(frozen=True)
class Plan:
    """What the house is made of. `model` is a directory, or "" for the built-in one.

    A drained worker gets `drain_s` before it hands over what it still runs, and prompts are read
    `prefill_step` tokens at a time: short enough that blows fall into every phase.
    """

    model: str = ""
    prefill: int = 2
    decode: int = 3
    gateways: int = 2
    kv_cache_memory_bytes: int = 256 << 20
    prefill_step: int = 64
    drain_s: float = 0.5


class House:
    """Owned by one event loop. `directory` takes what the processes write to stderr."""

    def __init__(self, plan: Plan, directory: Path, client: aiohttp.ClientSession) -> None:
        self._directory = directory
        self._client = client
        ports = _free_ports(2 * plan.gateways)
        joins = [f"127.0.0.1:{port}" for port in ports[plan.gateways :]]
        self.gateways = {
            f"gateway-{number}": f"http://127.0.0.1:{ports[number]}"
            for number in range(plan.gateways)
        }
        self.roles: dict[str, str] = {}
        self._commands: dict[str, list[str]] = {}
        self._running: dict[str, asyncio.subprocess.Process] = {}
        for number, name in enumerate(self.gateways):
            gateway = GatewayConfig(
                model=plan.model,
                port=ports[number],
                grpc_port=ports[plan.gateways + number],
                log_level="warning",
            )
            self._commands[name] = ["gateway", *flags(gateway, GatewayConfig)]
        for role, count in ((PREFILL, plan.prefill), (DECODE, plan.decode)):
            for number in range(count):
                worker = WorkerConfig(
                    model=plan.model,
                    role=role,
                    name=f"{role}-{number}",
                    join=tuple(joins),
                    kv_cache_memory_bytes=plan.kv_cache_memory_bytes,
                    max_num_batched_tokens=plan.prefill_step,
                    chunk_bytes=32 << 10,
                    shutdown_timeout=plan.drain_s,
                    log_level="warning",
                )
                self._commands[worker.name] = ["worker", *flags(worker, WorkerConfig)]
                self.roles[worker.name] = role

    @property
    def urls(self) -> list[str]:
        return list(self.gateways.values())

    def workers(self, role: str = "") -> list[str]:
        """Their names; of one role, or all."""
        return [name for name, its in self.roles.items() if role in ("", its)]

    async def open(self) -> None:
        """Start everything and wait for it. Raises StartError."""
        for name in self._commands:
            await self.start(name)
        try:
            async with asyncio.timeout(START_S):
                while not await self._all_joined():
                    for name, process in self._running.items():
                        if process.returncode is not None:
                            raise StartError(
                                f"{name} ended with status {process.returncode}: "
                                f"{self._log(name)[-500:].strip()}"
                            )
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise StartError(f"the cluster was not ready within {START_S:g} s") from None

    async def close(self) -> None:
        for name in self._running:
            self.signal(name, signal.SIGCONT)  # who is stopped cannot end in order
        await end_all(self._running.values())

    async def start(self, name: str) -> None:
        """Start it, again if it has ended. Its log is appended to."""
        with (self._directory / f"{name}.log").open("ab") as log:
            self._running[name] = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cluster.cli",
                *self._commands[name],
                "--die-with",
                str(os.getpid()),
                env=child_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we end the children in order
            )

    def signal(self, name: str, number: signal.Signals) -> None:
        """Nothing happens to what has ended."""
        if self._running[name].returncode is None:
            self._running[name].send_signal(number)

    async def ended(self, name: str) -> int:
        """Its exit status, once there is one."""
        return await self._running[name].wait()

    async def again(self, name: str, incarnation: str = "") -> None:
        """Wait for its end, start it, and wait until it serves; a worker's start before this one
        had this `incarnation`."""
        await self.ended(name)
        await self.start(name)

        async def back() -> bool:
            if name in self.gateways:
                return await self._all_joined()
            starts = [await self.incarnation(name, gateway) for gateway in self.gateways]
            return not {"", incarnation} & set(starts)

        await self.until(back, f"{name} to be back")

    async def status(self, gateway: str = "gateway-0") -> Mapping[str, Any]:
        """What GET /status answers; {} while nobody does."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._client.get(f"{self.gateways[gateway]}/status") as response:
                if response.status == 200:
                    return dict(await response.json())
        return {}

    async def members(self, gateway: str) -> dict[str, Mapping[str, Any]]:
        return {
            worker["name"]: worker for worker in (await self.status(gateway)).get("workers", ())
        }

    async def incarnation(self, name: str, gateway: str = "gateway-0") -> str:
        """Which start of the worker a gateway has as a member; "" for none."""
        return str((await self.members(gateway)).get(name, {}).get("incarnation", ""))

    async def gone(self, name: str, incarnation: str) -> float:
        """Seconds from now until no gateway has this start of the worker as a member."""
        since = time.perf_counter()

        async def nowhere() -> bool:
            starts = [await self.incarnation(name, gateway) for gateway in self.gateways]
            return incarnation not in starts

        await self.until(nowhere, f"{name} to be lost")
        return time.perf_counter() - since

    async def whole(self) -> None:
        """Wait until every gateway has every worker."""
        await self.until(self._all_joined, "every worker to be a member")

    async def _all_joined(self) -> bool:
        return all([self.roles.keys() <= (await self.members(its)).keys() for its in self.gateways])

    async def until(
        self, condition: Callable[[], Awaitable[bool]], what: str, seconds: float = PATIENCE_S
    ) -> None:
        """Raises TimeoutError that says what did not come about."""
        try:
            async with asyncio.timeout(seconds):
                while not await condition():
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}") from None

    async def left_over(self, seconds: float) -> list[str]:
        """What workers still hold of requests after at most so long; empty is as it should be.

        Only what a worker has reported since this was called counts.
        """
        first = {gateway: await self.members(gateway) for gateway in self.gateways}
        found: list[str] = []

        async def at_rest() -> bool:
            nonlocal found
            found = []
            for gateway, before in first.items():
                members = await self.members(gateway)
                found += [f"{gateway}: {n} is missing" for n in self.roles.keys() - members.keys()]
                for name, now in members.items():
                    found += [f"{gateway}: {line}" for line in held(now)]
                    if now["progress"] == before.get(name, {}).get("progress"):
                        found.append(f"{gateway}: {name} has not moved")
            return not found

        with contextlib.suppress(TimeoutError):
            await self.until(at_rest, "every block to be given back", seconds)
        return found

    async def counter(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """A counter of the gateways' own: (gateway, value of each label) -> count."""
        counts: Counter[tuple[str, ...]] = Counter()
        for gateway, url in self.gateways.items():
            async with self._client.get(f"{url}/metrics") as response:
                for family in text_string_to_metric_families(await response.text()):
                    for sample in family.samples:
                        if sample.name == name:
                            values = (sample.labels[label] for label in labels)
                            counts[gateway, *values] += int(sample.value)
        return counts

    def own_errors(self) -> list[str]:
        """What the processes logged as failures of their own, whether or not a client saw it."""
        return [
            f"{name}: {line if len(line) < 2000 else line[:300] + ' ... ' + line[-1700:]}"
            for name in self._commands
            for line in self._log(name).splitlines()
            if any(word in line for word in _OWN_ERRORS)
        ]

    def _log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")


def held(worker: Mapping[str, Any]) -> list[str]:
    """What a worker holds of requests, and whether its ledger adds up (R1), as lines."""
    name, lines = worker["name"], []
    states = {what: worker[f"{what}_blocks"] for what in ("free", "cached", "promised", "owned")}
    if sum(states.values()) != worker["blocks"]:
        lines.append(f"{name}: {states} do not add up to {worker['blocks']}")
    lines += [f"{name}: {what} {worker[what]}" for what in (*_HELD, *_HELD_BLOCKS) if worker[what]]
    return lines


@asynccontextmanager
async def opened(plan: Plan, directory: Path) -> AsyncIterator[House]:
    """A house that is ready; all of it ends with the block. Raises StartError."""
    timeout = aiohttp.ClientTimeout(total=5.0)
    connector = aiohttp.TCPConnector(force_close=True)  # whom it kept open may be dead by then
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
        house = House(plan, directory, client)
        try:
            await house.open()
            yield house
        finally:
            await house.close()


def _free_ports(count: int) -> list[int]:
    """Below the range that the kernel takes ports from for outgoing connections: a gateway that is
    started again finds its port free, however many clients came and went meanwhile."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(11000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and port not in ports:
                ports.append(port)
    return ports
