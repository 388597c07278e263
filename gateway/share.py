"""A port that several gateway processes share: how one of them steps back without a loss.

The kernel deals each new connection to one of the listening sockets, whatever their owners do. Left
alone, the socket of a gateway that drains would go on getting its part, to wait in its queue for a
process that may be gone; closed, it would reset whoever is in that queue or half way there. So the
sockets get a rule that passes this one over: what it has been dealt already it still answers.

Source  man 7 socket, SO_ATTACH_REUSEPORT_CBPF; the kernel's filter.rst for the instructions.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from typing import Final

_ATTACH: Final = 51  # SO_ATTACH_REUSEPORT_CBPF
_DETACH: Final = 68  # SO_DETACH_REUSEPORT_BPF

_LOAD_WORD, _MODULO, _SKIP_UNLESS_AT_LEAST, _ADD, _RETURN = 0x20, 0x94, 0x35, 0x04, 0x16
_RANDOM: Final = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM


def step_back(listener: socket.socket, own: int, count: int) -> None:
    """From now on new connections go to the other `count` - 1 sockets; `own` is ours among them, in
    the order in which they began to listen. The rule stays when we are gone."""
    program = b"".join(
        struct.pack("=HBBI", *step)
        for step in (
            (_LOAD_WORD, 0, 0, _RANDOM),
            (_MODULO, 0, 0, count - 1),
            (_SKIP_UNLESS_AT_LEAST, 0, 1, own),
            (_ADD, 0, 0, 1),
            (_RETURN, 0, 0, 0),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH, filter_)


def step_forward(listener: socket.socket) -> None:
    """All get their part again: the rule of whoever stepped back goes. Idempotent."""
    try:
        listener.setsockopt(socket.SOL_SOCKET, _DETACH, 0)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
