"""Ports on Unix sockets: messages between two processes of one user on one machine.

The names are abstract (Linux): nothing lies in a file system, so nothing is left behind by a
process that was killed, and a container with a network of its own cannot reach them at all.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from cluster.messages import Peer

MAX_MESSAGE = 64 << 10
"""Bytes. A message is a frame's header with a place or with a body as small as a handshake's."""
MAX_QUEUED = 1 << 16
"""Messages that wait for a peer to read; one that lets more pile up is not reading them."""
BURST = 64
"""Messages taken in one go before the event loop may do something else."""

_CREDENTIALS = struct.Struct("iII")  # of the process that connected or listens: pid, uid, gid


def new_socket() -> socket.socket:
    """Of messages, kept whole and in order. Raises OSError, also where there is no such thing."""
    if sys.platform != "linux":
        raise OSError("abstract Unix sockets are Linux's")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setblocking(False)
    return made


def name_of(kind: str, peer: Peer) -> str:
    """Where this start of this worker listens. Nobody else's start has the name; who might guess it
    is not let in: see `owner`."""
    return f"\0baton/{kind}/{peer.incarnation:016x}"


def owner(connected: socket.socket) -> int:
    """The process id of the peer, 0 if it is not to be seen from here.

    Raises PermissionError if it is another user's: the kernel says so, not the peer. Everybody on
    the machine can connect to an abstract name; root, who can do anything here, is let in.
    """
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    if uid not in (os.geteuid(), 0):
        raise PermissionError(f"its user is {uid}, not {os.geteuid()} as here, nor root")
    return int(pid)


def stopped(pid: int) -> bool:
    """Whether the process is stopped, as by SIGSTOP: its sockets stay open and nobody answers."""
    if not pid:
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


class Port:
    """A connected socket whose messages come in on the event loop, and where sending never waits.

    `received` gets each message, `ended` is called once when the peer is gone or reads no longer.
    """

    def __init__(
        self,
        connected: socket.socket,
        received: Callable[[bytes], None],
        ended: Callable[[str], None],
    ) -> None:
        self._socket = connected
        self._received = received
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[bytes] = deque()
        self._closed = False
        self._loop.add_reader(connected.fileno(), self._read)

    def send(self, message: bytes) -> None:
        """In order. What the socket has no room for waits here."""
        if self._closed:
            return
        if self._waiting:
            self._waiting.append(message)
            if len(self._waiting) > MAX_QUEUED:
                self._end("the peer does not read")
            return
        try:
            self._socket.send(message)
        except BlockingIOError:
            self._waiting.append(message)
            self._loop.add_writer(self._socket.fileno(), self._write)
        except OSError as error:
            # Not at once: who sends is in the middle of something.
            self._loop.call_soon(self._end, f"connection lost: {error}")

    def close(self) -> None:
        """May be called again."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._waiting.clear()

    def _end(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._ended(reason)

    def _read(self) -> None:
        for _ in range(BURST):
            if self._closed:
                return
            try:
                message = self._socket.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError as error:
                self._end(f"connection lost: {error}")
                return
            if not message:
                self._end("connection lost")
                return
            self._received(message)

    def _write(self) -> None:
        try:
            while self._waiting:
                self._socket.send(self._waiting[0])
                self._waiting.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"connection lost: {error}")
            return
        self._loop.remove_writer(self._socket.fileno())
