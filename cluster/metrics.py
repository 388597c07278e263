"""Every metric of Baton: its name, its labels, its buckets. Nothing else names one.

The gateway is the one process that is scraped. It observes requests itself; what only a worker can
know arrives in `messages.Load` and is put beside it, at scrape time, with the labels `role` and
`worker`. So request latencies are counted once, however many workers took part in a request.

Names with `vllm:` mean what vLLM means by them, so that existing dashboards and autoscalers work;
names with `baton_` are our own. A worker writes the keys of `Load.counters` with `labelled()`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.messages import Load

# Counters that workers keep and send in Load.counters. Exposed with `_total` behind the name.
PREEMPTIONS: Final = "vllm:num_preemptions"
STEPS: Final = "baton_steps"
STEP_TOKENS: Final = "baton_step_tokens"
KV_TRANSFER_BYTES: Final = "baton_kv_transfer_bytes"
KV_TRANSFER_FAILURES: Final = "baton_kv_transfer_failures"  # label reason
KV_TRANSFER_SECONDS: Final = "baton_kv_transfer_seconds"
HANDOFFS_SENT: Final = "baton_handoffs_sent"
KV_CHUNKS: Final = "baton_kv_chunks"
KV_CHUNKS_RESENT: Final = "baton_kv_chunks_resent"
KV_CHUNKS_REPEATED: Final = "baton_kv_chunks_repeated"
KV_LEASE_EXPIRED: Final = "baton_kv_lease_expired"
LANDINGS: Final = "baton_landings"  # label event
FRAMES_REJECTED: Final = "baton_frames_rejected"  # label reason
BAD_FRAMES: Final = "baton_bad_frames"  # label reason
LINKS_ENDED: Final = "baton_links_ended"  # label reason
ANSWERS_UNDELIVERED: Final = "baton_answers_undelivered"

# What a worker sends in the same way but is no counter.
MFU: Final = "baton_mfu_ratio"
MBU: Final = "baton_mbu_ratio"
START_SECONDS: Final = "baton_worker_start_seconds"  # label phase
PEAK_RESIDENT_BYTES: Final = "baton_worker_peak_resident_bytes"
WORKER_PRESSURE: Final = "baton_worker_pressure_ratio"  # label resource
STEP_OVERHEAD: Final = "baton_step_overhead_seconds_bucket"  # label le
STEP_OVERHEAD_SUM: Final = "baton_step_overhead_seconds_sum"

OVERHEAD_BUCKETS: Final = (
    *(0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.03, 0.1),
)

_WORKER_GAUGES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    MFU: (
        "Share of the device's matrix rate that steps used, while they ran; the last seconds.",
        (),
    ),
    MBU: ("Share of the device's memory rate that steps used, likewise.", ()),
    START_SECONDS: (
        "How long the worker took to start: until it was imported, loaded, warm and ready.",
        ("phase",),
    ),
    PEAK_RESIDENT_BYTES: ("The most memory that the worker's process has had resident.", ()),
    WORKER_PRESSURE: (
        "Share in use of the worker's memory limit and of its file descriptors.",
        ("resource",),
    ),
}

_WORKER_COUNTERS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    PREEMPTIONS: ("Running sequences evicted to be computed again later.", ()),
    STEPS: ("Steps that computed something.", ()),
    STEP_TOKENS: (
        "Tokens computed by all steps, prompt and generated; over baton_steps the mean batch.",
        (),
    ),
    KV_TRANSFER_BYTES: ("KV bytes sent or received, payload only.", ()),
    KV_TRANSFER_FAILURES: ("Handoffs whose KV did not arrive whole.", ("reason",)),
    KV_TRANSFER_SECONDS: (
        "Transfer time that computing did not hide, from a prompt's last KV to its sealed landing;"
        " over baton_handoffs_sent the mean of a handoff.",
        (),
    ),
    HANDOFFS_SENT: ("Handoffs whose landing was sealed.", ()),
    KV_CHUNKS: ("KV chunks sent or received, each once.", ()),
    KV_CHUNKS_RESENT: ("KV chunks sent again because they arrived damaged.", ()),
    KV_CHUNKS_REPEATED: ("KV chunks that had come before; not written again.", ()),
    KV_LEASE_EXPIRED: ("Promised or held blocks taken back by the sweep.", ()),
    LANDINGS: ("What happened to landings, besides that they expired.", ("event",)),
    FRAMES_REJECTED: (
        "Intact frames that no landing would take, stale ones among them; nothing was written.",
        ("reason",),
    ),
    BAD_FRAMES: (
        "Frames dropped unread: damaged, malformed, fenced (no handshake) or of a cut link.",
        ("reason",),
    ),
    LINKS_ENDED: (
        "Links refused at the handshake, evicted by a newer one, or cut for overdrawn credit; "
        "connections without a key of ours, or on this machine of another user.",
        ("reason",),
    ),
    ANSWERS_UNDELIVERED: ("Answers to frames whose sender was gone or did not read them.", ()),
}

PHASES: Final = (
    *("tokenize", "recovery", "queue", "landing", "prefill_queue", "prefill", "wire"),
    "detokenize",
    *("transfer_tail", "decode_admit", "first_step", "wire_second"),
)
"""The spans of one request (R9): those that add up to its first token's time, then those between
the first token and the second."""

# Where vLLM has buckets for the same quantity they are kept, so that recorded rules still fit.
TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
# Finer below 10 ms than vLLM's: small models on fast cards all fall into its first bucket.
ITL_BUCKETS: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
PHASE_BUCKETS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
CHOICE_BUCKETS: Final = (1, 2, 5, 10, 20)

_OVERHEAD: Final = STEP_OVERHEAD.removesuffix("_bucket")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_METHODS: Final = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"})
_KEY: Final = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{([a-z_]+)="([^"\\\n]*)"\})?')


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the collector sees it: who it is, how big its pool is, its latest Load."""

    name: str
    role: str
    block_size: int
    blocks: int
    load: Load


def length_buckets(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... as far as `longest` tokens."""
    series = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return tuple(value for value in series if value <= longest) or (1,)


def bound(value: float) -> str:
    """The upper bound of a histogram's bucket, as Prometheus writes it."""
    return "+Inf" if value == math.inf else str(value)


def labelled(name: str, **label: str) -> str:
    """The key of one counter in `Load.counters`; at most one label, as in name{reason="stale"}."""
    assert len(label) <= 1, "a worker's counter has at most one label of its own"
    for key, value in label.items():
        return f'{name}{{{key}="{value}"}}'
    return name


class GatewayMetrics:
    """What the gateway counts and times, and the text that Prometheus reads.

    Observing is a bisection of a fixed bucket list and one addition: cheap enough for each token.
    Used from the event loop alone.
    """

    def __init__(
        self,
        model: str,
        max_model_len: int = 1 << 20,
        workers: Callable[[], Iterable[WorkerView]] = tuple,
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        lengths = length_buckets(max_model_len)

        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds",
            "From the arrival of the request to its first token.",
            TTFT_BUCKETS,
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token of one answer, the first token left out.",
            ITL_BUCKETS,
        )
        self._e2e = self._histogram(
            "vllm:e2e_request_latency_seconds",
            "From the arrival of the request to its last token.",
            LATENCY_BUCKETS,
        )
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds",
            "Waiting for a landing and for a prefill worker.",
            LATENCY_BUCKETS,
        )
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "Computing the prompt.", LATENCY_BUCKETS
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", LATENCY_BUCKETS
        )
        self._inference_time = self._histogram(
            "vllm:request_inference_time_seconds", "Prefill and decode together.", LATENCY_BUCKETS
        )
        self._request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of one request.", lengths
        )
        self._request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens of one request.", lengths
        )
        self._params_n = self._histogram(
            "vllm:request_params_n", "The parameter n of each call.", CHOICE_BUCKETS
        )
        self._params_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "The token limit of each call.", lengths
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of all requests.")
        self._tokens = _Tokens(model)
        self.registry.register(self._tokens)
        self._cache_queries = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in a prefix cache."
        )
        self._cache_hits = self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in a prefix cache."
        )
        success = Counter(
            "vllm:request_success",
            "Answers that ended as they should.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._success = {why: success.labels(model, why) for why in ("stop", "length")}

        phases = Histogram(
            "baton_phase_seconds",
            "One span of a request's timeline.",
            ("model_name", "phase"),
            buckets=PHASE_BUCKETS,
            registry=self.registry,
        )
        self._phases = {phase: phases.labels(model, phase) for phase in PHASES}
        self._handoffs = Counter(
            "baton_handoffs",
            "Sequences handed from prefill to decode, by how it went.",
            ("model_name", "outcome"),
            registry=self.registry,
        )
        self._recoveries = Counter(
            "baton_recoveries",
            "Losses that a request got over, by its phase and by what happened.",
            ("model_name", "phase", "cause"),
            registry=self.registry,
        )
        self._recovery_seconds = self._histogram(
            "baton_recovery_seconds",
            "From the notice of a loss to the request's next token.",
            LATENCY_BUCKETS,
        )
        self._fallbacks = self._counter(
            "baton_fallbacks", "Prompts read by a decode worker, for want of a prefill worker."
        )
        self._cancelled = self._counter(
            "baton_requests_cancelled", "Calls whose client went away before the end."
        )
        self._errors = Counter(
            "baton_errors",
            "Calls that ended in an error, by its code.",
            ("model_name", "code"),
            registry=self.registry,
        )
        self._waiting = Gauge(
            "baton_requests_waiting",
            "Requests at this gateway that have no first token yet.",
            ("model_name",),
            registry=self.registry,
        ).labels(model)
        self._delay = Gauge(
            "baton_queue_delay_seconds",
            "How long a newcomer would wait to be let in, by what was measured.",
            ("model_name",),
            registry=self.registry,
        ).labels(model)
        self._pressure = Gauge(
            "baton_pressure_ratio",
            "Share in use of this gateway's memory limit and of its file descriptors.",
            ("resource",),
            registry=self.registry,
        )
        self._http = Counter(
            "http_requests",
            "HTTP requests answered.",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        self._http_time = Histogram(
            "http_request_duration_seconds",
            "From the request line to the last byte of the answer.",
            ("handler", "method"),
            buckets=TTFT_BUCKETS,
            registry=self.registry,
        )
        self._workers = _Workers(model, workers)
        self.registry.register(self._workers)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            name, text, ("model_name",), buckets=tuple(buckets), registry=self.registry
        )
        return family.labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model_name",), registry=self.registry).labels(self._model)

    def call(self, choices: int, max_tokens: int) -> None:
        """A call was admitted."""
        self._params_n.observe(choices)
        self._params_max_tokens.observe(max_tokens)

    def first_token(self, seconds: float, prompt_tokens: int, cached_tokens: int) -> None:
        """`seconds` since the call arrived."""
        self._ttft.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._tokens.count += 1
        self._request_prompt_tokens.observe(prompt_tokens)
        self._cache_queries.inc(prompt_tokens)
        self._cache_hits.inc(cached_tokens)

    def next_token(self, seconds: float) -> None:
        """`seconds` since the token before it."""
        self._tokens.follow(seconds)

    def finished(
        self, why: str, tokens: int, e2e: float, decoding: float, spans: Mapping[str, float]
    ) -> None:
        """One answer is complete. `decoding` is the time from its first token to its last."""
        self._success[why].inc()
        self._e2e.observe(e2e)
        self._request_generation_tokens.observe(tokens)
        if tokens > 1:
            self._tpot.observe(decoding / (tokens - 1))
        waiting = (spans.get(phase, 0.0) for phase in ("queue", "landing", "prefill_queue"))
        self._queue_time.observe(sum(waiting))
        prefill = spans.get("prefill", 0.0)
        self._prefill_time.observe(prefill)
        self._decode_time.observe(decoding)
        self._inference_time.observe(prefill + decoding)
        for phase, seconds in spans.items():
            if phase in self._phases:
                self._phases[phase].observe(seconds)

    def handoff(self, outcome: str) -> None:
        """`outcome` is one of a few words of ours, never text from outside."""
        self._handoffs.labels(self._model, outcome).inc()

    def recovery(self, phase: str, cause: str, seconds: float) -> None:
        """A request got over a loss, `seconds` after it was noticed. Both are words of ours."""
        self._recoveries.labels(self._model, phase, cause).inc()
        self._recovery_seconds.observe(seconds)

    def fallback(self) -> None:
        self._fallbacks.inc()

    def cancelled(self) -> None:
        self._cancelled.inc()

    def error(self, code: str) -> None:
        self._errors.labels(self._model, code).inc()

    def queue(
        self,
        waiting: Callable[[], float],
        held_back: Callable[[], float],
        delay: Callable[[], float],
    ) -> None:
        """Where to look, at scrape time, for who waits, who of them was sent to no worker yet, and
        for how long a newcomer would."""
        self._waiting.set_function(waiting)
        self._workers.held_back = held_back
        self._delay.set_function(delay)

    def pressure(self, resource: str, share: float) -> None:
        self._pressure.labels(resource).set(share)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """`handler` is a route's pattern, not a path: clients must not create label values."""
        method = method if method in _METHODS else "other"
        self._http.labels(handler, method, f"{status // 100}xx").inc()
        self._http_time.labels(handler, method).observe(seconds)

    def exposition(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)


class _Tokens(Collector):
    """What is noted of every token: without prometheus_client's locks, in a sixth of the time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.count = 0
        self._gaps = [0] * (len(ITL_BUCKETS) + 1)  # by bucket, the last without a bound
        self._gap_seconds = 0.0

    def follow(self, seconds: float) -> None:
        """Another one, `seconds` after the last of its answer."""
        self.count += 1
        self._gaps[bisect_left(ITL_BUCKETS, seconds)] += 1
        self._gap_seconds += seconds

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "vllm:generation_tokens", "Generated tokens.", labels=("model_name",)
        )
        tokens.add_metric((self._model,), self.count)
        yield tokens
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds",
            "Between two successive tokens of one answer.",
            labels=("model_name",),
        )
        bounds = map(floatToGoString, (*ITL_BUCKETS, math.inf))
        buckets = list(zip(bounds, accumulate(self._gaps), strict=True))
        gaps.add_metric((self._model,), buckets, self._gap_seconds)
        yield gaps


class _Workers(Collector):
    """The workers' latest Loads as metric families, made anew at each scrape."""

    def __init__(self, model: str, workers: Callable[[], Iterable[WorkerView]]) -> None:
        self._model = model
        self._workers = workers
        self.held_back: Callable[[], float] | None = None  # in the gateway's own queue

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry would otherwise scrape all workers at registration."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        views = sorted(self._workers(), key=lambda view: (view.role, view.name))
        yield from self._gauges(views)
        yield from self._counters(views)

    def _gauges(self, views: list[WorkerView]) -> Iterator[Metric]:
        labels = ("model_name", "role", "worker")
        running = GaugeMetricFamily(
            "vllm:num_requests_running", "Sequences in the running batch.", labels=labels
        )
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting",
            "Sequences waiting to be scheduled: on workers, and in the gateway's queue for them.",
            labels=labels,
        )
        if self.held_back is not None:
            waiting.add_metric((self._model, "gateway", ""), self.held_back())
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of blocks in use, 0 to 1.", labels=labels
        )
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The size of a worker's KV cache.",
            labels=(*labels, "block_size", "num_gpu_blocks"),
        )
        queued = GaugeMetricFamily(
            "baton_queued_prompt_tokens", "Prompt tokens accepted, not computed.", labels=labels
        )
        held = GaugeMetricFamily(
            "baton_held_blocks", "Blocks by state; they add up to all.", labels=(*labels, "state")
        )
        for view in views:
            load, who = view.load, (self._model, view.role, view.name)
            running.add_metric(who, load.running)
            waiting.add_metric(who, load.waiting)
            busy = load.owned_blocks + load.promised_blocks
            usage.add_metric(who, busy / view.blocks if view.blocks else 0.0)
            info.add_metric((*who, str(view.block_size), str(view.blocks)), 1)
            queued.add_metric(who, load.queued_tokens)
            held.add_metric((*who, "free"), load.free_blocks)
            held.add_metric((*who, "promised"), load.promised_blocks)
            held.add_metric((*who, "owned"), load.owned_blocks)
            held.add_metric((*who, "cached"), load.cached_blocks)
        yield from (running, waiting, usage, info, queued, held)

    def _counters(self, views: list[WorkerView]) -> Iterator[Metric]:
        """What Loads carry besides their fields: counters, gauges, and one histogram."""
        known = _WORKER_COUNTERS | _WORKER_GAUGES
        own_labels = {name: labels for name, (_, labels) in known.items()}
        texts = {name: text for name, (text, _) in known.items()}
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        samples: list[tuple[str, tuple[str, ...], float]] = []
        for view in views:
            for key, value in view.load.counters:
                if key.startswith(_OVERHEAD):
                    continue
                split = _split(key)
                if split is None:
                    continue
                name, own = split
                # One name with two sets of labels would make the whole page invalid.
                if own_labels.setdefault(name, tuple(own)) == tuple(own):
                    who = (self._model, view.role, view.name, *own.values())
                    samples.append((name, who, value))
        for name, labels in own_labels.items():
            family = GaugeMetricFamily if name in _WORKER_GAUGES else CounterMetricFamily
            families[name] = family(
                name,
                texts.get(name, "Counted by a worker."),
                labels=("model_name", "role", "worker", *labels),
            )
        for name, who, value in samples:
            families[name].add_metric(who, value)
        yield from families.values()
        yield self._overhead(views)

    def _overhead(self, views: list[WorkerView]) -> Metric:
        family = HistogramMetricFamily(
            _OVERHEAD,
            "What a step took on the host beside the model's forward.",
            labels=("model_name", "role", "worker"),
        )
        for view in views:
            sent = dict(view.load.counters)
            names = [bound(value) for value in (*OVERHEAD_BUCKETS, math.inf)]
            buckets = [(name, sent.get(labelled(STEP_OVERHEAD, le=name))) for name in names]
            counts = [(name, count) for name, count in buckets if count is not None]
            if counts:
                who = (self._model, view.role, view.name)
                family.add_metric(who, counts, sent.get(STEP_OVERHEAD_SUM, 0.0))
        return family


def _split(key: str) -> tuple[str, dict[str, str]] | None:
    """Undo `labelled()`; None for what it did not make.

    A name that this file does not list gets a prefix, so that it can shadow none of the gateway's.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    name, label, value = match.groups()
    name = name.removesuffix("_total")
    if name not in _WORKER_COUNTERS and name not in _WORKER_GAUGES:
        name = f"baton_worker_{name.replace(':', '_').removeprefix('baton_')}"
    return name, {label: value} if label else {}
