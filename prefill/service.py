"""The prefill worker's room: its stage on the step thread, its sender on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import zmq

from cluster.clock import monotonic
from cluster.config import WorkerConfig
from cluster.errors import BatonError
from cluster.messages import Landing
from engine import worker
from engine.batch import Batch
from engine.layers.attention import Attend
from engine.worker import Parts
from kvtransfer.cuda_ipc import CudaIpc
from kvtransfer.curve import check_library
from kvtransfer.link import Link
from kvtransfer.nearest import link_to
from kvtransfer.sender import Announcement, Carried, Handoff, Sender
from prefill.attention import make_attend
from prefill.stage import HandoffEnded, PrefillStage


async def serve(config: WorkerConfig, stopping: asyncio.Event) -> int:
    """A prefill worker until told to stop. Raises StartError."""
    return await worker.serve(config, stopping, PrefillRoom)


class Across:
    """The sender's verbs, callable from the step thread: each runs later on the event loop."""

    def __init__(self, sender: Sender, later: Callable[..., Any]) -> None:
        self._sender = sender
        self._later = later

    def open(self, handoff: Handoff) -> None:
        self._later(self._sender.open, handoff)

    def announce(self, request_id: str, attempt: int, announcement: Announcement) -> None:
        self._later(self._sender.announce, request_id, attempt, announcement)

    def finish(self, request_id: str, attempt: int) -> None:
        self._later(self._sender.finish, request_id, attempt)

    def cancel(self, request_id: str, attempt: int) -> None:
        self._later(self._sender.cancel, request_id, attempt)


class PrefillRoom:
    """Made on the event loop. Raises StartError."""

    def __init__(self, parts: Parts) -> None:
        check_library(parts.credentials)
        self._parts = parts
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._ipc = CudaIpc.of(parts.cache)
        config = parts.config
        later = asyncio.get_running_loop().call_soon_threadsafe
        self._sender = Sender(parts.cache, self._connect, self._released, config.chunk_bytes)
        self.stage = PrefillStage(
            parts.cache,
            parts.pool,
            parts.allocator,
            parts.windows,
            Across(self._sender, later),
            make_attend(parts.kernels),
            budget=config.max_num_batched_tokens,
            chunk_bytes=config.chunk_bytes,
            clock=monotonic,
        )

    def attention(self, batch: Batch) -> Attend:
        return self.stage.attention(batch)

    def open(self) -> str:
        return ""

    async def serve(self) -> None:
        async with self._sender:
            await asyncio.Event().wait()

    def metrics(self) -> Iterable[tuple[str, float]]:
        return self._sender.metrics()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _connect(self, landing: Landing) -> Link:
        return link_to(
            self._context,
            landing.address,
            self._parts.hello,
            landing.peer,
            landing.lease_s,
            self._ipc,
            self._parts.credentials,
            self._parts.config.kv_transport,
        )

    def _released(self, handoff: Handoff, error: BatonError | None, carried: Carried) -> None:
        ended = HandoffEnded(*handoff.key, error, carried.bytes)
        self._parts.inbox.put(ended)
