"""The page that Prometheus reads: names, labels and values, through the real text parser."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import metrics
from cluster.messages import Load
from cluster.metrics import GatewayMetrics, WorkerView, labelled, length_buckets


def page(gateway: GatewayMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape by name and labels, without model_name. No sample comes twice."""
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(gateway.exposition().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return samples


def with_workers(*views: WorkerView) -> GatewayMetrics:
    return GatewayMetrics("m", 1000, lambda: views)


def view(name: str, role: str, counters: Iterable[tuple[str, float]] = ()) -> WorkerView:
    load = Load(
        progress=1,
        running=3,
        waiting=2,
        queued_tokens=70,
        free_blocks=4,
        cached_blocks=2,
        promised_blocks=1,
        owned_blocks=3,
        counters=tuple(counters),
    )
    return WorkerView(name, role, block_size=16, blocks=10, load=load)


def test_a_request_is_counted_once_in_each_family() -> None:
    gateway = with_workers()
    gateway.call(choices=2, max_tokens=64)
    gateway.first_token(0.03, prompt_tokens=100, cached_tokens=32)
    gateway.next_token(0.004)
    gateway.next_token(0.006)
    spans = {"queue": 0.001, "landing": 0.002, "prefill_queue": 0.003, "prefill": 0.02}
    gateway.finished("length", tokens=3, e2e=0.04, decoding=0.01, spans=spans)
    samples = page(gateway)
    assert samples["vllm:prompt_tokens_total", ()] == 100
    assert samples["vllm:generation_tokens_total", ()] == 3
    assert samples["vllm:prefix_cache_queries_total", ()] == 100
    assert samples["vllm:prefix_cache_hits_total", ()] == 32
    assert samples["vllm:request_success_total", (("finished_reason", "length"),)] == 1
    assert samples["vllm:time_to_first_token_seconds_sum", ()] == pytest.approx(0.03)
    assert samples["vllm:inter_token_latency_seconds_count", ()] == 2
    assert samples["vllm:inter_token_latency_seconds_bucket", (("le", "0.004"),)] == 1
    assert samples["vllm:request_time_per_output_token_seconds_sum", ()] == pytest.approx(0.005)
    assert samples["vllm:request_queue_time_seconds_sum", ()] == pytest.approx(0.006)
    assert samples["vllm:request_inference_time_seconds_sum", ()] == pytest.approx(0.03)
    assert samples["vllm:request_params_n_sum", ()] == 2
    assert samples["baton_phase_seconds_sum", (("phase", "landing"),)] == pytest.approx(0.002)
    for name in ("vllm:e2e_request_latency_seconds", "vllm:request_generation_tokens"):
        assert samples[f"{name}_bucket", (("le", "+Inf"),)] == samples[f"{name}_count", ()] == 1


def test_one_token_has_no_time_per_output_token() -> None:
    gateway = with_workers()
    gateway.finished("stop", tokens=1, e2e=0.1, decoding=0.0, spans={})
    assert page(gateway)["vllm:request_time_per_output_token_seconds_count", ()] == 0


def test_workers_gauges_come_from_their_latest_load() -> None:
    samples = page(with_workers(view("d0", "decode"), view("p0", "prefill")))
    who = (("role", "decode"), ("worker", "d0"))
    assert samples["vllm:num_requests_running", who] == 3
    assert samples["vllm:num_requests_waiting", who] == 2
    assert samples["vllm:kv_cache_usage_perc", who] == pytest.approx(0.4)
    assert samples["baton_queued_prompt_tokens", who] == 70
    info = (("block_size", "16"), ("num_gpu_blocks", "10"), *who)
    assert samples["vllm:cache_config_info", info] == 1
    states = [value for (name, key), value in samples.items() if name == "baton_held_blocks"]
    assert sum(states) == 2 * 10


def test_who_waits_at_the_gateway_waits_too() -> None:
    gateway = with_workers(view("d0", "decode"))
    gateway.queue(lambda: 9, lambda: 5, lambda: 2.5)
    samples = page(gateway)
    held_back = (("role", "gateway"), ("worker", ""))
    assert samples["vllm:num_requests_waiting", held_back] == 5
    assert samples["baton_requests_waiting", ()] == 9
    assert samples["baton_queue_delay_seconds", ()] == 2.5


def test_workers_counters_keep_their_own_label() -> None:
    counters = [
        (metrics.PREEMPTIONS, 5.0),
        (labelled(metrics.KV_TRANSFER_FAILURES, reason="stale"), 2.0),
        (labelled(metrics.KV_TRANSFER_FAILURES, reason="checksum"), 1.0),
    ]
    samples = page(with_workers(view("d0", "decode", counters), view("d1", "decode")))
    who = (("role", "decode"), ("worker", "d0"))
    assert samples["vllm:num_preemptions_total", who] == 5
    failures = "baton_kv_transfer_failures_total"
    assert samples[failures, (("reason", "stale"), *who)] == 2
    assert samples[failures, (("reason", "checksum"), *who)] == 1


def test_a_worker_cannot_shadow_a_name_or_break_the_page() -> None:
    counters = [
        ("vllm:prompt_tokens", 9.0),
        ("baton_naps", 7.0),
        ('baton_naps{reason="x"}', 1.0),
        ('baton_steps{reason="x"}', 1.0),
        ("no name\n", 1.0),
    ]
    gateway = with_workers(view("d0", "decode", counters))
    gateway.first_token(0.1, 11, 0)
    samples = page(gateway)
    who = (("role", "decode"), ("worker", "d0"))
    assert samples["vllm:prompt_tokens_total", ()] == 11
    assert samples["baton_worker_vllm_prompt_tokens_total", who] == 9
    assert samples["baton_worker_naps_total", who] == 7
    assert not [name for name, labels in samples if "x" in dict(labels).values()]


def test_clients_make_no_label_values() -> None:
    gateway = with_workers()
    gateway.http("none", "BREW", 405, 0.001)
    labels = (("handler", "none"), ("method", "other"), ("status", "4xx"))
    assert page(gateway)["http_requests_total", labels] == 1


def test_baton_counters() -> None:
    gateway = with_workers()
    gateway.handoff("done")
    gateway.error("overloaded")
    gateway.cancelled()
    samples = page(gateway)
    assert samples["baton_handoffs_total", (("outcome", "done"),)] == 1
    assert samples["baton_errors_total", (("code", "overloaded"),)] == 1
    assert samples["baton_requests_cancelled_total", ()] == 1


def test_mean_batch_and_mean_transfer_come_from_two_counters_each() -> None:
    counters = [
        (metrics.STEPS, 4.0), (metrics.STEP_TOKENS, 100.0),
        (metrics.HANDOFFS_SENT, 5.0), (metrics.KV_TRANSFER_SECONDS, 0.5),
    ]  # fmt: skip
    samples = page(with_workers(view("p0", "prefill", counters)))
    who = (("role", "prefill"), ("worker", "p0"))
    assert samples["baton_step_tokens_total", who] / samples["baton_steps_total", who] == 25
    seconds = samples["baton_kv_transfer_seconds_total", who]
    assert seconds / samples["baton_handoffs_sent_total", who] == pytest.approx(0.1)


def test_every_name_carries_the_model() -> None:
    families = text_string_to_metric_families(
        with_workers(view("d0", "decode")).exposition().decode()
    )
    for family in families:
        for sample in family.samples:
            if not sample.name.startswith("http_"):
                assert sample.labels["model_name"] == "m", sample.name


def test_length_buckets() -> None:
    assert length_buckets(60) == (1, 2, 5, 10, 20, 50)
    assert length_buckets(0) == (1,)
