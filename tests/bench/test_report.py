from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bench.client import Record
from bench.options import ServeOptions
from bench.report import (
    Distribution,
    Report,
    is_good,
    peak_concurrency,
    peak_tokens_per_second,
    percentile,
    summarise,
)


def record(start: float = 0.0, **fields: Any) -> Record:
    """Four tokens: TTFT 100 ms, gaps 10, 20 and 60 ms, so TPOT 30 ms and E2EL 190 ms."""
    whole: dict[str, Any] = {
        "prompt_tokens": 5,
        "ttft": 0.100,
        "itls": [0.010, 0.020, 0.060],
        "latency": 0.190,
        "output_tokens": 4,
        "finish_reason": "length",
    }
    return Record(start=start, **(whole | fields))


def report(*records: Record, duration: float = 2.0, **options: Any) -> Report:
    chosen = ServeOptions(**options)
    numbers = summarise(records, duration, chosen.goodput, chosen.metric_percentiles)
    date = datetime(2026, 11, 20, 12, 34, 56)
    return Report(chosen, "org/model", "none", date, duration, records, numbers)


class TestPercentile:
    @pytest.mark.parametrize(
        ("percent", "value"), [(0, 1.0), (25, 1.75), (50, 2.5), (99, 3.97), (100, 4.0)]
    )
    def test_linear_between_neighbours(self, percent: float, value: float) -> None:
        assert percentile([1.0, 2.0, 3.0, 4.0], percent) == pytest.approx(value)

    def test_of_one_and_of_none(self) -> None:
        assert percentile([7.0], 99) == 7.0
        assert percentile([], 99) == 0.0


def test_distribution() -> None:
    numbers = Distribution.of([4.0, 2.0, 9.0], [50, 99.9])
    assert (numbers.mean, numbers.median) == (5.0, 4.0)
    assert numbers.std == pytest.approx(math.sqrt(26 / 3))
    assert list(numbers.percentiles) == ["p50", "p99.9"]
    assert Distribution.of([], [99]) == Distribution(0.0, 0.0, 0.0, {"p99": 0.0})


class TestGoodput:
    def test_all_limits_must_hold(self) -> None:
        assert is_good(record(), {"ttft": 100, "tpot": 30.1, "e2el": 190})
        assert not is_good(record(), {"ttft": 99.9, "tpot": 50})
        assert not is_good(record(), {"ttft": 200, "tpot": 29.9})
        assert not is_good(record(), {"e2el": 189.9})

    def test_limit_itself_is_good(self) -> None:
        assert is_good(record(ttft=0.1), {"ttft": 100})

    def test_one_token_meets_any_tpot(self) -> None:
        assert is_good(record(output_tokens=1, itls=[]), {"tpot": 0})

    def test_only_completed_requests_count(self) -> None:
        records = [record(), record(ttft=0.5), record(error="HTTP 503")]
        assert summarise(records, 2.0, {"ttft": 200}, [99]).request_goodput == 0.5


def test_peak_tokens_in_one_second_buckets() -> None:
    early = record(10.0, ttft=0.5, itls=[0.4, 0.2])  # at 0.5, 0.9, 1.1 of the run
    late = record(11.0, ttft=0.2, itls=[0.1])  # at 1.2, 1.3
    assert peak_tokens_per_second([early, late]) == 3.0
    assert peak_tokens_per_second([]) == 0.0


def test_peak_concurrency_does_not_count_touching_requests() -> None:
    assert peak_concurrency([record(0.0, latency=1.0), record(1.0, latency=1.0)]) == 1
    spans = [(0.0, 3.0), (1.0, 1.0), (1.5, 1.0), (2.0, 0.2)]
    assert peak_concurrency([record(start, latency=length) for start, length in spans]) == 3
    assert peak_concurrency([]) == 0


class TestSummary:
    def test_failed_requests_count_nowhere_else(self) -> None:
        numbers = summarise([record(), record(), record(error="x", ttft=9.0)], 2.0, {}, [99])
        assert (numbers.completed, numbers.failed) == (2, 1)
        assert (numbers.total_input, numbers.total_output) == (10, 8)
        assert numbers.request_throughput == 1.0
        assert numbers.output_throughput == 4.0
        assert numbers.total_token_throughput == 9.0
        assert numbers.request_goodput == 0.0
        assert numbers.metrics["ttft"].mean == pytest.approx(100)

    def test_itl_pools_all_gaps_and_tpot_is_per_request(self) -> None:
        numbers = summarise(
            [record(), record(output_tokens=1, itls=[], latency=0.1)], 1.0, {}, [100]
        )
        assert numbers.metrics["itl"].mean == pytest.approx(30)
        assert numbers.metrics["itl"].percentiles["p100"] == pytest.approx(60)
        # The answer of one token has no TPOT and must not pull the mean to 15.
        assert numbers.metrics["tpot"].mean == pytest.approx(30)
        assert numbers.metrics["e2el"].mean == pytest.approx(145)

    def test_nothing_completed(self) -> None:
        numbers = summarise([record(error="x")], 1.0, {"ttft": 1}, [99])
        assert numbers.completed == 0 and numbers.metrics["e2el"].mean == 0.0

    def test_phases_of_the_requests_that_have_them(self) -> None:
        records = [
            record(timeline_ms={"queue": 1.0, "prefill": 10.0}),
            record(timeline_ms={"queue": 3.0}),
            record(),
            record(error="x", timeline_ms={"queue": 99.0}),
        ]
        phases = summarise(records, 1.0, {}, [50]).phases
        assert list(phases) == ["queue", "prefill"]
        assert phases["queue"].mean == 2.0 and list(phases["queue"].percentiles) == ["p99"]


class TestTable:
    def test_as_the_field_prints_it(self) -> None:
        text = report(
            record(), record(), request_rate=4.0, max_concurrency=8, goodput={"ttft": 500.0}
        ).table()
        assert text.splitlines() == [
            "============ Serving Benchmark Result ============",
            "Successful requests:                     2         ",
            "Failed requests:                         0         ",
            "Maximum request concurrency:             8         ",
            "Request rate configured (RPS):           4.00      ",
            "Benchmark duration (s):                  2.00      ",
            "Total input tokens:                      10        ",
            "Total generated tokens:                  8         ",
            "Request throughput (req/s):              1.00      ",
            "Request goodput (req/s):                 1.00      ",
            "Output token throughput (tok/s):         4.00      ",
            "Peak output token throughput (tok/s):    8.00      ",
            "Peak concurrent requests:                2.00      ",
            "Total token throughput (tok/s):          9.00      ",
            "---------------Time to First Token----------------",
            "Mean TTFT (ms):                          100.00    ",
            "Median TTFT (ms):                        100.00    ",
            "P99 TTFT (ms):                           100.00    ",
            "-----Time per Output Token (excl. 1st token)------",
            "Mean TPOT (ms):                          30.00     ",
            "Median TPOT (ms):                        30.00     ",
            "P99 TPOT (ms):                           30.00     ",
            "---------------Inter-token Latency----------------",
            "Mean ITL (ms):                           30.00     ",
            "Median ITL (ms):                         20.00     ",
            "P99 ITL (ms):                            60.00     ",
            "----------------End-to-end Latency----------------",
            "Mean E2EL (ms):                          190.00    ",
            "Median E2EL (ms):                        190.00    ",
            "P99 E2EL (ms):                           190.00    ",
            "==================================================",
        ]

    def test_what_was_not_configured_is_not_printed(self) -> None:
        text = report(
            record(), percentile_metrics=("itl",), metric_percentiles=(50.0, 99.9)
        ).table()
        for absent in ("concurrency:", "RPS", "goodput", "TTFT", "Timeline", "Failures"):
            assert absent not in text
        assert "P50 ITL (ms):" in text and "P99.9 ITL (ms):" in text

    def test_phases_and_failures(self) -> None:
        records = [
            record(timeline_ms={"prefill": 12.5}),
            *[record(error="HTTP 503: busy")] * 2,
            record(error="cut"),
        ]
        lines = report(*records).table().splitlines()
        assert "Mean prefill (ms):                       12.50     " in lines
        assert lines[-3:] == ["2 x HTTP 503: busy", "1 x cut", "=" * 50]


STATS = {
    f"{stat}_{metric}_ms"
    for stat in ("mean", "median", "std", "p99")
    for metric in ("ttft", "tpot", "itl", "e2el")
}
KEYS = STATS | {
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "dataset_name",
    "num_prompts",
    "seed",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
}
DETAILS = {
    "input_lens",
    "output_lens",
    "start_times",
    "ttfts",
    "itls",
    "latencies",
    "generated_texts",
    "errors",
    "timelines_ms",
}


class TestJson:
    def test_keys(self) -> None:
        assert set(report(record()).to_json()) == KEYS
        assert set(report(record(), save_detailed=True).to_json()) == KEYS | DETAILS

    def test_values(self) -> None:
        result = report(
            record(),
            record(error="cut", text="half"),
            save_detailed=True,
            metadata={"gpu": "none", "duration": "mine"},
        ).to_json()
        assert result["gpu"] == "none"
        assert result["duration"] == 2.0  # metadata never hides a result
        assert result["request_rate"] == "inf" and result["request_goodput"] is None
        assert result["p99_itl_ms"] == pytest.approx(59.2)
        assert result["output_lens"] == [4, 0] and result["errors"] == ["", "cut"]
        assert result["date"] == "20261120-123456"

    def test_phase_keys(self) -> None:
        result = report(record(timeline_ms={"transfer_tail": 2.0})).to_json()
        assert set(result) - KEYS == {
            "mean_transfer_tail_ms",
            "median_transfer_tail_ms",
            "p99_transfer_tail_ms",
        }

    def test_strict_json(self) -> None:
        text = json.dumps(report(record(), burstiness=math.inf).to_json(), allow_nan=False)
        assert json.loads(text)["burstiness"] == "inf"


class TestSave:
    def test_name_from_label_rate_concurrency_model_and_date(self, tmp_path: Path) -> None:
        folder = tmp_path / "new"
        path = report(record(), result_dir=folder, request_rate=2.5, max_concurrency=4).save()
        assert path == folder / "openai-2.5qps-concurrency4-model-20261120-123456.json"
        assert json.loads(path.read_text())["completed"] == 1
        labelled = report(record(), result_dir=folder, label="night").save()
        assert labelled.name == "night-infqps-model-20261120-123456.json"

    def test_append_adds_a_line_and_save_replaces(self, tmp_path: Path) -> None:
        where: dict[str, Any] = {"result_dir": tmp_path, "result_filename": "out.json"}
        path = report(record(), **where).save()
        report(record(), **where, append_result=True).save()
        assert len(path.read_text().splitlines()) == 2
        report(record(), **where).save()
        assert len(path.read_text().splitlines()) == 1
