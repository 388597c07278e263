"""Measured: what one mode did with one phase -> numbers; and what several runs say together.

ITL and TPOT are those of the short chats, the streams that somebody watches; long prompts have
their own TTFT. Definitions are those of `bench serve`. Times in seconds inside, in ms where shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from bench.client import Record
from bench.report import is_good, percentile
from bench.trace import CHAT, LOADED, LONG, QUIET, Phase

Numbers = dict[str, float]

PATIENCE: Final = 2.0
CRITERION: Final = (
    f"no failed request, TTFT p50 of the long prompts at most {PATIENCE:g} x the mode's best; "
    "of these the lowest chat ITL p99 under load"
)
TTFT_SLACK: Final = 5.0
TPOT_SLACK: Final = 1.5


@dataclass(frozen=True)
class Measured:
    """A phase as one mode went through it; records in the order of the phase's asks."""

    phase: Phase
    records: tuple[Record, ...]
    duration: float

    def of(self, kind: str) -> list[Record]:
        """The completed requests of one kind."""
        pairs = zip(self.phase.asks, self.records, strict=True)
        return [record for ask, record in pairs if ask.kind == kind and record.ok]

    def numbers(self) -> Numbers:
        """Flat, so that rounds can be reduced key by key. Absent kinds have no keys."""
        done = [record for record in self.records if record.ok]
        chats, longs = self.of(CHAT), self.of(LONG)
        last = self.phase.asks[-1].at
        gaps = [gap for record in chats for gap in record.itls]
        found: Numbers = {
            "duration_s": self.duration,
            "drain_s": self.duration - last,
            "completed": len(done),
            "failed": len(self.records) - len(done),
            "request_throughput": len(done) / self.duration,
            "output_throughput": sum(record.output_tokens for record in done) / self.duration,
        }
        found |= _spread("chat_itl", gaps)
        found |= _spread("chat_tpot", [record.tpot for record in chats])
        found |= _spread("chat_ttft", [record.ttft for record in chats])
        return found | _spread("long_ttft", [record.ttft for record in longs])

    def goodput(self, limits_ms: Mapping[str, float]) -> float:
        """Chats per second that met every limit."""
        good = sum(is_good(record, limits_ms) for record in self.of(CHAT))
        return good / self.duration


@dataclass(frozen=True)
class Run:
    """One start of one mode: `round` 0 is the sweep's."""

    mode: str
    chunk: int
    round: int
    ready_s: float
    measured: Mapping[str, Measured]

    def to_json(self, limits_ms: Mapping[str, float]) -> dict[str, Any]:
        phases = {}
        for name, measured in self.measured.items():
            phases[name] = {
                **{key: round(value, 4) for key, value in measured.numbers().items()},
                "goodput": round(measured.goodput(limits_ms), 4),
                "errors": Counter(record.error for record in measured.records if not record.ok),
                "requests": _columns(measured),
            }
        return {
            "mode": self.mode,
            "chunk": self.chunk,
            "round": self.round,
            "ready_s": round(self.ready_s, 3),
            "phases": phases,
        }


def choose(sweep: Sequence[Run]) -> Run:
    """The chunk size to hold against the others, from one mode's sweep. See CRITERION.

    When every point failed some requests, those with the fewest failures are compared.
    """
    found = {run.chunk: run.measured[LOADED].numbers() for run in sweep}
    fewest = min(numbers["failed"] for numbers in found.values())
    whole = [run for run in sweep if found[run.chunk]["failed"] == fewest]

    def ttft(run: Run) -> float:
        return found[run.chunk].get("long_ttft_p50_ms", math.inf)

    patient = PATIENCE * min(map(ttft, whole))
    fit = [run for run in whole if ttft(run) <= patient]
    return min(fit, key=lambda run: (found[run.chunk].get("chat_itl_p99_ms", math.inf), run.chunk))


def choose_by_goodput(sweep: Iterable[Run], limits_ms: Mapping[str, float]) -> Run:
    """What the sweep would have chosen by goodput; shown beside, never used."""
    return max(sweep, key=lambda run: (run.measured[LOADED].goodput(limits_ms), -run.chunk))


def medians(rounds: Iterable[Run], limits_ms: Mapping[str, float]) -> dict[str, Numbers]:
    """Per phase and key, the median over one mode's rounds."""
    by_phase: dict[str, dict[str, list[float]]] = {}
    for run in rounds:
        for name, measured in run.measured.items():
            found = measured.numbers() | {"goodput": measured.goodput(limits_ms)}
            values = by_phase.setdefault(name, {})
            for key, value in found.items():
                values.setdefault(key, []).append(value)
    return {
        name: {key: round(median(many), 4) for key, many in values.items()}
        for name, values in by_phase.items()
    }


def default_limits(rounds: Sequence[Run]) -> dict[str, float]:
    """Limits that every mode meets when it is quiet, from the slowest mode's own quiet medians."""
    modes = dict.fromkeys(run.mode for run in rounds)
    quiet = [medians((r for r in rounds if r.mode == mode), {})[QUIET] for mode in modes]
    slowest = {
        name: max(numbers.get(f"chat_{name}_p50_ms", 0.0) for numbers in quiet)
        for name in ("ttft", "tpot")
    }
    return {
        "ttft": float(math.ceil(TTFT_SLACK * slowest["ttft"])),
        "tpot": float(math.ceil(TPOT_SLACK * slowest["tpot"])),
    }


def differing(runs: Sequence[Run]) -> Counter[str]:
    """How many answers of a mode are not, word for word, those of the first run that was asked the
    same. A mode all of whose answers are is not in it."""
    first: dict[tuple[str, int], str] = {}
    different: Counter[str] = Counter()
    for run in runs:
        for measured in run.measured.values():
            for number, record in enumerate(measured.records):
                if record.ok:
                    text = first.setdefault((measured.phase.digest, number), record.text)
                    if text != record.text:
                        different[run.mode] += 1
    return different


def _spread(name: str, seconds: Sequence[float]) -> Numbers:
    if not seconds:
        return {}
    ordered = sorted(1000 * value for value in seconds)
    found = {f"{name}_p{percent}_ms": percentile(ordered, percent) for percent in (50, 90, 99)}
    return {**found, f"{name}_max_ms": ordered[-1]}


def _columns(measured: Measured) -> dict[str, list[Any]]:
    """What is kept of the requests, a list per figure; gaps are reduced to the longest."""
    records = measured.records
    return {
        "kind": [ask.kind for ask in measured.phase.asks],
        "at_s": [round(ask.at, 3) for ask in measured.phase.asks],
        "ttft_ms": [round(1000 * record.ttft, 2) for record in records],
        "tpot_ms": [round(1000 * record.tpot, 2) for record in records],
        "e2el_ms": [round(1000 * record.latency, 2) for record in records],
        "itl_max_ms": [round(1000 * max(record.itls, default=0.0), 2) for record in records],
        "output_tokens": [record.output_tokens for record in records],
        "error": [record.error for record in records],
    }
