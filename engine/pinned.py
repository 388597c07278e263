"""Pinned host memory, from which and to which a GPU copies by itself while the host goes on."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

BUFFERS = 3  # two steps may be under way while a third is written


class Packed:
    """Several tensors in one run of bytes, so that they travel in one copy."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        """Laid out for such tensors."""
        self._shapes = {name: (value.dtype, value.shape) for name, value in values.items()}
        self.bytes = sum(_size(dtype, shape) for dtype, shape in self._shapes.values())

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Each tensor within `buffer` uint8 [bytes]."""
        views, at = {}, 0
        for name, (dtype, shape) in self._shapes.items():
            size = _size(dtype, shape)
            views[name] = buffer[at : at + size].view(dtype)[: shape.numel()].view(shape)
            at += size
        return views


def _size(dtype: torch.dtype, shape: torch.Size) -> int:
    """In bytes, rounded up so that what follows is aligned for any dtype."""
    return -(-shape.numel() * dtype.itemsize // 16) * 16


class Inbox:
    """Pinned buffers in turn, each reused once the copy from it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turns = cycle([Pinned(device) for _ in range(BUFFERS)])

    def upload(self, packed: Packed, values: dict[str, Tensor]) -> Tensor:
        """uint8 [bytes] on the device, on its way."""
        pinned = next(self._turns)
        buffer = pinned.take(packed.bytes)
        for name, view in packed.views(buffer).items():
            view.copy_(values[name])
        there = buffer.to(self._device, non_blocking=True)
        pinned.used()
        return there


class Pinned:
    """One pinned buffer that grows. For the CPU, where the tests run, there is nothing to pin."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._done = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]

    def take(self, size: int) -> Tensor:
        """uint8 [size], once the copy that was queued before is done."""
        if self._done is not None:
            self._done.synchronize()
        if len(self._buffer) < size:
            self._buffer = torch.empty(2 * size, dtype=torch.uint8, pin_memory=self._on_gpu)
        return self._buffer[:size]

    def used(self) -> None:
        """A copy from or to it is queued."""
        if self._done is not None:
            self._done.record()
