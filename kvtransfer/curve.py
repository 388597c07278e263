"""CURVE for the data plane: who may send KV to whom, decided before the first frame.

CURVE alone encrypts and authenticates nobody: a receiver takes any client key unless somebody
answers ZeroMQ's questions about them. That is `Doorkeeper`, who knows one key: the senders'.

Source  ZeroMQ RFC 26 (CurveZMQ) and RFC 27 (ZAP).
"""

from __future__ import annotations

import hmac

import zmq
from zmq.utils import z85

from cluster.credentials import Credentials
from cluster.errors import StartError
from kvtransfer.frames import MAX_BODY, Buffer

ZAP = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks, once for each connection to a context's sockets."""
ZAP_VERSION = b"1.0"

LARGEST = MAX_BODY + 33
"""Bytes of a message: encryption adds command, nonce, authenticator and flags."""

OLDEST = (4, 3, 3)
"""Of libzmq. Before it a raw connection held open kept CURVE peers out (CVE-2020-15166), and more
that needed no key."""


def check_library(credentials: Credentials | None) -> None:
    """Raises StartError if the ZeroMQ here cannot be trusted with a port."""
    if zmq.zmq_version_info() < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise StartError(f"libzmq {zmq.zmq_version()} has known holes: {wanted} is the oldest good")
    if credentials is not None and not zmq.has("curve"):
        raise StartError("this libzmq was built without CURVE: install pyzmq's own wheel")


def present(socket: zmq.Socket[bytes], credentials: Credentials) -> None:
    """As a sender: with the senders' key, to nobody but a receiver of ours."""
    socket.set(zmq.CURVE_SECRETKEY, credentials.kv_sender)
    socket.set(zmq.CURVE_PUBLICKEY, zmq.curve_public(credentials.kv_sender))
    socket.set(zmq.CURVE_SERVERKEY, zmq.curve_public(credentials.kv_receiver))
    socket.set(zmq.MAXMSGSIZE, LARGEST)


def demand(socket: zmq.Socket[bytes], credentials: Credentials) -> None:
    """As a receiver. A Doorkeeper must be there before the socket is bound."""
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, credentials.kv_receiver)
    socket.set(zmq.MAXMSGSIZE, LARGEST)


class Doorkeeper:
    """Lets in whoever has shown that it owns the senders' secret key."""

    def __init__(self, credentials: Credentials) -> None:
        shown: bytes = zmq.curve_public(credentials.kv_sender)
        self._allowed = z85.decode(shown)

    def answer(self, parts: list[Buffer]) -> list[bytes]:
        """To one question of ZeroMQ's, which comes with the key that the peer has proven to own."""
        version, question, _domain, _address, _identity, mechanism, *shown = map(bytes, parts)
        known = (
            version == ZAP_VERSION
            and mechanism == b"CURVE"
            and len(shown) == 1
            and hmac.compare_digest(shown[0], self._allowed)
        )
        verdict = [b"200", b"OK"] if known else [b"400", b"no key of ours"]
        return [ZAP_VERSION, question, *verdict, b"", b""]
