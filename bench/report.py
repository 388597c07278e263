"""Report: records of a run -> statistics, the table, the JSON.

Names, labels and definitions are those of `vllm bench serve`, so that its users and their scripts
read ours. Times inside are seconds, in everything shown they are milliseconds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.client import Record
from bench.options import ServeOptions

_WIDTH = 50
_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_TIMELINE_PERCENTILES = (99.0,)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile of ascending values, linear between neighbours; 0 of none."""
    if not ordered:
        return 0.0
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True)
class Distribution:
    """Mean, median, standard deviation (of the population) and percentiles, in milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: dict[str, float]

    @classmethod
    def of(cls, values_ms: Sequence[float], percents: Sequence[float]) -> Distribution:
        """All zero when there is no value. Percentiles are named `p99`, `p99.9`."""
        ordered = sorted(values_ms)
        mean = math.fsum(ordered) / len(ordered) if ordered else 0.0
        spread = math.fsum((value - mean) ** 2 for value in ordered)
        return cls(
            mean=mean,
            median=percentile(ordered, 50),
            std=math.sqrt(spread / len(ordered)) if ordered else 0.0,
            percentiles={_word(percent): percentile(ordered, percent) for percent in percents},
        )

    def keys(self, name: str, *, with_std: bool = True) -> dict[str, float]:
        """`{mean,median,std,pNN}_{name}_ms`."""
        shown = {"mean": self.mean, "median": self.median}
        if with_std:
            shown["std"] = self.std
        return {f"{stat}_{name}_ms": value for stat, value in (shown | self.percentiles).items()}

    def lines(self, label: str) -> list[str]:
        shown = {"Mean": self.mean, "Median": self.median}
        shown |= {name.upper(): value for name, value in self.percentiles.items()}
        return [_line(f"{stat} {label} (ms):", value) for stat, value in shown.items()]


@dataclass(frozen=True)
class Summary:
    """The numbers of a run. Rates divide by the whole run's duration; failed requests count in
    `failed` alone.
    """

    completed: int
    failed: int
    total_input: int
    total_output: int
    request_throughput: float
    request_goodput: float
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    metrics: dict[str, Distribution]
    phases: dict[str, Distribution]


def is_good(record: Record, goodput_ms: Mapping[str, float]) -> bool:
    """Whether a completed request meets every limit; TPOT of a one-token answer counts as 0."""
    values = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.latency}
    # Limits are divided, not values multiplied, as in the definition: 0.05 * 1000 may exceed 50.
    return all(values[name] <= limit / 1000 for name, limit in goodput_ms.items())


def peak_tokens_per_second(records: Sequence[Record]) -> float:
    """Most events with choices in any whole second since the first request was sent."""
    if not records:
        return 0.0
    origin = min(record.start for record in records)
    seconds: Counter[int] = Counter()
    for record in records:
        now = record.start + record.ttft - origin
        seconds[int(now)] += 1
        for gap in record.itls:
            now += gap
            seconds[int(now)] += 1
    return float(max(seconds.values()))


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests open at once; one that ends when another starts does not overlap it."""
    edges = [(record.start, 1) for record in records]
    edges += [(record.start + record.latency, -1) for record in records]
    running = peak = 0
    for _, change in sorted(edges):
        running += change
        peak = max(peak, running)
    return peak


def summarise(
    records: Sequence[Record],
    duration: float,
    goodput_ms: Mapping[str, float],
    percents: Sequence[float],
) -> Summary:
    """Reduce a run of `duration` seconds to its numbers."""
    done = [record for record in records if record.ok]
    total_input = sum(record.prompt_tokens for record in done)
    total_output = sum(record.output_tokens for record in done)
    good = sum(is_good(record, goodput_ms) for record in done) if goodput_ms else 0
    values = {
        "ttft": [record.ttft for record in done],
        "tpot": [record.tpot for record in done if record.output_tokens > 1],
        "itl": [gap for record in done for gap in record.itls],
        "e2el": [record.latency for record in done],
    }
    phases: dict[str, list[float]] = {}
    for record in done:
        for name, value in record.timeline_ms.items():
            phases.setdefault(name, []).append(value)
    return Summary(
        completed=len(done),
        failed=len(records) - len(done),
        total_input=total_input,
        total_output=total_output,
        request_throughput=len(done) / duration,
        request_goodput=good / duration,
        output_throughput=total_output / duration,
        total_token_throughput=(total_input + total_output) / duration,
        max_output_tokens_per_s=peak_tokens_per_second(done),
        max_concurrent_requests=peak_concurrency(done),
        metrics={
            name: Distribution.of([1000 * value for value in seconds], percents)
            for name, seconds in values.items()
        },
        phases={name: Distribution.of(ms, _TIMELINE_PERCENTILES) for name, ms in phases.items()},
    )


@dataclass(frozen=True)
class Report:
    """One finished run: what was asked for, every record, and the numbers."""

    options: ServeOptions
    model: str
    tokenizer: str
    date: datetime
    duration: float
    records: tuple[Record, ...]
    summary: Summary

    def table(self) -> str:
        """The result as `vllm bench serve` prints it, with Baton's phases and the failures."""
        options, numbers = self.options, self.summary
        lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
        lines.append(_line("Successful requests:", numbers.completed))
        lines.append(_line("Failed requests:", numbers.failed))
        if options.max_concurrency is not None:
            lines.append(_line("Maximum request concurrency:", options.max_concurrency))
        if math.isfinite(options.request_rate):
            lines.append(_line("Request rate configured (RPS):", options.request_rate))
        lines.append(_line("Benchmark duration (s):", self.duration))
        lines.append(_line("Total input tokens:", numbers.total_input))
        lines.append(_line("Total generated tokens:", numbers.total_output))
        lines.append(_line("Request throughput (req/s):", numbers.request_throughput))
        if options.goodput:
            lines.append(_line("Request goodput (req/s):", numbers.request_goodput))
        lines.append(_line("Output token throughput (tok/s):", numbers.output_throughput))
        peak = numbers.max_output_tokens_per_s
        lines.append(_line("Peak output token throughput (tok/s):", peak))
        lines.append(_line("Peak concurrent requests:", float(numbers.max_concurrent_requests)))
        lines.append(_line("Total token throughput (tok/s):", numbers.total_token_throughput))
        for name in options.percentile_metrics:
            lines.append(f"{_TITLES[name]:-^{_WIDTH}}")
            lines += numbers.metrics[name].lines(name.upper())
        if numbers.phases:
            lines.append(f"{'Timeline of a Request':-^{_WIDTH}}")
            for name, distribution in numbers.phases.items():
                lines += distribution.lines(name)
        if numbers.failed:
            lines.append(f"{'Failures':-^{_WIDTH}}")
            reasons = Counter(record.error for record in self.records if not record.ok)
            lines += [f"{count} x {reason}" for reason, count in reasons.most_common(10)]
        lines.append("=" * _WIDTH)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The result under the keys of `vllm bench serve`; per-request lists on --save-detailed."""
        options, numbers = self.options, self.summary
        rate = options.request_rate
        result: dict[str, Any] = {
            "date": f"{self.date:%Y%m%d-%H%M%S}",
            "endpoint_type": options.backend,
            "backend": options.backend,
            "label": options.label,
            "model_id": self.model,
            "tokenizer_id": self.tokenizer,
            "dataset_name": options.dataset_name,
            "num_prompts": options.num_prompts,
            "seed": options.seed,
            **options.metadata,
            "request_rate": rate if math.isfinite(rate) else "inf",
            "burstiness": options.burstiness if math.isfinite(options.burstiness) else "inf",
            "max_concurrency": options.max_concurrency,
            "duration": self.duration,
            "completed": numbers.completed,
            "failed": numbers.failed,
            "total_input_tokens": numbers.total_input,
            "total_output_tokens": numbers.total_output,
            "request_throughput": numbers.request_throughput,
            "request_goodput": numbers.request_goodput if options.goodput else None,
            "output_throughput": numbers.output_throughput,
            "total_token_throughput": numbers.total_token_throughput,
            "max_output_tokens_per_s": numbers.max_output_tokens_per_s,
            "max_concurrent_requests": numbers.max_concurrent_requests,
        }
        for name in options.percentile_metrics:
            result |= numbers.metrics[name].keys(name)
        for name, distribution in numbers.phases.items():
            result |= distribution.keys(name, with_std=False)
        return result | (self._details() if options.save_detailed else {})

    def save(self) -> Path:
        """Write the JSON file and return its path. Raises OSError."""
        options = self.options
        path = options.result_dir / (options.result_filename or self._filename())
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "a" if options.append_result else "w"
        with path.open(mode, encoding="utf-8") as file:
            json.dump(self.to_json(), file)
            file.write("\n")
        return path

    def _filename(self) -> str:
        options = self.options
        limit = options.max_concurrency
        concurrency = "" if limit is None else f"-concurrency{limit}"
        model = self.model.rstrip("/").rsplit("/", 1)[-1]
        start = f"{options.label or options.backend}-{options.request_rate}qps{concurrency}"
        return f"{start}-{model}-{self.date:%Y%m%d-%H%M%S}.json"

    def _details(self) -> dict[str, Any]:
        records = self.records
        return {
            "input_lens": [record.prompt_tokens for record in records],
            "output_lens": [record.output_tokens if record.ok else 0 for record in records],
            "start_times": [record.start for record in records],
            "ttfts": [record.ttft for record in records],
            "itls": [record.itls for record in records],
            "latencies": [record.latency for record in records],
            "generated_texts": [record.text for record in records],
            "errors": [record.error or "" for record in records],
            "timelines_ms": [record.timeline_ms for record in records],
        }


def _word(percent: float) -> str:
    return f"p{int(percent) if percent == int(percent) else percent}"


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"
