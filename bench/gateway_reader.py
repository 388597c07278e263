"""The client of `bench.gateway`: plain sockets in one epoll loop, nothing parsed while it runs.

Each read is noted with its time and with how many of its stream's tokens it completed: a token
shows as ` w17` (see bench.shape), so counting ` w` counts tokens, and `data: ` events.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import sys
import time
from dataclasses import dataclass

END = b"0\r\n\r\n"
SHORT = 8
"""Bytes of one read that the next one is looked at with: marks may be cut in two."""


@dataclass
class Stream:
    connection: socket.socket
    tokens: int = 0
    events: int = 0
    tail: bytes = b""
    whole: bytes = b""


def read_all(streams: list[Stream], keep: Stream | None) -> list[tuple[float, int, int]]:
    """Until every stream has ended: (time, first token, token behind the last) for each read."""
    poll = select.epoll()
    by_number = {stream.connection.fileno(): stream for stream in streams}
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    reads: list[tuple[float, int, int]] = []
    clock = time.monotonic
    while by_number:
        for number, _ in poll.poll():
            stream = by_number[number]
            data = stream.connection.recv(1 << 16)
            now = clock()
            seen = stream.tail + data
            tokens = seen.count(b" w") - stream.tail.count(b" w")
            stream.events += seen.count(b"data: ") - stream.tail.count(b"data: ")
            stream.tail = seen[-SHORT:]
            if tokens:
                reads.append((now, stream.tokens, stream.tokens + tokens))
                stream.tokens += tokens
            if stream is keep:
                stream.whole += data
            if not data or seen.endswith(END):
                poll.unregister(number)
                del by_number[number]
    return reads


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway_reader")
    parser.add_argument("port", type=int)
    parser.add_argument("streams", type=int)
    parser.add_argument("body", help="JSON sent on every stream")
    arguments = parser.parse_args()
    body = arguments.body.encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    streams = []
    for _ in range(arguments.streams):
        connection = socket.create_connection(("127.0.0.1", arguments.port))
        connection.sendall(head.encode() + body)
        streams.append(Stream(connection))
    began = time.process_time()
    reads = read_all(streams, streams[0])
    result = {
        "cpu_s": time.process_time() - began,
        "tokens": sum(stream.tokens for stream in streams),
        "events": sum(stream.events for stream in streams),
        "sample": re.findall(r"data: .*?\n\n", streams[0].whole.decode(), re.DOTALL),
        "reads": reads,
    }
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
