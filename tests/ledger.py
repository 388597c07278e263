"""R1 held to account: whose is each block?"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from decode.stage import DecodeStage
from engine.blocks import BlockPool
from engine.loop import Stage
from kvtransfer.landing import Landings
from prefill.stage import PrefillStage


class Holder(Protocol):
    """A worker, as far as blocks are concerned."""

    @property
    def pool(self) -> BlockPool: ...

    @property
    def stage(self) -> Stage: ...

    @property
    def landings(self) -> Landings: ...


def check_ledger(worker: Holder) -> None:
    """Every hold of every block is some sequence's or landing's, and no other.

    Looks into stage, landings and pool, because a leak is precisely what they do not report.
    """
    pool, stage = worker.pool, worker.stage
    counts = pool.counts()
    assert counts.free + counts.promised + counts.owned + counts.cached == counts.total, counts
    holds: Counter[int] = Counter()
    promised: set[int] = set()
    sequences = (
        list(stage._live.values())
        if isinstance(stage, PrefillStage)
        else [*stage._running, *stage._queue]
        if isinstance(stage, DecodeStage)
        else []
    )
    assert len({id(sequence) for sequence in sequences}) == len(sequences), "twice in the stage"
    for sequence in sequences:
        holds.update(block.number for block in sequence.blocks)
    for site in worker.landings._sites.values():
        own = site.blocks if site.state.value == "sealed" else site.blocks[: site.found]
        holds.update(block.number for block in own)
        promised.update(block.number for block in site.blocks[len(own) :])
    assert holds == Counter(pool._holders), "blocks are held by other than those who say so"
    assert promised == pool._promised, "blocks are promised to other than those who say so"
    free, cached = set(pool._free), set(pool._cached)
    states = (free, promised, set(holds), cached)
    assert len(set().union(*states)) == sum(map(len, states)) == pool.total, "a block in two states"
    if isinstance(stage, DecodeStage):
        assert set(stage._promised) == set(worker.landings._sites), "a landing nobody asked for"
        assert set(stage._started) <= set(stage._promised), "a start without its landing"
