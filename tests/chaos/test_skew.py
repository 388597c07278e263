"""Peers that do not fit, and endings that race: one field at a time, one order at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import permutations

import pytest

from cluster.errors import BlocksExhausted, HandshakeRefused, TransferFailed
from cluster.messages import PROTOCOL, Fingerprint, Hello, KVLayout, LayerGroup
from cluster.wire import codec
from cluster.wire import control_pb2 as pb
from gateway.pools import Pools
from kvtransfer import frames
from kvtransfer.frames import Ack, BadFrame, Fields
from kvtransfer.landing import Rejected
from kvtransfer.receiver import mismatch
from tests.gateway.scripted import hello
from tests.kvtransfer.fakes import content, request
from tests.kvtransfer.test_landing import Bench

GROUP = LayerGroup(4, 2, 8, 16)
OURS = hello("d", "decode", layout=KVLayout((GROUP,), "float16"))
THEIRS: list[Hello] = [
    replace(OURS, protocol=PROTOCOL - 1),
    replace(OURS, protocol=PROTOCOL + 1),
    replace(OURS, fingerprint=Fingerprint("another", "weights")),
    replace(OURS, fingerprint=Fingerprint("config", "another")),
    *(
        replace(OURS, layout=layout)
        for layout in (
            KVLayout((GROUP,), "bfloat16"),
            KVLayout((replace(GROUP, layers=5),), "float16"),
            KVLayout((replace(GROUP, kv_heads=1),), "float16"),
            KVLayout((replace(GROUP, head_dim=16),), "float16"),
            KVLayout((replace(GROUP, window=0),), "float16"),
            KVLayout((GROUP, GROUP), "float16"),
            KVLayout((replace(GROUP, layers=2),) * 2, "float16"),
        )
    ),
]


def differing(theirs: Hello) -> tuple[object, object]:
    """The one value that is not ours, and ours."""
    fields = ("protocol", "fingerprint", "layout")
    [name] = [name for name in fields if getattr(theirs, name) != getattr(OURS, name)]
    mine, found = getattr(OURS, name), getattr(theirs, name)
    if isinstance(mine, Fingerprint):
        name = "config" if mine.config != found.config else "weights"
        mine, found = getattr(mine, name), getattr(found, name)
    return found, mine


@pytest.mark.parametrize("theirs", THEIRS)
async def test_one_field_is_enough_to_be_refused_at_registration(theirs: Hello) -> None:
    pools = Pools("m", "config", lambda address, orders: never())
    pools.join(OURS)
    with pytest.raises(HandshakeRefused) as refused:
        pools.join(replace(theirs, peer=replace(theirs.peer, name="other")))
    assert all(str(value) in refused.value.message for value in differing(theirs))
    await pools.close()
    await asyncio.sleep(0)


async def never():  # type: ignore[no-untyped-def]
    """A session in which nothing is ever said."""
    await asyncio.Event().wait()
    yield


@pytest.mark.parametrize("theirs", THEIRS)
def test_one_field_is_enough_to_be_refused_a_link(theirs: Hello) -> None:
    reason = mismatch(OURS, theirs, OURS.peer.incarnation)
    assert reason is not None
    found, mine = differing(theirs)
    if not isinstance(found, KVLayout):  # which is told in a shorter way
        assert f"{found} meets {mine}" in reason
    what, _, values = reason.partition(" meets ")
    assert what.split()[-1] != values, "both are told, and differ"
    assert mismatch(OURS, OURS, OURS.peer.incarnation) is None


@pytest.mark.parametrize("version", [frames.VERSION - 1, frames.VERSION + 1])
def test_frames_of_another_version_are_refused_with_both(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "VERSION", version)
    parts = frames.encode(1, Ack())
    monkeypatch.undo()
    with pytest.raises(HandshakeRefused, match=f"version {version} meets {frames.VERSION}"):
        frames.decode(list(parts))


UNKNOWN = b"\xfa\x3f\x02hi"
"""Field 1023 of any message, two bytes long: a kind of message from years to come."""


@pytest.mark.parametrize(
    "decode", [codec.decode_order, codec.decode_membership], ids=lambda d: d.__name__
)
def test_an_unknown_kind_of_message_is_an_error(decode) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="without content"):
        decode(UNKNOWN)


def test_an_unknown_kind_of_event_or_frame_is_an_error() -> None:
    report = pb.Report(events=[pb.Event()])
    report.events[0].MergeFromString(UNKNOWN)
    with pytest.raises(ValueError, match="without content"):
        codec.decode_report(report.SerializeToString())

    class Future(Fields):
        KIND = 12

    with pytest.raises(BadFrame, match="unknown kind"):
        frames.decode(list(frames.encode(1, Future())))


ENDINGS = ("chunk", "manifest", "start", "cancel", "lease", "again")


@pytest.mark.parametrize("first", ENDINGS)
def test_endings_in_any_order_have_one_outcome_and_one_free(first: str) -> None:
    """Abort, receive-done and send-done race, with a lease that ends and an attempt that begins
    anew among them: the blocks are given back once, or belong to one sequence."""
    for order in permutations(ENDINGS):
        if order[0] == first:
            race(order)


def race(order: tuple[str, ...]) -> None:
    bench = Bench(block_size=4, blocks=4)
    writer = bench.writer(10)
    last = len(writer.chunks) - 1
    for index in range(last):
        writer.write(bench.landings, index, 0.0)
    now, owners = 0.0, []
    for event in order:
        try:
            match event:
                case "chunk":
                    writer.write(bench.landings, last, now)
                case "manifest":
                    bench.landings.conclude(writer.manifest, now)
                case "start":
                    if site := bench.landings.start("r", 1):
                        owners.append(site.blocks)
                case "cancel":
                    bench.landings.cancel("r", 1)
                case "lease":
                    now += 1000.0
                    bench.landings.sweep(now)
                case "again":
                    bench.landings.promise(request("r", 10), 2, now)
        except (Rejected, TransferFailed):
            pass
        except BlocksExhausted:
            assert owners and event == "again", order  # a sequence has them
        counts = bench.pool.counts()
        assert counts.free + counts.promised + counts.owned == 4, order
    for blocks in owners:
        assert content(bench.cache, blocks, 0, 10) == writer.source.content(), order
        bench.pool.release(blocks)
    bench.landings.sweep(now + 1000.0)
    assert bench.pool.counts().free == 4 and len(owners) <= 1, order
