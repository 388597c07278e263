"""Links within one machine from GPU to GPU: bodies never come to the host.

    sender                                                          receiver
    asks -------------------------------------------------------->  exports memory of its device
    opens it  <--------------------------------- size, handle ----
    gathers KV, copies it to a region; its header and place ----->  copies it out, digests the copy
    region is free again  <------------------------------ answer --  scatters from the copy

All copies are queued on streams beside the steps; the event loops look for their ends. A header is
sent when its body has arrived, and judged when the receiver's copy is whole: that copy, which no
sender can reach, is what is digested, compared with what the sender found in its own, and later
scattered (R3), exactly as with memory of the host. Landing and generation are judged by the step
thread as ever.

The digest is made on the device (`Digests`). Who cannot open the memory, as in another container
or beside a device that this one does not see, goes another way.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cluster.errors import WorkerLost
from cluster.messages import Peer
from engine.cache import KVCache
from engine.staging import NOW, DeviceBody, Mark, Room
from kvtransfer.cuda_driver import HANDLE_BYTES, CudaDriver, Driver
from kvtransfer.frames import MAX_BODY, Buffer
from kvtransfer.near import NearHost, NearWire
from kvtransfer.receiver import Receiver

if TYPE_CHECKING:
    from engine.cuda_staging import Device

log = logging.getLogger(__name__)

KIND = "kv-cuda"
REGION_BYTES = 32 << 20
"""Of the receiver's device, for each link."""
MAX_REGIONS = 16
"""Links at one time; more senders than that go another way."""

_ASK = b"cuda ipc 1"
_HANDLE = Struct(f"<Q{HANDLE_BYTES}s")  # bytes of the memory, what opens it


class Digests:
    """Digests of bytes on a device: the sum of each word times an odd number of its place, mod
    2^64.

    A single changed word always shows, other damage but for one chance in some 2^32. It is for
    what machines get wrong, like xxh3, and not against somebody who wants to deceive.

    Source  Lemire and Kaser, "Strongly universal string hashing is fast", 2014, section 3.1
            (multilinear), with fixed multipliers.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._factors = torch.empty(0, dtype=torch.int64)

    def queue(self, content: Tensor) -> Tensor:
        """Of `content` uint8 [size]: pinned int64 [1], there once a mark behind this has passed.

        Always within the device's `aside`, the stream that the factors are from.
        """
        words = content.view(torch.int32) if len(content) % 4 == 0 else content
        if len(self._factors) < len(words):
            count = 1 << max(10, (len(words) - 1).bit_length())
            self._factors = torch.from_numpy(_factors(count)).to(self._device.device)
        total = (words * self._factors[: len(words)]).sum().view(1)
        here = self._device.pinned(8).view(torch.int64)
        here.copy_(total, non_blocking=True)
        return here


def _factors(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The same on every machine: splitmix64 of 1, 2, ... made odd."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)).view(np.int64)


@dataclass(frozen=True, slots=True)
class CudaIpc:
    """What both ends need of their device."""

    device: Device
    driver: Driver
    digests: Digests

    @classmethod
    def of(cls, cache: KVCache) -> CudaIpc | None:
        """Of the device that the cache is on, if that is one and torch's CUDA runtime is found."""
        if cache.gpu is None:
            return None
        try:
            driver = CudaDriver(cache.gpu.device)
        except (OSError, AttributeError) as error:
            log.warning("no KV from GPU to GPU: %s", error)
            return None
        return cls(cache.gpu, driver, Digests(cache.gpu))


class _Digested(DeviceBody):
    """A body whose digest is on its way to the host."""

    _total: Tensor | None = None

    @property
    def digest(self) -> int:  # type: ignore[override]
        assert self._total is not None, "never written"
        return int(self._total[0]) % 2**64


class _Place(_Digested):
    """A region of the peer's memory, to be written once."""

    def __init__(self, wire: CudaIpcWire, start: int, size: int) -> None:
        self.size = size
        self.mark: Mark = NOW
        self._wire = wire
        self._start = start

    def write(self, wire: Tensor) -> None:
        self._total, self.mark = self._wire.write(self._start, wire)


class _Copy(_Digested):
    """What a sender wrote, out of its reach. Made beside the steps, read among them."""

    def __init__(self, device: Device, content: Tensor, total: Tensor) -> None:
        self.size = len(content)
        self._device = device
        self._content = content
        self._total = total

    def read(self) -> Tensor:
        self._device.keep(self._content)
        return self._content


class CudaIpcWire(NearWire):
    """To a peer whose device's memory this process can open."""

    kind = KIND
    what = "CUDA IPC"

    def __init__(self, peer: Peer, ipc: CudaIpc) -> None:
        super().__init__(peer, 0)
        self._ipc = ipc
        self._address = 0

    def write(self, start: int, content: Tensor) -> tuple[Tensor, Mark]:
        """Queue a copy of `content`, and its digest. Raises WorkerLost once it is closed."""
        if not self._address:
            raise WorkerLost("closed")
        self._ipc.driver.copy(self._address + start, content.data_ptr(), len(content))
        return self._ipc.digests.queue(content), self._ipc.device.mark()

    def _offer(self, connected: socket.socket) -> None:
        connected.send(_ASK)

    def _agree(self, answer: bytes) -> None:
        if len(answer) != _HANDLE.size:
            raise ConnectionError("the peer has no memory for us")
        size, handle = _HANDLE.unpack(answer)
        if size < MAX_BODY:
            raise ConnectionError(f"{size} bytes are too few")
        self._address = self._ipc.driver.open(handle)
        self._ring.grow(size)

    def _part(self, start: int, size: int) -> Room:
        return _Place(self, start, size)

    def _let_go(self) -> None:
        address, self._address = self._address, 0
        if not address:
            return
        for _, place in self._rooms.values():
            assert isinstance(place, _Place)
            place.mark.wait()
        try:
            self._ipc.driver.close(address)
        except OSError as error:
            log.warning("cannot close a peer's memory: %s", error)


@dataclass(frozen=True, slots=True)
class _Region:
    """Memory of ours that a sender writes to."""

    address: int
    size: int


class CudaIpcHost(NearHost[_Region]):
    """Exports memory to senders, a region for each.

    It is freed when its sender has closed it, which the end of the connection says; what is open
    when this is closed, the end of the process frees.
    """

    kind = KIND
    what = "CUDA IPC"

    def __init__(self, receiver: Receiver, ipc: CudaIpc, region_bytes: int = REGION_BYTES) -> None:
        super().__init__(receiver)
        self._ipc = ipc
        self._region_bytes = region_bytes

    def _welcome(self, connected: socket.socket) -> tuple[_Region, bytes]:
        if connected.recv(len(_ASK) + 1) != _ASK:
            raise ValueError("it speaks another language")
        if len(self._guests) >= MAX_REGIONS:
            raise ValueError(f"{MAX_REGIONS} others have memory of ours")
        address, handle = self._ipc.driver.export(self._region_bytes)
        return _Region(address, self._region_bytes), _HANDLE.pack(self._region_bytes, handle)

    def _copy(self, memory: _Region, start: int, size: int) -> tuple[Buffer, Mark] | None:
        if start + size > memory.size:
            return None
        device = self._ipc.device
        with device.aside():
            content = torch.empty(size, dtype=torch.uint8, device=device.device)
            self._ipc.driver.copy(content.data_ptr(), memory.address + start, size)
            total = self._ipc.digests.queue(content)
            return _Copy(device, content, total), device.mark()

    def _let_go(self, memory: _Region) -> None:
        try:
            self._ipc.driver.free(memory.address)
        except OSError as error:
            log.warning("cannot free a sender's memory: %s", error)
