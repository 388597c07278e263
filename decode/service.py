"""The decode worker's room: its stage on the step thread, its receiver on the event loop."""

from __future__ import annotations

import asyncio

import zmq

from cluster.clock import monotonic
from cluster.config import WorkerConfig
from cluster.messages import BOTH
from decode.stage import DecodeStage
from engine import worker
from engine.worker import Parts
from kvtransfer.landing import Landings
from kvtransfer.receiver import Receiver
from kvtransfer.zeromq import ZmqHost


async def serve(config: WorkerConfig, stopping: asyncio.Event) -> int:
    """A decode or undivided worker until told to stop. Raises StartError."""
    return await worker.serve(config, stopping, DecodeRoom)


class DecodeRoom:
    """Made on the event loop. Listens for KV unless it is undivided."""

    def __init__(self, parts: Parts) -> None:
        config = parts.config
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        receiver = Receiver(
            parts.hello,
            parts.inbox.put,
            asyncio.get_running_loop().call_soon_threadsafe,
            config.credit_bytes,
        )
        self._host = ZmqHost(self._context, receiver)
        if config.role != BOTH:
            self._host.start(f"tcp://{config.host}:{config.data_port or '*'}")
        self.stage = DecodeStage(
            parts.cache,
            parts.pool,
            parts.allocator,
            parts.windows,
            Landings(parts.pool, parts.cache, parts.hello.peer, self._host.address, config.lease),
            budget=config.max_num_batched_tokens,
            max_sequences=config.max_num_seqs,
            clock=monotonic,
        )

    def open(self) -> str:
        return self._host.address

    async def serve(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        self._host.close()
        self._context.destroy(linger=0)
