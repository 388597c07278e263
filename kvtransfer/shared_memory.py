"""Links within one machine: bodies through memory that both processes see, the rest by messages.

    sender                                                         receiver
    memory without a name, sealed against shrinking -- its descriptor --> maps it, to read only

That the other side can map the memory is the proof that it is on this machine. Neither the memory
nor the sockets have a name in a file system, so they end with the processes that hold them, however
those end.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from cluster.messages import Peer
from engine import native
from engine.staging import NOW, Digested, Mark, Room
from kvtransfer.frames import Buffer, digest_of
from kvtransfer.near import NearHost, NearWire
from kvtransfer.receiver import Receiver

RING_BYTES = 64 << 20
"""Of address space; only as much is ever memory as lay unanswered at one time."""
MAX_RING_BYTES = 1 << 30
KEPT = 32
"""Copies of one size whose memory is kept for the next."""

KIND = "kv"
_OFFER, _READY = b"ring", b"ready"

_SHORT = 240
"""Bytes. Up to so many are digested by other rules than the kernel knows."""

Bytes = npt.NDArray[np.uint8]
Copying = Callable[[Bytes, Bytes], int]


def copied(source: Bytes, target: Bytes) -> int:
    """`source` to `target`: the digest of the copy. Without holding the interpreter's lock.

    In one walk through memory where there are native kernels.
    """
    if source.size <= _SHORT or not native.available():
        np.copyto(target, source)
        return digest_of(target.data)
    places = (array.__array_interface__["data"][0] for array in (source, target))
    return int(native.kernels.copy_digest(*places, source.size)) & (1 << 64) - 1


class Copies:
    """Private copies of bodies, in memory that is used again once nobody holds the copy.

    The allocator would give large pieces back to the system and fetch them anew, page by page,
    which takes longer than the copying.
    """

    def __init__(self, copying: Copying) -> None:
        self._copying = copying
        # By size in powers of two. Appended to by whichever thread drops a copy.
        self._free: dict[int, deque[Bytes]] = {}

    def of(self, source: Bytes) -> Digested:
        """`source` as it is now."""
        free = self._free.setdefault(max(1, source.size - 1).bit_length(), deque(maxlen=KEPT))
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(1 << max(1, source.size - 1).bit_length(), dtype=np.uint8)
        copy = memory[: source.size].view(Digested)
        weakref.finalize(copy, free.append, memory).atexit = False
        copy.digest = self._copying(source, copy)
        return copy


class SharedMemoryWire(NearWire):
    """To a peer that can map our memory."""

    kind = KIND
    what = "shared memory"

    def __init__(self, peer: Peer, ring_bytes: int = RING_BYTES) -> None:
        super().__init__(peer, ring_bytes)
        self._memory: memoryview | None = None

    def _offer(self, connected: socket.socket) -> None:
        """Make the memory and hand its descriptor over."""
        memory = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, self._ring.total)
            # Shrunk under its reader, memory kills it (SIGBUS): no reader maps it unsealed.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
            self._memory = memoryview(mmap.mmap(memory, self._ring.total))
            socket.send_fds(connected, [_OFFER], [memory])
        finally:
            os.close(memory)

    def _agree(self, answer: bytes) -> None:
        pass  # whatever it says, it has mapped the memory

    def _part(self, start: int, size: int) -> Room:
        assert self._memory is not None
        return self._memory[start : start + size]

    def _let_go(self) -> None:
        self._memory = None  # whoever fills a part of it holds it


class SharedMemoryHost(NearHost[Bytes]):
    """Maps the memory of senders. Another `copying` is for measuring what the digest costs."""

    kind = KIND
    what = "shared memory"

    def __init__(self, receiver: Receiver, copying: Copying = copied) -> None:
        super().__init__(receiver)
        self._copies = Copies(copying)

    def _welcome(self, connected: socket.socket) -> tuple[Bytes, bytes]:
        return _mapped(connected), _READY

    def _copy(self, memory: Bytes, start: int, size: int) -> tuple[Buffer, Mark] | None:
        if start + size > len(memory):
            return None
        return self._copies.of(memory[start : start + size]), NOW

    def _let_go(self, memory: Bytes) -> None:
        pass  # its last copy unmaps it


def _mapped(connected: socket.socket) -> Bytes:
    """The memory that a stranger offers. Raises OSError, and ValueError for what we do not map."""
    message, descriptors, _, _ = socket.recv_fds(
        connected, len(_OFFER) + 1, 2, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if message != _OFFER or len(descriptors) != 1:
            raise ValueError("no memory was offered")
        seals = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS)
        size = os.fstat(descriptors[0]).st_size
        if not seals & fcntl.F_SEAL_SHRINK or not 0 < size <= MAX_RING_BYTES:
            raise ValueError(f"{size} bytes with seals {seals:#x} are not mapped")
        return np.frombuffer(mmap.mmap(descriptors[0], size, prot=mmap.PROT_READ), np.uint8)
    finally:
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)
