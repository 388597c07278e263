"""Links over ZeroMQ: a DEALER on the sender's side, one ROUTER on the receiver's.

What ZeroMQ's defaults lack is set here (each measured): a ROUTER silently drops what it cannot
route (ROUTER_MANDATORY), a DEALER queues for a peer that is not there (IMMEDIATE), a message of any
size is accepted (MAXMSGSIZE), a stopped peer goes unnoticed (heartbeats), the high-water mark
counts messages and not bytes (credit bounds the bytes, so it is lifted where it would block).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import zmq
from zmq.utils.monitor import parse_monitor_message

from cluster import metrics
from cluster.errors import StartError, WorkerLost
from engine.staging import DeviceBody
from kvtransfer.frames import MAX_BODY, Buffer
from kvtransfer.receiver import Receiver

HEARTBEAT_MS = 200
SILENCE_MS = 600
"""A peer that answers no heartbeat for so long is gone: it died, was stopped, or is cut off."""
BURST = 64
"""Messages taken in one go before the event loop may do something else."""
UNREAD = 32
"""Messages from one sender that wait in ZeroMQ before TCP pushes back."""
ANSWERS = 1 << 16
"""Answers that wait in ZeroMQ for one sender; one that lets more pile up is not reading them."""

_GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class _Port:
    """A socket whose messages come in on the event loop, and where sending never waits."""

    def __init__(self, socket: zmq.Socket[bytes], received: Callable[[list[Buffer]], None]) -> None:
        self._socket = socket
        self._received = received
        self._loop = asyncio.get_running_loop()
        self._wakeups = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._wakeups, self._drain)
        self._loop.call_soon(self._drain)

    def send(self, *parts: Buffer) -> None:
        """Raises zmq.ZMQError if it cannot be queued at once. The parts are not copied."""
        here = [part for part in parts if not isinstance(part, DeviceBody)]
        assert len(here) == len(parts), "a body on a device"
        self._socket.send_multipart(here, zmq.NOBLOCK, copy=False)
        # ZeroMQ tells of news once, and the send may have been what it told: look again.
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._wakeups)
            self._socket.close(linger=0)

    def _drain(self) -> None:
        for _ in range(BURST):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._received([frame.buffer for frame in frames])
        self._loop.call_soon(self._drain)


class ZmqWire:
    """A Wire to the ROUTER at `address`. Never reconnects: a lost link is replaced by a new one."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._context = context
        self._address = address
        self._port: _Port | None = None
        self._monitor: _Port | None = None
        self._connected: asyncio.Future[None] | None = None
        self._lost: Callable[[str], None] = lambda reason: None

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        self._lost = lost
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.MAXMSGSIZE, MAX_BODY)
        socket.set(zmq.RECONNECT_IVL, -1)
        _watch(socket)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _GONE)
        self._monitor = _Port(monitor, self._happened)
        self._port = _Port(socket, received)
        try:
            socket.connect(self._address)
        except zmq.ZMQError as error:
            raise WorkerLost(f"cannot connect to {self._address}: {error}") from error
        self._connected = asyncio.get_running_loop().create_future()
        await self._connected

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        assert self._port is not None, "sent before it was opened"
        try:
            self._port.send(*parts)
        except zmq.ZMQError as error:
            raise WorkerLost(f"cannot send: {error}") from error

    def close(self) -> None:
        for port in (self._monitor, self._port):
            if port is not None:
                port.close()
        if self._connected is not None and not self._connected.done():
            self._connected.set_exception(WorkerLost("connection failed"))

    def _happened(self, parts: list[Buffer]) -> None:
        event = parse_monitor_message([bytes(part) for part in parts])["event"]
        if event & _GONE:
            self._lost("connection lost")
        elif self._connected is not None and not self._connected.done():
            self._connected.set_result(None)


class ZmqHost:
    """Where senders connect: binds, then feeds a Receiver until closed."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], receiver: Receiver) -> None:
        self.address = ""
        self.counters: Counter[str] = Counter()
        self._context = context
        self._receiver = receiver
        self._port: _Port | None = None

    def start(self, bind: str = "tcp://127.0.0.1:*") -> None:
        """Afterwards `address` is where it really listens. Raises StartError."""
        _check_loopback(bind)
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.RCVHWM, UNREAD)
        socket.set(zmq.SNDHWM, ANSWERS)
        socket.set(zmq.MAXMSGSIZE, MAX_BODY)
        _watch(socket)
        try:
            socket.bind(bind)
        except zmq.ZMQError as error:
            socket.close()
            raise StartError(f"cannot listen for KV on {bind}: {error}") from error
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._receiver.send = self._send
        self._port = _Port(socket, self._take)

    def close(self) -> None:
        if self._port is not None:
            self._port.close()

    def metrics(self) -> Iterator[tuple[str, float]]:
        """For `Load.counters`: the receiver's, and what only the socket knows."""
        yield from self._receiver.metrics()
        yield metrics.ANSWERS_UNDELIVERED, self.counters["undelivered"]

    def _take(self, parts: list[Buffer]) -> None:
        self._receiver.take(bytes(parts[0]), parts[1:])

    def _send(self, route: bytes, parts: tuple[Buffer, Buffer]) -> None:
        assert self._port is not None
        try:
            self._port.send(route, *parts)
        except zmq.ZMQError:
            # Gone (EHOSTUNREACH) or not reading (EAGAIN): its own deadlines tell it.
            self.counters["undelivered"] += 1


def _watch(socket: zmq.Socket[bytes]) -> None:
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.set(zmq.HEARTBEAT_TTL, SILENCE_MS)


def _check_loopback(bind: str) -> None:
    """KV travels unencrypted and unauthenticated, so it stays on this machine."""
    if bind.startswith(("ipc://", "inproc://")):
        return
    host = bind.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if host == "localhost" or ip_address(host).is_loopback:
            return
    raise StartError(f"the data plane may only listen on a loopback address, not on {bind}")
