"""Transcript: one long answer that goes on through three blows, told as a timeline.

1. kill -9 of the decode worker that writes it
2. kill -9 of the prefill worker that read it, now for the second time
3. SIGSTOP of the decode worker that has gone on with it
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import aiohttp

from bench.chaos import book
from bench.chaos.asks import COMPLETIONS, Ask
from bench.chaos.book import EQUAL, Entry
from bench.chaos.heard import Heard, call
from bench.chaos.house import House, opened
from bench.chaos.options import ChaosOptions
from bench.chaos.scene import LEASE_S, RECOVERIES
from bench.vocabulary import LocalVocabulary
from cluster.config import BUILT_IN
from cluster.messages import DECODE
from cluster.model import load_config

PROMPT: Final = 300
FELT_S: Final = 5.0
HANDED: Final = "baton_handoffs_sent_total"


async def run(options: ChaosOptions) -> tuple[str, bool]:
    """The text, and whether the answer was the undisturbed one and left nothing behind. Raises
    StartError."""
    plan = replace(options.plan, gateways=1)
    with tempfile.TemporaryDirectory(prefix="baton-chaos-") as directory:
        async with opened(plan, Path(directory)) as house, aiohttp.ClientSession() as session:
            [entry] = await book.record(session, house.urls[0], [_ask(options)])
            story = Story(house, entry)
            await story.tell(session)
            return "\n".join(story.lines), story.whole


def _ask(options: ChaosOptions) -> Ask:
    directory = options.directory
    ids = LocalVocabulary(directory).ids
    rng = random.Random(options.seed)
    body = {
        "model": "baton-tiny" if directory == BUILT_IN else directory.resolve().name,
        "prompt": [rng.choice(ids) for _ in range(PROMPT)],
        "max_tokens": min(4000, load_config(directory).max_model_len) - PROMPT,
        "ignore_eos": True,
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": options.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_timeline": True,
    }
    return Ask("one long answer", COMPLETIONS, body)


class Story:
    """One run; `lines` grow as it goes."""

    def __init__(self, house: House, entry: Entry) -> None:
        self.lines: list[str] = []
        self.whole = False
        self.heard = Heard(entry.ask, house.urls[0])
        self._house = house
        self._entry = entry
        self._since = time.perf_counter()

    async def tell(self, session: aiohttp.ClientSession) -> None:
        body, house = self._entry.ask.body, self._house
        handed = await house.counter(HANDED, "worker")
        self._since = time.perf_counter()
        self._note(
            f"asked: a prompt of {PROMPT} tokens, {body['max_tokens']} tokens to come, "
            f"temperature {body['temperature']}, seed {body['seed']}"
        )
        asked = asyncio.create_task(call(session, self.heard.gateway, self.heard))
        await self.heard.reached(1)
        writer = await self._busy(DECODE)
        self._note(f"the first token is there; {writer} writes on")

        await self._share(0.2)
        dead, what = [writer], "kill -9 of {}, which writes the answer"
        writer = await self._blow(writer, signal.SIGKILL, what)

        await self._share(0.45)
        read = await house.counter(HANDED, "worker") - handed
        _, reader = max(read, key=read.__getitem__)
        what = f"kill -9 of {{}}, which has read the prompt {read.total()} times"
        await self._blow(reader, signal.SIGKILL, what)
        dead.append(reader)

        await self._share(0.7)
        stopped = writer
        await self._blow(stopped, signal.SIGSTOP, "SIGSTOP of {}, which writes the answer")
        house.signal(stopped, signal.SIGCONT)
        self._note(f"SIGCONT of {stopped}")
        await asked
        await self._end(stopped, dead)

    async def _share(self, share: float) -> None:
        await self.heard.reached(int(share * self._entry.events))

    async def _busy(self, role: str) -> str:
        """Who of this role has the request."""
        found = ""

        async def seen() -> bool:
            nonlocal found
            members = await self._house.members("gateway-0")
            busy = [n for n, its in members.items() if its["role"] == role and its["requests"]]
            found = busy[0] if busy else ""
            return bool(found)

        await self._house.until(seen, f"a {role} worker to have the request")
        return found

    async def _blow(self, victim: str, number: signal.Signals, what: str) -> str:
        """Strike, and tell how the answer went on. Returns who writes it now."""
        house = self._house
        incarnation = await house.incarnation(victim)
        self._note(what.format(victim))
        house.signal(victim, number)
        at = time.perf_counter()
        noticed = await house.gone(victim, incarnation)
        self._note(f"{victim} is no member any more, {1e3 * noticed:.0f} ms after the blow")
        writer, tokens = await self._busy(DECODE), self._tokens
        while self._tokens < tokens + 20 and not self.heard.over.is_set():
            await asyncio.sleep(0.01)  # the last tokens of before may still be on their way
        pause = self.heard.pause(at, at + FELT_S)
        self._note(f"{writer} writes; the longest pause since the blow: {1e3 * pause:.0f} ms")
        return writer

    async def _end(self, stopped: str, dead: list[str]) -> None:
        heard, verdict = self.heard, self._entry.verdict(self.heard)
        [choice] = heard.said.choices.values()
        self._note(f"the end: finish_reason {choice.finish!r}, usage {heard.said.usage}")
        self._note(f"to the byte the undisturbed answer: {'yes' if verdict == EQUAL else verdict}")
        await self._house.until(lambda: self._member(stopped), f"{stopped} to be back")
        self._note(f"{stopped} is a member again, under the same incarnation")
        await asyncio.gather(*(self._house.again(name) for name in dead))
        self._note(f"{' and '.join(dead)} have been started again")
        left = await self._house.left_over(LEASE_S)
        self.whole = verdict == EQUAL and not left
        self._note(f"blocks left behind on any worker: {', '.join(left) or 'none'}")
        self.lines += ["", "what the answer says of itself (metrics):"]
        self.lines.append(json.dumps(heard.metrics, indent=2))
        self.lines += ["", "what the gateway counted:"]
        counted = await self._house.counter(RECOVERIES, "phase", "cause")
        self.lines += [
            f'{RECOVERIES}{{phase="{phase}",cause="{cause}"}} {count}'
            for (_, phase, cause), count in sorted(counted.items())
        ]

    async def _member(self, name: str) -> bool:
        return name in await self._house.members("gateway-0")

    @property
    def _tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.heard.said.choices.values())

    def _note(self, what: str) -> None:
        now = time.perf_counter() - self._since
        self.lines.append(f"{now:8.3f} s {self._tokens:>6} tokens  {what}")
