"""KVCache: the tensors that hold keys and values of all blocks, nothing else.

Which block belongs to whom is the BlockPool's business; this file knows only slots, where slot =
block x block_size + offset. One tensor for each layer group:

    [layers, 2, slots, kv_heads, head_dim]        the 2: keys, then values

The form for the wire is the same with the chosen layers, tokens and heads alone, as raw
little-endian bytes, so it does not depend on either side's block size.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.messages import KVLayout
from engine.blocks import Block
from engine.staging import Body, HostStaging, Mark, Room, Slots, Staging

if TYPE_CHECKING:  # what only a worker on a GPU has a use for
    from engine.cuda_staging import Device

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class KVCache:
    """Keys and values of `blocks` x `block_size` slots. Written by the step thread alone.

    Another thread may read slots that the step thread no longer writes: on a device once a `mark`
    of then has passed. `gpu` is the device as staging knows it, None on the host.
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        block_size: int,
        device: str | torch.device = "cpu",
        gpu: Device | None = None,
    ) -> None:
        assert sys.byteorder == "little", "the wire is little-endian and is not converted"
        self.layout = layout
        self.blocks = blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self._itemsize = _DTYPES[layout.dtype].itemsize
        slots = blocks * block_size
        self._groups = [
            _zeros(
                (group.layers, 2, slots, group.kv_heads, group.head_dim),
                _DTYPES[layout.dtype],
                self.device,
            )
            for group in layout.groups
        ]
        self.gpu, self._staging = _staging(self.device, self._groups, gpu)
        layers = [layer for group in self._groups for layer in group.unbind()]
        self._keys: list[torch.Tensor] = [layer[0] for layer in layers]
        self._values: list[torch.Tensor] = [layer[1] for layer in layers]

    def keys(self, layer: int) -> torch.Tensor:
        """[slots, kv_heads, head_dim], a view."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """[slots, kv_heads, head_dim], a view."""
        return self._values[layer]

    def slots_of(self, blocks: Sequence[Block], start: int, stop: int) -> Slots:
        """The slots [stop - start] of tokens start .. stop - 1 of a sequence that has `blocks`."""
        first = start // self.block_size
        last = -(-stop // self.block_size)
        numbers = np.array([block.number for block in blocks[first:last]], dtype=np.int64)
        positions = np.arange(start, stop)
        return numbers[positions // self.block_size - first] * self.block_size + (
            positions % self.block_size
        )

    def token_bytes(self, layers: range, heads: range | None = None) -> int:
        """What one token takes on the wire. `layers` lie in one group; without `heads`, all."""
        group, _ = self._find(layers)
        shape = self.layout.groups[group]
        count = shape.kv_heads if heads is None else len(heads)
        return len(layers) * 2 * count * shape.head_dim * self._itemsize

    def mark(self) -> Mark:
        """Behind the KV that the calling thread has written, or had a device write, by now."""
        return self._staging.mark()

    def gather(
        self,
        layers: range,
        slots: Slots,
        heads: range | None = None,
        out: memoryview | None = None,
    ) -> memoryview:
        """A copy of these slots as wire bytes [layers, 2, tokens, kv_heads, head_dim].

        In `out`, of the exact size, if it is given. Holds up the thread.
        """
        if out is None:
            out = np.empty(self.token_bytes(layers, heads) * len(slots), dtype=np.uint8).data
        self._staging.gather(*self._part(layers), slots, heads, out)
        return out

    def fill(self, layers: range, slots: Slots, out: Room) -> Awaitable[None] | None:
        """The same into a transport's own memory, for the event loop: done if it is None."""
        return self._staging.fill(*self._part(layers), slots, out)

    def scatter(
        self, layers: range, slots: Slots, payload: Body, heads: range | None = None
    ) -> None:
        """Write what `gather` made, here or on another worker. `payload` has the exact size."""
        self._staging.scatter(*self._part(layers), slots, payload, heads)

    def _part(self, layers: range) -> tuple[int, slice]:
        """Which group they lie in, and which part of it they are."""
        group, first = self._find(layers)
        return group, slice(layers.start - first, layers.stop - first)

    def _find(self, layers: range) -> tuple[int, int]:
        """Which group `layers` lie in, and that group's first layer."""
        for index, span in enumerate(group_spans(self.layout)):
            if span.start <= layers.start < layers.stop <= span.stop:
                return index, span.start
        raise AssertionError(f"{layers} is not inside one layer group of {self.layout}")


def _staging(
    device: torch.device, pages: list[torch.Tensor], gpu: Device | None
) -> tuple[Device | None, Staging]:
    """What moves KV on `device`. A `gpu` that is given need not be one: the tests have none."""
    if device.type == "cpu" and gpu is None:
        return None, HostStaging(pages)
    from engine.cuda_staging import Cuda, DeviceStaging

    if gpu is None:
        gpu = cuda = Cuda(device)
        cuda.warm_up(pages)
    return gpu, DeviceStaging(gpu, pages)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the host memory is taken page by page, when a block is first written: torch would touch
    all of it at once. In small pages: a new huge one in every layer holds a step up for 70 ms."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def group_spans(layout: KVLayout) -> list[range]:
    """The layers of each group, in order."""
    spans: list[range] = []
    for group in layout.groups:
        start = spans[-1].stop if spans else 0
        spans.append(range(start, start + group.layers))
    return spans
