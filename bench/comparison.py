"""Comparison: the whole result of `baton bench compare` -> the table and the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Final

from bench import measured
from bench.compare_flags import CompareOptions
from bench.measured import Run
from bench.trace import FLOOD, LOADED, PROBES, QUIET, Pace
from bench.vllm_stand import is_vllm

CALM: Final = 0.5
"""A load average above this, before we begin, is somebody else's."""

_PATHS: Final = ("model", "output", "vllm")
"""Options that would put a machine's paths into a file that is published."""

PLACE: Final = "gateway and client unpinned in every mode, beside the pinned workers"


@dataclass(frozen=True)
class Comparison:
    """All that was measured, and what it was measured on."""

    options: CompareOptions
    model: str
    hardware: Mapping[str, Any]
    date: datetime
    pace: Pace
    sweep: tuple[Run, ...]
    rounds: tuple[Run, ...]

    @property
    def limits_ms(self) -> dict[str, float]:
        return dict(self.options.goodput) or measured.default_limits(self.rounds)

    @property
    def by_goodput(self) -> dict[str, int]:
        return {
            mode: measured.choose_by_goodput(points, self.limits_ms).chunk
            for mode, points in by_mode(self.sweep).items()
        }

    @property
    def probes_agree(self) -> bool:
        """Whether the greedy answers to the fixed prompts were the same in each of our runs."""
        probes = [
            replace(run, measured={PROBES: run.measured[PROBES]})
            for run in (*self.sweep, *self.rounds)
            if not is_vllm(run.mode)
        ]
        complete = all(r.ok for run in probes for r in run.measured[PROBES].records)
        return complete and not measured.differing(probes)

    def table(self) -> str:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in self.limits_ms.items())
        options, different = self.options, measured.differing((*self.sweep, *self.rounds))
        which = ", ".join(f"{count} of {mode}" for mode, count in different.items()) or "none"
        return "\n".join(
            (
                f"model {self.model}, cores {' and '.join(map(str, options.cores))}, "
                f"medians of {options.rounds} rounds; {PLACE}",
                f"chats {options.sizes.chat_prompt} + {options.sizes.chat_answer} tokens at "
                f"{self.pace.rate:.2f}/s, long prompts {options.sizes.long_prompt} + "
                f"{options.sizes.long_answer} tokens every {self.pace.long_every:.1f} s",
                f"chunk size of a mode: {measured.CRITERION}",
                f"a good chat: {limits}",
                *self._warnings(),
                "",
                _table(self.rounds, self.limits_ms, self.by_goodput),
                "",
                f"greedy answers to the probes agree in all our modes: {self.probes_agree}; "
                f"of all answers differ from the first mode's: {which}",
            )
        )

    def _warnings(self) -> list[str]:
        before = self.hardware["load_average_before"]
        busy = f"the machine was busy before we began (load average {before}): do not quote this"
        return [busy] if before > CALM else []

    def to_json(self) -> dict[str, Any]:
        limits = self.limits_ms
        rounds = by_mode(self.rounds)
        return {
            "date": f"{self.date:%Y-%m-%d %H:%M:%S}",
            "model": self.model,
            "hardware": dict(self.hardware),
            "placement": PLACE,
            "options": {k: v for k, v in asdict(self.options).items() if k not in _PATHS},
            "pace": asdict(self.pace),
            "trace": {n: one.phase.digest for n, one in self.rounds[0].measured.items()},
            "criterion": measured.CRITERION,
            "goodput_limits_ms": limits,
            "chosen_chunk": {mode: runs[0].chunk for mode, runs in rounds.items()},
            "best_chunk_by_goodput": self.by_goodput,
            "probes_agree": self.probes_agree,
            "answers_differing": measured.differing((*self.sweep, *self.rounds)),
            "medians": {m: measured.medians(runs, limits) for m, runs in rounds.items()},
            "sweep": [run.to_json(limits) for run in self.sweep],
            "rounds": [run.to_json(limits) for run in self.rounds],
        }


def by_mode(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.mode, []).append(run)
    return found


_ROWS: Final[tuple[tuple[str, str, str], ...]] = (
    ("Output tok/s, loaded", LOADED, "output_throughput"),
    ("Output tok/s, flood", FLOOD, "output_throughput"),
    ("Requests/s, loaded", LOADED, "request_throughput"),
    ("Requests/s, flood", FLOOD, "request_throughput"),
    ("Good chats/s, quiet", QUIET, "goodput"),
    ("Good chats/s, loaded", LOADED, "goodput"),
    ("Seconds to finish after the last arrival", LOADED, "drain_s"),
)
_WIDTH: Final = 14


def _table(
    rounds: Sequence[Run], limits_ms: Mapping[str, float], by_goodput: Mapping[str, int]
) -> str:
    """Modes as columns; each loaded ITL beside the mode's own quiet one, and their ratio."""
    modes = list(dict.fromkeys(run.mode for run in rounds))
    found = {
        mode: measured.medians((r for r in rounds if r.mode == mode), limits_ms) for mode in modes
    }
    chunks = {run.mode: run.chunk for run in rounds}

    def line(label: str, cell: Callable[[str], str]) -> str:
        return f"{label:<42}" + "".join(f"{cell(mode):>{_WIDTH}}" for mode in modes)

    def value(phase: str, key: str, form: str = ".1f") -> Callable[[str], str]:
        def cell(mode: str) -> str:
            number = found[mode].get(phase, {}).get(key)
            return "-" if number is None else f"{number:{form}}"

        return cell

    def ratio(key: str) -> Callable[[str], str]:
        def cell(mode: str) -> str:
            quiet, loaded = (found[mode].get(phase, {}).get(key) for phase in (QUIET, LOADED))
            return f"{loaded / quiet:.2f} x" if quiet and loaded is not None else "-"

        return cell

    lines = [line("", str), line("Chunk size, chosen (tokens)", lambda mode: str(chunks[mode]))]
    lines.append(line("Chunk size, best by goodput", lambda mode: str(by_goodput.get(mode, "-"))))
    for stat in ("p50", "p99", "max"):
        key = f"chat_itl_{stat}_ms"
        lines.append(line(f"ITL {stat} of chats, quiet (ms)", value(QUIET, key)))
        lines.append(line(f"ITL {stat} of chats, loaded (ms)", value(LOADED, key)))
        lines.append(line("  loaded / quiet", ratio(key)))
    for phase in (QUIET, LOADED):
        for stat in ("p50", "p99"):
            label = f"TTFT {stat} of chats, {phase} (ms)"
            lines.append(line(label, value(phase, f"chat_ttft_{stat}_ms")))
    for stat in ("p50", "p99"):
        label = f"TTFT {stat} of long prompts, loaded (ms)"
        lines.append(line(label, value(LOADED, f"long_ttft_{stat}_ms")))
    lines += [line(label, value(phase, key, ".2f")) for label, phase, key in _ROWS]
    lines.append(line("Failed, all rounds", lambda mode: str(_failed(rounds, mode))))
    return "\n".join(lines)


def _failed(rounds: Iterable[Run], mode: str) -> int:
    return sum(
        not record.ok
        for run in rounds
        if run.mode == mode
        for phase in run.measured.values()
        for record in phase.records
    )
