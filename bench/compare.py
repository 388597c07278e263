"""compare: prefill and decode apart against the same engine undivided, on the same two cores.

calibrate   pd alone: how many chats it can hold, how long a long prompt takes
sweep       every mode at every chunk size, under load; the best of each mode is taken
rounds      every mode in turn, fresh processes: probes, quiet, loaded, flood
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench import shape
from bench.client import Client, Record, open_session
from bench.compare_flags import CompareOptions, parse_options
from bench.comparison import Comparison, by_mode
from bench.measured import Measured, Run, choose
from bench.options import require
from bench.serve import find_model, paced
from bench.stand import Mode, modes, running
from bench.trace import CHAT, FLOOD, LOADED, LONG, PROBES, QUIET, Pace, Phase, Writer
from bench.vllm_stand import is_vllm, running_vllm, vllm_modes
from bench.vocabulary import LocalVocabulary
from cluster.config import BUILT_IN, WorkerConfig
from cluster.errors import StartError
from cluster.model import load_config

LOAD_SHARE: Final = 0.3
"""Of the chats that pd finishes per second when flooded: what the steady rate asks for."""

LONG_SHARE: Final = 0.4
"""Of the time: how long a long prompt keeps an otherwise idle pd busy."""


def main(argv: Sequence[str]) -> int:
    """Run `baton bench compare`. Returns 0, or 1 when modes disagree. Raises StartError."""
    options = parse_options(argv)
    result = asyncio.run(compare(options))
    print(result.table())
    path = Path(options.output or f"bench/results/compare-{result.model}{options.suffix}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result.to_json(), separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror}") from None
    print(f"Saved to {path}")
    return 0 if result.probes_agree else 1


async def compare(options: CompareOptions) -> Comparison:
    """Everything from the model to the last round. Raises StartError; no process outlives it."""
    with contextlib.ExitStack() as held:
        base, directory = _model(options, held)
        name = "baton-tiny" if directory == BUILT_IN else directory.resolve().name
        ids = LocalVocabulary(directory).ids
        writer = Writer(ids, options.sizes, options.seed)
        bench = Bench(base, writer, options.vllm)
        hardware, date = describe(options), datetime.now()
        every = modes(options.cores)
        every += vllm_modes(options.cores) if options.vllm else ()
        pace = Pace(options.rate, options.long_every)
        if not (pace.rate and pace.long_every):
            pace = await bench.calibrate(every[0], max(options.chunks), pace)
        sweep = await _sweep(bench, options, every, pace)
        points = by_mode(sweep)
        chosen = {
            mode.name: choose(points[mode.name]).chunk if points else options.chunks[0]
            for mode in every
        }
        rounds = await _rounds(bench, options, every, pace, chosen)
    return Comparison(options, name, hardware, date, pace, tuple(sweep), tuple(rounds))


async def _sweep(
    bench: Bench, options: CompareOptions, every: Sequence[Mode], pace: Pace
) -> list[Run]:
    """Nothing to choose, nothing to sweep."""
    if len(options.chunks) == 1:
        return []
    seconds = options.sweep_longs * pace.long_every
    load = bench.writer.steady("sweep", pace, seconds=seconds, longs=options.sweep_longs)
    return [
        await bench.run(mode, chunk, 0, {LOADED: load})
        for chunk in options.chunks
        for mode in every
    ]


async def _rounds(
    bench: Bench,
    options: CompareOptions,
    every: Sequence[Mode],
    pace: Pace,
    chosen: Mapping[str, int],
) -> list[Run]:
    """Alternating, each round beginning with another mode, so that a drift touches all alike."""
    sizes, writer = options.sizes, bench.writer
    loaded_s = sizes.longs * pace.long_every
    phases = {
        QUIET: writer.steady(QUIET, pace, seconds=sizes.quiet_s),
        LOADED: writer.steady(LOADED, pace, seconds=loaded_s, longs=sizes.longs),
        FLOOD: writer.at_once(FLOOD, chats=sizes.flood_chats, longs=sizes.flood_longs),
    }
    return [
        await bench.run(mode, chosen[mode.name], number + 1, phases)
        for number in range(options.rounds)
        for mode in _turn(every, number)
    ]


def _turn(every: Sequence[Mode], number: int) -> tuple[Mode, ...]:
    first = number % len(every)
    return (*every[first:], *every[:first])


class Bench:
    """Starts a mode, asks it what a trace says, stops it."""

    def __init__(self, base: WorkerConfig, writer: Writer, vllm: str | None = None) -> None:
        self.writer = writer
        self._base = base
        self._vllm = vllm

    async def run(self, mode: Mode, chunk: int, number: int, phases: Mapping[str, Phase]) -> Run:
        """One start of one mode: the probes, which warm it up, then each phase to its end."""
        started = time.perf_counter()
        async with open_session() as session, self._stand(mode, chunk, session) as url:
            ready_s = time.perf_counter() - started
            model = await find_model(session, url, None)
            measured = {PROBES: await measure(session, url, model, self.writer.probes())}
            for name, phase in phases.items():
                measured[name] = await measure(session, url, model, phase)
        run = Run(mode.name, chunk, number, ready_s, measured)
        _tell(run)
        return run

    def _stand(
        self, mode: Mode, chunk: int, session: aiohttp.ClientSession
    ) -> AbstractAsyncContextManager[str]:
        """The URL of a mode that is ready."""
        if self._vllm and is_vllm(mode.name):
            return running_vllm(mode, chunk, self._base, self._vllm, session)
        return running(mode, chunk, self._base)

    async def calibrate(self, mode: Mode, chunk: int, given: Pace) -> Pace:
        """A pace that every mode can hold, where none was given.

        Measured on pd: one core of its two decodes, so of the three it holds the fewest chats.
        """
        chats, long = 16, self.writer.at_once("calibrate-long", chats=0, longs=1)
        flood = self.writer.at_once("calibrate", chats=chats, longs=0)
        run = await self.run(mode, chunk, 0, {CHAT: flood, LONG: long})
        for name in (CHAT, LONG):
            failed = [r.error for r in run.measured[name].records if not r.ok]
            require(not failed, f"calibration failed: {failed[:1]}; see --rate, --long-prompt")
        capacity = chats / run.measured[CHAT].duration
        [alone] = run.measured[LONG].of(LONG)
        return Pace(
            given.rate or round(LOAD_SHARE * capacity, 3),
            given.long_every or round(alone.ttft / LONG_SHARE, 3),
        )


async def measure(session: aiohttp.ClientSession, url: str, model: str, phase: Phase) -> Measured:
    """Send every request of a phase at its time and wait for the last answer."""
    client = Client(session, f"{url}/v1/completions", timeout=600.0, keep_text=True)
    bodies = [ask.body(model) for ask in phase.asks]
    tasks: list[asyncio.Task[Record]] = []
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:

        def send(index: int) -> None:
            prompt_tokens = len(phase.asks[index].prompt)
            tasks.append(group.create_task(client.send(bodies[index], prompt_tokens)))

        await paced([ask.at for ask in phase.asks], send, time.perf_counter, asyncio.sleep)
    duration = time.perf_counter() - started
    return Measured(phase, tuple(task.result() for task in tasks), duration)


def describe(options: CompareOptions) -> dict[str, Any]:
    """The machine and what runs on it. A load average well above 0 spoils a comparison."""
    return {
        "cpu": _cpu_name(),
        "cores_used": options.cores,
        "cores_of_machine": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _model(options: CompareOptions, held: contextlib.ExitStack) -> tuple[WorkerConfig, Path]:
    """The model's directory and what every worker is told. Raises StartError."""
    load_format = options.load_format
    if options.model is None:
        temporary = held.enter_context(tempfile.TemporaryDirectory(prefix="baton-compare-"))
        directory, load_format = shape.write_model(Path(temporary)), "dummy"
    else:
        directory = Path(options.model) if options.model else BUILT_IN
    longest = max(
        options.sizes.long_prompt + options.sizes.long_answer,
        options.sizes.chat_prompt + options.sizes.chat_answer,
    )
    fits = load_config(directory).max_model_len
    require(longest <= fits, f"--long-prompt: {longest} tokens in all, the model ends at {fits}")
    base = WorkerConfig(
        model=str(directory),
        load_format=load_format,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        log_level="error",
    )
    return base, directory


def _tell(run: Run) -> None:
    """One line per run on stderr, so that minutes of silence do not look like a hang."""
    which = (
        f"round {run.round}" if run.round else "sweep" if LOADED in run.measured else "calibrate"
    )
    figures = [
        f"{name} ITL p99 {numbers['chat_itl_p99_ms']:.1f} ms"
        for name, measured in run.measured.items()
        if name != PROBES and "chat_itl_p99_ms" in (numbers := measured.numbers())
    ]
    line = f"{which}: {run.mode}, chunk {run.chunk}: {', '.join(figures)}"
    print(line, file=sys.stderr, flush=True)
