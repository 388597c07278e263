"""CpuResult: all that `baton bench cpu` measured -> the tables and the JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from bench.cpu_limits import Limits
from bench.cpu_peers import OURS
from bench.peers.protocol import Answer, Memory
from cluster.model import ModelConfig

MB: Final = 1e6
STRAY: Final = 0.05
"""Share of a core, over the whole run, above which an engine that should idle is named."""


@dataclass(frozen=True, order=True)
class Figure:
    """prefill: `size` tokens of one prompt. decode: `size` sequences at once."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size}"


@dataclass(frozen=True)
class Agreement:
    """How far an engine's greedy tokens are ours. `margin`: our lead where they part, in logits."""

    key: str
    equal: int
    of: int
    margin: float = 0.0

    def sound(self, near_tie: float) -> bool:
        return self.equal == self.of or self.margin < near_tie


@dataclass
class Run:
    """One precision. `samples`: tokens per second of each engine, one for each round."""

    precision: str
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)  # after the warm-up
    memory_held: dict[str, Memory] = field(default_factory=dict)  # with the most sequences held
    samples: dict[Figure, dict[str, list[float]]] = field(default_factory=dict)
    agreement: list[Agreement] = field(default_factory=list)
    stray: dict[str, float] = field(default_factory=dict)  # share of a core while it had to idle

    @property
    def engines(self) -> list[str]:
        """Ours first."""
        return sorted(self.about, key=lambda key: key != OURS)

    def median(self, figure: Figure, key: str) -> float | None:
        values = self.samples[figure].get(key)
        return statistics.median(values) if values else None

    def best_peer(self, figure: Figure) -> float | None:
        medians = (self.median(figure, key) for key in self.engines if key != OURS)
        return max((value for value in medians if value is not None), default=None)


@dataclass(frozen=True)
class CpuResult:
    model: str
    shape: ModelConfig
    settings: Mapping[str, Any]
    hardware: Mapping[str, Any]
    limits: Sequence[Limits]  # of one core, of all that are used
    date: datetime
    context: int
    near_tie: float
    runs: Sequence[Run]

    @property
    def sound(self) -> bool:
        """Whether everything computed in float32 agrees with ours but for near ties."""
        exact = (run for run in self.runs if run.precision == "fp32")
        return all(a.sound(self.near_tie) for run in exact for a in run.agreement)

    def limit(self, run: Run, figure: Figure) -> float:
        """Tokens per second if only bytes or only products counted, whichever is more."""
        rates, int8 = self.limits[-1], run.precision == "int8"
        products = rates.int8_gop_s if int8 else rates.fp32_gflop_s
        if figure.kind == "prefill":
            return figure.size / (prefill_flops(self.shape, figure.size) / products / 1e9)
        matrices, attention = decode_flops(self.shape, figure.size, self.context)
        read = matrix_weights(self.shape) * (1 if int8 else 4)
        read += figure.size * self.context * kv_bytes(self.shape)
        bound = max(
            read / rates.read_gb_s / 1e9,
            matrices / products / 1e9 + attention / rates.fp32_gflop_s / 1e9,
        )
        return figure.size / bound

    def table(self) -> str:
        lines = [f"{self.model} on {self.hardware['cpu']}, cores {self.hardware['cores_used']}"]
        lines += [
            f"{limits.threads} thread{'s' if limits.threads > 1 else ''}: "
            f"read {limits.read_gb_s:.1f} GB/s, fp32 {limits.fp32_gflop_s:.0f} GFLOP/s, "
            f"int8 {limits.int8_gop_s:.0f} GOP/s"
            for limits in self.limits
        ]
        return "\n".join([*lines, *(self._run_table(run) for run in self.runs)])

    def _run_table(self, run: Run) -> str:
        engines = run.engines
        head = [
            "",
            *(run.about[key]["name"] for key in engines),
            "limit",
            "ours/best",
            "ours/limit",
        ]
        rows = [head]
        for figure in run.samples:
            cells = [_cell(run.samples[figure].get(key, [])) for key in engines]
            ours, best = run.median(figure, OURS), run.best_peer(figure)
            limit = self.limit(run, figure)
            ratios = [_ratio(ours, best), _ratio(ours, limit)]
            rows.append([figure.name, *cells, f"{limit:.0f}", *ratios])
        for name, sizes in (
            ("resident MB, warm", {key: memory.resident for key, memory in run.memory.items()}),
            (
                "resident MB, held",
                {key: memory.resident for key, memory in run.memory_held.items()},
            ),
            ("peak MB", {key: memory.peak for key, memory in run.memory_held.items()}),
        ):
            cells = [f"{sizes[key] / MB:.0f}" if key in sizes else "-" for key in engines]
            rows.append([name, *cells, "", "", ""])
        title = f"\n{run.precision}: tokens per second, median of rounds (spread)"
        return "\n".join([title, _aligned(rows), *self._notes(run)])

    def _notes(self, run: Run) -> list[str]:
        notes = [
            f"{about['name']} {about['version']}: {about['settings']}"
            for about in run.about.values()
        ]
        notes += [f"{key} left out: {reason}" for key, reason in run.failed.items()]
        for key in [key for key in run.engines if any(a.key == key for a in run.agreement)]:
            mine = [a for a in run.agreement if a.key == key]
            shares = ", ".join(_share(a) for a in mine)
            wrong = run.precision == "fp32" and not all(a.sound(self.near_tie) for a in mine)
            what = f"greedy tokens as ours in {self.runs[0].precision}"
            notes.append(f"{key}: {what}: {shares}{' WRONG' if wrong else ''}")
        notes += [
            f"{key} used {100 * share:.0f} % of a core while it had to be idle"
            for key, share in run.stray.items()
            if share > STRAY
        ]
        return notes

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "date": self.date.isoformat(timespec="seconds"),
            "hardware": dict(self.hardware),
            "limits": [asdict(limits) for limits in self.limits],
            "settings": dict(self.settings),
            "runs": [self._run_json(run) for run in self.runs],
        }

    def _run_json(self, run: Run) -> dict[str, Any]:
        return {
            "precision": run.precision,
            "engines": run.about,
            "failed": run.failed,
            "memory": {key: asdict(memory) for key, memory in run.memory.items()},
            "memory_held": {key: asdict(memory) for key, memory in run.memory_held.items()},
            "figures": [
                {
                    "kind": figure.kind,
                    "size": figure.size,
                    "limit": round(self.limit(run, figure), 2),
                    "tokens_per_s": {
                        key: [round(value, 2) for value in values] for key, values in by_key.items()
                    },
                }
                for figure, by_key in run.samples.items()
            ],
            "agreement": [asdict(agreement) for agreement in run.agreement],
            "stray": {key: round(share, 4) for key, share in run.stray.items()},
        }


def compare(key: str, theirs: Answer, ours: Answer) -> Agreement:
    """Up to the first token that is another: what follows it answers another text."""
    pairs = zip(theirs.tokens, ours.tokens, strict=True)
    equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(ours.tokens))
    if equal == len(ours.tokens):
        return Agreement(key, equal, equal)
    return Agreement(key, equal, len(ours.tokens), ours.margins[equal])


def matrix_weights(shape: ModelConfig) -> int:
    """Weights that a decode step reads: all matrices and the head; of the embedding a few rows."""
    return _body_weights(shape) + shape.vocab_size * shape.hidden_size


def prefill_flops(shape: ModelConfig, tokens: int) -> float:
    """Of all matrices for each token, the head for one, and causal attention."""
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * tokens**2
    head = 2.0 * shape.vocab_size * shape.hidden_size
    return 2.0 * _body_weights(shape) * tokens + attention + head


def decode_flops(shape: ModelConfig, sequences: int, context: int) -> tuple[float, float]:
    """(matrices, attention) of one step."""
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * context * sequences
    return 2.0 * matrix_weights(shape) * sequences, attention


def kv_bytes(shape: ModelConfig) -> int:
    """Of one token, all layers, in float32."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * 4


def _body_weights(shape: ModelConfig) -> int:
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.hidden_size
    return shape.layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def _cell(values: Sequence[float]) -> str:
    """The median, and how far the rounds lie apart as a share of it."""
    if not values:
        return "-"
    median = statistics.median(values)
    digits = 1 if median < 100 else 0
    return f"{median:.{digits}f} ({100 * (max(values) - min(values)) / median:.0f} %)"


def _ratio(ours: float | None, other: float | None) -> str:
    return "-" if not ours or not other else f"{ours / other:.2f}"


def _share(agreement: Agreement) -> str:
    if agreement.equal == agreement.of:
        return f"all {agreement.of}"
    return f"{agreement.equal} of {agreement.of} (lead {agreement.margin:.4f})"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
