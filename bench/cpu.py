"""cpu: our engine beside others on the same cores, each in a process of its own, in turns.

load       every engine that there is for a precision, and warm it up
agree      greedy tokens of each for the same prompts: in fp32 all the same but for near ties
prefill    a new prompt each round, the same one for all
decode     as many sequences held by each engine at about the same context; some steps each round
memory     resident after the warm-up, and once the most sequences are held

Within a figure the engines take turns, each round beginning with another one, so that a drift of
the machine touches all alike; those whose turn it is not are idle, and it is told if one is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from bench.cpu_flags import WARM_PROMPT, CpuOptions, parse_options
from bench.cpu_limits import measure_limits, merged
from bench.cpu_peers import (
    OURS,
    PRECISIONS,
    Launcher,
    Peer,
    PeerFailed,
    launcher,
    pythons,
)
from bench.cpu_report import CpuResult, Figure, Run, compare
from bench.peers.protocol import Answer, Load
from cluster.errors import StartError
from cluster.model import load_config

_AGREE_PROMPTS = (5, 64, 300)
"""Tokens: less than a block, some blocks, more than a tile of any kernel."""


def main(argv: Sequence[str]) -> int:
    """Run `baton bench cpu`. Returns 1 if tokens disagree in fp32. Raises StartError."""
    options = parse_options(argv)
    if options.http:
        from bench.cpu_http import measure_servers

        servers = measure_servers(options)
        _save(options, f"cpu-http-{_name(options)}", servers.to_json(), servers.table())
        return 0
    result = measure(options)
    _save(options, f"cpu-{_name(options)}", result.to_json(), result.table())
    return 0 if result.sound else 1


def measure(options: CpuOptions) -> CpuResult:
    """Everything, precision by precision. Raises StartError; no process outlives it."""
    shape = load_config(options.models / "hf")
    require_room(options, shape.max_model_len)
    hardware, date = describe(options.cores), datetime.now()
    limits = [measure_limits(options.cores[:1]), measure_limits(options.cores)]
    runs: list[Run] = []
    truth: list[Answer] = []
    with launcher() as starts:
        for precision in options.precisions:
            with contextlib.ExitStack() as held:
                bench = Bench(options, precision, shape.vocab_size)
                bench.start(starts, held)
                truth = truth or bench.ours()
                bench.agree(truth)
                bench.prefill()
                bench.decode()
                runs.append(bench.finish())
            limits.append(measure_limits(options.cores))  # what a neighbour took may be back
    return CpuResult(
        model=_name(options),
        shape=shape,
        settings=_settings(options),
        hardware=hardware,
        limits=merged(limits),
        date=date,
        context=options.context,
        near_tie=options.near_tie,
        runs=runs,
    )


class Bench:
    """One precision: its engines and what they have shown so far."""

    def __init__(self, options: CpuOptions, precision: str, vocabulary: int) -> None:
        self._options = options
        self._vocabulary = vocabulary
        self._run = Run(precision)
        self._peers: list[Peer] = []
        self._began = time.monotonic()

    def start(self, starts: Launcher, held: contextlib.ExitStack) -> None:
        """Load every engine that has this precision, one after another, and warm it up."""
        options = self._options
        found = pythons(options.peers)
        for key in [key for key in found if self._run.precision in PRECISIONS[key]]:
            peer = held.enter_context(starts.start(key, found[key], len(options.cores)))
            load = Load(
                model=str((options.models / "hf").resolve()),
                precision=self._run.precision,
                cores=options.cores,
                sequences=max(options.batches),
                context=options.held,
                prompt=max(*options.prompts, WARM_PROMPT),
                options=self._own_options(key),
            )
            self._peers.append(peer)
            self._each([peer], partial(self._warm, load))

    def _own_options(self, key: str) -> dict[str, Any]:
        if key == OURS:
            return {"kernels": self._options.kernels, "chunk": self._options.chunk}
        if key == "llama.cpp":
            return {"llama_bench": str(Path(self._options.peers[key]).resolve())}
        return {}

    def _warm(self, load: Load, peer: Peer) -> None:
        peer.load(load)
        self._run.about[peer.key] = peer.about
        prompt = self._ids("warm", 0, WARM_PROMPT)
        peer.prefill(prompt)
        peer.hold([prompt])
        peer.decode(2)
        peer.drop()
        self._run.memory[peer.key] = peer.memory()
        self._tell(f"{peer.name} loaded, {self._run.memory[peer.key].resident / 1e6:.0f} MB")

    def ours(self) -> list[Answer]:
        """Our answers and leads, which the others' are held against. Raises StartError."""
        mine = [peer for peer in self._peers if peer.key == OURS]
        if not mine:
            raise StartError(f"our own engine failed: {self._run.failed[OURS]}")
        return [mine[0].answer(prompt, self._options.tokens) for prompt in self._questions()]

    def agree(self, truth: Sequence[Answer]) -> None:
        def ask(peer: Peer) -> None:
            for prompt, ours in zip(self._questions(), truth, strict=True):
                answer = peer.answer(prompt, self._options.tokens)
                self._run.agreement.append(compare(peer.key, answer, ours))

        self._each(self._peers, ask)

    def prefill(self) -> None:
        for size in self._options.prompts:
            self._rounds(Figure("prefill", size), partial(self._prefill_rate, size))

    def _prefill_rate(self, size: int, peer: Peer, number: int) -> float:
        return size / peer.prefill(self._ids("prefill", number, size))

    def decode(self) -> None:
        """New sequences for each size, so that contexts begin alike; they grow from there."""
        for size in self._options.batches:
            self._each(self._peers, partial(self._hold, size))
            self._rounds(Figure("decode", size), partial(self._decode_rate, size))

    def _hold(self, size: int, peer: Peer) -> None:
        context = self._options.context
        peer.drop()
        peer.hold([self._ids(f"decode {size}", number, context) for number in range(size)])
        peer.decode(1)

    def _decode_rate(self, size: int, peer: Peer, _: int) -> float:
        return size * self._options.steps / peer.decode(self._options.steps)

    def finish(self) -> Run:
        seconds = time.monotonic() - self._began
        self._each(self._peers, self._weigh)
        self._run.stray = {peer.key: peer.stray_seconds() / seconds for peer in self._peers}
        return self._run

    def _weigh(self, peer: Peer) -> None:
        self._run.memory_held[peer.key] = peer.memory()

    def _rounds(self, figure: Figure, sample: Callable[[Peer, int], float]) -> None:
        found: dict[str, list[float]] = {peer.key: [] for peer in self._peers}
        for number in range(self._options.rounds):

            def once(peer: Peer, number: int = number) -> None:
                found[peer.key].append(sample(peer, number))

            self._each(turn(self._peers, number), once)
        self._run.samples[figure] = found
        medians = (f"{peer.key} {self._run.median(figure, peer.key):.1f}" for peer in self._peers)
        self._tell(f"{figure.name}: {', '.join(medians)} tok/s")

    def _each(self, peers: Sequence[Peer], work: Callable[[Peer], None]) -> None:
        """One after another; who fails is left out from there on."""
        for peer in tuple(peers):
            try:
                work(peer)
            except PeerFailed as error:
                self._run.failed[peer.key] = str(error)
                self._peers.remove(peer)
                self._tell(f"{peer.key} left out: {error}")

    def _questions(self) -> list[list[int]]:
        return [self._ids("agree", number, size) for number, size in enumerate(_AGREE_PROMPTS)]

    def _ids(self, purpose: str, number: int, count: int) -> list[int]:
        """The same for every engine, another one each time: no cache may know it."""
        random = Random(f"{self._options.seed} {purpose} {number} {count}")
        return [random.randrange(self._vocabulary) for _ in range(count)]

    def _tell(self, what: str) -> None:
        """A line on stderr, so that minutes of silence do not look like a hang."""
        print(f"{self._run.precision}: {what}", file=sys.stderr, flush=True)


def turn(peers: Sequence[Peer], number: int) -> Sequence[Peer]:
    """The order of a round."""
    first = number % max(1, len(peers))
    return (*peers[first:], *peers[:first])


def require_room(options: CpuOptions, fits: int) -> None:
    """Raises StartError for sizes that the model does not take."""
    longest = max(options.held, *options.prompts)
    if longest >= fits:
        raise StartError(f"{longest} tokens and one more, and the model ends at {fits}")


def describe(cores: Sequence[int]) -> dict[str, Any]:
    """The machine. A load average well above 0 before we begin spoils a comparison."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "cpu": name,
        "cores_used": list(cores),
        "cores_of_machine": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _settings(options: CpuOptions) -> dict[str, Any]:
    """All but paths, which say nothing elsewhere."""
    own = vars(options)
    return {name: own[name] for name in own if name not in ("models", "peers", "output", "http")}


def _name(options: CpuOptions) -> str:
    return options.models.resolve().name


def _save(options: CpuOptions, name: str, data: Mapping[str, Any], table: str) -> None:
    print(table)
    path = Path(options.output or f"bench/results/{name}{options.suffix}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror}") from None
    print(f"Saved to {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
