"""The receiving process of `baton bench transfer`: `python -m bench.transfer_end SETTINGS`.

It is a decode worker without a model: pool, pages, landings, receiver and a thread in place of the
step thread. It says where it listens, then answers every line on its standard input with a landing
of `tokens` tokens. With the raw transports it only takes bytes in; their KV is written by nobody.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import zmq

from cluster.credentials import WORKER, Credentials
from cluster.messages import Fingerprint, Hello, KVLayout, Landing, LayerGroup, Peer, Request
from engine.blocks import BlockPool
from engine.cache import KVCache
from engine.loop import Inbox, Stop
from kvtransfer.frames import Ack, Buffer, Chunk, Fields, Manifest, Sealed, digest_of
from kvtransfer.landing import Landings
from kvtransfer.receiver import Arrived, Receiver
from kvtransfer.shared_memory import Bytes, SharedMemoryHost, copied
from kvtransfer.zeromq import ZmqHost

SHARED: Final = "shared memory"
IPC: Final = "zeromq ipc"
TCP: Final = "zeromq tcp"
CURVE: Final = "zeromq tcp, curve"
RAW_UNIX: Final = "raw unix socket"
RAW_TCP: Final = "raw tcp"

ALL: Final = "all"
NO_DIGEST: Final = "no digest"
NONE: Final = "no digest, no landing"

LAYOUT: Final = KVLayout((LayerGroup(24, 2, 64),), "float32")
"""Of the shape "half", a 0.5 B model: 24,576 bytes a token. Many layers of few heads are the
hardest case for whoever copies rows."""
BLOCK: Final = 16


@dataclass(frozen=True)
class Settings:
    """One receiving process: `core` is where it stays, `chunks` are the sizes it will see."""

    transport: str
    tokens: int
    chunks: tuple[int, ...]
    checks: str = ALL
    core: int | None = None
    keys: tuple[str, ...] = ()  # the sender's and the receiver's secret, for CURVE


def none_of(body: Buffer) -> int:
    """The digest that is not computed."""
    return 0


def only_copied(source: Bytes, target: Bytes) -> int:
    """A copy without its digest."""
    np.copyto(target, source)
    return 0


def credentials(settings: Settings) -> Credentials | None:
    if not settings.keys:
        return None
    return Credentials(WORKER, b"", b"", b"", *(key.encode() for key in settings.keys))


def hello(peer: Peer, role: str) -> Hello:
    return Hello(peer, role, "bench", Fingerprint("shape", "random"), LAYOUT)


def digest_for(checks: str) -> Callable[[Buffer], int]:
    return digest_of if checks == ALL else none_of


class End:
    """The links' receiving side. Belongs to the event loop, as a decode worker's room does."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peer = Peer("decode", int.from_bytes(os.urandom(7)))
        count = -(-settings.tokens // BLOCK)
        self._cache = KVCache(LAYOUT, count, BLOCK)
        for layer in range(LAYOUT.layers):  # memory that was never touched is slow the first time
            self._cache.keys(layer).fill_(0)
            self._cache.values(layer).fill_(0)
        self._inbox = Inbox()
        loop = asyncio.get_running_loop()
        later = loop.call_soon_threadsafe
        digest = digest_for(settings.checks)
        receiver = Receiver(hello(self._peer, "decode"), self._inbox.put, later, 64 << 20, digest)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._host = ZmqHost(self._context, receiver, credentials(settings))
        self._near = SharedMemoryHost(receiver, copied if settings.checks == ALL else only_copied)
        where = f"ipc://@baton-bench-{os.getpid()}"
        self._host.start(where if settings.transport == IPC else "tcp://127.0.0.1:*")
        if settings.transport == SHARED:
            self._near.start(self._peer)
        self._landings = self._new_landings()
        self._slots = np.empty(0, dtype=np.int64)  # of the landing
        self._number = 0
        threading.Thread(target=self._step, daemon=True).start()

    def close(self) -> None:
        self._inbox.put(Stop())
        self._near.close()
        self._host.close()
        self._context.destroy(linger=0)

    async def promise(self) -> dict[str, Any]:
        """A landing in place of the one before."""
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._inbox.put(answered)
        return await answered

    def _step(self) -> None:
        while True:
            for order in self._inbox.take(wait=True):
                if isinstance(order, Stop):
                    return
                if isinstance(order, Arrived):
                    if self._settings.checks == NONE:
                        self._write_unchecked(order)
                    else:
                        self._landings.receive(order, 0.0)
                else:
                    landing = asdict(self._promised())
                    order.get_loop().call_soon_threadsafe(order.set_result, landing)

    def _new_landings(self) -> Landings:
        """With blocks in order, as they are never again once some were freed: every run alike."""
        pool = BlockPool(self._cache.blocks, BLOCK)
        return Landings(pool, self._cache, self._peer, self._host.address, 60.0)

    def _promised(self) -> Landing:
        self._landings = self._new_landings()
        self._number += 1
        request = Request(f"{self._number}", tuple(range(self._settings.tokens)))
        landing = self._landings.promise(request, 1, 0.0)
        self._slots = self._landings._by_id[landing.id].slots
        return landing

    def _write_unchecked(self, arrived: Arrived) -> None:
        """Write whatever comes to where it says, to measure what looking at it costs."""
        verdict: Fields = Ack()
        match arrived.fields:
            case Chunk(_, _, box, _):
                slots = self._slots[box.tokens.start : box.tokens.stop]
                self._cache.scatter(box.layers, slots, arrived.body, box.heads)
            case Manifest():
                verdict = Sealed()
        arrived.reply(verdict, "")


async def serve(settings: Settings) -> None:
    end = End(settings)
    loop = asyncio.get_running_loop()
    print("{}", flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await end.promise()), flush=True)
    end.close()


def serve_raw(settings: Settings) -> None:
    """Take bytes in chunks, a byte back for each: what one process reads with no protocol."""
    unix = settings.transport == RAW_UNIX
    with closing(socket.socket(socket.AF_UNIX if unix else socket.AF_INET)) as listener:
        listener.bind(f"\0baton-bench-{os.getpid()}" if unix else ("127.0.0.1", 0))
        listener.listen()
        where = os.getpid() if unix else listener.getsockname()[1]
        print(json.dumps({"where": where}), flush=True)
        for size in settings.chunks:
            connected, _ = listener.accept()
            with connected:
                chunk, done = np.empty(size, dtype=np.uint8).data, 0
                while got := connected.recv_into(chunk[done:]):
                    done += got
                    if done == size:
                        done = 0
                        connected.sendall(b".")


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.core is not None:
        os.sched_setaffinity(0, {settings.core})
    if settings.transport in (RAW_UNIX, RAW_TCP):
        serve_raw(settings)
        return
    import uvloop

    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
