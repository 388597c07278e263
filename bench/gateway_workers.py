"""Two workers that compute nothing: real gRPC and the real protocol, with tokens by the clock.

One process, started by `bench.gateway`. It prints a line of JSON for each thing that its parent
waits for ("joined", "full", "ended") and reads a line for each round: how many answers to wait for,
and how many steps a second; 0 goes as fast as the stream takes them. All answers go in lockstep,
one token each per step, so that the time of a step is the time at which all its tokens came to be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cluster import rpc
from cluster.clock import monotonic
from cluster.ids import new_id, new_incarnation
from cluster.messages import (
    DECODE,
    PREFILL,
    Cancel,
    Event,
    Fingerprint,
    Hello,
    KVLayout,
    Landing,
    LayerGroup,
    Load,
    Peer,
    Prefill,
    Promise,
    Promised,
    Request,
    Start,
    Token,
)
from cluster.model import config_digest
from cluster.orders import Ordered
from cluster.process import die_with_parent, run
from cluster.wire import codec
from cluster.worker import WorkerService

WORDS: Final = 2000

LINE_BYTES: Final = 16 << 20
"""A line of JSON from the parent at most: every event of a long answer."""
BLOCKS, BLOCK_SIZE = 1 << 20, 16

Key = tuple[int, str]
"""A session and a request in it."""


class Worker:
    """One role: answers orders at once. What it would have computed is a function of the index."""

    def __init__(self, role: str, digest: str) -> None:
        self.role = role
        self.peer = Peer(f"{role}-0", new_incarnation())
        self.running: dict[Key, tuple[int, int]] = {}  # attempt, index of the next token
        self.changed = asyncio.Event()
        self._asked: dict[Key, Request] = {}
        self._progress = 0
        self._digest = digest

    async def start(self) -> None:
        server = rpc.new_server()
        port = server.add_insecure_port("127.0.0.1:0")
        hello = Hello(
            self.peer,
            self.role,
            "bench",
            Fingerprint(self._digest, "none"),
            KVLayout((LayerGroup(1, 1, 8),), "float32"),
            control_address=f"127.0.0.1:{port}",
            data_address="none" if self.role == DECODE else "",
            block_size=BLOCK_SIZE,
            blocks=BLOCKS,
        )
        self.service = WorkerService(hello, self._take)
        handler = rpc.stream_handler(
            codec.SESSION, self.service.session, codec.decode_order, codec.encode_report
        )
        server.add_generic_rpc_handlers((handler,))
        self._server = server
        await server.start()

    def _take(self, order: Any) -> None:
        if isinstance(order, Ordered):
            event = self._obey(order)
            if event is not None:
                self.tell([(order.session, event)])

    def _obey(self, ordered: Ordered) -> Event | None:
        order = ordered.order
        key = (ordered.session, order.request_id)
        match order:
            case Promise(request, attempt):
                self._asked[key] = request
                landing = Landing(new_id(), 1, self.peer, "none", 0, 10.0)
                return Promised(request.id, attempt, landing)
            case Prefill(request, _, attempt):
                return Token(request.id, attempt, 0, word(0))
            case Start(_, _, attempt):
                self.running[key] = (attempt, 1)
                self.changed.set()
            case Cancel():
                self._asked.pop(key, None)
                self.running.pop(key, None)
                self.changed.set()
        return None

    def step(self) -> None:
        """One token for every running answer."""
        mail: list[tuple[int, Event]] = []
        for key, (attempt, index) in list(self.running.items()):
            session, request_id = key
            last = index + 1 == self._asked[key].sampling.max_tokens
            mail.append(
                (session, Token(request_id, attempt, index, word(index), "length" if last else ""))
            )
            if last:
                del self.running[key], self._asked[key]
            else:
                self.running[key] = (attempt, index + 1)
        self.tell(mail)

    def tell(self, mail: list[tuple[int, Event]]) -> None:
        self._progress += 1
        self.service.tell(mail, Load(self._progress, len(self.running), free_blocks=BLOCKS))


def word(index: int) -> int:
    return (13 + 7 * index) % WORDS


async def steps(worker: Worker, pace: float) -> list[float]:
    """Step until nothing runs; when each step was told."""
    told: list[float] = []
    due = monotonic()
    while worker.running:
        if pace:
            due += 1 / pace
            await asyncio.sleep(max(0.0, due - monotonic()))
        else:
            await asyncio.sleep(0)
        told.append(monotonic())
        worker.step()
    return told


async def serve(model: Path, joins: Sequence[str], stopping: asyncio.Event) -> int:
    digest = config_digest(model)
    prefill, decode = Worker(PREFILL, digest), Worker(DECODE, digest)
    orders = await lines()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for worker in (prefill, decode):
            await worker.start()
            tasks += [group.create_task(worker.service.join(address)) for address in joins]
            tasks.append(group.create_task(_beat(worker)))
        tell(event="up")
        while line := await orders.readline():
            order = json.loads(line)
            while len(decode.running) < order["streams"]:
                decode.changed.clear()
                await decode.changed.wait()
            tell(event="full")
            await orders.readline()  # the parent has looked at the clocks
            tell(event="ended", steps=await steps(decode, order["pace"]))
        for task in tasks:
            task.cancel()
    return 0


async def _beat(worker: Worker) -> None:
    """A step loop that has nothing to do counts on all the same."""
    while True:
        await asyncio.sleep(1.0)
        worker.tell([])


async def lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway_workers")
    parser.add_argument("model", type=Path)
    parser.add_argument("join", nargs="+")
    arguments = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    die_with_parent(os.getppid())
    return run(lambda stopping: serve(arguments.model, arguments.join, stopping))


if __name__ == "__main__":
    sys.exit(main())
