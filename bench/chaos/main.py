"""chaos: `baton chaos`, a cluster of real processes that is struck while it answers.

record      every ask's undisturbed answer
rounds      kill, stop, drain, cancel, busy, gateway, degrade; every answer compared with that
report      what was struck, what moved, what clients felt; exit status 1 if a promise was broken
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from bench.chaos import asks, book, busy, cancel, rounds, transcript
from bench.chaos.house import opened
from bench.chaos.options import ChaosOptions, Counts, parse_options
from bench.chaos.report import Report
from bench.chaos.scene import Round, Scene
from bench.vocabulary import LocalVocabulary
from cluster.config import BUILT_IN
from cluster.errors import StartError
from cluster.model import load_config

ANSWER_S = 120.0
"""No answer takes so long, whatever befalls it: I9."""


def main(argv: Sequence[str]) -> int:
    """Run `baton chaos`. Returns 1 if a promise was broken. Raises StartError."""
    options = parse_options(argv)
    if options.transcript is not None:
        text, whole = asyncio.run(transcript.run(options))
        _write(options.transcript, text)
        print(text)
        return 0 if whole else 1
    report = asyncio.run(run(options))
    print(report.table())
    if options.output is not None:
        _write(options.output, json.dumps(report.to_json(), indent=1))
        print(f"Saved to {options.output}")
    return 1 if report.wrong else 0


async def run(options: ChaosOptions) -> Report:
    """From the first process to the last. Raises StartError; none outlives it."""
    async with staged(options) as scene:
        found: list[Round] = []
        for play in plays(options.rounds, options.counts):
            found.append(await play(scene))
            _tell(found[-1])
            if found[-1].stuck:
                break
        return Report(options, len(scene.entries), found, scene.house.own_errors())


@asynccontextmanager
async def staged(options: ChaosOptions) -> AsyncIterator[Scene]:
    """A cluster that is ready, and what it answers when nothing happens. Raises StartError."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    with tempfile.TemporaryDirectory(prefix="baton-chaos-") as directory:
        async with (
            opened(options.plan, Path(directory)) as house,
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        ):
            model = options.directory
            longest = load_config(model).max_model_len
            name = "baton-tiny" if model == BUILT_IN else model.resolve().name
            written = asks.write(name, LocalVocabulary(model).ids, longest, options.seed)
            rng = random.Random(options.seed)
            if options.counts.asks:
                written = rng.sample(written, options.counts.asks)
            entries = await book.record(session, house.urls[0], written)
            yield Scene(house, session, entries, rng, longest, options.width)


Play = Callable[[Scene], Awaitable[Round]]


def plays(names: Sequence[str], counts: Counts) -> list[Play]:
    """These rounds, each so long as the counts say."""
    known: dict[str, Play] = {
        "kill": lambda scene: rounds.kill(scene, counts.streams),
        "stop": lambda scene: rounds.stop(scene, counts.short_stops, counts.long_stops),
        "drain": lambda scene: rounds.drain(scene, counts.drains * scene.house.workers()),
        "cancel": lambda scene: cancel.cancel(scene, counts.cancels),
        "busy": lambda scene: busy.busy(scene, counts.busy_seconds),
        "gateway": lambda scene: rounds.gateway(scene, counts.gateways),
        "degrade": rounds.degrade,
    }
    return [known[name] for name in names]


def _tell(found: Round) -> None:
    """One line per round on stderr, so that minutes of silence do not look like a hang."""
    state = f"{len(found.wrong)} broken promises" if found.wrong else "as promised"
    line = f"{found.name}: {len(found.runs)} answers, {len(found.blows)} blows, {state}"
    print(f"{line}, {found.seconds:.0f} s", file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from None
