"""A client that asks for a lot and reads nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.e2e.client import get, tokens
from tests.e2e.cluster import serving, wait_until
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER, SOON_S

ASK = {**LONG_ANSWER, "stream": True, "n": 4, "logprobs": 20, "max_tokens": 3000}
"""Some 20 MB: the kernel's buffers alone take more than one."""


def test_it_is_hung_up_on_and_its_work_ends(tmp_path: Path) -> None:
    with serving(tmp_path, gateway=("--write-timeout", "1")) as cluster, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", cluster.http_port))
        body = json.dumps(ASK).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        cluster.until(lambda status: any(w["running"] for w in status["workers"]), "decoding")
        assert len(tokens(cluster.url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
        wait_until(lambda: get(cluster.url, "/load").body["server_load"] == 0, "its end")
        cluster.until_idle(SOON_S)
