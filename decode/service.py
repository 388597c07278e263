"""The decode worker's room: its stage on the step thread, its receiver on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import zmq

from cluster.clock import monotonic
from cluster.config import WorkerConfig
from cluster.errors import BatonError
from cluster.messages import BOTH, Request
from decode.attention import make_attend
from decode.stage import DecodeStage
from engine import worker
from engine.batch import Batch
from engine.layers.attention import Attend
from engine.worker import Parts
from kvtransfer.cuda_ipc import CudaIpc, CudaIpcHost
from kvtransfer.landing import Landings
from kvtransfer.near import NearHost
from kvtransfer.receiver import Receiver
from kvtransfer.shared_memory import SharedMemoryHost
from kvtransfer.zeromq import ZmqHost


async def serve(config: WorkerConfig, stopping: asyncio.Event) -> int:
    """A decode or undivided worker until told to stop. Raises StartError."""
    return await worker.serve(config, stopping, DecodeRoom)


class NoLandings(Landings):
    """An undivided worker's: it has no address that KV could be sent to, so it promises nothing."""

    def promise(
        self, request: Request, attempt: int, now: float, keys: Sequence[bytes] = ()
    ) -> NoReturn:
        raise BatonError("An undivided worker takes no KV.", code="wrong_role")


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
        self._host = ZmqHost(self._context, receiver, parts.credentials)
        ipc = CudaIpc.of(parts.cache)
        self._nears: list[NearHost[Any]] = []
        if config.kv_transport == "auto":
            self._nears.append(SharedMemoryHost(receiver))
        if config.kv_transport == "auto" and ipc is not None:
            self._nears.append(CudaIpcHost(receiver, ipc))
        landings = NoLandings if config.role == BOTH else Landings
        if config.role != BOTH:
            self._host.start(f"tcp://{config.host}:{config.data_port or '*'}")
            for near in self._nears:
                near.start(parts.hello.peer)
        self.stage = DecodeStage(
            parts.cache,
            parts.pool,
            parts.allocator,
            parts.windows,
            landings(parts.pool, parts.cache, parts.hello.peer, self._host.address, config.lease),
            make_attend(parts.kernels),
            budget=config.max_num_batched_tokens,
            max_sequences=config.max_num_seqs,
            clock=monotonic,
            short=lambda: parts.pressure.high,
        )

    def attention(self, batch: Batch) -> Attend:
        return self.stage.attention(batch)

    def open(self) -> str:
        return self._host.address

    async def serve(self) -> None:
        await asyncio.Event().wait()

    def metrics(self) -> Iterable[tuple[str, float]]:
        return self._host.metrics()

    def close(self) -> None:
        for near in reversed(self._nears):
            near.close()
        self._host.close()
        self._context.destroy(linger=0)
