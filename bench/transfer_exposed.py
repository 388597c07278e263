"""How much of a transfer a request waits for: a whole cluster over HTTP, one prompt at a time.

A transfer that took no time would leave the prefill as it is when nothing is pushed, and the
landing sealed when the order to start comes to the decode worker. So for a prompt of some length

    exposed = (prefill with a handoff - prefill without) + transfer_tail

where the spans are the ones of the request's own timeline (R9), and "without" are the same
worker's answers of one token, for which nothing is sent: what gathering, hashing and sending take
from the prefill's own cores is in the first part, what is left to wait for in the second. Prompts
with and without alternate, and no two have a prefix in common.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench import shape
from bench.client import Client, Record, open_session
from bench.serve import find_model
from bench.stand import Mode, Seat, running
from cluster.config import WorkerConfig
from cluster.errors import StartError
from cluster.messages import DECODE, PREFILL

LONGEST: Final = 16384
STEP_TOKENS: Final = 512
"""How many tokens of a prompt are computed at a time: shorter prompts are one step, longer are
several, and the last one's transfer is what can be left over."""


@dataclass(frozen=True)
class Exposed:
    """Of prompts of one length, in milliseconds; every list one number a request."""

    tokens: int
    prefill: tuple[float, ...]
    prefill_alone: tuple[float, ...]
    tail: tuple[float, ...]
    second_token: tuple[float, ...]  # after the first, at the client

    @property
    def slowed(self) -> float:
        """What pushing takes from the prefill. Below 0 where the difference is noise."""
        return statistics.median(self.prefill) - statistics.median(self.prefill_alone)

    @property
    def share(self) -> float:
        """The exposed time as a part of the prefill without a transfer."""
        exposed = self.slowed + statistics.median(self.tail)
        return exposed / statistics.median(self.prefill_alone)

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "prefill_ms": self.prefill,
            "prefill_alone_ms": self.prefill_alone,
            "transfer_tail_ms": self.tail,
            "second_token_ms": self.second_token,
            "slowed_ms": round(self.slowed, 3),
            "tail_ms": round(statistics.median(self.tail), 3),
            "exposed_share": round(self.share, 4),
        }


async def measure(lengths: Sequence[int], cores: tuple[int, int], rounds: int) -> list[Exposed]:
    """Raises StartError; no process outlives it."""
    mode = Mode("pd", (Seat(PREFILL, (cores[0],)), Seat(DECODE, (cores[1],))))
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="baton-transfer-")))
        base = WorkerConfig(
            model=str(model(directory)),
            load_format="dummy",
            kv_cache_memory_bytes=512 << 20,
            log_level="error",
        )
        async with running(mode, STEP_TOKENS, base) as url, open_session() as session:
            asker = Asker(session, url, await find_model(session, url, None))
            await asker.ask(STEP_TOKENS, 2)  # connects, and warms everything up
            return [await asker.measure(tokens, rounds) for tokens in lengths]


def model(directory: Path) -> Path:
    """The shape of `baton bench compare` with room for longer prompts."""
    path = shape.write_model(directory)
    config = {**shape.CONFIG, "max_position_embeddings": LONGEST}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


class Asker:
    """Sends prompts that nobody has seen before, one after the other."""

    def __init__(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        self._client = Client(session, f"{url}/v1/completions", timeout=600.0)
        self._name = name
        self._order = random.Random(7)

    async def measure(self, tokens: int, rounds: int) -> Exposed:
        """`rounds` pairs of long prompts; up to eight times as many of short ones, whose time
        varies more than a transfer takes."""
        found: dict[int, list[Record]] = {1: [], 2: []}
        for number in range(rounds * max(1, min(8, 2048 // tokens))):
            for answer in (1, 2) if number % 2 else (2, 1):
                found[answer].append(await self.ask(tokens, answer))
        alone, handed = found[1], found[2]
        return Exposed(
            tokens,
            tuple(record.timeline_ms["prefill"] for record in handed),
            tuple(record.timeline_ms["prefill"] for record in alone),
            tuple(record.timeline_ms["transfer_tail"] for record in handed),
            tuple(round(1000 * record.itls[0], 3) for record in handed),
        )

    async def ask(self, tokens: int, answer: int) -> Record:
        """Raises StartError for an answer that is not whole."""
        prompt = self._order.choices(range(1, shape.CONFIG["vocab_size"]), k=tokens)
        body = {
            "model": self._name,
            "prompt": prompt,
            "max_tokens": answer,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_timeline": True,
        }
        record = await self._client.send(json.dumps(body).encode(), tokens)
        if not record.ok or "prefill" not in record.timeline_ms:
            raise StartError(f"a prompt of {tokens} tokens failed: {record.error}")
        return record
