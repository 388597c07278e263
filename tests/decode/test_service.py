from __future__ import annotations

from cluster.messages import Failed, Peer, Promise
from cluster.orders import Ordered
from decode.service import NoLandings
from decode.stage import DecodeStage
from engine.allocator import Allocator
from engine.blocks import BlockPool
from engine.cache import KVCache
from tests.hash_model import LAYOUT, WINDOWS, ask_for


def test_an_undivided_worker_promises_nothing() -> None:
    """Its landing would have no address, and its blocks would wait for their lease to end."""
    pool, cache = BlockPool(20, 4), KVCache(LAYOUT, 20, 4)
    stage = DecodeStage(
        cache,
        pool,
        Allocator(pool, lambda salt: b"root" + salt),
        WINDOWS,
        NoLandings(pool, cache, Peer("b", 7), ""),
        budget=16,
        max_sequences=8,
        clock=lambda: 0.0,
    )
    stage.apply(Ordered(1, Promise(ask_for("a", 5), 1), 0.0))
    assert stage.mail() == [(1, Failed("a", 1, "wrong_role"))]
    assert pool.counts().free == 20
