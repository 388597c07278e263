"""`baton serve`: a gateway and its workers on this machine, as separate processes.

A worker that dies is started again, with growing pauses while it keeps dying, and so is one of
several gateways; the only gateway's death ends everything. However we end, nothing outlives us: the
kernel kills each child with its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from cluster import process
from cluster.config import (
    GatewayConfig,
    ServeConfig,
    WorkerConfig,
    child_environment,
    flags,
    load,
)
from cluster.errors import StartError
from cluster.messages import BOTH, DECODE, PREFILL
from cluster.ports import address
from deploy.door import Door, check_free

STOP_S = 4.0
"""From Ctrl-C to the last child's end, by force if need be."""

COMMAND = (sys.executable, "-m", "cluster.cli")

LONGEST_PAUSE_S = 30.0
MAX_PORT = 65535
EARLY_DEATH_S = 10.0


@dataclass(frozen=True)
class Child:
    name: str
    arguments: list[str]
    api_key: tuple[str, ...] = ()  # handed over where other users cannot read them
    sockets: tuple[int, ...] = ()  # that it inherits


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C. Raises StartError."""
    config = load(ServeConfig, argv, "baton serve")
    if not (config.decode or config.both):
        raise StartError("nothing could answer: give --decode, with --prefill beside it, or --both")
    for flag, first in (("--grpc-port", config.grpc_port), ("--join-port", config.join_port)):
        if first + config.gateways - 1 > MAX_PORT:
            raise StartError(f"{flag} {first}: no {config.gateways} ports from there on")
    process.die_with_parent(config.die_with)
    process.start_logging(config.log_level)
    return process.run(lambda stopping: Launcher(config).serve(stopping))


def children(config: ServeConfig, door: Door | None = None) -> list[Child]:
    """Everything to start, the gateways first; several of them stand at one door."""
    shared = WorkerConfig(
        **{
            name: getattr(config, name)
            for name in WorkerConfig.__dataclass_fields__
            if name in ServeConfig.__dataclass_fields__ and name not in ("host", "port")
        }
    )
    gateways = [
        replace(config, grpc_port=config.grpc_port + number, join_port=config.join_port + number)
        for number in range(config.gateways)
    ]
    plan = []
    for number, gateway in enumerate(gateways):
        if door is not None:
            gateway = replace(gateway, listen=door.sockets(number), sibling=door.addresses)
        name = "gateway" if door is None else f"gateway-{number}"
        words = ["gateway", *flags(gateway, GatewayConfig)]
        plan.append(Child(name, words, config.api_key, gateway.listen))
    for role, number in ((PREFILL, config.prefill), (DECODE, config.decode), (BOTH, config.both)):
        for index in range(number):
            worker = replace(
                shared,
                role=role,
                name=f"{role}-{index}",
                join=tuple(gateway.join_address for gateway in gateways),
            )
            if role == DECODE and config.decode_block_size:
                worker = replace(worker, block_size=config.decode_block_size)
            plan.append(Child(worker.name, ["worker", *flags(worker, WorkerConfig)]))
    return plan


class Launcher:
    """Starts, watches and ends the children."""

    def __init__(self, config: ServeConfig) -> None:
        if config.api_key_file:  # it may hold digests alone: to ask the gateways needs a key
            config = replace(config, api_key=(*config.api_key, secrets.token_urlsafe(32)))
        self._config = config
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._url = f"{config.scheme}://{address(config.host, config.port)}"

    async def serve(self, stopping: process.Stopping) -> int:
        """The exit status. Raises StartError if anything ends before all is ready.

        If a child could not start, one has said why, and nothing more is said.
        """
        config = self._config
        check_free(config.host, config.port)
        for number in range(config.gateways):
            check_free(config.grpc_host, config.grpc_port + number, "--grpc-port")
            if config.keys:
                check_free(config.join_host, config.join_port + number, "--join-port")
        door = Door(config.host, config.port, config.gateways) if config.gateways > 1 else None
        plan = children(config, door)
        word = _start_word()
        stop = asyncio.create_task(stopping.wait())
        tasks: list[asyncio.Task[Any]] = [stop]
        try:
            for child in plan:
                await self._start(child, word)
            asked = [f"{config.scheme}://{own}" for own in door.addresses] if door else [self._url]
            up = asyncio.create_task(self._until_ready(asked, len(plan) - config.gateways))
            ends = [asyncio.create_task(self._end_of(child)) for child in plan]
            tasks += [up, *ends]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                return 0
            if not up.done():
                child, status = next(end.result() for end in ends if end.done())
                if status == process.EXIT_START:
                    return status
                raise StartError(f"{child.name} ended with status {status} before it was ready")
            self._announce(*await up)
            keepers = [
                asyncio.create_task(self._keep(child, end))
                for child, end in zip(plan, ends, strict=True)
            ]
            tasks += keepers
            done, _ = await asyncio.wait((stop, *keepers), return_when=asyncio.FIRST_COMPLETED)
            for keeper in done - {stop}:
                keeper.result()
            return 0 if stop in done else 1
        finally:
            for task in tasks:
                task.cancel()
            if door is not None:
                door.close()  # before the gateways close theirs: nobody is to wait in a queue
            await self._end(config.shutdown_timeout if stopping.patient else 0)
            os.close(word)

    async def _end(self, patience: float) -> None:
        """With patience the gateways first: what runs has so long to finish."""
        if patience:
            gateways = [c for name, c in self._running.items() if name.startswith("gateway")]
            await end_all(gateways, patience + STOP_S)
        await end_all(self._running.values())

    async def _start(self, child: Child, word: int = 0) -> None:
        self._running[child.name] = await asyncio.create_subprocess_exec(
            *COMMAND,
            *child.arguments,
            "--die-with",
            str(os.getpid()),
            f"--start-word={word}",
            env=child_environment(child.api_key),
            pass_fds=(*child.sockets, *((word,) if word else ())),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for us: we end the children in order
        )

    async def _end_of(self, child: Child) -> tuple[Child, int]:
        return child, await self._running[child.name].wait()

    async def _keep(self, child: Child, end: asyncio.Task[tuple[Child, int]]) -> int:
        """Start it again each time it ends. Returns when it was the only gateway.

        Whatever it ended with: what hinders a start now, memory or a port, may be gone later.
        """
        pause, clock = 1.0, asyncio.get_running_loop().time
        while True:
            started = clock()
            _, status = await end
            process.say(f"baton: {child.name} ended with status {status}")
            if child.name == "gateway":
                return status
            if clock() - started > EARLY_DEATH_S:
                pause = 0.5
            while True:
                pause = min(2 * pause, LONGEST_PAUSE_S)
                await asyncio.sleep(pause)
                try:
                    await self._start(child)
                    break
                except OSError as error:
                    process.say(f"baton: {child.name} cannot be started: {error.strerror}")
            end = asyncio.create_task(self._end_of(child))

    async def _until_ready(self, gateways: Sequence[str], workers: int) -> tuple[str, str]:
        """Ask each gateway until every worker has joined it. Returns the served model's name, and
        why requests are refused though all are there, if they are."""
        keys = self._config.api_key
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        deadline = asyncio.timeout(self._config.start_timeout)
        try:
            async with deadline, aiohttp.ClientSession(headers=headers) as client:
                model = why_not = ""
                for url in gateways:
                    status = dict[str, Any]()
                    while len(status.get("workers", ())) < workers:
                        status = await self._get(client, f"{url}/status")
                        await asyncio.sleep(0.05)
                    model = str(status["model"])
                    ready = await self._get(client, f"{url}/ready")
                    why_not = why_not or ready.get("error", {}).get("message", "")
                return model, why_not
        except TimeoutError:
            raise StartError("not ready in time: see --start-timeout") from None

    async def _get(self, client: aiohttp.ClientSession, url: str) -> dict[str, Any]:
        with contextlib.suppress(aiohttp.ClientError):
            async with client.get(url, ssl=False) as response:  # our own child's
                return dict(await response.json())
        return {}

    def _announce(self, model: str, why_not: str) -> None:
        config = self._config
        pools = [
            f"{number} {role}"
            for role, number in (
                (PREFILL, config.prefill),
                (DECODE, config.decode),
                (BOTH, config.both),
            )
            if number
        ]
        if config.gateways > 1:
            pools.insert(0, f"{config.gateways} gateways")
        state = f"is up, but refuses requests: {why_not}" if why_not else "is ready:"
        process.say(
            f"Baton {state} {self._url}  pools: {' + '.join(pools)}  model: {model}\n"
            f"Ask it: {_command()} chat --url {self._url} 'What is a landing?'",
            sys.stdout,
        )


async def end_all(children: Iterable[asyncio.subprocess.Process], limit: float = STOP_S) -> None:
    """SIGTERM to all; SIGKILL to whoever is left after `limit` seconds. None lives on."""
    living = [child for child in children if child.returncode is None]
    for child in living:
        child.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(limit):
            for child in living:
                await child.wait()
    except TimeoutError:
        for child in living:
            if child.returncode is None:
                child.kill()
                await child.wait()


def _command() -> str:
    """`baton`, as the shell finds it that started us."""
    typed = sys.argv[0]
    return "baton" if Path(typed).name != "baton" or shutil.which("baton") == typed else typed


def _start_word() -> int:
    """A pipe with one byte: the right to say why nothing starts."""
    word, told = os.pipe()
    os.write(told, b".")
    os.close(told)
    return word
