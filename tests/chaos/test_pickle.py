"""A pickle that runs a command when it is loaded, sent to everything that listens: nobody loads it.

Source  CVE-2025-32444, CVE-2026-3059, CVE-2026-26220 and their kin: sockets read with pickle.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
import zmq

from cluster.wire.codec import JOIN, SESSION
from kvtransfer.unix import new_socket
from tests.e2e.client import get, request, tokens
from tests.e2e.cluster import Cluster, serving, wait_until

METHODS = (SESSION, JOIN, "/baton.v1.Inference/Generate", "/grpc.health.v1.Health/Check")


class Loaded:
    """Unpickled it leaves a file."""

    def __init__(self, path: Path, way: int) -> None:
        self._path, self._way = str(path), way

    def __reduce__(self) -> tuple[Any, ...]:
        ways: list[tuple[Any, ...]] = [
            (os.system, (f"touch {self._path}",)),
            (open, (self._path, "w")),
            (exec, (f"open({self._path!r}, 'w').close()",)),
        ]
        return ways[self._way]


def payloads(path: Path, count: int) -> Iterator[bytes]:
    random = Random(5)
    for number in range(count):
        loaded: Any = Loaded(path, number % 3)
        for _ in range(random.randrange(3)):
            loaded = random.choice([[loaded], {"data": loaded}, ("hello", loaded)])
        yield pickle.dumps(loaded, protocol=random.randrange(6))


def listening(pids: list[int]) -> tuple[list[int], list[bytes]]:
    """The TCP ports and the abstract Unix sockets that these processes listen on."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)):
                inodes.add(found[1])
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    tcp = [line.split() for table in tables for line in table]
    ports = {int(f[1].rpartition(":")[2], 16) for f in tcp if f[3] == "0A" and f[9] in inodes}
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    names = {f[7] for f in unix if len(f) > 7 and f[7].startswith("@") and f[6] in inodes}
    return sorted(ports), [b"\0" + name[1:].encode() for name in sorted(names)]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """It may say that what it got was no message, and nothing else."""
    with serving(tmp_path / "cluster") as cluster:
        yield cluster
        said = cluster.crashes().splitlines()
        other = [
            line[:300] for line in said if not re.search("not a message of this|DecodeError", line)
        ]
        assert not other, other
        monkeypatch.setattr(cluster, "crashes", str)


def knock(port: int, payload: bytes) -> None:
    """As plain bytes, as whatever the port may understand by them."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        plain.sendall(payload)


def test_no_port_loads_a_pickle(cluster: Cluster, tmp_path: Path, chaos_full: bool) -> None:
    path = tmp_path / "loaded"
    pickle.loads(next(payloads(path, 1)))
    assert path.exists(), "the payload is none"
    path.unlink()
    pids = [process.pid for process in cluster.processes.values()]
    ports, names = listening(pids)
    data = int(cluster.worker_status("decode-0")["data_address"].rpartition(":")[2])
    assert {cluster.http_port, cluster.grpc_port, data} < {*ports} and names
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for payload in payloads(path, 1000 if chaos_full else 30):
        for port in ports:
            knock(port, payload)
        for name in names:
            with new_socket() as near:
                near.connect(name)
                near.send(payload)
        with context.socket(zmq.DEALER) as dealer:
            dealer.connect(f"tcp://127.0.0.1:{data}")
            for parts in ([payload], [payload, payload], [b"", payload]):
                dealer.send_multipart(parts)
            dealer.poll(1)
        for kind in ("application/json", "application/octet-stream", "application/x-pickle"):
            headers = {"Content-Type": kind}
            answer = request(cluster.url, "POST", "/v1/completions", payload, headers)
            assert answer.status in (400, 415)
        _call(cluster, payload)
    context.destroy(linger=0)
    wait_until(lambda: _bad_frames(cluster) > 0, "bad frames are counted")
    assert not path.exists()
    assert all(process.running for process in cluster.processes.values())
    assert len(tokens(cluster.url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3


def _call(cluster: Cluster, payload: bytes) -> None:
    """Each gRPC method, with the payload in place of its message."""
    addresses = {cluster.grpc, *(w["control_address"] for w in cluster.status()["workers"])}
    for address in addresses:
        with grpc.insecure_channel(address) as channel:
            for method in METHODS:
                call = channel.stream_stream(method)(iter([payload]), timeout=20)
                try:
                    assert not list(call), "an answer to a pickle"
                except grpc.RpcError as refused:
                    assert refused.code() is not grpc.StatusCode.DEADLINE_EXCEEDED


def _bad_frames(cluster: Cluster) -> float:
    page = get(cluster.url, "/metrics").body
    found = re.findall(r"^baton_\w*bad_frames\w*{.*malformed.*} (\S+)$", page, re.MULTILINE)
    return sum(map(float, found))
