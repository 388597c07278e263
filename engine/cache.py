"""KVCache: the tensors that hold keys and values of all blocks, nothing else.

Which block belongs to whom is the BlockPool's business; this file knows only slots, where slot =
block x block_size + offset. One tensor for each layer group:

    [layers, 2, slots, kv_heads, head_dim]        the 2: keys, then values

The form for the wire is the same with the chosen layers, tokens and heads alone, as raw
little-endian bytes, so it does not depend on either side's block size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from cluster.messages import KVLayout
from engine.blocks import Block

Buffer = bytes | bytearray | memoryview
Slots = npt.NDArray[np.int64]

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class KVCache:
    """Keys and values of `blocks` x `block_size` slots. Written by the step thread alone.

    Another thread may `gather` slots that the step thread no longer writes.
    """

    def __init__(
        self, layout: KVLayout, blocks: int, block_size: int, device: str | torch.device = "cpu"
    ) -> None:
        assert sys.byteorder == "little", "the wire is little-endian and is not converted"
        self.layout = layout
        self.blocks = blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self._on_host = self.device.type == "cpu"  # then numpy moves the bytes, without the GIL
        self._itemsize = _DTYPES[layout.dtype].itemsize
        slots = blocks * block_size
        self._groups = [
            torch.zeros(
                (group.layers, 2, slots, group.kv_heads, group.head_dim),
                dtype=_DTYPES[layout.dtype],
                device=self.device,
            )
            for group in layout.groups
        ]
        # Per group [layers, 2, slots], a view: what gather and scatter move on the host.
        self._slots = [_rows(_raw(group)) for group in self._groups] if self._on_host else []
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

    def gather(
        self,
        layers: range,
        slots: Slots,
        heads: range | None = None,
        out: memoryview | None = None,
    ) -> memoryview:
        """A copy of these slots as wire bytes [layers, 2, tokens, kv_heads, head_dim].

        In `out`, of the exact size, if it is given: a transport's own memory needs no copy between.
        """
        if out is None:
            out = np.empty(self.token_bytes(layers, heads) * len(slots), dtype=np.uint8).data
        target = np.frombuffer(out, dtype=np.uint8)
        if (rows := self._whole(layers, heads)) is not None:
            # Without a mode, which no slot of ours needs, take fills a buffer first, then `out`.
            taken = target.view(rows.dtype).reshape(*rows.shape[:2], len(slots))
            np.take(rows, slots, axis=2, out=taken, mode="clip")
            return out
        tensor = self._part(layers)
        if self._on_host:
            # All heads first: of a view with gaps numpy's take would copy the whole cache.
            values = np.take(_raw(tensor), slots, axis=2)
        else:
            chosen = tensor[:, :, torch.from_numpy(slots).to(self.device)]
            values = _raw(chosen.contiguous().cpu())
        if heads is not None:
            values = values[:, :, :, heads.start : heads.stop]
        np.copyto(target.reshape(values.shape), values)
        return out

    def scatter(
        self, layers: range, slots: Slots, payload: Buffer, heads: range | None = None
    ) -> None:
        """Write what `gather` made, here or on another worker. `payload` has the exact size."""
        if (rows := self._whole(layers, heads)) is not None:
            source = np.frombuffer(payload, dtype=rows.dtype)
            rows[:, :, slots] = source.reshape(*rows.shape[:2], len(slots))
            return
        tensor = self._part(layers)
        if heads is not None:
            tensor = tensor[:, :, :, heads.start : heads.stop]
        shape = (*tensor.shape[:2], len(slots), *tensor.shape[3:])
        parts = np.frombuffer(payload, dtype=np.uint8).reshape(
            *shape[:-1], shape[-1] * self._itemsize
        )
        if self._on_host:
            _raw(tensor)[:, :, slots] = parts
        else:
            # Copied on the host first: a frame off the network is read-only, torch wants it not.
            values = torch.from_numpy(parts.copy()).view(tensor.dtype).to(self.device)
            tensor[:, :, torch.from_numpy(slots).to(self.device)] = values

    def _whole(self, layers: range, heads: range | None) -> npt.NDArray[np.void] | None:
        """[layers, 2, slots], a view, each slot in one piece; None where that is not how it lies:
        on a device, or of a part of the heads."""
        group, first = self._find(layers)
        if not self._on_host or heads not in (None, range(self.layout.groups[group].kv_heads)):
            return None
        return self._slots[group][layers.start - first : layers.stop - first]

    def _part(self, layers: range) -> torch.Tensor:
        """[layers, 2, slots, kv_heads, head_dim], a view."""
        group, first = self._find(layers)
        return self._groups[group][layers.start - first : layers.stop - first]

    def _find(self, layers: range) -> tuple[int, int]:
        """Which group `layers` lie in, and that group's first layer."""
        for index, span in enumerate(group_spans(self.layout)):
            if span.start <= layers.start < layers.stop <= span.stop:
                return index, span.start
        raise AssertionError(f"{layers} is not inside one layer group of {self.layout}")


def group_spans(layout: KVLayout) -> list[range]:
    """The layers of each group, in order."""
    spans: list[range] = []
    for group in layout.groups:
        start = spans[-1].stop if spans else 0
        spans.append(range(start, start + group.layers))
    return spans


def _raw(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The same memory as bytes, last axis longer: numpy has no bfloat16."""
    return tensor.view(torch.uint8).numpy()


def _rows(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """[layers, 2, slots, kv_heads, bytes] as [layers, 2, slots]: numpy moves a slot in one piece,
    which is half as fast again as byte by byte."""
    *shape, heads, size = raw.shape
    return raw.reshape(*shape, heads * size).view(np.dtype((np.void, heads * size)))[..., 0]
