"""SSEParser: bytes as the socket gave them -> the payloads of server-sent events.

Source  WHATWG HTML, "Server-sent events", section "Parsing an event stream".
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 * 1024 * 1024


class SSEParser:
    """Incremental; works on bytes, so a character split between two reads needs no care.

    Only `data` is looked at: OpenAI streams use neither `event`, `id` nor `retry`.
    """

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._ended_in_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the payloads of the events that this chunk completes, in order.

        An event is complete at its blank line; what the stream's end cuts off is never returned.
        Raises ValueError when a single line grows over MAX_EVENT_BYTES.
        """
        if self._ended_in_cr and chunk:
            self._ended_in_cr = False
            # The CR was taken for a whole line end, so this LF is its second half.
            chunk = chunk.removeprefix(b"\n")
        if b"\r" in chunk:
            self._ended_in_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = (self._line + chunk).split(b"\n")
        self._line = lines.pop()
        if len(self._line) > MAX_EVENT_BYTES:
            raise ValueError(f"an SSE line is longer than {MAX_EVENT_BYTES} bytes")
        payloads: list[bytes] = []
        for line in lines:
            if not line:
                if self._data:
                    payloads.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line == b"data":
                self._data.append(b"")
        return payloads
