"""What the transfer counts is on the page that Prometheus reads, under its own name."""

from __future__ import annotations

import pytest
import zmq

from cluster.messages import Load
from cluster.metrics import GatewayMetrics, WorkerView
from engine.cache import KVCache
from kvtransfer.frames import Address, Box, Chunk
from kvtransfer.receiver import Arrived
from kvtransfer.sender import Sender
from kvtransfer.zeromq import ZmqHost
from tests.kvtransfer.fakes import DECODE_PEER, LAYOUT, DecodeSide, request


async def test_every_count_reaches_the_page_and_stale_writes_above_all() -> None:
    side = DecodeSide()
    landing = side.landings.promise(request("r", 5), 2, 0.0)
    old = Address(landing.id, landing.generation, DECODE_PEER.incarnation, 1)
    chunk = Chunk(old, 0, Box(range(2), range(2), range(5)), "float32")
    side.landings.receive(Arrived(chunk, b"", 0, lambda fields, text: None), 0.0)
    sender = Sender(KVCache(LAYOUT, 1, 1), lambda _: pytest.fail("connects"), lambda *_: None)
    with zmq.Context() as context:
        host = ZmqHost(context, side.receiver)
        counters = [*side.landings.metrics(), *host.metrics(), *sender.metrics()]
    # Two workers' counts: the chunks of one arrive, those of the other are sent.
    counted = dict(counters)
    assert len(counted) == len(counters) - 1
    load = Load(0, counters=tuple(counted.items()))
    gateway = GatewayMetrics("m", 100, lambda: [WorkerView("w", "decode", 4, 64, load)])
    page = gateway.exposition().decode().splitlines()
    for key, value in counted.items():
        name, _, label = key.partition("{")
        own = [line for line in page if line.startswith(f"{name}_total{{")]
        assert sum(label.rstrip("}") in line and line.endswith(f" {value:.1f}") for line in own)
    labels = '{model_name="m",reason="stale attempt",role="decode",worker="w"}'
    assert f"baton_frames_rejected_total{labels} 1.0" in page
