"""Links over ZeroMQ: a DEALER on the sender's side, one ROUTER on the receiver's.

What ZeroMQ's defaults lack is set here (each measured): a ROUTER silently drops what it cannot
route (ROUTER_MANDATORY), a DEALER queues for a peer that is not there (IMMEDIATE), a message of any
size is accepted (MAXMSGSIZE), a stopped peer goes unnoticed (heartbeats), the high-water mark
counts messages and not bytes (credit bounds the bytes, so it is lifted where it would block).

With Credentials everything is encrypted and both sides prove who they are (curve.py); without, KV
stays on loopback, open to this machine's users.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import zmq
from zmq.utils.monitor import parse_monitor_message

from cluster import metrics
from cluster.credentials import Credentials
from cluster.errors import StartError, WorkerLost
from kvtransfer import curve
from kvtransfer.frames import MAX_BODY, Buffer
from kvtransfer.receiver import Receiver

log = logging.getLogger(__name__)

HEARTBEAT_MS = 200
SILENCE_MS = 1000
"""A peer that answers no heartbeat for so long is gone: it died, was stopped, or is cut off. Less,
and busy cores alone, or a stop of half a second, would end links."""
HANDSHAKE_MS = 2000
"""For a connection to prove what it is. One that only lies there costs a descriptor so long."""
BURST = 64
"""Messages taken in one go before the event loop may do something else."""
UNREAD = 32
"""Messages from one sender that wait in ZeroMQ before TCP pushes back."""
ANSWERS = 1 << 16
"""Answers that wait in ZeroMQ for one sender; one that lets more pile up is not reading them."""

_REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _REFUSED


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
        here = [part for part in parts if isinstance(part, bytes | bytearray | memoryview)]
        assert len(here) == len(parts), "a body of another transport"
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

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        credentials: Credentials | None = None,
    ) -> None:
        self._context = context
        self._address = address
        self._credentials = credentials
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
        if self._credentials is not None:
            curve.present(socket, self._credentials)
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
        opening = self._connected is not None and not self._connected.done()
        if event & _REFUSED or (event & _GONE and opening and self._credentials is not None):
            self._lost("no handshake: compare --keys of both workers")
        elif event & _GONE:
            self._lost("connection lost")
        elif self._connected is not None and opening:
            self._connected.set_result(None)


class ZmqHost:
    """Where senders connect: binds, then feeds a Receiver until closed.

    With credentials it has the context's Doorkeeper, so there can be one host a context.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        receiver: Receiver,
        credentials: Credentials | None = None,
    ) -> None:
        self.address = ""
        self.counters: Counter[str] = Counter()
        self._context = context
        self._receiver = receiver
        self._credentials = credentials
        self._port: _Port | None = None
        self._guards: list[_Port] = []

    def start(self, bind: str = "tcp://127.0.0.1:*") -> None:
        """Afterwards `address` is where it really listens. Raises StartError."""
        curve.check_library(self._credentials)
        if self._credentials is None:
            _check_loopback(bind)
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.RCVHWM, UNREAD)
        socket.set(zmq.SNDHWM, ANSWERS)
        socket.set(zmq.MAXMSGSIZE, MAX_BODY)
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        _watch(socket)
        if self._credentials is not None:
            self._guard(socket, self._credentials)
        try:
            socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            socket.close()
            raise StartError(f"cannot listen for KV on {bind}: {error}") from error
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._receiver.send = self._send
        self._port = _Port(socket, self._take)

    def close(self) -> None:
        for port in (self._port, *self._guards):
            if port is not None:
                port.close()

    def _guard(self, socket: zmq.Socket[bytes], credentials: Credentials) -> None:
        """Before anything can connect: whoever does is asked for a key, and counted without one."""
        doorkeeper = curve.Doorkeeper(credentials)
        questions = self._context.socket(zmq.REP)
        questions.set(zmq.LINGER, 0)
        questions.bind(curve.ZAP)
        answers = _Port(questions, lambda parts: answers.send(*doorkeeper.answer(parts)))
        self._guards = [answers, _Port(socket.get_monitor_socket(_REFUSED), self._refused)]
        curve.demand(socket, credentials)

    def _refused(self, parts: list[Buffer]) -> None:
        self._receiver.counters["keyless"] += 1
        if self._receiver.counters["keyless"] == 1:  # a stranger may come back at any rate
            log.warning("sender refused: no key of ours; later ones are only counted")

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
    raise StartError(
        f"without --keys the data plane may only listen on a loopback address, not on {bind}: "
        "`baton keys cluster` makes them"
    )
