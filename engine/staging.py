"""Staging: how KV gets between a cache's pages and what a transport gives or takes.

What a device is told is only queued. A `Mark` stands behind what was queued before it, so that the
event loop can wait for that, and for nothing more, without being held up. On the host everything
is done at once: this file's staging makes no marks but NOW.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.native.scatter_rows import scatter_rows

Buffer = bytes | bytearray | memoryview
Slots = npt.NDArray[np.int64]

TURNS = 16
"""Turns of the event loop in which a mark is looked for, before there is a pause between two looks.
A chunk is copied within a fraction of a millisecond, which is the shortest pause there is."""
PAUSE_S = 0.0005


class Mark(Protocol):
    """A place in what was queued for a device."""

    def done(self) -> bool:
        """Whether all before it is over. Raises what the device failed with."""

    def wait(self) -> None:
        """Until then, holding up the thread."""


class _Now:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


NOW: Final = _Now()
"""Behind what was done when it was said."""


async def passed(mark: Mark) -> None:
    """Until all before the mark is over, while the event loop goes on."""
    for _ in range(TURNS):
        if mark.done():
            return
        await asyncio.sleep(0)
    while not mark.done():
        await asyncio.sleep(PAUSE_S)


class DeviceBody:
    """A chunk's bytes in memory of a device, where a transport carries them without the host.

    `digest` is known once the bytes are there.
    """

    size: int
    digest: int

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return self.read().cpu().numpy().tobytes()

    def write(self, wire: torch.Tensor) -> None:
        """Queue a copy of `wire` uint8 [size] to it, on the calling thread's stream."""
        raise NotImplementedError

    def read(self) -> torch.Tensor:
        """uint8 [size], for the calling thread's stream."""
        raise NotImplementedError


class Digested(np.ndarray[Any, np.dtype[np.uint8]]):  # NDArray is no class from numpy 2.5 on
    """A copy uint8 [size] on the host whose digest was found while it was made."""

    digest: int


Body = Buffer | Digested | DeviceBody
Room = memoryview | DeviceBody


class Staging(Protocol):
    """Moves KV of chosen layers, slots and heads; `group` and `layers` say which part of the pages.

    The wire form is [layers, 2, tokens, heads, head_dim]. Without `heads`, all of them.
    """

    def mark(self) -> Mark:
        """Behind everything that the calling thread has queued: for the step thread."""

    def gather(
        self, group: int, layers: slice, slots: Slots, heads: range | None, out: memoryview
    ) -> None:
        """Copy to `out`, holding up the thread until that is done."""

    def fill(self, group: int, layers: slice, slots: Slots, out: Room) -> Awaitable[None] | None:
        """Copy to `out`, all heads: done if there is nothing to await. For the event loop.

        What is awaited has ended reading and writing when it returns, raises or is cancelled.
        """

    def scatter(
        self, group: int, layers: slice, slots: Slots, body: Body, heads: range | None
    ) -> None:
        """Write `body`, which is not needed any more afterwards. For the step thread."""


class HostStaging:
    """For pages on the host. Bytes move without holding the interpreter's lock."""

    def __init__(self, pages: Sequence[torch.Tensor]) -> None:
        self._pages = [_raw(group) for group in pages]
        self._slots = [_rows(raw) for raw in self._pages]  # [layers, 2, slots] of each group

    def mark(self) -> Mark:
        return NOW

    def gather(
        self, group: int, layers: slice, slots: Slots, heads: range | None, out: memoryview
    ) -> None:
        target = np.frombuffer(out, dtype=np.uint8)
        if self._whole(group, heads):
            rows = self._slots[group][layers]
            # Without a mode, which no slot of ours needs, take fills a buffer first, then `out`.
            taken = target.view(rows.dtype).reshape(*rows.shape[:2], len(slots))
            np.take(rows, slots, axis=2, out=taken, mode="clip")
            return
        assert heads is not None
        # All heads first: of a view with gaps numpy's take would copy the whole cache.
        values = np.take(self._pages[group][layers], slots, axis=2)
        values = values[:, :, :, heads.start : heads.stop]
        np.copyto(target.reshape(values.shape), values)

    def fill(self, group: int, layers: slice, slots: Slots, out: Room) -> None:
        assert isinstance(out, memoryview), "KV of the host goes to a device"
        self.gather(group, layers, slots, None, out)

    def scatter(
        self, group: int, layers: slice, slots: Slots, body: Body, heads: range | None
    ) -> None:
        assert not isinstance(body, DeviceBody), "KV of a device comes to the host"
        if self._whole(group, heads):
            source = np.frombuffer(body, dtype=np.uint8)
            scatter_rows(self._slots[group][layers], slots, source)
            return
        assert heads is not None
        part = self._pages[group][layers][:, :, :, heads.start : heads.stop]
        shape = (*part.shape[:2], len(slots), *part.shape[3:])
        part[:, :, slots] = np.frombuffer(body, dtype=np.uint8).reshape(shape)

    def _whole(self, group: int, heads: range | None) -> bool:
        """Whether each slot moves in one piece."""
        return heads in (None, range(self._pages[group].shape[3]))


def _raw(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The same memory as bytes, last axis longer: numpy has no bfloat16."""
    return tensor.view(torch.uint8).numpy()


def _rows(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """[layers, 2, slots, kv_heads, bytes] as [layers, 2, slots]: numpy moves a slot in one piece,
    which is half as fast again as byte by byte."""
    *shape, heads, size = raw.shape
    return raw.reshape(*shape, heads * size).view(np.dtype((np.void, heads * size)))[..., 0]
