"""Nothing but valid requests, in mixes that nobody planned: all are answered, rightly, for ever.

Source  GRIEF (arXiv 2605.11202): engines break on timed mixes of requests, without a malformed one.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from random import Random

import pytest

from cluster.errors import BadRequest
from tests.cluster_in_process import Cluster
from tests.hash_model import ask_for
from tests.virtual import run

BLOCKS, BLOCK_SIZE = 8, 4


async def crowd(seed: int, requests: int) -> None:
    """Prompts that share beginnings, answers of any length, clients that leave, and a pool that
    holds two or three of them. A deadlock ends virtual time, and so the test."""
    random = Random(seed)
    room = BLOCKS * BLOCK_SIZE
    beginnings = [[random.randrange(997) for _ in range(random.randrange(1, 20))] for _ in range(4)]
    async with Cluster(seed, queue_timeout=100_000.0) as cluster:
        role = random.choice(["pair", "undivided"])
        options = {
            "blocks": BLOCKS,
            "block_size": BLOCK_SIZE,
            "budget": random.choice([3, 16, 64]),
            "max_sequences": random.choice([2, 64]),
            "caching": random.random() < 0.7,
        }
        await (cluster.pair(**options) if role == "pair" else cluster.undivided(**options))

        async def client(number: int) -> None:
            await asyncio.sleep(random.uniform(0, random.choice([0.01, 1.0, 5.0])))
            own = [random.randrange(997) for _ in range(random.randrange(1, 24))]
            prompt = [*random.choice(beginnings), *own] if random.random() < 0.5 else own
            answer = random.choice([1, 2, room - len(prompt) + 1, random.randrange(1, 40)])
            request = ask_for(f"r{number}", prompt, max(1, answer), seed=random.randrange(3))
            fits = len(prompt) + request.sampling.max_tokens - 1 <= room
            patience = random.choice([None, None, None, random.uniform(0, 3.0)])
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await cluster.check(request)
                        assert fits, "answered what has no room"
            except BadRequest:
                assert not fits, "refused what has room"

        await asyncio.gather(*(client(number) for number in range(requests)))
        await cluster.idle(within=1.0)


@pytest.mark.timeout(1800)
def test_a_hundred_requests_in_eight_blocks(chaos_full: bool) -> None:
    for seed in range(400 if chaos_full else 6):
        run(crowd(seed, 100), limit=100_000.0)
