"""DeviceStaging: KV between a GPU's pages and the host, and nobody waits for the GPU.

    prefill   event loop   a chunk's KV is final (its mark has passed)
                           side stream: gather -> copy to pinned memory, or to another process
                           look for the end now and then, then copy to the transport's memory
    decode    step thread  body -> pinned memory
                           its own stream: copy to the device -> scatter

The side stream has priority over the step's: it moves a fraction of what a layer's kernels read,
and a receiver waits for it. The decode side needs no event: what a later step reads, and what a
block's next owner writes, is queued behind the scatter on the same stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.staging import NOW, Body, DeviceBody, Mark, Room, Slots, passed

DESKS = 8
"""Chunks on their way between pages and host at one time, in each direction: the credit that a link
gives out while its peer answers is four chunks of the usual size."""

Gather = Callable[[Tensor, Tensor, range | None], Tensor]
Scatter = Callable[[Tensor, Tensor, Tensor, range | None], None]


class Device(Protocol):
    """The little of a GPU that moving KV needs. Any thread may call it."""

    @property
    def device(self) -> torch.device: ...

    def mark(self) -> Mark:
        """Behind what the calling thread has queued on its current stream."""

    def current(self) -> AbstractContextManager[object]:
        """Kernels go to this device within."""

    def aside(self) -> AbstractContextManager[object]:
        """What the thread queues within goes to a stream of its own, not behind the steps."""

    def pinned(self, size: int) -> Tensor:
        """uint8 [size] of the host, that the device copies from and to by itself."""

    def keep(self, tensor: Tensor) -> None:
        """Memory of the other stream is used on the calling thread's, too: not to be given away
        before that is over."""

    def gather(self, pages: Tensor, slots: Tensor, heads: range | None) -> Tensor: ...

    def scatter(self, pages: Tensor, slots: Tensor, wire: Tensor, heads: range | None) -> None: ...


class Cuda:
    """A GPU of torch's. Made once for a cache: it has the side stream."""

    def __init__(self, device: torch.device) -> None:
        # With a number, so that it is the same device in every thread.
        self.device = torch.empty(0, device=device).device
        self._aside = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        self.gather, self.scatter = _kernels()

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return _Recorded(event)

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def aside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._aside)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def warm_up(self, pages: Sequence[Tensor]) -> None:
        """Compile the kernels now: for one token, a multiple of 16 and another number of them."""
        # The pages are being filled on the stream of who made them.
        self._aside.wait_stream(torch.cuda.current_stream(self.device))
        with self.aside():
            for group in pages:
                for tokens in (1, 3, 16):
                    if tokens <= group.shape[2]:
                        slots = torch.arange(tokens, device=self.device)
                        self.scatter(group, slots, self.gather(group, slots, None), None)
        self._aside.synchronize()


class _Recorded:
    """A mark on a CUDA stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()


class _Desk:
    """Pinned memory for one chunk and its slots; grows. Used again once its mark has passed."""

    def __init__(self, device: Device) -> None:
        self.mark: Mark = NOW
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lay_out(self, slots: Slots, size: int) -> tuple[Tensor, Tensor]:
        """The slots int64 [tokens], and room for a chunk uint8 [size] behind them."""
        self.mark.wait()
        start = -(-slots.nbytes // 16) * 16  # so that the chunk is aligned for any dtype
        if len(self._memory) < start + size:
            self._memory = self._device.pinned(2 * (start + size))
        numbers = self._memory[: slots.nbytes].view(torch.int64)
        np.copyto(numbers.numpy(), slots)
        return numbers, self._memory[start : start + size]


class DeviceStaging:
    """Staging for `pages`, one tensor [layers, 2, slots, kv_heads, head_dim] for each group.

    `scatter` and `mark` are the step thread's, `fill` is the event loop's.
    """

    def __init__(self, device: Device, pages: Sequence[Tensor], desks: int = DESKS) -> None:
        self._device = device
        self._pages = pages
        self._gathering = [_Desk(device) for _ in range(desks)]
        self._seats = asyncio.Semaphore(desks)
        self._scattering = cycle([_Desk(device) for _ in range(desks)])

    def mark(self) -> Mark:
        return self._device.mark()

    def gather(
        self, group: int, layers: slice, slots: Slots, heads: range | None, out: memoryview
    ) -> None:
        self.mark().wait()
        desk = _Desk(self._device)
        chunk = self._begin(desk, self._pages[group][layers], slots, heads, out)
        desk.mark.wait()
        assert chunk is not None
        np.copyto(np.frombuffer(out, dtype=np.uint8), chunk.numpy())

    async def fill(self, group: int, layers: slice, slots: Slots, out: Room) -> None:
        async with self._seats:
            desk = self._gathering.pop()
            try:
                chunk = self._begin(desk, self._pages[group][layers], slots, None, out)
                await passed(desk.mark)
                if chunk is not None and isinstance(out, memoryview):
                    np.copyto(np.frombuffer(out, dtype=np.uint8), chunk.numpy())
            finally:
                # Given up: who did lets go of the blocks next, and nothing may read them then. It
                # takes no longer than the chunk, as nothing is before it but others like it.
                desk.mark.wait()
                self._gathering.append(desk)

    def _begin(
        self, desk: _Desk, pages: Tensor, slots: Slots, heads: range | None, out: Room
    ) -> Tensor | None:
        """Queue a gather of `slots`. Returns where on the host it will be, if `out` is there.

        Memory of the device is from the side stream's own pool, and what comes to use it next comes
        behind this on that stream.
        """
        numbers, chunk = desk.lay_out(slots, 0 if isinstance(out, DeviceBody) else len(out))
        with self._device.aside():
            try:
                there = numbers.to(self._device.device, non_blocking=True)
                wire = self._device.gather(pages, there, heads).view(torch.uint8).view(-1)
                if isinstance(out, DeviceBody):
                    out.write(wire)
                    return None
                chunk.copy_(wire, non_blocking=True)
                return chunk
            finally:
                desk.mark = self._device.mark()

    def scatter(
        self, group: int, layers: slice, slots: Slots, body: Body, heads: range | None
    ) -> None:
        pages = self._pages[group][layers]
        kv_heads = pages.shape[3] if heads is None else len(heads)
        shape = (*pages.shape[:2], len(slots), kv_heads, pages.shape[4])
        desk = next(self._scattering)
        numbers, chunk = desk.lay_out(slots, 0 if isinstance(body, DeviceBody) else len(body))
        with self._device.current():
            try:
                there = numbers.to(self._device.device, non_blocking=True)
                if isinstance(body, DeviceBody):
                    wire = body.read()
                else:
                    np.copyto(chunk.numpy(), np.frombuffer(body, dtype=np.uint8))
                    wire = chunk.to(self._device.device, non_blocking=True)
                self._device.scatter(pages, there, wire.view(pages.dtype).view(shape), heads)
            finally:
                desk.mark = self._device.mark()


def _kernels() -> tuple[Gather, Scatter]:
    """In one launch each; without Triton, which not every platform has, torch's own."""
    try:
        from engine.kernels.move_kv import gather_kv, scatter_kv
    except ImportError:
        return gather_plainly, scatter_plainly
    return gather_kv, scatter_kv


def gather_plainly(pages: Tensor, slots: Tensor, heads: range | None) -> Tensor:
    """What a gather is. [layers, 2, tokens, heads, head_dim]."""
    chosen = pages[:, :, slots]
    return (chosen if heads is None else chosen[:, :, :, heads.start : heads.stop]).contiguous()


def scatter_plainly(pages: Tensor, slots: Tensor, wire: Tensor, heads: range | None) -> None:
    """What a scatter is."""
    part = pages if heads is None else pages[:, :, :, heads.start : heads.stop]
    part[:, :, slots] = wire
